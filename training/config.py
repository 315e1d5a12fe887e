"""What a run is made of, as frozen dataclasses.

`command_line.py` starts from a method's preset and replaces single values; what comes out is a
`Config`, which nothing changes afterwards.
Derived values (steps, the scaled learning rate) are computed where they are used and recorded in
RUN/config.json, never written back.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headrace.pipelines.approximation import APPROXIMATIONS, Approximation
from headrace.pipelines.recipe import Augmentation
from headrace.training.preset import ConfigError, Optim, nearest


@dataclass(frozen=True)
class Data:
    """Which images, and how they reach the device."""

    train: Path | None = None
    """Data set to train on; a root with splits gives its train split. Default: the only one
    under ./data."""
    val: Path | None = None
    """Data set for the evaluation during training (methods that have one)."""
    engine: str = "auto"
    """auto, dali, fused, reference, synthetic."""
    approximate: tuple[str, ...] = ()
    """What an engine may do differently where it lacks the exact operator, separated by commas:
    affine-bilinear, equalize-opencv."""
    batch_size: int = 256
    """Samples per optimiser step, over all ranks and micro-batches."""
    holdout: float = 0.0
    """Fraction of the training set that is held out and evaluated."""
    subset: Path | None = None
    """Train on these samples only: a text file, one id or original file name per line."""
    shuffle: Literal["full", "window"] = "full"
    """full: any sample anywhere; window: within some shards, for remote storage."""
    window_shards: int = 16
    """window: number of shards that are mixed."""
    repeated_augmentation: int = 1
    """Show a sample so many times per step, each time augmented anew; an epoch keeps its length
    and shows that much fewer samples (DeiT: 3)."""
    threads: int | None = None
    """Threads of the engine per rank; None takes this rank's share of the cores."""
    prefetch: int = 2
    """Batches that are prepared ahead."""


@dataclass(frozen=True)
class Run:
    """Where the run goes, how long it is, how it is saved and continued."""

    out: Path | None = None
    """Directory of the run. Default: runs/<method>-<data set>."""
    epochs: float | None = None
    """Length in epochs. Default: the preset's."""
    steps: int | None = None
    """Length in optimiser steps, instead of epochs."""
    seed: int = 0
    """Of the stream, of the initial weights and of all randomness of the model."""
    save_every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_every: float = 1.0
    """Epochs between evaluations on the hold-out or --data.val; always at the end; 0: at the
    end only."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue where the checkpoint in the run's directory stands."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    gradient_cache: bool = False
    """Let the loss see all micro-batches of a step at once, for one more forward pass: the batch
    of contrastive methods is then not bound by memory."""
    batch_norm: Literal["global", "local"] = "global"
    """global: statistics over all ranks, so that the world size does not change the numbers."""
    compile: bool = False
    """torch.compile the encoder."""


@dataclass(frozen=True)
class Config:
    """A run, resolved: every default filled in, every name found."""

    method: str
    preset: str
    backbone: str
    backbone_options: Mapping[str, Any]
    init: Path | None
    data: Data
    optim: Optim
    run: Run
    objective: Any
    augmentation: Augmentation
    test: Augmentation

    def declaration(self) -> dict[str, Any]:
        """JSON-ready and complete: what RUN/config.json holds under "config"."""
        declared = _plain(asdict(self))
        declared["augmentation"] = _plain(self.augmentation.declaration())
        declared["test"] = _plain(self.test.declaration())
        return declared

    def fingerprint(
        self, stream: Mapping[str, Any], *, total_steps: int, precision: str, world_size: int
    ) -> dict[str, Any]:
        """What determines the numbers of a run: a resume must agree on all of it.

        stream: the loader's fingerprint. The world size belongs to it where batch norm is local.
        """
        local = self.run.batch_norm == "local"
        return _plain(
            {
                "method": self.method,
                "backbone": self.backbone,
                "backbone_options": dict(self.backbone_options),
                "objective": asdict(self.objective),
                "optim": asdict(self.optim),
                "stream": stream,
                "seed": self.run.seed,
                "total_steps": total_steps,
                "precision": precision,
                "accumulate": self.run.accumulate,
                "gradient_cache": self.run.gradient_cache,
                "batch_norm": self.run.batch_norm,
                "world_size": world_size if local else "any",
            }
        )


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples, strings for paths and everything unknown."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return str(value)


def total_steps(run: Run, steps_per_epoch: int) -> int:
    """The run's length in optimiser steps."""
    if run.steps is not None:
        return run.steps
    assert run.epochs is not None, "a resolved configuration has a length"
    return steps_between(run.epochs, steps_per_epoch)


def steps_between(epochs: float, steps_per_epoch: int) -> int:
    """The nearest whole number of steps, at least one; 0 for 0 epochs."""
    return max(1, round(epochs * steps_per_epoch)) if epochs > 0 else 0


def check(config: Config) -> None:
    """Raises ConfigError, naming the option, for a value that cannot mean anything."""
    data, optim, run = config.data, config.optim, config.run
    at_least_one = {
        "--data.batch-size": data.batch_size,
        "--data.prefetch": data.prefetch,
        "--data.repeated-augmentation": data.repeated_augmentation,
        "--data.threads": 1 if data.threads is None else data.threads,
        "--run.steps": 1 if run.steps is None else run.steps,
        "--run.save-every": run.save_every,
        "--run.log-every": run.log_every,
        "--run.accumulate": run.accumulate,
    }
    for option, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{option} is {value}; it must be at least 1")
    above_zero = {
        "--run.epochs": 1 if run.epochs is None else run.epochs,
        "--optim.clip-norm": 1 if optim.clip_norm is None else optim.clip_norm,
    }
    for option, value in above_zero.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{option} is {value}; it must be above 0")
    not_negative = {
        "--run.seed": run.seed,
        "--run.evaluate-every": run.evaluate_every,
        "--optim.learning-rate": optim.learning_rate,
        "--optim.final-learning-rate": optim.final_learning_rate,
        "--optim.warmup-epochs": optim.warmup_epochs,
        "--optim.warmup-from": optim.warmup_from,
        "--optim.weight-decay": optim.weight_decay,
    }
    for option, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{option} is {value}; it must not be negative")
    if not 0 <= data.holdout < 1:
        raise ConfigError(f"--data.holdout is {data.holdout}; it is a fraction in [0, 1)")
    if run.gradient_cache and run.accumulate == 1:
        raise ConfigError(
            "--run.gradient-cache needs micro-batches: give --run.accumulate, their number per step"
        )
    approximations(data.approximate)


def approximations(names: Iterable[str]) -> tuple[Approximation, ...]:
    """What --data.approximate names, as engines take it: each once, in their order.

    names: of approximations; one string may hold several, separated by commas.
    Raises ConfigError for what is no name of one.
    """
    given = [part for name in names for part in name.replace(",", " ").split()]
    for name in given:
        if name not in APPROXIMATIONS:
            raise ConfigError(
                f"--data.approximate {name} is unknown{nearest(name, APPROXIMATIONS)}; there are "
                f"{', '.join(APPROXIMATIONS)}"
            )
    return tuple(known for known in APPROXIMATIONS if known in given)
