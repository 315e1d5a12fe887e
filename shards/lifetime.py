"""A process that ends with the one that started it, in whatever way that ends."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Loaded here: between fork and exec little is allowed.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def end_with_parent(number: signal.Signals | None = None) -> None:
    """The kernel sends this process `number` when the thread that started it ends, even killed.

    number: None for SIGKILL. Linux only; elsewhere nothing happens. Callable between fork and exec.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number or signal.SIGKILL, 0, 0, 0)
