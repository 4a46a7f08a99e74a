"""Digests of messages and plans, as job.proto and plan.proto define them.

The twin of proto/digest/digest.h.
"""

import hashlib
from typing import Iterable

from google.protobuf.message import Message

from pipeweaver.v1 import plan_pb2

# What a rank contributes to the agreement when it holds no plan.
NO_PLAN_TOKEN = 0


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def canonical_bytes(message: Message) -> bytes:
    """The form that a message's digest is taken over: no unknown fields."""
    copy = type(message)()
    copy.CopyFrom(message)
    copy.DiscardUnknownFields()
    return copy.SerializePartialToString(deterministic=True)


def canonical_digest(message: Message) -> bytes:
    return sha256(canonical_bytes(message))


def job_digest(job: Message) -> bytes:
    """Digest of a job without its layout."""
    copy = type(job)()
    copy.CopyFrom(job)
    copy.ClearField("layout")
    return canonical_digest(copy)


def plan_digest(identity: plan_pb2.PlanIdentity, split: bytes,
                rank_digests: Iterable[bytes]) -> bytes:
    return sha256(canonical_bytes(identity) + sha256(split) +
                  b"".join(rank_digests))


def agreement_digest(program: plan_pb2.Program) -> bytes:
    """What the ranks of all replicas agree on before they run programs whose
    microbatches were moved; empty for a program without moves."""
    if not program.HasField("moves"):
        return b""
    return sha256(program.identity.moves_digest +
                  b"".join(program.replica_plan_digests))


def digest_token(digest: bytes, bits: int = 63) -> int:
    """The leading `bits` of a digest, never NO_PLAN_TOKEN.

    63 bits fit a signed 64-bit reduction; a float32 one (a gradient norm's
    companion, say) holds 24 exactly, a float64 one 53.
    """
    if not 1 <= bits <= 63:
        raise ValueError(f"bits: {bits}, must be 1 to 63")
    token = int.from_bytes(digest[:8], "big") >> (64 - bits)
    return token or 1
