"""What a method's file declares: its presets, whole experiments on one page each.

A method's PRESETS are `Preset`s: the published numbers, complete. `command_line.py` starts from one
of them and replaces single values; what comes out is a `config.Config`.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from headrace.pipelines.recipe import Augmentation
from headrace.shards.errors import UserError


class ConfigError(UserError):
    """A command line or configuration that cannot be run: what, where, and what to do instead."""


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless it holds."""
    if not holds:
        raise ConfigError(message)


def require_count(group: str, declared: object, *names: str) -> None:
    """Raise ConfigError unless these fields of `declared`, the options --`group`.*, are None or at
    least 1."""
    for option, value in _given(group, declared, names):
        require(value >= 1, f"{option} is {value}; it must be at least 1")


def require_positive(group: str, declared: object, *names: str) -> None:
    """The same for what is None or a finite number above 0."""
    for option, value in _given(group, declared, names):
        require(0 < value < math.inf, f"{option} is {value}; it must be above 0")


def require_not_negative(group: str, declared: object, *names: str) -> None:
    """The same for what is None or a finite number from 0 upwards."""
    for option, value in _given(group, declared, names):
        require(0 <= value < math.inf, f"{option} is {value}; it must not be negative")


def require_fraction(option: str, value: float) -> None:
    """Raise ConfigError unless it is in [0, 1)."""
    require(0 <= value < 1, f"{option} is {value}; it must be in [0, 1)")


def _given(group: str, declared: object, names: Iterable[str]) -> Iterator[tuple[str, float]]:
    """(option, value) of the fields that are not None."""
    for name in names:
        value: float | None = getattr(declared, name)
        if value is not None:
            yield f"--{group}.{name.replace('_', '-')}", value


@dataclass(frozen=True)
class Optim:
    """The optimiser and its schedules. Schedules are functions of the run's progress in [0, 1]."""

    name: Literal["adamw", "sgd", "lars", "larc", "lamb"] = "adamw"
    learning_rate: float = 5e-4
    """Peak, for a batch of 256: multiplied by batch / 256 unless scale-with-batch is off."""
    final_learning_rate: float = 0.0
    """At the end of the run, under the same rule of scaling."""
    scale_with_batch: bool = True
    """Scale all learning rates linearly with the global batch."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up."""
    warmup_from: float = 0.0
    """Learning rate at the first step, under the same rule of scaling."""
    schedule: Literal["cosine", "whole_cosine", "constant", "steps", "stable_decay"] = "cosine"
    """What follows the warm-up: a cosine that begins at its end, or the rest of one that began with
    the run; stable_decay: the peak until the last decay-epochs, which lead straight down."""
    decay_epochs: float = 0.0
    """stable_decay: epochs at the end of the run."""
    per_epoch: bool = False
    """The learning rate is set at the beginning of an epoch and stays, as older code has it."""
    milestones: tuple[float, ...] = ()
    """steps: fractions of the run at which the learning rate is multiplied by step-factor."""
    step_factor: float = 0.1
    weight_decay: float = 0.04
    """AdamW: decoupled; SGD, LARS and LARC: added to the gradient; LAMB: to the step, before it is
    rescaled."""
    final_weight_decay: float | None = None
    """Weight decay at the end of the run, reached on a cosine; None keeps it constant."""
    momentum: float = 0.9
    """SGD, LARS and LARC."""
    nesterov: bool = False
    """SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW and LAMB."""
    epsilon: float = 1e-8
    """AdamW; LAMB, where 1e-6 is usual."""
    trust_coefficient: float = 1e-3
    """LARS and LARC."""
    clip_norm: float | None = None
    """Clip the global gradient norm to this."""

    def __post_init__(self) -> None:
        require_not_negative(
            "optim",
            self,
            "learning_rate",
            "final_learning_rate",
            "warmup_epochs",
            "warmup_from",
            "decay_epochs",
            "weight_decay",
            "final_weight_decay",
        )
        require_positive("optim", self, "clip_norm", "epsilon", "trust_coefficient", "step_factor")
        require_fraction("--optim.momentum", self.momentum)
        for beta in self.betas:
            require_fraction("each of --optim.betas", beta)
        for milestone in self.milestones:
            require(
                0 < milestone < 1,
                f"each of --optim.milestones must be in (0, 1), a fraction of the run: "
                f"{milestone:g} is not; epoch 120 of 200 is 0.6",
            )
        require(
            not self.nesterov or self.momentum > 0,
            "--optim.nesterov needs --optim.momentum, which is 0",
        )
        require(
            self.schedule != "steps" or len(self.milestones) > 0,
            "--optim.schedule steps needs --optim.milestones, fractions of the run",
        )
        require(
            self.schedule != "stable_decay" or self.decay_epochs > 0,
            "--optim.schedule stable_decay needs --optim.decay-epochs, at the end of the run",
        )


_OF_OPTIMISERS: Mapping[str, tuple[str, ...]] = {
    "momentum": ("sgd", "lars", "larc"),
    "nesterov": ("sgd",),
    "betas": ("adamw", "lamb"),
    "epsilon": ("adamw", "lamb"),
    "trust_coefficient": ("lars", "larc"),
}
_OF_SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "milestones": ("steps",),
    "step_factor": ("steps",),
    "decay_epochs": ("stable_decay",),
    "final_learning_rate": ("cosine", "whole_cosine", "stable_decay"),
}


def require_effect(preset: Optim, given: Optim) -> None:
    """Raises ConfigError for what was changed in `preset` and has no effect in `given`."""
    for field_name, users, user in (
        *((name, users, "name") for name, users in _OF_OPTIMISERS.items()),
        *((name, users, "schedule") for name, users in _OF_SCHEDULES.items()),
    ):
        chosen: str = getattr(given, user)
        require(
            getattr(given, field_name) == getattr(preset, field_name) or chosen in users,
            f"--optim.{field_name.replace('_', '-')} means nothing to --optim.{user} {chosen}; it "
            f"is for {', '.join(users)}",
        )
    require(
        given.warmup_from == preset.warmup_from or given.warmup_epochs > 0,
        "--optim.warmup-from means nothing without a warm-up (--optim.warmup-epochs)",
    )


def require_own_option(objective: Any, given: Mapping[str, Any]) -> None:
    """Raises ConfigError for stochastic depth as an option of the backbone, where the method has
    its own: given to every network, it would make a teacher random."""
    if "drop_path_rate" in given and "drop_path" in {entry.name for entry in fields(objective)}:
        rate = given["drop_path_rate"]
        raise ConfigError(
            f"--backbone-options drop_path_rate={rate}: say --objective.drop-path {rate}, which "
            f"reaches the networks that are trained alone"
        )


@dataclass(frozen=True)
class Preset:
    """What a method's PRESETS hold: a paper's whole experiment on one page.

    augmentation: the training views. test: one view named "test", for evaluation.
    objective: an instance of the method's own `Objective`. notes: the paper's numbers and hours.
    """

    backbone: str
    augmentation: Augmentation
    test: Augmentation
    optim: Optim
    batch_size: int
    epochs: float
    objective: Any
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    holdout: float = 0.0
    repeated_augmentation: int = 1
    notes: str = ""


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.5) -> str:
    """The end of a sentence about an unknown name: ": did you mean ...?", or nothing.

    cutoff: how much of it has to agree, in [0, 1], as `difflib.get_close_matches` counts.
    """
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f": did you mean {near[0]}?" if near else ""
