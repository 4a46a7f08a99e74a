"""1,000 random plans end under gloo and under rendezvous, with delays.

Each plan runs on both transports with random pauses before its actions; a
watchdog fails the test when a rank hangs. That the rendezvous transport does
hang on an order that NCCL hangs on is tested, too.
"""

import math
import os
import random
import time
import unittest

import torch

import models
import plans
from pipeweaver.job import JobView
from pipeweaver.program import check_program
from pipeweaver.torch import Hooks, PipelineExecutor
from pipeweaver.torch.transport import Post
from pipeweaver.v1 import plan_pb2
from ranks import run_ranks

PLANS = int(os.environ.get("PIPEWEAVER_RANDOM_PLANS", "1000"))
# Model, ranks, V placement, share of the plans.
CASES = [("vlm", 2, True, 0.4), ("vlm", 3, False, 0.3), ("t2v", 4, True, 0.15),
         ("omni", 4, False, 0.15)]


class Pauses(Hooks):
    """Sleeps up to a millisecond before one action in eight."""

    def __init__(self, rank):
        self._rng = random.Random(rank)

    def before(self, kind, stage):
        if self._rng.random() < 0.125:
            time.sleep(self._rng.random() * 1e-3)


def made_plans(model, ranks, v, count):
    job = JobView(models.make_job(model, ranks, v_placement=v))
    made = []
    for seed in range(count):
        rng = random.Random(seed)
        batch = models.make_batch(job.job, rng, rng.randint(1, 3),
                                  forward_only=seed % 10 == 9)
        key = plan_pb2.PlanKey(job=job.job.name, step=seed)
        made.append((batch, plans.random_plan(job, batch, seed, key=key)))
    return job, made


def run_all(rank, transport, model, job, made):
    layers = models.build_model(job, model, 1, torch.float32)
    executor = PipelineExecutor(
        job, rank, models.pipeline_modules(job, layers, rank), transport,
        hooks=Pauses(rank))
    for step, (batch, programs) in enumerate(made):
        key = plan_pb2.PlanKey(job=job.job.name, step=step)
        checked = check_program(programs[rank], key, rank)
        executor.run(executor.prepare(checked, batch),
                     models.Data(job, batch, step, torch.float32))
    return len(made)


def crossed(rank, transport):
    """Both ranks send first and wait: fine when buffered, not by rendezvous
    on one channel, where the first posts do not match."""
    a, b = torch.zeros(4), torch.ones(4)
    handles = transport.post([Post(True, 1 - rank, rank, a)], False)
    handles += transport.post([Post(False, 1 - rank, 1 - rank, b)], False)
    try:
        for handle in handles:
            transport.wait(handle)
    except RuntimeError as error:
        return str(error)
    return "ended"


def pass_on(rank, transport, dtype):
    """Rank 0 sends to rank 1, which answers what came."""
    mine = torch.arange(6).view(2, 3).to(dtype)
    tensor = mine if rank == 0 else torch.zeros_like(mine)
    [handle] = transport.post([Post(rank == 0, 1 - rank, 0, tensor)], False)
    transport.wait(handle)
    return torch.equal(tensor, mine)


class RandomPlanTest(unittest.TestCase):

    def test_random_plans_end(self):
        ran = {"gloo": 0, "rendezvous": 0}
        for model, ranks, v, share in CASES:
            job, made = made_plans(model, ranks, v, math.ceil(PLANS * share))
            for transport in ran:
                answers = run_ranks(ranks, transport, run_all, model, job, made,
                                    timeout_s=600)
                ran[transport] += answers[0]
        self.assertGreaterEqual(min(ran.values()), PLANS)
        print(f"random plans run without a hang: {ran}")


class RendezvousTest(unittest.TestCase):

    def test_is_stricter_than_gloo(self):
        answers = run_ranks(2, "rendezvous", crossed)
        self.assertNotIn("ended", answers)
        # The other rank may find its peer gone before it compares.
        self.assertTrue(any("posted a send of transfer" in a for a in answers),
                        answers)

    def test_carries_types_that_numpy_does_not_know(self):
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.bool):
            self.assertEqual(run_ranks(2, "rendezvous", pass_on, dtype),
                             [True, True])

    def test_gloo_forgives_the_same(self):
        self.assertEqual(run_ranks(2, "gloo", crossed), ["ended", "ended"])


if __name__ == "__main__":
    unittest.main()
