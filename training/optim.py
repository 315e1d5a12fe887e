"""Optimisers, and what their schedules say at a given progress.

Parameter groups come from the method (`Method.param_groups`): "params", "decay" (bool) and
optionally "learning_rate_scale" (float), "fixed_learning_rate" (bool: the peak, without warm-up
and schedule, as SimSiam's predictor has it) and "momentum" (float, in place of the run's: 0 for
what DeepCluster begins anew each epoch; of no meaning to AdamW and LAMB).

Every optimiser here skips its update, state included, while its `found_inf` tensor is 1. torch's
fused kernels do so for a GradScaler; the training loop uses it to block the step in which the loss
stops being finite, without asking the device for anything.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor

from headrace.training import schedules
from headrace.training.large_batch import LAMB, LARC, LARS
from headrace.training.preset import Optim


@dataclass(frozen=True)
class Schedule:
    """What the configuration says at a progress in [0, 1], for one batch size and length.

    Step t of T is taken at progress t / T, so that a warm-up from 0 begins with a step of 0.
    """

    optim: Optim
    batch_size: int
    total_epochs: float

    def _scaled(self, learning_rate: float) -> float:
        return (
            learning_rate * self.batch_size / 256 if self.optim.scale_with_batch else learning_rate
        )

    @property
    def peak(self) -> float:
        """The learning rate as it is used, linear in the global batch."""
        return self._scaled(self.optim.learning_rate)

    def learning_rate_at(self, progress: float) -> float:
        """Warm-up, then the schedule."""
        optim = self.optim
        if optim.per_epoch:
            # The addend keeps an epoch's first step, whose progress may be rounded down, in it.
            progress = math.floor(progress * self.total_epochs + 1e-6) / self.total_epochs
        final, start = self._scaled(optim.final_learning_rate), self._scaled(optim.warmup_from)
        warmup = optim.warmup_epochs / self.total_epochs
        if progress < warmup:
            return schedules.linear(progress / warmup, start, self.peak)
        match optim.schedule:
            case "cosine":
                return schedules.warmup_cosine(progress, self.peak, final, warmup, start)
            case "whole_cosine":
                return schedules.cosine(progress, self.peak, final)
            case "stable_decay":
                # A decay that is longer than what the warm-up left of the run begins behind it.
                decay = min(optim.decay_epochs / self.total_epochs, 1 - warmup)
                passed = (progress - (1 - decay)) / decay if decay > 0 else 0.0
                return schedules.linear(passed, self.peak, final)
            case "constant":
                return self.peak
            case "steps":
                return schedules.steps(progress, self.peak, optim.milestones, optim.step_factor)
            case _:
                assert_never(optim.schedule)

    def is_same_until(self, epochs: float, total_epochs: float) -> bool:
        """Whether a run of `total_epochs` has the same rate and decay in its first `epochs`."""
        if self.optim.final_weight_decay is not None:
            return False
        match self.optim.schedule:
            case "constant":
                return True
            case "stable_decay":
                shorter = min(self.total_epochs, total_epochs)
                return epochs <= max(self.optim.warmup_epochs, shorter - self.optim.decay_epochs)
            case "cosine" | "whole_cosine" | "steps":
                return False
            case _:
                assert_never(self.optim.schedule)

    def weight_decay_at(self, progress: float) -> float:
        """Constant, or a cosine over the whole run."""
        if self.optim.final_weight_decay is None:
            return self.optim.weight_decay
        return schedules.cosine(progress, self.optim.weight_decay, self.optim.final_weight_decay)

    def apply(self, optimizer: torch.optim.Optimizer, progress: float) -> dict[str, float]:
        """Write this step's numbers into the groups; returns those of an ordinary group."""
        rate, decay = self.learning_rate_at(progress), self.weight_decay_at(progress)
        for group in optimizer.param_groups:
            group_rate = self.peak if group["fixed_learning_rate"] else rate
            group["lr"] = group_rate * group["learning_rate_scale"]
            group["weight_decay"] = decay if group["decay"] else 0.0
        return {"learning_rate": rate, "weight_decay": decay}


def build_optimizer(
    groups: Sequence[Mapping[str, Any]], schedule: Schedule
) -> torch.optim.Optimizer:
    """The optimiser over a method's groups; `Schedule.apply` gives each its rates before a step."""
    optim = schedule.optim
    kept = [
        {
            "params": list(group["params"]),
            "decay": bool(group.get("decay", True)),
            "learning_rate_scale": float(group.get("learning_rate_scale", 1.0)),
            "fixed_learning_rate": bool(group.get("fixed_learning_rate", False)),
            **({"momentum": float(group["momentum"])} if "momentum" in group else {}),
        }
        for group in groups
    ]
    kept = [group for group in kept if group["params"]]
    match optim.name:
        case "adamw":
            return torch.optim.AdamW(
                kept,
                lr=schedule.peak,
                betas=optim.betas,
                eps=optim.epsilon,
                weight_decay=0.0,
                fused=True,
            )
        case "sgd":
            optimizer = torch.optim.SGD(
                kept, lr=schedule.peak, momentum=optim.momentum, nesterov=optim.nesterov, fused=True
            )
            if optim.momentum != 0:
                # A zero buffer is what torch's first step amounts to, and is also right to save
                # if the first step is blocked.
                for parameter in _parameters(kept):
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer
        case "lars":
            return LARS(
                kept,
                lr=schedule.peak,
                momentum=optim.momentum,
                trust_coefficient=optim.trust_coefficient,
            )
        case "larc":
            return LARC(
                kept,
                lr=schedule.peak,
                momentum=optim.momentum,
                trust_coefficient=optim.trust_coefficient,
            )
        case "lamb":
            return LAMB(kept, lr=schedule.peak, betas=optim.betas, eps=optim.epsilon)
        case _:
            assert_never(optim.name)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients there are, float32 scalar on their device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def clip_gradients(parameters: Iterable[Tensor], norm: Tensor, limit: float) -> None:
    """Scale all gradients so that their global `norm` is at most `limit`; does not synchronise."""
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter of every group."""
    return _parameters(optimizer.param_groups)


def _parameters(groups: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]
