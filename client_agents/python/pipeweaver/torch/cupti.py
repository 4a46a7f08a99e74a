"""Hooks that tell libpipeweaver_cupti.so where the trainer is, and bring what it
measured to the planner.

The library measures kernels from inside the process; its interface is
profiler/cupti/pipeweaver_cupti.h. It does nothing where there is no GPU.
"""

import ctypes
import glob
import logging
import os
import platform
from typing import Callable, Optional

from pipeweaver.cupti_ring import LayerTimes, RingReader
from pipeweaver.torch.executor import Hooks
from pipeweaver.v1 import profile_pb2

logger = logging.getLogger("pipeweaver")

_OFF = 0  # PW_CUPTI_OFF


class CuptiHooks(Hooks):
    """Names steps and layers' passes to the library at `path`.

        hooks = CuptiHooks(path, upload=agent.upload_profile)

    With `upload`, every step hands it the layers' times that have become known,
    as a profile, if there are any; it must not block. Where the agent is off, or
    its ring cannot be trusted, there are none. Call close() at the end.
    Not thread-safe.
    """

    def __init__(self, path: str,
                 upload: Optional[Callable[[profile_pb2.Profile], None]] = None):
        """Raises OSError when the library cannot be loaded."""
        self._library = ctypes.CDLL(path)
        self._library.pw_cupti_step.argtypes = [ctypes.c_int64]
        self._library.pw_cupti_push.argtypes = [ctypes.c_char_p]
        self._library.pw_cupti_start()
        self._upload = upload
        self._times = LayerTimes(platform.node())
        self._ring: Optional[RingReader] = None
        # An agent that is off says why on stderr; the file that its ring would have
        # replaced may be there.
        if upload is not None and self.state() != _OFF:
            self._ring = _open_ring()

    def step(self, step: int) -> None:
        self._library.pw_cupti_step(step)
        if self._ring is not None:
            self._times.step(step)
            self._forward(everything=False)

    def layer_begin(self, annotation: str) -> None:
        if self._ring is not None:
            self._times.layer(annotation)
        self._library.pw_cupti_push(annotation.encode())

    def layer_end(self) -> None:
        self._library.pw_cupti_pop()

    def state(self) -> int:
        """The agent's, a pw_cupti_state."""
        return self._library.pw_cupti_status(None, ctypes.c_size_t(0))

    def detach(self) -> None:
        """To be called before torch.profiler or another CUPTI client begins,
        which else loses what it traces in the step at hand. torch.profiler keeps
        CUPTI when it is over, so that the agent stays out of its way for good,
        unless TEARDOWN_CUPTI=1 is in the environment."""
        self._library.pw_cupti_detach()

    def attach(self) -> None:
        """The other client is over: tracing goes on, if CUPTI is free."""
        self._library.pw_cupti_attach()

    def close(self) -> None:
        """Ends the measuring, and hands over what is left."""
        self._library.pw_cupti_stop()
        if self._ring is not None:
            self._forward(everything=True)
            self._ring.close()
            self._ring = None

    def _forward(self, everything: bool) -> None:
        profile = self._times.take(self._ring, everything)
        if profile is not None:
            self._upload(profile)


def _open_ring() -> Optional[RingReader]:
    """The ring of this process's agent; None: there is none to be trusted."""
    path = os.environ.get("PIPEWEAVER_CUPTI_RING", "")
    # Names end in the time of making: the newest first.
    paths = [path] if path else sorted(glob.glob(
        f"/dev/shm/pipeweaver-cupti-{os.getuid()}-{os.getpid()}-*"),
        reverse=True)
    for path in paths:
        try:
            return RingReader(path)
        except (OSError, ValueError) as error:
            logger.warning("a ring of layers' times is not read: %s", error)
    return None
