"""What a rank checks of a program before it runs it.

The twin of client_agents/cc/program_check.h: that the program is whole, that it
is the one asked for, and that its columns mean something. Past what the C++
check covers, copies are followed too, since the executor really makes them.
"""

from dataclasses import dataclass
from typing import Dict, Tuple

from google.protobuf.message import DecodeError

from pipeweaver import digest
from pipeweaver.v1 import plan_pb2

FORWARD = plan_pb2.ACTION_KIND_FORWARD
BACKWARD = plan_pb2.ACTION_KIND_BACKWARD
INPUT_GRAD = plan_pb2.ACTION_KIND_INPUT_GRAD
WEIGHT_GRAD = plan_pb2.ACTION_KIND_WEIGHT_GRAD
POST_SEND = plan_pb2.ACTION_KIND_POST_SEND
POST_RECV = plan_pb2.ACTION_KIND_POST_RECV
WAIT_SEND = plan_pb2.ACTION_KIND_WAIT_SEND
WAIT_RECV = plan_pb2.ACTION_KIND_WAIT_RECV
OFFLOAD = plan_pb2.ACTION_KIND_OFFLOAD
RELOAD = plan_pb2.ACTION_KIND_RELOAD
WAIT_COPY = plan_pb2.ACTION_KIND_WAIT_COPY
GRADS_READY = plan_pb2.ACTION_KIND_GRADS_READY

COMPUTE = frozenset((FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD))
POSTS = frozenset((POST_SEND, POST_RECV))
WAITS = frozenset((WAIT_SEND, WAIT_RECV))
COPIES = frozenset((OFFLOAD, RELOAD, WAIT_COPY))

COLUMNS = ("sub_microbatch", "segment", "chunk", "choice", "transfer", "peer",
           "bytes", "edge_sub_microbatch", "start_delta_ns", "duration_ns",
           "gradient")


class BadProgram(ValueError):
    """A program that must not be run; the message names field, value, rule."""


@dataclass(frozen=True)
class CheckedProgram:
    """A program whose parts are parsed and checked."""
    program: plan_pb2.Program
    split: plan_pb2.BatchSplit
    actions: plan_pb2.ActionColumns

    @property
    def moved(self) -> bool:
        """Its microbatches are not (all) those that its replica submitted;
        `program.batch` has their sizes."""
        return self.program.HasField("moves")

    @property
    def origins(self) -> Tuple[Tuple[int, int], ...]:
        """(replica, microbatch) that submitted each microbatch of a program
        with moves; empty where nothing was moved."""
        moves = self.program.moves
        replica = self.program.identity.key.replica
        first = sum(moves.num_microbatches[:replica])
        last = sum(moves.num_microbatches[:replica + 1])
        return tuple(zip(moves.from_replica[first:last],
                         moves.from_microbatch[first:last]))

    def origin_of(self, microbatch: int) -> Tuple[int, int]:
        """(replica, microbatch) that submitted what the program calls
        `microbatch`: what a loader fetches, moved or not."""
        if self.moved:
            return self.origins[microbatch]
        return self.program.identity.key.replica, microbatch


def verify_digests(program: plan_pb2.Program) -> None:
    """Raises BadProgram unless actions, split, moves and batch are those of
    plan_digest, and the plan is its replica's where replicas name each
    other's."""
    if program.rank >= len(program.rank_digests):
        raise BadProgram(f"rank: {program.rank}, but the program lists "
                         f"{len(program.rank_digests)} ranks")
    if digest.sha256(program.actions) != program.rank_digests[program.rank]:
        raise BadProgram(
            f"actions: their SHA-256 is not rank_digests[{program.rank}]")
    expected = digest.plan_digest(program.identity, program.split,
                                  program.rank_digests)
    if expected != program.plan_digest:
        raise BadProgram(
            f"plan_digest: {program.plan_digest.hex()} is not the digest of "
            "identity, split and rank_digests")
    for name, wanted in (("moves", program.identity.moves_digest),
                         ("batch", program.identity.moved_batch_digest)):
        there = program.HasField(name)
        if there != bool(wanted) or there and digest.canonical_digest(
                getattr(program, name)) != wanted:
            raise BadProgram(f"{name}: {'set' if there else 'missing'}, and the "
                             f"identity's digest of it is '{wanted.hex()}'")
    plans = program.replica_plan_digests
    if not program.HasField("moves"):
        if plans or program.HasField("batch"):
            raise BadProgram("replica_plan_digests, batch: set in a program "
                             "without moves")
        return
    replica = program.identity.key.replica
    if (not program.HasField("batch") or replica >= len(plans) or
            plans[replica] != program.plan_digest):
        raise BadProgram(f"replica_plan_digests: of {len(plans)} replicas, "
                         f"replica {replica}'s must be plan_digest, and batch "
                         "be set")


def check_program(program: plan_pb2.Program, key: plan_pb2.PlanKey,
                  rank: int) -> CheckedProgram:
    """The checked program; raises BadProgram naming what is wrong."""
    if program.identity.key != key:
        raise BadProgram(f"identity.key: {_short(program.identity.key)}, "
                         f"asked for {_short(key)}")
    if program.rank != rank:
        raise BadProgram(f"rank: {program.rank}, asked for {rank}")
    verify_digests(program)
    split = plan_pb2.BatchSplit()
    actions = plan_pb2.ActionColumns()
    for message, data, name in ((split, program.split, "split"),
                                (actions, program.actions, "actions")):
        try:
            message.ParseFromString(data)
        except DecodeError:
            raise BadProgram(f"{name}: does not parse as "
                             f"{type(message).__name__}") from None
    _check_split(split)
    if program.HasField("moves"):
        _check_moves(program, split)
    _check_lengths(actions)
    _check_actions(actions, program, split)
    return CheckedProgram(program, split, actions)


def _short(key: plan_pb2.PlanKey) -> str:
    return f"{key.job}/{key.attempt}/{key.step}/{key.replica}"


def _broken(field: str, index: int, value: int, rule: str) -> BadProgram:
    return BadProgram(f"actions.{field}[{index}]: {value}: {rule}")


def _check_split(split: plan_pb2.BatchSplit) -> None:
    n = len(split.module)
    if not (len(split.microbatch) == len(split.num_items) ==
            len(split.tokens) == n):
        raise BadProgram("split: its columns must be of one length, one value "
                         "a sub-microbatch")
    items = sum(split.num_items)
    if items != len(split.items):
        raise BadProgram(f"split.items: {len(split.items)} values, must be the "
                         f"sum of num_items: {items}")


def _check_moves(program: plan_pb2.Program,
                 split: plan_pb2.BatchSplit) -> None:
    moves, plans = program.moves, program.replica_plan_digests
    counts = moves.num_microbatches
    if len(counts) != len(plans):
        raise BadProgram(f"moves.num_microbatches: {len(counts)} replicas, must "
                         f"be as many as replica_plan_digests: {len(plans)}")
    for r, plan in enumerate(plans):
        if len(plan) != 32:
            raise BadProgram(f"replica_plan_digests[{r}]: {len(plan)} bytes, "
                             "must be 32")
    places = sum(counts)
    if not len(moves.from_replica) == len(moves.from_microbatch) == places:
        raise BadProgram(
            f"moves.from_replica and from_microbatch: {len(moves.from_replica)} "
            f"and {len(moves.from_microbatch)} values, must be the sum of "
            f"num_microbatches: {places}")
    seen = set()
    for i, origin in enumerate(zip(moves.from_replica, moves.from_microbatch)):
        replica, microbatch = origin
        exists = replica < len(counts) and microbatch < counts[replica]
        if not exists or origin in seen:
            raise BadProgram(
                f"moves.from_microbatch[{i}]: {microbatch} of replica {replica}"
                f": {'stands in two places' if exists else 'does not exist'}")
        seen.add(origin)
    count = counts[program.identity.key.replica]
    if len(program.batch.microbatches) != count:
        raise BadProgram(
            f"batch.microbatches: {len(program.batch.microbatches)}, must be as "
            f"many as the replica trains on: {count}")
    for i, microbatch in enumerate(split.microbatch):
        if microbatch >= count:
            raise BadProgram(f"split.microbatch[{i}]: {microbatch}: must be "
                             f"below {count}")


def _check_lengths(actions: plan_pb2.ActionColumns) -> None:
    n = len(actions.kind)
    for name in COLUMNS:
        size = len(getattr(actions, name))
        if size != n:
            raise BadProgram(f"actions.{name}: {size} values, must be as many "
                             f"as kinds: {n}")


class _Pair:
    """Follows one stage pair through the program."""
    __slots__ = ("forward", "input_grad", "weight_grad", "choice", "copy",
                 "copying")

    def __init__(self) -> None:
        self.forward = self.input_grad = self.weight_grad = False
        self.choice = 0
        self.copy = 0  # the last of OFFLOAD and RELOAD
        self.copying = False


def _check_compute(kind: int, choice: int, i: int, pair: _Pair) -> None:
    if kind == FORWARD:
        if pair.forward:
            raise _broken("kind", i, kind, "the forward runs twice")
        pair.forward = True
        pair.choice = choice
        return
    if not pair.forward:
        raise _broken("kind", i, kind, "comes before its forward")
    if choice != pair.choice:
        raise _broken("choice", i, choice, "is not its forward's")
    if kind == WEIGHT_GRAD:
        if not pair.input_grad:
            raise _broken("kind", i, kind, "comes before its input gradient")
        if pair.weight_grad:
            raise _broken("kind", i, kind, "the weight gradient runs twice")
        pair.weight_grad = True
        return
    if pair.input_grad:
        raise _broken("kind", i, kind, "the backward runs twice")
    if pair.copy == OFFLOAD or pair.copying:
        raise _broken("kind", i, kind, "its activations are not back yet")
    pair.input_grad = True
    pair.weight_grad = kind == BACKWARD


def _check_copy(kind: int, i: int, pair: _Pair) -> None:
    if not pair.forward or pair.input_grad:
        raise _broken("kind", i, kind,
                      "a copy stands between a forward and its backward")
    if kind == WAIT_COPY:
        if not pair.copying:
            raise _broken("kind", i, kind, "waits for a copy not begun")
        pair.copying = False
        return
    if (kind == OFFLOAD) == (pair.copy == OFFLOAD):
        raise _broken("kind", i, kind, "offload and reload alternate")
    pair.copy = kind
    pair.copying = True


def _check_actions(a: plan_pb2.ActionColumns, program: plan_pb2.Program,
                   split: plan_pb2.BatchSplit) -> None:
    ranks = len(program.rank_digests)
    modules = list(split.module)
    sub_microbatches = len(modules)
    choices = {(c.module, c.segment, c.chunk): len(c.choices)
               for c in program.choices}
    pairs: Dict[Tuple[int, int, int], _Pair] = {}
    waiting: Dict[int, int] = {}  # transfer -> kind of its post
    last_transfer = -1
    for i, (kind, sub, segment, chunk, choice, transfer, peer, edge_sub
            ) in enumerate(zip(a.kind, a.sub_microbatch, a.segment, a.chunk,
                               a.choice, a.transfer, a.peer,
                               a.edge_sub_microbatch)):
        if not FORWARD <= kind <= GRADS_READY:
            raise _broken("kind", i, kind, "no such action")
        if sub >= sub_microbatches:
            raise _broken("sub_microbatch", i, sub,
                          f"must be below {sub_microbatches}")
        if edge_sub > sub_microbatches:
            raise _broken("edge_sub_microbatch", i, edge_sub,
                          f"must be at most {sub_microbatches}")
        num_choices = choices.get((modules[sub], segment, chunk))
        if num_choices is None:
            raise _broken("chunk", i, chunk,
                          "no chunk of `choices` is it, with module "
                          f"{modules[sub]} and segment {segment}")
        if kind == GRADS_READY:
            continue
        if kind in COMPUTE or kind in COPIES:
            if choice >= num_choices:
                raise _broken("choice", i, choice, "must be below its chunk's "
                              f"choices, {num_choices}")
            pair = pairs.setdefault((sub, segment, chunk), _Pair())
            if kind in COMPUTE:
                _check_compute(kind, choice, i, pair)
            else:
                _check_copy(kind, i, pair)
            continue
        if peer >= ranks or peer == program.rank:
            raise _broken("peer", i, peer,
                          f"must be another rank below {ranks}")
        if kind in POSTS:
            if transfer <= last_transfer:
                raise _broken("transfer", i, transfer,
                              "posts must be in ascending order of transfers")
            last_transfer = transfer
            waiting[transfer] = kind
            continue
        wanted = POST_SEND if kind == WAIT_SEND else POST_RECV
        if waiting.pop(transfer, None) != wanted:
            raise _broken("transfer", i, transfer, "waited for, but not posted")
    if waiting:
        raise BadProgram(f"actions.transfer: {min(waiting)}: posted, but never "
                         "waited for")
