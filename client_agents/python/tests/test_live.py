"""Trains under the real planner server: its plans, our executor, real torch.

Needs the server's binary: environment PIPEWEAVER_SERVER_BINARY, by default
bazel-bin/server/pipeweaver_server.
"""

import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time
import unittest
import unittest.mock

import grpc

import models
from pipeweaver import PLAN, SAFE, StepAgent, register
from pipeweaver.client import ClientOptions
from pipeweaver.job import BatchView
from pipeweaver.split import split_batch
from pipeweaver.v1 import plan_pb2
from ranks import run_ranks
from test_agent import (
    check_restart, free_port, losses_of, superseded, train, train_kw)

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


def start_proxy(*arguments):
    """A proxy of this folder, when it listens."""
    proxy = subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).parent / arguments[0]),
         *map(str, arguments[1:])], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True)
    if proxy.stdout.readline() != "ready\n":
        raise RuntimeError(f"{arguments[0]} did not start")
    return proxy


def tell(proxy, word):
    proxy.stdin.write(word + "\n")
    proxy.stdin.flush()
    if proxy.stdout.readline() != "ok\n":
        raise RuntimeError(f"the proxy did not {word}")


def stop(process):
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def same_split(job, batch, program):
    """The planner's split is the one that the safe program has."""
    split = split_batch(BatchView(job, batch)).to_proto()
    if program.checked.split != split:
        raise AssertionError(f"the planner splits into {program.checked.split}, "
                             f"the agent into {split}")


def old_and_live(rank, transport, port, first_back):
    """Two runs of one job, of which the first was not told to end. The server is
    started again, and knows neither. What each says of its next two steps when
    the one named comes back first: the origin, and whether it is superseded."""
    server = start_real(port)
    try:
        job = models.make_job("vlm", 2)
        job.layout.CopyFrom(
            register(f"127.0.0.1:{port}", job, "proposed").layout)
        agents = {run: StepAgent(f"127.0.0.1:{port}", job, 0, register(
            f"127.0.0.1:{port}", job, run), submits=True)
            for run in ("old", "live")}
        stop(server)
        server = start_real(port)

        def step(run, number):
            agent = agents[run]
            agent.submit(number, models.make_batch(job, random.Random(number), 1))
            agent.wait(number, 5.0)
            token = agent.vote(number)
            return agent.settle(number, token, token), agent.superseded

        order = sorted(agents, key=lambda run: run != first_back)
        said = {run: [step(run, 0)] for run in order}
        for run in order:
            said[run].append(step(run, 1))
        for agent in agents.values():
            agent.close()
        return said
    finally:
        stop(server)


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


def register_only(rank, transport, port, name):
    register(f"127.0.0.1:{port}", models.make_job("vlm", 2, name=name), "before")


def one_step(rank, transport, port, name):
    """An agent's counters after a step that it waited for."""
    job = models.make_job("vlm", 2, name=name)
    server = f"127.0.0.1:{port}"
    with StepAgent(server, job, 0, register(server, job, "run"),
                   submits=True) as agent:
        agent.submit(0, models.make_batch(job, random.Random(0), 1), 5.0)
        agent.wait(0, 10.0)
        token = agent.vote(0)
        agent.settle(0, token, token)
        return dict(agent.counters)


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
            self.assertEqual(a[1], [PLAN] * STEPS, a[2])
        self.assertEqual(len(losses_of(answers)), STEPS)
        return set().union(*(a[3] for a in answers))

    def disturbed(self, port, events=None, steps=8, patience_s=3.0, **kw):
        """What each step ran and the ranks' counters. The losses are those of
        the undisturbed run, bit by bit: plan and safe program split alike."""
        name = self.id().rsplit(".", 1)[1]
        answers = run_ranks(2, "gloo", train_kw, port, events or {}, steps, {
            "patience_s": patience_s,
            "job": models.make_job("vlm", 2, name=name), **kw}, timeout_s=180)
        undisturbed = run_ranks(2, "gloo", train_kw, self.port, {}, steps, {
            "job": models.make_job("vlm", 2, name=f"{name}-undisturbed")},
            timeout_s=180)
        for a in undisturbed:
            self.assertEqual(a[2], {"steps_plan": steps})
        self.assertEqual(losses_of(answers), losses_of(undisturbed))
        origins = [a[1] for a in answers]
        self.assertEqual(origins[0], origins[1])
        for ran, a in zip(origins, answers):
            self.assertEqual(a[2]["steps_plan"], ran.count(PLAN))
            self.assertEqual(a[2].get("steps_safe", 0), ran.count(SAFE))
            self.assertEqual(a[3], [], "threads are left")
        return origins[0], [a[2] for a in answers]

    def test_killed_and_back_with_nothing(self):
        port = free_port()
        server = start_real(port)
        # The run's attempt is not the first one, which the server that comes
        # back hands out.
        run_ranks(1, "none", register_only, port,
                  self.id().rsplit(".", 1)[1])
        try:
            origins, counters = self.disturbed(port, {
                2: [lambda: os.kill(server.pid, signal.SIGKILL)],
                4: [lambda: start_real(port)]})
        finally:
            stop(server)
        self.assertEqual(origins[:4], [PLAN, PLAN, SAFE, SAFE], counters)
        self.assertEqual(origins[-2:], [PLAN, PLAN], counters)
        for c in counters:
            self.assertGreaterEqual(c["server_unreachable"], 2)
        self.assertGreaterEqual(
            sum(c.get("registered_again", 0) for c in counters), 1)

    def cut(self, word, **kw):
        """The connection goes at step 2 and is healed at step 4, while the
        server lives on."""
        port = free_port()
        proxy = start_proxy("tcp_proxy.py", port, self.port)
        try:
            return self.disturbed(port, {
                2: [lambda: tell(proxy, word)],
                4: [lambda: tell(proxy, "heal")]}, **kw)
        finally:
            stop(proxy)

    def test_step_that_the_server_refuses(self):
        class Refused(grpc.RpcError):
            def code(self):
                return grpc.StatusCode.OUT_OF_RANGE

            def details(self):
                return "key.step: 3, is over"

        job = models.make_job("vlm", 2, name=self.id().rsplit(".", 1)[1])
        server = f"127.0.0.1:{self.port}"
        batch = models.make_batch(job, random.Random(0), 1)
        with StepAgent(server, job, 0, register(server, job, "run"),
                       submits=True) as agent:
            call = agent._client.call

            def refuse(method, *rest, **named):
                if method == "SubmitStep":
                    raise Refused()
                return call(method, *rest, **named)

            with unittest.mock.patch.object(agent._client, "call", refuse):
                with self.assertLogs("pipeweaver", "WARNING") as logs:
                    agent.submit(3, batch)
                    agent.wait(3, 1.0)
                    agent.settle(3, agent.vote(3), 5)
            counters = dict(agent.counters)
        self.assertEqual(counters["submission_refused"], 1)
        self.assertEqual(counters["no_plan"], 1)
        self.assertNotIn("server_unreachable", counters)
        self.assertIn("key.step: 3, is over", "".join(logs.output))

    def test_connection_reset_and_healed(self):
        origins, counters = self.cut("reset")
        self.assertEqual(origins[:4], [PLAN, PLAN, SAFE, SAFE], counters)
        self.assertEqual(origins[-2:], [PLAN, PLAN], counters)
        for c in counters:
            self.assertGreaterEqual(c["server_unreachable"], 2)

    def test_connection_silent_and_healed(self):
        origins, counters = self.cut("blackhole", patience_s=2.0)
        self.assertEqual(origins[:4], [PLAN, PLAN, SAFE, SAFE], counters)
        self.assertEqual(origins[-2:], [PLAN, PLAN], counters)
        for c in counters:
            self.assertEqual(c["steps_safe"], c.get("plan_late", 0) +
                             c.get("server_unreachable", 0) +
                             c.get("ranks_disagreed", 0))

    def test_connection_that_takes_long_to_make(self):
        port = free_port()
        proxy = start_proxy("tcp_proxy.py", port, self.port)
        tell(proxy, "slow")
        try:
            [counters] = run_ranks(1, "none", one_step, port,
                                   self.id().rsplit(".", 1)[1])
        finally:
            stop(proxy)
        self.assertEqual(counters, {"steps_plan": 1})

    def test_connection_dead_for_good_is_replaced(self):
        port = free_port()
        proxy = start_proxy("tcp_proxy.py", port, self.port)
        try:
            origins, counters = self.disturbed(
                port, {2: [lambda: tell(proxy, "freeze")]},
                client=ClientOptions(probe_after_s=2.0, probe_timeout_s=1.0))
        finally:
            stop(proxy)
        self.assertEqual(origins[:2], [PLAN, PLAN], counters)
        self.assertIn(SAFE, origins)
        self.assertEqual(origins[-2:], [PLAN, PLAN], counters)

    def with_faults(self, faults, **kw):
        port = free_port()
        proxy = start_proxy("fault_proxy.py", port, self.port,
                            json.dumps(faults))
        try:
            return self.disturbed(port, steps=6, **kw)
        finally:
            stop(proxy)

    def test_answer_late(self):
        origins, counters = self.with_faults({"delay_s": {"2": 2.5}},
                                             patience_s=1.0)
        self.assertEqual(origins, [PLAN, PLAN, SAFE, PLAN, PLAN, PLAN])
        self.assertEqual(counters, [{"steps_plan": 5, "steps_safe": 1,
                                     "plan_late": 1}] * 2)

    def test_one_ranks_answer_lost(self):
        origins, counters = self.with_faults({"lose": [[2, 1]]}, patience_s=1.0)
        self.assertEqual(origins, [PLAN, PLAN, SAFE, PLAN, PLAN, PLAN])
        self.assertEqual(counters[0]["ranks_disagreed"], 1)
        self.assertEqual(counters[1]["server_unreachable"], 1)

    def test_corrupted_program(self):
        origins, counters = self.with_faults({"corrupt": [[1, 0], [3, 1]]})
        self.assertEqual(origins, [PLAN, SAFE, PLAN, SAFE, PLAN, PLAN])
        for c in counters:
            self.assertEqual((c["plan_refused"], c["ranks_disagreed"]), (1, 1))

    def test_restart_from_a_checkpoint(self):
        check_restart(self, self.port)

    def test_a_newer_attempt_stops_the_older(self):
        [(found, origin, counters)] = run_ranks(1, "none", superseded, self.port)
        self.assertTrue(found, counters)
        self.assertEqual(origin, SAFE)

    def test_of_two_runs_the_newer_one_outlives_a_restart(self):
        for first_back, old in (("live", (SAFE, True)), ("old", (PLAN, False))):
            with self.subTest(first_back=first_back):
                [said] = run_ranks(1, "none", old_and_live, free_port(),
                                   first_back)
                self.assertEqual(said["live"], [(PLAN, False)] * 2)
                self.assertEqual(said["old"], [old, (SAFE, True)])

    def test_first_plan(self):
        examples = pathlib.Path(__file__).resolve().parents[1] / "examples"
        out = subprocess.run(
            [sys.executable, str(examples / "first_plan.py")], check=True,
            timeout=180, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PLANNER": f"127.0.0.1:{self.port}",
                 "MASTER_PORT": str(free_port())}).stdout
        losses = [float(x) for x in
                  re.findall(r"step \d: plan program, loss ([0-9.]+)", out)]
        self.assertEqual(len(losses), 5, out)
        self.assertLess(losses[-1], losses[0])
        self.assertIn("{'steps_plan': 5}", out)

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

    def test_example_goes_on_without_the_server(self):
        examples = pathlib.Path(__file__).resolve().parents[1] / "examples"
        port = free_port()
        server = start_real(port)
        try:
            trainer = subprocess.Popen(
                [sys.executable, str(examples / "train_vlm.py"), "--steps=8",
                 "--microbatches=2", f"--server=127.0.0.1:{port}"],
                stdout=subprocess.PIPE, text=True)
            out = ""
            while "step 1:" not in out:
                line = trainer.stdout.readline()
                self.assertTrue(line, out)
                out += line
            server.kill()
            out += trainer.communicate(timeout=180)[0]
        finally:
            stop(server)
        self.assertEqual(trainer.returncode, 0, out)
        self.assertRegex(out, "step 7: loss [0-9.]+, safe program, measured "
                         "[0-9.]+ ms\n")
        self.assertIn("the job stays at the planner:", out)

    def test_vlm(self):
        self.check("vlm", 2)

    def test_t2v_on_a_v(self):
        self.check("t2v", 2, v=True)

    def test_omni_on_four_ranks(self):
        self.check("omni", 4)

    def test_padded_to_shape_buckets(self):
        def change(job):
            job.executor.shape_buckets.extend([5, 9, 16, 40])
            job.max_microbatch_tokens.extend([40, 40])
        self.check("vlm", 2, change=change)

    def test_frozen_encoder(self):
        self.check("vlm", 2, ("vision",))

    def test_frozen_backbone(self):
        self.check("vlm", 2, ("text",))

    def test_memory_choices_under_a_tight_limit(self):
        found = set()
        for spare, offload in ((45_000, True), (35_000, False)):
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
