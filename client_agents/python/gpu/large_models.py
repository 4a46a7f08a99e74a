"""A vision-language model of real widths, for one GPU: its job, layers, trainer.

The layers stand as pipeweaver.torch wants them; attention is torch's own
scaled_dot_product_attention, item by item. The trainer keeps what the planner
counts with (semu/cost/weight_memory.h): bf16 weights, fp32 gradients, and fp32
master weights and moments of Adam.
"""

import random
from typing import List, NamedTuple, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeweaver import MetadataBuilder
from pipeweaver.job import BatchView, JobView
from pipeweaver.torch import ExecutorOptions, Hooks, PipelineExecutor, PipelineModule
from pipeweaver.v1 import batch_pb2, job_pb2
from small_models import Embedding, LmHead, PatchEmbed

PATCH_VALUES, MERGE, VOCAB = 3 * 14 * 14, 4, 32000


class Size(NamedTuple):
    """Of one module's transformer blocks."""
    width: int
    ffn: int
    heads: int
    kv_heads: int
    blocks: int


# A ViT of 0.6 B parameters and a quarter of Llama3 8B.
VISION = Size(1664, 8192, 16, 16, 16)
TEXT = Size(4096, 14336, 32, 8, 8)


class Attention(nn.Module):
    def __init__(self, size: Size, causal: bool):
        super().__init__()
        self.size, self.causal = size, causal
        head = size.width // size.heads
        self.rows = [size.width, size.kv_heads * head, size.kv_heads * head]
        self.qkv = nn.Linear(size.width, sum(self.rows), bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def core(self, qkv, lengths):
        """Attention within items that are packed one behind the other."""
        out = []
        for item in qkv.split(list(lengths)):
            q, k, v = (t.view(1, len(item), heads, -1).transpose(1, 2)
                       for t, heads in zip(
                           item.split(self.rows, -1),
                           (self.size.heads, *[self.size.kv_heads] * 2)))
            # cuDNN's would be compiled anew for each length.
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                made = F.scaled_dot_product_attention(
                    q, k, v, is_causal=self.causal,
                    enable_gqa=self.size.kv_heads != self.size.heads)
            out.append(made.transpose(1, 2).reshape(len(item), -1))
        return torch.cat(out)

    def forward(self, x, context):
        return self.out(context.selective(self.core, self.qkv(x),
                                          context.sub.lengths))


class LargeBlock(nn.Module):
    """Pre-norm transformer block on packed tokens; gated if it is causal."""

    def __init__(self, size: Size, causal: bool):
        super().__init__()
        self.gated = causal
        self.norm1 = nn.LayerNorm(size.width)
        self.norm2 = nn.LayerNorm(size.width)
        self.attention = Attention(size, causal)
        self.up = nn.Linear(size.width, size.ffn * (2 if causal else 1),
                            bias=False)
        self.down = nn.Linear(size.ffn, size.width, bias=False)

    def forward(self, state, context):
        x = state[0] + self.attention(self.norm1(state[0]), context)
        inner = self.up(self.norm2(x))
        if self.gated:
            gate, value = inner.chunk(2, -1)
            inner = F.silu(gate) * value
        else:
            inner = F.gelu(inner)
        return (x + self.down(inner), *state[1:])


class LargeMerger(nn.Module):
    """Tokens of an image, four into one of the language model's width."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(MERGE * VISION.width, TEXT.width)
        self.down = nn.Linear(TEXT.width, TEXT.width)

    def forward(self, state, context):
        x = state[0][:context.sub.tokens].reshape(-1, MERGE * VISION.width)
        return (self.down(F.gelu(self.up(x))),)


def make_job(name: str, pinned: bool = False) -> job_pb2.Job:
    """The job on one H200; layout left to the planner, or `pinned`."""
    job = job_pb2.Job(name=name)
    for module_name, modality, size in (
            ("vision", job_pb2.MODALITY_IMAGE, VISION),
            ("text", job_pb2.MODALITY_TEXT, TEXT)):
        module = job.modules.add(name=module_name, modality=modality)
        first = (dict(kind=job_pb2.LAYER_KIND_PATCH_EMBED,
                      input_size=PATCH_VALUES) if module_name == "vision" else
                 dict(kind=job_pb2.LAYER_KIND_EMBEDDING, vocab_size=VOCAB))
        module.layers.add(count=1, hidden_size=size.width, **first)
        module.layers.add(
            kind=job_pb2.LAYER_KIND_TRANSFORMER, count=size.blocks,
            hidden_size=size.width, ffn_size=size.ffn, heads=size.heads,
            kv_heads=size.kv_heads, gated_ffn=module_name == "text",
            causal=module_name == "text")
        if module_name == "vision":
            module.layers.add(kind=job_pb2.LAYER_KIND_PROJECTOR, count=1,
                              hidden_size=size.width, ffn_size=TEXT.width,
                              input_size=TEXT.width)
        else:
            module.layers.add(kind=job_pb2.LAYER_KIND_LM_HEAD, count=1,
                              hidden_size=size.width, vocab_size=VOCAB)
        if pinned:
            entry = job.layout.modules.add(module=module_name,
                                           sub_microbatch_tokens=8192)
            entry.segments.add().chunks.add(rank=0, num_layers=size.blocks + 2)
    job.edges.add(producer="vision", consumer="text", tokens_merged=MERGE)
    job.parallelism.pipeline_parallel = 1
    job.data_type = job_pb2.DATA_TYPE_BF16
    job.max_microbatch_tokens.extend([16384, 8192])
    job.device.name = "H200-141GB"
    job.device.peak_flops_per_second = 989 * 10 ** 12
    job.device.memory_bandwidth_bytes_per_second = 4800 * 10 ** 9
    job.device.memory_bytes = 140 * 10 ** 9
    for link in (job.links.tensor_parallel, job.links.p2p_intra_node,
                 job.links.p2p_inter_node, job.links.host):
        link.latency_ns = 5000
        link.bandwidth_bytes_per_second = 50 * 10 ** 9
    can = job.executor
    can.split_backward = can.selective_recompute = can.full_recompute = True
    can.offload = True
    return job


def make_batch(job: job_pb2.Job, rng: random.Random, microbatches: int
               ) -> batch_pb2.BatchMetadata:
    """Microbatches of two documents with up to two images each."""
    builder = MetadataBuilder(job)
    made = []
    for _ in range(microbatches):
        grids, per_sample, lengths = [], [], []
        for _ in range(2):
            count = rng.randint(0, 2)
            tokens = rng.randint(200, 2000)
            for _ in range(count):
                h, w = 2 * rng.randint(8, 32), 2 * rng.randint(8, 32)
                grids.append((1, h, w))
                tokens += h * w // MERGE
            per_sample.append(count)
            lengths.append(tokens)
        made.append(builder.vlm_microbatch(lengths, grids, per_sample))
    return builder.batch(made)


class RandomData:
    """Random content of a batch's items, on the GPU."""

    def __init__(self, view: JobView, batch: batch_pb2.BatchMetadata):
        self._view = view
        self._batch = BatchView(view, batch)

    def __call__(self, module: int, microbatch: int, items: Sequence[int]):
        tokens = self._batch.microbatches[microbatch].item_tokens[module]
        if self._view.module_name(module) == "vision":
            return [torch.randn(tokens[i], PATCH_VALUES, device="cuda",
                                dtype=torch.bfloat16) for i in items]
        return [torch.randint(VOCAB, (2, tokens[i]), device="cuda").unbind(0)
                for i in items]


class Trainer:
    """All layers of the job on one GPU, an executor over them, and Adam."""

    def __init__(self, view: JobView, hooks: Hooks = None):
        torch.manual_seed(0)
        with torch.device("cuda"):
            layers = {"vision": [
                PatchEmbed(PATCH_VALUES, VISION.width),
                *(LargeBlock(VISION, False) for _ in range(VISION.blocks)),
                LargeMerger()], "text": [
                Embedding(VOCAB, TEXT.width),
                *(LargeBlock(TEXT, True) for _ in range(TEXT.blocks)),
                LmHead(VOCAB, TEXT.width, 1e-4)]}
        modules: List[PipelineModule] = []
        for m, module in enumerate(view.job.modules):
            mine = layers[module.name]
            for layer in mine:
                layer.to(torch.bfloat16)
            modules.append(PipelineModule(
                {(s, k): mine[c.first_layer:c.first_layer + c.num_layers]
                 for s, segment in enumerate(view.chunks[m])
                 for k, c in enumerate(segment)},
                {"vision": VISION, "text": TEXT}[module.name].width,
                output_width=TEXT.width))
        self._gradients = {}
        self.executor = PipelineExecutor(
            view, 0, modules, None, device="cuda", dtype=torch.bfloat16,
            options=ExecutorOptions(accumulate=self._accumulate), hooks=hooks)
        self._weights = self.executor.parameters()
        self._masters = [p.detach().float() for p in self._weights]
        for p, master in zip(self._weights, self._masters):
            master.grad = torch.zeros_like(master)
            self._gradients[p] = master.grad
        self._adam = torch.optim.Adam(self._masters, lr=1e-5, fused=True)
        self._adam.step()  # makes its moments

    def _accumulate(self, weight: nn.Parameter, gradient: torch.Tensor) -> None:
        self._gradients[weight] += gradient

    def optimizer_step(self) -> None:
        self._adam.step()
        with torch.no_grad():
            for p, master in zip(self._weights, self._masters):
                p.copy_(master)
                master.grad.zero_()
