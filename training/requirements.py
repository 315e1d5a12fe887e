"""What a method that has been built asks of its run: refused in a sentence before anything runs."""

from collections.abc import Mapping
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from headrace.training.config import Config
from headrace.training.gradients import has_batch_norm
from headrace.training.method import Method
from headrace.training.optim import Schedule
from headrace.training.preset import require


def require_runnable(config: Config, method: Method, world_size: int) -> None:
    """Raises ConfigError for a run that would compute numbers that mean nothing."""
    _require_still_networks(config.method, method, config.backbone_options)
    _require_samples(config, method, world_size)
    require(
        method.compiles or not config.run.compile,
        f"--run.compile has nothing to compile in {config.method}, which runs the layers of its "
        f"network one by one: leave it out",
    )


def free_on_resume(
    method: Method, schedule: Schedule, before: Mapping[str, Any], epoch_steps: int
) -> tuple[str, ...]:
    """What of a run's fingerprint may change when it goes on from the checkpoint `before`.

    Micro-batches, which are mere slices of the batch where nothing is coupled across it; the
    length, where no step so far depended on it.
    """
    coupled = method.couples_samples or has_batch_norm(method)
    done, length = before["step"] / epoch_steps, before["fingerprint"]["total_steps"] / epoch_steps
    lengthens = not method.depends_on_length and schedule.is_same_until(done, length)
    return (*(() if coupled else ("accumulate",)), *(("total_steps",) if lengthens else ()))


def _require_still_networks(name: str, method: Method, options: Mapping[str, Any]) -> None:
    """Raises ConfigError where dropout of the backbone's reaches a network without a gradient."""
    random = [key for key, value in options.items() if "drop" in key and value]
    still = [
        part
        for part, module in method.named_children()
        if (parameters := list(module.parameters()))
        and not any(parameter.requires_grad for parameter in parameters)
    ]
    require(
        not random or not still,
        f"--backbone-options {' '.join(f'{key}={options[key]}' for key in random)}: {name} has a "
        f"network that is not trained itself ({', '.join(still)}), whose answers this would make "
        f"random; leave it out",
    )


def _require_samples(config: Config, method: Method, world_size: int) -> None:
    """Raises ConfigError for micro-batches of fewer samples than the method needs at once."""
    batch, parts = config.data.batch_size, config.run.accumulate
    micro_batch = batch // parts
    at_once = batch if config.run.gradient_cache else micro_batch
    require(
        at_once >= method.least_samples,
        f"{config.method} compares the images of a batch with each other and needs "
        f"{method.least_samples} at once; --data.batch-size {batch} with --run.accumulate {parts} "
        f"gives {at_once}: take larger batches, fewer micro-batches"
        + (", or --run.gradient-cache" if parts > 1 else ""),
    )
    normalised = micro_batch if config.run.batch_norm == "global" else micro_batch // world_size
    require(
        normalised >= 2 or not any(isinstance(part, _BatchNorm) for part in method.modules()),
        f"batch norm needs at least 2 images at once, and --data.batch-size {batch} with "
        f"--run.accumulate {parts} gives {normalised}: take larger batches or fewer micro-batches",
    )
