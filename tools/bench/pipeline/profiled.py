"""What the interpreter costs the fused engine: CPU time of the process outside of compiled calls.

The three calls in which a picture is made (libjpeg-turbo's decoder, `render`, `mix`) are timed on
the clock of the thread that makes them. All other time of the process is the interpreter's: reading
the store, drawing and lowering plans with numpy, queues, and the loop that takes the batches.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import simplejpeg

from headrace.pipelines.engines.fused import engine as fused


def interpreter_share(batches: Iterator[Any], seconds: float) -> float:
    """Of the CPU time that this process uses while it takes `batches`, what is not compiled."""
    taken: list[float] = []  # appending is atomic

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*arguments, **options)
            finally:
                taken.append(time.thread_time() - started)

        return timed

    places = ((simplejpeg, "decode_jpeg"), (fused, "render"), (fused, "mix"))
    calls = [getattr(module, name) for module, name in places]
    for (module, name), call in zip(places, calls, strict=True):
        setattr(module, name, counted(call))
    try:
        next(batches)
        taken.clear()
        used, deadline = time.process_time(), time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            next(batches)
        return 1 - sum(taken) / (time.process_time() - used)
    finally:
        for (module, name), call in zip(places, calls, strict=True):
            setattr(module, name, call)
