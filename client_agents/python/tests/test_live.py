"""Trains under the real planner server: its plans, our executor, real torch.

Needs the server's binary: environment PIPEWEAVER_SERVER_BINARY, by default
bazel-bin/server/pipeweaver_server.
"""

import os
import pathlib
import subprocess
import time
import unittest

import models
from pipeweaver import PLAN
from pipeweaver.job import BatchView
from pipeweaver.split import split_batch
from pipeweaver.v1 import plan_pb2
from ranks import run_ranks
from test_agent import free_port, train

BINARY = pathlib.Path(os.environ.get(
    "PIPEWEAVER_SERVER_BINARY", pathlib.Path(__file__).resolve().parents[3] /
    "bazel-bin" / "server" / "pipeweaver_server"))
STEPS = 6


def same_split(job, batch, program):
    """The planner's split is the one that the safe program has."""
    split = split_batch(BatchView(job, batch)).to_proto()
    if program.checked.split != split:
        raise AssertionError(f"the planner splits into {program.checked.split}, "
                             f"the agent into {split}")


def train_job(rank, transport, port, job, model):
    found = set()

    def check(view, batch, program):
        same_split(view, batch, program)
        found.update(program.checked.actions.kind)
        for c in program.checked.program.choices:
            found.update(choice.name for choice in c.choices)

    losses, origins, counters, _ = train(
        rank, transport, port, {}, STEPS, run_id=job.name, job=job, model=model,
        check=check)
    return losses, origins, counters, found


@unittest.skipUnless(BINARY.exists(), f"skipped: {BINARY} missing")
class LiveTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.port = free_port()
        cls.server = subprocess.Popen(
            [str(BINARY), f"--listen_address=127.0.0.1:{cls.port}",
             "--metrics_address=none"], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with subprocess.Popen(
                    ["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{cls.port}"],
                    stderr=subprocess.DEVNULL) as probe:
                if probe.wait() == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError("the server did not start")

    @classmethod
    def tearDownClass(cls):
        cls.server.terminate()
        cls.server.wait()

    def check(self, model, ranks, frozen=(), v=False, change=None):
        job = models.make_job(model, ranks, frozen, v, name=self.id()[-60:])
        if change is not None:
            change(job)
        answers = run_ranks(ranks, "gloo", train_job, self.port, job, model,
                            timeout_s=180)
        for a in answers:
            self.assertEqual([o for o, _ in a[1]], [PLAN] * STEPS, a[2])
        for step in range(STEPS):
            total = sum(a[0][step][0] for a in answers)
            expected = answers[0][0][step][1]
            self.assertLessEqual(abs(total - expected), 1e-9 * abs(expected))
        return set().union(*(a[3] for a in answers))

    def test_vlm(self):
        self.check("vlm", 2)

    def test_t2v_on_a_v(self):
        self.check("t2v", 2, v=True)

    def test_omni_on_four_ranks(self):
        self.check("omni", 4)

    def test_frozen_encoder(self):
        self.check("vlm", 2, ("vision",))

    def test_frozen_backbone(self):
        self.check("vlm", 2, ("text",))

    def test_without_split_backward_or_memory_choices(self):
        def change(job):
            job.executor.Clear()
            job.executor.max_segments = 4
        found = self.check("vlm", 2, change=change)
        self.assertNotIn(plan_pb2.ACTION_KIND_WEIGHT_GRAD, found)


if __name__ == "__main__":
    unittest.main()
