"""The agent's few exchanges between ranks, over torch.distributed.

They send tensors on the host: a group must be on gloo, and may be left out only where
the default group is. Sources are global ranks.

A trainer that reduces something small at the end of a step anyway (found-inf, a
gradient norm) adds the two values of StepAgent.vote() there and needs agree()
not at all.
"""

from typing import Any, List, Optional

import torch
import torch.distributed as dist

from pipeweaver.agent import Registration, StepAgent, StepProgram
from pipeweaver.program import check_program
from pipeweaver.v1 import batch_pb2, plan_pb2


def agree(agent: StepAgent, step: int,
          group: Optional[dist.ProcessGroup] = None,
          all_replicas: Optional[dist.ProcessGroup] = None) -> str:
    """Votes and settles: 16 bytes a rank, in one reduction on the host.

    group: the replica's pipeline ranks, on a backend for hosts (gloo).
    all_replicas: the pipeline ranks of all replicas; needed where the agent's
    options let microbatches move, and then reduced over, too, in every step.
    """
    if agent.options.move_microbatches and all_replicas is None:
        raise ValueError("all_replicas: None, must be the group of all "
                         "replicas' pipeline ranks where move_microbatches is "
                         "set")
    votes = _extremes(agent.vote(step), group)
    if agent.options.move_microbatches:
        votes += _extremes(agent.vote_everywhere(step), all_replicas)
    return agent.settle(step, *votes)


def _extremes(token: int, group: Optional[dist.ProcessGroup]) -> List[int]:
    """MIN and MAX over the group."""
    both = torch.tensor([token, -token], dtype=torch.int64)
    dist.all_reduce(both, op=dist.ReduceOp.MIN, group=group)
    return [int(both[0]), -int(both[1])]


def broadcast_bytes(data: Optional[bytes], source: int,
                    group: Optional[dist.ProcessGroup] = None) -> bytes:
    """`data` of the global rank `source` on all ranks of a host group; what other
    ranks give is not looked at. Raises ValueError where the source has None."""
    mine = dist.get_rank() == source
    if mine and data is None:
        raise ValueError(f"data: None, must be bytes on rank {source}, the source")
    size = torch.tensor([len(data) if mine else 0])
    dist.broadcast(size, source, group=group)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if mine:
        memoryview(buffer.numpy())[:] = data
    if int(size):
        dist.broadcast(buffer, source, group=group)
    return buffer.numpy().tobytes()


def broadcast_metadata(metadata: Optional[batch_pb2.BatchMetadata], source: int,
                       group: Optional[dist.ProcessGroup] = None
                       ) -> batch_pb2.BatchMetadata:
    """A step's metadata from the rank that loads it to the other ranks."""
    data = metadata.SerializeToString() if metadata is not None else None
    return batch_pb2.BatchMetadata.FromString(
        broadcast_bytes(data, source, group))


def broadcast_registration(registration: Optional[Registration], source: int,
                           group: Optional[dist.ProcessGroup] = None
                           ) -> Registration:
    data = registration.to_bytes() if registration is not None else None
    return Registration.from_bytes(broadcast_bytes(data, source, group))


def share_program(program: Optional[StepProgram], source: int,
                  prepare: Any = None,
                  group: Optional[dist.ProcessGroup] = None) -> StepProgram:
    """A step's program from the tensor- or context-parallel peer that runs the
    agent to its peers; `prepare(checked)` compiles it for theirs."""
    data = None
    if program is not None:
        data = (program.origin.encode() + b"\0" +
                program.checked.program.SerializeToString())
    data = broadcast_bytes(data, source, group)
    if dist.get_rank() == source:
        return program
    origin, _, data = data.partition(b"\0")
    message = plan_pb2.Program.FromString(data)
    checked = check_program(message, message.identity.key, message.rank)
    return StepProgram(origin.decode(), checked,
                       prepare(checked) if prepare is not None else None)
