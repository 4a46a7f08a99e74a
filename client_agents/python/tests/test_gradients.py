"""Under any plan, gradients and losses are those of the plain model.

Real processes, real torch: after each of 20 steps every weight's gradient and
the loss are compared, then both models take an SGD step.
"""

import copy
import itertools
import random
import unittest

import torch

import models
import plans
from pipeweaver.job import BatchView, JobView
from pipeweaver.split import split_batch
from pipeweaver.lowering import safe_programs
from pipeweaver.program import check_program
from pipeweaver.torch import ExecutorOptions, PipelineExecutor
from pipeweaver.v1 import plan_pb2
from ranks import run_ranks

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
CHOICES = ("keep", "selective", "full", "offload", "mixed")
SPLITS = (0.0, 1.0, 0.5)  # share of stage pairs whose backward is split
STEPS = 20


def programs_of_step(job, batch, step):
    key = plan_pb2.PlanKey(job=job.job.name, step=step)
    if step % 5 == 4:
        split = split_batch(BatchView(job, batch))
        return safe_programs(plan_pb2.PlanIdentity(key=key), split), key
    # Every choice with every form of backward comes up within 15 steps.
    choice = CHOICES[step % len(CHOICES)]
    share = SPLITS[(step // len(CHOICES)) % len(SPLITS)]
    return plans.random_plan(job, batch, step, share, (choice,), key), key


def distance(a, b):
    return float((a - b).abs().max() / max(float(b.abs().max()), 1e-30))


def made_steps(job):
    """Batch, key and all ranks' programs of each step."""
    steps = []
    for step in range(STEPS):
        batch = models.make_batch(job.job, random.Random(step), 2 + step % 2)
        steps.append((batch, *programs_of_step(job, batch, step)))
    return steps


def train(rank, transport, model, job, steps, dtype, device="cpu"):
    plain = models.build_model(job, model, 1, dtype, device)
    mine = copy.deepcopy(plain)
    announced = []
    executor = PipelineExecutor(
        job, rank, models.pipeline_modules(job, mine, rank), transport,
        device=device, dtype=dtype, options=ExecutorOptions(
            deterministic=True,
            grads_ready=lambda *chunk: announced.append(chunk)))
    local = [(f"module {m} layer {i}.{name}", p, q)
             for m, s, k in job.local_chunks(rank)
             for c in [job.chunks[m][s][k]]
             for i in range(c.first_layer, c.first_layer + c.num_layers)
             for (name, p), q in zip(mine[m][i].named_parameters(),
                                     plain[m][i].parameters())]
    trained = {(m, s, k) for m, s, k in job.local_chunks(rank)
               if job.trainable[m] and job.chunks[m][s][k].num_layers}
    losses = []
    for step, (batch, made, key) in enumerate(steps):
        data = models.Data(job, batch, step, dtype, device)
        checked = check_program(made[rank], key, rank)
        announced.clear()
        result = executor.run(executor.prepare(checked, batch), data)
        if set(announced) != trained or len(announced) != len(trained):
            raise AssertionError(f"step {step}: {announced} announced, the rank "
                                 f"trains {trained}")
        expected = models.reference_step(job, plain, batch, data)
        if expected.requires_grad:  # not in a step without the trained module
            expected.backward()
        losses.append((None if result.loss is None else float(result.loss),
                       float(expected)))
        for name, p, q in local:
            if q.grad is None:
                if p.grad is not None:
                    raise AssertionError(f"step {step}: {name}: has a gradient")
                continue
            if p.grad is None:
                if float(q.grad.abs().max()) == 0:
                    continue
                raise AssertionError(f"step {step}: {name}: has no gradient")
            off = distance(p.grad, q.grad)
            if off > TOLERANCE[dtype]:
                raise AssertionError(f"step {step}: {name}: off by {off}")
        for layers in (mine, plain):
            for p in (p for m in layers for x in m for p in x.parameters()):
                if p.grad is not None:
                    with torch.no_grad():
                        p -= 0.05 * p.grad
                    p.grad = None
    return losses


def check(test, transport, model, ranks, frozen, v, dtype, buckets=(),
          device="cpu"):
    job = JobView(models.make_job(model, ranks, frozen, v, buckets=buckets))
    answers = run_ranks(ranks, transport, train, model, job, made_steps(job),
                        dtype, device)
    for step in range(STEPS):
        total = sum(a[step][0] or 0.0 for a in answers)
        expected = answers[0][step][1]
        test.assertLessEqual(abs(total - expected),
                             TOLERANCE[dtype] * abs(expected), step)


class GradientTest(unittest.TestCase):

    def test_padded_to_shape_buckets(self):
        for model, ranks in (("vlm", 2), ("t2v", 2), ("omni", 4)):
            with self.subTest(model=model):
                check(self, "gloo", model, ranks, (), True, torch.float64,
                      (5, 9, 16, 40))


CASES = [("vlm", ()), ("t2v", ()), ("omni", ()), ("vlm", ("vision",)),
         ("vlm", ("text",)), ("t2v", ("text",)), ("omni", ("vision", "text"))]


def _add(model, frozen, ranks, v, dtype, transport):
    name = "_".join(["test", model, *(f"frozen_{f}" for f in frozen),
                     f"{ranks}ranks", "v" if v else "straight",
                     str(dtype)[6:], transport])
    setattr(GradientTest, name, lambda self: check(
        self, transport, model, ranks, frozen, v, dtype))


for i, ((_model, _frozen), _ranks) in enumerate(
        itertools.product(CASES, (2, 4))):
    # Both placements and both transports meet each model.
    _add(_model, _frozen, _ranks, i % 2 == 0, torch.float64, "gloo")
    _add(_model, _frozen, _ranks, i % 2 == 1, torch.float32, "rendezvous")

if __name__ == "__main__":
    unittest.main()
