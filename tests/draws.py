"""What the tests of the draws share: recipes that hold everything, and how samples are compared."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from headrace.pipelines.draw import draw
from headrace.pipelines.masks import BlockMask, MultiBlockMask, RandomMask
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    OneOf,
    Op,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
)
from headrace.pipelines.plan import Plan
from headrace.pipelines.recipe import (
    Augmentation,
    Draw,
    Integers,
    Mix,
    Permutation,
    RandomErasing,
    Uniform,
    View,
)

GROUP = 4
THREE_AUGMENT = OneOf((Grayscale(1), Solarize(1), GaussianBlur(1)))
EVERY_COLOUR = (
    ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8),
    ColorJitter(0.4, 0.4, 0.2, 0.1, probability=0.8, additive_brightness=True),
    Grayscale(),
    GaussianBlur(),
    GaussianBlur(scope="group"),
    Solarize(),
    THREE_AUGMENT,
)
DRAWS = (
    Draw("share", Uniform(-1.0, 2.0), (3,)),
    Draw("turn", Integers(4)),
    Draw("order", Permutation(9), scope="group"),
    Draw("mask", Uniform(), (2, 5), scope="group"),  # called as a column is
)
EVERY_VIEW = Augmentation(
    "every view",
    (
        View(
            "crop",
            (RandomResizedCrop(32, (0.2, 1.0)), Flip(), RandAugment(), *EVERY_COLOUR),
            count=2,
            mask=RandomMask(8, 0.75),
            erase=RandomErasing(0.5, count=(1, 3), fill="rand"),
        ),
        View(
            "cut",
            (Resize(40), RandomCrop(32, 4), Flip(0.3), RandAugment(num_ops=3)),
            mask=BlockMask(4, (0.1, 0.5), min_patches=4, probability=0.5),
            erase=RandomErasing(0.5),
        ),
        View("pad", (RandomCrop(64),), mask=MultiBlockMask(4), erase=RandomErasing(fill="const")),
        View("test", (Resize(40), CenterCrop(32))),
    ),
    group=GROUP,
    draws=DRAWS,
)
EVERY_MIX = tuple(
    Augmentation(
        f"mix by {scope}",
        (
            View(
                "v",
                (RandomResizedCrop(32), Flip(), RandAugment(interpolation="random")),
                erase=RandomErasing(0.5, count=(2, 2)),
                mask=MultiBlockMask(4, targets=2, min_keep=5),
            ),
        ),
        group=GROUP,
        mix=Mix(probability=0.8, scope=scope),
        draws=DRAWS,
    )
    for scope in ("group", "pair", "sample")
)
EVERYTHING = (EVERY_VIEW, *EVERY_MIX)


def drawn(
    augmentation: Augmentation,
    ids: NDArray[np.int64] | int,
    *,
    seed: int = 1,
    epoch: int = 0,
    position: int = 0,
    first: int = 0,
    height: int = 300,
    width: int = 400,
    occurrences: NDArray[np.int32] | None = None,
) -> Plan:
    """The plan of so many samples, or of these, all of one size."""
    ids = np.arange(ids) if isinstance(ids, int) else ids
    if occurrences is None:
        occurrences = np.zeros(len(ids), np.int32)
    sizes = np.tile(np.array([height, width], np.int32), (len(ids), 1))
    return draw(
        augmentation,
        seed=seed,
        epoch=epoch,
        position=position,
        first=first,
        ids=ids,
        occurrences=occurrences,
        sizes=sizes,
    )


def one(op: Op | OneOf, *, size: int = 32, group: int = 1) -> Augmentation:
    """A recipe of this op, with a crop before it where it needs one."""
    cuts = isinstance(op, RandomResizedCrop | RandomCrop)
    ops = (op,) if cuts else (RandomResizedCrop(size), op)
    return Augmentation("one", (View("one", ops),), group=group)


def columns(
    op: Op, samples: int = 4000, *, height: int = 300, width: int = 400, group: int = 1
) -> dict[str, NDArray[Any]]:
    plan = drawn(one(op, group=group), samples, height=height, width=width)
    return dict(plan.views[0].ops[-1])


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The global generators, which the libraries' samplers take, from a seed and as they were."""
    python, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpys)  # noqa: NPY002


LIKELY = 1e-4  # what a comparison of equal distributions falls below once in 10,000 times


def p_value(first: ArrayLike, second: ArrayLike) -> float:
    """How likely samples of one distribution differ as much, in the middle or at an end.

    Too large for what takes few values, so that a comparison of such says less, never more.
    """
    mine, theirs = np.sort(np.asarray(first, float)), np.sort(np.asarray(second, float))
    ends = (
        (mine, theirs),
        (theirs, mine),
        (-mine[::-1], -theirs[::-1]),
        (-theirs[::-1], -mine[::-1]),
    )
    return min(_kolmogorov_smirnov(mine, theirs), *(_exceeding(*pair) for pair in ends))


def _kolmogorov_smirnov(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Of the two-sample test, by its limit distribution (Stephens 1970). Both ascending."""
    places = np.concatenate([first, second])
    distance = np.abs(
        np.searchsorted(first, places, side="right") / len(first)
        - np.searchsorted(second, places, side="right") / len(second)
    ).max()
    root = math.sqrt(len(first) * len(second) / (len(first) + len(second)))
    level = (root + 0.12 + 0.11 / root) * distance
    if level < 0.2:
        return 1.0  # where the series is no more than 1e-12 below it
    terms = (math.exp(-2 * (k * level) ** 2) * (-1) ** (k - 1) for k in range(1, 101))
    return min(max(2 * sum(terms), 0.0), 1.0)


def _exceeding(first: NDArray[Any], second: NDArray[Any]) -> float:
    """That so many of the first lie above all of the second (Rosenbaum 1954): what tells apart two
    ranges that end at different places. Both ascending."""
    above = len(first) - int(np.searchsorted(first, second[-1], side="right"))
    left = np.arange(above)
    return float(np.prod((len(first) - left) / (len(first) + len(second) - left)))


Sample = Mapping[str, NDArray[Any]]


def least_likely(ours: Sample, theirs: Sample) -> tuple[float, str]:
    """The smallest p-value of all quantities, and which it is of: (1e-9, "height")."""
    assert ours.keys() == theirs.keys()
    return min((p_value(ours[name], theirs[name]), name) for name in ours)


def assert_same_distribution(
    theirs: Sample, ours: Callable[[Any], Sample], declared: object, wrong: Iterable[object]
) -> None:
    """What `ours` samples of what is `declared` is distributed as `theirs`; what it samples of any
    of the `wrong` declarations, which are almost right, is not: the comparison can fail."""
    p, name = least_likely(ours(declared), theirs)
    assert p > LIKELY, f"{name} is distributed otherwise: p = {p:.1g}"
    for other in wrong:
        p, name = least_likely(ours(other), theirs)
        assert p < LIKELY, f"{other} is not noticed: p = {p:.1g} of {name}"


def chi_square(outcomes: NDArray[Any], kinds: int) -> float:
    """Of equally likely outcomes, of which each was seen."""
    _, counts = np.unique(outcomes, return_counts=True)
    assert len(counts) == kinds
    expected = len(outcomes) / kinds
    return float(((counts - expected) ** 2 / expected).sum())


def boxes_of(boxes: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """What is compared of boxes [n, 4] = top, left, height, width."""
    top, left, height, width = boxes.T.astype(float)
    return {
        "top": top,
        "left": left,
        "height": height,
        "width": width,
        "area": height * width,
        "aspect": height / np.maximum(width, 1),
        "diagonal": top - left,
    }
