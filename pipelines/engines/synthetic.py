"""The synthetic engine: batches of the right shapes that cost nothing to make.

It reads no pixel and executes no op: every sample of a view is one constant colour, another colour
for every view. Labels, ids and masks are the plan's. A run that it feeds shows the ceiling of
training alone; what the same run loses with another engine is what the input costs.
"""

from collections.abc import Collection, Iterator

import torch

from pipelines.batch import Batch
from pipelines.engines import Approximation, Work
from pipelines.recipe import Augmentation


class SyntheticEngine:
    """Constant uint8 views, in fresh memory for each batch as from any engine."""

    name = "synthetic"
    approximations: tuple[str, ...] = ()

    def __init__(self, augmentation: Augmentation) -> None:
        self._sizes = [view.size for view in augmentation.flat_views]

    def run(self, work: Iterator[Work]) -> Iterator[Batch]:
        for item in work:
            yield item.batch(
                tuple(
                    _constant(len(item.labels), size, (64 + 40 * index) % 256)
                    for index, size in enumerate(self._sizes)
                )
            )

    def close(self) -> None:
        """Nothing is held."""


def _constant(samples: int, size: int, value: int) -> torch.Tensor:
    pixels = torch.full((samples, size, size, 3), value, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


def unsupported(
    augmentation: Augmentation,  # noqa: ARG001  same signature as the other engines'
    device: torch.device,  # noqa: ARG001
    approximate: Collection[Approximation],  # noqa: ARG001
) -> list[str]:
    """Nothing: no op is executed."""
    return []


def finishes(augmentation: Augmentation, device: torch.device, dtype: torch.dtype) -> bool:  # noqa: ARG001
    """No: there is nothing to gain."""
    return False


def open_engine(
    augmentation: Augmentation,
    *,
    device: torch.device,  # noqa: ARG001  same signature as the other engines'
    threads: int,  # noqa: ARG001
    finished: torch.dtype | None = None,  # noqa: ARG001  never asked for: see `finishes`
    approximate: Collection[Approximation] = (),  # noqa: ARG001  it makes none
) -> SyntheticEngine:
    """A synthetic engine for the recipe's views."""
    return SyntheticEngine(augmentation)
