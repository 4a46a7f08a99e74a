"""Bytes of stages under each memory choice, as the planner counts them.

What the safe program's order and choices rest on, so that they are the ones that
registration has proven to fit. Twins: the byte rules of
semu/cost/layer_bytes.cc and search/partition/stage_cost.cc, in the same
arithmetic; both are tested on search/testdata/safe_program.json.
"""

import math
from typing import Dict, List, NamedTuple, Sequence, Set, Tuple

from pipeweaver.job import Chunk, JobView, SplitView, SubMicrobatch
from pipeweaver.safe_order import Choice
from pipeweaver.split import condition_tokens
from pipeweaver.v1 import job_pb2, plan_pb2

# (module, segment, chunk) -> its choices.
ChoiceTable = Dict[Tuple[int, int, int], List[plan_pb2.MemoryChoice]]

_FP32_BYTES = 4.0
_LARGEST = 1e14
KEEP, SELECTIVE, FULL = range(3)
_NAMES = ("keep", "selective", "full")


class LayerBytes(NamedTuple):
    """Of one layer, per GPU; lists by KEEP .. FULL."""
    kept: List[int]  # from the forward to the backward
    rebuilt: List[int]  # added when the backward reaches the layer
    workspace: int  # while the layer's backward runs
    weight_grad: int  # what the weight gradient reads
    forward: int  # while the forward runs, the layer's input left out
    output: int
    gathered: int  # from the tensor-parallel GPUs, for a matmul


def dtype_bytes(job: job_pb2.Job) -> int:
    return 4 if job.data_type == job_pb2.DATA_TYPE_FP32 else 2


def _rounded(value: float) -> int:
    value = min(value, _LARGEST)
    whole = math.floor(value)
    return int(whole + (value - whole >= 0.5))


def _layer_bytes(job: job_pb2.Job, layer: job_pb2.LayerGroup, tokens: int,
                 condition: int, backward: bool, trained: bool) -> LayerBytes:
    """`condition`: tokens that a DiT layer attends to. `trained`: a weight
    gradient will come."""
    tp = float(job.parallelism.tensor_parallel or 1)
    cp = float(job.parallelism.context_parallel or 1)
    element = float(dtype_bytes(job))
    n = tokens / cp
    h, f = float(layer.hidden_size), float(layer.ffn_size)
    shard = n / tp
    row = shard * element
    selective = workspace = weight_grad = 0.0
    if layer.kind in (job_pb2.LAYER_KIND_TRANSFORMER, job_pb2.LAYER_KIND_DIT):
        dit = layer.kind == job_pb2.LAYER_KIND_DIT
        kv = float(layer.hidden_size // layer.heads *
                   (layer.kv_heads or layer.heads))
        gates = 2.0 if layer.gated_ffn else 1.0
        modulations = 2.0 if dit else 0.0
        norm_in = (3 if dit else 2) * h
        attention = (2 * h + 2 * kv) + (2 * h if dit else 0)
        norm_out = (3 + modulations if dit else 2) * h
        condition_kv = (condition / cp if dit else 0.0) * 2 * kv / tp * element
        log_sums = (2 if dit else 1) * shard * layer.heads * _FP32_BYTES
        always = row * (norm_in + attention + gates * f) + condition_kv + log_sums
        weight_inputs = norm_out + f
        attention_outputs = (2 if dit else 1) * h
        output_grads = ((h + 2 * kv) + h + gates * f + h +
                        (2 * h if dit else 0))
        selective = row * weight_inputs
        weight_grad = row * (weight_inputs - modulations * h + attention_outputs +
                             output_grads) + condition_kv
        inputs = row * h
        workspace = row * ((gates + 1) * f + 2 * h)
        output = row * h
    elif layer.kind == job_pb2.LAYER_KIND_EMBEDDING:
        always = inputs = 8 * n / tp
        weight_grad = output = row * h
    elif layer.kind == job_pb2.LAYER_KIND_LM_HEAD:
        v = layer.vocab_size / tp
        inputs = output = row * h
        always = inputs + n * v * _FP32_BYTES
        workspace = n * v * element
        weight_grad = inputs + n * v * element
    elif layer.kind == job_pb2.LAYER_KIND_PATCH_EMBED:
        always = inputs = shard * layer.input_size * element
        output = shard * h * element
        weight_grad = always + shard * h * element
    else:
        inputs = row * h
        always = row * (h + f)
        selective = row * f
        weight_grad = row * (h + f) + row * (f + layer.input_size)
        workspace = row * 2 * f
        output = row * layer.input_size
    if not trained:
        selective = weight_grad = 0.0
    gathered = 0.0
    if tp > 1 and layer.kind != job_pb2.LAYER_KIND_PATCH_EMBED:
        gathered = n * element * (
            max(h, layer.input_size)
            if layer.kind == job_pb2.LAYER_KIND_PROJECTOR else h)
    everything = always + selective
    kept = [everything, always, inputs]
    forward = _rounded(everything + workspace + output)
    takes_gradient = trained or (backward and layer.kind not in (
        job_pb2.LAYER_KIND_EMBEDDING, job_pb2.LAYER_KIND_PATCH_EMBED))
    if not takes_gradient:
        return LayerBytes([0] * 3, [0] * 3, 0, 0, forward, _rounded(output),
                          _rounded(gathered))
    return LayerBytes([_rounded(x) for x in kept],
                      [_rounded(everything - x) for x in kept],
                      _rounded(workspace), _rounded(weight_grad), forward,
                      _rounded(output), _rounded(gathered))


def _stage_choice(layers: Sequence[LayerBytes], strategy: int, backward: bool,
                  split: bool) -> Choice:
    """A stage whose layers all run under `strategy`. `split`: its backward may
    come in two parts."""
    held = sum(x.kept[strategy] for x in layers)
    if not backward:
        return Choice(max((x.forward + x.output for x in layers), default=0), 0,
                      0, False)
    weight_grad = sum(x.weight_grad for x in layers)
    # Layers are gone through backward. In an input gradient alone, what the
    # weight gradients read adds up; in a backward in one piece it does not.
    fused = 0
    parts = weight_grad
    above = 0
    kept = held
    for x in reversed(layers):
        now = kept + x.rebuilt[strategy] + x.workspace
        fused = max(fused, now)
        parts = max(parts, now + above)
        kept -= x.kept[strategy]
        above += x.weight_grad
    if not split:
        return Choice(held, fused, weight_grad, split)
    return Choice(held, parts, weight_grad, True, fused)


class StageMemory:
    """Choices of a step's chunks, and the bytes of its stages under them."""

    def __init__(self, split: SplitView, memory_limit_bytes: Sequence[int]):
        """memory_limit_bytes: one a rank, as registration answers them. A rank
        that can hold all its stages at once keeps everything; the others' stages
        may run under each way to recompute that the executor has. The safe
        program never offloads."""
        self._split = split
        self._job: JobView = split.batch.job
        # By module, tokens, condition; and by these, segment, chunk, strategy.
        self._layers: Dict[Tuple[int, int, int], List[LayerBytes]] = {}
        self._choices: Dict[Tuple[int, ...], Choice] = {}
        # By microbatch and module.
        self._conditions: Dict[Tuple[int, int], List[int]] = {}
        executor = self._job.job.executor
        self._offered = [KEEP] + [
            strategy for has, strategy in (
                (executor.selective_recompute, SELECTIVE),
                (executor.full_recompute, FULL)) if has]
        # One a rank: what is left where items are so long that a layer needs
        # more than registration set aside for it.
        self.limits = [
            max(0, limit - max(0, used - reserved)) for limit, used, reserved in
            zip(memory_limit_bytes, self._layer_bytes_used(),
                self._layer_bytes_reserved())]
        self._strategies = self._decide(self.limits)

    def table(self) -> ChoiceTable:
        found: ChoiceTable = {}
        for key, strategies in self._strategies.items():
            m, s, k = key
            n = self._job.chunks[m][s][k].num_layers
            found[key] = [plan_pb2.MemoryChoice(
                name=_NAMES[x],
                keep_layers=n if x == KEEP else 0,
                selective_recompute_layers=n if x == SELECTIVE else 0,
                full_recompute_layers=n if x == FULL else 0)
                for x in strategies]
        return found

    def choices(self, sub: SubMicrobatch, segment: int, chunk: int
                ) -> List[Choice]:
        return [self._choice(sub, segment, chunk, x)
                for x in self._strategies[sub.module, segment, chunk]]

    def _backward(self, module: int) -> bool:
        return (self._job.backward(module) and
                not self._split.batch.forward_only)

    def _choice(self, sub: SubMicrobatch, segment: int, chunk: int,
                strategy: int) -> Choice:
        job, m = self._job, sub.module
        shape = (m, *self._shape(sub))
        key = (*shape, segment, chunk, strategy)
        if key not in self._choices:
            layers = self._layers_of(shape, job.chunks[m][segment][chunk])
            backward = self._backward(m)
            self._choices[key] = _stage_choice(
                layers, strategy, backward, backward and job.trainable[m] and
                bool(layers) and job.job.executor.split_backward)
        return self._choices[key]

    def _layers_of(self, shape: Tuple[int, int, int], chunk: Chunk
                   ) -> List[LayerBytes]:
        """shape: module, tokens, condition."""
        if shape not in self._layers:
            job, m = self._job, shape[0]
            backward = self._backward(m)
            self._layers[shape] = [
                x for group in job.job.modules[m].layers for x in [
                    _layer_bytes(job.job, group, *shape[1:], backward,
                                 backward and job.trainable[m])] * group.count]
        return self._layers[shape][chunk.first_layer:
                                   chunk.first_layer + chunk.num_layers]

    def _layer_bytes_used(self) -> List[int]:
        return self._most_by_rank({(sub.module, *self._shape(sub))
                                   for sub in self._split.subs})

    def _layer_bytes_reserved(self) -> List[int]:
        """As search/partition/memory_plan.cc sets them aside."""
        job = self._job
        longest = job.job.max_microbatch_tokens or [8192] * len(job.chunks)
        return self._most_by_rank({
            (m, min(2 * tokens, longest[m]), 0)
            for m, tokens in enumerate(job.sub_microbatch_tokens)})

    def _most_by_rank(self, shapes: Set[Tuple[int, int, int]]) -> List[int]:
        """What a rank needs beside activations while one of its layers runs."""
        job = self._job
        forward, gathered = [0] * job.ranks, [0] * job.ranks
        for shape in shapes:
            m = shape[0]
            rebuilds = len(self._offered) > 1 or job.job.executor.offload
            for segment in job.chunks[m]:
                for chunk in segment:
                    for x in self._layers_of(shape, chunk):
                        if rebuilds and self._backward(m):
                            forward[chunk.rank] = max(forward[chunk.rank],
                                                      x.forward)
                        gathered[chunk.rank] = max(gathered[chunk.rank],
                                                   x.gathered)
        return [a + b for a, b in zip(forward, gathered)]

    def _shape(self, sub: SubMicrobatch) -> Tuple[int, int]:
        """Tokens, padding included, and those attended to."""
        key = (sub.microbatch, sub.module)
        if key not in self._conditions:
            self._conditions[key] = condition_tokens(
                self._job, sub.module,
                self._split.batch.microbatches[sub.microbatch])
        return sub.tokens + sub.padding, sum(self._conditions[key][i] for i in sub.items)

    def _decide(self, limits: Sequence[int]) -> Dict[Tuple[int, int, int],
                                                     List[int]]:
        job = self._job
        held = [0] * job.ranks
        for sub in self._split.subs:
            for s, segment in enumerate(job.chunks[sub.module]):
                for k, chunk in enumerate(segment):
                    c = self._choice(sub, s, k, KEEP)
                    held[chunk.rank] += max(
                        c.activation_bytes, c.backward_bytes,
                        c.weight_grad_bytes, c.fused_backward_bytes or 0)
        tight = [used > limit for used, limit in zip(held, limits)]
        # Chunks of a module with equal layers have equal choices.
        needs = {self._kinds(m, c) for m, segments in enumerate(job.chunks)
                 for segment in segments for c in segment if tight[c.rank]}
        return {(m, s, k): self._offered if (
                    c.num_layers and self._backward(m) and
                    self._kinds(m, c) in needs) else [KEEP]
                for m, segments in enumerate(job.chunks)
                for s, segment in enumerate(segments)
                for k, c in enumerate(segment)}

    def _kinds(self, module: int, chunk: Chunk) -> Tuple[int, ...]:
        """The module, then the number of the chunk's layers in each group."""
        first, found = 0, [module]
        end = chunk.first_layer + chunk.num_layers
        for group in self._job.job.modules[module].layers:
            last = first + group.count
            found.append(max(0, min(last, end) - max(first, chunk.first_layer)))
            first = last
        return tuple(found)
