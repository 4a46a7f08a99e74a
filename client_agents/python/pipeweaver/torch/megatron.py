"""Megatron-core training steps, run by PipeWeaver programs.

    adapter = MegatronAdapter(view, rank, model_chunks, transport, program_of)
    restore = adapter.install()   # get_forward_backward_func() answers ours now

A job for it has one module, the language model; segment s of its layout is
virtual stage s, and its chunk on a rank is the rank's model chunk s. A
microbatch is micro_batch_size items of seq_length tokens, which one
sub-microbatch holds (sub_microbatch_tokens at least their product).

A model chunk runs as one piece: where a memory choice treats its layers
differently, all are treated as the leanest asks. Megatron's parallel linear
layers compute their weight gradients with the input gradients, hence
split_backward is refused. Gradients go to `main_grad` where parameters have one,
else to `grad`; Megatron's own hooks do not see them, hence DDP's
overlap_grad_reduce is refused. So are the fields of its config in _REFUSED, which
its own schedules act on and this one does not.
"""

import contextlib
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor, nn

from pipeweaver.job import JobView
from pipeweaver.torch.chunk import ExtraRng
from pipeweaver.torch.executor import (
    Boundary, ExecutorOptions, PipelineExecutor, PipelineModule, PreparedStep)
from pipeweaver.torch.transport import Transport


# Of Megatron's config; each must be off.
_REFUSED = ("delay_wgrad_compute", "defer_embedding_wgrad_compute",
            "hybrid_context_parallel", "overlap_moe_expert_parallel_comm",
            "fine_grained_activation_offloading", "grad_sync_func", "fp8", "fp4")


def _check_config(config: Any) -> None:
    for name in _REFUSED:
        value = getattr(config, name, None)
        if value:
            raise ValueError(f"config.{name}: {value!r}, must be off: Megatron's "
                             "own schedules act on it, PipeWeaver's does not")


class _ChunkLayer(nn.Module):
    """A Megatron model chunk as the executor's layer."""

    def __init__(self, adapter: "MegatronAdapter", model: nn.Module, index: int):
        super().__init__()
        self.model = model
        self._adapter = adapter
        self._index = index

    def forward(self, state: Any, context: Any) -> Any:
        return self._adapter._forward(self.model, self._index, state, context)


class _Module(PipelineModule):
    opaque = True

    def __init__(self, chunks: Any, adapter: "MegatronAdapter"):
        super().__init__(chunks, 0)
        self._adapter = adapter

    def boundary(self, sub: Any, inputs: Any) -> List[Boundary]:
        return [Boundary(self._adapter.tensor_shape)]


class MegatronAdapter:
    """One rank's. program_of() answers the prepared program of the step that is
    about to run (StepAgent.program(step).prepared, say)."""

    def __init__(self, view: JobView, rank: int, model_chunks: Sequence[nn.Module],
                 transport: Transport, program_of: Callable[[], PreparedStep],
                 *, tensor_shape: Sequence[int], device: Any = "cpu",
                 dtype: torch.dtype = torch.float32,
                 deterministic: bool = False):
        """tensor_shape: of the hidden states between chunks, [sequence on this
        rank, micro_batch_size, hidden]. Raises ValueError for a job or a Megatron
        config that it cannot run."""
        if view.num_modules != 1:
            raise ValueError(f"modules: {view.num_modules}, a Megatron job has "
                             "one, the language model")
        if view.job.executor.split_backward:
            raise ValueError("executor.split_backward: must be False: Megatron's "
                             "linear layers compute both gradients at once")
        self.tensor_shape = tuple(tensor_shape)
        self._view = view
        self._program_of = program_of
        self._step: Any = None
        chunks = {}
        for segment, chunk in ((s, k) for _, s, k in view.local_chunks(rank)):
            if segment >= len(model_chunks):
                raise ValueError(f"the layout has segment {segment} on rank "
                                 f"{rank}, which has {len(model_chunks)} model "
                                 "chunks")
            chunks[segment, chunk] = [
                _ChunkLayer(self, model_chunks[segment], segment)]
        for model in model_chunks:
            _check_config(_config(model))
            ddp = getattr(model, "ddp_config", None)
            if ddp is not None and ddp.overlap_grad_reduce:
                raise ValueError("ddp_config.overlap_grad_reduce: must be "
                                 "False: its hooks do not see our gradients")
        self.executor = PipelineExecutor(
            view, rank, [_Module(chunks, self)], transport, device=device,
            dtype=dtype, options=ExecutorOptions(
                deterministic=deterministic, accumulate=_accumulate,
                extra_rng=ExtraRng(_tracked_states, _set_tracked_states)))

    def install(self) -> Callable[[], None]:
        """Replaces Megatron's get_forward_backward_func; answers what puts it
        back."""
        from megatron.core import pipeline_parallel
        from megatron.core.pipeline_parallel import schedules
        places = [pipeline_parallel, schedules]
        before = [place.get_forward_backward_func for place in places]

        def ours(*_: Any, **__: Any) -> Callable[..., List[Any]]:
            return self.forward_backward

        for place in places:
            place.get_forward_backward_func = ours

        def restore() -> None:
            for place, function in zip(places, before):
                place.get_forward_backward_func = function

        return restore

    def forward_backward(self, *, forward_step_func: Callable[..., Any],
                         data_iterator: Any, model: Any, num_microbatches: int,
                         seq_length: int, micro_batch_size: int,
                         forward_only: bool = False,
                         collect_non_loss_data: bool = False,
                         **unused: Any) -> List[Any]:
        """As Megatron's functions of that kind: answers what the loss functions
        reduced, on the rank that has them, in the order of microbatches. Raises
        ValueError where the arguments are not the program's, or the config is one
        that the constructor refuses."""
        prepared = self._program_of()
        batch = prepared.split.batch
        if len(batch.microbatches) != num_microbatches:
            raise ValueError(f"num_microbatches: {num_microbatches}, the plan "
                             f"is for {len(batch.microbatches)}")
        if batch.forward_only != forward_only:
            raise ValueError(f"forward_only: {forward_only}, the plan is for "
                             f"{batch.forward_only}")
        for sub in prepared.split.subs:
            if sub.lengths != (seq_length,) * micro_batch_size:
                raise ValueError(
                    f"microbatch {sub.microbatch} has items of "
                    f"{sub.lengths} tokens: must be micro_batch_size = "
                    f"{micro_batch_size} of seq_length = {seq_length}, in one "
                    "sub-microbatch")
        chunks = model if isinstance(model, list) else [model]
        config = _config(chunks[0])
        _check_config(config)  # Megatron's training sets some of it late
        iterators = (data_iterator if isinstance(data_iterator, list) else
                     [data_iterator] * len(chunks))
        # Each chunk's iterator gives the microbatches in order; plans may run
        # them in another.
        data = [None if it is None else
                [next(it) for _ in range(num_microbatches)]
                for it in dict.fromkeys(iterators)]
        by_iterator = dict(zip(dict.fromkeys(iterators), data))
        self._step = (forward_step_func, num_microbatches,
                      collect_non_loss_data,
                      [by_iterator[it] for it in iterators], {})
        try:
            self.executor.run(prepared, lambda *_: None)
            found = self._step[4]
        finally:
            self._step = None
        finalize = getattr(config, "finalize_model_grads_func", None)
        if finalize is not None and not forward_only:
            finalize(chunks, self._num_tokens(found)
                     if config.calculate_per_token_loss else None)
        return [x for b in sorted(found) for x in found[b][0]]

    def _num_tokens(self, found: Dict[int, Any]) -> Tensor:
        """Tokens with a loss of the step's microbatches, a new tensor; 0 on ranks
        without losses."""
        total = torch.zeros([], dtype=torch.int, device=self.executor.device)
        for _, num_tokens in found.values():
            total += num_tokens
        return total

    def _forward(self, model: nn.Module, index: int, state: Any,
                 context: Any) -> Any:
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.utils import get_attr_wrapped_model
        step_func, num_microbatches, non_loss, data, found = self._step
        b = context.sub.microbatch
        config = _config(model)
        if config.timers is not None:  # forward_step_calc_loss() stops it
            config.timers("forward-compute", log_level=2).start()
        get_attr_wrapped_model(model, "set_input_tensor")(
            [state[0]] if state else [None])
        iterator: Optional[Iterator[Any]] = (
            iter([data[index][b]]) if data[index] is not None else None)
        with (torch.autocast(self.executor.device.type, config.autocast_dtype)
              if config.enable_autocast else contextlib.nullcontext()):
            output, loss_func = step_func(iterator, model)
        segments = self._view.chunks[0]
        last = (context.segment == len(segments) - 1 and
                context.chunk == len(segments[-1]) - 1)
        store: List[Any] = []
        # On all ranks: it scales the losses that layers add by the side.
        output, num_tokens = schedules.forward_step_calc_loss(
            model, output, loss_func, config, None, non_loss, num_microbatches,
            store, config.context_parallel_size, last)
        if not last:
            return (output,)
        found[b] = store, num_tokens
        if not non_loss:
            if config.grad_scale_func is not None:
                output = config.grad_scale_func(output)
            context.add_loss(output)
        return ()


def _config(model: nn.Module) -> Any:
    from megatron.core.utils import get_model_config
    return get_model_config(model)


def _tracked_states() -> Dict[str, Any]:
    """Random states that Megatron's layers draw dropout from by fork(); none
    before its seeds are set."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    return _copied(get_cuda_rng_tracker().get_states())


def _set_tracked_states(states: Dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    if states:
        get_cuda_rng_tracker().set_states(_copied(states))


def _copied(states: Dict[str, Any]) -> Dict[str, Any]:
    """Trackers replace a tensor of the dictionary they were given; a generator,
    which those for CUDA graphs have, is changed in place."""
    return {name: state.clone_state() if isinstance(state, torch.Generator)
            else state for name, state in states.items()}


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    main = getattr(parameter, "main_grad", None)
    if main is not None:
        # As DDP's hook: fused linear layers have added theirs, and the gradient
        # is memory of any content then, or zeros and what others add to it.
        if not getattr(parameter, "grad_added_to_main_grad", False) or getattr(
                parameter, "zero_out_wgrad", False):
            main.add_(gradient)
    elif parameter.grad is None:
        parameter.grad = gradient.detach().clone()
    else:
        parameter.grad += gradient
