"""The least that a trainer does to run under the planner: a first plan.

    python3 first_plan.py                           # two processes of its own
    torchrun --nproc_per_node=2 first_plan.py       # as trainers are started; with a
                                                    # torch from PyPI (Debian's is broken)

The model has the parts of a torchtitan transformer: tok_embeddings, layers, norm,
output, with blocks that take [batch, sequence, width]. Each step runs a plan and
prints what it was expected to take. Needs a planner on 127.0.0.1:7411, or the
address in the environment variable PLANNER.
"""

import os
import uuid

import grpc
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import pipeweaver
from pipeweaver.job import JobView
from pipeweaver.torch import (
    DistributedTransport, PipelineExecutor, PipelineModule)
from pipeweaver.torch.collectives import (
    agree, broadcast_bytes, broadcast_metadata, broadcast_registration)
from pipeweaver.v1 import job_pb2

SERVER = os.environ.get("PLANNER", "127.0.0.1:7411")
VOCAB, WIDTH, FFN, HEADS, BLOCKS = 256, 64, 128, 4, 6
SEQUENCE, BATCH, MICROBATCHES, STEPS = 32, 2, 4, 5


class TransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.wo = nn.Linear(WIDTH, WIDTH)
        self.ffn_norm = nn.LayerNorm(WIDTH)
        self.w1, self.w2 = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in
                   self.qkv(self.attention_norm(x)).chunk(3, -1))
        score = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        y = score.masked_fill(mask, float("-inf")).softmax(-1) @ v
        x = x + self.wo(y.transpose(1, 2).reshape(b, n, WIDTH))
        return x + self.w2(F.silu(self.w1(self.ffn_norm(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(TransformerBlock() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCAB)


# The model's parts as the executor's layers: packed tokens in, packed tokens out.

class Embed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.table = model.tok_embeddings

    def forward(self, state, context):
        return (self.table(torch.cat([ids[:-1] for ids in context.data])),)


class Block(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, state, context):
        # All sequences are of one length here: packed is [batch * sequence].
        x = state[0].view(len(context.sub.items), -1, WIDTH)
        return (self.block(x).reshape(-1, WIDTH),)


class Head(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.norm, self.output = model.norm, model.output

    def forward(self, state, context):
        labels = torch.cat([ids[1:] for ids in context.data])
        logits = self.output(self.norm(state[0]))
        context.add_loss(F.cross_entropy(logits, labels, reduction="sum") /
                         (MICROBATCHES * BATCH * SEQUENCE))
        return ()


def describe_job(ranks):
    """Step 1: what the planner knows of the trainer."""
    job = job_pb2.Job(name=f"first-plan-{uuid.uuid4().hex[:8]}")
    text = job.modules.add(name="text", modality=job_pb2.MODALITY_TEXT)
    text.layers.add(kind=job_pb2.LAYER_KIND_EMBEDDING, count=1,
                    hidden_size=WIDTH, vocab_size=VOCAB)
    text.layers.add(kind=job_pb2.LAYER_KIND_TRANSFORMER, count=BLOCKS,
                    hidden_size=WIDTH, ffn_size=FFN, heads=HEADS, causal=True)
    text.layers.add(kind=job_pb2.LAYER_KIND_LM_HEAD, count=1,
                    hidden_size=WIDTH, vocab_size=VOCAB)
    job.parallelism.pipeline_parallel = ranks
    job.data_type = job_pb2.DATA_TYPE_FP32
    job.device.name = "cpu-core"
    job.device.peak_flops_per_second = 10 ** 10
    job.device.memory_bandwidth_bytes_per_second = 5 * 10 ** 9
    job.device.memory_bytes = 2 * 10 ** 9
    for link in (job.links.tensor_parallel, job.links.p2p_intra_node,
                 job.links.p2p_inter_node, job.links.host):
        link.latency_ns = 50_000
        link.bandwidth_bytes_per_second = 10 ** 9
    job.executor.split_backward = True
    job.executor.full_recompute = True
    job.max_microbatch_tokens.append(BATCH * SEQUENCE)
    return job


def main():
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # What ranks tell each other is on the host, whatever the default group sends.
    host_group = dist.new_group(backend="gloo")

    # Step 2: register, and tell all ranks.
    registration = job = None
    if rank == 0:
        job = describe_job(ranks)
        try:
            registration = pipeweaver.register(SERVER, job, str(uuid.uuid4()))
        except grpc.RpcError as error:
            raise SystemExit(f"planner at {SERVER}: {error.details()}")
    registration = broadcast_registration(registration, 0, host_group)
    job = job_pb2.Job.FromString(broadcast_bytes(
        job.SerializeToString() if job is not None else None, 0, host_group))
    job.layout.CopyFrom(registration.layout)
    view = JobView(job)

    # Step 3: this rank's layers, by the layout.
    torch.manual_seed(0)
    model = Transformer()
    layers = [Embed(model), *map(Block, model.layers), Head(model)]
    chunks = {}
    for module, segment, position in view.local_chunks(rank):
        chunk = view.chunks[module][segment][position]
        chunks[segment, position] = layers[
            chunk.first_layer:chunk.first_layer + chunk.num_layers]
    executor = PipelineExecutor(view, rank, [PipelineModule(chunks, WIDTH)],
                                DistributedTransport())
    optimizer = torch.optim.AdamW(executor.parameters(), lr=1e-3)

    # Step 4: the agent.
    builder = pipeweaver.MetadataBuilder(job)
    options = pipeweaver.AgentOptions(prepare=executor.prepare)
    with pipeweaver.StepAgent(SERVER, job, rank, registration,
                              submits=rank == 0, options=options) as agent:

        def submit(step):
            """Step 5: sizes of what the loader has for the step."""
            metadata = builder.batch([builder.vlm_microbatch([SEQUENCE] * BATCH)
                                      for _ in range(MICROBATCHES)])
            agent.submit(step, broadcast_metadata(metadata, 0, host_group))

        def data(module, microbatch, items):
            generator = torch.Generator().manual_seed(microbatch)
            ids = torch.randint(VOCAB, (BATCH, SEQUENCE + 1),
                                generator=generator)
            return [ids[i] for i in items]

        submit(0)
        agent.wait(0, 10.0)
        for step in range(STEPS):
            if step + 1 < STEPS:
                submit(step + 1)
            # Step 6: agree, run, report.
            agree(agent, step, host_group)
            program = agent.program(step)
            result = executor.run(program.prepared, data)
            optimizer.step()
            optimizer.zero_grad()
            agent.report(step, result.step_ns, result.start_offset_ns,
                         result.duration_ns, result.peak_memory_bytes)
            if result.loss is not None:
                print(f"step {step}: {program.origin} program, loss "
                      f"{float(result.loss):.4f}, {result.step_ns / 1e6:.1f} ms",
                      flush=True)
        if rank == 0:
            print(dict(agent.counters), flush=True)
    dist.barrier()


def start(rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    main()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        try:
            torch.multiprocessing.spawn(start, nprocs=2)
        except torch.multiprocessing.ProcessExitedException as error:
            raise SystemExit(error.exit_code)  # which has said why
