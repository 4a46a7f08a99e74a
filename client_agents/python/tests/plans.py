"""Random plans: any order that the dependencies allow, any memory choice."""

import random
from typing import List, Sequence, Tuple

from pipeweaver.job import BatchView, JobView
from pipeweaver.split import split_batch
from pipeweaver.lowering import (
    LoweringOptions, StepGraph, line_of_events, lower, make_programs)
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
    forward, backward, line = set(), set(), []
    todo = []
    for s, sweep in enumerate(graph.sweeps):
        for k, rank in enumerate(sweep.ranks):
            choice = rng.randrange(num_choices)
            todo.append((rank, Scheduled("F", s, k, choice)))
            module = graph.split.subs[sweep.sub].module
            if not sweep.backward:
                continue
            if graph.job.trainable[module] and rng.random() < split_share:
                todo.append((rank, Scheduled("I", s, k, choice)))
                todo.append((rank, Scheduled("W", s, k, choice)))
            else:
                todo.append((rank, Scheduled("B", s, k, choice)))
    # Some lines run backwards early, some pile forwards up.
    eager = rng.random()

    def ready(stage):
        at = (stage.sweep, stage.stage)
        if stage.kind == "F":
            return all(x in forward for x in graph.forward_inputs(*at))
        if stage.kind == "W":
            return at in backward
        return at in forward and all(
            x in backward for x in graph.forward_outputs(*at)
            if graph.sweeps[x[0]].backward)

    while todo:
        can = [i for i, (_, stage) in enumerate(todo) if ready(stage)]
        late = [i for i in can if todo[i][1].kind in "BI"]
        pick = rng.choice(late if late and rng.random() < eager else can)
        rank, stage = todo.pop(pick)
        line.append((rank, stage))
        if stage.kind == "F":
            forward.add((stage.sweep, stage.stage))
        elif stage.kind in "BI":
            backward.add((stage.sweep, stage.stage))
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
