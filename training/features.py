"""Features of a data set: the run's encoder over its own engine and the recipe's test view.

kNN, a linear probe and methods that cluster (`Method.before_epoch`) all take this one path. Every
sample is seen exactly once for any number of ranks; each rank keeps its own share on its device.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.batch import Batch
from headrace.pipelines.loader import Loader, open_loader
from headrace.pipelines.order import Order
from headrace.pipelines.recipe import Augmentation
from headrace.shards.index import printable
from headrace.shards.progress import progress_bar
from headrace.shards.store import Store
from headrace.training.world import World

Precision = Literal["fp32", "bf16"]


class Features(NamedTuple):
    """One rank's share: ids int64 [n], features float32 [n, D], labels int64 [n] (-1 = none)."""

    ids: Tensor
    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FeaturePass:
    """A way through a data set, and the `Context` that a method's `before_epoch` is given.

    views: augmentations by name, "test" among them. batch_size: images per rank. holdout, part,
    subset, seed: which samples, as in `open_loader`; by default all. approximate: as there.
    on_error: "raise", or "report" for images that cannot be used to be named in `unusable`, a list
    that passes made from this one share. Features of them are those of a black picture; `extract`
    leaves them out, and so does whoever takes `Batch.sound`; in whole batches others take their
    places.
    """

    store: Store
    views: Mapping[str, Augmentation]
    batch_size: int
    engine: str
    world: World
    threads: int | None = None
    precision: Precision = "fp32"
    seed: int = 0
    holdout: float = 0.0
    part: Literal["train", "holdout"] = "train"
    subset: NDArray[np.int64] | None = None
    approximate: tuple[Approximation, ...] = ()
    on_error: Literal["raise", "report"] = "raise"
    unusable: list[str] = field(default_factory=list, compare=False)

    def loader(self, view: str = "test") -> Loader:
        """This rank's share of the set, once, by ascending ids: a context manager over batches."""
        # Every picture for itself: no partner's pixels, no whole groups to be had at the end.
        alone = replace(self.views[view], mix=None, group=1)
        return self._open(alone, self.batch_size * self.world.size, whole=False)

    def whole_batches(self, augmentation: Augmentation, batch_size: int) -> Loader:
        """Batches as training has them, without mixing: all views, `batch_size` samples over all
        ranks, in an order and with draws that are the seed's. What fills no batch is left out."""
        return self._open(replace(augmentation, mix=None), batch_size, whole=True)

    def ids(self) -> NDArray[np.int64]:
        """int64 [n], ascending: the samples that this pass goes through, over all ranks."""
        order = Order(
            len(self.store),
            1,
            seed=self.seed,
            shuffle="none",
            holdout=self.holdout,
            part=self.part,
            subset=self.subset,
        )
        return order.at(0, np.arange(order.epoch_length))[0]

    def note(self, batch: Batch) -> None:
        """Name what could not be used in a batch of this pass."""
        for fault in batch.faults:
            (name,) = self.store.names(np.array([fault.sample_id]))
            self.unusable.append(f"{printable(name)!r} of {self.store.uri} ({fault.reason})")

    def _open(self, augmentation: Augmentation, batch_size: int, *, whole: bool) -> Loader:
        replacing = whole and self.on_error == "report"
        return open_loader(
            self.store,
            augmentation,
            batch_size=batch_size,
            seed=self.seed,
            engine=self.engine,
            device=self.world.device,
            shuffle="full" if whole else "none",
            drop_last=whole,
            holdout=self.holdout,
            part=self.part,
            subset=self.subset,
            rank=self.world.rank,
            world_size=self.world.size,
            threads=self.threads,
            passes=1,
            approximate=self.approximate,
            on_error="replace" if replacing else self.on_error,
        )

    def features(
        self, module: Callable[[Tensor], Tensor], view: str = "test"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (ids int64 [n], features float32 [n, D]) of this rank's share of the set."""
        for ids, features, _ in self.batches(module, view):
            yield ids, features

    def batches(self, module: Callable[[Tensor], Tensor], view: str = "test") -> Iterator[Features]:
        """The same with labels, a batch at a time, by ascending ids.

        A module runs in eval mode and without gradients, and is as it was whenever a batch is out.
        """
        for batch, features in self._seen(module, view):
            yield Features(batch.ids, features, batch.labels)

    def _seen(
        self, module: Callable[[Tensor], Tensor], view: str
    ) -> Iterator[tuple[Batch, Tensor]]:
        augmentation = self.views[view]
        if len(augmentation.flat_views) != 1:
            raise ValueError(
                f"features are taken of one view per image; {augmentation.name!r} has "
                f"{len(augmentation.flat_views)}"
            )
        with self.loader(view) as loader:
            for batch in loader:
                self.note(batch)
                features = _apply(module, batch.views[0], self.batch_size, self.precision)
                yield batch, features

    def sound_batches(self, module: Callable[[Tensor], Tensor]) -> Iterator[Features]:
        """`batches` of the test view without the images that could not be used."""
        for batch, features in self._seen(module, "test"):
            sound = batch.sound()
            kept = torch.isin(batch.ids, sound.ids)
            yield Features(sound.ids, features[kept], sound.labels)


def extract(
    encoder: nn.Module, feature_pass: FeaturePass, *, progress: str | None = None
) -> Features:
    """This rank's share of the pass's test view; over all ranks every sample once.

    encoder: [B, 3, H, W] -> [B, D] on `world.device`, where the features are too; its training mode
    is left as it was. progress: what rank 0 calls the bar that it draws, None for none.
    """
    world, samples = feature_pass.world, len(feature_pass.store)
    parts: list[Features] = []
    shown = progress is not None and world.is_main
    with progress_bar(progress, samples, shown=shown) as bar:
        for part in feature_pass.sound_batches(encoder):
            parts.append(part)
            bar.update(min(world.size * len(part.ids), samples - bar.n))
    if parts:
        return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))
    # More ranks than samples: an empty share that has the right width.
    shape = feature_pass.views["test"].flat_views[0].shape
    blank = torch.zeros(1, 3, *shape, device=world.device)
    width = _apply(encoder, blank, 1, feature_pass.precision).shape[1]
    none = torch.zeros(0, dtype=torch.int64, device=world.device)
    return Features(none, torch.zeros(0, width, device=world.device), none.clone())


def _apply(
    module: Callable[[Tensor], Tensor], pixels: Tensor, batch_size: int, precision: Precision
) -> Tensor:
    """float32 [n, D] of n <= batch_size images, always computed as a batch of `batch_size`.

    Libraries choose their kernels by shape. With one shape, an image's features do not depend on
    which images share its batch, and a compiled module is compiled once.
    """
    filler = pixels[:1].expand(batch_size - len(pixels), -1, -1, -1)
    full = torch.cat([pixels, filler]) if len(filler) else pixels
    with (
        eval_mode(module),
        torch.no_grad(),
        torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        return module(full.contiguous(memory_format=torch.channels_last))[: len(pixels)].float()


@contextmanager
def eval_mode(module: Callable[..., object]) -> Iterator[None]:
    """Every submodule in eval mode inside, each one's own mode back afterwards."""
    if not isinstance(module, nn.Module):
        yield
        return
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
