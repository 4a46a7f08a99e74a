"""A job, its layout and a batch as the trainer's side needs to see them.

The server validates all input with full messages; here only what would make
the agent itself go wrong is refused.
"""

from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

from pipeweaver.v1 import batch_pb2, job_pb2, plan_pb2


@dataclass(frozen=True)
class Edge:
    index: int
    producer: int
    consumer: int
    tokens_merged: int

    def rows(self, tokens: int) -> int:
        """Tokens that cross the edge for an item of `tokens` tokens."""
        return -(-tokens // self.tokens_merged)


@dataclass(frozen=True)
class Chunk:
    rank: int
    first_layer: int
    num_layers: int


class JobView:
    """Names resolved to indices, defaults filled in, the graph walked."""

    def __init__(self, job: job_pb2.Job, layout: job_pb2.Layout = None):
        self.job = job
        layout = layout if layout is not None else job.layout
        self.layout = layout
        self.num_modules = len(job.modules)
        self.ranks = job.parallelism.pipeline_parallel
        names = {m.name: i for i, m in enumerate(job.modules)}
        if len(names) != self.num_modules:
            raise ValueError("modules: names must be unique")
        self.edges: List[Edge] = []
        for i, e in enumerate(job.edges):
            for name in (e.producer, e.consumer):
                if name not in names:
                    raise ValueError(f"edges[{i}]: {name!r}: no such module")
            self.edges.append(Edge(i, names[e.producer], names[e.consumer],
                                   e.tokens_merged or 1))
        if len(layout.modules) != self.num_modules:
            raise ValueError(f"layout.modules: {len(layout.modules)} values, "
                             f"must be one a module: {self.num_modules}")
        # [module][segment][position]
        self.chunks: List[List[List[Chunk]]] = [
            [[Chunk(c.rank, c.first_layer, c.num_layers) for c in s.chunks]
             for s in m.segments] for m in layout.modules]
        self.num_layers = [sum(c.num_layers for s in segments for c in s)
                           for segments in self.chunks]
        self.sub_microbatch_tokens = [
            m.sub_microbatch_tokens for m in layout.modules]
        self.order = self._topological_order()
        self.inputs = [[e for e in self.edges if e.consumer == m]
                       for m in range(self.num_modules)]
        self.outputs = [[e for e in self.edges if e.producer == m]
                        for m in range(self.num_modules)]
        self.trainable = [not m.frozen for m in job.modules]
        # Something trainable stands upstream.
        self.upstream = [False] * self.num_modules
        for m in self.order:
            self.upstream[m] = any(self.backward(e.producer)
                                   for e in self.inputs[m])
        # Edge over which a module without modality takes its items; -1.
        self.inherited = [
            self.inputs[m][0].index
            if module.modality == job_pb2.MODALITY_UNSPECIFIED and
            self.inputs[m] else -1
            for m, module in enumerate(job.modules)]

    def backward(self, module: int) -> bool:
        """The module's stages have a backward in a training step."""
        return self.trainable[module] or self.upstream[module]

    def module_name(self, module: int) -> str:
        return self.job.modules[module].name

    def padding(self, tokens: int) -> int:
        """What `tokens` lack to the next of executor.shape_buckets."""
        return next((bucket - tokens for bucket in
                     self.job.executor.shape_buckets if bucket >= tokens), 0)

    def has_loss(self, module: int) -> bool:
        """It has an output head, or nobody consumes what it makes."""
        return not self.outputs[module] or any(
            g.kind == job_pb2.LAYER_KIND_LM_HEAD
            for g in self.job.modules[module].layers)

    def local_chunks(self, rank: int) -> List[Tuple[int, int, int]]:
        """(module, segment, position) of the chunks on a rank."""
        return [(m, s, k) for m, segments in enumerate(self.chunks)
                for s, segment in enumerate(segments)
                for k, chunk in enumerate(segment) if chunk.rank == rank]

    def exchanging_ranks(self) -> List[Tuple[int, int]]:
        """Pairs of ranks between which transfers may run, each once, ascending."""
        paths = [[chunk.rank for segment in segments for chunk in segment]
                 for segments in self.chunks]
        hops = [hop for path in paths for hop in zip(path, path[1:])]
        hops += [(paths[e.producer][-1], paths[e.consumer][0])
                 for e in self.edges]
        return sorted({(min(hop), max(hop)) for hop in hops
                       if hop[0] != hop[1]})

    def _topological_order(self) -> List[int]:
        left = [sum(e.consumer == m for e in self.edges)
                for m in range(self.num_modules)]
        order: List[int] = []
        while len(order) < self.num_modules:
            ready = [m for m in range(self.num_modules)
                     if left[m] == 0 and m not in order]
            if not ready:
                raise ValueError("edges: the module graph has a circle")
            order.append(ready[0])
            for e in self.edges:
                if e.producer == ready[0]:
                    left[e.consumer] -= 1
        return order


@dataclass
class MicrobatchView:
    # [module][item]; modules that inherit their items have them filled in.
    item_tokens: List[List[int]]
    # [edge]: (producer item, consumer item), inherited ones filled in.
    uses: List[List[Tuple[int, int]]]


class BatchView:
    """A step's batch with every module's items as token counts. Raises ValueError
    where it does not fit the job, or has an item without tokens."""

    def __init__(self, job: JobView, batch: batch_pb2.BatchMetadata):
        self.job = job
        self.forward_only = batch.forward_only
        self.microbatches = [self._read(i, mb)
                             for i, mb in enumerate(batch.microbatches)]

    def _read(self, index: int, mb: batch_pb2.Microbatch) -> MicrobatchView:
        job = self.job
        tokens: List[List[int]] = [[] for _ in range(job.num_modules)]
        uses: List[List[Tuple[int, int]]] = [[] for _ in job.edges]
        for items in mb.items:
            if items.module >= job.num_modules:
                raise ValueError(f"microbatches[{index}].items: module "
                                 f"{items.module}: the job has "
                                 f"{job.num_modules} modules")
            found = _item_tokens(job.job.modules[items.module], items)
            for i, n in enumerate(found):
                if n < 1:
                    raise ValueError(
                        f"microbatches[{index}].items of module "
                        f"{job.module_name(items.module)!r}: item {i} has {n} "
                        "tokens, must be at least 1")
            tokens[items.module] = found
        for m in job.order:
            e = job.inherited[m]
            if e < 0:
                continue
            edge = job.edges[e]
            tokens[m] = [edge.rows(n) for n in tokens[edge.producer]]
            uses[e] = [(i, i) for i in range(len(tokens[m]))]
        for u in mb.uses:
            if u.edge >= len(job.edges):
                raise ValueError(f"microbatches[{index}].uses: edge {u.edge}: "
                                 f"the job has {len(job.edges)} edges")
            edge = job.edges[u.edge]
            pairs = list(zip(u.producer_item, u.consumer_item))
            for producer, consumer in pairs:
                if (producer >= len(tokens[edge.producer]) or
                        consumer >= len(tokens[edge.consumer])):
                    raise ValueError(
                        f"microbatches[{index}].uses of edge {u.edge}: items "
                        f"({producer}, {consumer}) do not exist")
            uses[u.edge] = pairs
        return MicrobatchView(tokens, uses)


def _item_tokens(module: job_pb2.Module,
                 items: batch_pb2.ModuleItems) -> List[int]:
    if items.tokens or not items.height:
        return list(items.tokens)
    grid = module.token_grid
    if not grid.pixels_per_token_height:
        raise ValueError(f"module {module.name!r} has no token_grid, its items "
                         "are given by tokens")
    frames = items.frames or [1] * len(items.height)
    return [-(-h // grid.pixels_per_token_height) *
            -(-w // grid.pixels_per_token_width) *
            -(-f // (grid.frames_per_token or 1))
            for h, w, f in zip(items.height, items.width, frames)]


Stage = Tuple[int, int, int]  # sub-microbatch, segment, position


@dataclass(frozen=True)
class SubMicrobatch:
    """Items of one microbatch that pass through a module together."""
    index: int
    module: int
    microbatch: int
    items: Tuple[int, ...]
    # One an item.
    item_tokens: Tuple[int, ...]
    # Tokens of nothing behind the items, up to a shape bucket of the executor.
    padding: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.item_tokens)

    @property
    def lengths(self) -> Tuple[int, ...]:
        """item_tokens, with the padding as an item of its own."""
        return (self.item_tokens + (self.padding,) if self.padding else
                self.item_tokens)


@dataclass(frozen=True)
class EdgeCrossing:
    """What passes from one sub-microbatch to another over an edge."""
    edge: Edge
    producer: int  # index of the sub-microbatch
    consumer: int
    # Items of the producer that the consumer uses, ascending, each once.
    items: Tuple[int, ...]
    # Rows of each of them, as it crosses.
    rows: Tuple[int, ...]
    # (producer item, consumer item), in ascending order.
    uses: Tuple[Tuple[int, int], ...]


@dataclass
class SplitView:
    """The sub-microbatches of a step and what crosses between them."""
    batch: BatchView
    subs: List[SubMicrobatch]
    # [sub-microbatch]: by ascending (edge, other end).
    inputs: List[List[EdgeCrossing]] = field(default_factory=list)
    outputs: List[List[EdgeCrossing]] = field(default_factory=list)

    def __post_init__(self) -> None:
        job = self.batch.job
        self.inputs = [[] for _ in self.subs]
        self.outputs = [[] for _ in self.subs]
        holder: Dict[Tuple[int, int, int], int] = {}
        for sub in self.subs:
            for item in sub.items:
                key = (sub.module, sub.microbatch, item)
                if key in holder:
                    raise ValueError(f"split.items: item {item} of module "
                                     f"{sub.module} in microbatch "
                                     f"{sub.microbatch} is in two "
                                     "sub-microbatches")
                holder[key] = sub.index
        for b, mb in enumerate(self.batch.microbatches):
            for m, items in enumerate(mb.item_tokens):
                for item in range(len(items)):
                    if (m, b, item) not in holder:
                        raise ValueError(
                            f"split.items: item {item} of module {m} in "
                            f"microbatch {b} is in no sub-microbatch")
            for edge in job.edges:
                pairs: Dict[Tuple[int, int], List[Tuple[int, int]]] = {}
                for p, c in mb.uses[edge.index]:
                    pair = (holder[edge.producer, b, p],
                            holder[edge.consumer, b, c])
                    pairs.setdefault(pair, []).append((p, c))
                for (producer, consumer), uses in sorted(pairs.items()):
                    items = tuple(sorted({p for p, _ in uses}))
                    rows = tuple(edge.rows(mb.item_tokens[edge.producer][p])
                                 for p in items)
                    crossing = EdgeCrossing(edge, producer, consumer, items,
                                            rows, tuple(sorted(uses)))
                    self.inputs[consumer].append(crossing)
                    self.outputs[producer].append(crossing)

    def previous_stage(self, stage: Stage) -> Optional[Stage]:
        """The stage before within the module; None at its first."""
        sub, segment, chunk = stage
        if chunk > 0:
            return (sub, segment, chunk - 1)
        if segment > 0:
            segments = self.batch.job.chunks[self.subs[sub].module]
            return (sub, segment - 1, len(segments[segment - 1]) - 1)
        return None

    def next_stage(self, stage: Stage) -> Optional[Stage]:
        """The stage behind within the module; None at its last."""
        sub, segment, chunk = stage
        segments = self.batch.job.chunks[self.subs[sub].module]
        if chunk + 1 < len(segments[segment]):
            return (sub, segment, chunk + 1)
        if segment + 1 < len(segments):
            return (sub, segment + 1, 0)
        return None

    @staticmethod
    def from_proto(batch: BatchView,
                   split: plan_pb2.BatchSplit) -> "SplitView":
        """Raises ValueError where the split is not one of this batch."""
        subs: List[SubMicrobatch] = []
        at = 0
        for i, (module, microbatch, count) in enumerate(
                zip(split.module, split.microbatch, split.num_items)):
            items = tuple(split.items[at:at + count])
            at += count
            if (module >= batch.job.num_modules or
                    microbatch >= len(batch.microbatches)):
                raise ValueError(f"split: sub-microbatch {i} is of module "
                                 f"{module}, microbatch {microbatch}, which do "
                                 "not exist")
            tokens = batch.microbatches[microbatch].item_tokens[module]
            if any(item >= len(tokens) for item in items):
                raise ValueError(f"split.items: sub-microbatch {i} has items "
                                 f"{items}, its module has {len(tokens)} in "
                                 "this microbatch")
            mine = tuple(tokens[j] for j in items)
            subs.append(SubMicrobatch(i, module, microbatch, items, mine,
                                      batch.job.padding(sum(mine))))
        return SplitView(batch, subs)

    def to_proto(self) -> plan_pb2.BatchSplit:
        split = plan_pb2.BatchSplit()
        for sub in self.subs:
            split.module.append(sub.module)
            split.microbatch.append(sub.microbatch)
            split.num_items.append(len(sub.items))
            split.tokens.append(sub.tokens)
            split.items.extend(sub.items)
        n = self.batch.job.num_modules
        for b, mb in enumerate(self.batch.microbatches):
            split.empty.extend(b * n + m for m in range(n)
                               if not mb.item_tokens[m])
        return split
