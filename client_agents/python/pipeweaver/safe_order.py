"""The safe order: a schedule by a fixed written rule.

The twin of search/plan/safe_order.h, where the rule is written down and argued
for; the numbers of rules below are that text's. Both are tested on the same
vectors (search/plan/testdata/safe_order.json).
"""

import heapq
from dataclasses import dataclass, field
from typing import List, NamedTuple, Optional, Sequence, Tuple


class Choice(NamedTuple):
    """One way to run a stage pair; bytes per GPU."""
    activation_bytes: int
    backward_bytes: int
    weight_grad_bytes: int
    # The stage has a weight gradient apart from its input gradient.
    has_weight_grad: bool = True
    # Set: a fused backward may take the place of the two.
    fused_backward_bytes: Optional[int] = None


class Stage(NamedTuple):
    rank: int
    choices: Sequence[Choice]


class Sweep(NamedTuple):
    id: str
    backward: bool
    after: Sequence[int]
    stages: Sequence[Stage]


@dataclass
class Problem:
    ranks: int
    split_backward: bool
    memory_limit_bytes: List[int]
    sweeps: List[Sweep]


class Scheduled(NamedTuple):
    kind: str  # 'F', 'B', 'I' or 'W'
    sweep: int
    stage: int
    choice: int


class DoesNotFit(ValueError):
    """One microbatch in flight needs more memory than a rank has."""


@dataclass
class _Group:
    sweeps: List[int]
    forwards: List[List[Tuple[int, int]]] = field(default_factory=list)
    backwards: List[List[Tuple[int, int]]] = field(default_factory=list)
    hold: List[int] = field(default_factory=list)
    extra: List[int] = field(default_factory=list)
    stages_left: int = 0


def safe_order(problem: Problem,
               most_in_flight: int = 0) -> List[List[Scheduled]]:
    """The stages of each rank in order. Raises DoesNotFit.

    most_in_flight: rule 5's number of groups; 0: twice as many as ranks.
    """
    return _Builder(problem, most_in_flight or 2 * problem.ranks).run()


class _Builder:

    def __init__(self, problem: Problem, most_in_flight: int):
        self.problem = problem
        self.most_in_flight = most_in_flight
        self.consumers: List[List[int]] = [[] for _ in problem.sweeps]
        for s, sweep in enumerate(problem.sweeps):
            for producer in sweep.after:
                self.consumers[producer].append(s)
        self.splits = [[problem.split_backward and
                        all(c.has_weight_grad for c in stage.choices)
                        for stage in sweep.stages] for sweep in problem.sweeps]
        self.choice = [[0] * len(sweep.stages) for sweep in problem.sweeps]

    def run(self) -> List[List[Scheduled]]:
        groups = self._form_groups()
        for group in groups:
            self._form_line(group)
            self._pick_choices(group)
        return self._merge(groups)

    def _form_groups(self) -> List[_Group]:  # rule 1
        sweeps = self.problem.sweeps
        seen = [False] * len(sweeps)
        groups = []
        for root in range(len(sweeps)):
            if seen[root]:
                continue
            seen[root] = True
            members, todo = [], [root]
            while todo:
                s = todo.pop()
                members.append(s)
                for other in (*sweeps[s].after, *self.consumers[s]):
                    if not seen[other]:
                        seen[other] = True
                        todo.append(other)
            groups.append(_Group(sorted(members)))
        return groups

    def _form_line(self, group: _Group) -> None:  # rule 2
        sweeps = self.problem.sweeps
        ranks = self.problem.ranks
        group.forwards = [[] for _ in range(ranks)]
        ready: List[List[Tuple[int, int]]] = [[] for _ in range(ranks)]
        inputs_left = {s: len(sweeps[s].after) for s in group.sweeps}
        left = 0
        for s in group.sweeps:
            left += len(sweeps[s].stages)
            if inputs_left[s] == 0:
                heapq.heappush(ready[sweeps[s].stages[0].rank], (s, 0))
        while left:
            made = []
            for r in range(ranks):
                if ready[r]:
                    made.append(heapq.heappop(ready[r]))
                    group.forwards[r].append(made[-1])
            left -= len(made)
            for s, k in made:
                if k + 1 < len(sweeps[s].stages):
                    heapq.heappush(ready[sweeps[s].stages[k + 1].rank],
                                   (s, k + 1))
                    continue
                for consumer in self.consumers[s]:
                    inputs_left[consumer] -= 1
                    if inputs_left[consumer] == 0:
                        heapq.heappush(ready[sweeps[consumer].stages[0].rank],
                                       (consumer, 0))
        group.backwards = [[sk for sk in reversed(line) if sweeps[sk[0]].backward]
                           for line in group.forwards]
        group.stages_left = sum(map(len, group.forwards)) + sum(
            map(len, group.backwards))

    def _runs_fused(self, s: int, k: int, c: Choice) -> bool:  # rule 3
        return (self.splits[s][k] and c.fused_backward_bytes is not None and
                c.fused_backward_bytes <= max(c.backward_bytes,
                                              c.weight_grad_bytes))

    def _need(self, s: int, k: int, c: Choice) -> int:
        if not self.problem.sweeps[s].backward:
            return c.activation_bytes
        backward = c.backward_bytes
        if self._runs_fused(s, k, c):
            backward = c.fused_backward_bytes
        elif self.splits[s][k]:
            backward = max(c.backward_bytes, c.weight_grad_bytes)
        return max(c.activation_bytes, backward)

    def _pick_choices(self, group: _Group) -> None:  # rule 4
        sweeps = self.problem.sweeps
        for r, line in enumerate(group.forwards):
            limit = self.problem.memory_limit_bytes[r]
            held = peak = 0
            for s, k in line:
                choices = sweeps[s].stages[k].choices
                needs = [self._need(s, k, c) for c in choices]
                fitting = [(c.activation_bytes, needs[i], i)
                           for i, c in enumerate(choices)
                           if held + needs[i] <= limit]
                if not fitting:
                    raise DoesNotFit(
                        f"rank {r}: one microbatch in flight needs "
                        f"{held + min(needs)} bytes at {sweeps[s].id} stage "
                        f"{k}, over the limit of {limit}; the safe order does "
                        "not fit")
                activation, need, best = min(fitting)
                self.choice[s][k] = best
                peak = max(peak, held + need)
                if sweeps[s].backward:
                    held += activation
            group.hold.append(held)
            group.extra.append(peak - held)

    def _may_admit(self, candidate: _Group, in_flight: List[_Group]) -> bool:
        if not in_flight:  # rule 5
            return True
        if len(in_flight) >= self.most_in_flight:
            return False
        for r, limit in enumerate(self.problem.memory_limit_bytes):
            held = candidate.hold[r] + sum(g.hold[r] for g in in_flight)
            extra = max(candidate.extra[r], *(g.extra[r] for g in in_flight))
            if held + extra > limit:
                return False
        return True

    def _forward_ready(self, s: int, k: int) -> bool:
        if k > 0:
            return self.forward_done[s][k - 1]
        return all(self.forward_done[p][-1]
                   for p in self.problem.sweeps[s].after)

    def _backward_ready(self, s: int, k: int) -> bool:
        if not self.forward_done[s][k]:
            return False
        if k + 1 < len(self.problem.sweeps[s].stages):
            return self.backward_done[s][k + 1]
        return all(not self.problem.sweeps[c].backward or
                   self.backward_done[c][0] for c in self.consumers[s])

    def _merge(self, groups: List[_Group]) -> List[List[Scheduled]]:
        # Rules 5 and 6.
        sweeps = self.problem.sweeps
        ranks = self.problem.ranks
        order: List[List[Scheduled]] = [[] for _ in range(ranks)]
        self.forward_done = [[False] * len(s.stages) for s in sweeps]
        self.backward_done = [[False] * len(s.stages) for s in sweeps]
        # (group, sweep, stage, forward, end tick) of a busy rank.
        running: List[Optional[Tuple[_Group, int, int, bool, int]]] = (
            [None] * ranks)
        position = {}
        in_flight: List[_Group] = []
        next_group = tick = 0
        while True:
            for r, run in enumerate(running):
                if run is None or run[4] > tick:
                    continue
                group, s, k, forward, _ = run
                done = self.forward_done if forward else self.backward_done
                done[s][k] = True
                group.stages_left -= 1
                running[r] = None
            in_flight = [g for g in in_flight if g.stages_left]
            while next_group < len(groups) and self._may_admit(
                    groups[next_group], in_flight):
                in_flight.append(groups[next_group])
                position[id(groups[next_group])] = [0] * ranks
                next_group += 1
            if not in_flight:
                return order
            for r in range(ranks):
                if running[r] is not None:
                    continue
                found = None
                for group in in_flight:
                    at = position[id(group)][r]
                    ahead = len(group.forwards[r])
                    forward = at < ahead
                    if forward:
                        if found is not None:
                            continue
                        s, k = group.forwards[r][at]
                        if not self._forward_ready(s, k):
                            continue
                    else:
                        if at - ahead >= len(group.backwards[r]):
                            continue
                        s, k = group.backwards[r][at - ahead]
                        if not self._backward_ready(s, k):
                            continue
                    found = (group, s, k, forward, tick + (1 if forward else 2))
                    if not forward:
                        break
                if found is None:
                    continue
                running[r] = found
                position[id(found[0])][r] += 1
                self._append(order[r], *found[1:4])
            tick = min(run[4] for run in running if run is not None)

    def _append(self, order: List[Scheduled], s: int, k: int,
                forward: bool) -> None:
        choice = self.choice[s][k]
        if forward:
            kinds = "F"
        elif not self.splits[s][k] or self._runs_fused(
                s, k, self.problem.sweeps[s].stages[k].choices[choice]):
            kinds = "B"
        else:
            kinds = "IW"
        order.extend(Scheduled(kind, s, k, choice) for kind in kinds)
