"""Trainers with agents under a fake server that fails in every way.

Two real ranks train; whatever happens to the server, they neither stall nor
diverge: losses equal the plain model's, and the counters tell what happened.
"""

import copy
import functools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import grpc
import torch

import models
from fake_server import REFUSED_MICROBATCHES
from pipeweaver import (
    PLAN, SAFE, AgentOptions, BadProgram, Registration, StepAgent, register)
from pipeweaver.agent import _register
from pipeweaver.client import ClientOptions, ClosedError, PlannerClient
from pipeweaver.job import JobView
from pipeweaver.torch import ExecutorOptions, PipelineExecutor
from pipeweaver.torch.collectives import (
    agree, broadcast_bytes, broadcast_metadata, broadcast_registration,
    share_program)
from pipeweaver.v1 import (
    batch_pb2, plan_pb2, planner_service_pb2 as service_pb2, profile_pb2)
from ranks import run_ranks

HERE = pathlib.Path(__file__).resolve().parent
RANKS = 2
DTYPE = torch.float64


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_server(port, faults):
    process = subprocess.Popen(
        [sys.executable, str(HERE / "fake_server.py"), str(port),
         json.dumps(faults)], stdout=subprocess.PIPE, text=True)
    if process.stdout.readline() != "ready\n":
        raise RuntimeError("the fake server did not start")
    return process


def train(rank, transport, port, events, steps, run_id="run", first_step=0,
          patience_s=10.0, impatient=(), job=None, model="vlm", check=None,
          client=None, load=None, save=None):
    """Trains `steps` steps; answers losses (pipeline, plain), what each step
    ran, the counters, and the agent's threads that are left.

    events: {step: [function]}, called by rank 0 before the step is submitted; one
    that starts a server answers its process. impatient: steps whose plans are
    not waited for. check: called with each step's job, batch and program.
    client: ClientOptions. load: folder of a checkpoint to start from. save:
    (folder, step), a checkpoint made before that step.
    """
    job = JobView(job or models.make_job("vlm", RANKS))
    server = f"127.0.0.1:{port}"
    plain = models.build_model(job, model, 1, DTYPE)
    mine = copy.deepcopy(plain)
    weights = [p for layers in (*mine, *plain) for x in layers
               for p in x.parameters()]
    if load is not None:
        with torch.no_grad():
            for p, saved in zip(weights, torch.load(f"{load}/{rank}")):
                p.copy_(saved)
    registration = None
    if rank == 0:
        try:
            registration = register(server, job.job, run_id, 5.0)
        except Exception:
            registration = Registration(run_id, 0, job.layout)
    registration = broadcast_registration(registration, 0)
    executor = PipelineExecutor(
        job, rank, models.pipeline_modules(job, mine, rank), transport,
        dtype=DTYPE, options=ExecutorOptions(deterministic=True))
    options = AgentOptions(prepare=executor.prepare, call_timeout_s=1.0,
                           needed_in_s=0.5,
                           client=client or ClientOptions())
    servers, losses, origins = [], [], []
    with StepAgent(server, job.job, rank, registration, submits=rank == 0,
                   options=options) as agent:
        for step in range(first_step, first_step + steps):
            if save is not None and step == save[1]:
                torch.save(weights, f"{save[0]}/{rank}")
            if rank == 0:
                for event in events.get(step, ()):
                    process = event()
                    if process is not None:
                        servers.append(process)
            batch = None
            if rank == 0:
                batch = models.make_batch(job.job, random.Random(step), 2)
            batch = broadcast_metadata(batch, 0)
            agent.submit(step, batch)
            if step not in impatient:
                agent.wait(step, patience_s)
            agree(agent, step)
            program = agent.program(step)
            origins.append(program.origin)
            if check is not None:
                check(job, batch, program)
            data = models.Data(job, batch, step, DTYPE)
            result = executor.run(program.prepared, data)
            agent.report(step, result.step_ns, result.start_offset_ns,
                         result.duration_ns, result.peak_memory_bytes)
            expected = models.reference_step(job, plain, batch, data)
            if expected.requires_grad:
                expected.backward()
            losses.append((0.0 if result.loss is None else float(result.loss),
                           float(expected)))
            for p in weights:
                if p.grad is not None:
                    with torch.no_grad():
                        p -= 0.05 * p.grad
                    p.grad = None
        if rank == 0:
            time.sleep(0.2)  # the last report is on its way
        counters = dict(agent.counters)
    threads = [t.name for t in threading.enumerate()
               if t.name.startswith("pipeweaver")]
    for process in servers:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    return losses, origins, counters, threads


SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP,
           "continue": signal.SIGCONT}


class FaultTest(unittest.TestCase):

    def trained(self, faults=None, events=None, steps=6, with_server=True, **kw):
        port = free_port()
        server = start_server(port, faults or {}) if with_server else None
        known = {"start": lambda: start_server(port, {})}
        if server is not None:
            for name, number in SIGNALS.items():
                known[name] = functools.partial(os.kill, server.pid, number)
        events = {step: [known[name] for name in names]
                  for step, names in (events or {}).items()}
        try:
            answers = run_ranks(RANKS, "gloo", train_kw, port, events, steps, kw,
                                timeout_s=90)
        finally:
            if server is not None:
                server.kill()
                server.wait()
                server.stdout.close()
        origins = [a[1] for a in answers]
        for a in answers[1:]:
            self.assertEqual(a[1], origins[0])
        self.assertEqual(len(losses_of(answers)), steps)
        for a in answers:
            self.assertEqual(a[3], [], "threads are left")
        return origins[0], [a[2] for a in answers]

    def test_undisturbed_run_runs_plans(self):
        origins, counters = self.trained()
        self.assertEqual(origins, [PLAN] * 6)
        for c in counters:
            self.assertEqual(c, {"steps_plan": 6})

    def test_without_a_server_at_all(self):
        origins, counters = self.trained(with_server=False, patience_s=0.2)
        self.assertEqual(origins, [SAFE] * 6)
        # Tries may still be on their way at a step's vote, on a busy machine most.
        self.assertEqual(counters[1]["server_unreachable"] +
                         counters[1].get("plan_late", 0), 6)
        self.assertGreaterEqual(counters[1]["server_unreachable"], 1)

    def test_server_killed_and_back_with_nothing(self):
        origins, counters = self.trained(
            events={2: ["kill"], 4: ["start"]}, steps=8, patience_s=3.0)
        self.assertEqual(origins[:4], [PLAN, PLAN, SAFE, SAFE])
        self.assertEqual(origins[-2:], [PLAN, PLAN])
        for c in counters:
            self.assertGreaterEqual(c["server_unreachable"], 2)

    def test_server_that_answers_nothing_for_a_while(self):
        origins, counters = self.trained(
            events={2: ["stop"], 4: ["continue"]}, steps=8, patience_s=1.5)
        self.assertEqual(origins[:4], [PLAN, PLAN, SAFE, SAFE])
        self.assertEqual(origins[-2:], [PLAN, PLAN])
        for c in counters:
            self.assertEqual(c["steps_safe"], c.get("plan_late", 0) +
                             c.get("server_unreachable", 0))

    def test_late_answer_costs_one_step(self):
        origins, counters = self.trained(
            faults={"delay_s": {"2": 2.5}}, patience_s=0.8)
        self.assertEqual(origins, [PLAN, PLAN, SAFE, PLAN, PLAN, PLAN])
        for c in counters:
            self.assertEqual(c, {"steps_plan": 5, "steps_safe": 1,
                                 "plan_late": 1})

    def test_corrupted_program_is_refused_by_all(self):
        origins, counters = self.trained(faults={"corrupt": [[1, 0], [3, 1]]})
        self.assertEqual(origins, [PLAN, SAFE, PLAN, SAFE, PLAN, PLAN])
        self.assertEqual(counters[0]["plan_refused"], 1)
        self.assertEqual(counters[0]["ranks_disagreed"], 1)
        self.assertEqual(counters[1]["plan_refused"], 1)
        self.assertEqual(counters[1]["ranks_disagreed"], 1)

    def test_plan_of_another_batch_is_refused(self):
        origins, counters = self.trained(faults={"wrong_batch": [2]})
        self.assertEqual(origins, [PLAN, PLAN, SAFE, PLAN, PLAN, PLAN])
        self.assertEqual([c["plan_refused"] for c in counters], [1, 1])

    def test_one_ranks_answer_lost(self):
        origins, counters = self.trained(faults={"lose": [[2, 1]]},
                                         patience_s=0.7)
        self.assertEqual(origins, [PLAN, PLAN, SAFE, PLAN, PLAN, PLAN])
        self.assertEqual(counters[0]["ranks_disagreed"], 1)
        self.assertEqual(counters[1]["server_unreachable"], 1)

    def test_restart_from_a_checkpoint_goes_back_in_steps(self):
        port = free_port()
        server = start_server(port, {})
        try:
            check_restart(self, port)
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


def check_restart(test, port):
    """A run ends, and goes on from a checkpoint made two steps before: as a new
    attempt, with the losses that the first one had."""
    with tempfile.TemporaryDirectory() as folder:
        first = run_ranks(RANKS, "gloo", train_kw, port, {}, 5,
                          {"run_id": "a", "save": (folder, 3)})
        second = run_ranks(RANKS, "gloo", train_kw, port, {}, 4,
                           {"run_id": "b", "first_step": 3, "load": folder})
    for a, b in zip(first, second):
        test.assertEqual(a[1], [PLAN] * 5)
        test.assertEqual(b[1], [PLAN] * 4)
        test.assertEqual(a[2], {"steps_plan": 5})
        test.assertEqual(b[2], {"steps_plan": 4})
    test.assertEqual(losses_of(second)[:2], losses_of(first)[3:])


def losses_of(answers):
    """The pipeline's loss of each step, compared with the plain model's."""
    losses = []
    for step in zip(*(a[0] for a in answers)):
        total = sum(loss for loss, _ in step)
        if abs(total - step[0][1]) > 1e-9 * abs(step[0][1]):
            raise AssertionError(f"step {len(losses)}: loss {total}, the plain "
                                 f"model's {step[0][1]}")
        losses.append(total)
    return losses


def train_kw(rank, transport, port, events, steps, kw):
    return train(rank, transport, port, events, steps, **kw)


def superseded(rank, transport, port):
    job = JobView(models.make_job("vlm", RANKS))
    server = f"127.0.0.1:{port}"
    old = register(server, job.job, "old")
    register(server, job.job, "new")
    batch = models.make_batch(job.job, random.Random(0), 1)
    with StepAgent(server, job.job, 0, old, submits=True) as agent:
        agent.submit(0, batch)
        agent.wait(0, 5.0)
        agent.settle(0, agent.vote(0), 5)
        return agent.superseded, agent.program(0).origin, dict(agent.counters)


def bad_reports(rank, transport, port):
    """What an agent says about each."""
    job = models.make_job("vlm", RANKS)
    times = {"step_ns": 5, "start_offset_ns": [0], "duration_ns": [1],
             "peak_memory_bytes": 0}
    said = []
    with StepAgent(f"127.0.0.1:{port}", job, 0,
                   Registration("run", 1, job.layout)) as agent:
        agent.report(0, **times)
        for wrong in ({"step_ns": 0}, {"step_ns": 1.5},
                      {"start_offset_ns": [0, -1]}, {"duration_ns": ["x"]},
                      {"peak_memory_bytes": 1 << 63}):
            try:
                agent.report(0, **{**times, **wrong})
            except ValueError as error:
                said.append(str(error))
    return said


def forked(rank, transport, port):
    """Uses a DataLoader with forked workers beside a working agent."""
    job = JobView(models.make_job("vlm", RANKS))
    server = f"127.0.0.1:{port}"
    batch = models.make_batch(job.job, random.Random(0), 1)
    with StepAgent(server, job.job, 0, register(server, job.job, "run"),
                   submits=True) as agent:
        agent.submit(0, batch)
        held = agent.wait(0, 5.0)

        class Items(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, i):
                try:
                    agent.submit(i, batch)
                except RuntimeError as error:
                    return str(error)
                return "no error"

        loader = torch.utils.data.DataLoader(Items(), num_workers=2,
                                             batch_size=None)
        said = list(loader)
        agent.submit(1, batch)
        return held, said, agent.wait(1, 5.0)


def peers(rank, transport):
    """A tensor-parallel peer gets the program from the rank with the agent."""
    job = JobView(models.make_job("vlm", RANKS))
    batch = models.make_batch(job.job, random.Random(0), 1)
    if rank == 0:
        with StepAgent("127.0.0.1:1", job.job, 0,
                       Registration("run", 0, job.layout)) as agent:
            agent.submit(0, batch)
            agree_alone = agent.settle(0, 0, 0)
            program = share_program(agent.program(0), 0)
    else:
        program = share_program(None, 0, lambda checked: checked.program.rank)
        agree_alone = program.origin
        if program.prepared != 0:
            raise AssertionError("not rank 0's program")
    return agree_alone, program.checked.program.SerializeToString()


def broadcast_all(rank, transport, cases):
    return [broadcast_bytes(case[rank], 1) for case in cases]


def broadcast_nothing(rank, transport):
    try:
        broadcast_bytes(None, 0)
    except ValueError as error:
        return str(error)


class CollectivesTest(unittest.TestCase):

    def test_what_the_source_has_is_what_all_get(self):
        cases = [(None, b"abc"), (b"xyz", b"abc"), (b"longer", b"abc"),
                 (b"x", b"abc"), (b"xyz", b""), (None, b"")]
        for found in run_ranks(2, "gloo", broadcast_all, cases):
            self.assertEqual(found, [case[1] for case in cases])

    def test_the_source_must_have_something(self):
        self.assertEqual(run_ranks(1, "gloo", broadcast_nothing),
                         ["data: None, must be bytes on rank 0, the source"])


class ClientTest(unittest.TestCase):

    def fails(self, client):
        """How a call and a call in progress fail."""
        found = []
        for call in (lambda *args: client.call(*args),
                     lambda *args: client.begin(*args).result()):
            with self.assertRaises(Exception) as raised:
                call("ListJobs", service_pb2.ListJobsRequest(), 5.0)
            found.append(raised.exception)
        return found

    def test_a_token_may_be_what_a_file_holds(self):
        client = PlannerClient("127.0.0.1:1", ClientOptions(token=" secret\n"))
        for error in self.fails(client):  # nobody is there
            self.assertEqual(error.code(), grpc.StatusCode.UNAVAILABLE)
        client.close()

    def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(self):
        for token in ("sec\nret", "s\u00e9cret"):
            with self.assertRaisesRegex(ValueError,
                                        "^token: must be printable ASCII$"):
                PlannerClient("127.0.0.1:1", ClientOptions(token=token))

    def test_only_a_closed_client_says_that_it_is_closed(self):
        client = PlannerClient("127.0.0.1:1")
        client._metadata = [("authorization", "Bearer a\n")]
        for error in self.fails(client):
            # A ValueError; newer grpc may make an error of the call of it.
            self.assertNotIsInstance(error, ClosedError)
        client.close()
        for error in self.fails(client):
            self.assertIs(type(error), ClosedError)


class OptionsTest(unittest.TestCase):

    def agent(self, **options):
        job = models.make_job("vlm", RANKS)
        return StepAgent("127.0.0.1:1", job, 0, Registration("run", 1, job.layout),
                         submits=True, options=AgentOptions(**options))

    def test_says_what_options_must_be(self):
        day = "must be 0 .. 86400 seconds"
        for options, expected in (
                ({"needed_in_s": float("inf")}, f"needed_in_s: inf, {day}"),
                ({"call_timeout_s": -1}, f"call_timeout_s: -1, {day}"),
                ({"call_timeout_s": 0}, "call_timeout_s: 0, must be above 0 "
                                        "seconds"),
                ({"first_retry_s": 0.0}, "first_retry_s: 0, must be above 0 "
                                         "seconds"),
                ({"last_retry_s": "1"}, f"last_retry_s: '1', {day}"),
                ({"joint_wait_s": float("nan")},
                 "joint_wait_s: nan, must be 0 .. 600 seconds"),
                ({"seed": -1}, "seed: -1, must be 0 .. 2^64 - 1"),
                ({"seed": 1 << 64}, f"seed: {1 << 64}, must be 0 .. 2^64 - 1"),
                ({"budget_evaluations": 1e3},
                 "budget_evaluations: 1000.0, must be a whole number")):
            with self.subTest(options=options):
                with self.assertRaises(ValueError) as raised:
                    self.agent(**options)
                self.assertEqual(str(raised.exception), expected)

    def test_says_what_a_submission_must_be(self):
        with self.agent(seed=(1 << 64) - 1) as agent:
            batch = models.make_batch(agent._job, random.Random(0), 1)
            for step, needed_in_s, expected in (
                    (0, float("inf"), "needed_in_s: inf, must be 0 .. 86400 "
                                      "seconds"),
                    (0, -0.1, "needed_in_s: -0.1, must be 0 .. 86400 seconds"),
                    (-1, 1.0, "step: -1, must be 0 .. 2^64 - 1"),
                    (0.5, 1.0, "step: 0.5, must be a whole number")):
                with self.assertRaises(ValueError) as raised:
                    agent.submit(step, batch, needed_in_s)
                self.assertEqual(str(raised.exception), expected)

    def test_an_item_without_tokens_is_refused(self):
        with self.agent() as agent:
            for tokens, item in (([0], 0), ([0, 5], 0), ([5, 0], 1)):
                batch = batch_pb2.BatchMetadata()
                batch.microbatches.add().items.add(module=1, tokens=tokens)
                with self.assertRaises(ValueError) as raised:
                    agent.submit(0, batch)
                self.assertEqual(
                    str(raised.exception),
                    f"microbatches[0].items of module 'text': item {item} has "
                    f"{tokens[item]} tokens, must be at least 1")

    def test_what_cannot_be_sent_ends_no_thread(self):
        sent = threading.Event()

        def call(client, method, request, timeout_s, wait_for_ready=False):
            if method == "UploadProfile":
                if request.profile.version == 1:
                    raise TypeError("a fault")
                sent.set()

        with mock.patch.object(PlannerClient, "call", call):
            with self.agent() as agent:
                with self.assertLogs("pipeweaver", "WARNING") as logs:
                    for version in (1, 1, 2):
                        agent.upload_profile(profile_pb2.Profile(version=version))
                    self.assertTrue(sent.wait(10))
                self.assertEqual(agent.counters["sends_failed"], 2)
        self.assertEqual(len(logs.output), 1)
        self.assertIn("TypeError: a fault", logs.output[0])


class FakeClient:
    """Notes the calls, and answers that the layout is confirmed."""

    def __init__(self):
        self.calls = []

    def call(self, method, request, timeout_s):
        self.calls.append((method, request))
        return service_pb2.RegisterJobResponse(attempt=3, layout_confirmed=True)


class RegisterTest(unittest.TestCase):

    def test_sends_sample_batches(self):
        job = models.make_job("vlm", RANKS)
        samples = [models.make_batch(job, random.Random(i), 2) for i in range(3)]
        client = FakeClient()
        self.assertEqual(_register(client, job, "run", 5, samples).attempt, 3)
        [(method, request)] = client.calls
        self.assertEqual(method, "RegisterJob")
        self.assertEqual(list(request.sample_batches), samples)
        _register(client, job, "run", 5)
        self.assertFalse(client.calls[1][1].sample_batches)


class AgentTest(unittest.TestCase):

    def setUp(self):
        self.port = free_port()
        self.server = start_server(self.port, {})

    def tearDown(self):
        self.server.kill()
        self.server.wait()
        self.server.stdout.close()

    def test_a_newer_attempt_stops_the_older(self):
        [(found, origin, counters)] = run_ranks(1, "none", superseded, self.port)
        self.assertTrue(found)
        self.assertEqual(origin, SAFE)
        self.assertEqual(counters["superseded"], 2)

    def test_says_why_a_plan_is_refused(self):
        job = models.make_job("vlm", RANKS)
        server = f"127.0.0.1:{self.port}"

        def prepare(checked, batch):
            if checked.program.identity.origin != plan_pb2.PLAN_ORIGIN_SAFE:
                raise BadProgram("actions[7]: no")

        with StepAgent(server, job, 0, register(server, job, "run"), submits=True,
                       options=AgentOptions(prepare=prepare)) as agent:
            agent.submit(0, models.make_batch(job, random.Random(0), 1))
            self.assertFalse(agent.wait(0, 10.0))
            with self.assertLogs("pipeweaver", "WARNING") as logs:
                agent.settle(0, agent.vote(0), 0)
        self.assertIn("plan_refused: step 0 runs its safe program: BadProgram: "
                      "actions[7]: no", logs.output[0])

    def test_a_step_that_is_refused_or_skipped_holds_up_no_other(self):
        job = models.make_job("vlm", RANKS)
        server = f"127.0.0.1:{self.port}"
        registration = register(server, job, "run")
        batch = models.make_batch(job, random.Random(0), 1)
        with StepAgent(server, job, 0, registration, submits=True) as first, \
                StepAgent(server, job, 1, registration) as second:
            for step in (0, 1, 2):
                first.submit(step, batch if step else models.make_batch(
                    job, random.Random(0), REFUSED_MICROBATCHES))
                second.submit(step, batch)
            self.assertTrue(first.wait(1, 10.0))
            self.assertFalse(first.wait(0, 10.0))
            self.assertEqual(first.counters["submission_refused"], 1)
            # The other rank does not know that its step 0 was refused.
            self.assertEqual(second.vote(1), 0)
            self.assertTrue(second.wait(2, 10.0))

    def test_survives_forked_data_loader_workers(self):
        [(held, said, again)] = run_ranks(1, "none", forked, self.port)
        self.assertTrue(held and again)
        for text in said:
            self.assertIn("forked process", text)

    def test_process_ends_though_the_agent_was_not_closed(self):
        subprocess.run([sys.executable, "-c", f"""
import models, random
from pipeweaver import StepAgent, register
job = models.make_job("vlm", 2)
address = "127.0.0.1:{self.port}"
agent = StepAgent(address, job, 0, register(address, job, "run"), submits=True)
agent.submit(0, models.make_batch(job, random.Random(0), 1))
"""], check=True, timeout=60, cwd=HERE)

    def test_says_what_a_report_must_be(self):
        [said] = run_ranks(1, "none", bad_reports, self.port)
        for text, expected in zip(said, (
                "step_ns: 0, must be 1 .. 2^63 - 1",
                "step_ns: 1.5, must be a whole number",
                "start_offset_ns[1]: -1, must be 0 .. 2^63 - 1",
                "duration_ns[0]: 'x', must be a whole number",
                "peak_memory_bytes: 9223372036854775808, must be 0 .. 2^63 - 1"),
                strict=True):
            self.assertEqual(text, expected)

    def test_peers_get_the_same_program(self):
        answers = run_ranks(2, "gloo", peers)
        self.assertEqual(answers[0], answers[1])


if __name__ == "__main__":
    unittest.main()
