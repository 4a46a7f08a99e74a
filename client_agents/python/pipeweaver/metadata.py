"""Batch metadata from what a data loader has in its hands.

Takes lengths and grids as Hugging Face processors and Qwen-VL style packing
make them (`image_grid_thw`, `video_grid_thw`, `cu_seqlens`), never pixels.
Values may be lists, numpy arrays or tensors.
"""

from collections import deque
from typing import Any, List, Optional, Sequence, Tuple

from pipeweaver.v1 import batch_pb2, job_pb2


def _ints(values: Any) -> List[Any]:
    if values is None:
        return []
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(values)


class MetadataBuilder:
    """Builds a step's BatchMetadata for one job.

        builder = MetadataBuilder(job)
        step = builder.batch(builder.vlm_microbatch(...) for each microbatch)

    Modules are found by modality: one text module, one that takes images and
    videos, at most one for audio. Give names where the job has several.
    """

    def __init__(self, job: job_pb2.Job, text: str = "", vision: str = "",
                 audio: str = "", video: str = ""):
        self._job = job
        self._index = {m.name: i for i, m in enumerate(job.modules)}
        self._text = self._find(text, job_pb2.MODALITY_TEXT)
        self._vision = self._find(vision, job_pb2.MODALITY_IMAGE)
        self._audio = self._find(audio, job_pb2.MODALITY_AUDIO)
        self._video = self._find(video, job_pb2.MODALITY_VIDEO)

    def _find(self, name: str, modality: int) -> Optional[int]:
        if name:
            if name not in self._index:
                raise ValueError(f"module {name!r}: not in the job")
            return self._index[name]
        found = [i for i, m in enumerate(self._job.modules)
                 if m.modality == modality]
        if len(found) > 1:
            names = [self._job.modules[i].name for i in found]
            raise ValueError(f"modules {names} have the same modality: name "
                             "the one to use")
        return found[0] if found else None

    def _path(self, producer: int, consumer: int) -> Tuple[int, int]:
        """Edge into `consumer` by which the producer's items reach it, past
        modules that take over items, and producer tokens for one there."""
        # Breadth first: the fewest edges, then the first in the job's order.
        reached = {producer}
        queue = deque([(producer, 1)])
        while queue:
            at, so_far = queue.popleft()
            for i, e in enumerate(self._job.edges):
                if self._index[e.producer] != at:
                    continue
                to = self._index[e.consumer]
                merged = so_far * (e.tokens_merged or 1)
                if to == consumer:
                    return i, merged
                if to not in reached and self._job.modules[to].modality == (
                        job_pb2.MODALITY_UNSPECIFIED):
                    reached.add(to)
                    queue.append((to, merged))
        raise ValueError(
            f"edges: none leads from {self._job.modules[producer].name!r} to "
            f"{self._job.modules[consumer].name!r}")

    @staticmethod
    def text_lengths(attention_mask: Any = None, cu_seqlens: Any = None
                     ) -> List[int]:
        """Tokens of each sample, from a mask [samples, length] or from packed
        sequence bounds (0, n0, n0 + n1, ...)."""
        if cu_seqlens is not None:
            bounds = _ints(cu_seqlens)
            return [b - a for a, b in zip(bounds, bounds[1:]) if b > a]
        return [sum(1 for v in row if v) for row in _ints(attention_mask)]

    @staticmethod
    def counts_from_input_ids(input_ids: Any, start_token: int,
                              cu_seqlens: Any = None) -> List[int]:
        """How many images (or videos, or sounds) each sample holds: how often
        the token that opens one stands in it. input_ids: [samples, length],
        or packed [length] with cu_seqlens."""
        ids = _ints(input_ids)
        if cu_seqlens is not None:
            if ids and isinstance(ids[0], list):
                ids = ids[0]
            bounds = _ints(cu_seqlens)
            ids = [ids[a:b] for a, b in zip(bounds, bounds[1:]) if b > a]
        return [row.count(start_token) for row in ids]

    def vlm_microbatch(self, text_lengths: Any, image_grid_thw: Any = None,
                       images_per_sample: Any = None, video_grid_thw: Any = None,
                       videos_per_sample: Any = None, audio_tokens: Any = None,
                       audios_per_sample: Any = None) -> batch_pb2.Microbatch:
        """A microbatch of text samples with images, videos and sounds in them.

        text_lengths: tokens of each sample as the backbone sees it, those of
        images included. *_grid_thw: rows (frames, height, width) in patches.
        *_per_sample: which belong to which sample, in order; may be left out
        when there is one sample. Raises ValueError naming what does not fit.
        """
        lengths = _ints(text_lengths)
        mb = batch_pb2.Microbatch()
        left = [int(n) for n in lengths]
        vision = [t * h * w for t, h, w in _ints(image_grid_thw)]
        owners = self._owners("images_per_sample", images_per_sample,
                              len(vision), len(lengths))
        clips = [t * h * w for t, h, w in _ints(video_grid_thw)]
        owners += self._owners("videos_per_sample", videos_per_sample,
                               len(clips), len(lengths))
        self._add_producer(mb, self._vision, "images", vision + clips, owners,
                           left)
        sounds = _ints(audio_tokens)
        self._add_producer(mb, self._audio, "sounds", sounds, self._owners(
            "audios_per_sample", audios_per_sample, len(sounds), len(lengths)),
            left)
        if lengths:
            mb.items.add(module=self._require(self._text, "text"),
                         tokens=[int(n) for n in lengths])
        return mb

    def t2v_microbatch(self, text_lengths: Any, frames: Any, height: Any,
                       width: Any) -> batch_pb2.Microbatch:
        """Clips, each with its prompt. The video module has a token grid."""
        text = self._require(self._text, "text")
        video = self._require(self._video, "videos")
        mb = batch_pb2.Microbatch()
        count = len(_ints(text_lengths))
        if not count == len(_ints(frames)) == len(_ints(height)) == len(
                _ints(width)):
            raise ValueError("text_lengths, frames, height, width: must have "
                             "one value a clip")
        if count:
            mb.items.add(module=text, tokens=_ints(text_lengths))
            mb.items.add(module=video, frames=_ints(frames),
                         height=_ints(height), width=_ints(width))
            edge, _ = self._path(text, video)
            mb.uses.add(edge=edge, producer_item=range(count),
                        consumer_item=range(count))
        return mb

    @staticmethod
    def batch(microbatches: Sequence[batch_pb2.Microbatch],
              forward_only: bool = False) -> batch_pb2.BatchMetadata:
        return batch_pb2.BatchMetadata(microbatches=microbatches,
                                       forward_only=forward_only)

    @staticmethod
    def _owners(name: str, per_sample: Any, count: int, samples: int
                ) -> List[int]:
        if per_sample is None:
            if count and samples != 1:
                raise ValueError(f"{name}: needed with {samples} samples")
            return [0] * count
        owners = [i for i, n in enumerate(_ints(per_sample)) for _ in range(n)]
        if len(owners) != count or len(_ints(per_sample)) != samples:
            raise ValueError(f"{name}: {_ints(per_sample)}, must give {count} "
                             f"items to {samples} samples")
        return owners

    def _require(self, module: Optional[int], what: str) -> int:
        if module is None:
            raise ValueError(f"the job has no module that takes {what}")
        return module

    def _add_producer(self, mb: batch_pb2.Microbatch, module: Optional[int],
                      what: str, tokens: List[int], owners: List[int],
                      left: List[int]) -> None:
        if not tokens:
            return
        module = self._require(module, what)
        edge, merged = self._path(module, self._require(self._text, "text"))
        for i, (n, owner) in enumerate(zip(tokens, owners)):
            left[owner] -= -(-n // merged)
            if left[owner] < 0:
                raise ValueError(
                    f"text_lengths[{owner}]: shorter than the tokens of its "
                    f"{what} (at number {i})")
        mb.items.add(module=module, tokens=tokens)
        mb.uses.add(edge=edge, producer_item=range(len(tokens)),
                    consumer_item=owners)
