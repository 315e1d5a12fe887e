"""Many calls of one function, in any concurrent.futures executor, with a progress bar.

Shared by conversion and verification. An executor of somebody else's (a cluster's, say) works as
well as the default one; what is special about the default is that its processes never outlive their
parent, however that ends.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from typing import Any

from tqdm import tqdm

from headrace.shards.progress import progress_bar


class Runner:
    """Calls a function on many argument tuples in an executor, a bounded number at a time."""

    def __init__(self, executor: Executor, workers: int, progress: bool) -> None:
        self._executor = executor
        self._at_once = 2 * workers
        self._progress = progress

    def __call__(
        self, function: Callable[..., Any], tasks: Iterator[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """Results as they come, in any order.

        The first exception passes on, and what has not begun by then does not begin.
        """
        waiting: set[Future[Any]] = set()
        try:
            for task in tasks:
                waiting.add(self._executor.submit(function, *task))
                if len(waiting) >= self._at_once:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)

    def bar(self, what: str, total: int, done: int = 0, unit: str = "images") -> "tqdm[Any]":
        """A progress bar on stderr with rate and remaining time; `done` were there before."""
        return progress_bar(what, total, done=done, unit=unit, shown=self._progress)


def open_executor(workers: int) -> Executor:
    """Processes that end with this one; for one worker a thread, which starts at once."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    # spawn: forking a process that may have threads is not safe.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_begin_worker)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, also by `kill -9`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()
