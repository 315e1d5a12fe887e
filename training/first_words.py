"""What a run says before its first step: what it is made of, and what will not come to its end."""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from headrace.pipelines.loader import Loader
from headrace.shards.store import Store
from headrace.training.config import Config
from headrace.training.judged_view import judged_pixels
from headrace.training.optim import Schedule
from headrace.training.world import World


def first_words(
    config: Config,
    store: Store,
    loader: Loader,
    schedule: Schedule,
    world: World,
    *,
    start: int,
    steps: int,
) -> Iterator[str]:
    """Line by line: the run, its images, its length, then what lasts longer than the run."""
    epoch_steps = loader.steps_per_epoch
    yield f"{config.method}, preset {config.preset}, {config.backbone}: {config.run.out}"
    yield (
        f"{store.uri}: {len(store)} images, {epoch_steps} steps of {config.data.batch_size} in an "
        f"epoch, by the {loader.engine_name} engine"
    )
    yield (
        f"step {start} of {steps} on {world.size} x {world.device.type}, peak learning rate "
        f"{highest_rate(schedule, steps):.3g}, judged at {judged_pixels(config.test)} pixels"
    )
    if config.init:
        yield f"--init {config.init}"
    yield from too_long(config.objective, schedule, steps, epoch_steps)


def highest_rate(schedule: Schedule, steps: int) -> float:
    """The largest learning rate that any step of the run takes."""
    warmup_steps = math.ceil(schedule.optim.warmup_epochs / schedule.total_epochs * steps)
    taken = {0, min(warmup_steps, steps - 1), steps - 1}
    return max(schedule.learning_rate_at(step / steps) for step in taken)


def too_long(objective: Any, schedule: Schedule, steps: int, epoch_steps: int) -> Iterator[str]:
    """A sentence for each warm-up, freeze and the like that the run ends within."""
    epochs = f"the run of {schedule.total_epochs:.3g} epoch(s)"
    optim = schedule.optim
    if optim.warmup_epochs >= schedule.total_epochs:
        yield (
            f"--optim.warmup-epochs {optim.warmup_epochs:g} is no shorter than {epochs}: the "
            f"learning rate reaches {highest_rate(schedule, steps):.3g}, not {schedule.peak:.3g}"
        )
    without_queue = getattr(objective, "queue_size", None) == 0
    for entry in fields(objective):
        value: Any = getattr(objective, entry.name)
        if without_queue and entry.name.startswith("queue_"):
            continue
        if entry.name.endswith("_epochs") and value > 0 and value * epoch_steps >= steps:
            yield f"--objective.{entry.name.replace('_', '-')} {value} is no shorter than {epochs}"
        if entry.name.endswith("_steps") and value >= steps:
            yield (
                f"--objective.{entry.name.replace('_', '-')} {value} is no shorter than the run of "
                f"{steps} step(s)"
            )
