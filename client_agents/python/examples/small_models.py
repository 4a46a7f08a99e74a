"""Layers of small real multimodal models: ViT, language model, DiT.

Written for pipeweaver.torch: each is called as layer(state, context), where
state is a tuple of packed tensors [tokens, width]. See pipeweaver/torch/chunk.py.
"""

from typing import Dict, Tuple

import torch
from torch import nn
from torch.nn import functional as F

from pipeweaver.torch import Boundary, PipelineModule


def attention(q, k, v, lengths, key_lengths, causal, heads):
    """Attention within items that are packed one behind the other."""
    out, at, key_at = [], 0, 0
    for n, m in zip(lengths, key_lengths):
        if m == 0:
            out.append(torch.zeros_like(q[at:at + n]))
            at += n
            continue
        split = [x.view(x.shape[0], heads, -1).transpose(0, 1) for x in
                 (q[at:at + n], k[key_at:key_at + m], v[key_at:key_at + m])]
        score = split[0] @ split[1].transpose(1, 2) / split[0].shape[-1] ** 0.5
        if causal:
            score = score.masked_fill(torch.ones(
                n, m, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        out.append((score.softmax(-1) @ split[2]).transpose(0, 1).reshape(n, -1))
        at, key_at = at + n, key_at + m
    return torch.cat(out)


def padded(x, context):
    """With rows of zeros up to the shape bucket, an item that nobody reads."""
    return F.pad(x, (0, 0, 0, context.sub.padding))


class Block(nn.Module):
    """Pre-norm transformer block on packed tokens."""

    def __init__(self, width, causal, heads=2):
        super().__init__()
        self.causal, self.heads = causal, heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, state, context):
        x = state[0]
        lengths = context.sub.lengths
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(context.selective(
            attention, q, k, v, lengths, lengths, self.causal,
            self.heads))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return (x, *state[1:])


class PatchEmbed(nn.Module):
    """Items' patches to tokens; the first layer of an encoder."""

    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Linear(patch, width)

    def forward(self, state, context):
        return (padded(self.proj(torch.cat(context.data)), context), *state)


class Merger(nn.Module):
    """The last layer of an encoder: `merge` tokens into one of another width."""

    def __init__(self, width, output, merge):
        super().__init__()
        self.merge = merge
        self.proj = nn.Linear(merge * width, output)

    def forward(self, state, context):
        rows = []
        items = state[0][:context.sub.tokens]
        for x in items.split(list(context.sub.item_tokens)):
            x = F.pad(x, (0, 0, 0, -len(x) % self.merge))
            rows.append(x.reshape(-1, self.merge * x.shape[1]))
        return (self.proj(torch.cat(rows)),)


class Projector(nn.Module):
    """A module of its own between an encoder and the backbone."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, state, context):
        x = padded(torch.cat(state), context)
        return (self.down(F.relu(self.up(x))),)


def incoming_rows(state, context) -> Dict[int, Dict[Tuple[int, int], object]]:
    """[consumer item][(edge, producer item)] -> rows that crossed."""
    found: Dict[int, Dict[Tuple[int, int], object]] = {}
    for tensor, x in zip(state, context.crossings):
        by_item = dict(zip(x.items, tensor.split(list(x.rows))))
        for producer, consumer in x.uses:
            found.setdefault(consumer, {})[
                x.edge.index, producer] = by_item[producer]
    return found


class Embedding(nn.Module):
    """Tokens of the backbone; what encoders made comes first in an item."""

    def __init__(self, vocab, width):
        super().__init__()
        self.table = nn.Embedding(vocab, width)

    def forward(self, state, context):
        rows = incoming_rows(state, context)
        out = []
        for item, tokens, (ids, _) in zip(
                context.sub.items, context.sub.item_tokens, context.data):
            mine = [rows[item][key] for key in sorted(rows.get(item, {}))]
            have = sum(len(x) for x in mine)
            out += [*mine, self.table(ids[have:])]
        return (padded(torch.cat(out), context),)


class LmHead(nn.Module):
    """Adds the loss and hands on its input."""

    def __init__(self, vocab, width, loss_scale=1 / 64):
        super().__init__()
        self.loss_scale = loss_scale
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, vocab)

    def forward(self, state, context):
        labels = torch.cat([labels for _, labels in context.data])
        logits = self.proj(self.norm(state[0][:context.sub.tokens]))
        context.add_loss(F.cross_entropy(logits, labels, reduction="sum") *
                         self.loss_scale)
        return state


class DitEmbed(nn.Module):
    """Patches of the clips; conditions travel beside the hidden state."""

    def __init__(self, patch, width, condition):
        super().__init__()
        self.proj = nn.Linear(patch, width)
        self.condition = condition

    def forward(self, state, context):
        x = padded(self.proj(torch.cat([clip for clip, _ in context.data])),
                   context)
        if state:
            return (x, torch.cat(state))
        return (x, x.new_zeros((0, self.condition)))


class DitBlock(nn.Module):
    """Block with cross-attention to the condition's rows."""

    def __init__(self, width, condition, heads=2):
        super().__init__()
        self.heads = heads
        self.block = Block(width, False, heads)
        self.norm = nn.LayerNorm(width)
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(condition, 2 * width)

    def forward(self, state, context):
        x, condition = self.block(state, context)
        per_item = incoming_rows(
            condition.split([sum(c.rows) for c in context.crossings]), context)
        used, lengths = [], []
        for item in context.sub.items:
            mine = per_item.get(item, {})
            used += [mine[key] for key in sorted(mine)]
            lengths.append(sum(len(v) for v in mine.values()))
        if context.sub.padding:
            lengths.append(0)
        if used:
            k, v = self.kv(torch.cat(used)).chunk(2, -1)
            x = x + self.out(attention(self.q(self.norm(x)), k, v,
                                       context.sub.lengths, lengths, False,
                                       self.heads))
        return (x, condition)


class DitHead(nn.Module):
    """Denoising loss."""

    def __init__(self, patch, width, loss_scale=1 / 64):
        super().__init__()
        self.loss_scale = loss_scale
        self.proj = nn.Linear(width, patch)

    def forward(self, state, context):
        target = torch.cat([noise for _, noise in context.data])
        made = self.proj(state[0][:context.sub.tokens])
        context.add_loss(((made - target) ** 2).sum() *
                         self.loss_scale)
        return ()


class DitModule(PipelineModule):
    """A DiT hands its condition from chunk to chunk."""

    def __init__(self, chunks, width, condition, gradient):
        super().__init__(chunks, width)
        self.condition, self.gradient = condition, gradient

    def boundary(self, sub, inputs):
        return [Boundary((sum(sub.lengths), self.width)),
                Boundary((sum(sum(x.rows) for x in inputs), self.condition),
                         self.gradient)]
