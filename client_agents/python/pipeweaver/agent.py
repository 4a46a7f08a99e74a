"""The light agent in a trainer: plans come ahead of time, or never mind.

    registration = register(server, job, run_id)      # one process of the run
    agent = StepAgent(server, job, rank, registration, submits=rank == 0)
    agent.submit(step, metadata)                      # every rank, steps ahead
    ...
    token = agent.vote(step + 1)                      # at the end of a step
    low, high = <MIN and MAX of the token over all ranks>
    agent.settle(step + 1, low, high)
    program = agent.program(step + 1)                 # never waits

The server is a help, not a need: submit() makes the step's safe program on the
spot, and settle() takes the server's plan only where all ranks hold the same one,
verified. What goes wrong is counted and logged once a kind.

Where AgentOptions.move_microbatches lets the planner move microbatches between
replicas, ranks of all replicas agree, too:

    everywhere = agent.vote_everywhere(step + 1)
    all_low, all_high = <MIN and MAX of it over all ranks of all replicas>
    agent.settle(step + 1, low, high, all_low, all_high)
    replica, microbatch = agent.program(step + 1).origin_of(b)   # of any program

pipeweaver.torch.collectives.agree() does both.
"""

import collections
import logging
import operator
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import grpc

from pipeweaver import digest
from pipeweaver.client import ClientOptions, PlannerClient
from pipeweaver.job import BatchView, JobView, MicrobatchView
from pipeweaver.lowering import safe_programs
from pipeweaver.program import BadProgram, CheckedProgram, check_program
from pipeweaver.split import split_batch
from pipeweaver.v1 import (
    batch_pb2, job_pb2, plan_pb2, planner_service_pb2 as service_pb2,
    profile_pb2)

logger = logging.getLogger("pipeweaver")

# What program() says of where a program comes from.
PLAN, SAFE = "plan", "safe"

# Why a step ran its safe program; keys of StepAgent.counters.
UNREACHABLE = "server_unreachable"  # no answer, or a fault of the server
NO_PLAN = "no_plan"  # the server answered that it makes none, or takes no step
LATE = "plan_late"  # the plan was not there at the vote
REFUSED = "plan_refused"  # it failed its checks
DISAGREED = "ranks_disagreed"  # this rank had it, another did not
DISAGREED_EVERYWHERE = "replicas_disagreed"  # its microbatches were moved, and
# a rank of some replica had no plan of the same set
UNSETTLED = "not_settled"  # the trainer did not call settle()
SUPERSEDED = "superseded"  # a newer attempt of the run has registered

# Codes by which the server says that there will be no plan.
_ANSWERS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE,
            grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED)


# The longest that the server takes, in seconds: of needed_in, of joint_wait.
_DAY_S, _JOINT_WAIT_S = 86_400, 600


@dataclass(frozen=True)
class Registration:
    """What a run knows from its registration, the same on all its ranks."""
    run_id: str
    attempt: int
    layout: job_pb2.Layout
    # Bytes for activations and transfers on each rank; empty: not known.
    activation_limit_bytes: Sequence[int] = ()

    def to_bytes(self) -> bytes:
        """For the trainer's own broadcast."""
        response = service_pb2.RegisterJobResponse(
            attempt=self.attempt, layout=self.layout,
            activation_limit_bytes=self.activation_limit_bytes)
        name = self.run_id.encode()
        return (len(name).to_bytes(4, "big") + name +
                response.SerializeToString())

    @staticmethod
    def from_bytes(data: bytes) -> "Registration":
        size = int.from_bytes(data[:4], "big")
        response = service_pb2.RegisterJobResponse.FromString(data[4 + size:])
        return Registration(data[4:4 + size].decode(), response.attempt,
                            response.layout,
                            tuple(response.activation_limit_bytes))


@dataclass
class AgentOptions:
    """Times are in seconds, and at most a day (joint_wait_s: 10 minutes)."""
    # From submit() to the step's start, when the trainer does not say.
    needed_in_s: float = 1.0
    # Longest a call to the server may take beyond that. Above 0.
    call_timeout_s: float = 2.0
    # Pauses between tries of a call that failed, doubled each time. A server that
    # is away is waited for as long as the last one at a time. Above 0.
    first_retry_s: float = 0.02
    last_retry_s: float = 1.0
    # Sent with each step; see SubmitStepRequest. A seed is below 2^64.
    seed: int = 0
    budget_evaluations: int = 0
    # Replicas of a step are planned together when all have submitted it, or
    # this long after the first did; None: each alone. See SubmitStepRequest.
    joint_wait_s: Optional[float] = None
    # With joint_wait_s, and executor.moved_microbatches in the job: microbatches
    # may move between replicas, the same on all of them. The trainer then
    # fetches samples by StepProgram.origin_of() and agrees over all replicas.
    move_microbatches: bool = False
    # Compiles a checked program for the executor, ahead of time. Called with the
    # batch that the program is of, after the moves.
    prepare: Optional[Callable[[CheckedProgram, batch_pb2.BatchMetadata],
                               Any]] = None
    client: ClientOptions = field(default_factory=ClientOptions)


@dataclass(frozen=True)
class StepProgram:
    """What a rank runs in a step."""
    origin: str  # PLAN or SAFE
    checked: CheckedProgram
    # What AgentOptions.prepare made of it.
    prepared: Any

    def origin_of(self, microbatch: int) -> Tuple[int, int]:
        """(replica, microbatch) that submitted what this program runs as its
        `microbatch`; the replica's own where nothing was moved."""
        return self.checked.origin_of(microbatch)


class _Step:

    def __init__(self, number: int, metadata: batch_pb2.BatchMetadata,
                 needed_at: float):
        self.number = number
        self.metadata = metadata
        self.batch_digest = digest.canonical_digest(metadata)
        self.needed_at = needed_at
        self.safe: Optional[StepProgram] = None
        self.plan: Optional[StepProgram] = None
        self.voted = False
        self.given_up = False  # no plan comes, or nobody waits for it any more
        self.settled: Optional[StepProgram] = None
        self.trouble = LATE  # why there is no plan, as far as known
        self.fault = ""  # of a plan that was refused


def register(server: str, job: job_pb2.Job, run_id: str, timeout_s: float = 120.0,
             options: Optional[ClientOptions] = None,
             sample_batches: Sequence[batch_pb2.BatchMetadata] = ()
             ) -> Registration:
    """Registers the run and accepts its layout; one process calls it and gives
    Registration.to_bytes() to the others.

    run_id: new for each start of the run. sample_batches: up to eight of steps such
    as the run will have, six, say; a layout is chosen for them, in some seconds.
    Raises grpc.RpcError: a run without a server starts with
    Registration(run_id, 0, job.layout) and a pinned layout.
    """
    client = PlannerClient(server, options)
    try:
        return _register(client, job, run_id, timeout_s, sample_batches)
    finally:
        client.close()


def _register(client: PlannerClient, job: job_pb2.Job, run_id: str, timeout_s: float,
              sample_batches: Sequence[batch_pb2.BatchMetadata] = (),
              attempt: int = 0) -> Registration:
    response = client.call("RegisterJob", service_pb2.RegisterJobRequest(
        request_id=run_id, attempt=attempt, job=job,
        sample_batches=sample_batches), timeout_s)
    if not response.layout_confirmed:
        client.call("ConfirmLayout", service_pb2.ConfirmLayoutRequest(
            job=job.name, attempt=response.attempt,
            layout_digest=response.layout_digest), timeout_s)
    return Registration(run_id, response.attempt, response.layout,
                        tuple(response.activation_limit_bytes))


def _whole_number(name: str, value: Any, least: int, bits: int = 63) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: {value!r}, must be a whole number") from None
    if not least <= number < 1 << bits:
        raise ValueError(f"{name}: {number}, must be {least} .. 2^{bits} - 1")
    return number


def _seconds(name: str, value: Any, most: int = _DAY_S) -> float:
    try:
        fits = 0 <= value <= most
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{name}: {value!r}, must be 0 .. {most} seconds")
    return float(value)


def _check_options(options: AgentOptions) -> None:
    _seconds("needed_in_s", options.needed_in_s)
    for name in ("call_timeout_s", "first_retry_s", "last_retry_s"):
        if _seconds(name, getattr(options, name)) == 0:
            raise ValueError(f"{name}: 0, must be above 0 seconds")
    if options.joint_wait_s is not None:
        _seconds("joint_wait_s", options.joint_wait_s, _JOINT_WAIT_S)
    _whole_number("seed", options.seed, 0, 64)
    _whole_number("budget_evaluations", options.budget_evaluations, 0)


def _sizes(microbatch: MicrobatchView) -> Tuple[Any, Any]:
    return microbatch.item_tokens, [sorted(u) for u in microbatch.uses]


def _check_may_move(options: AgentOptions, job: job_pb2.Job) -> None:
    lacks = (
        "joint_wait_s is None" if options.joint_wait_s is None else
        "parallelism.data_parallel is below 2"
        if job.parallelism.data_parallel < 2 else
        "executor.moved_microbatches is not set"
        if not job.executor.moved_microbatches else None)
    if lacks:
        raise ValueError(f"move_microbatches: True, must be False where {lacks}")


class StepAgent:
    """One rank's agent. Methods may be called from several threads.

    Owns two threads until close(). Safe to fork, as
    DataLoader workers do: in the child the agent says so and does nothing.
    Raises ValueError for options that are out of range.
    """

    def __init__(self, server: str, job: job_pb2.Job, rank: int,
                 registration: Registration, *, submits: bool = False,
                 replica: int = 0, options: Optional[AgentOptions] = None):
        self.options = options or AgentOptions()
        _check_options(self.options)
        if self.options.move_microbatches:
            _check_may_move(self.options, job)
        self.rank = rank
        self.replica = replica
        self.counters: Dict[str, int] = collections.Counter()
        self._job = job_pb2.Job()
        self._job.CopyFrom(job)
        self._job.layout.CopyFrom(registration.layout)
        self._view = JobView(self._job)
        self._job_digest = digest.job_digest(self._job)
        self._layout_digest = digest.canonical_digest(registration.layout)
        self._limits = list(registration.activation_limit_bytes)
        self._run_id = registration.run_id
        self._pid = os.getpid()
        self._client = PlannerClient(server, self.options.client)
        self._registering = threading.Lock()
        self._lock = threading.Condition()
        # Below: guarded by _lock.
        self._attempt = registration.attempt
        self._steps: Dict[int, _Step] = {}
        self._superseded = False
        self._unreachable = False  # as far as known
        self._closing = False
        self._logged: set = set()
        self._to_fetch: "queue.Queue[Optional[_Step]]" = queue.Queue()
        self._to_send: "queue.Queue[Any]" = queue.Queue()
        self._submits = submits
        self._threads = [
            threading.Thread(target=self._fetch_all, daemon=True,
                             name="pipeweaver-fetch"),
            threading.Thread(target=self._send_all, daemon=True,
                             name="pipeweaver-send")]
        for thread in self._threads:
            thread.start()

    # ---- the trainer's side ------------------------------------------------

    def submit(self, step: int, metadata: batch_pb2.BatchMetadata,
               needed_in_s: Optional[float] = None) -> None:
        """Hands in a step ahead of time, on every rank with equal metadata.

        Makes the safe program before it returns. Raises ValueError for metadata
        that does not fit the job, for a step that is not a whole number below
        2^64, and for needed_in_s that is not 0 .. a day.
        """
        self._check_process()
        step = _whole_number("step", step, 0, 64)
        needed_in = _seconds("needed_in_s", self.options.needed_in_s
                             if needed_in_s is None else needed_in_s)
        state = _Step(step, metadata, time.monotonic() + needed_in)
        state.safe = self._make_safe(state)
        with self._lock:
            self._steps[step] = state
            if self._unreachable:
                state.trouble = UNREACHABLE
        if self._submits:
            self._to_send.put((state, needed_in))
        self._to_fetch.put(state)

    def vote(self, step: int, bits: int = 63) -> int:
        """What this rank contributes to the agreement on a step: a token of the
        verified plan it holds, 0 for none. A plan that comes later is not used,
        of this step or of one below: their plans are not waited for any more.
        """
        self._check_process()
        with self._lock:
            for number, passed in self._steps.items():
                if number < step:
                    passed.given_up = True
            state = self._steps.get(step)
            self._lock.notify_all()
            if state is None:
                return digest.NO_PLAN_TOKEN
            state.voted = True
            if state.plan is None:
                return digest.NO_PLAN_TOKEN
            return digest.digest_token(
                state.plan.checked.program.plan_digest, bits)

    def vote_everywhere(self, step: int, bits: int = 63) -> int:
        """What this rank contributes to the agreement of all ranks of all
        replicas: a token of the set of plans that its own belongs to, 0 for no
        plan or one whose microbatches were not moved. As vote(), it ends the
        wait for a plan.
        """
        if self.vote(step, bits) == digest.NO_PLAN_TOKEN:
            return digest.NO_PLAN_TOKEN
        with self._lock:
            checked = self._state(step).plan.checked
        if not checked.moved:
            return digest.NO_PLAN_TOKEN
        return digest.digest_token(
            digest.agreement_digest(checked.program), bits)

    def wait(self, step: int, timeout_s: float) -> bool:
        """Waits for a plan, for a trainer's first step say; True if it is here
        and verified."""
        self._check_process()
        deadline = time.monotonic() + timeout_s
        with self._lock:
            state = self._state(step)
            while state.plan is None and self._wanted(state):
                left = deadline - time.monotonic()
                if left <= 0 or state.trouble == REFUSED:
                    break
                self._lock.wait(left)
            return state.plan is not None

    def settle(self, step: int, low: int, high: int,
               all_low: int = digest.NO_PLAN_TOKEN,
               all_high: int = digest.NO_PLAN_TOKEN) -> str:
        """Decides by the MIN and MAX of all ranks' tokens: PLAN or SAFE.

        low, high: of vote() over the replica's ranks. all_low, all_high: of
        vote_everywhere() over the ranks of all replicas; a plan whose
        microbatches were moved is taken by these alone.
        """
        self._check_process()
        with self._lock:
            state = self._state(step)
            if state.settled is None:
                held = state.plan if state.voted else None
                if held is not None and held.checked.moved:
                    low, high = all_low, all_high
                if held is not None and low == high != digest.NO_PLAN_TOKEN:
                    self._decide(state, held)
                elif held is None:
                    self._fall_back(state, state.trouble)
                else:
                    self._fall_back(state, DISAGREED_EVERYWHERE if
                                    held.checked.moved else DISAGREED)
            return state.settled.origin

    def program(self, step: int) -> StepProgram:
        """What to run. Never waits. Raises KeyError for a step that was not
        submitted."""
        self._check_process()
        with self._lock:
            state = self._state(step)
            if state.settled is None:
                self._fall_back(state, UNSETTLED)
            for old in [n for n in self._steps if n < step - 1]:
                del self._steps[old]
            return state.settled

    def report(self, step: int, step_ns: int, start_offset_ns: Sequence[int] = (),
               duration_ns: Sequence[int] = (), peak_memory_bytes: int = 0
               ) -> None:
        """Hands in measured times of a step that ran its plan; others are not
        sent. Does not wait; a report that gets lost is counted. Raises
        ValueError for what is not a whole number, or negative, and for a step
        of 0 ns."""
        self._check_process()
        step_ns = _whole_number("step_ns", step_ns, 1)
        start_offset_ns = [_whole_number(f"start_offset_ns[{i}]", x, 0)
                           for i, x in enumerate(start_offset_ns)]
        duration_ns = [_whole_number(f"duration_ns[{i}]", x, 0)
                       for i, x in enumerate(duration_ns)]
        peak_memory_bytes = _whole_number("peak_memory_bytes", peak_memory_bytes,
                                          0)
        with self._lock:
            state = self._steps.get(step)
            if (state is None or state.settled is None or
                    state.settled.origin != PLAN):
                return
            identity = state.settled.checked.program
        self._to_send.put(service_pb2.ReportStepRequest(
            key=identity.identity.key, plan_digest=identity.plan_digest,
            rank=self.rank, start_offset_ns=start_offset_ns,
            duration_ns=duration_ns, step_ns=step_ns,
            peak_memory_bytes=peak_memory_bytes))

    def upload_profile(self, profile: profile_pb2.Profile) -> None:
        """Hands in measured layers of the job. Does not wait; a profile that gets
        lost is counted."""
        self._check_process()
        self._to_send.put(service_pb2.UploadProfileRequest(
            job=self._job.name, profile=profile))

    @property
    def superseded(self) -> bool:
        """A newer attempt of the run has registered: this one should stop."""
        with self._lock:
            return self._superseded

    def close(self) -> None:
        """Ends the agent's threads and its connection. Reports that are not
        sent within half a second get lost."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._lock.notify_all()
        self._to_fetch.put(None)
        self._to_send.put(None)
        self._threads[1].join(0.5)
        self._client.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "StepAgent":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ---- inside ------------------------------------------------------------

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this is a forked process (a DataLoader worker?): the agent "
                "lives in its parent; make metadata here, submit it there")

    def _state(self, step: int) -> _Step:
        if step not in self._steps:
            raise KeyError(f"step {step} was not submitted")
        return self._steps[step]

    def _decide(self, state: _Step, program: StepProgram) -> None:
        state.settled = program
        self.counters[f"steps_{program.origin}"] += 1
        self._lock.notify_all()

    def _fall_back(self, state: _Step, reason: str) -> None:
        if self._superseded:
            reason = SUPERSEDED
        text = f"step {state.number} runs its safe program"
        if reason == REFUSED:
            text += f": {state.fault}"
        self._count(reason, text)
        self._decide(state, state.safe)

    def _count(self, reason: str, text: str) -> None:
        self.counters[reason] += 1
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("rank %d: %s: %s (said once; see the counters)",
                           self.rank, reason, text)

    def _key(self, step: int) -> plan_pb2.PlanKey:
        return plan_pb2.PlanKey(job=self._job.name, attempt=self._attempt,
                                step=step, replica=self.replica)

    def _make_safe(self, state: _Step) -> StepProgram:
        split = split_batch(BatchView(self._view, state.metadata))
        # The attempt stays out: ranks may learn of a new one at different times.
        key = plan_pb2.PlanKey(job=self._job.name, step=state.number,
                               replica=self.replica)
        identity = plan_pb2.PlanIdentity(
            key=key, job_digest=self._job_digest,
            layout_digest=self._layout_digest, batch_digest=state.batch_digest)
        program = safe_programs(identity, split, self._limits)[self.rank]
        return self._prepared(SAFE, check_program(program, key, self.rank), state)

    def _prepared(self, origin: str, checked: CheckedProgram,
                  state: _Step) -> StepProgram:
        prepare = self.options.prepare
        batch = checked.program.batch if checked.moved else state.metadata
        return StepProgram(origin, checked, prepare(checked, batch)
                           if prepare is not None else None)

    def _wanted(self, state: _Step) -> bool:
        with self._lock:
            return (not self._closing and not self._superseded and
                    state.settled is None and not state.voted and
                    not state.given_up and
                    self._steps.get(state.number) is state)

    def _pause(self, state: Optional[_Step], seconds: float) -> None:
        with self._lock:
            if not self._closing and (state is None or state.settled is None):
                self._lock.wait(seconds)

    def _wait_to_retry(self, state: _Step, error: grpc.RpcError,
                       retry_s: float) -> float:
        """Waits before a call that failed is tried again; returns how long to
        wait if it fails once more."""
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            begun = time.monotonic()
            try:
                self._client.call("DescribeJob", service_pb2.DescribeJobRequest(
                    job=self._job.name), self.options.last_retry_s,
                    wait_for_ready=True)
            except grpc.RpcError:
                pass
            if time.monotonic() - begun > retry_s:
                return self.options.first_retry_s
        self._pause(state, retry_s)
        return min(2 * retry_s, self.options.last_retry_s)

    def _fetch_all(self) -> None:
        while True:
            state = self._to_fetch.get()
            if state is None:
                return
            self._fetch(state)

    def _fetch(self, state: _Step) -> None:
        retry = self.options.first_retry_s
        while self._wanted(state):
            with self._lock:
                key = self._key(state.number)
            try:
                data = self._read_program(key, state)
                if data is None:
                    return
                program = plan_pb2.Program.FromString(data)
                checked = self._verify(program, key, state)
                plan = self._prepared(PLAN, checked, state)
                with self._lock:
                    self._unreachable = False
                    if not (state.voted or state.given_up):
                        state.plan = plan
                    self._lock.notify_all()
                return
            except grpc.RpcError as error:
                self._note_trouble(state, error)
                retry = self._wait_to_retry(state, error, retry)
            except Exception as error:  # what a wrong program may lead to
                with self._lock:
                    state.trouble = REFUSED
                    state.fault = f"{type(error).__name__}: {error}"
                    self._lock.notify_all()
                logger.info("rank %d: step %d: %s", self.rank, state.number,
                            state.fault)
                return

    def _read_program(self, key: plan_pb2.PlanKey,
                      state: _Step) -> Optional[bytes]:
        """A serialised program, chunk by chunk; None when nobody waits for it
        any more. Raises grpc.RpcError."""
        data = b""
        while True:
            left = max(0.0, state.needed_at - time.monotonic())
            call = self._client.begin(
                "GetProgram", service_pb2.GetProgramRequest(
                    key=key, rank=self.rank, offset=len(data)),
                left + self.options.call_timeout_s)
            call.add_done_callback(self._wake)
            with self._lock:
                while not call.done() and self._wanted(state):
                    self._lock.wait()
            if not call.done():
                call.cancel()
                return None
            response = call.result()
            data += response.data
            if len(data) >= response.total_bytes or not response.data:
                return data

    def _wake(self, _: Any) -> None:
        with self._lock:
            self._lock.notify_all()

    def _verify(self, program: plan_pb2.Program, key: plan_pb2.PlanKey,
                state: _Step) -> CheckedProgram:
        checked = check_program(program, key, self.rank)
        for name, mine in (("job_digest", self._job_digest),
                           ("layout_digest", self._layout_digest),
                           ("batch_digest", state.batch_digest)):
            theirs = getattr(program.identity, name)
            if theirs != mine:
                raise BadProgram(f"identity.{name}: {theirs.hex()}, this "
                                 f"trainer's is {mine.hex()}")
        if checked.moved:
            self._check_moved(checked, state)
        return checked

    def _check_moved(self, checked: CheckedProgram, state: _Step) -> None:
        """What one replica can tell: the job has these replicas, and what comes
        from its own batch is what it submitted."""
        if not self.options.move_microbatches:
            raise BadProgram("moves: set, and move_microbatches was not asked "
                             "for")
        counts = checked.program.moves.num_microbatches
        replicas = self._job.parallelism.data_parallel
        if len(counts) != replicas or counts[self.replica] != len(
                state.metadata.microbatches):
            raise BadProgram(
                f"moves.num_microbatches: {list(counts)}, this trainer has "
                f"{replicas} replicas, and this one submitted "
                f"{len(state.metadata.microbatches)}")
        batch = checked.program.batch
        if batch.forward_only != state.metadata.forward_only:
            raise BadProgram(f"batch.forward_only: {batch.forward_only}, this "
                             "replica submitted another")
        theirs = BatchView(self._view, batch).microbatches
        mine = BatchView(self._view, state.metadata).microbatches
        for place, (replica, microbatch) in enumerate(checked.origins):
            if replica == self.replica and _sizes(theirs[place]) != _sizes(
                    mine[microbatch]):
                raise BadProgram(f"batch.microbatches[{place}]: not the sizes "
                                 f"of microbatch {microbatch}, which this "
                                 "replica submitted")

    def _note_trouble(self, state: Optional[_Step],
                      error: grpc.RpcError) -> None:
        code = error.code()
        waiting = code in (grpc.StatusCode.DEADLINE_EXCEEDED,
                           grpc.StatusCode.CANCELLED)
        if code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED,
                    grpc.StatusCode.FAILED_PRECONDITION):
            # The step may not have arrived yet, or the server has forgotten
            # the job, or there is a new attempt: registering tells.
            waiting = self._register_again(code)
        answered = code in _ANSWERS or code == grpc.StatusCode.NOT_FOUND
        with self._lock:
            if code == grpc.StatusCode.UNAVAILABLE:
                self._unreachable = True
            elif code not in (grpc.StatusCode.DEADLINE_EXCEEDED,
                              grpc.StatusCode.CANCELLED):
                self._unreachable = False
            if state is not None and not waiting:
                state.trouble = NO_PLAN if answered else UNREACHABLE
        logger.debug("rank %d: %s: %s", self.rank, code, error.details())

    def _register_again(self, code: grpc.StatusCode) -> bool:
        """Asks whose the job is, and registers where the server does not know the
        run any more. True where the server knows us."""
        with self._registering:
            try:
                return self._register_if_needed(code)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.ABORTED:
                    self._note_superseded()
                return False

    def _register_if_needed(self, code: grpc.StatusCode) -> bool:
        try:
            known = self._client.call(
                "DescribeJob", service_pb2.DescribeJobRequest(
                    job=self._job.name), self.options.call_timeout_s)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND:
                raise
            known = None
        with self._lock:
            mine = self._attempt
        if known is not None and known.request_id == self._run_id:
            self._take_attempt(known.attempt)
            # Else it is the step that is not there yet.
            if code != grpc.StatusCode.FAILED_PRECONDITION:
                return True
        elif known is not None and known.attempt > mine > 0:
            self._note_superseded()
            return False
        # The run keeps its attempt: of two that come back the newer one stays.
        self._take_attempt(_register(
            self._client, self._job, self._run_id, self.options.call_timeout_s,
            attempt=mine).attempt, anew=known is None)
        return True

    def _take_attempt(self, attempt: int, anew: bool = False) -> None:
        with self._lock:
            if anew or attempt != self._attempt:
                self._attempt = attempt
                self.counters["registered_again"] += 1

    def _note_superseded(self) -> None:
        with self._lock:
            if not self._superseded:
                self._superseded = True
                self._count(SUPERSEDED, "a newer attempt has registered")
                self._lock.notify_all()

    def _send_all(self) -> None:
        while True:
            task = self._to_send.get()
            if task is None:
                return
            try:
                self._send(task)
            except Exception as error:  # the next one may be fine
                with self._lock:
                    self._count("sends_failed",
                                f"{type(error).__name__}: {error}")
                    if isinstance(task, tuple):
                        task[0].given_up = True
                    self._lock.notify_all()

    def _send(self, task: Any) -> None:
        if isinstance(task, tuple):
            self._submit(*task)
            return
        method, lost = (
            ("UploadProfile", "profiles_lost")
            if isinstance(task, service_pb2.UploadProfileRequest) else
            ("ReportStep", "reports_lost"))
        try:
            self._client.call(method, task, self.options.call_timeout_s)
        except grpc.RpcError as error:
            with self._lock:
                if not self._closing:
                    self._count(lost, str(error.code()))

    def _submit(self, state: _Step, needed_in: float) -> None:
        retry = self.options.first_retry_s
        begun = time.monotonic()
        while self._wanted(state):
            left = max(0.0, needed_in - (time.monotonic() - begun))
            with self._lock:
                key = self._key(state.number)
            request = service_pb2.SubmitStepRequest(
                key=key, layout_digest=self._layout_digest,
                batch=state.metadata, seed=self.options.seed,
                budget_evaluations=self.options.budget_evaluations)
            request.needed_in.FromNanoseconds(int(left * 1e9))
            if self.options.joint_wait_s is not None:
                request.joint_wait.SetInParent()  # 0 is a wait, too
                request.joint_wait.FromNanoseconds(
                    int(self.options.joint_wait_s * 1e9))
                request.move_microbatches = self.options.move_microbatches
            try:
                self._client.call("SubmitStep", request,
                                  self.options.call_timeout_s)
                with self._lock:
                    self._unreachable = False
                    if state.trouble in (UNREACHABLE, NO_PLAN):
                        state.trouble = LATE
                return
            except grpc.RpcError as error:
                # A full server may have room later.
                if error.code() == grpc.StatusCode.ALREADY_EXISTS or (
                        error.code() in _ANSWERS and error.code() !=
                        grpc.StatusCode.RESOURCE_EXHAUSTED):
                    with self._lock:
                        state.trouble = NO_PLAN
                        state.given_up = True
                        self._count("submission_refused", error.details())
                        self._lock.notify_all()
                    return
                self._note_trouble(state, error)
                retry = self._wait_to_retry(state, error, retry)
