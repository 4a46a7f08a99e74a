"""What the CUPTI agent measured, read from its ring in shared memory.

The layout is that of profiler/cupti/record_ring.h, little-endian. Header, 4096
bytes, of which 64-bit words by index:

    0 the bytes "PWCUPTI1"   1 record_bytes (low half), state (high half)
    2 slots                  3 pid
    4 written                5 read
    6 dropped                7 lost_activities
    8 traced_steps           9 yields

Then `slots` records of 512 bytes; record n stands in slot n % slots. One process
writes, one reads.
"""

import dataclasses
import mmap
import os
import struct
import threading
import time
from typing import Callable, Dict, List, NamedTuple, Optional

from pipeweaver.profile import ProfileRecords
from pipeweaver.v1 import profile_pb2

_MAGIC = b"PWCUPTI1"
_HEADER_BYTES = 4096
_TEXT_BYTES = 232
_RECORD = struct.Struct(f"<qIIQQQQ{_TEXT_BYTES}s{_TEXT_BYTES}s")
_SLOTS, _PID, _WRITTEN, _READ = 2, 3, 4, 5
_DROPPED, _LOST, _YIELDS = 6, 7, 9
KERNEL, COPY = 1, 2


class Record(NamedTuple):
    """Times of all kernels of one name, or of all copies, under one annotation in
    one step on one device. There may be several: they add up."""
    step: int  # -1: outside every annotation
    kind: int  # KERNEL or COPY
    device: int
    count: int
    total_ns: int
    min_ns: int
    max_ns: int
    annotation: str
    name: str


def as_in_record(text: str) -> str:
    """What a record holds of a text: of one too long, the end is replaced by '~'
    and 16 hexadecimal digits of its FNV-1a hash."""
    data = text.encode()
    if len(data) >= _TEXT_BYTES:
        fnv = 0xcbf29ce484222325
        for byte in data:
            fnv = (fnv ^ byte) * 0x100000001b3 & 0xffffffffffffffff
        data = data[:_TEXT_BYTES - 18] + b"~%016x" % fnv
    return _text(data)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


class RingReader:
    """The reading end of the ring that this process's agent writes. Not
    thread-safe; one a ring."""

    def __init__(self, path: str):
        """Raises OSError where the file cannot be opened, ValueError where it is
        no ring, another process's, or one that other users could write or cut
        short."""
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            info = os.fstat(file)
            if info.st_uid != os.getuid():
                raise ValueError(f"{path}: belongs to user {info.st_uid}; must "
                                 f"belong to user {os.getuid()}")
            if info.st_mode & 0o077:
                raise ValueError(f"{path}: has mode {info.st_mode & 0o777:04o}; "
                                 "must be its owner's only, 0600")
            size = info.st_size
            if size <= _HEADER_BYTES:
                raise ValueError(f"{path}: is no ring of activity records")
            self._map = mmap.mmap(file, size)
        finally:
            os.close(file)
        # As found now: what the writer does later leads nowhere outside.
        self._num_slots = self._word(_SLOTS)
        record_bytes = struct.unpack_from("<I", self._map, 8)[0]
        if (self._map[:8] != _MAGIC or record_bytes != _RECORD.size or
                self._num_slots < 1 or self._num_slots !=
                (size - _HEADER_BYTES) // _RECORD.size):
            self._map.close()
            raise ValueError(f"{path}: is no ring of activity records")
        pid = self._word(_PID)
        if pid != os.getpid():
            self._map.close()
            raise ValueError(f"{path}: is the ring of process {pid}; must be of "
                             f"process {os.getpid()}")
        # Words are stored whole: the writer reads one of them.
        self._words = memoryview(self._map)[:_HEADER_BYTES].cast("Q")
        self._fence = threading.Lock()

    def _word(self, index: int) -> int:
        return struct.unpack_from("<Q", self._map, 8 * index)[0]

    def read(self) -> List[Record]:
        """All records that are there."""
        written, read = self._words[_WRITTEN], self._words[_READ]
        with self._fence:  # records are looked at after the count of them
            pass
        found = []
        for n in range(read, min(written, read + self._num_slots)):
            fields = _RECORD.unpack_from(
                self._map, _HEADER_BYTES + n % self._num_slots * _RECORD.size)
            found.append(Record(*fields[:7], _text(fields[7]),
                                _text(fields[8])))
        with self._fence:
            pass
        self._words[_READ] = written
        return found

    def lost(self) -> int:
        """Records and activities that never came, and times that tracing gave way,
        since the ring was made."""
        return (self._words[_DROPPED] + self._words[_LOST] +
                self._words[_YIELDS])

    def close(self) -> None:
        self._words.release()
        self._map.close()


@dataclasses.dataclass
class _Step:
    """Until a step is settled: its passes and its kernels' times by annotation."""
    passes: Dict[str, int] = dataclasses.field(default_factory=dict)
    kernel_ns: Dict[str, int] = dataclasses.field(default_factory=dict)
    ended_s: Optional[float] = None
    # False: not all its kernels' times will be known.
    whole: bool = True


class LayerTimes:
    """Puts kernels' times and the passes they belong to together: a profile of
    layers' passes, each as long as the kernels launched in it.

    Kernels are summed by step and annotation; how many passes they were of, the
    trainer knows. Collectives' kernels count like any other: with their waiting for
    other ranks, and whatever group they are of. When anything was lost, no step
    that is not settled says anything: which one it was of is not known.
    """

    def __init__(self, host: str, settle_s: float = 14.0,
                 clock: Callable[[], float] = time.monotonic):
        """settle_s: records of a step may come so long after it, in seconds. The
        agent takes in kernels for 2 s after it traced, writes every 2 s, and
        holds one whose annotation is not known yet for four writes more
        (grace_ms and kStragglers in profiler/cupti/agent.h): 2 + (4 + 1) * 2 s,
        and 2 s for a busy machine."""
        self._records = ProfileRecords("cupti_agent", host)
        self._settle_s = settle_s
        self._clock = clock
        self._steps: Dict[int, _Step] = {}
        self._step: Optional[_Step] = None
        self._lost = 0
        # Steps with kernels that were left out since they may not be whole.
        self.steps_left_out = 0

    def step(self, step: int) -> None:
        """A step begins, and the one before is over."""
        if self._step is not None:
            self._step.ended_s = self._clock()
        # Begun again before it is settled, its kernels are those of both times.
        self._step = self._steps[step] = _Step(whole=step not in self._steps)

    def layer(self, annotation: str) -> None:
        """A pass of the step begins."""
        if self._step is not None:
            passes = self._step.passes
            passes[annotation] = passes.get(annotation, 0) + 1

    def take(self, ring: RingReader, everything: bool = False
             ) -> Optional[profile_pb2.Profile]:
        """Reads the ring; a profile of the steps that are settled, or of all that
        have begun if nothing more will come. None: there is nothing new."""
        for record in ring.read():
            step = self._steps.get(record.step)
            if record.kind == KERNEL and step is not None:
                step.kernel_ns[record.annotation] = (
                    step.kernel_ns.get(record.annotation, 0) + record.total_ns)
        lost = ring.lost()
        if lost != self._lost:
            self._lost = lost
            for step in self._steps.values():
                step.whole = False
        now = self._clock()
        settled = [number for number, step in self._steps.items()
                   if everything or (step.ended_s is not None and
                                     now - step.ended_s >= self._settle_s)]
        for number in settled:
            self._settle(self._steps.pop(number))
        return self._records.take()

    def _settle(self, step: _Step) -> None:
        """Adds the passes of a whole step to the profile. Kernels under other
        texts than its passes' (an optimizer's) belong to no layer."""
        if not step.whole:
            self.steps_left_out += bool(step.kernel_ns)
            return
        for annotation, passes in step.passes.items():
            total_ns = step.kernel_ns.pop(as_in_record(annotation), 0)
            for i in range(passes if total_ns else 0):
                # Of equal passes the mean is known; it adds up to the total.
                self._records.add(annotation, total_ns * (i + 1) // passes -
                                  total_ns * i // passes)
