"""Trains under the real planner server: its plans, our executor, real torch.

Needs the server's binary: environment PIPEWEAVER_SERVER_BINARY, by default
bazel-bin/server/pipeweaver_server.
"""

import os
import pathlib
import socket
import subprocess
import sys
import time
import unittest

import models
from pipeweaver import PLAN, SAFE
from pipeweaver.job import BatchView
from pipeweaver.split import split_batch
from pipeweaver.v1 import plan_pb2
from ranks import run_ranks
from test_agent import free_port, superseded, train

BINARY = pathlib.Path(os.environ.get(
    "PIPEWEAVER_SERVER_BINARY", pathlib.Path(__file__).resolve().parents[3] /
    "bazel-bin" / "server" / "pipeweaver_server"))
STEPS = 6


def start_real(port):
    """A server with nothing in it; answers when it listens."""
    server = subprocess.Popen(
        [str(BINARY), f"--listen_address=127.0.0.1:{port}",
         "--metrics_address=none"], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.05)
    server.kill()
    raise RuntimeError("the server did not start")


def train_on_and_off(rank, transport, port):
    losses, origins, counters, _ = train(
        rank, transport, port, {2: ["kill"], 4: ["start"]}, 8, patience_s=4.0,
        restart=start_real)
    return losses, origins, counters


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
        a, split = program.checked.actions, program.checked.split
        found.update(a.kind)
        choices = {(c.module, c.segment, c.chunk): c.choices
                   for c in program.checked.program.choices}
        for kind, sub, segment, chunk, choice in zip(
                a.kind, a.sub_microbatch, a.segment, a.chunk, a.choice):
            if kind == plan_pb2.ACTION_KIND_FORWARD:
                picked = choices[split.module[sub], segment, chunk][choice]
                found.update(
                    name for name in ("offload_layers", "keep_layers",
                                      "full_recompute_layers",
                                      "selective_recompute_layers")
                    if getattr(picked, name))

    losses, origins, counters, _ = train(
        rank, transport, port, {}, STEPS, run_id=job.name, job=job, model=model,
        check=check)
    return losses, origins, counters, found


if not BINARY.exists():
    print(f"skipped: {BINARY} is missing")


@unittest.skipUnless(BINARY.exists(), f"{BINARY} is missing")
class LiveTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.port = free_port()
        cls.server = start_real(cls.port)

    @classmethod
    def tearDownClass(cls):
        cls.server.terminate()
        cls.server.wait()

    def check(self, model, ranks, frozen=(), v=False, change=None):
        job = models.make_job(model, ranks, frozen, v, name=self.id().rsplit(".", 1)[1])
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

    def test_killed_and_back_with_nothing(self):
        port = free_port()
        server = start_real(port)
        os.environ["SERVER_PID"] = str(server.pid)
        try:
            answers = run_ranks(2, "gloo", train_on_and_off, port, timeout_s=180)
        finally:
            server.kill()
            server.wait()
        for losses, origins, counters in answers:
            ran = [o for o, _ in origins]
            self.assertEqual(ran[:4], [PLAN, PLAN, SAFE, SAFE], counters)
            self.assertEqual(ran[-2:], [PLAN, PLAN], counters)
        for step in range(8):
            total = sum(a[0][step][0] for a in answers)
            expected = answers[0][0][step][1]
            self.assertLessEqual(abs(total - expected), 1e-9 * abs(expected))

    def test_a_newer_attempt_stops_the_older(self):
        [(found, origin, counters)] = run_ranks(1, "none", superseded, self.port)
        self.assertTrue(found, counters)
        self.assertEqual(origin, SAFE)

    def test_example_trains(self):
        examples = pathlib.Path(__file__).resolve().parents[1] / "examples"
        for model in ("vlm", "t2v"):
            out = subprocess.run(
                [sys.executable, str(examples / "train_vlm.py"), "--steps=2",
                 "--microbatches=2", f"--model={model}",
                 f"--server=127.0.0.1:{self.port}"], check=True, timeout=180,
                stdout=subprocess.PIPE, text=True).stdout
            self.assertRegex(out, r"step 1: loss [0-9.]+, plan program, measured "
                             r"[0-9.]+ ms, predicted [0-9.]+ ms, planned in")
            self.assertIn("counters: {'steps_plan': 2}", out)

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

    def test_memory_choices_under_a_tight_limit(self):
        found = set()
        for spare, offload in ((25_000, True), (35_000, False)):
            def change(job):
                job.name = f"tight-{spare}-{offload}"
                job.executor.offload = offload
                job.max_microbatch_tokens.extend([24, 24])
                # 122 kB hold weights, their gradients and the optimizer.
                job.memory_budget_bytes = 125_000 + spare
            found |= self.check("vlm", 2, change=change)
        print("live memory choices:", sorted(x for x in found
                                             if isinstance(x, str)))
        self.assertLess({"offload_layers", "full_recompute_layers"}, found)

    def test_without_split_backward_or_memory_choices(self):
        def change(job):
            job.executor.Clear()
            job.executor.max_segments = 4
        found = self.check("vlm", 2, change=change)
        self.assertNotIn(plan_pb2.ACTION_KIND_WEIGHT_GRAD, found)


if __name__ == "__main__":
    unittest.main()
