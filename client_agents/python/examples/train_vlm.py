"""Trains a small multimodal model under a live planner, on this machine.

    python3 train_vlm.py --server=127.0.0.1:7411 --ranks=2 --steps=10
    python3 train_vlm.py --model=t2v ...

`--model=vlm`: a ViT feeds a language model; `--model=t2v`: a text encoder
conditions a diffusion transformer. Data is synthetic, its sizes follow deciles
of real data sets, scaled down to what a few CPU cores train in a second. Each
rank is a process; they speak gloo. The server proposes the layout, so it must be
there at the start; when it goes, the run goes on with safe programs, and says so.
"""

import argparse
import random
import tempfile
import time
import uuid

import grpc
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

import pipeweaver
from pipeweaver.job import BatchView, JobView
from pipeweaver.torch import (
    DistributedTransport, ExecutorOptions, PipelineExecutor, PipelineModule)
from pipeweaver.torch.collectives import (
    agree, broadcast_bytes, broadcast_metadata, broadcast_registration)
from pipeweaver.v1 import job_pb2 as jobs
from pipeweaver.v1 import planner_service_pb2 as service
from small_models import (
    Block, DitBlock, DitEmbed, DitHead, DitModule, Embedding, LmHead, Merger,
    PatchEmbed)

# Deciles 0 %, 10 %, ... 100 % of real data sets (image aspect ratio, words of a
# question about an image, words of a prompt, seconds of a clip); sources:
# semu/model/sample_quantiles.inc.
IMAGE_ASPECT = [0.348, 0.748, 0.8, 1.333, 1.333, 1.333, 1.333, 1.492, 1.5,
                1.506, 3.886]
QUESTION_WORDS = [4, 6, 7, 7, 8, 9, 10, 11, 13, 31, 239]
PROMPT_WORDS = [1, 5, 8, 10, 13, 18, 89, 99, 108, 130, 221]
CLIP_SECONDS = [0.11, 5.0, 6.2, 7.9, 10.0, 13.0, 18.0, 28.2, 52.0, 150, 242]
TOKENS_PER_WORD = 1.3

PATCH_PIXELS, LONGER_SIDE = 14, 112
PATCH_VALUES = 3 * PATCH_PIXELS * PATCH_PIXELS
MERGE = 4
VOCAB = 500
LATENT_VALUES = 64
WIDTH = {"vision": 64, "text": 96, "dit": 96}
BLOCKS = {"vision": 5, "text": 6, "dit": 6}
HEADS = 4


def draw(rng, deciles):
    at = rng.random() * 10
    low = int(at)
    return deciles[low] + (at - low) * (deciles[low + 1] - deciles[low])


def make_job(model, ranks):
    """The job as the planner sees it. The layout is left to the planner."""
    # The device's measured speed is part of the job: a name for each run.
    job = jobs.Job(name=f"example-{model}-{uuid.uuid4().hex[:8]}")
    names = ["vision", "text"] if model == "vlm" else ["text", "dit"]
    for name in names:
        width, blocks = WIDTH[name], BLOCKS[name]
        block = dict(hidden_size=width, ffn_size=2 * width, heads=HEADS)
        module = job.modules.add(name=name)
        if name == "vision":
            module.modality = jobs.MODALITY_IMAGE
            module.layers.add(kind=jobs.LAYER_KIND_PATCH_EMBED, count=1,
                              hidden_size=width, input_size=PATCH_VALUES)
            module.layers.add(kind=jobs.LAYER_KIND_TRANSFORMER, count=blocks,
                              **block)
            # hidden -> ffn -> input: the merger is one matmul of merged tokens.
            module.layers.add(kind=jobs.LAYER_KIND_PROJECTOR, count=1,
                              hidden_size=width, ffn_size=WIDTH["text"],
                              input_size=WIDTH["text"])
        elif name == "text":
            module.modality = jobs.MODALITY_TEXT
            module.layers.add(kind=jobs.LAYER_KIND_EMBEDDING, count=1,
                              hidden_size=width, vocab_size=VOCAB)
            module.layers.add(kind=jobs.LAYER_KIND_TRANSFORMER, count=blocks,
                              causal=True, **block)
            if model == "vlm":
                module.layers.add(kind=jobs.LAYER_KIND_LM_HEAD, count=1,
                                  hidden_size=width, vocab_size=VOCAB)
        else:
            module.modality = jobs.MODALITY_VIDEO
            # 8x8 pixels to a latent, 2x2 latents to a token; 8 frames to one.
            module.token_grid.pixels_per_token_height = 16
            module.token_grid.pixels_per_token_width = 16
            module.token_grid.frames_per_token = 8
            module.layers.add(kind=jobs.LAYER_KIND_PATCH_EMBED, count=1,
                              hidden_size=width, input_size=LATENT_VALUES)
            module.layers.add(kind=jobs.LAYER_KIND_DIT, count=blocks, **block)
            module.layers.add(kind=jobs.LAYER_KIND_PROJECTOR, count=1,
                              hidden_size=width, ffn_size=LATENT_VALUES,
                              input_size=LATENT_VALUES)
    job.edges.add(producer=names[0], consumer=names[1],
                  tokens_merged=MERGE if model == "vlm" else 1)
    job.parallelism.pipeline_parallel = ranks
    job.data_type = jobs.DATA_TYPE_FP32
    job.max_microbatch_tokens.extend([1024] * 2)
    # What one core of a small machine does.
    job.device.name = "cpu-core"
    job.device.peak_flops_per_second = measured_flops()
    job.device.memory_bandwidth_bytes_per_second = 5 * 10 ** 9
    job.device.memory_bytes = 2 * 10 ** 9
    for link in (job.links.tensor_parallel, job.links.p2p_intra_node,
                 job.links.p2p_inter_node, job.links.host):
        link.latency_ns = 300_000
        link.bandwidth_bytes_per_second = 10 ** 9
    can = job.executor
    can.split_backward = can.selective_recompute = can.full_recompute = True
    can.offload = can.v_placement = True
    return job


def measured_flops():
    """Of one thread, by a matmul of the size that the layers have."""
    a = torch.randn(256, 256)
    for _ in range(3):
        a @ a
    begin = time.perf_counter()
    for _ in range(50):
        a @ a
    return int(50 * 2 * 256 ** 3 / (time.perf_counter() - begin))


def make_batch(job, model, rng, microbatches):
    """A step's metadata, as a loader would know it before it reads pixels."""
    builder = pipeweaver.MetadataBuilder(job)
    made = []
    for _ in range(microbatches):
        if model == "vlm":
            samples = rng.randint(2, 4)
            grids, per_sample, lengths = [], [], []
            for _ in range(samples):
                count = rng.randint(0, 3)
                tokens = min(64, max(4, round(
                    draw(rng, QUESTION_WORDS) * TOKENS_PER_WORD)))
                for _ in range(count):
                    aspect = draw(rng, IMAGE_ASPECT)
                    h = w = LONGER_SIDE // PATCH_PIXELS
                    if aspect >= 1:
                        h = max(2, round(h / aspect))
                    else:
                        w = max(2, round(w * aspect))
                    grids.append((1, h, w))
                    tokens += -(-h * w // MERGE)
                per_sample.append(count)
                lengths.append(tokens)
            made.append(builder.vlm_microbatch(lengths, grids, per_sample))
        else:
            clips = rng.randint(1, 3)
            made.append(builder.t2v_microbatch(
                [min(128, max(1, round(draw(rng, PROMPT_WORDS) *
                                       TOKENS_PER_WORD)))
                 for _ in range(clips)],
                [round(16 * min(4, draw(rng, CLIP_SECONDS))) or 1
                 for _ in range(clips)],
                [64] * clips, [96] * clips))
    return builder.batch(made)


def build_layers(name, model):
    width, count = WIDTH[name], BLOCKS[name]
    if name == "vision":
        return [PatchEmbed(PATCH_VALUES, width),
                *(Block(width, False, HEADS) for _ in range(count)),
                Merger(width, WIDTH["text"], MERGE)]
    if name == "text":
        layers = [Embedding(VOCAB, width),
                  *(Block(width, True, HEADS) for _ in range(count))]
        return layers + ([LmHead(VOCAB, width, 1e-3)] if model == "vlm" else [])
    return [DitEmbed(LATENT_VALUES, width, WIDTH["text"]),
            *(DitBlock(width, WIDTH["text"], HEADS) for _ in range(count)),
            DitHead(LATENT_VALUES, width, 1e-4)]


def local_modules(view, model, rank):
    """This rank's chunks by the layout; every rank draws the same weights."""
    torch.manual_seed(0)
    modules = []
    for m, module in enumerate(view.job.modules):
        layers = build_layers(module.name, model)
        chunks = {(s, k): layers[c.first_layer:c.first_layer + c.num_layers]
                  for s, segment in enumerate(view.chunks[m])
                  for k, c in enumerate(segment) if c.rank == rank}
        if module.name == "dit":
            modules.append(DitModule(chunks, WIDTH["dit"], WIDTH["text"], True))
        else:
            modules.append(PipelineModule(chunks, WIDTH[module.name],
                                          output_width=WIDTH["text"]))
    return modules


class SyntheticData:
    """Content for a step's items: what a loader would have decoded."""

    def __init__(self, view, batch, step):
        self._view = view
        self._batch = BatchView(view, batch)
        self._step = step

    def __call__(self, module, microbatch, items):
        name = self._view.module_name(module)
        tokens = self._batch.microbatches[microbatch].item_tokens[module]
        found = []
        for item in items:
            generator = torch.Generator().manual_seed(
                hash((self._step, module, microbatch, item)) % 2 ** 31)
            n = tokens[item]
            if name == "text":
                # Each token follows from the one before: there is something
                # to learn.
                start = torch.randint(VOCAB, (1,), generator=generator)
                ids = (start + 7 * torch.arange(n + 1)) % VOCAB
                found.append((ids[:-1], ids[1:]))
            elif name == "vision":
                found.append(torch.randn(n, PATCH_VALUES, generator=generator))
            else:
                clip = torch.randn(n, LATENT_VALUES, generator=generator)
                found.append((clip, 0.5 * clip))
        return found


def run_rank(rank, options, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank,
                            world_size=options.ranks)
    registration = None
    if rank == 0:
        job = make_job(options.model, options.ranks)
        try:
            # Batches such as those below, on which a layout is chosen.
            samples = [make_batch(job, options.model, random.Random(seed),
                                  options.microbatches) for seed in (1, 2, 3)]
            registration = pipeweaver.register(
                options.server, job, str(uuid.uuid4()), sample_batches=samples)
        except grpc.RpcError as error:
            raise SystemExit(f"planner at {options.server}: {error.details()}")
    else:
        job = None
    registration = broadcast_registration(registration, 0)
    job = broadcast_job(job, registration)
    view = JobView(job)
    executor = PipelineExecutor(
        view, rank, local_modules(view, options.model, rank),
        DistributedTransport(), options=ExecutorOptions(deterministic=True))
    optimizer = torch.optim.AdamW(executor.parameters() or
                                  [nn.Parameter(torch.zeros(1))], lr=3e-3)
    rng = random.Random(0)
    agent_options = pipeweaver.AgentOptions(prepare=executor.prepare)
    batches, submitted = {}, {}
    with pipeweaver.StepAgent(options.server, job, rank, registration,
                              submits=rank == 0, options=agent_options) as agent:
        client = pipeweaver.PlannerClient(options.server)

        def submit(step):
            batch = make_batch(job, options.model, rng, options.microbatches)
            batches[step] = broadcast_metadata(batch, 0)
            submitted[step] = time.perf_counter()
            agent.submit(step, batches[step])

        submit(0)
        agent.wait(0, 5.0)
        for step in range(options.steps):
            if step + 1 < options.steps:
                submit(step + 1)  # a real loader does this ahead, aside
            agree(agent, step)
            program = agent.program(step)
            result = executor.run(program.prepared, SyntheticData(
                view, batches.pop(step), step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            agent.report(step, result.step_ns, result.start_offset_ns,
                         result.duration_ns, result.peak_memory_bytes)
            both = torch.tensor([float(result.loss or 0.0), 0.0])
            dist.all_reduce(both)
            slowest = torch.tensor([result.step_ns])
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if rank == 0:
                print_step(step, float(both[0]), program, int(slowest), client)
        if rank == 0:
            print("counters:", dict(agent.counters), flush=True)
            try:
                client.call("RemoveJob", service.RemoveJobRequest(job=job.name),
                            5.0)
            except grpc.RpcError as error:
                print(f"the job stays at the planner: {error.details()}")
        client.close()
    dist.barrier()
    dist.destroy_process_group()


def broadcast_job(job, registration):
    data = broadcast_bytes(job.SerializeToString() if job else None, 0)
    job = jobs.Job.FromString(data)
    job.layout.CopyFrom(registration.layout)
    return job


def print_step(step, loss, program, step_ns, client):
    line = (f"step {step}: loss {loss:.4f}, {program.origin} program, measured "
            f"{step_ns * 1e-6:.1f} ms")
    if program.origin == pipeweaver.PLAN:
        line += prediction(program.checked.program.identity.key, client)
    print(line, flush=True)


def prediction(key, client):
    try:
        report = client.call("GetPlan", service.GetPlanRequest(key=key),
                             5.0).plan.report
    except grpc.RpcError as error:  # gone since it made the plan
        return f", no prediction: {error.details()}"
    return (f", predicted {report.makespan_ns * 1e-6:.1f} ms, planned in "
            f"{report.submit_to_seal_ns * 1e-6:.1f} ms "
            f"(search {report.search_ns * 1e-6:.1f} ms), bubbles "
            f"{report.bubble_ratio:.3f}, gap {report.gap:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default="127.0.0.1:7411")
    parser.add_argument("--model", choices=("vlm", "t2v"), default="vlm")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--microbatches", type=int, default=4)
    options = parser.parse_args()
    store = tempfile.mktemp(prefix="pipeweaver-example-")
    try:
        multiprocessing.start_processes(run_rank, (options, store),
                                        options.ranks, start_method="fork")
    except multiprocessing.ProcessExitedException as error:
        raise SystemExit(error.exit_code)


if __name__ == "__main__":
    main()
