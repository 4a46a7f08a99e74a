"""Runs a model chunk's layers: one stage pair at a time, with its memory choice.

Every layer is an autograd graph of its own, cut at its inputs. That makes
recompute, offload and the split of the backward local to a layer.

A layer is any nn.Module called as `layer(state, context) -> state`, where state
is a tuple of floating-point tensors. It reports losses by context.add_loss and
wraps what selective recompute should not keep in context.selective(fn, *args).
"""

from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeweaver.job import EdgeCrossing, SubMicrobatch

State = Tuple[Tensor, ...]

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
        self._data = data
        self._losses: List[Tensor] = []
        self._selective = False

    @property
    def data(self) -> Any:
        """The loader's data of the items, as the trainer's function gives it."""
        return self._data()

    def add_loss(self, loss: Tensor) -> None:
        """Adds a scalar to the step's loss, which is a sum."""
        self._losses.append(loss)

    def selective(self, fn: Callable[..., Any], *args: Any) -> Any:
        """fn(*args), recomputed in the backward under selective recompute."""
        if self._selective and torch.is_grad_enabled():
            with _recorder.paused():
                return checkpoint(fn, *args, use_reentrant=False)
        return fn(*args)


class _Slot:
    """A tensor that a layer saved for its backward."""
    __slots__ = ("tensor", "host", "event")

    def __init__(self, tensor: Tensor):
        self.tensor: Optional[Tensor] = tensor
        self.host: Optional[Tensor] = None
        self.event: Any = None


class _LinearCall:
    """A linear layer's call: its weight gradient follows from x and dy."""
    __slots__ = ("module", "x", "output", "version")

    def __init__(self, module: nn.Linear, x: Tensor, output: Tensor):
        self.module = module
        self.x = _Slot(x.detach())
        # What autograd is asked the gradient of. An edge of the graph does not
        # keep the output's memory; torch before 2.1 has only the output itself,
        # which must not change then.
        edge = getattr(torch.autograd.graph, "get_gradient_edge", None)
        self.output: Any = edge(output) if edge else output
        self.version = None if edge else output._version


class _LinearRecorder:
    """Collects the calls of linear layers that run meanwhile."""

    def __init__(self) -> None:
        self.calls: Optional[List[_LinearCall]] = None

    def hook(self, module: nn.Linear, inputs: Tuple[Tensor, ...],
             output: Tensor) -> None:
        if (self.calls is not None and torch.is_grad_enabled() and
                output.requires_grad and module.weight.requires_grad):
            self.calls.append(_LinearCall(module, inputs[0], output))

    def paused(self) -> "_Pause":
        return _Pause(self)


class _Pause:

    def __init__(self, recorder: _LinearRecorder):
        self._recorder = recorder

    def __enter__(self) -> None:
        self._calls, self._recorder.calls = self._recorder.calls, None

    def __exit__(self, *_: Any) -> None:
        self._recorder.calls = self._calls


_recorder = _LinearRecorder()


class _LayerRecord:
    __slots__ = ("index", "layer", "mode", "inputs", "outputs", "losses", "calls",
                 "slots", "rng", "needs_grad")

    def __init__(self, index: int, layer: nn.Module, mode: str, inputs: State):
        self.index = index  # in the chunk
        self.layer = layer
        self.mode = mode
        self.inputs = inputs
        self.outputs: State = ()
        self.losses: List[Tensor] = []
        self.calls: List[_LinearCall] = []
        self.slots: List[_Slot] = []
        self.rng: Any = None
        self.needs_grad = True


class StageTape:
    """What a stage pair holds between its forward and its backward."""

    def __init__(self, records: List[_LayerRecord], context: StageContext,
                 num_inputs: int):
        self.records = records
        self.context = context
        self.num_inputs = num_inputs
        # Set by the backward of a split pair, used by its weight gradient.
        self.calls: List[Tuple[int, nn.Linear, Tensor, Tensor]] = []
        self.gradients: List[Tuple[nn.Parameter, Tensor]] = []


def _rng_state(device: torch.device) -> Any:
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return torch.get_rng_state(), None


def _set_rng_state(state: Any, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _storage(tensor: Tensor) -> int:
    if hasattr(tensor, "untyped_storage"):
        return tensor.untyped_storage().data_ptr()
    return tensor.storage().data_ptr()


class LayerTracer:
    """Told which layer's pass runs; see Hooks in executor.py."""

    def begin(self, layer: int, what: str, context: StageContext) -> None:
        """what: forward, backward, input_grad or weight_grad."""

    def end(self) -> None:
        """The pass is over."""


class ChunkRunner:
    """The layers of one chunk. Not thread-safe, like autograd's users."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device,
                 copy_stream: Any = None,
                 tracer: Optional["LayerTracer"] = None):
        self.layers = list(layers)
        self.tracer = tracer
        self.device = device
        self.copy_stream = copy_stream
        owners: dict = {}
        for layer in self.layers:
            for module in layer.modules():
                for p in module.parameters(recurse=False):
                    owners.setdefault(p, set()).add(module)
        self.parameters = [p for p in owners if p.requires_grad]
        self._layer_parameters = [
            [p for p in layer.parameters() if p.requires_grad]
            for layer in self.layers]
        self._weight_storages = {_storage(p) for p in owners}
        # A weight that other modules use, too, gets its gradient in one piece.
        modules = dict.fromkeys(module for layer in self.layers
                                for module in layer.modules())
        self._handles = [
            module.register_forward_hook(_recorder.hook) for module in modules
            if isinstance(module, nn.Linear) and
            all(owners[p] == {module} for p in module.parameters())]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    # ---- forward ---------------------------------------------------------

    def forward(self, state: State, needs_grad: Sequence[bool],
                context: StageContext, modes: Sequence[str], backward: bool,
                split: bool) -> Tuple[State, Optional[StageTape], List[Tensor]]:
        """The chunk's output, what its backward needs, and its losses.

        needs_grad: which inputs somebody wants a gradient of. split: the
        backward will come in two parts.
        """
        losses: List[Tensor] = []
        if not backward:
            with torch.no_grad():
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
                record.rng = _rng_state(self.device)
                with torch.no_grad():
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

    @staticmethod
    def _passed_on(output: Tensor, inputs: State, needs_grad: bool) -> bool:
        for t in inputs:
            if output is t:
                return t.requires_grad
        return needs_grad

    @staticmethod
    def _call(layer: nn.Module, state: State, context: StageContext,
              mode: str) -> Tuple[State, List[Tensor]]:
        context._losses = []
        context._selective = mode == SELECTIVE
        state = layer(state, context)
        if isinstance(state, Tensor):
            state = (state,)
        return state, context._losses

    def _run_recorded(self, record: _LayerRecord, context: StageContext,
                      split: bool) -> None:
        _recorder.calls = [] if split else None
        try:
            if record.mode == OFFLOAD:
                with torch.autograd.graph.saved_tensors_hooks(
                        self._packer(record), _unpack):
                    record.outputs, record.losses = self._call(
                        record.layer, record.inputs, context, record.mode)
            else:
                record.outputs, record.losses = self._call(
                    record.layer, record.inputs, context, record.mode)
            record.calls = _recorder.calls or []
            if record.mode == OFFLOAD:
                staying = self._staying(record)
                record.slots += [call.x for call in record.calls
                                 if _storage(call.x.tensor) not in staying]
        finally:
            _recorder.calls = None

    def _staying(self, record: _LayerRecord) -> set:
        """Weights and the layer's own input are not copied."""
        return self._weight_storages | {_storage(t) for t in record.inputs}

    def _packer(self, record: _LayerRecord) -> Callable[[Tensor], _Slot]:
        staying = self._staying(record)

        def pack(tensor: Tensor) -> _Slot:
            slot = _Slot(tensor)
            if _storage(tensor) not in staying:
                record.slots.append(slot)
            return slot

        return pack

    # ---- copies ----------------------------------------------------------

    def offload(self, tape: StageTape) -> None:
        copies: dict = {}  # slots may hold the same tensor
        if self.copy_stream is not None:
            self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        for slot in _slots(tape):
            t = slot.tensor
            key = (t.data_ptr(), t.shape, t.stride(), t.dtype)
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
        """The copy, and the event of its end where there are streams."""
        if self.copy_stream is None:
            return tensor.detach().clone(), None
        with torch.cuda.stream(self.copy_stream):
            if to_host:
                copy = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype,
                    pin_memory=True)
                copy.copy_(tensor, non_blocking=True)
            else:
                copy = tensor.to(self.device, non_blocking=True)
            return copy, self.copy_stream.record_event()

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
            Optional[Tensor]], loss_scale: float, split: bool
    ) -> List[Optional[Tensor]]:
        """Gradients of the chunk's inputs; None where nobody wants one.

        The weights' gradients, or what they follow from if `split`, stay on the
        tape for weight_gradients().
        """
        gradients: List[Optional[Tensor]] = list(output_gradients)
        while tape.records:
            record = tape.records.pop()
            self._begin(record.index, "input_grad" if split else "backward",
                        tape.context)
            gradients = self._layer_backward(record, tape, gradients,
                                             loss_scale, split)
            self._end()
        if not gradients:
            gradients = [None] * tape.num_inputs
        return gradients

    def _layer_backward(self, record: _LayerRecord, tape: StageTape,
                        gradients: List[Optional[Tensor]], loss_scale: float,
                        split: bool) -> List[Optional[Tensor]]:
        if not record.needs_grad:
            return [None] * len(record.inputs)
        if record.mode == FULL:
            present = _rng_state(self.device)
            _set_rng_state(record.rng, self.device)
            self._run_recorded(record, tape.context, split)
            _set_rng_state(present, self.device)
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
        for call in record.calls:
            if call.version is not None and call.output._version != call.version:
                raise RuntimeError(
                    f"{call.module} in {type(record.layer).__name__}: its "
                    "output is changed in place, which a split backward cannot "
                    "follow with this version of torch")
        deferred = {p for call in record.calls
                    for p in call.module.parameters()}
        whole = [p for p in record.layer.parameters()
                 if p.requires_grad and p not in deferred]
        targets = wanted + [call.output for call in record.calls] + whole
        found = torch.autograd.grad(outputs, targets, seeds,
                                    allow_unused=True) if targets else ()
        at = len(wanted)
        for call, dy in zip(record.calls, found[at:]):
            if dy is not None:
                tape.calls.append(
                    (record.index, call.module, call.x.tensor, dy))
        at += len(record.calls)
        tape.gradients += [(p, g) for p, g in zip(whole, found[at:])
                           if g is not None]
        by_input = iter(found)
        return [next(by_input) if t.requires_grad else None
                for t in record.inputs]

    def weight_gradients(self, tape: StageTape
                         ) -> List[Tuple[nn.Parameter, Tensor]]:
        """What the tape's stage adds to the weights' gradients."""
        gradients = tape.gradients
        with torch.no_grad():
            for index, module, x, dy in tape.calls:
                self._begin(index, "weight_grad", tape.context)
                dy = dy.reshape(-1, dy.shape[-1])
                x = x.reshape(-1, x.shape[-1]).to(dy.dtype)
                gradients.append((module.weight, dy.t() @ x))
                if module.bias is not None and module.bias.requires_grad:
                    gradients.append((module.bias, dy.sum(0)))
                self._end()
        tape.calls, tape.gradients = [], []
        return gradients


def _slots(tape: StageTape) -> List[_Slot]:
    return [slot for record in tape.records for slot in record.slots]


def _unpack(slot: _Slot) -> Tensor:
    if slot.tensor is None:
        raise RuntimeError("activations are needed while they are on the host")
    return slot.tensor
