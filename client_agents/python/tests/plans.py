"""Random plans: any order that the dependencies allow, any memory choice."""

import random
from typing import List, Sequence, Tuple

from pipeweaver.job import BatchView, JobView
from pipeweaver.split import split_batch
from pipeweaver.lowering import (
    LoweringOptions, StepGraph, line_of_events, lower, make_programs)
from pipeweaver.program import GRADS_READY, CheckedProgram
from pipeweaver.safe_order import Scheduled
from pipeweaver.v1 import batch_pb2, plan_pb2


def choice_table(job: JobView, names: Sequence[str], rng: random.Random):
    """Choices by name: keep, selective, full, offload, mixed."""
    table = {}
    for m, segments in enumerate(job.chunks):
        for s, segment in enumerate(segments):
            for k, chunk in enumerate(segment):
                n = chunk.num_layers
                choices = []
                for name in names:
                    counts = [0, 0, 0, 0]
                    if name == "mixed":
                        for _ in range(n):
                            counts[rng.randrange(4)] += 1
                    else:
                        counts[["offload", "full", "selective",
                                "keep"].index(name)] = n
                    choices.append(plan_pb2.MemoryChoice(
                        name=name, offload_layers=counts[0],
                        full_recompute_layers=counts[1],
                        selective_recompute_layers=counts[2],
                        keep_layers=counts[3]))
                table[m, s, k] = choices
    return table


def random_line(graph: StepGraph, rng: random.Random, split_share: float,
                num_choices: int) -> List[Tuple[int, Scheduled]]:
    """Any order of all stages in which each stands behind what it needs."""
    todo = []
    for s, sweep in enumerate(graph.sweeps):
        for k, rank in enumerate(sweep.ranks):
            choice = rng.randrange(num_choices)
            module = graph.split.subs[sweep.sub].module
            kinds = "F"
            if sweep.backward:
                kinds = "FIW" if graph.job.trainable[module] and (
                    rng.random() < split_share) else "FB"
            todo += [(rank, Scheduled(kind, s, k, choice)) for kind in kinds]
    made = {}  # (forward, sweep, stage) -> index of the stage that makes it
    for i, (_, stage) in enumerate(todo):
        if stage.kind != "W":
            made[stage.kind == "F", stage.sweep, stage.stage] = i
    left = [0] * len(todo)
    dependents = [[] for _ in todo]
    for i, (_, stage) in enumerate(todo):
        at = (stage.sweep, stage.stage)
        if stage.kind == "F":
            needs = [(True, *x) for x in graph.forward_inputs(*at)]
        elif stage.kind == "W":
            needs = [(False, *at)]
        else:
            needs = [(True, *at)] + [
                (False, *x) for x in graph.forward_outputs(*at)
                if graph.sweeps[x[0]].backward]
        left[i] = len(needs)
        for need in needs:
            dependents[made[need]].append(i)
    # Some lines run backwards early, some pile forwards up.
    eager = rng.random()
    ready = {True: [], False: []}  # by: is a backward
    for i, n in enumerate(left):
        if n == 0:
            ready[todo[i][1].kind in "BI"].append(i)
    line = []
    while ready[True] or ready[False]:
        if ready[True] and ready[False]:
            pool = ready[rng.random() < eager]
        else:
            pool = ready[True] or ready[False]
        i = pool.pop(rng.randrange(len(pool)))
        line.append(todo[i])
        for j in dependents[i]:
            left[j] -= 1
            if left[j] == 0:
                ready[todo[j][1].kind in "BI"].append(j)
    return line


def random_plan(job: JobView, batch: batch_pb2.BatchMetadata, seed: int,
                split_share: float = 0.5,
                names: Sequence[str] = ("keep", "selective", "full", "offload",
                                        "mixed"),
                key: plan_pb2.PlanKey = None,
                identity: plan_pb2.PlanIdentity = None,
                split_as_planned: bool = False) -> List[plan_pb2.Program]:
    rng = random.Random(seed)
    view = BatchView(job, batch)
    split = split_batch(view, () if split_as_planned else [
        rng.choice((4, 8, 16, 1000)) for _ in range(job.num_modules)])
    graph = StepGraph(split)
    table = choice_table(job, names, rng)
    line = random_line(graph, rng, split_share, len(names))
    ranks = [[s for r, s in line if r == rank] for rank in range(job.ranks)]
    if rng.random() < 0.5:
        line = line_of_events(graph, ranks)
    columns = lower(graph, ranks, table, line,
                    LoweringOptions(rng.randint(1, 4), rng.randint(1, 4)))
    if identity is None:
        identity = plan_pb2.PlanIdentity(
            key=key, seed=seed, origin=plan_pb2.PLAN_ORIGIN_SEARCH_FINISHED)
    return make_programs(identity, graph, columns, table)


def chunk_ends(checked: CheckedProgram) -> Tuple[Tuple[int, int, int], ...]:
    """(module, segment, chunk) in the order in which the program says that their
    gradients are ready."""
    a = checked.actions
    return tuple((checked.split.module[sub], segment, chunk)
                 for kind, sub, segment, chunk in zip(
                     a.kind, a.sub_microbatch, a.segment, a.chunk)
                 if kind == GRADS_READY)
