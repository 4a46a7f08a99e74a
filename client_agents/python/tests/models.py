"""Small real multimodal models with their jobs, layouts and random batches.

The layers run under the executor and, on whole microbatches, in a plain model
in one process (reference_step), which shares nothing with the executor.
"""

import pathlib
import random
import sys
from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import nn

from pipeweaver.job import (
    BatchView, EdgeCrossing, JobView, SubMicrobatch)
from pipeweaver.torch import PipelineModule, StageContext
from pipeweaver.v1 import batch_pb2, job_pb2

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

from small_models import (  # noqa: E402
    Block, DitBlock, DitEmbed, DitHead, DitModule, Embedding, LmHead, Merger,
    PatchEmbed, Projector)

PATCH, MERGE, VOCAB = 6, 2, 50


K = job_pb2
_MODULES = {
    # modality, width, first layer, blocks, last layer
    "vision": (K.MODALITY_IMAGE, 8, 5),
    "audio": (K.MODALITY_AUDIO, 8, 3),
    "audio_proj": (K.MODALITY_UNSPECIFIED, 12, 0),
    "text": (K.MODALITY_TEXT, 12, 6),
    "dit": (K.MODALITY_VIDEO, 10, 5),
}
MODELS = {
    # modules, edges (producer, consumer, tokens merged)
    "vlm": (["vision", "text"], [("vision", "text", MERGE)]),
    "t2v": (["text", "dit"], [("text", "dit", 1)]),
    "omni": (["vision", "audio", "audio_proj", "text", "dit"],
             [("vision", "text", MERGE), ("audio", "audio_proj", MERGE),
              ("audio_proj", "text", 1), ("text", "dit", 1)]),
}


def build_layers(name: str, model: str) -> List[nn.Module]:
    _, width, blocks = _MODULES[name]
    if name in ("vision", "audio"):
        return [PatchEmbed(PATCH, width), *(Block(width, False) for _ in range(blocks)),
                Merger(width, 12, MERGE)]
    if name == "audio_proj":
        return [Projector(12)]
    if name == "text":
        layers = [Embedding(VOCAB, width), *(Block(width, True) for _ in range(blocks))]
        return layers + ([LmHead(VOCAB, width)] if model != "t2v" else [])
    return [DitEmbed(PATCH, width, 12), *(DitBlock(width, 12) for _ in range(blocks)),
            DitHead(PATCH, width)]


def make_job(model: str, ranks: int, frozen: Sequence[str] = (),
             v_placement: bool = False, name: str = "",
             buckets: Sequence[int] = ()) -> job_pb2.Job:
    names, edges = MODELS[model]
    job = K.Job(name=name or f"{model}-{ranks}")
    for module_name in names:
        modality, width, blocks = _MODULES[module_name]
        module = job.modules.add(name=module_name, modality=modality,
                                 frozen=module_name in frozen)

        def add(kind, count=1, **more):
            module.layers.add(kind=kind, count=count, hidden_size=width, **more)

        block = dict(ffn_size=2 * width, heads=2)
        if module_name in ("vision", "audio"):
            add(K.LAYER_KIND_PATCH_EMBED, input_size=PATCH)
            add(K.LAYER_KIND_TRANSFORMER, blocks, **block)
            add(K.LAYER_KIND_PROJECTOR, ffn_size=12, input_size=12)
        elif module_name == "audio_proj":
            add(K.LAYER_KIND_PROJECTOR, ffn_size=12, input_size=12)
        elif module_name == "text":
            add(K.LAYER_KIND_EMBEDDING, vocab_size=VOCAB)
            add(K.LAYER_KIND_TRANSFORMER, blocks, causal=True, **block)
            if model != "t2v":
                add(K.LAYER_KIND_LM_HEAD, vocab_size=VOCAB)
        else:
            add(K.LAYER_KIND_PATCH_EMBED, input_size=PATCH)
            add(K.LAYER_KIND_DIT, blocks, **block)
            add(K.LAYER_KIND_PROJECTOR, ffn_size=PATCH, input_size=PATCH)
    for producer, consumer, merged in edges:
        job.edges.add(producer=producer, consumer=consumer, tokens_merged=merged)
    job.parallelism.pipeline_parallel = ranks
    job.data_type = K.DATA_TYPE_FP32
    job.device.name = "H800-80GB"
    job.device.peak_flops_per_second = 989 * 10 ** 12
    job.device.memory_bandwidth_bytes_per_second = 3350 * 10 ** 9
    job.device.memory_bytes = 80 * 10 ** 9
    for link in (job.links.tensor_parallel, job.links.p2p_intra_node,
                 job.links.p2p_inter_node, job.links.host):
        link.latency_ns = 5000
        link.bandwidth_bytes_per_second = 25 * 10 ** 9
    executor = job.executor
    executor.split_backward = executor.selective_recompute = True
    executor.full_recompute = executor.offload = True
    executor.v_placement = executor.batched_p2p = True
    executor.shape_buckets.extend(buckets)
    for module_name, module in zip(names, job.modules):
        layers = sum(g.count for g in module.layers)
        entry = job.layout.modules.add(module=module_name,
                                       sub_microbatch_tokens=12)
        if module_name == "audio_proj":  # a short one, on one rank alone
            entry.segments.add().chunks.add(rank=ranks - 1, num_layers=layers)
            continue
        two = module_name in ("text", "dit") and layers >= 2 * ranks or v_placement
        cuts = [layers * i // (ranks * (2 if two else 1))
                for i in range(ranks * (2 if two else 1) + 1)]
        for s in range(2 if two else 1):
            segment = entry.segments.add()
            order = list(range(ranks))
            if s == 1 and v_placement:
                order.reverse()
            for i, rank in enumerate(order):
                a, b = cuts[s * ranks + i], cuts[s * ranks + i + 1]
                segment.chunks.add(rank=rank, first_layer=a, num_layers=b - a)
    return job


def make_batch(job: job_pb2.Job, rng: random.Random, microbatches: int,
               forward_only: bool = False) -> batch_pb2.BatchMetadata:
    """A random batch; some microbatches have no image, sound or clip."""
    index = {m.name: i for i, m in enumerate(job.modules)}
    batch = batch_pb2.BatchMetadata(forward_only=forward_only)
    for b in range(microbatches):
        mb = batch.microbatches.add()
        count = rng.randint(1, 3)
        texts = [rng.randint(2, 6) for _ in range(count)]
        for name in ("vision", "audio"):
            if name not in index or rng.random() < 0.3:
                continue
            sizes = [rng.randint(1, 7) for _ in range(rng.randint(1, 3))]
            uses = [rng.randrange(count) for _ in sizes]
            mb.items.add(module=index[name], tokens=sizes)
            for tokens, consumer in zip(sizes, uses):
                texts[consumer] += -(-tokens // MERGE)
            edge = next(i for i, e in enumerate(job.edges) if e.producer == (
                "audio_proj" if name == "audio" else name) and
                e.consumer == "text")
            mb.uses.add(edge=edge, producer_item=range(len(sizes)),
                        consumer_item=uses)
        mb.items.add(module=index["text"], tokens=texts)
        if "dit" not in index:
            continue
        only_text = "vision" in index and rng.random() < 0.3
        if only_text:
            continue
        clips = [rng.randint(2, 8) for _ in range(max(1, count - 1))]
        mb.items.add(module=index["dit"], tokens=clips)
        edge = next(i for i, e in enumerate(job.edges) if e.consumer == "dit")
        # Every text is consumed; the last clip takes what is left over.
        uses = [(i, min(i, len(clips) - 1)) for i in range(count)]
        # Some are consumed by two clips.
        uses += [(i, c) for i in range(count) for c in range(len(clips))
                 if (i, c) not in uses and rng.random() < 0.3]
        mb.uses.add(edge=edge, producer_item=[p for p, _ in uses],
                    consumer_item=[c for _, c in uses])
    return batch


class Data:
    """Random data of a batch, the same on every rank and device by its seed."""

    def __init__(self, job: JobView, batch: batch_pb2.BatchMetadata, seed: int,
                 dtype: torch.dtype, device: Any = "cpu"):
        generator = torch.Generator().manual_seed(seed)
        self.items: Dict[Tuple[int, int], List] = {}
        view = BatchView(job, batch)
        for b, mb in enumerate(view.microbatches):
            for m, tokens in enumerate(mb.item_tokens):
                made = []
                for n in tokens:
                    if job.module_name(m) == "text":
                        ids = torch.randint(VOCAB, (2, n),
                                            generator=generator).to(device)
                        made.append((ids[0], ids[1]))
                        continue
                    x = torch.randn(2, n, PATCH, generator=generator,
                                    dtype=torch.float64).to(device, dtype)
                    made.append((x[0], x[1]) if job.module_name(m) == "dit"
                                else x[0])
                self.items[b, m] = made

    def __call__(self, module: int, microbatch: int, items: Sequence[int]):
        return [self.items[microbatch, module][i] for i in items]


def build_model(job: JobView, model: str, seed: int, dtype: torch.dtype,
                device: Any = "cpu") -> List[List[nn.Module]]:
    """All layers of all modules, [module][layer]."""
    torch.manual_seed(seed)
    layers = [build_layers(m.name, model) for m in job.job.modules]
    for module, mine in zip(job.job.modules, layers):
        for layer in mine:
            layer.to(device, dtype)
            layer.requires_grad_(not module.frozen)
    return layers


def pipeline_modules(job: JobView, layers: List[List[nn.Module]], rank: int
                     ) -> List[PipelineModule]:
    modules = []
    for m, name in enumerate(x.name for x in job.job.modules):
        chunks = {}
        for s, segment in enumerate(job.chunks[m]):
            for k, chunk in enumerate(segment):
                if chunk.rank == rank:
                    chunks[s, k] = layers[m][
                        chunk.first_layer:chunk.first_layer + chunk.num_layers]
        width = _MODULES[name][1]
        if name == "dit":
            modules.append(DitModule(chunks, width, 12, job.upstream[m]))
        else:
            modules.append(PipelineModule(chunks, width, output_width=12))
    return modules


def reference_step(job: JobView, layers: List[List[nn.Module]],
                   batch: batch_pb2.BatchMetadata, data: Data) -> torch.Tensor:
    """The plain model: whole microbatches, one graph, no pipeline."""
    view = BatchView(job, batch)
    total = None
    for b, mb in enumerate(view.microbatches):
        subs = [SubMicrobatch(m, m, b, tuple(range(len(t))), tuple(t))
                for m, t in enumerate(mb.item_tokens)]
        outputs: Dict[int, torch.Tensor] = {}
        for m in job.order:
            if not subs[m].items:
                continue
            crossings = whole_crossings(job, mb, m)
            state = tuple(torch.cat([outputs[x.edge.producer].split(
                rows_of(x.edge, mb.item_tokens[x.edge.producer]))[i]
                for i in x.items]) for x in crossings)
            context = StageContext(subs[m], 0, 0, crossings,
                                   lambda m=m: data(m, b, subs[m].items), False)
            for layer in layers[m]:
                state = layer(state, context)
            for loss in context._losses:
                total = loss if total is None else total + loss
            if state:
                outputs[m] = state[0]
    return total


def rows_of(edge, tokens):
    return [edge.rows(n) for n in tokens]


def whole_crossings(job, mb, module):
    """What crosses into a module when microbatches are not split."""
    found = []
    for edge in job.inputs[module]:
        uses = tuple(sorted(mb.uses[edge.index]))
        if not uses:
            continue
        items = tuple(sorted({p for p, _ in uses}))
        rows = tuple(edge.rows(mb.item_tokens[edge.producer][p]) for p in items)
        found.append(EdgeCrossing(edge, edge.producer, module, items, rows, uses))
    return found
