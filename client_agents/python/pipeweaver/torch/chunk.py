"""Runs a model chunk's layers: one stage pair at a time, with its memory choice.

Every layer is an autograd graph of its own, cut at its inputs. That makes
recompute, offload and the split of the backward local to a layer.

A layer is any nn.Module called as `layer(state, context) -> state`, where state
is a tuple of floating-point tensors. It may not change them in place, which raises
RuntimeError, nor context.data. Weights that it reads are parameters of its own. It
reports losses by context.add_loss and wraps what selective recompute should not keep
in context.selective(fn, *args).
"""

import contextlib
import functools
import operator
from typing import (
    Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence,
    Set, Tuple)

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from pipeweaver.job import EdgeCrossing, SubMicrobatch

State = Tuple[Tensor, ...]

# Takes a weight's gradient in the middle of a backward. May not change it: it may
# be another tensor's gradient, too.
TakeGradient = Callable[[nn.Parameter, Tensor], None]

KEEP, SELECTIVE, FULL, OFFLOAD = "keep", "selective", "full", "offload"


def layer_modes(choice) -> List[str]:
    """What becomes of each layer's activations, first layer first."""
    return ([OFFLOAD] * choice.offload_layers +
            [FULL] * choice.full_recompute_layers +
            [SELECTIVE] * choice.selective_recompute_layers +
            [KEEP] * choice.keep_layers)


def leanest(modes: Sequence[str]) -> str:
    """The mode of a chunk that runs as one piece: what the most demanding of its
    layers asks."""
    for mode in (FULL, OFFLOAD, SELECTIVE):
        if mode in modes:
            return mode
    return KEEP


class ExtraRng(NamedTuple):
    """Random states that layers draw from besides torch's default generators;
    recompute draws again from what they were in the forward."""
    # Answers a copy of the states, which later draws do not change.
    get: Callable[[], Any]
    # Brings back what `get` answered, and leaves that as it is: it may be brought
    # back several times.
    set: Callable[[Any], None]


class StageContext:
    """What a layer may know of the stage it runs in."""

    def __init__(self, sub: SubMicrobatch, segment: int, chunk: int,
                 crossings: Sequence[EdgeCrossing],
                 data: Callable[[], Any], forward_only: bool):
        self.sub = sub
        self.segment = segment
        self.chunk = chunk
        # What crosses into the sub-microbatch. At the module's very first
        # layer `state` holds one tensor for each, in this order.
        self.crossings = crossings
        self.forward_only = forward_only
        self._ask: Optional[Callable[[], Any]] = data
        self._data: Any = None
        self._losses: List[Tensor] = []
        self._selective = False
        # All random states that layers draw from; None outside a ChunkRunner.
        self._rng: Optional[ExtraRng] = None
        # Those right behind the loader's data; and while a piece runs again that
        # has asked for it, what they are to become where it reads it.
        self._behind_data: Any = None
        self._at_data: Any = None
        self._cuts: Optional[_Cuts] = None
        # Of the layer that runs under selective recompute.
        self._buffers: Optional[_Buffers] = None

    @property
    def data(self) -> Any:
        """The loader's data of the items, as the trainer's function gives it.

        Asked for once a stage, when a layer first looks at it, and kept until
        the stage's backward is over: full and selective recompute read it again,
        and what it drew of random numbers is not drawn again.
        """
        if self._ask is not None:
            self._data, self._ask = self._ask(), None
            if self._rng is not None:
                self._behind_data = self._rng.get()
        elif self._at_data is not None:
            self._rng.set(self._at_data)
            self._at_data = None
        return self._data

    def _free_data(self) -> None:
        """The backward is over, its weight gradients excepted."""
        self._data = self._ask = self._behind_data = None

    def add_loss(self, loss: Tensor) -> None:
        """Adds a scalar to the step's loss, which is a sum."""
        self._losses.append(loss)

    def selective(self, fn: Callable[..., Any], *args: Any) -> Any:
        """fn(*args), recomputed in the backward under selective recompute."""
        if not (self._selective and torch.is_grad_enabled()):
            return fn(*args)
        # What is run again must be as it was: nothing in it is cut out.
        cuts, self._cuts = self._cuts, None
        try:
            return checkpoint(self._repeatable(fn), *args, use_reentrant=False,
                              preserve_rng_state=False)
        finally:
            self._cuts = cuts

    def _repeatable(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """fn that finds the same random numbers and buffers in every call."""
        draws: Optional[_Draws] = None
        buffers = self._buffers

        def run(*args: Any) -> Any:
            nonlocal draws
            if draws is None:
                draws = _Draws(self, buffers)
                with draws.first():
                    return fn(*args)
            with draws.again():
                return fn(*args)

        return run


# A buffer: the module that has it, and its name there.
_Place = Tuple[nn.Module, str]


def _exchange(buffers: Dict[_Place, Tensor]) -> Dict[_Place, Tensor]:
    """Puts them in their places; answers those that were there."""
    before = {(module, name): module._buffers[name] for module, name in buffers
              if module._buffers.get(name) is not None}
    for module, name in before:
        module._buffers[name] = buffers[module, name]
    return before


class _Buffers:
    """The buffers of a layer that its forward changes in place, running statistics
    say. Those that it replaces by other tensors, tables that grow say, are left to
    it.

    Which they are is found out in the layer's first forward by comparing values,
    as some operations change them without counting it; and anew where train() or
    eval() has been called, and with gradients and without. A buffer that only later
    forwards change is not seen.
    """

    def __init__(self, layer: nn.Module):
        self._modules = [m for m in layer.modules() if m._buffers]
        # By grad mode and training flags.
        self._changed: Dict[Tuple[bool, ...], List[_Place]] = {}
        self._places: List[_Place] = []  # that copies() are made of
        # In a forward that finds out: what it found, and the copies made since.
        self._first: Optional[Dict[_Place, Tensor]] = None
        self._copies: List[Dict[_Place, Tensor]] = []

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the layer's forward."""
        flags = (torch.is_grad_enabled(), *(m.training for m in self._modules))
        if flags in self._changed:
            self._places, self._first = self._changed[flags], None
            yield
            return
        buffers = {(m, name): t for m in self._modules
                   for name, t in m._buffers.items() if _comparable(t)}
        self._places = list(buffers)
        self._first = {place: t.detach().clone() for place, t in buffers.items()}
        self._copies = []
        yield
        changed = {place for place, t in buffers.items()
                   if place[0]._buffers.get(place[1]) is t and
                   not _equal(self._first[place], t)}
        for copies in self._copies:
            for place in copies.keys() - changed:
                del copies[place]
        self._changed[flags] = [place for place in buffers if place in changed]
        self._first, self._copies = None, []

    def copies(self) -> Dict[_Place, Tensor]:
        """What the forward finds at this point, not to be changed. At the forward's
        end it has none of buffers that the forward does not change in place."""
        copies = {}
        for module, name in self._places:
            t = module._buffers.get(name)
            if not _comparable(t):
                continue
            first = (self._first or {}).get((module, name))
            copies[module, name] = (
                first if first is not None and _equal(first, t)
                else t.detach().clone())
        if self._first is not None:
            self._copies.append(copies)
        return copies


def _comparable(t: Optional[Tensor]) -> bool:
    return (t is not None and not nn.parameter.is_lazy(t) and not t.is_meta and
            t.layout == torch.strided)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class _Draws:
    """The random numbers that a piece of a stage draws when it first runs, to be
    drawn again when it is recomputed; and the buffers that it found."""
    __slots__ = ("_context", "_buffers", "_found", "_before", "_behind_data")

    def __init__(self, context: StageContext, buffers: _Buffers):
        self._context = context
        self._buffers = buffers
        self._found: Dict[_Place, Tensor] = {}
        self._before: Any = None
        self._behind_data: Any = None  # None: the piece did not ask for the data

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Around the piece's first run, within its layer's buffers.forward()."""
        context = self._context
        self._found = self._buffers.copies()
        asked = context._ask is None
        self._before = context._rng.get()
        yield
        if not asked:
            self._behind_data = context._behind_data

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Around each further run; leaves random states and buffers as they are."""
        context = self._context
        present = context._rng.get()
        context._rng.set(self._before)
        context._at_data = self._behind_data
        buffers = _exchange({place: t.clone() for place, t in self._found.items()})
        try:
            yield
        finally:
            _exchange(buffers)
            context._at_data = None
            context._rng.set(present)


class _Slot:
    """A tensor that a layer saved for its backward."""
    __slots__ = ("tensor", "host", "event")

    def __init__(self, tensor: Tensor):
        self.tensor: Optional[Tensor] = tensor
        self.host: Optional[Tensor] = None
        self.event: Any = None


class _Call:
    """A module's call under a split backward: a graph of its own, cut out of the
    layer's at the module's inputs.

    The layer's backward, which runs through _Splice, takes the input gradients
    out of it and leaves the seeds of the weights' gradients. So of all that the
    layer saved, only what its modules' weight gradients read is held until then.
    """
    __slots__ = ("module", "inputs", "outputs", "results", "seeds")

    def __init__(self, module: nn.Module, inputs: List[Tensor],
                 outputs: List[Tensor]):
        self.module = module
        self.inputs = inputs  # leaves of the graph
        self.outputs = outputs  # its roots; their memory is given back
        # The outputs, to the layer; none once its forward is over.
        self.results: Tuple[Tensor, ...] = ()
        self.seeds: List[Tuple[Tensor, Tensor]] = []  # root, gradient


class _Splice(torch.autograd.Function):
    """Stands for a call in the layer's graph."""

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *inputs: Tensor
                ) -> Tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(t.data for t in call.outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Optional[Tensor]
                 ) -> Tuple[Optional[Tensor], ...]:
        call = ctx.call
        if call.results:
            raise _not_followed(call.module, "its layer differentiates it in its own "
                                "forward")
        call.seeds = [(t, g) for t, g in zip(call.outputs, gradients)
                      if g is not None]
        found: Sequence[Optional[Tensor]] = [None] * len(call.inputs)
        if call.inputs and call.seeds:
            found = torch.autograd.grad(
                [t for t, _ in call.seeds], call.inputs,
                [g for _, g in call.seeds], retain_graph=True,
                allow_unused=True)
        return (None, None, *found)


class _Root(torch.autograd.Function):
    """A root of a call's graph: shows the module's output, and is no tensor that
    the graph has saved."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


# Their backward does not read their output: it may be changed in place.
_OUTPUT_UNREAD = (
    nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.LayerNorm,
    nn.GroupNorm)


class _Cuts:
    """Cuts out the calls of a layer's modules that hold weights while it runs.

    Those are the modules without modules with weights below them. A call that
    cannot be followed raises RuntimeError: gradients are right or not there.
    """

    def __init__(self, context: StageContext, modules: Sequence[nn.Module],
                 weights: Sequence[nn.Parameter], device: torch.device):
        self.calls: List[_Call] = []
        # Leads the layer's backward through every call, even one whose inputs
        # want no gradient.
        self.anchor = torch.empty(0, device=device, requires_grad=True)
        self._context = context
        self._modules = modules
        self._weights = {id(p) for p in weights}

    def __enter__(self) -> "_Cuts":
        self._context._cuts = self
        self._before = [m.__dict__.get("forward") for m in self._modules]
        for module in self._modules:
            module.__dict__["forward"] = functools.partial(
                self._run, module, module.forward)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._context._cuts = None
        for module, before in zip(self._modules, self._before):
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
        if kind is None:
            for call in self.calls:
                if not isinstance(call.module, _OUTPUT_UNREAD) and any(
                        t._version for t in call.results):
                    raise _not_followed(call.module,
                                        "its output is changed in place")
                call.results = ()

    def _run(self, module: nn.Module, forward: Callable[..., Any], *args: Any,
             **kwargs: Any) -> Any:
        values, form = tree_flatten((args, kwargs))
        if (self._context._cuts is not self or not torch.is_grad_enabled() or
                any(isinstance(x, StageContext) for x in values)):
            return forward(*args, **kwargs)
        inside = list(values)
        wanted = [i for i, x in enumerate(values)
                  if isinstance(x, Tensor) and x.requires_grad]
        for i in wanted:
            inside[i] = values[i].detach().requires_grad_()
        args, kwargs = tree_unflatten(inside, form)
        results, form = tree_flatten(forward(*args, **kwargs))
        made = [i for i, x in enumerate(results)
                if isinstance(x, Tensor) and x.grad_fn is not None]
        for i, x in enumerate(results):
            for j in wanted:  # handed through
                if x is inside[j]:
                    results[i] = values[j]
        call = _Call(module, [inside[i] for i in wanted],
                     [_Root.apply(results[i]) for i in made])
        self.calls.append(call)
        if made:
            self._check(call)
            call.results = _Splice.apply(call, self.anchor,
                                         *(values[i] for i in wanted))
            for i, root, t in zip(made, call.outputs, call.results):
                results[i] = t
                # A root has no memory of its own: one value stands for all.
                root.data = root.new_empty(()).expand(root.shape)
        return tree_unflatten(results, form)

    def _check(self, call: _Call) -> None:
        """The call's graph ends at its inputs and at the layer's weights."""
        inputs = {id(t) for t in call.inputs}
        for node in _graph(call.outputs):
            leaf = getattr(node, "variable", None)
            if hasattr(node, "call") or (
                    leaf is not None and id(leaf) not in inputs and
                    id(leaf) not in self._weights):
                raise _not_followed(call.module,
                                    "it reads tensors besides its arguments")


def _graph(roots: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes behind them, each once."""
    todo = [t.grad_fn for t in roots if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def _not_followed(module: nn.Module, why: str) -> RuntimeError:
    return RuntimeError(f"{module}: {why}, which a split backward cannot follow; "
                        "leave executor.split_backward out of the job")


def _modules_with_weights(layer: nn.Module) -> List[nn.Module]:
    """Those below the layer that have weights, and no such modules below."""
    def trained(module: nn.Module) -> bool:
        return any(p.requires_grad for p in module.parameters())

    return [m for m in layer.modules() if m is not layer and trained(m) and
            not any(trained(child) for child in m.children())]


class _LayerRecord:
    __slots__ = ("index", "layer", "mode", "inputs", "outputs", "losses", "cuts",
                 "slots", "draws", "needs_grad")

    def __init__(self, index: int, layer: nn.Module, mode: str, inputs: State):
        self.index = index  # in the chunk
        self.layer = layer
        self.mode = mode
        self.inputs = inputs
        self.outputs: State = ()
        self.losses: List[Tensor] = []
        self.cuts: Optional[_Cuts] = None
        self.slots: List[_Slot] = []
        self.draws: Optional[_Draws] = None  # where the layer is recomputed
        self.needs_grad = True


class StageTape:
    """What a stage pair holds between its forward and its backward."""

    def __init__(self, records: List[_LayerRecord], context: StageContext,
                 num_inputs: int):
        self.records = records
        self.context = context
        self.num_inputs = num_inputs
        # Set by the backward of a split pair, used by its weight gradient:
        # layer, calls; and weights' gradients that are there already.
        self.calls: List[Tuple[int, List[_Call]]] = []
        self.gradients: List[Tuple[nn.Parameter, Tensor]] = []


def _version(tensor: Tensor) -> int:
    """Counts changes in place, except in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _pinned_like(tensor: Tensor) -> Tensor:
    """Memory of the host that a device copies from and to by itself."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


def _storage(tensor: Tensor) -> int:
    if hasattr(tensor, "untyped_storage"):
        return tensor.untyped_storage().data_ptr()
    return tensor.storage().data_ptr()


@contextlib.contextmanager
def _no_history() -> Iterator[None]:
    """torch.no_grad() within which autocast caches no cast of a weight.

    Such a cast has no history: a later pass under the same autocast would find it
    and give the weight no gradient. Casts that are cached stay so.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


# Since torch 2.0: whether autograd has a thread for each device. It runs what is on
# the CPU in the calling thread in any case.
_set_device_threads = getattr(torch.autograd, "set_multithreading_enabled", None)


# Since torch 2.0: whether torch.autograd.grad() calls the hooks of its inputs.
_CALLS_HOOKS = int(torch.__version__.split(".")[0]) >= 2


class LayerTracer:
    """Told which layer's pass runs; see Hooks in executor.py."""

    def begin(self, layer: int, what: str, context: StageContext) -> None:
        """what: forward, backward, input_grad or weight_grad. The calling thread
        launches all of it.

        Not told: a backward or input_grad that recomputes activations; on devices
        before torch 2.0, whose autograd launches from threads of its own, all but
        forwards.
        """

    def end(self) -> None:
        """The pass is over."""


class ChunkRunner:
    """The layers of one chunk. Not thread-safe, like autograd's users."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device,
                 copy_stream: Any = None,
                 tracer: Optional["LayerTracer"] = None,
                 extra_rng: Optional[ExtraRng] = None):
        self.layers = list(layers)
        self.tracer = tracer
        self.device = device
        self.copy_stream = copy_stream
        self._extra_rng = extra_rng
        self._rng = ExtraRng(self._rng_state, self._set_rng_state)
        weights = dict.fromkeys(p for layer in self.layers
                                for p in layer.parameters())
        self.parameters = [p for p in weights if p.requires_grad]
        self._requires_grad = [
            {p: p.requires_grad for p in layer.parameters()}
            for layer in self.layers]
        # Of every module of the layers.
        self._found = [(m, list(m._parameters.values()), list(m._modules.values()))
                       for layer in self.layers for m in layer.modules()]
        self._layer_parameters = [
            [p for p in layer.parameters() if p.requires_grad]
            for layer in self.layers]
        self._buffers = [_Buffers(layer) for layer in self.layers]
        self._checked: Set[int] = set()  # layers whose graph has been looked at
        self._weight_storages = {_storage(p) for p in weights}
        self._cut_modules = [_modules_with_weights(layer)
                             for layer in self.layers]

    def name_of(self, weight: nn.Parameter) -> str:
        """Its layer in the chunk, and its name there."""
        return next(f"layer {i}, weight {name!r}"
                    for i, layer in enumerate(self.layers)
                    for name, p in layer.named_parameters() if p is weight)

    def _as_found(self) -> bool:
        """Whether unfit_weight() has nothing to look for, in less time."""
        for module, weights, children in self._found:
            if (len(module._parameters) != len(weights) or
                    len(module._modules) != len(children) or
                    not all(map(operator.is_, module._parameters.values(), weights))
                    or not all(map(operator.is_, module._modules.values(),
                                   children))):
                return False
        return all(p.requires_grad == before and
                   (_CALLS_HOOKS or not p._backward_hooks)
                   for weights in self._requires_grad
                   for p, before in weights.items())

    def unfit_weight(self) -> Optional[str]:
        """Names one whose gradient would be missing, or wrong, and says why."""
        if self._as_found():
            return None
        for i, (layer, before) in enumerate(zip(self.layers, self._requires_grad)):
            for name, p in layer.named_parameters():
                if p not in before:
                    why = ("another object than when the executor was made; make "
                           "another")
                elif p.requires_grad != before[p]:
                    why = (f"requires_grad: {p.requires_grad}, must be as when the "
                           "executor was made; make another")
                elif p._backward_hooks and not _CALLS_HOOKS:
                    why = ("has hooks, which this torch calls in no backward of the "
                           "executor; must have none")
                else:
                    continue
                return f"layer {i}, weight {name!r}: {why}"
        return None

    # ---- forward ---------------------------------------------------------

    def forward(self, state: State, needs_grad: Sequence[bool],
                context: StageContext, modes: Sequence[str], backward: bool,
                split: bool) -> Tuple[State, Optional[StageTape], List[Tensor]]:
        """The chunk's output, what its backward needs, and its losses.

        needs_grad: which inputs somebody wants a gradient of. split: the
        backward will come in two parts.
        """
        context._rng = self._rng
        losses: List[Tensor] = []
        if not backward:
            with _no_history():
                for i, layer in enumerate(self.layers):
                    self._begin(i, "forward", context)
                    state, found = self._call(layer, state, context, KEEP)
                    self._end()
                    losses += found
            return state, None, losses
        records: List[_LayerRecord] = []
        needs = list(needs_grad)
        num_inputs = len(state)
        for i, (layer, mode) in enumerate(zip(self.layers, modes)):
            inputs = tuple(t.detach().requires_grad_(n)
                           for t, n in zip(state, needs))
            record = _LayerRecord(i, layer, mode, inputs)
            self._begin(i, "forward", context)
            record.needs_grad = any(needs) or bool(self._layer_parameters[i])
            if not record.needs_grad or mode == FULL:
                record.mode = mode if record.needs_grad else KEEP
                record.draws = _Draws(context, self._buffers[i])
                with _no_history(), self._buffers[i].forward(), \
                        record.draws.first():
                    state, found = self._call(layer, inputs, context, mode)
                needs = [self._passed_on(t, inputs, record.needs_grad)
                         for t in state]
            else:
                self._run_recorded(record, context, split)
                state, found = record.outputs, record.losses
                needs = [t.requires_grad for t in state]
            self._end()
            losses += [x.detach() for x in found]
            state = tuple(t.detach() for t in state)
            records.append(record)
        return state, StageTape(records, context, num_inputs), losses

    def _begin(self, layer: int, what: str, context: StageContext) -> None:
        if self.tracer is not None:
            self.tracer.begin(layer, what, context)

    def _end(self) -> None:
        if self.tracer is not None:
            self.tracer.end()

    def _rng_state(self) -> Tuple[Tensor, Optional[Tensor], Any]:
        """Of the host, the device, and what the trainer has besides."""
        return (torch.get_rng_state(),
                torch.cuda.get_rng_state(self.device)
                if self.device.type == "cuda" else None,
                self._extra_rng.get() if self._extra_rng is not None else None)

    def _set_rng_state(self, state: Tuple[Tensor, Optional[Tensor], Any]
                       ) -> None:
        host, device, extra = state
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, self.device)
        if self._extra_rng is not None:
            self._extra_rng.set(extra)

    @contextlib.contextmanager
    def _backward_pass(self, layer: int, what: str, context: StageContext
                       ) -> Iterator[None]:
        """Tells the tracer of a pass, and has autograd run in this thread: a
        profiler finds what belongs to a pass by the thread that launched it."""
        if self.tracer is None or (_set_device_threads is None and
                                   self.device.type != "cpu"):
            yield
            return
        with (contextlib.nullcontext() if _set_device_threads is None else
              _set_device_threads(False)):
            self._begin(layer, what, context)
            yield
            self._end()

    @staticmethod
    def _passed_on(output: Tensor, inputs: State, needs_grad: bool) -> bool:
        for t in inputs:
            if output is t:
                return t.requires_grad
        return needs_grad

    def _call(self, layer: nn.Module, state: State, context: StageContext,
              mode: str) -> Tuple[State, List[Tensor]]:
        context._losses = []
        context._selective = mode == SELECTIVE
        before = [_version(t) for t in state]
        output = layer(state, context)
        for i, t in enumerate(state):
            if _version(t) != before[i]:
                raise RuntimeError(
                    f"{type(layer).__name__}: changes state[{i}] in place, which "
                    "is read again by others and by recompute; must make a new "
                    "tensor")
        if isinstance(output, Tensor):
            output = (output,)
        losses, context._losses = context._losses, []
        return output, losses

    def _run_recorded(self, record: _LayerRecord, context: StageContext,
                      split: bool) -> None:
        with contextlib.ExitStack() as stack:
            if split:
                record.cuts = stack.enter_context(_Cuts(
                    context, self._cut_modules[record.index],
                    self._layer_parameters[record.index], self.device))
            if record.mode == SELECTIVE:
                context._buffers = self._buffers[record.index]
                stack.enter_context(context._buffers.forward())
            if record.mode == OFFLOAD:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(
                    self._packer(record), _unpack))
            record.outputs, record.losses = self._call(
                record.layer, record.inputs, context, record.mode)
        if record.index not in self._checked:
            self._check_weights(record)
            self._checked.add(record.index)

    def _check_weights(self, record: _LayerRecord) -> None:
        """The layer's graph ends at no weights but its own; those inside of calls
        that were cut out are looked at there."""
        own = {id(p) for p in self._layer_parameters[record.index]}
        for node in _graph([*record.outputs, *record.losses]):
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
                raise RuntimeError(
                    f"{type(record.layer).__name__}: reads a weight of shape "
                    f"{tuple(leaf.shape)} that is no parameter of the layer, whose "
                    "gradient would be lost; must be registered in it, or no "
                    "nn.Parameter where the forward makes it")

    def _staying(self, record: _LayerRecord) -> set:
        """Weights and the layer's own input are not copied."""
        return self._weight_storages | {_storage(t) for t in record.inputs}

    def _packer(self, record: _LayerRecord) -> Callable[[Tensor], _Slot]:
        # The graph holds pack: it may hold no record, which holds the graph.
        staying, slots = self._staying(record), record.slots

        def pack(tensor: Tensor) -> _Slot:
            # An output that its own operation saves would hold its graph.
            slot = _Slot(tensor.detach())
            if _storage(tensor) not in staying:
                slots.append(slot)
            return slot

        return pack

    # ---- copies ----------------------------------------------------------

    def offload(self, tape: StageTape) -> None:
        copies: dict = {}  # slots may hold the same tensor
        if self.copy_stream is not None:
            self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        for slot in _slots(tape):
            t = slot.tensor
            key = (t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_conj(),
                   t.is_neg())
            if key not in copies:
                copies[key] = self._copy(t, to_host=True)
            slot.host, slot.event = copies[key]
            if self.copy_stream is None:
                slot.tensor = None

    def reload(self, tape: StageTape) -> None:
        self.wait_copies(tape)
        copies: dict = {}
        for slot in _slots(tape):
            if id(slot.host) not in copies:
                copies[id(slot.host)] = (slot.host,
                                         self._copy(slot.host, to_host=False))
            slot.tensor, slot.event = copies[id(slot.host)][1]
        for slot in _slots(tape):
            slot.host = None

    def _copy(self, tensor: Tensor, to_host: bool) -> Tuple[Tensor, Any]:
        """The copy, and the event of its end where there are streams. It has the
        tensor's own values alone: none twice, none of what it is a view of."""
        shape = tensor.shape
        tensor = tensor.detach()[tuple(slice(1) if stride == 0 else slice(None)
                                       for stride in tensor.stride())]
        if self.copy_stream is None:
            return tensor.clone().expand(shape), None
        with torch.cuda.stream(self.copy_stream):
            if to_host:
                copy = _pinned_like(tensor)
                copy.copy_(tensor, non_blocking=True)
            else:
                copy = tensor.to(self.device, non_blocking=True)
            return copy.expand(shape), self.copy_stream.record_event()

    def wait_copies(self, tape: StageTape) -> None:
        """Ends the copies begun: frees what went out, may use what came back."""
        if self.copy_stream is None:
            return
        stream = torch.cuda.current_stream(self.device)
        for slot in _slots(tape):
            if slot.event is None:
                continue
            stream.wait_event(slot.event)
            slot.event = None
            if slot.host is not None:
                slot.tensor = None
            else:
                slot.tensor.record_stream(stream)

    # ---- backward --------------------------------------------------------

    def backward(self, tape: StageTape, output_gradients: Sequence[
            Optional[Tensor]], loss_scale: float,
                 take: Optional[TakeGradient]) -> List[Optional[Tensor]]:
        """Gradients of the chunk's inputs; None where nobody wants one.

        `take` gets the weights' gradients, layer by layer: all at once would be
        as large as the chunk's weights. None for a split pair: what they follow
        from stays on the tape for weight_gradients().
        """
        gradients: List[Optional[Tensor]] = list(output_gradients)
        while tape.records:
            gradients = self._layer_backward(tape.records.pop(), tape, gradients,
                                             loss_scale, take is None)
            if take is not None:
                _hand_over(tape.gradients, take)
        tape.context._free_data()
        if not gradients:
            gradients = [None] * tape.num_inputs
        return gradients

    def _layer_backward(self, record: _LayerRecord, tape: StageTape,
                        gradients: List[Optional[Tensor]], loss_scale: float,
                        split: bool) -> List[Optional[Tensor]]:
        if not record.needs_grad:
            return [None] * len(record.inputs)
        if record.mode == FULL:
            with record.draws.again():
                self._run_recorded(record, tape.context, split)
        outputs, seeds = [], []
        for t, g in zip(record.outputs, gradients):
            if g is not None and t.requires_grad:
                outputs.append(t)
                seeds.append(g)
        for loss in record.losses:
            if loss.requires_grad:
                outputs.append(loss)
                seeds.append(torch.full_like(loss, loss_scale))
        wanted = [t for t in record.inputs if t.requires_grad]
        if not outputs:
            return [None] * len(record.inputs)
        # Weights that no module's call has cut out: used by the layer itself,
        # by name, or in selective().
        weights = self._layer_parameters[record.index]
        calls = record.cuts.calls if record.cuts is not None else []
        inside = [t for call in calls for t in call.inputs]
        anchors = [record.cuts.anchor] if calls else []
        targets = wanted + weights + inside + anchors
        # A pass that runs forwards again takes longer than its name says.
        named = record.mode not in (FULL, SELECTIVE)
        with (self._backward_pass(record.index,
                                  "input_grad" if split else "backward",
                                  tape.context)
              if named else contextlib.nullcontext()):
            found = torch.autograd.grad(outputs, targets, seeds,
                                        allow_unused=True) if targets else ()
        at = len(wanted)
        tape.gradients += [(p, g) for p, g in zip(weights, found[at:])
                           if g is not None]
        at += len(weights)
        if any(g is not None for g in found[at:at + len(inside)]):
            raise _not_followed(record.layer, "a module in it hands tensors on "
                                "besides its outputs")
        calls = [call for call in calls if call.seeds]
        for call in calls:
            call.inputs = []
        if calls:
            tape.calls.append((record.index, calls))
        by_input = iter(found)
        return [next(by_input) if t.requires_grad else None
                for t in record.inputs]

    def weight_gradients(self, tape: StageTape, take: TakeGradient) -> None:
        """Hands `take` what the tape's stage adds to the weights' gradients."""
        _hand_over(tape.gradients, take)
        while tape.calls:
            _hand_over(self._layer_weight_gradients(tape), take)

    def _layer_weight_gradients(self, tape: StageTape
                                ) -> List[Tuple[nn.Parameter, Tensor]]:
        """Of the first layer on the tape, which is taken off it."""
        index, calls = tape.calls.pop(0)
        weights = self._layer_parameters[index]
        seeds = [seed for call in calls for seed in call.seeds]
        with self._backward_pass(index, "weight_grad", tape.context):
            found = torch.autograd.grad([t for t, _ in seeds], weights,
                                        [g for _, g in seeds], allow_unused=True)
        return [(p, g) for p, g in zip(weights, found) if g is not None]


def _hand_over(gradients: List[Tuple[nn.Parameter, Tensor]],
               take: TakeGradient) -> None:
    """Hands them to `take`, and holds none of them any longer."""
    while gradients:
        take(*gradients.pop(0))


def _slots(tape: StageTape) -> List[_Slot]:
    return [slot for record in tape.records for slot in record.slots]


def _unpack(slot: _Slot) -> Tensor:
    if slot.tensor is None:
        raise RuntimeError("activations are needed while they are on the host")
    return slot.tensor
