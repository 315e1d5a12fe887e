"""The synthetic engine: batches of the right shapes that cost nothing to make.

It reads no pixel and executes no op: every sample of a view is one constant colour, another colour
for every view. Labels, ids and masks are the plan's. A run that it feeds shows the ceiling of
training alone; what the same run loses with another engine is what the input costs.
"""

from collections.abc import Collection, Iterator

import torch
from typing_extensions import override

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.batch import Batch
from headrace.pipelines.engines.contract import EngineKind, Work
from headrace.pipelines.engines.device_stage import normalize
from headrace.pipelines.recipe import Augmentation


class SyntheticEngine:
    """Constant views, in fresh memory for each batch as from any engine: copies of one sample."""

    name = "synthetic"
    approximations: tuple[str, ...] = ()

    def __init__(self, augmentation: Augmentation, finished: torch.dtype | None) -> None:
        self._samples = [
            _constant(view.shape, (64 + 40 * index) % 256)
            for index, view in enumerate(augmentation.flat_views)
        ]
        if finished is not None:
            mean, std = augmentation.mean, augmentation.std
            self._samples = [normalize(sample, mean, std, finished) for sample in self._samples]

    def run(self, work: Iterator[Work]) -> Iterator[Batch]:
        for item in work:
            count = len(item.labels)
            yield item.batch(tuple(_repeated(sample, count) for sample in self._samples))

    def close(self) -> None:
        """Nothing is held."""


def _constant(shape: tuple[int, int], value: int) -> torch.Tensor:
    """uint8 [1, 3, *shape]."""
    return torch.full((1, *shape, 3), value, dtype=torch.uint8).permute(0, 3, 1, 2)


def _repeated(sample: torch.Tensor, count: int) -> torch.Tensor:
    """[1, 3, H, W] -> [count, 3, H, W] with channels-last strides."""
    return sample.permute(0, 2, 3, 1).repeat(count, 1, 1, 1).permute(0, 3, 1, 2)


class Synthetic(EngineKind):
    """The synthetic engine before it is opened. The loader moves its batches to any device."""

    @override
    def unsupported(
        self,
        augmentation: Augmentation,
        device: torch.device,
        approximate: Collection[Approximation],
    ) -> list[str]:
        """Nothing: no op is executed."""
        return []

    @override
    def finishes(
        self, augmentation: Augmentation, device: torch.device, dtype: torch.dtype
    ) -> bool:
        """On a CPU, where a pass over the batch would cost more than `fused` needs for floats."""
        return device.type == "cpu" and dtype == torch.float32

    @override
    def open(
        self,
        augmentation: Augmentation,
        *,
        device: torch.device,
        threads: int,
        finished: torch.dtype | None = None,
        approximate: Collection[Approximation] = (),
    ) -> SyntheticEngine:
        """Finished views are normalised, and no more."""
        return SyntheticEngine(augmentation, finished)
