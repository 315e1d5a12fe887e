"""A process that ends with the one that started it, in whatever way that ends."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here: between fork and exec little is allowed


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """The kernel sends this process `number` when the thread that started it ends, even killed.

    Linux only; elsewhere nothing happens. Callable between fork and exec.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
