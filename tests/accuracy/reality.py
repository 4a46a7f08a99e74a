"""Predicted against real step times, with this machine's CPU as the device.

    tests/bench.sh accuracy [--minutes=10] [--cases=24] [--out=FILE]

Two ranks, each a process of one thread, train a small ViT and language model by
programs of the real planner server, over gloo. The server is told what the
trainer measures, as it would be in production:

  links     a ping-pong between the ranks
  layers    thread CPU time of each layer's pass on steps of the fit, as a profile
  stages    thread CPU time of each action on further steps of the fit, reported

Then come batches and schedules that nothing was fitted to. Each is predicted by
the planner and run seven times; runs during which other processes took more than
5 % of the machine are dropped and repeated while time is left. A case counts
with three runs kept. Its error is |predicted / median of its runs - 1|. Between
the cases further steps are run and reported, as in training: the planner follows
the speed of the machine, which a neighbour may change by half from one minute to
the next.

The same programs are also predicted with the layers' profile but no factors, and
with the planner's analytic costs alone.
"""

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "client_agents" / "python"
sys.path[:0] = [str(PACKAGE), str(PACKAGE / "examples")]

RANKS = 2
RUNS = 7
FEWEST_RUNS = 3
FOREIGN_LIMIT = 0.05
# The paper's error, and its room for what varies between runs.
TARGET_ERROR = 0.024
TARGET_SPREADS = 1.5
MICROBATCHES = (2, 3, 4)
EVALUATIONS = (1, 40)
START_AHEAD_S = 0.02
LEARNING_S = 0.3


# ---- what others take of the machine ------------------------------------------

def busy_seconds(stat_line: str, ticks: int) -> float:
    """CPU seconds that all processors spent on anything, from the first line of
    /proc/stat: user, nice, system, interrupts and what a hypervisor took."""
    fields = [int(x) for x in stat_line.split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / ticks


def process_seconds(stat_text: str, ticks: int) -> float:
    """CPU seconds of a process, its threads included, from /proc/PID/stat."""
    fields = stat_text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / ticks


class Watch:
    """Share of the machine that processes other than `pids` take meanwhile."""

    def __init__(self, pids: Sequence[int]):
        self._pids = list(pids)
        self._ticks = os.sysconf("SC_CLK_TCK")
        self._begin = self._now()

    def _now(self) -> Tuple[float, float, float]:
        with open("/proc/stat", encoding="ascii") as stat:
            busy = busy_seconds(stat.readline(), self._ticks)
        own = 0.0
        for pid in self._pids:
            with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
                own += process_seconds(stat.read(), self._ticks)
        return time.monotonic(), busy, own

    def foreign_share(self) -> float:
        wall, busy, own = (b - a for a, b in zip(self._begin, self._now()))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


# ---- a program timed with other costs -----------------------------------------

class Step(NamedTuple):
    """An action as far as time goes. kind: "run", "send", "recv" (a wait)."""
    kind: str
    # Of "run": what it costs, nanoseconds. Of "send": the transfer's.
    ns: int = 0
    transfer: int = -1


def replay(programs: Sequence[Sequence[Step]]) -> int:
    """When the last rank ends, nanoseconds: each runs its actions in order, a
    transfer takes its time from the post of its send, and a wait ends with it.
    Raises ValueError for programs that wait for what is never sent."""
    clocks = [0] * len(programs)
    at = [0] * len(programs)
    arrival: Dict[int, int] = {}
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                step = program[at[rank]]
                if step.kind == "run":
                    clocks[rank] += step.ns
                elif step.kind == "send":
                    arrival[step.transfer] = clocks[rank] + step.ns
                elif step.transfer in arrival:
                    clocks[rank] = max(clocks[rank], arrival[step.transfer])
                else:
                    break
                at[rank] += 1
                moved = True
    if any(a < len(p) for a, p in zip(at, programs)):
        raise ValueError("the programs wait for each other")
    return max(clocks)


# ---- figures -------------------------------------------------------------------

class Case(NamedTuple):
    name: str
    # Of the runs kept, nanoseconds.
    measured_ns: Sequence[int]
    # By "calibrated", "measured", "analytic": nanoseconds.
    predicted_ns: Dict[str, int]


def summary(cases: Sequence[Case]) -> Dict[str, Any]:
    """Errors by kind of costs, spread and verdict over cases with enough runs."""
    judged = [c for c in cases if len(c.measured_ns) >= FEWEST_RUNS]
    found: Dict[str, Any] = {"cases": len(cases), "judged": len(judged)}
    if not judged:
        return found
    spreads = [statistics.stdev(c.measured_ns) / statistics.mean(c.measured_ns)
               for c in judged]
    found["spread"] = statistics.mean(spreads)
    for kind in judged[0].predicted_ns:
        errors = {c.name: abs(c.predicted_ns[kind] /
                              statistics.median(c.measured_ns) - 1)
                  for c in judged}
        worst = max(errors, key=lambda name: errors[name])
        found[kind] = {"mean_error": statistics.mean(errors.values()),
                       "worst_error": errors[worst], "worst_case": worst}
    found["limit"] = max(TARGET_ERROR, TARGET_SPREADS * found["spread"])
    found["met"] = found["calibrated"]["mean_error"] <= found["limit"]
    return found


def profile_of(samples: Dict[str, List[int]], host: str) -> Any:
    """Layers' times by annotation (LayerKey in profile.proto), as a profile."""
    from pipeweaver.profile import ProfileRecords
    records = ProfileRecords("thread_cpu_time", host)
    for annotation in sorted(samples):
        for ns in samples[annotation]:
            records.add(annotation, ns)
    return records.take()


# ---- the ranks -------------------------------------------------------------------

def rank_main(rank: int, store: str, pipe: Any) -> None:
    """A rank: answers commands (name, arguments...) from `pipe`."""
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank,
                            world_size=RANKS)
    worker = Rank(rank)
    try:
        while True:
            name, *arguments = pipe.recv()
            if name == "stop":
                break
            pipe.send(getattr(worker, name)(*arguments))
    except EOFError:
        pass
    os._exit(0)


class Rank:

    def __init__(self, rank: int):
        from pipeweaver.torch import DistributedTransport
        self._rank = rank
        self._transport = DistributedTransport()
        self._prepared: Any = None

    def flops(self) -> int:
        import train_vlm
        return train_vlm.measured_flops()

    def link(self) -> Tuple[int, int]:
        """Latency in ns and bytes a second of a transfer, as the executor does
        it, from the median times of a small and a large one."""
        import torch
        from pipeweaver.torch.transport import Post
        times = []
        for size in (1, 1 << 18):
            tensor = torch.zeros(size)
            found = []
            for i in range(60):
                begin = time.perf_counter_ns()
                for turn in range(RANKS):
                    [handle] = self._transport.post(
                        [Post(self._rank == turn, 1 - self._rank, i, tensor)],
                        False)
                    self._transport.wait(handle)
                found.append((time.perf_counter_ns() - begin) / RANKS)
            times.append(statistics.median(found[10:]))
        latency, large = times
        return int(latency), int(4 * (1 << 18) / max(1e-9, large - latency) * 1e9)

    def job(self, data: bytes) -> None:
        import torch
        import train_vlm
        from pipeweaver.job import JobView
        from pipeweaver.torch import Hooks, PipelineExecutor
        from pipeweaver.v1 import job_pb2
        set_model_size()

        class Times(Hooks):
            """Thread CPU time of layers' passes and of actions."""

            def __init__(self) -> None:
                self.clear()

            def clear(self) -> None:
                self.layers = collections.defaultdict(list)
                self.actions: Dict[int, int] = {}

            def push(self, correlation_id: int) -> None:
                self._action = correlation_id & 0xffffffff
                self._action_begin = time.thread_time_ns()

            def pop(self) -> None:
                self.actions[self._action] = (time.thread_time_ns() -
                                              self._action_begin)

            def layer_begin(self, annotation: str) -> None:
                self._layer = annotation
                self._layer_begin = time.thread_time_ns()

            def layer_end(self) -> None:
                self.layers[self._layer].append(time.thread_time_ns() -
                                                self._layer_begin)

        view = JobView(job_pb2.Job.FromString(data))
        modules = train_vlm.local_modules(view, "vlm", self._rank)
        torch.manual_seed(0)
        self._view = view
        self._times = Times()
        self._executors = [
            PipelineExecutor(view, self._rank, modules, self._transport),
            PipelineExecutor(view, self._rank, modules, self._transport,
                             hooks=self._times)]

    def prepare(self, program: bytes, batch: bytes) -> int:
        """Takes a step's program; answers its number of actions."""
        import train_vlm
        from pipeweaver.program import check_program
        from pipeweaver.v1 import batch_pb2, plan_pb2
        message = plan_pb2.Program.FromString(program)
        metadata = batch_pb2.BatchMetadata.FromString(batch)
        checked = check_program(message, message.identity.key, self._rank)
        self._prepared = [e.prepare(checked, metadata) for e in self._executors]
        data = train_vlm.SyntheticData(self._view, metadata,
                                       message.identity.key.step)
        made: Dict[Any, Any] = {}

        def cached(module: int, microbatch: int, items: Any) -> Any:
            key = module, microbatch, items
            if key not in made:
                made[key] = data(module, microbatch, items)
            return made[key]

        self._data = cached
        return len(checked.actions.kind)

    def run(self, traced: bool, start_ns: int
            ) -> Tuple[int, Dict[int, int], Dict[str, List[int]]]:
        """Runs the step from `start_ns` on the monotonic clock on; its end, and
        the actions' and layers' times if `traced`."""
        executor = self._executors[traced]
        for p in executor.parameters():
            if p.grad is not None:
                p.grad.zero_()
        self._times.clear()
        while time.monotonic_ns() < start_ns:
            pass
        executor.run(self._prepared[traced], self._data)
        end_ns = time.monotonic_ns()
        return end_ns, dict(self._times.actions), dict(self._times.layers)


def set_model_size() -> None:
    """The example's model, with layers that take milliseconds."""
    import train_vlm
    train_vlm.WIDTH.update(vision=96, text=128)
    train_vlm.BLOCKS.update(vision=5, text=6)


class Ranks:
    """The rank processes, driven together."""

    def __init__(self) -> None:
        fork = multiprocessing.get_context("fork")
        self._folder = tempfile.TemporaryDirectory(prefix="pipeweaver-accuracy-")
        store = os.path.join(self._folder.name, "store")
        self._pipes, self._processes = [], []
        for rank in range(RANKS):
            mine, theirs = fork.Pipe()
            process = fork.Process(target=rank_main, args=(rank, store, theirs),
                                   daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    @property
    def pids(self) -> List[int]:
        return [p.pid for p in self._processes]

    def each(self, name: str, arguments: Sequence[Sequence[Any]]) -> List[Any]:
        for pipe, own in zip(self._pipes, arguments):
            pipe.send((name, *own))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(300):
                raise RuntimeError(f"rank {rank} does not answer to {name}")
            answers.append(pipe.recv())
        return answers

    def all(self, name: str, *arguments: Any) -> List[Any]:
        return self.each(name, [arguments] * RANKS)

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(("stop",))
            except OSError:
                pass
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


# ---- the planner -------------------------------------------------------------------

class Planner:
    """The real server as a process of its own, and a client of it."""

    def __init__(self, binary: str):
        self._process = subprocess.Popen(
            [binary, "--listen_address=127.0.0.1:0", "--metrics_address=none",
             "--planner_threads=1"], stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True)
        line = self._process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError(f"{binary} did not start: {line!r}")
        from pipeweaver.client import PlannerClient
        self._client = PlannerClient(line.split()[2].rstrip(","))

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, request: Any) -> Any:
        return self._client.call(method, request, 60.0)

    def register(self, job: Any) -> Any:
        from pipeweaver.agent import Registration
        from pipeweaver.v1 import planner_service_pb2 as service
        response = self.call("RegisterJob", service.RegisterJobRequest(
            request_id=str(uuid.uuid4()), job=job))
        if not response.layout_confirmed:
            self.call("ConfirmLayout", service.ConfirmLayoutRequest(
                job=job.name, attempt=response.attempt,
                layout_digest=response.layout_digest))
        return response

    def plan(self, registered: Any, job: str, step: int, batch: Any,
             evaluations: int) -> Tuple[Any, List[bytes]]:
        """The step's plan and each rank's program."""
        from pipeweaver.v1 import plan_pb2, planner_service_pb2 as service
        key = plan_pb2.PlanKey(job=job, attempt=registered.attempt, step=step)
        self.call("SubmitStep", service.SubmitStepRequest(
            key=key, layout_digest=registered.layout_digest, batch=batch,
            seed=step, budget_evaluations=evaluations))
        plan = self.call("GetPlan", service.GetPlanRequest(key=key)).plan
        programs = []
        for rank in range(RANKS):
            data = b""
            while len(data) < plan.program_bytes[rank]:
                data += self.call("GetProgram", service.GetProgramRequest(
                    key=key, rank=rank, offset=len(data))).data
            programs.append(data)
        return plan, programs

    def costs(self, job: str) -> Any:
        from pipeweaver.v1 import planner_service_pb2 as service
        return self.call("DescribeJob",
                         service.DescribeJobRequest(job=job)).costs

    def wait_for_costs(self, job: str, learnt: Any) -> Any:
        """Until learnt(costs); raises RuntimeError after a minute."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            costs = self.costs(job)
            if learnt(costs):
                return costs
            time.sleep(0.05)
        raise RuntimeError(f"job {job!r} has learnt nothing: {costs}")

    def close(self) -> None:
        self._client.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def steps_of(programs: Sequence[bytes], costs_of: Sequence[bytes], job: Any
             ) -> List[List[Step]]:
    """`programs` as replay() takes them, stages as long as in the programs
    `costs_of`, which are of the same batch and layout."""
    from pipeweaver import program as actions
    from pipeweaver.v1 import plan_pb2
    link = job.links.p2p_intra_node

    def columns(data: bytes) -> Any:
        program = plan_pb2.Program.FromString(data)
        return plan_pb2.ActionColumns.FromString(program.actions)

    stage_ns: Dict[Tuple, int] = {}
    for data in costs_of:
        a = columns(data)
        for row in zip(a.kind, a.sub_microbatch, a.segment, a.chunk,
                       a.duration_ns):
            stage_ns[row[:4]] = row[4]
    found = []
    for data in programs:
        a = columns(data)
        own = []
        for kind, sub, segment, chunk, transfer, size in zip(
                a.kind, a.sub_microbatch, a.segment, a.chunk, a.transfer,
                a.bytes):
            if kind in actions.COMPUTE:
                own.append(Step("run", stage_ns[kind, sub, segment, chunk]))
            elif kind == actions.POST_SEND:
                ns = size * 10 ** 9 // link.bandwidth_bytes_per_second
                own.append(Step("send", link.latency_ns + ns, transfer))
            elif kind == actions.WAIT_RECV:
                own.append(Step("recv", transfer=transfer))
        found.append(own)
    return found


# ---- the experiment -------------------------------------------------------------------

def make_job(ranks: Ranks) -> Any:
    import train_vlm
    set_model_size()
    job = train_vlm.make_job("vlm", RANKS)
    job.device.peak_flops_per_second = statistics.median_low(
        ranks.each("flops", [()] * RANKS))
    latency, bandwidth = (statistics.median_low(x)
                          for x in zip(*ranks.all("link")))
    job.links.p2p_intra_node.latency_ns = latency
    job.links.p2p_intra_node.bandwidth_bytes_per_second = bandwidth
    job.links.p2p_inter_node.CopyFrom(job.links.p2p_intra_node)
    # Stages of one kind and one memory choice: analytic costs can then be asked
    # for the same programs.
    job.executor.Clear()
    job.executor.max_segments = 4
    return job


def run_once(ranks: Ranks, planner: Planner, traced: bool
             ) -> Tuple[int, float, List[Any]]:
    """Step time in ns, the share of the machine that others took, answers."""
    watch = Watch([*ranks.pids, planner.pid, os.getpid()])
    start_ns = time.monotonic_ns() + int(START_AHEAD_S * 1e9)
    answers = ranks.all("run", traced, start_ns)
    return max(a[0] for a in answers) - start_ns, watch.foreign_share(), answers


def measure(options: argparse.Namespace) -> Tuple[List[Case], Dict[str, Any]]:
    import train_vlm
    from pipeweaver.v1 import planner_service_pb2 as service
    deadline = time.monotonic() + 60 * options.minutes
    ranks = Ranks()
    planner = Planner(options.server)
    rng = random.Random(options.seed)
    step = 0
    about: Dict[str, Any] = {"dropped_runs": 0}
    try:
        job = make_job(ranks)
        registered = planner.register(job)
        job.layout.CopyFrom(registered.layout)
        ranks.all("job", job.SerializeToString())

        registrations = {job.name: registered}

        def plan_step(name: str, batch: Any, evaluations: int
                      ) -> Tuple[Any, List[bytes]]:
            return planner.plan(registrations[name], name, step, batch,
                                evaluations)

        def make_batch() -> Any:
            return train_vlm.make_batch(job, "vlm", rng,
                                        rng.choice(MICROBATCHES))

        # Layers, then stages: the best of a few runs each, which others have
        # disturbed least.
        samples: Dict[str, List[int]] = collections.defaultdict(list)
        for _ in range(options.fit_steps):
            batch = make_batch()
            _, programs = plan_step(job.name, batch, 1)
            step += 1
            ranks.each("prepare", [(p, batch.SerializeToString())
                                   for p in programs])
            for _ in range(options.fit_runs):
                for answer in run_once(ranks, planner, True)[2]:
                    for annotation, times in answer[2].items():
                        samples[annotation] += times
        profile = profile_of(samples, os.uname().nodename)
        about["profile_points"] = len(profile.points)
        for kind in ("measured", "analytic"):
            other = type(job)()
            other.CopyFrom(job)
            other.name = f"{job.name}-{kind}"
            registrations[other.name] = planner.register(other)
        for name in (job.name, f"{job.name}-measured"):
            planner.call("UploadProfile", service.UploadProfileRequest(
                job=name, profile=profile))
            planner.wait_for_costs(name, lambda costs: costs.version > 0)

        def report_step() -> None:
            """Plans and runs a step that is not among the cases and reports its
            stages, as a trainer does after each."""
            nonlocal step
            batch = make_batch()
            plan, programs = plan_step(job.name, batch,
                                       rng.choice(EVALUATIONS))
            step += 1
            sizes = ranks.each("prepare", [(p, batch.SerializeToString())
                                           for p in programs])
            seen = [run_once(ranks, planner, True)
                    for _ in range(options.fit_runs)]
            for rank in range(RANKS):
                durations = [
                    int(statistics.median(answers[rank][1].get(i, 0)
                                          for _, _, answers in seen))
                    for i in range(sizes[rank])]
                planner.call("ReportStep", service.ReportStepRequest(
                    key=plan.identity.key, plan_digest=plan.plan_digest,
                    rank=rank, start_offset_ns=[0] * sizes[rank],
                    duration_ns=durations,
                    step_ns=int(statistics.median(s[0] for s in seen))))
            # The planner learns from it behind the answer.
            time.sleep(LEARNING_S)

        for _ in range(options.fit_steps):
            report_step()
        costs = planner.wait_for_costs(job.name,
                                       lambda costs: costs.observations > 0)
        about.update(
            stage_error_before=costs.error_before,
            stage_error_after=costs.error_after, stages=costs.observations,
            latency_us=job.links.p2p_intra_node.latency_ns / 1e3,
            bandwidth_MB_s=job.links.p2p_intra_node.
            bandwidth_bytes_per_second / 1e6,
            gflops=job.device.peak_flops_per_second / 1e9)

        cases: List[Case] = []
        replay_error = 0.0
        shares = []
        for number in range(options.cases):
            report_step()
            batch = make_batch()
            evaluations = EVALUATIONS[number % len(EVALUATIONS)]
            plan, programs = plan_step(job.name, batch, evaluations)
            predicted = {"calibrated": plan.report.makespan_ns}
            shares.append(plan.report.measured_share)
            own = replay(steps_of(programs, programs, job))
            replay_error = max(replay_error,
                               abs(own / plan.report.makespan_ns - 1))
            for kind in ("measured", "analytic"):
                _, with_costs = plan_step(f"{job.name}-{kind}", batch, 1)
                predicted[kind] = replay(steps_of(programs, with_costs, job))
            step += 1
            ranks.each("prepare", [(p, batch.SerializeToString())
                                   for p in programs])
            run_once(ranks, planner, False)  # first touch
            kept: List[int] = []
            left = (deadline - time.monotonic()) / (options.cases - number)
            case_deadline = time.monotonic() + max(0.0, left)
            tries = 0
            while len(kept) < RUNS and (tries < RUNS or
                                        time.monotonic() < case_deadline):
                tries += 1
                step_ns, foreign, _ = run_once(ranks, planner, False)
                if foreign <= options.foreign:
                    kept.append(step_ns)
            about["dropped_runs"] += tries - len(kept)
            name = (f"{number}: {len(batch.microbatches)} microbatches, "
                    f"{evaluations} evaluations")
            cases.append(Case(name, kept, predicted))
            middle = statistics.median(kept) if kept else 0
            print(f"{name}: {len(kept)} of {tries} runs kept, "
                  f"median {middle / 1e6:.1f} ms, predicted " +
                  ", ".join(f"{kind} {ns / 1e6:.1f}"
                            for kind, ns in predicted.items()), flush=True)
        about["replay_error"] = replay_error
        about["measured_share"] = statistics.mean(shares)
        return cases, about
    finally:
        ranks.close()
        planner.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default=str(
        ROOT / "bazel-bin" / "server" / "pipeweaver_server"))
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--fit-steps", type=int, default=8,
                        help="steps for layers, and as many for stages")
    parser.add_argument("--fit-runs", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10,
                        help="most time to repeat disturbed runs in")
    parser.add_argument("--foreign", type=float, default=FOREIGN_LIMIT,
                        help="most of the machine that others may take in a run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", help="file for the figures as JSON")
    options = parser.parse_args()
    cases, about = measure(options)
    found = {**about, **summary(cases)}
    print(json.dumps(found, indent=1))
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(
            {**found, "runs": [c._asdict() for c in cases]}, indent=1),
            encoding="ascii")
    if not found["judged"]:
        print("no case had enough undisturbed runs: the machine is too busy")
        return 2
    return 0 if found["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
