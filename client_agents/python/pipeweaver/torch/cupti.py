"""Hooks that tell libpipeweaver_cupti.so where the trainer is.

The library measures kernels from inside the process; its interface is
profiler/cupti/pipeweaver_cupti.h. It does nothing where there is no GPU.
"""

import ctypes

from pipeweaver.torch.executor import Hooks


class CuptiHooks(Hooks):
    """Names steps and layers' passes to the library at `path`.

    Raises OSError when the library cannot be loaded.
    """

    def __init__(self, path: str):
        self._library = ctypes.CDLL(path)
        self._library.pw_cupti_step.argtypes = [ctypes.c_int64]
        self._library.pw_cupti_push.argtypes = [ctypes.c_char_p]
        self._library.pw_cupti_start()

    def step(self, step: int) -> None:
        self._library.pw_cupti_step(step)

    def layer_begin(self, annotation: str) -> None:
        self._library.pw_cupti_push(annotation.encode())

    def layer_end(self) -> None:
        self._library.pw_cupti_pop()
