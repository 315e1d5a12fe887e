"""Which values the hyper-parameters of a method can have: by their names, one rule for all methods.

A name says what a number is (`_epochs`, `_momentum`, `_dim`), and so which range it has. What a
method means beyond that it checks itself when it is built.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from headrace.training.preset import require


@dataclass(frozen=True)
class Range:
    """least <= value <= most, the ends left out where `open_least` or `open_most` say so."""

    least: float
    most: float
    words: str
    open_least: bool = False
    open_most: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` lies inside; not a number never does, nor does infinity."""
        above = value > self.least if self.open_least else value >= self.least
        below = value < self.most if self.open_most else value <= self.most
        return above and below and math.isfinite(value)


_COUNT = Range(1, math.inf, "a whole number of at least 1")
_COUNT_OR_NONE = Range(0, math.inf, "a whole number of at least 0")
_POSITIVE = Range(0, math.inf, "above 0", open_least=True)
_NOT_NEGATIVE = Range(0, math.inf, "at least 0")
_SHARE = Range(0, 1, "a fraction in [0, 1]")
_SHARE_BELOW_1 = Range(0, 1, "a fraction in [0, 1)", open_most=True)
_SHARE_ABOVE_0 = Range(0, 1, "a fraction in (0, 1]", open_least=True)

_RANGES: tuple[tuple[str, Range], ...] = (
    (r"(cpc|npid)\.negatives|.*_group", _COUNT_OR_NONE),
    (r"drop_path", _SHARE_BELOW_1),
    (r"label_smoothing|label_weight|distillation_weight|.*_momentum|.*_probability", _SHARE),
    (r"context_share|layer_decay|patch_embed_scale", _SHARE_ABOVE_0),
    (r".*_epochs", Range(0, math.inf, "a number of epochs, at least 0")),
    (r".*_steps|queue_size|context_blocks", _COUNT_OR_NONE),
    (r".*_weight|clip|bias_learning_rate_scale", _NOT_NEGATIVE),
    (r".*temperature|epsilon|scale|loss_scale|margin", _POSITIVE),
    (r"local_stage", Range(-math.inf, math.inf, "a number")),
    (
        r".*_dims?|.*_layers|.*_depth|.*_heads|heads|.*_iterations|.*_restarts|.*_pixels|"
        r"negatives|clusters|num_prototypes|directions|steps",
        _COUNT,
    ),
)


_USED_WITH: dict[str, tuple[str, object]] = {
    "moco.queue_size": ("dictionary", "queue"),
    "moco.teacher_momentum": ("dictionary", "queue"),
    "moco.batch_norm_group": ("dictionary", "queue"),
    "moco.negatives": ("dictionary", "bank"),
    "moco.bank_momentum": ("dictionary", "bank"),
    "pair.margin": ("loss", "margin"),
    "pair.temperature": ("loss", "logistic"),
    "dinov2.center_momentum": ("centering", "mean"),
    "dinov2.sinkhorn_iterations": ("centering", "sinkhorn"),
    "ibot.patch_out_dim": ("shared_head", False),
    "deit.temperature": ("distillation", "soft"),
    "deit.soft_scale": ("distillation", "soft"),
}
"""Hyper-parameters that one choice of another one looks at alone."""


def require_used(preset: Any, given: Any) -> None:
    """Raises ConfigError for what was changed in a preset's Objective and is not looked at."""
    method = type(given).__module__.rpartition(".")[2]
    for entry in fields(given):
        value = getattr(given, entry.name)
        used_with = _USED_WITH.get(f"{method}.{entry.name}")
        if used_with is None or value == getattr(preset, entry.name):
            continue
        switch, choice = used_with
        option, chosen = (name.replace("_", "-") for name in (entry.name, switch))
        require(
            getattr(given, switch) == choice,
            f"--objective.{option} means nothing with --objective.{chosen} "
            f"{getattr(given, switch)}; it is for {choice}",
        )


def range_of(objective: Any, name: str) -> Range | None:
    """The range of a hyper-parameter of an Objective; None for a name that says nothing."""
    method = type(objective).__module__.rpartition(".")[2]
    spelled = (name, f"{method}.{name}")
    return next(
        (known for names, known in _RANGES if any(re.fullmatch(names, entry) for entry in spelled)),
        None,
    )


def require_ranges(objective: Any) -> None:
    """Raises ConfigError for a hyper-parameter that its name does not allow."""
    for name, value in numbers_of(objective):
        known = range_of(objective, name)
        require(
            known is None or known.holds(value),
            f"--objective.{name.replace('_', '-')} is {value}; it must be "
            f"{known.words if known else ''}",
        )


def numbers_of(objective: Any) -> Iterator[tuple[str, float]]:
    """(field, number) of all that are numbers, each of a tuple by itself."""
    for entry in fields(objective):
        value: Any = getattr(objective, entry.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield entry.name, number
