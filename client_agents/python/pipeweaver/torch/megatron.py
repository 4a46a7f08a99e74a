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
overlap_grad_reduce is refused.
"""

from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor, nn

from pipeweaver.job import JobView
from pipeweaver.torch.chunk import ExtraRng
from pipeweaver.torch.executor import (
    Boundary, ExecutorOptions, PipelineExecutor, PipelineModule, PreparedStep)
from pipeweaver.torch.transport import Transport


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
        rank, micro_batch_size, hidden]."""
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
        reduced, on the rank that has them, in the order of microbatches."""
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
            reduced = self._step[4]
        finally:
            self._step = None
        config = _config(chunks[0])
        finalize = getattr(config, "finalize_model_grads_func", None)
        if finalize is not None and not forward_only:
            finalize(chunks, None)
        return [x for b in sorted(reduced) for x in reduced[b]]

    def _forward(self, model: nn.Module, index: int, state: Any,
                 context: Any) -> Any:
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.utils import get_attr_wrapped_model
        step_func, num_microbatches, non_loss, data, reduced = self._step
        b = context.sub.microbatch
        get_attr_wrapped_model(model, "set_input_tensor")(
            [state[0]] if state else [None])
        iterator: Optional[Iterator[Any]] = (
            iter([data[index][b]]) if data[index] is not None else None)
        output, loss_func = step_func(iterator, model)
        segments = self._view.chunks[0]
        last = (context.segment == len(segments) - 1 and
                context.chunk == len(segments[-1]) - 1)
        if not last:
            return (output,)
        store: List[Any] = []
        config = _config(model)
        loss, _ = schedules.forward_step_calc_loss(
            model, output, loss_func, config, None, non_loss, num_microbatches,
            store, 1, True)
        reduced[b] = store
        if not non_loss:
            if config.grad_scale_func is not None:
                loss = config.grad_scale_func(loss)
            context.add_loss(loss)
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
        main.add_(gradient)
    elif parameter.grad is None:
        parameter.grad = gradient.detach().clone()
    else:
        parameter.grad += gradient
