"""From an order of stages to one program a rank.

The planner does this for its own plans. A trainer needs it for the safe
program, which it makes from layout and metadata alone.

Why a program made here ends under rendezvous with one in-order channel a pair
of ranks, for any durations: there is one line of events that holds every rank's
stages and every transfer, in which a stage stands behind all it needs. A
transfer is posted on both ranks at one place of the line, right behind the
stage that made it; each rank's actions stand in the order of the line; each
wait stands behind its posts. The first action of the line that were not over
would wait for a transfer whose posts, and all transfers before it, are over.
"""

import heapq
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Sequence, Tuple

from pipeweaver import digest
from pipeweaver.job import SplitView
from pipeweaver.memory import ChoiceTable, StageMemory, dtype_bytes
from pipeweaver.program import (
    BACKWARD, FORWARD, GRADS_READY, INPUT_GRAD, OFFLOAD, POST_RECV, POST_SEND,
    RELOAD, WAIT_COPY, WAIT_RECV, WAIT_SEND, WEIGHT_GRAD)
from pipeweaver.safe_order import (
    DoesNotFit, Problem, Scheduled, Stage, Sweep, safe_order)
from pipeweaver.v1 import plan_pb2

_KINDS = {"F": FORWARD, "B": BACKWARD, "I": INPUT_GRAD, "W": WEIGHT_GRAD}
_TICKS = {"F": 1, "B": 2, "I": 1, "W": 1}
# A sent tensor is held until its send is waited for: so many at once.
_SENDS_AHEAD = 4


class StepSweep(NamedTuple):
    """One segment of a module run on one sub-microbatch."""
    sub: int
    segment: int
    ranks: Tuple[int, ...]  # of its stages
    after: Tuple[int, ...]  # sweeps
    backward: bool


class StepGraph:
    """The sweeps of a step and what they wait for.

    Sweeps stand as the planner numbers them: by microbatch, module (producers
    first), sub-microbatch, segment.
    """

    def __init__(self, split: SplitView):
        self.split = split
        job = split.batch.job
        self.job = job
        self.sweeps: List[StepSweep] = []
        first: Dict[int, int] = {}
        last: Dict[int, int] = {}
        place = {m: i for i, m in enumerate(job.order)}
        for sub in sorted(split.subs, key=lambda sub: (
                sub.microbatch, place[sub.module], sub.index)):
            first[sub.index] = len(self.sweeps)
            last[sub.index] = len(self.sweeps) + len(job.chunks[sub.module]) - 1
            for segment in job.chunks[sub.module]:
                self.sweeps.append(StepSweep(
                    sub.index, len(self.sweeps) - first[sub.index],
                    tuple(c.rank for c in segment), (),
                    job.backward(sub.module) and
                    not split.batch.forward_only))
        self.consumers: List[List[int]] = [[] for _ in self.sweeps]
        for s, sweep in enumerate(self.sweeps):
            if sweep.segment > 0:
                after = [s - 1]
            else:
                after = sorted({last[x.producer]
                                for x in split.inputs[sweep.sub]})
            self.sweeps[s] = sweep._replace(after=tuple(after))
            for producer in after:
                self.consumers[producer].append(s)

    def forward_inputs(self, s: int, k: int) -> List[Tuple[int, int]]:
        """(sweep, stage) whose outputs the stage needs."""
        if k > 0:
            return [(s, k - 1)]
        return [(p, len(self.sweeps[p].ranks) - 1)
                for p in self.sweeps[s].after]

    def forward_outputs(self, s: int, k: int) -> List[Tuple[int, int]]:
        if k + 1 < len(self.sweeps[s].ranks):
            return [(s, k + 1)]
        return [(c, 0) for c in self.consumers[s]]


class _Transfer(NamedTuple):
    sender: Tuple[int, int]  # (sweep, stage)
    receiver: Tuple[int, int]
    gradient: bool


@dataclass
class LoweringOptions:
    # Most receives posted and not yet waited for on a rank.
    receives_ahead: int = 2
    sends_ahead: int = _SENDS_AHEAD


def line_of_events(graph: StepGraph, ranks: Sequence[Sequence[Scheduled]]
                   ) -> List[Tuple[int, Scheduled]]:
    """All stages as (rank, stage), each behind what it needs.

    By start time with forwards of 1 tick and backwards of 2. Raises ValueError
    when the orders hang.
    """
    end: Dict[Tuple[str, int, int], int] = {}
    free = [0] * len(ranks)
    position = [0] * len(ranks)
    line: List[Tuple[int, Scheduled]] = []
    # Ranks whose next stage waits for a stage that is not in the line yet.
    waiting: Dict[Tuple[str, int, int], List[int]] = {}
    ready: List[Tuple[int, int]] = []

    def needs(stage: Scheduled) -> List[Tuple[str, int, int]]:
        s, k = stage.sweep, stage.stage
        if stage.kind == "F":
            return [("F", *x) for x in graph.forward_inputs(s, k)]
        if stage.kind == "W":
            return [("B", s, k)]
        return [("F", s, k)] + [("B", *x) for x in graph.forward_outputs(s, k)
                                if graph.sweeps[x[0]].backward]

    def look(r: int) -> None:
        if position[r] == len(ranks[r]):
            return
        start = free[r]
        for need in needs(ranks[r][position[r]]):
            if need not in end:
                waiting.setdefault(need, []).append(r)
                return
            start = max(start, end[need])
        heapq.heappush(ready, (start, r))

    for r in range(len(ranks)):
        look(r)
    while ready:
        start, r = heapq.heappop(ready)
        stage = ranks[r][position[r]]
        position[r] += 1
        free[r] = start + _TICKS[stage.kind]
        line.append((r, stage))
        key = ("B" if stage.kind == "I" else stage.kind, stage.sweep,
               stage.stage)
        end[key] = free[r]
        look(r)
        for other in waiting.pop(key, ()):
            look(other)
    if len(line) != sum(map(len, ranks)):
        raise ValueError("the orders of the ranks wait for each other")
    return line


class _RankWriter:
    """Writes one rank's actions; keeps waits where they are due."""

    def __init__(self, graph: StepGraph, rank: int, options: LoweringOptions):
        self.graph = graph
        self.rank = rank
        self.options = options
        self.columns = plan_pb2.ActionColumns()
        self.receives: Dict[int, _Transfer] = {}  # posted, not waited for
        self.sends: Dict[int, _Transfer] = {}

    def _add(self, kind: int, sub: int, segment: int, chunk: int, choice: int = 0,
             transfer: int = 0, peer: int = 0, size: int = 0, edge_sub: int = 0,
             ticks: int = 0, gradient: bool = False) -> None:
        c = self.columns
        c.kind.append(kind)
        c.sub_microbatch.append(sub)
        c.segment.append(segment)
        c.chunk.append(chunk)
        c.choice.append(choice)
        c.transfer.append(transfer)
        c.peer.append(peer)
        c.bytes.append(size)
        c.edge_sub_microbatch.append(edge_sub)
        c.start_delta_ns.append(0)
        c.duration_ns.append(ticks)
        c.gradient.append(gradient)

    def compute(self, stage: Scheduled) -> None:
        sweep = self.graph.sweeps[stage.sweep]
        self._add(_KINDS[stage.kind], sweep.sub, sweep.segment, stage.stage,
                  choice=stage.choice)

    def copy(self, kind: int, stage: Scheduled) -> None:
        sweep = self.graph.sweeps[stage.sweep]
        self._add(kind, sweep.sub, sweep.segment, stage.stage,
                  choice=stage.choice)

    def grads_ready(self, stage: Scheduled) -> None:
        # `sub_microbatch` names the chunk's last one: the module follows.
        sweep = self.graph.sweeps[stage.sweep]
        self._add(GRADS_READY, sweep.sub, sweep.segment, stage.stage)

    def _transfer_action(self, kind: int, number: int, t: _Transfer,
                         size: int = 0) -> None:
        sends = kind in (POST_SEND, WAIT_SEND)
        (s, k), (other, other_stage) = ((t.sender, t.receiver) if sends else
                                        (t.receiver, t.sender))
        mine, theirs = self.graph.sweeps[s], self.graph.sweeps[other]
        self._add(kind, mine.sub, mine.segment, k, transfer=number,
                  peer=theirs.ranks[other_stage], size=size,
                  edge_sub=theirs.sub + 1 if mine.sub != theirs.sub else 0,
                  gradient=t.gradient)

    def post_send(self, number: int, t: _Transfer, size: int) -> None:
        while len(self.sends) >= self.options.sends_ahead:
            self._wait_send(next(iter(self.sends)))
        self.sends[number] = t
        self._transfer_action(POST_SEND, number, t, size)

    def post_recv(self, number: int, t: _Transfer, size: int) -> None:
        while len(self.receives) >= self.options.receives_ahead:
            self.wait_recv(next(iter(self.receives)))
        self.receives[number] = t
        self._transfer_action(POST_RECV, number, t, size)

    def _wait_send(self, number: int) -> None:
        self._transfer_action(WAIT_SEND, number, self.sends.pop(number))

    def wait_recv(self, number: int) -> None:
        if number in self.receives:
            self._transfer_action(WAIT_RECV, number, self.receives.pop(number))

    def finish(self) -> None:
        for number in list(self.sends):
            self._wait_send(number)


def transfer_bytes(graph: StepGraph, t: _Transfer) -> int:
    """Bytes per GPU, by the layers' widths; informs, no more."""
    job = graph.job
    s, k = t.receiver if t.gradient else t.sender
    to_s = (t.sender if t.gradient else t.receiver)[0]
    sub = graph.split.subs[graph.sweeps[s].sub]
    to_sub = graph.sweeps[to_s].sub
    rows = sub.tokens
    if to_sub != sub.index:
        rows = sum(sum(x.rows) for x in graph.split.outputs[sub.index]
                   if x.consumer == to_sub)
    width = job.job.modules[sub.module].layers[-1].hidden_size
    split = max(1, job.job.parallelism.tensor_parallel) * max(
        1, job.job.parallelism.context_parallel)
    return -(-rows * width * dtype_bytes(job.job) // split)


def lower(graph: StepGraph, ranks: Sequence[Sequence[Scheduled]],
          choices: ChoiceTable, line: List[Tuple[int, Scheduled]] = None,
          options: LoweringOptions = None) -> List[plan_pb2.ActionColumns]:
    """One program a rank. `line` may be any line of events of the orders."""
    job = graph.job
    line = line if line is not None else line_of_events(graph, ranks)
    if options is None:
        options = LoweringOptions(job.job.executor.max_receives_ahead or 2)
    writers = [_RankWriter(graph, r, options) for r in range(len(ranks))]
    number = 0
    arriving: Dict[Tuple[int, int, bool], List[int]] = {}
    copies = [_copies(graph, order, choices) for order in ranks]
    last_gradient = [_last_gradients(graph, order) for order in ranks]
    position = [0] * len(ranks)
    for r, stage in line:
        writer = writers[r]
        at = position[r]
        position[r] += 1
        s, k = stage.sweep, stage.stage
        if stage.kind != "W":
            for t in arriving.pop((s, k, stage.kind != "F"), ()):
                writer.wait_recv(t)
        for kind, copied in copies[r].get((at, "before"), ()):
            writer.copy(kind, copied)
        writer.compute(stage)
        for kind, copied in copies[r].get((at, "after"), ()):
            writer.copy(kind, copied)
        if at in last_gradient[r]:
            writer.grads_ready(stage)
        if stage.kind == "F":
            receivers = graph.forward_outputs(s, k)
        elif stage.kind == "W":
            receivers = []
        else:
            receivers = [x for x in graph.forward_inputs(s, k)
                         if graph.sweeps[x[0]].backward]
        for receiver in receivers:
            to = graph.sweeps[receiver[0]].ranks[receiver[1]]
            if to == r:
                continue
            t = _Transfer((s, k), receiver, stage.kind != "F")
            size = transfer_bytes(graph, t)
            writer.post_send(number, t, size)
            writers[to].post_recv(number, t, size)
            arriving.setdefault((*receiver, t.gradient), []).append(number)
            number += 1
    for writer in writers:
        writer.finish()
    return [writer.columns for writer in writers]


def _last_gradients(graph: StepGraph, order: Sequence[Scheduled]) -> List[int]:
    """Positions of the last weight gradient of each trainable chunk."""
    last: Dict[Tuple[int, int, int], int] = {}
    for i, stage in enumerate(order):
        sweep = graph.sweeps[stage.sweep]
        module = graph.split.subs[sweep.sub].module
        if stage.kind in "BW" and graph.job.trainable[module]:
            last[module, sweep.segment, stage.stage] = i
    return list(last.values())


def _copies(graph: StepGraph, order: Sequence[Scheduled],
            choices: ChoiceTable) -> Dict:
    """Where copies to the host and back stand: (position, side) -> actions."""
    found: Dict[Tuple[int, str], List] = {}
    begun: Dict[Tuple[int, int], int] = {}
    for i, stage in enumerate(order):
        sweep = graph.sweeps[stage.sweep]
        module = graph.split.subs[sweep.sub].module
        choice = choices[module, sweep.segment, stage.stage][stage.choice]
        if not choice.offload_layers or not sweep.backward:
            continue
        if stage.kind == "F":
            begun[stage.sweep, stage.stage] = i
        elif stage.kind in "BI":
            j, i0 = i, begun[stage.sweep, stage.stage]
            # Out behind the forward, while the next stage computes; back
            # while the stage before the backward computes.
            out = min(i0 + 1, j - 1)
            found.setdefault((i0, "after"), []).append((OFFLOAD, stage))
            found.setdefault((out, "after"), []).append((WAIT_COPY, stage))
            back = max(out + 1, j - 1)
            found.setdefault((back, "before"), []).append((RELOAD, stage))
            found.setdefault((j, "before"), []).append((WAIT_COPY, stage))
    return found


def safe_problem(graph: StepGraph, memory: StageMemory) -> Problem:
    """What the safe order is computed on."""
    split = graph.split
    return Problem(
        graph.job.ranks, graph.job.job.executor.split_backward,
        list(memory.limits), [
            Sweep(f"{sweep.sub}/{sweep.segment}", sweep.backward, sweep.after, [
                Stage(rank, memory.choices(split.subs[sweep.sub], sweep.segment,
                                           k))
                for k, rank in enumerate(sweep.ranks)])
            for sweep in graph.sweeps])


def make_programs(identity: plan_pb2.PlanIdentity, graph: StepGraph,
                  columns: Sequence[plan_pb2.ActionColumns],
                  table: ChoiceTable) -> List[plan_pb2.Program]:
    """Wraps the ranks' actions up as a plan's programs, digests and all."""
    split = graph.split.to_proto().SerializeToString(deterministic=True)
    actions = [c.SerializeToString(deterministic=True) for c in columns]
    digests = [digest.sha256(a) for a in actions]
    whole = digest.plan_digest(identity, split, digests)
    programs = []
    for rank, data in enumerate(actions):
        program = plan_pb2.Program(
            identity=identity, plan_digest=whole, rank=rank,
            rank_digests=digests, split=split, actions=data)
        for m, s, k in graph.job.local_chunks(rank):
            program.choices.add(module=m, segment=s, chunk=k,
                                choices=table[m, s, k])
        programs.append(program)
    return programs


def safe_programs(identity: plan_pb2.PlanIdentity, split: SplitView,
                  memory_limit_bytes: Sequence[int] = ()
                  ) -> List[plan_pb2.Program]:
    """Every rank's safe program of a step: the planner's own order and choices
    (search/planner.h, PlanSafe).

    memory_limit_bytes: what registration answered. Empty, not known: at the
    leanest choices, with as many microbatches in flight as there are ranks.
    A microbatch that does not fit, larger than registration was told of, runs
    alone, at the leanest choices.
    """
    graph = StepGraph(split)
    ranks = graph.job.ranks
    memory = StageMemory(split, memory_limit_bytes or [0] * ranks)
    ample = [2 ** 62] * ranks
    problem = safe_problem(graph, memory)
    if not memory_limit_bytes:
        problem.memory_limit_bytes = ample
    try:
        order = safe_order(problem, 0 if memory_limit_bytes else ranks)
    except DoesNotFit:
        problem.memory_limit_bytes = ample
        order = safe_order(problem, most_in_flight=1)
    table = memory.table()
    columns = lower(graph, order, table)
    safe = plan_pb2.PlanIdentity()
    safe.CopyFrom(identity)
    safe.origin = plan_pb2.PLAN_ORIGIN_SAFE
    return make_programs(safe, graph, columns, table)

