"""What compiles the kernels says so: the first run on a machine would otherwise look stuck."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event


@contextmanager
def told_of_compiling(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `say` gets a line when the fused engine's kernels begin to be compiled, and another
    one when that is done. It is called from the threads that compile."""
    with event.install_listener("numba:compile", _Listener(say)):
        yield


class _Listener(event.Listener):
    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._began: float | None = None

    def on_start(self, event: Any) -> None:
        if self._began is None and _is_kernel(event.data["dispatcher"]):
            self._began = time.monotonic()
            self._say("compiling the fused engine for this processor, once: about a minute")

    def on_end(self, event: Any) -> None:
        if self._began is not None and _is_kernel(event.data["dispatcher"]):
            self._say(f"compiled in {time.monotonic() - self._began:.0f} s")
            self._began = None


def _is_kernel(dispatcher: Any) -> bool:
    """Not one of the small functions that a Plan is drawn with, nor what kernels are made of."""
    function = dispatcher.py_func
    return function.__module__.endswith("engines.fused.render") and function.__name__ == "render"
