"""A plan, exported as CSV, trains in torch.distributed.pipelining.

Needs torch 2.5 or later. Gradients equal the plain model's and those of our own
executor under the same plan.
"""

import copy
import tempfile
import unittest

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

import plans
from pipeweaver.csv_export import (
    COMPUTE_COMMS, COMPUTE_ONLY, NotExportable, export_csv, torch_vocabulary)
from pipeweaver.job import BatchView, JobView
from pipeweaver.lowering import safe_programs
from pipeweaver.program import check_program
from pipeweaver.split import split_batch
from pipeweaver.torch import ExecutorOptions, PipelineExecutor, PipelineModule
from pipeweaver.v1 import batch_pb2, job_pb2, plan_pb2
from ranks import run_ranks

RANKS, LAYERS, WIDTH, TOKENS, MICROBATCHES = 2, 8, 6, 5, 4


class Layer(nn.Module):
    """Serves both executors: on a tensor, and on a state with a context."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, state, context=None):
        x = torch.cat(context.data) if state == () else (
            state[0] if isinstance(state, tuple) else state)
        x = x + torch.tanh(self.proj(x))
        return x if context is None else (x,)


class Head(Layer):
    """The last layer, with the loss when there is a context."""

    def forward(self, state, context=None):
        x = super().forward(state, context)
        if context is None:
            return x
        context.add_loss(loss(x[0], torch.zeros_like(x[0])))
        return x


def loss(output, target):
    return ((output - target) ** 2).sum()


def make_job(v):
    job = job_pb2.Job(name="chain")
    module = job.modules.add(name="text", modality=job_pb2.MODALITY_TEXT)
    module.layers.add(kind=job_pb2.LAYER_KIND_TRANSFORMER, count=LAYERS,
                      hidden_size=WIDTH, ffn_size=WIDTH, heads=1)
    job.parallelism.pipeline_parallel = RANKS
    job.executor.split_backward = True
    job.executor.v_placement = v
    entry = job.layout.modules.add(module="text",
                                   sub_microbatch_tokens=TOKENS)
    size = LAYERS // 4
    for s in range(2):
        segment = entry.segments.add()
        for i in range(RANKS):
            rank = RANKS - 1 - i if v and s else i
            segment.chunks.add(rank=rank, first_layer=(s * RANKS + i) * size,
                               num_layers=size)
    return job


def make_batch():
    batch = batch_pb2.BatchMetadata()
    for _ in range(MICROBATCHES):
        batch.microbatches.add().items.add(module=0, tokens=[TOKENS])
    return batch


def make_plan(job, batch, seed):
    key = plan_pb2.PlanKey(job="chain", step=seed)
    if seed == 0:
        made = safe_programs(plan_pb2.PlanIdentity(key=key),
                             split_batch(BatchView(job, batch)))
    else:
        made = plans.random_plan(job, batch, seed, 0.5, ("keep",), key)
    return [check_program(p, key, r) for r, p in enumerate(made)]


def exportable_seeds(v, count):
    """Random plans that keep that executor's limits."""
    job, batch, found, seed = JobView(make_job(v)), make_batch(), [], 0
    while len(found) < count:
        seed += 1
        try:
            export_csv(job, make_plan(job, batch, seed), batch)
            found.append(seed)
        except NotExportable:
            continue
    return found


def train(rank, transport, v, seed, form):
    job = JobView(make_job(v))
    batch = make_batch()
    programs = make_plan(job, batch, seed)
    torch.manual_seed(0)
    layers = [Layer() for _ in range(LAYERS - 1)] + [Head()]
    data = torch.randn(MICROBATCHES * TOKENS, WIDTH)
    plain, ours = copy.deepcopy(layers), copy.deepcopy(layers)

    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write(export_csv(job, programs, batch, form, torch_vocabulary()))
        file.flush()
        chunks = [c for segment in job.chunks[0] for c in segment]
        stages = [PipelineStage(
            nn.Sequential(*layers[c.first_layer:c.first_layer + c.num_layers]),
            i, len(chunks), torch.device("cpu"),
            group=dist.group.WORLD) for i, c in enumerate(chunks)
            if c.rank == rank]
        # PipelineStage places stages in a loop; the CSV says otherwise in a V.
        schedule = schedules._PipelineScheduleRuntime(
            stages, MICROBATCHES, loss_fn=loss, scale_grads=False)
        schedule._load_csv(file.name, format=form)
    has_first = any(s.is_first for s in stages)
    has_last = any(s.is_last for s in stages)
    losses = []
    arguments = (data,) if has_first else ()
    if has_last:
        schedule.step(*arguments, target=torch.zeros_like(data), losses=losses)
    else:
        schedule.step(*arguments)

    executor = PipelineExecutor(job, rank, [PipelineModule(
        {(s, k): ours[c.first_layer:c.first_layer + c.num_layers]
         for s, segment in enumerate(job.chunks[0])
         for k, c in enumerate(segment) if c.rank == rank}, WIDTH)], transport,
        options=ExecutorOptions(deterministic=True))
    executor.run(executor.prepare(programs[rank], batch),
                 lambda m, b, items: [data[b * TOKENS:(b + 1) * TOKENS]])

    expected = nn.Sequential(*plain)(data)
    total = loss(expected, torch.zeros_like(expected))
    total.backward()
    if has_last:
        got = sum(float(x.detach()) for x in losses)
        if abs(got - float(total)) > 1e-4 * float(total):
            raise AssertionError(f"loss {got}, the plain model's is {total}")
    compared = 0
    for c in chunks:
        if c.rank != rank:
            continue
        for i in range(c.first_layer, c.first_layer + c.num_layers):
            for a, b, q in zip(layers[i].parameters(), ours[i].parameters(),
                               plain[i].parameters()):
                for p in (a, b):
                    off = float((p.grad - q.grad).abs().max() /
                                q.grad.abs().max())
                    if off > 1e-4:
                        raise AssertionError(f"layer {i}: off by {off}")
                compared += 1
    return compared


class PipeliningTest(unittest.TestCase):

    def check(self, v, seed, form):
        for compared in run_ranks(RANKS, "gloo", train, v, seed, form):
            self.assertEqual(compared, LAYERS)

    def test_safe_program_compute_only(self):
        self.check(False, 0, COMPUTE_ONLY)

    def test_safe_program_compute_and_comms(self):
        self.check(False, 0, COMPUTE_COMMS)

    def test_random_plans(self):
        for seed in exportable_seeds(False, 4):
            self.check(False, seed, COMPUTE_ONLY)
            self.check(False, seed, COMPUTE_COMMS)

    def test_random_plans_on_a_v(self):
        for seed in exportable_seeds(True, 4):
            self.check(True, seed, COMPUTE_ONLY)
            self.check(True, seed, COMPUTE_COMMS)


if __name__ == "__main__":
    unittest.main()
