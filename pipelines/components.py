"""Components of a data set (saliency masks, say), cut from their pictures exactly as the views are.

All that is random about a view is in the Plan. So a component needs no transform of its own: the
Plan without its colours, which are nothing to it, is executed once more, on the component's picture
and by the same engine. It is resampled as the view is, black stands where a crop leaves the
picture, and it comes out as uint8. The price is the decoding of a second, small file per sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from typing import assert_never

import torch

from headrace.pipelines.batch import Batch
from headrace.pipelines.engines import Engine, SampleError, Work, open_engine
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Op,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
)
from headrace.pipelines.plan import Plan, ViewPlan
from headrace.pipelines.recipe import Augmentation, View
from headrace.shards.component import open_component
from headrace.shards.store import Store


def _moves_pixels(op: Op) -> bool:
    """Whether it says where a pixel goes, and nothing of its colour."""
    match op:
        case RandomResizedCrop() | Resize() | CenterCrop() | RandomCrop() | Flip():
            return True
        case ColorJitter() | Grayscale() | GaussianBlur() | Solarize():
            return False
        case RandAugment():
            return False  # does both: View refuses components beside it
        case _:
            assert_never(op)


def open_components(store: Store, augmentation: Augmentation) -> dict[str, Store]:
    """The components that the recipe asks for, by name. Raises ShardError where one is missing."""
    return {name: open_component(store, name) for name in augmentation.components}


@dataclass(frozen=True)
class Cut:
    """How the recipe cuts one component: `augmentation` has a view for each of `places`.

    places: of the views that ask for it, in `Augmentation.flat_views`.
    """

    name: str
    whole: Augmentation
    places: tuple[int, ...]
    augmentation: Augmentation

    @classmethod
    def of(cls, whole: Augmentation, name: str) -> "Cut":
        places = tuple(
            place for place, view in enumerate(whole.flat_views) if name in view.components
        )
        views = tuple(
            View(f"view_{place}", tuple(op for op in view.executed if _moves_pixels(op)))
            for place, view in enumerate(whole.flat_views)
            if name in view.components
        )
        return cls(name, whole, places, Augmentation(f"{whole.name}_{name}", views))

    def plan(self, plan: Plan) -> Plan:
        """What the plan of the pictures says of this component; shares its memory."""
        views = tuple(
            ViewPlan(
                tuple(
                    columns
                    for op, columns in zip(
                        self.whole.flat_views[place].executed, plan.views[place].ops, strict=True
                    )
                    if _moves_pixels(op)
                )
            )
            for place in self.places
        )
        return replace(plan, views=views, mix={}, draws={})

    def spread(self, batch: Batch) -> tuple[torch.Tensor | None, ...]:
        """An entry for each view of the recipe, of one channel: a component is grey."""
        cut_at = dict(zip(self.places, batch.views, strict=True))
        return tuple(
            cut_at[place][:, :1].contiguous() if place in cut_at else None
            for place in range(len(self.whole.flat_views))
        )


@dataclass(frozen=True)
class Part:
    """A component, how it is cut, and the engine that does it."""

    cut: Cut
    store: Store
    engine: Engine

    def run(self, work: Iterator[Work]) -> Iterator[Batch]:
        """The component's pictures for each Work of the data set's."""
        works = (
            Work(self.cut.plan(item.plan), self.store.read(item.plan.ids), item.labels)
            for item in work
        )
        try:
            yield from self.engine.run(works)
        except SampleError as error:
            reason = f"of its component {self.cut.name!r}, {error.reason}"
            raise SampleError(error.sample_id, reason) from error


class ComponentEngine:
    """An engine for the pictures, and one more for each component: what they make in one Batch.

    Each takes Works as it needs them. None takes more than two ahead, so together they do not
    either.
    """

    def __init__(self, pictures: Engine, parts: Sequence[Part]) -> None:
        self._pictures = pictures
        self._parts = parts

    @property
    def name(self) -> str:
        return self._pictures.name

    @property
    def approximations(self) -> tuple[str, ...]:
        return self._pictures.approximations

    def run(self, work: Iterator[Work]) -> Iterator[Batch]:
        first, *others = tee(work, 1 + len(self._parts))
        runs = [part.run(copy) for part, copy in zip(self._parts, others, strict=True)]
        for batch, *cuts in zip(self._pictures.run(first), *runs, strict=True):
            named = {
                part.cut.name: part.cut.spread(cut)
                for part, cut in zip(self._parts, cuts, strict=True)
            }
            yield replace(batch, components=named)

    def close(self) -> None:
        self._pictures.close()
        for part in self._parts:
            part.engine.close()


def with_components(
    pictures: Engine,
    stores: Mapping[str, Store],
    augmentation: Augmentation,
    *,
    device: torch.device,
    threads: int,
) -> Engine:
    """`pictures`, an engine of the recipe, or one that also makes the components `stores`."""
    if not stores:
        return pictures
    parts = []
    for name, store in stores.items():
        cut = Cut.of(augmentation, name)
        engine = open_engine(pictures.name, cut.augmentation, device=device, threads=threads)
        parts.append(Part(cut, store, engine))
    return ComponentEngine(pictures, parts)
