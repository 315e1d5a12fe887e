"""What the protocols have in common: how they say how many were right, and what they refuse."""

from dataclasses import dataclass

import torch

from headrace.training.collectives import sum_over_ranks_
from headrace.training.features import Features
from headrace.training.world import World


@dataclass(frozen=True)
class Accuracy:
    """In percent of the test samples."""

    top1: float
    top5: float


def totals(values: list[int], world: World) -> list[int]:
    """Sums over all ranks."""
    return sum_over_ranks_(torch.tensor(values, device=world.device)).tolist()


def problem_of(share: Features, name: str, samples: int, world: World) -> str | None:
    """What keeps features from being judged, for a sentence; None where nothing does.

    share: this rank's. name: "training" or "test". samples: over all ranks. The same on every rank.
    """
    if samples == 0:
        return f"there are no {name} samples"
    missing, broken = totals(
        [
            int((share.labels < 0).sum()),
            int((~share.features.isfinite().all(dim=1)).sum()),
        ],
        world,
    )
    if missing:
        return (
            f"the class of every image is needed, and {missing:,} of the {samples:,} {name} images "
            f"have none"
        )
    if broken:
        return (
            f"the encoder's features of {broken:,} of the {samples:,} {name} images are not finite"
        )
    return None
