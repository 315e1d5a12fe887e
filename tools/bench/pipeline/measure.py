"""Runs the rows of `bench_pipeline.py` in alternating rounds, each in its own process."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from headrace.tools.bench.pipeline.result import Result
from headrace.tools.bench.pipeline.row_process import Member, MemberError
from headrace.tools.bench.pipeline.task import OWN_ENGINES, CannotExpress, Task

DRAW_SECONDS = 0.5
PROFILE_SECONDS = 2.0
EPOCH_BATCHES = 4  # in each of many small epochs
OPEN_SECONDS, SETTLE_SECONDS = 8.0, 2.0  # first guesses, for the time that is left
SLOW_BY_AT_MOST = 10  # before a row that was measured once is given up

T = TypeVar("T")


@dataclass(frozen=True)
class Rounds:
    """How long is measured. epochs: for memory, of the fused engine; 0 for not at all."""

    count: int
    seconds: float
    epochs: int = 0


class Progress:
    """A line on stderr per step, with the time that is left."""

    def __init__(self, rows: int, rounds: Rounds) -> None:
        self._left = {"open": rows, "run": rows * rounds.count}
        self._steps = sum(self._left.values())
        self._guess = {"open": OPEN_SECONDS, "run": rounds.seconds + SETTLE_SECONDS}
        self._taken: dict[str, list[float]] = {"open": [], "run": []}

    @contextmanager
    def step(self, kind: str, what: str) -> Iterator[None]:
        done = self._steps - sum(self._left.values()) + 1
        left = sum(count * self._expected(one) for one, count in self._left.items())
        when = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
        say(f"[{done}/{self._steps}, about {when} left] {what}")
        started = time.monotonic()
        yield
        self._taken[kind].append(time.monotonic() - started)
        self._left[kind] -= 1

    def skip(self, runs: int) -> None:
        """A row without a result needs no rounds."""
        self._left["run"] -= runs

    def _expected(self, kind: str) -> float:
        taken = self._taken[kind]
        return sum(taken) / len(taken) if taken else self._guess[kind]


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def measure(
    tasks: Sequence[Task], rounds: Rounds, directory: Path, progress: Progress
) -> list[Result]:
    """All rows of one recipe and one number of threads, alive together. Logs go to `directory`."""
    results = [Result(task) for task in tasks]
    with ExitStack() as stack:
        alive: list[tuple[Result, Member]] = []
        for number, result in enumerate(results):
            with progress.step("open", f"opening {result.task.called}"):
                member = _open(result, directory / f"row{number}.log")
            if member is None:
                progress.skip(rounds.count)
            else:
                stack.callback(member.close)
                alive.append((result, member))
        for number in range(rounds.count):
            for result, member in alive if number % 2 == 0 else alive[::-1]:
                if result.failed:
                    progress.skip(1)
                    continue
                what = f"round {number + 1} of {rounds.count}: {result.task.called}"
                with progress.step("run", what):
                    answer = _try(result, lambda member=member: member.run(rounds.seconds))
                if answer is not None:
                    result.add_round(answer)
        for result, member in alive:
            result.peak = member.peak_memory
            if result.task.engine in OWN_ENGINES and not result.failed:
                result.plan_seconds_per_image = _try(
                    result, lambda member=member: member.draw(DRAW_SECONDS)
                )
            if result.task.engine == "fused" and not result.failed:
                result.interpreter_share = _try(
                    result, lambda member=member: member.profile(PROFILE_SECONDS)
                )
    for result in results:
        if rounds.epochs and result.measured and result.task.engine == "fused":
            _measure_epochs(result, rounds.epochs, directory / "epochs.log")
    return results


def _open(result: Result, log: Path) -> Member | None:
    """The row's process with its first batch behind it."""
    if result.task.engine in OWN_ENGINES:
        # Once for nothing, so that kernels are compiled and in their cache.
        member = _opened(result, log)
        if member is None:
            return None
        member.close()
    return _opened(result, log)


def _opened(result: Result, log: Path) -> Member | None:
    member = Member(result.task, log)
    try:
        opened = _try(result, member.open)
    except BaseException:
        member.close()
        raise
    if opened is None:
        member.close()
        return None
    result.import_seconds = opened["import_seconds"]
    result.first_batch_seconds = opened["first_batch_seconds"]
    result.notes = opened["notes"]
    return member


def _measure_epochs(result: Result, epochs: int, log: Path) -> None:
    """Anonymous memory of a fresh process after each of many small epochs."""
    task = result.task
    if task.output != "float32":
        return
    few = min(task.samples, EPOCH_BATCHES * task.batch_size)
    say(f"{epochs} epochs of {few:,} images, for memory: {task.called}")
    member = Member(replace(task, samples=few), log)
    try:
        if _try(result, member.open) is not None:
            within = 60 + SLOW_BY_AT_MOST * epochs * few / result.rate
            found = _try(result, lambda: member.epochs(epochs, within))
            result.anonymous_by_epoch = found or []
    finally:
        member.close()


def _try(result: Result, act: Callable[[], T]) -> T | None:
    """None, and the reason in `result`, where the row cannot be or failed."""
    try:
        return act()
    except CannotExpress as reason:
        result.cannot = str(reason)
    except MemberError as error:
        result.failed = str(error)
    return None
