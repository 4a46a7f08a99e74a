"""How tensors cross between pipeline ranks.

A transport posts without blocking and waits. Transfers are numbered within a
step, equally on both ranks; each rank's posts follow that order.
"""

import abc
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor


class Post(NamedTuple):
    """A send of `tensor`, or a receive into it. The tensor is contiguous."""
    send: bool
    peer: int
    transfer: int
    tensor: Tensor


class Transport(abc.ABC):
    """One rank's way to the others.

    The posts of a batch may end together only. That adds no way to hang: a rank
    that waits for a batch waits for transfers that it has posted, hence for none
    past the next that it will post; so of all transfers that are not over, the
    first one in the plan's order is posted on both ranks, and ends.
    """

    def connect(self, pairs: Sequence[Tuple[int, int]]) -> None:
        """Sets up what transfers between these pairs of ranks need. Every executor
        calls it when it is made, on all ranks with the same pairs, while no
        transfer is under way. May wait for the other ranks."""

    @abc.abstractmethod
    def post(self, posts: Sequence[Post], batched: bool) -> List[Any]:
        """Begins the posts in order, as one batch if `batched` and the transport
        knows batches. Never blocks. One handle each, for wait()."""

    @abc.abstractmethod
    def wait(self, handle: Any) -> None:
        """Until the transfer is over, or on a device until the stream may go
        on. Raises RuntimeError when it cannot end."""


# NCCL runs so many operations of a batch side by side, whatever their peers do.
_MOST_IN_A_BATCH = 8


class DistributedTransport(Transport):
    """torch.distributed point to point: gloo on hosts, NCCL on devices.

    ranks: global rank of each pipeline rank; default the same numbers. To be made
    on all ranks of the group at once: NCCL's communicator is set up here.
    """

    def __init__(self, ranks: Optional[Sequence[int]] = None,
                 group: Optional[dist.ProcessGroup] = None):
        self._ranks = list(ranks) if ranks is not None else None
        self._group = group
        self._by_tag = dist.get_backend(group) == "gloo"
        self._device = "cpu" if self._by_tag else "cuda"
        if not self._by_tag:
            dist.all_reduce(torch.zeros(1, device=self._device), group=group)

    def connect(self, pairs: Sequence[Tuple[int, int]]) -> None:
        """NCCL connects two ranks when they first meet, and holds up whoever
        comes first. In a step that may be for ever: the other one may be about to
        load a kernel, for which CUDA waits until a transfer that it has posted is
        over."""
        if self._by_tag:
            return
        me = dist.get_rank()
        operations = []
        received = []
        for a, b in ((self._global(a), self._global(b)) for a, b in pairs):
            if me not in (a, b):
                continue
            received.append(torch.zeros(1, device=self._device))
            operations += [
                dist.P2POp(dist.isend, torch.ones_like(received[-1]), a + b - me,
                           self._group),
                dist.P2POp(dist.irecv, received[-1], a + b - me, self._group)]
        if not operations:
            return
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        if any(t.item() != 1 for t in received):  # which waits for a device
            raise RuntimeError("connecting ranks: received something else than was "
                               "sent; executors must be made on all ranks at once, "
                               "while no transfer is under way")

    def post(self, posts: Sequence[Post], batched: bool) -> List[Any]:
        if self._by_tag:  # gloo matches by tag
            return [self._operation(p)(p.tensor, self._global(p.peer),
                                       group=self._group, tag=p.transfer)
                    for p in posts]
        # NCCL matches by order. Single operations go out as batches of one: torch
        # runs batches on the group's communicator and others on one of the pair,
        # and what is a batch here may not be one on the other rank.
        size = _MOST_IN_A_BATCH if batched else 1
        handles: List[Any] = []
        for i in range(0, len(posts), size):
            part = posts[i:i + size]
            works = dist.batch_isend_irecv([
                dist.P2POp(self._operation(p), p.tensor, self._global(p.peer),
                           self._group) for p in part])
            # There may be one handle for the whole batch.
            handles += works if len(works) == len(part) else (
                works[:1] * len(part))
        return handles

    @staticmethod
    def _operation(p: Post) -> Any:
        return dist.isend if p.send else dist.irecv

    def wait(self, handle: Any) -> None:
        handle.wait()

    def _global(self, peer: int) -> int:
        return peer if self._ranks is None else self._ranks[peer]


def flatten(tensors: Sequence[Tensor], dtype: torch.dtype, device: Any
            ) -> Tensor:
    """One message of several tensors; never empty, since transports differ on
    what they make of that."""
    tensors = [t.to(device, dtype).reshape(-1) for t in tensors if t.numel()]
    if not tensors:
        return torch.zeros(1, dtype=dtype, device=device)
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0].contiguous()


def unflatten(message: Tensor, shapes: Sequence[Sequence[int]]) -> List[Tensor]:
    """Views of the message, in place of the tensors it was made of."""
    tensors, at = [], 0
    for shape in shapes:
        size = 1
        for n in shape:
            size *= n
        tensors.append(message[at:at + size].view(tuple(shape)))
        at += size
    return tensors
