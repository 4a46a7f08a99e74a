"""How tensors cross between pipeline ranks.

A transport posts without blocking and waits. Transfers are numbered within a
step, equally on both ranks; each rank's posts follow that order.
"""

import abc
from typing import Any, List, NamedTuple, Optional, Sequence

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
    """One rank's way to the others."""

    @abc.abstractmethod
    def post(self, posts: Sequence[Post], batched: bool) -> List[Any]:
        """Begins the posts in order, as one batch if `batched` and the transport
        knows batches. Never blocks. One handle each, for wait()."""

    @abc.abstractmethod
    def wait(self, handle: Any) -> None:
        """Until the transfer is over, or on a device until the stream may go
        on. Raises RuntimeError when it cannot end."""


class DistributedTransport(Transport):
    """torch.distributed point to point: gloo on hosts, NCCL on devices.

    ranks: global rank of each pipeline rank; default the same numbers.
    """

    def __init__(self, ranks: Optional[Sequence[int]] = None,
                 group: Optional[dist.ProcessGroup] = None):
        self._ranks = list(ranks) if ranks is not None else None
        self._group = group
        self._by_tag = dist.get_backend(group) == "gloo"

    def post(self, posts: Sequence[Post], batched: bool) -> List[Any]:
        if batched and not self._by_tag and len(posts) > 1:
            ops = [dist.P2POp(dist.isend if p.send else dist.irecv, p.tensor,
                              self._global(p.peer), self._group) for p in posts]
            works = dist.batch_isend_irecv(ops)
            # NCCL answers with one handle for the whole batch.
            return works if len(works) == len(posts) else works * len(posts)
        return [self._post(p) for p in posts]

    def _post(self, p: Post) -> Any:
        # Gloo matches by tag, NCCL by order.
        tag = p.transfer if self._by_tag else 0
        begin = dist.isend if p.send else dist.irecv
        return begin(p.tensor, self._global(p.peer), group=self._group, tag=tag)

    def wait(self, handle: Any) -> None:
        handle.wait()

    def _global(self, peer: int) -> int:
        return peer if self._ranks is None else self._ranks[peer]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One message of several tensors; never empty, since transports differ on
    what they make of that."""
    if len(tensors) == 1 and tensors[0].numel():
        return tensors[0].contiguous().view(-1)
    if not any(t.numel() for t in tensors):
        like = tensors[0] if tensors else torch.zeros(1)
        return torch.zeros(1, dtype=like.dtype, device=like.device)
    return torch.cat([t.reshape(-1) for t in tensors])


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
