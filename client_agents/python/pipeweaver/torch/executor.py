"""Runs programs: a rank's part of a plan, on real tensors and real autograd.

    executor = PipelineExecutor(job_view, rank, modules, transport)
    prepared = executor.prepare(checked_program, batch_metadata)  # ahead of time
    result = executor.run(prepared, data)

`data(module, microbatch, items)` gives the loader's data for items of a
microbatch. It is asked on ranks whose layers look at context.data, no others,
once for each stage that does; the executor keeps what it gave until the stage's
backward is over.
"""

import dataclasses
import time
from typing import (
    Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple)

import torch
from torch import Tensor, nn

from pipeweaver import program as actions
from pipeweaver.job import (
    BatchView, EdgeCrossing, JobView, SplitView, Stage, SubMicrobatch)
from pipeweaver.program import BadProgram, CheckedProgram
from pipeweaver.torch.chunk import (
    ChunkRunner, ExtraRng, LayerTracer, StageContext, StageTape, State,
    TakeGradient, layer_modes, leanest)
from pipeweaver.torch.transport import Post, Transport, flatten, unflatten
from pipeweaver.v1 import batch_pb2, job_pb2

DataFunction = Callable[[int, int, Tuple[int, ...]], Any]


class Boundary(NamedTuple):
    """One tensor of what passes from chunk to chunk of a module."""
    shape: Tuple[int, ...]
    # False: nothing upstream wants its gradient.
    gradient: bool = True


class PipelineModule:
    """A module's chunks on this rank, and the shapes of what crosses.

    chunks: (segment, position in the segment) -> layers, see chunk.py. A rank
    without chunks of the module gives none; shapes must be known on all ranks
    that exchange with it. The defaults fit packed tokens: one tensor of
    [tokens, width] between chunks, and over an edge the rows of the items
    consumed, so many as edge.rows(item's tokens).

    Where the job has shape buckets, the first layer adds sub.padding rows behind
    the items' and a loss leaves them out; what crosses an edge has none.
    """

    # A chunk is one piece, whatever its number of layers: `layers` has one.
    opaque = False

    def __init__(self, chunks: Mapping[Tuple[int, int], Sequence[nn.Module]],
                 width: int, output_width: int = 0):
        self.chunks = {key: list(layers) for key, layers in chunks.items()}
        self.width = width
        self.output_width = output_width or width

    def boundary(self, sub: SubMicrobatch, inputs: Sequence[EdgeCrossing]
                 ) -> List[Boundary]:
        return [Boundary((sum(sub.lengths), self.width))]

    def output_boundary(self, sub: SubMicrobatch, outputs: Sequence[EdgeCrossing]
                        ) -> List[Boundary]:
        """What passes on through chunks behind the last layer, if there are."""
        if not outputs:
            return []
        rows = sum(outputs[0].edge.rows(n) for n in sub.item_tokens)
        return [Boundary((rows, self.output_width))]

    def edge_shape(self, crossing: EdgeCrossing) -> Tuple[int, ...]:
        return (sum(crossing.rows), self.output_width)

    def take(self, crossing: EdgeCrossing, sub: SubMicrobatch,
             state: State) -> Tensor:
        """What crosses, out of the module's output."""
        if crossing.items == sub.items:
            return state[0]
        return torch.cat([state[0][a:b] for a, b in
                          self._ranges(crossing, sub)])

    def add_gradient(self, crossing: EdgeCrossing, sub: SubMicrobatch,
                     gradient: Tensor, total: Tensor) -> None:
        """Adds what came back over the edge to the output's gradient."""
        if crossing.items == sub.items:
            total += gradient
            return
        at = 0
        for a, b in self._ranges(crossing, sub):
            total[a:b] += gradient[at:at + b - a]
            at += b - a

    @staticmethod
    def _ranges(crossing: EdgeCrossing, sub: SubMicrobatch
                ) -> List[Tuple[int, int]]:
        used = set(crossing.items)
        ranges, at = [], 0
        for item, tokens in zip(sub.items, sub.item_tokens):
            rows = crossing.edge.rows(tokens)
            if item in used:
                ranges.append((at, at + rows))
            at += rows
        return ranges


class Hooks:
    """What a profiler overrides to follow the actions. Does nothing itself."""

    def step(self, step: int) -> None:
        """A step begins."""

    def push(self, correlation_id: int) -> None:
        """Before an action; the id is step * 2^32 + the action's index."""

    def pop(self) -> None:
        """After it."""

    def before(self, kind: int, stage: Stage) -> None:
        """Before an action, past push()."""

    def layer_begin(self, annotation: str) -> None:
        """Before a layer's pass; the annotation names module, kind of layer,
        pass and sizes as LayerKey in profile.proto says. The calling thread
        launches all of it, and nothing else until layer_end(); not every pass is
        named, see LayerTracer in chunk.py."""

    def layer_end(self) -> None:
        """After it."""


class _Tracer(LayerTracer):
    """Names the passes of a chunk's layers to the hooks."""

    def __init__(self, job: JobView, module: int, first_layer: int,
                 hooks: Hooks):
        self._hooks = hooks
        self._module = job.module_name(module)
        self._kinds = [
            job_pb2.LayerKind.Name(group.kind)[len("LAYER_KIND_"):].lower()
            for group in job.job.modules[module].layers
            for _ in range(group.count)][first_layer:]
        self._conditioned = any(group.kind == job_pb2.LAYER_KIND_DIT
                                for group in job.job.modules[module].layers)
        parallelism = job.job.parallelism
        self._end_of_name = (f",tp={parallelism.tensor_parallel or 1}"
                             f",cp={parallelism.context_parallel or 1}")

    def begin(self, layer: int, what: str, context: StageContext) -> None:
        tokens = context.sub.lengths
        self._hooks.layer_begin(
            f"pw:module={self._module},layer={self._kinds[layer]},pass={what},"
            f"items={len(tokens)},tokens={sum(tokens)},"
            f"sum_squares={sum(n * n for n in tokens)},"
            f"max_tokens={max(tokens)}"
            f"{self._condition(context)}{self._end_of_name}")

    def _condition(self, context: StageContext) -> str:
        """What the items attend to besides themselves."""
        if not self._conditioned:
            return ""
        sub = context.sub
        tokens = dict(zip(sub.items, sub.item_tokens))
        total = products = 0
        for crossing in context.crossings:
            rows = dict(zip(crossing.items, crossing.rows))
            for producer, consumer in crossing.uses:
                total += rows[producer]
                products += rows[producer] * tokens[consumer]
        return f",condition_tokens={total},condition_products={products}"

    def end(self) -> None:
        self._hooks.layer_end()


@dataclasses.dataclass
class ExecutorOptions:
    # Gradients are added in ascending order of sub-microbatches whatever order
    # the program computes them in, so that equal splits give equal sums. Holds
    # gradients that come too early.
    deterministic: bool = False
    # Times every loss's gradient; for trainers that scale.
    loss_scale: float = 1.0
    # Called with (module, segment, chunk) when a chunk's gradients are whole,
    # once a step for every chunk that is trained, those without work included:
    # where a trainer starts its data-parallel reduction. Collectives match by
    # their order and plans differ between replicas, so calls come in the order
    # of PipelineExecutor.reduction_order, always: a chunk waits for those before
    # it, and for those that share a weight with it: reduce that with the first of
    # them. May not wait itself for another replica, which may wait for this one.
    grads_ready: Optional[Callable[[int, int, int], None]] = None
    # Takes a weight's gradient; None adds it to `param.grad`.
    accumulate: Optional[TakeGradient] = None
    # Of trainers whose layers draw from random states of their own: without it
    # recompute would draw other dropout masks than the forward did.
    extra_rng: Optional[ExtraRng] = None
    # Record each action's time: the host's, or on a device its compute stream's,
    # by an event an action.
    record_times: bool = True


@dataclasses.dataclass
class StepResult:
    # Sum of the losses that this rank computed; None where it has none.
    loss: Optional[Tensor]
    # One an action; empty unless times are recorded.
    start_offset_ns: List[int]
    duration_ns: List[int]
    step_ns: int
    # Most device memory in use; 0 without a device.
    peak_memory_bytes: int


class _Message(NamedTuple):
    """A transfer as the program describes it on this rank."""
    send: bool
    number: int
    peer: int
    stage: Stage
    gradient: bool
    edge: int  # position among the stage's crossings; -1: within the module
    shapes: Tuple[Tuple[int, ...], ...]


class _Source(NamedTuple):
    """Where a stage's tensors come from: a transfer, or a stage here."""
    transfer: int  # -1: local
    stage: Optional[Stage]
    index: int  # of a local gradient among its stage's inputs


class _Op(NamedTuple):
    kind: int
    index: int
    stage: Stage
    payload: Any


@dataclasses.dataclass
class PreparedStep:
    """A program compiled for one executor; immutable, may run many times."""
    checked: CheckedProgram
    split: SplitView
    ops: List[_Op]
    # Users of a stage's output and of its input gradients on this rank.
    output_users: Dict[Stage, int]
    gradient_users: Dict[Stage, int]
    # Stage pairs with a backward by chunk, ascending.
    accumulation: Dict[Tuple[int, int, int], List[int]]


class PipelineExecutor:
    """One rank's executor. To be made on all ranks of the pipeline at once: it has
    the transport connect them. Not thread-safe, but prepare() may run in another
    thread than run().

    Raises ValueError where the chunks are not the layout's, and where a module that
    the job has frozen has weights with requires_grad. A trained module may have
    weights without, a whole chunk of them, too; which ones is fixed from here on,
    and so are the Parameter objects.
    """

    def __init__(self, job: JobView, rank: int,
                 modules: Sequence[PipelineModule], transport: Transport, *,
                 device: Any = "cpu", dtype: torch.dtype = torch.float32,
                 options: Optional[ExecutorOptions] = None,
                 hooks: Optional[Hooks] = None):
        self.job = job
        self.rank = rank
        self.modules = list(modules)
        self.transport = transport
        self.device = torch.device(device)
        self.dtype = dtype
        self.options = options or ExecutorOptions()
        self.hooks = hooks
        if len(self.modules) != job.num_modules:
            raise ValueError(f"modules: {len(self.modules)}, the job has "
                             f"{job.num_modules}")
        pairs = job.exchanging_ranks()
        if pairs:
            transport.connect(pairs)
        stream = (torch.cuda.Stream(self.device)
                  if self.device.type == "cuda" else None)
        self._runners: Dict[Tuple[int, int, int], ChunkRunner] = {}
        for m, s, k in job.local_chunks(rank):
            layers = self.modules[m].chunks.get((s, k))
            count = (1 if self.modules[m].opaque else
                     job.chunks[m][s][k].num_layers)
            if layers is None or len(layers) != count:
                raise ValueError(
                    f"{self._name((m, s, k))}: the layout puts {count} layers "
                    "here, the trainer gave "
                    f"{'none' if layers is None else len(layers)}")
            runner = ChunkRunner(
                layers, self.device, stream,
                _Tracer(job, m, job.chunks[m][s][k].first_layer, hooks)
                if hooks is not None else None, self.options.extra_rng)
            self._runners[m, s, k] = runner
            if runner.parameters and not job.trainable[m]:
                raise ValueError(
                    f"{self._name((m, s, k), runner.parameters[0])}: "
                    "requires_grad: True, must be False in a module that the job "
                    "has frozen")
        # This rank's trained chunks in the order of grads_ready: as backwards
        # normally end, consumers before producers, a module's last segment
        # first. It follows from job and layout alone, so it is the same in every
        # step and on every replica.
        self.reduction_order: List[Tuple[int, int, int]] = sorted(
            (key for key, runner in self._runners.items() if runner.parameters),
            key=lambda key: (job.order.index(key[0]), *key[1:]), reverse=True)
        users: Dict[nn.Parameter, set] = {}
        for key, runner in self._runners.items():
            for p in runner.parameters:
                users.setdefault(p, set()).add(key)
        # Each chunk with those that share a weight with it.
        self._sharing = {key: {key}.union(*(users[p] for p in runner.parameters))
                         for key, runner in self._runners.items()}

    def parameters(self) -> List[nn.Parameter]:
        """The trained weights of this rank's chunks, each once."""
        return list(dict.fromkeys(p for r in self._runners.values()
                                  for p in r.parameters))

    def prepare(self, checked: CheckedProgram,
                batch: batch_pb2.BatchMetadata) -> PreparedStep:
        """Compiles a checked program. Raises BadProgram or ValueError where the
        program does not fit the batch or this rank's chunks."""
        split = SplitView.from_proto(BatchView(self.job, batch), checked.split)
        return _Compiler(self, checked, split).run()

    def _name(self, key: Tuple[int, int, int],
              weight: Optional[nn.Parameter] = None) -> str:
        """Of a chunk of this rank, or of a weight in it."""
        module, segment, chunk = key
        name = (f"module {self.job.module_name(module)!r}, segment {segment}, "
                f"chunk {chunk}")
        if weight is not None:
            name += f", {self._runners[key].name_of(weight)}"
        return name

    def _bounds(self, split: SplitView, stage: Stage) -> List[Boundary]:
        """What the stage passes on to the next one of its module."""
        sub = split.subs[stage[0]]
        module = self.modules[sub.module]
        chunk = self.job.chunks[sub.module][stage[1]][stage[2]]
        end = chunk.first_layer + chunk.num_layers
        if end == 0:  # no layer has run yet: the module's inputs as they are
            return [Boundary(
                tuple(self.modules[x.edge.producer].edge_shape(x)),
                self.job.backward(x.edge.producer))
                for x in split.inputs[sub.index]]
        if end == self.job.num_layers[sub.module]:
            return module.output_boundary(sub, split.outputs[sub.index])
        return module.boundary(sub, split.inputs[sub.index])

    def run(self, prepared: PreparedStep, data: DataFunction) -> StepResult:
        """Runs the step. Gradients are added to what the weights hold. Raises
        ValueError where a weight of a step with backwards was frozen, set free or
        replaced by another object since the executor was made, or has hooks that
        the torch at hand would not call."""
        if not prepared.split.batch.forward_only:
            for key, runner in self._runners.items():
                unfit = runner.unfit_weight()
                if unfit is not None:
                    raise ValueError(f"{self._name(key)}, {unfit}")
        return _Run(self, prepared, data).run()


class _Compiler:
    """Resolves where each action's tensors come from, once, ahead of time."""

    def __init__(self, executor: PipelineExecutor, checked: CheckedProgram,
                 split: SplitView):
        self.executor = executor
        self.job = executor.job
        self.checked = checked
        self.split = split
        a = checked.actions
        self.rows = list(zip(a.kind, a.sub_microbatch, a.segment, a.chunk,
                             a.choice, a.transfer, a.peer,
                             a.edge_sub_microbatch, a.gradient))
        self.backward: Dict[Stage, int] = {}
        for kind, sub, segment, chunk, *_ in self.rows:
            if kind in (actions.BACKWARD, actions.INPUT_GRAD):
                self.backward[sub, segment, chunk] = kind
        self.gradients_sent = {
            (row[1], row[2], row[3], row[7]) for row in self.rows
            if row[0] == actions.POST_SEND and row[8]}
        self.received: Dict[Tuple[Stage, bool, int], int] = {}
        self.arrived: set = set()
        self.output_users: Dict[Stage, int] = {}
        self.gradient_users: Dict[Stage, int] = {}
        self.produced: set = set()

    def run(self) -> PreparedStep:
        choices = {(c.module, c.segment, c.chunk): c.choices
                   for c in self.checked.program.choices}
        ops: List[_Op] = []
        accumulation: Dict[Tuple[int, int, int], List[int]] = {}
        messages: Dict[int, _Message] = {}
        for (sub, segment, chunk) in self.backward:
            key = (self.split.subs[sub].module, segment, chunk)
            accumulation.setdefault(key, []).append(sub)
        left = {key: len(subs) for key, subs in accumulation.items()}
        announced: set = set()
        for i, row in enumerate(self.rows):
            kind, sub, segment, chunk, choice = row[:5]
            stage = (sub, segment, chunk)
            payload: Any = None
            if kind in actions.COMPUTE or kind in actions.COPIES:
                module = self.split.subs[sub].module
                key = (module, segment, chunk)
                if key not in self.executor._runners:
                    raise BadProgram(
                        f"actions[{i}]: module {module}, segment {segment}, "
                        f"chunk {chunk} is not on rank {self.executor.rank}")
                if kind == actions.FORWARD:
                    payload = self._forward(i, stage, key, choice, choices)
                elif kind in (actions.BACKWARD, actions.INPUT_GRAD):
                    payload = self._backward(i, stage)
                if kind in (actions.BACKWARD, actions.WEIGHT_GRAD):
                    left[key] -= 1
            elif kind in actions.POSTS:
                message = self._message(i, row)
                messages[message.number] = message
                payload = [message]
                if (self.job.job.executor.batched_p2p and ops and
                        ops[-1].kind in actions.POSTS):
                    # One batch with the posts before: issued here, with the
                    # last of them.
                    payload = ops[-1].payload + payload
                    ops[-1] = _Op(0, i - 1, stage, None)
            elif kind in actions.WAITS:
                payload = messages[row[5]]
                if kind == actions.WAIT_RECV:
                    self.arrived.add(row[5])
            else:
                payload = self._ready_chunk(i, row, left, announced)
                announced.add(payload)
            ops.append(_Op(kind, i, stage, payload))
        for subs in accumulation.values():
            subs.sort()
        return PreparedStep(self.checked, self.split, ops, self.output_users,
                            self.gradient_users, accumulation)

    def _ready_chunk(self, i: int, row: Tuple, left: Dict, announced: set
                     ) -> Tuple[int, int, int]:
        _, sub, segment, chunk = row[:4]
        if sub >= len(self.split.subs):
            raise BadProgram(f"actions.sub_microbatch[{i}]: {sub}: must be one "
                             "of the chunk's sub-microbatches")
        key = (self.split.subs[sub].module, segment, chunk)
        if left.get(key, 1) or key in announced:
            raise BadProgram(
                f"actions[{i}]: module {key[0]}, segment {segment}, chunk "
                f"{chunk}: its gradients are not whole here, or announced "
                "before")
        return key

    def _last(self, sub: int) -> Stage:
        segments = self.job.chunks[self.split.subs[sub].module]
        return (sub, len(segments) - 1, len(segments[-1]) - 1)

    def _rank_of(self, stage: Stage) -> int:
        module = self.split.subs[stage[0]].module
        return self.job.chunks[module][stage[1]][stage[2]].rank

    def _source(self, i: int, stage: Stage, other: Stage, gradient: bool,
                edge_sub: int, index: int) -> _Source:
        """Where `stage` gets what `other` makes for it."""
        number = self.received.get((stage, gradient, edge_sub))
        if number is not None:
            if number not in self.arrived:
                raise BadProgram(f"actions[{i}]: needs transfer {number}, which "
                                 "is not waited for before it")
            return _Source(number, None, 0)
        if self._rank_of(other) != self.executor.rank:
            raise BadProgram(f"actions[{i}]: needs what rank "
                             f"{self._rank_of(other)} makes at {other}, which "
                             "is not received before it")
        if (other, gradient) not in self.produced:
            raise BadProgram(f"actions[{i}]: needs what {other} makes, which "
                             "has not run before it")
        users = self.gradient_users if gradient else self.output_users
        users[other] = users.get(other, 0) + 1
        return _Source(-1, other, index)

    def _forward(self, i: int, stage: Stage, key: Tuple[int, int, int],
                 choice: int, choices: Mapping) -> Any:
        previous = self.split.previous_stage(stage)
        crossings = self.split.inputs[stage[0]]
        sources, needs = [], []
        if previous is not None:
            sources.append(self._source(i, stage, previous, False, 0, 0))
            needs.append(previous in self.backward or
                         (*stage, 0) in self.gradients_sent)
        else:
            for x in crossings:
                producer = self._last(x.producer)
                sources.append(self._source(i, stage, producer, False,
                                            x.producer + 1, 0))
                needs.append(producer in self.backward or
                             (*stage, x.producer + 1) in self.gradients_sent)
        if key not in choices or choice >= len(choices[key]):
            raise BadProgram(f"actions.choice[{i}]: {choice}: the chunk has "
                             f"{len(choices.get(key, ()))} choices")
        modes = layer_modes(choices[key][choice])
        if self.executor.modules[key[0]].opaque:
            modes = [leanest(modes)]
        if len(modes) != len(self.executor._runners[key].layers):
            raise BadProgram(f"actions.choice[{i}]: names {len(modes)} layers, "
                             "the chunk has "
                             f"{len(self.executor._runners[key].layers)}")
        self.produced.add((stage, False))
        return (key, sources, needs, modes, self.backward.get(stage))

    def _backward(self, i: int, stage: Stage) -> Any:
        following = self.split.next_stage(stage)
        sources = []
        if following is not None:
            sources.append((None, self._source(i, stage, following, True, 0,
                                               -1)))
        else:
            for x in self.split.outputs[stage[0]]:
                if not self.job.backward(x.edge.consumer):
                    continue
                index = self.split.inputs[x.consumer].index(x)
                sources.append((x, self._source(i, stage, (x.consumer, 0, 0),
                                                True, x.consumer + 1, index)))
        self.produced.add((stage, True))
        return sources

    def _message(self, i: int, row: Tuple) -> _Message:
        kind, sub, segment, chunk, _, number, peer, edge_sub, gradient = row
        stage = (sub, segment, chunk)
        send = kind == actions.POST_SEND
        # An activation leaves by the stage's output and arrives at its input; a
        # gradient the other way round.
        at_output = send != gradient
        edge = -1
        if edge_sub:
            crossings = (self.split.outputs if at_output else
                         self.split.inputs)[sub]
            for j, x in enumerate(crossings):
                if (x.consumer if at_output else x.producer) == edge_sub - 1:
                    edge = j
            if edge < 0:
                raise BadProgram(
                    f"actions.edge_sub_microbatch[{i}]: {edge_sub}: nothing "
                    f"crosses between sub-microbatches {sub} and "
                    f"{edge_sub - 1}")
            crossing = crossings[edge]
            producer = self.executor.modules[crossing.edge.producer]
            shapes = (tuple(producer.edge_shape(crossing)),)
            other = ((crossing.consumer, 0, 0) if at_output else
                     self._last(crossing.producer))
            mine = self._last(sub) if at_output else (sub, 0, 0)
        else:
            found = (self.split.next_stage(stage) if at_output else
                     self.split.previous_stage(stage))
            if found is None:
                raise BadProgram(f"actions[{i}]: {stage} has no neighbour to "
                                 "exchange with")
            bounds = self.executor._bounds(self.split,
                                           stage if at_output else found)
            shapes = tuple(tuple(b.shape) for b in bounds
                           if b.gradient or not gradient)
            other, mine = found, stage
        if mine != stage or self._rank_of(other) != peer:
            raise BadProgram(f"actions.peer[{i}]: {peer}: {other} is on rank "
                             f"{self._rank_of(other)}")
        if send:
            if (stage, gradient) not in self.produced:
                raise BadProgram(f"actions[{i}]: sends what {stage} has not "
                                 "made yet")
            users = self.gradient_users if gradient else self.output_users
            users[stage] = users.get(stage, 0) + 1
        else:
            self.received[stage, gradient, edge_sub] = number
        return _Message(send, number, peer, stage, gradient, edge, shapes)


class _HostClock:
    """Times between actions."""

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._marks: List[Any] = []

    def mark(self) -> None:
        if self._enabled:
            self._marks.append(self._now())

    def _now(self) -> Any:
        return time.perf_counter_ns()

    def marks_ns(self) -> List[int]:
        """Since the first mark."""
        return [self._since_first(mark) for mark in self._marks]

    def _since_first(self, mark: Any) -> int:
        return mark - self._marks[0]


class _DeviceClock(_HostClock):
    """Marks stand in the current stream; to be read once the device is done."""

    def _now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since_first(self, mark: Any) -> int:
        return int(self._marks[0].elapsed_time(mark) * 1e6)


class _Run:
    """One step in progress."""

    def __init__(self, executor: PipelineExecutor, prepared: PreparedStep,
                 data: DataFunction):
        self.executor = executor
        self.options = executor.options
        self.prepared = prepared
        self.split = prepared.split
        self.data = data
        self.tapes: Dict[Stage, StageTape] = {}
        # Of stages that end a module, before the padding went.
        self.output_shapes: Dict[Stage, Optional[torch.Size]] = {}
        self.outputs: Dict[Stage, State] = {}
        self.input_gradients: Dict[Stage, List[Optional[Tensor]]] = {}
        self.output_users = dict(prepared.output_users)
        self.gradient_users = dict(prepared.gradient_users)
        self.handles: Dict[int, Any] = {}
        self.buffers: Dict[int, Tuple[Tensor, Tuple]] = {}
        self.losses: Dict[Stage, List[Tensor]] = {}
        self.accumulation = {key: list(subs) for key, subs in
                             prepared.accumulation.items()}
        self.early: Dict[Tuple[int, int, int], Dict[int, List]] = {}
        # Chunks whose gradients are not whole yet; those still to be announced.
        self.unfinished = set(prepared.accumulation)
        self.unannounced = ([] if self.split.batch.forward_only else
                            list(executor.reduction_order))

    def run(self) -> StepResult:
        executor = self.executor
        on_device = executor.device.type == "cuda"
        if on_device:
            torch.cuda.reset_peak_memory_stats(executor.device)
        hooks = executor.hooks
        step = self.prepared.checked.program.identity.key.step
        base = step << 32
        if hooks is not None:
            hooks.step(step)
        clock = (_DeviceClock if on_device else _HostClock)(
            self.options.record_times)
        begin = time.perf_counter_ns()
        run = {
            actions.FORWARD: self._forward,
            actions.BACKWARD: self._backward,
            actions.INPUT_GRAD: self._backward,
            actions.WEIGHT_GRAD: self._weight_grad,
            actions.POST_SEND: self._post,
            actions.POST_RECV: self._post,
            actions.WAIT_SEND: self._wait,
            actions.WAIT_RECV: self._wait,
            actions.OFFLOAD: self._copy,
            actions.RELOAD: self._copy,
            actions.WAIT_COPY: self._copy,
            actions.GRADS_READY: self._grads_ready,
        }
        clock.mark()
        for op in self.prepared.ops:
            if op.kind:
                if hooks is not None:
                    hooks.push(base + op.index)
                    hooks.before(op.kind, op.stage)
                run[op.kind](op)
                if hooks is not None:
                    hooks.pop()
            clock.mark()
        self.unfinished.clear()
        self._announce()
        peak = 0
        if on_device:
            torch.cuda.synchronize(executor.device)
            peak = torch.cuda.max_memory_allocated(executor.device)
        loss = None
        for stage in sorted(self.losses):
            for x in self.losses[stage]:
                loss = x.clone() if loss is None else loss + x
        step_ns = max(1, time.perf_counter_ns() - begin)
        marks = clock.marks_ns()
        return StepResult(loss, marks[:-1],
                          [b - a for a, b in zip(marks, marks[1:])], step_ns,
                          peak)

    # ---- compute ---------------------------------------------------------

    def _forward(self, op: _Op) -> None:
        key, sources, needs, modes, backward = op.payload
        sub = self.split.subs[op.stage[0]]
        crossings = self.split.inputs[sub.index]
        state: List[Tensor] = []
        needs_grad: List[bool] = []
        if op.stage[1:] == (0, 0):
            for source, x, need in zip(sources, crossings, needs):
                if source.transfer >= 0:
                    state += self._received(source.transfer)
                else:
                    producer = self.executor.modules[x.edge.producer]
                    state.append(producer.take(
                        x, self.split.subs[x.producer],
                        self._use_output(source.stage)))
                needs_grad.append(need)
        else:
            bounds = self.executor._bounds(
                self.split, self.split.previous_stage(op.stage))
            state += (self._received(sources[0].transfer)
                      if sources[0].transfer >= 0 else
                      self._use_output(sources[0].stage))
            needs_grad = [needs[0] and b.gradient for b in bounds]
        context = StageContext(
            sub, op.stage[1], op.stage[2], crossings,
            lambda: self.data(sub.module, sub.microbatch, sub.items),
            self.split.batch.forward_only)
        output, tape, losses = self.executor._runners[key].forward(
            tuple(state), needs_grad, context, modes, backward is not None,
            backward == actions.INPUT_GRAD)
        if tape is not None:
            self.tapes[op.stage] = tape
        if self._ends_module(op.stage):
            self.output_shapes[op.stage] = output[0].shape if output else None
            output = self._module_output(sub, output)
        if losses:
            self.losses[op.stage] = [x.detach() for x in losses]
        if self.output_users.get(op.stage):
            self.outputs[op.stage] = output

    def _module_output(self, sub: SubMicrobatch, output: State) -> State:
        """What the module hands on: no conditions, no rows of padding."""
        crossings = self.split.outputs[sub.index]
        if not crossings:
            return ()
        return (output[0][:self._output_rows(sub)],)

    def _output_rows(self, sub: SubMicrobatch) -> int:
        edge = self.split.outputs[sub.index][0].edge
        return sum(edge.rows(n) for n in sub.item_tokens)

    def _ends_module(self, stage: Stage) -> bool:
        """No layers of the module come behind the stage."""
        module = self.split.subs[stage[0]].module
        chunk = self.executor.job.chunks[module][stage[1]][stage[2]]
        return (chunk.first_layer + chunk.num_layers ==
                self.executor.job.num_layers[module])

    def _backward(self, op: _Op) -> None:
        stage = op.stage
        sub = self.split.subs[stage[0]]
        module = self.executor.modules[sub.module]
        gradients: List[Optional[Tensor]] = []
        for crossing, source in op.payload:
            if crossing is None:
                gradients = self._stage_gradient(stage, source)
                continue
            gradient = (self._received(source.transfer)[0]
                        if source.transfer >= 0 else
                        self._use_gradients(source.stage)[source.index])
            if gradient is None:
                continue
            if not gradients:
                gradients = [gradient.new_zeros(
                    (self._output_rows(sub), *gradient.shape[1:]))]
            module.add_gradient(crossing, sub, gradient, gradients[0])
        shape = self.output_shapes.pop(stage, None)
        if shape is not None and gradients and gradients[0] is not None and (
                gradients[0].shape != shape):
            padded = gradients[0].new_zeros(shape)
            padded[:len(gradients[0])] = gradients[0]
            gradients = [padded]
        key = (sub.module, stage[1], stage[2])
        runner = self.executor._runners[key]
        whole = op.kind == actions.BACKWARD
        tape = self.tapes.pop(stage) if whole else self.tapes[stage]
        found = runner.backward(
            tape, gradients, self.options.loss_scale,
            self._taker(key, sub.index) if whole else None)
        if self.gradient_users.get(stage):
            self.input_gradients[stage] = found
        if whole:
            self._add_waiting(key)

    def _weight_grad(self, op: _Op) -> None:
        sub = self.split.subs[op.stage[0]]
        key = (sub.module, op.stage[1], op.stage[2])
        self.executor._runners[key].weight_gradients(
            self.tapes.pop(op.stage), self._taker(key, sub.index))
        self._add_waiting(key)

    def _taker(self, key: Tuple[int, int, int], sub: int) -> TakeGradient:
        """Where gradients of a stage's weights go: into the sums, or aside until
        it is the sub-microbatch's turn."""
        if not self.options.deterministic:
            return self._accumulate
        order = self.accumulation[key]
        if order[0] == sub:
            order.pop(0)
            return self._accumulate
        aside = self.early.setdefault(key, {}).setdefault(sub, [])
        return lambda p, g: aside.append((p, g))

    def _add_waiting(self, key: Tuple[int, int, int]) -> None:
        """A stage's gradients were taken: adds those whose turn it is now."""
        order = self.accumulation[key]
        early = self.early.get(key, {})
        while order and order[0] in early:
            for p, g in early.pop(order.pop(0)):
                self._accumulate(p, g)

    def _accumulate(self, p: nn.Parameter, g: Tensor) -> None:
        if self.options.accumulate is not None:
            self.options.accumulate(p, g)
        elif p.grad is None:
            p.grad = g.detach().clone().to(p.dtype)
        else:
            p.grad += g

    def _copy(self, op: _Op) -> None:
        sub = self.split.subs[op.stage[0]]
        runner = self.executor._runners[sub.module, op.stage[1], op.stage[2]]
        tape = self.tapes[op.stage]
        if op.kind == actions.OFFLOAD:
            runner.offload(tape)
        elif op.kind == actions.RELOAD:
            runner.reload(tape)
        else:
            runner.wait_copies(tape)

    def _grads_ready(self, op: _Op) -> None:
        self.unfinished.discard(op.payload)
        self._announce()

    def _announce(self) -> None:
        """Calls grads_ready for the chunks whose turn it is."""
        if self.options.grads_ready is None:
            return
        sharing = self.executor._sharing
        while self.unannounced and not (
                sharing[self.unannounced[0]] & self.unfinished):
            self.options.grads_ready(*self.unannounced.pop(0))

    # ---- what passes between stages --------------------------------------

    def _use_output(self, stage: Stage) -> State:
        output = self.outputs[stage]
        self.output_users[stage] -= 1
        if not self.output_users[stage]:
            del self.outputs[stage]
        return output

    def _use_gradients(self, stage: Stage) -> List[Optional[Tensor]]:
        gradients = self.input_gradients[stage]
        self.gradient_users[stage] -= 1
        if not self.gradient_users[stage]:
            del self.input_gradients[stage]
        return gradients

    def _received(self, transfer: int) -> List[Tensor]:
        buffer, shapes = self.buffers.pop(transfer)
        return unflatten(buffer, shapes)

    def _stage_gradient(self, stage: Stage, source: _Source
                        ) -> List[Optional[Tensor]]:
        """Gradient of what passed to the next stage of the module."""
        if source.transfer < 0:
            return self._use_gradients(source.stage)
        received = iter(self._received(source.transfer))
        bounds = self.executor._bounds(self.split, stage)
        return [next(received) if b.gradient else None for b in bounds]

    def _post(self, op: _Op) -> None:
        posts = []
        for m in op.payload:
            if m.send:
                tensor = self._outgoing(m)
            else:
                size = 0
                for shape in m.shapes:
                    n = 1
                    for d in shape:
                        n *= d
                    size += n
                tensor = torch.empty(max(1, size), dtype=self.executor.dtype,
                                     device=self.executor.device)
            self.buffers[m.number] = (tensor, m.shapes)
            posts.append(Post(m.send, m.peer, m.number, tensor))
        handles = self.executor.transport.post(posts, len(posts) > 1)
        for m, handle in zip(op.payload, handles):
            self.handles[m.number] = handle

    def _outgoing(self, m: _Message) -> Tensor:
        sub = self.split.subs[m.stage[0]]
        if not m.gradient:
            state = self._use_output(m.stage)
            if m.edge >= 0:
                x = self.split.outputs[sub.index][m.edge]
                state = (self.executor.modules[sub.module].take(x, sub, state),)
            tensors = list(state)
        else:
            found = self._use_gradients(m.stage)
            if m.edge >= 0:
                found = [found[m.edge]]
            else:
                bounds = self.executor._bounds(
                    self.split, self.split.previous_stage(m.stage))
                found = [g for g, b in zip(found, bounds) if b.gradient]
            tensors = [torch.zeros(shape, dtype=self.executor.dtype,
                                   device=self.executor.device)
                       if g is None else g
                       for g, shape in zip(found, m.shapes)]
        for t, shape in zip(tensors, m.shapes):
            if tuple(t.shape) != shape:
                raise RuntimeError(
                    f"{'gradient' if m.gradient else 'output'} of module "
                    f"{self.executor.job.module_name(sub.module)!r}, segment "
                    f"{m.stage[1]}, chunk {m.stage[2]} has shape "
                    f"{tuple(t.shape)}, the plan says {shape}")
        if len(tensors) != len(m.shapes):
            raise RuntimeError(
                f"module {self.executor.job.module_name(sub.module)!r} passes "
                f"on {len(tensors)} tensors, its boundary has "
                f"{len(m.shapes)}")
        return flatten([t.detach() for t in tensors], self.executor.dtype,
                       self.executor.device)

    def _wait(self, op: _Op) -> None:
        m = op.payload
        self.executor.transport.wait(self.handles.pop(m.number))
        if m.send:
            del self.buffers[m.number]
