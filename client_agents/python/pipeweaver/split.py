"""How a batch is split into sub-microbatches.

The twin of search/partition/batch_split.h: the same arithmetic in the same
order, so that the safe program here splits a batch as the planner does.
"""

import heapq
from typing import List, Sequence

from pipeweaver.job import (
    BatchView, JobView, MicrobatchView, SplitView, SubMicrobatch)
from pipeweaver.v1 import job_pb2


def split_batch(batch: BatchView,
                sub_microbatch_tokens: Sequence[int] = ()) -> SplitView:
    """All sub-microbatches of a batch, by microbatch, module, first item.

    sub_microbatch_tokens: in place of the layout's, one a module. Raises
    ValueError when an item is larger than the largest shape bucket.
    """
    job = batch.job
    targets = list(sub_microbatch_tokens) or job.sub_microbatch_tokens
    buckets = job.job.executor.shape_buckets
    largest_bucket = buckets[-1] if buckets else 0
    subs: List[SubMicrobatch] = []
    for b, mb in enumerate(batch.microbatches):
        split: List[List[List[int]]] = [[] for _ in range(job.num_modules)]
        for m in job.order:
            tokens = mb.item_tokens[m]
            if not tokens:
                continue
            if job.inherited[m] >= 0:
                split[m] = split[job.edges[job.inherited[m]].producer]
                continue
            split[m] = _split_module(job, mb, b, m, targets[m], largest_bucket)
        for m, groups in enumerate(split):
            for items in groups:
                mine = tuple(mb.item_tokens[m][i] for i in items)
                subs.append(SubMicrobatch(len(subs), m, b, tuple(items), mine,
                                          job.padding(sum(mine))))
    return SplitView(batch, subs)


def _split_module(job: JobView, mb: MicrobatchView, b: int, m: int, target: int,
                  largest_bucket: int) -> List[List[int]]:
    tokens = mb.item_tokens[m]
    condition = condition_tokens(job, m, mb)
    weights = [_item_weight(job.job.modules[m], n, c)
               for n, c in zip(tokens, condition)]
    if largest_bucket and max(tokens) > largest_bucket:
        raise ValueError(
            f"microbatches[{b}]: an item of module {job.module_name(m)!r} has "
            f"{max(tokens)} tokens: must be at most the largest of "
            f"executor.shape_buckets, {largest_bucket}")
    groups = min(len(tokens), -(-sum(tokens) // max(1, target)))
    while True:
        split = split_items(weights, groups)
        if not largest_bucket or all(
                sum(tokens[i] for i in group) <= largest_bucket
                for group in split):
            return split
        groups = min(len(tokens), 2 * groups)


def split_items(weights: Sequence[float], groups: int) -> List[List[int]]:
    """Runs of neighbours where they cost at most 5 % in balance, else longest
    processing time first."""
    if groups == 1:
        return [list(range(len(weights)))]
    runs = _best_runs(weights, groups)
    complete = len(runs) == groups
    largest = _largest_sum(weights, runs)
    if complete and largest <= 1.05 * _least_largest_sum(weights, groups):
        return runs
    longest = _longest_first(weights, groups)
    if complete and largest <= 1.05 * _largest_sum(weights, longest):
        return runs
    return longest


def _largest_sum(weights: Sequence[float], groups: List[List[int]]) -> float:
    return max(_sum(weights, group) for group in groups)


def _sum(weights: Sequence[float], group: Sequence[int]) -> float:
    # Added one by one, as the planner does: sum() may round otherwise.
    total = 0.0
    for i in group:
        total += weights[i]
    return total


def _longest_first(weights: Sequence[float], groups: int) -> List[List[int]]:
    loads = [(0.0, 0, g) for g in range(groups)]
    result: List[List[int]] = [[] for _ in range(groups)]
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        load, items, group = heapq.heappop(loads)
        result[group].append(i)
        heapq.heappush(loads, (load + weights[i], items + 1, group))
    return sorted(sorted(group) for group in result)


def _runs(weights: Sequence[float], groups: int,
          limit: float) -> List[List[int]]:
    result: List[List[int]] = [[]]
    total = 0.0
    for i, weight in enumerate(weights):
        left = groups - len(result)
        full = total + weight > limit and left > 0
        if result[-1] and (full or len(weights) - i <= left):
            result.append([])
            total = 0.0
        result[-1].append(i)
        total += weight
    return result


def _least_largest_sum(weights: Sequence[float], groups: int) -> float:
    """No division into groups has a smaller largest sum."""
    return max(_sum(weights, range(len(weights))) / groups, max(weights))


def _enough(weights: Sequence[float], groups: int, limit: float) -> bool:
    used, total = 1, 0.0
    for weight in weights:
        if total + weight > limit:
            used += 1
            total = 0.0
        total += weight
    return used <= groups


def _best_runs(weights: Sequence[float], groups: int) -> List[List[int]]:
    high = _sum(weights, range(len(weights)))
    low = _least_largest_sum(weights, groups)
    if _enough(weights, groups, low):
        high = low
    # Halving the range 20 times leaves a millionth of it.
    for _ in range(20):
        if not low < high:
            break
        middle = low + (high - low) / 2
        if _enough(weights, groups, middle):
            high = middle
        else:
            low = middle
    return _runs(weights, groups, high)


def _parameter_count(layer: job_pb2.LayerGroup) -> int:
    h = layer.hidden_size
    if layer.kind in (job_pb2.LAYER_KIND_TRANSFORMER, job_pb2.LAYER_KIND_DIT):
        kv_width = h // layer.heads * (layer.kv_heads or layer.heads)
        attention = 2 * h * h + 2 * h * kv_width
        ffn = (3 if layer.gated_ffn else 2) * h * layer.ffn_size
        twice = 2 if layer.kind == job_pb2.LAYER_KIND_DIT else 1
        return twice * attention + ffn + 2 * h
    if layer.kind == job_pb2.LAYER_KIND_PATCH_EMBED:
        return h * layer.input_size
    if layer.kind == job_pb2.LAYER_KIND_PROJECTOR:
        return h * layer.ffn_size + layer.ffn_size * layer.input_size
    return h * layer.vocab_size


def _item_weight(module: job_pb2.Module, tokens: int, condition: int) -> float:
    """Arithmetic of an item in a module, in units of no meaning."""
    n, m = float(tokens), float(condition)
    weight = 0.0
    for layer in module.layers:
        width = float(layer.hidden_size)
        one = 0.0
        if layer.kind != job_pb2.LAYER_KIND_EMBEDDING:
            one += float(_parameter_count(layer)) * n
        if layer.heads > 0:
            one += 2 * width * n * n * (0.5 if layer.causal else 1.0)
            if layer.kind == job_pb2.LAYER_KIND_DIT:
                one += 2 * width * n * m
        weight += one * layer.count
    return weight


def condition_tokens(job: JobView, module: int,
                      mb: MicrobatchView) -> List[int]:
    """Tokens that each item takes as its condition."""
    tokens = [0] * len(mb.item_tokens[module])
    if any(layer.kind == job_pb2.LAYER_KIND_DIT
           for layer in job.job.modules[module].layers):
        for edge in job.inputs[module]:
            for producer, consumer in mb.uses[edge.index]:
                tokens[consumer] += edge.rows(
                    mb.item_tokens[edge.producer][producer])
    return tokens
