"""One row of `bench_pipeline.py` in a process of its own: opened once, run in rounds when told.

Commands come as JSON lines on stdin, answers go as JSON lines to what stdout was; whatever
libraries print goes to stderr. Started by row_process.py, not by hand.

A round ends, and is answered, when the row has filled its buffers and gone quiet: whoever is
measured next has the cores for itself.
"""

import json
import os
import sys
import time
import traceback
from importlib import import_module
from typing import Any

from headrace.tools.bench.pipeline.task import (
    DECODE,
    MODULES,
    VIEW_SIDES,
    CannotExpress,
    Contender,
    Output,
    Task,
    Views,
)
from headrace.tools.bench.proc import cpu_seconds, memory

QUIET_SHARE = 0.03  # of a core
QUIET_POLL_SECONDS = 0.1
QUIET_WITHIN_SECONDS = 30.0


class WrongBatch(Exception):
    """A contender handed out something else than the row is about."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    commands = map(json.loads, sys.stdin)
    task = Task.from_json(next(commands))
    try:
        _bind(task.threads)
        contender, answer = _open(task)
        answers.write(json.dumps(answer) + "\n")
        left_alone = time.perf_counter(), sum(cpu_seconds().values())
        for command in commands:
            idle = _used_since(*left_alone)
            answer = _obey(task, contender, command) | {"idle": idle}
            answers.write(json.dumps(answer) + "\n")
            left_alone = time.perf_counter(), sum(cpu_seconds().values())
        contender.close()
    except CannotExpress as reason:
        answers.write(json.dumps({"cannot": str(reason)}) + "\n")
    except Exception as error:  # the parent goes on with the other rows
        traceback.print_exc()
        first_line = (str(error).strip().splitlines() or ["no reason given"])[0]
        answers.write(json.dumps({"error": f"{type(error).__name__}: {first_line}"}) + "\n")


def _bind(threads: int) -> None:
    """To as many cores as the row has threads, so that helpers do not count as extra ones."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _open(task: Task) -> tuple[Contender, dict[str, Any]]:
    started = time.perf_counter()
    try:
        module = import_module(MODULES[task.engine])
    except ModuleNotFoundError as error:
        raise CannotExpress(f"{error.name} is not installed") from error
    imported = time.perf_counter()
    contender: Contender = module.open_contender(task)
    views = next(contender.batches)
    first = time.perf_counter()
    if task.engine != DECODE:
        _check(views, task)
    del views
    _settle()
    return contender, {
        "import_seconds": imported - started,
        "first_batch_seconds": first - imported,
        "notes": list(contender.notes),
    }


def _obey(task: Task, contender: Contender, command: dict[str, Any]) -> dict[str, Any]:
    match command:
        case {"run": seconds}:
            return _run(contender, seconds)
        case {"draw": seconds} if contender.draw is not None:
            return {"plan_seconds_per_image": contender.draw(seconds)}
        case {"profile": seconds} if contender.profile is not None:
            return {"interpreter_share": contender.profile(seconds)}
        case {"epochs": epochs}:
            return _epochs(task, contender, epochs)
    raise ValueError(f"no such command: {command}")


def _run(contender: Contender, seconds: float) -> dict[str, Any]:
    """A round: what lay ready is taken first, then whole batches are counted for `seconds`."""
    batches = contender.batches
    for _ in range(contender.ready_ahead):
        next(batches)
    images = 0
    cpu_before = cpu_seconds()
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(contender.together):
            images += len(next(batches)[0])
    cpu_after = cpu_seconds()
    _settle()
    cpu = {part: cpu_after[part] - cpu_before.get(part, 0.0) for part in cpu_after}
    return {"images": images, "seconds": elapsed, "cpu_seconds": cpu}


def _epochs(task: Task, contender: Contender, epochs: int) -> dict[str, Any]:
    """Anonymous bytes after each of so many more epochs of the row's images."""
    per_epoch = task.samples // task.batch_size
    after_epoch = []
    for _ in range(epochs):
        for _ in range(per_epoch):
            next(contender.batches)
        after_epoch.append(memory(os.getpid()).anonymous)
    return {"anonymous_bytes": after_epoch}


def _settle() -> None:
    """Wait until this process and its descendants have nothing left to do."""
    deadline = time.perf_counter() + QUIET_WITHIN_SECONDS
    quiet, used = 0, sum(cpu_seconds().values())
    while quiet < 2 and time.perf_counter() < deadline:
        time.sleep(QUIET_POLL_SECONDS)
        now = sum(cpu_seconds().values())
        # /proc counts in steps of 10 ms: one step may be chance, hence twice.
        quiet = quiet + 1 if now - used <= QUIET_POLL_SECONDS * QUIET_SHARE + 0.01 else 0
        used = now


def _used_since(when: float, cpu: float) -> tuple[float, float]:
    """(CPU time that was used while there was nothing to do, how long that was), in seconds."""
    return max(0.0, sum(cpu_seconds().values()) - cpu), time.perf_counter() - when


def _check(views: Views, task: Task) -> None:
    """The views have the recipe's sizes and the row's type, and something in them."""
    import torch

    dtypes: dict[Output, torch.dtype] = {"float32": torch.float32, "uint8": torch.uint8}
    expected = [(task.batch_size, 3, side, side) for side in VIEW_SIDES[task.recipe]]
    tensors = [view for view in views if isinstance(view, torch.Tensor)]
    shapes = [tuple(view.shape) for view in tensors]
    if shapes != expected:
        raise WrongBatch(f"views of {shapes}, but the recipe has {expected}")
    kinds = {view.dtype for view in tensors}
    if kinds != {dtypes[task.output]}:
        raise WrongBatch(f"views of {kinds}, but the row is about {task.output}")
    for view in tensors:
        values = view.float()
        if not bool(values.isfinite().all()) or float(values.std()) == 0:
            raise WrongBatch("a view is constant or not finite")


if __name__ == "__main__":
    main()
