"""Our engines as rows of `bench_pipeline.py`."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np

from headrace.pipelines import recipes
from headrace.pipelines.approximation import APPROXIMATIONS
from headrace.pipelines.draw import draw
from headrace.pipelines.engines import Unsupported
from headrace.pipelines.loader import Loader, LoaderError, open_loader
from headrace.pipelines.order import Order
from headrace.pipelines.recipe import Augmentation
from headrace.shards.store import Store, open_store
from headrace.tools.bench.pipeline.profiled import interpreter_share
from headrace.tools.bench.pipeline.task import DALI_READER, CannotExpress, Contender, Task, Views

PREFETCH = 2
BATCHES_IN_FLIGHT = 2  # of the engines


def open_contender(task: Task) -> Contender:
    """A row of `fused`, `dali`, `reference` or `dali_reader`."""
    store = open_store(task.store)
    augmentation = _recipe(task)
    notes = []
    if task.batch_size % augmentation.group:
        augmentation = replace(augmentation, group=task.batch_size)
        notes.append(f"groups of {task.batch_size}, the batch")
    engine, shuffle = task.engine, "full"
    if engine == DALI_READER:
        # The reader knows no order but the tars'.
        engine, shuffle = "dali", "none"
        from headrace.tools.bench.pipeline.peer_dali import read_by_dali

        read_by_dali(task.tars)
    try:
        loader = open_loader(
            store,
            augmentation,
            batch_size=task.batch_size,
            engine=engine,
            shuffle=shuffle,
            subset=np.arange(task.samples),
            threads=task.threads,
            prefetch=PREFETCH,
            stage=task.output == "float32",
            approximate=APPROXIMATIONS,
        )
    except (Unsupported, LoaderError) as error:
        raise CannotExpress(str(error)) from error
    if task.engine == DALI_READER:
        notes.append("bytes come from DALI's WebDataset reader")
    notes += [f"asked for {name}" for name in loader.fingerprint["engine"]["approximations"]]
    if task.output == "uint8" and task.recipe == "deit":
        notes.append("uint8 is before erasing and mixing")
    batches = _endless(loader)
    return Contender(
        batches=batches,
        ready_ahead=PREFETCH + BATCHES_IN_FLIGHT + 1,
        close=loader.close,
        notes=tuple(notes),
        draw=partial(_draw_seconds, store, augmentation, task),
        profile=partial(interpreter_share, batches) if engine == "fused" else None,
    )


def _recipe(task: Task) -> Augmentation:
    recipe: Callable[[], Augmentation] | None = getattr(recipes, task.recipe, None)
    if recipe is None:
        raise CannotExpress(f"pipelines/recipes has no recipe {task.recipe!r}")
    return recipe()


def _endless(loader: Loader) -> Iterator[Views]:
    while True:
        for batch in loader:
            yield batch.views


def _draw_seconds(store: Store, augmentation: Augmentation, task: Task, seconds: float) -> float:
    """CPU time per image of drawing plans, for the batches that the row's loader had: median."""
    order = Order(
        samples=len(store),
        batch_size=task.batch_size,
        seed=0,
        shuffle="full",
        subset=np.arange(task.samples),
    )
    taken: list[float] = []
    deadline = time.perf_counter() + seconds
    for number in itertools.count():
        epoch, step = divmod(number, order.steps_per_epoch)
        ids, occurrences = order.global_batch(epoch, step)
        sizes = store.sizes(ids)
        started = time.thread_time()
        draw(
            augmentation,
            seed=0,
            epoch=epoch,
            position=step * task.batch_size,
            ids=ids,
            occurrences=occurrences,
            sizes=sizes,
        )
        taken.append((time.thread_time() - started) / len(ids))
        if time.perf_counter() > deadline:
            break
    return median(taken)
