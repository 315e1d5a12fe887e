"""Runs the rows of `bench_pipeline.py` in alternating rounds, each in its own process."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from headrace.tools.bench.pipeline.result import Result
from headrace.tools.bench.pipeline.row_process import RowError, RowProcess
from headrace.tools.bench.pipeline.task import OWN_ENGINES, CannotExpress, Task
from headrace.tools.bench.steps import Steps, say

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

    def steps(self, rows: int) -> Steps:
        """What will be told of so many rows."""
        of_a_round = self.seconds + SETTLE_SECONDS
        return Steps({"open": (rows, OPEN_SECONDS), "run": (rows * self.count, of_a_round)})


def measure(tasks: Sequence[Task], rounds: Rounds, directory: Path, steps: Steps) -> list[Result]:
    """All rows of one recipe and one number of threads, alive together. Logs go to `directory`."""
    results = [Result(task) for task in tasks]
    with ExitStack() as stack:
        alive: list[tuple[Result, RowProcess]] = []
        for number, result in enumerate(results):
            with steps.step("open", f"opening {result.task.called}"):
                process = _open(result, directory / f"row{number}.log")
            if process is None:
                steps.skip("run", rounds.count)
            else:
                stack.callback(process.close)
                alive.append((result, process))
        for number in range(rounds.count):
            for result, process in alive if number % 2 == 0 else alive[::-1]:
                if result.failed:
                    steps.skip("run", 1)
                    continue
                what = f"round {number + 1} of {rounds.count}: {result.task.called}"
                with steps.step("run", what):
                    answer = _try(result, lambda process=process: process.run(rounds.seconds))
                if answer is not None:
                    result.add_round(answer)
        for result, process in alive:
            result.peak = process.peak_memory
            if result.task.engine in OWN_ENGINES and not result.failed:
                result.plan_seconds_per_image = _try(
                    result, lambda process=process: process.draw(DRAW_SECONDS)
                )
            if result.task.engine == "fused" and not result.failed:
                result.interpreter_share = _try(
                    result, lambda process=process: process.profile(PROFILE_SECONDS)
                )
    for result in results:
        if rounds.epochs and result.measured and result.task.engine == "fused":
            _measure_epochs(result, rounds.epochs, directory / "epochs.log")
    return results


def _open(result: Result, log: Path) -> RowProcess | None:
    """The row's process with its first batch behind it."""
    if result.task.engine in OWN_ENGINES:
        # Once for nothing, so that kernels are compiled and in their cache.
        process = _opened(result, log)
        if process is None:
            return None
        process.close()
    return _opened(result, log)


def _opened(result: Result, log: Path) -> RowProcess | None:
    process = RowProcess(result.task, log)
    try:
        opened = _try(result, process.open)
    except BaseException:
        process.close()
        raise
    if opened is None:
        process.close()
        return None
    result.import_seconds = opened["import_seconds"]
    result.first_batch_seconds = opened["first_batch_seconds"]
    result.notes = opened["notes"]
    return process


def _measure_epochs(result: Result, epochs: int, log: Path) -> None:
    """Anonymous memory of a fresh process after each of many small epochs."""
    task = result.task
    if task.output != "float32":
        return
    few = min(task.samples, EPOCH_BATCHES * task.batch_size)
    say(f"{epochs} epochs of {few:,} images, for memory: {task.called}")
    process = RowProcess(replace(task, samples=few), log)
    try:
        if _try(result, process.open) is not None:
            within = 60 + SLOW_BY_AT_MOST * epochs * few / result.rate
            result.anonymous_by_epoch = _try(result, lambda: process.epochs(epochs, within)) or []
    finally:
        process.close()


def _try(result: Result, act: Callable[[], T]) -> T | None:
    """None, and the reason in `result`, where the row cannot be or failed."""
    try:
        return act()
    except CannotExpress as reason:
        result.cannot = str(reason)
    except RowError as error:
        result.failed = str(error)
    return None
