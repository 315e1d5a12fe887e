"""Erasing, mixing and a method's own draws: timm's samplers, and what is equal for whom."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from timm.data import random_erasing as timms_erasing
from timm.data.mixup import Mixup, cutmix_bbox_and_lam

from headrace.pipelines.noise import MAGNITUDES, half_normal_quantiles, normals
from headrace.pipelines.ops import RandomCrop
from headrace.pipelines.recipe import (
    Augmentation,
    Distribution,
    Draw,
    Integers,
    Mix,
    Permutation,
    RandomErasing,
    Uniform,
    View,
)
from tests.draws import Sample, assert_same_distribution, boxes_of, chi_square, drawn, seeded

SIZE = 64


def erased(
    declared: RandomErasing, samples: int, *, size: int = SIZE, **options: Any
) -> dict[str, NDArray[Any]]:
    view = View("v", (RandomCrop(size),), erase=declared)
    return dict(drawn(Augmentation("a", (view,)), samples, **options).views[0].erase)


# Erasing


class Watched:
    """Stands for a picture, and keeps the boxes that are written to it."""

    def __init__(self) -> None:
        self.boxes: list[tuple[int, int, int, int]] = []

    def __setitem__(self, place: tuple[slice, slice, slice], value: torch.Tensor) -> None:
        _, rows, columns = place
        self.boxes.append(
            (rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        )


def timms_boxes(declared: RandomErasing, size: int, samples: int) -> NDArray[np.int64]:
    """[samples, most boxes, 4], as in a plan."""
    module = timms_erasing.RandomErasing(
        declared.probability,
        *declared.area,
        *declared.ratio,
        mode=declared.fill,
        min_count=declared.count[0],
        max_count=declared.count[1],
        device="cpu",
    )
    boxes = np.zeros((samples, declared.count[1], 4), np.int64)
    with seeded():
        for row in boxes:
            picture = Watched()
            module._erase(picture, 3, size, size, torch.float32)
            if picture.boxes:
                row[: len(picture.boxes)] = picture.boxes
    return boxes


def of_boxes(boxes: NDArray[np.integer]) -> Sample:
    """What is compared of boxes [n, most, 4]: how many a picture gets, and what is of each."""
    there = boxes[..., 2] > 0
    several = boxes[there.sum(axis=1) > 1, 0]
    area_of_several = several[:, 2] * several[:, 3] if len(several) else np.zeros(1)
    return {
        "number": there.sum(axis=1),
        "area of the first of several": area_of_several,
        **boxes_of(boxes[there]),
    }


@pytest.mark.parametrize(
    ("size", "declared"),
    [
        (224, RandomErasing()),
        (SIZE, RandomErasing(0.6, (0.1, 0.9), (0.2, 2.0), "rand", (1, 3))),
        (32, RandomErasing(1.0, (0.02, 1 / 3), (0.3, 1 / 0.3), "const", (2, 2))),
    ],
)
def test_boxes_are_distributed_as_timms(size: int, declared: RandomErasing) -> None:
    samples = int(3000 / declared.probability)

    def ours(other: RandomErasing) -> Sample:
        return of_boxes(erased(other, 2 * samples, size=size)["box"])

    (low, high), (least, most) = declared.area, declared.ratio
    wrong = [
        replace(declared, probability=declared.probability - 0.04),
        replace(declared, area=(1.5 * low, high)),
        replace(declared, area=(low, 0.9 * high)),
        replace(declared, ratio=(1.1 * least, most)),
        replace(declared, ratio=(least, 0.9 * most)),
        replace(declared, count=(declared.count[0], declared.count[1] + 1)),
    ]
    theirs = of_boxes(timms_boxes(declared, size, samples))
    assert_same_distribution(theirs, ours, declared, wrong)


def test_boxes_lie_inside_and_those_that_are_not_are_zero() -> None:
    for size in (1, 2, 5, 224):
        box = erased(RandomErasing(0.7, (0.01, 1.0), count=(1, 4)), 2000, size=size)["box"]
        assert (box.dtype, box.shape) == (np.int32, (2000, 4, 4))
        assert (box >= 0).all()
        assert (box[..., :2] + box[..., 2:] <= size).all()
        there = (box[..., 2:] > 0).all(axis=2)
        assert (box[~there] == 0).all()
        assert (box[..., 2:].max(initial=0) < size) or size == 1
        assert there.any() == (size > 1)
    assert not erased(RandomErasing(0.0), 500)["box"].any()
    one = erased(RandomErasing(1.0, count=(1, 1)), 500)["box"]
    assert one.shape == (500, 1, 4)


def test_fills_have_their_columns_and_share_the_boxes() -> None:
    declared = RandomErasing(0.5, count=(1, 3))
    columns = {
        fill: erased(replace(declared, fill=fill), 500) for fill in ("const", "rand", "pixel")
    }
    assert {fill: list(found) for fill, found in columns.items()} == {
        "const": ["box"],
        "rand": ["box", "color"],
        "pixel": ["box", "key"],
    }
    boxes = [found["box"] for found in columns.values()]
    assert np.array_equal(boxes[0], boxes[1])
    assert np.array_equal(boxes[0], boxes[2])
    color, key = columns["rand"]["color"], columns["pixel"]["key"]
    assert (color.dtype, color.shape) == (np.float32, (500, 3, 3))
    assert (key.dtype, key.shape) == (np.uint64, (500,))
    assert len(np.unique(key)) == 500
    bits = (key[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * math.sqrt(0.25 / 500)


def test_colours_are_distributed_as_timms() -> None:
    with seeded():
        pixels = timms_erasing._get_pixels(False, True, (24_000, 1, 1), device="cpu").numpy()

    def of(color: NDArray[Any]) -> Sample:
        return {f"channel {c}": color[:, c] for c in range(3)} | {"strength": np.abs(color).ravel()}

    def ours(scale: float) -> Sample:
        return of(erased(RandomErasing(1, fill="rand"), 16_000)["color"][:, 0] * scale)

    assert_same_distribution(of(pixels.reshape(-1, 3)), ours, 1.0, wrong=[0.95, 1.05])
    color = erased(RandomErasing(1, fill="rand", count=(2, 2)), 16_000)["color"].reshape(-1, 6)
    correlation = np.corrcoef(color.T) - np.eye(6)
    assert np.abs(correlation).max() < 5 / math.sqrt(16_000)


# Normal numbers


def test_normals_are_the_quantiles_of_the_normal_distribution() -> None:
    table = half_normal_quantiles()
    assert (table.dtype, table.shape) == (np.float32, (MAGNITUDES,))
    assert not table.flags.writeable
    assert (np.diff(table) >= 0).all()
    every = np.sort(normals(np.arange(1 << 16)).astype(np.float64))
    assert np.array_equal(every, -every[::-1])
    # By the error function, which made none of it: the k-th of n has k + 1/2 n-ths below it.
    below = np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in every])
    assert np.abs(below * (1 << 16) - np.arange(1 << 16) - 0.5).max() < 0.01
    assert abs(every.mean()) < 1e-7
    assert every.std() == pytest.approx(1, abs=1e-4)
    assert (every**4).mean() == pytest.approx(3, abs=5e-3)
    assert 4.3 < every.max() < 4.34


def test_normals_take_numbers_of_any_kind_and_shape() -> None:
    bits = np.array([[0, 1 << 15, (1 << 15) - 1], [1, (1 << 15) + 1, (1 << 16) - 1]])
    kinds = (np.int64, np.uint32, np.uint16, np.int32)
    values = [normals(bits.astype(kind)) for kind in kinds]
    assert all(np.array_equal(values[0], other) for other in values)
    assert values[0].dtype == np.float32
    assert (values[0][:, 1] == -values[0][:, 0]).all()  # the upper bit is the sign


# Mixing


def mixed(declared: Mix, groups: int, group: int, *, size: int = SIZE) -> dict[str, NDArray[Any]]:
    recipe = Augmentation("a", (View("v", (RandomCrop(size),)),), group=group, mix=declared)
    return dict(drawn(recipe, groups * group).mix)


def timms_mixes(declared: Mix, count: int) -> dict[str, NDArray[Any]]:
    """`weight` and `box` of so many draws of timm's Mixup, as in a plan."""
    mode = {"group": "batch", "pair": "pair", "sample": "elem"}[declared.scope]
    mixup = Mixup(
        declared.mixup_alpha,
        declared.cutmix_alpha,
        prob=declared.probability,
        switch_prob=declared.switch_probability,
        mode=mode,
    )
    if mode == "batch":
        draws = [mixup._params_per_batch() for _ in range(count)]
    else:
        draws = list(zip(*mixup._params_per_elem(count), strict=True))
    weights, boxes = [], []
    for weight, cut in draws:
        box = (0, 0, 0, 0)
        if cut:
            (top, bottom, left, right), weight = cutmix_bbox_and_lam((3, SIZE, SIZE), weight)
            box = (top, left, bottom - top, right - left)
        weights.append(weight)
        boxes.append(box)
    return {"weight": np.array(weights, np.float32), "box": np.array(boxes)}


def of_mixes(columns: Mapping[str, NDArray[Any]]) -> Sample:
    """What is compared of mixes: how, how much, and of boxes their sizes and centres."""
    weight, box = columns["weight"], columns["box"]
    cut = box[:, 2] > 0
    box = box[cut] if cut.any() else np.zeros((1, 4))
    return {
        "cut": cut,
        "untouched": weight == 1,
        "weight of a mixture": np.append(weight[(weight < 1) & ~cut], 0),
        "weight of a cut": np.append(weight[cut], 0),
        **boxes_of(box),
        "centre's row": box[:, 0] + box[:, 2] / 2,
        "centre's column": box[:, 1] + box[:, 3] / 2,
    }


@pytest.mark.parametrize("scope", ["group", "pair", "sample"])
@pytest.mark.parametrize(
    "declared",
    [
        Mix(),  # DeiT's
        Mix(0.2, 0.0, probability=0.7),
        Mix(0.0, 0.5),
        Mix(2.0, 1.5, probability=0.9, switch_probability=0.6),
    ],
)
def test_mixing_is_distributed_as_timms(declared: Mix, scope: Any) -> None:
    declared = replace(declared, scope=scope)
    with seeded():
        theirs = of_mixes(timms_mixes(declared, 4000))

    def ours(other: Mix) -> Sample:
        groups, group = {"group": (8000, 2), "pair": (4000, 4), "sample": (4000, 2)}[scope]
        columns = mixed(other, groups, group)
        rows = np.arange(groups * group).reshape(groups, group)
        one_each = {"group": rows[:, 0], "pair": rows[:, :2].ravel(), "sample": rows.ravel()}[scope]
        return of_mixes({name: column[one_each] for name, column in columns.items()})

    both = declared.mixup_alpha > 0 and declared.cutmix_alpha > 0
    wrong = [replace(declared, probability=declared.probability - 0.06)]
    if declared.mixup_alpha:
        wrong.append(replace(declared, mixup_alpha=2 * declared.mixup_alpha))
    if declared.cutmix_alpha:
        wrong.append(replace(declared, cutmix_alpha=2 * declared.cutmix_alpha))
    if both:
        wrong.append(replace(declared, switch_probability=declared.switch_probability + 0.08))
    assert_same_distribution(theirs, ours, declared, wrong)


@pytest.mark.parametrize("group", [2, 4, 6, 64])
def test_partners_are_those_of_a_flipped_group(group: int) -> None:
    partner = mixed(Mix(), 3, group)["partner"]
    assert partner.dtype == np.int32
    rows = torch.arange(3 * group).reshape(3, group)
    assert np.array_equal(np.arange(3 * group) + partner, rows.flip(1).ravel().numpy())


@given(
    alphas=st.sampled_from([(0.8, 1.0), (0.0, 1.0), (0.3, 0.0), (1e-3, 1e-3), (50.0, 200.0)]),
    probability=st.sampled_from([0.0, 0.5, 1.0]),
    scope=st.sampled_from(["group", "pair", "sample"]),
    size=st.sampled_from([1, 2, 7, 32]),
    group=st.sampled_from([2, 6]),
)
def test_what_a_mix_promises(
    alphas: tuple[float, float], probability: float, scope: Any, size: int, group: int
) -> None:
    columns = mixed(Mix(*alphas, probability, scope=scope), 40, group, size=size)
    partner, weight, box = columns["partner"], columns["weight"], columns["box"]
    assert (weight.dtype, weight.shape) == (np.float32, (40 * group,))
    assert (box.dtype, box.shape) == (np.int32, (40 * group, 4))
    assert ((weight >= 0) & (weight <= 1)).all()
    assert (box >= 0).all()
    assert (box[:, :2] + box[:, 2:] <= size).all()
    there = box[:, 2] > 0
    assert (there == (box[:, 3] > 0)).all()
    assert (box[~there] == 0).all()
    outside = 1 - box[:, 2] * box[:, 3] / size**2
    assert np.array_equal(weight[there], outside[there].astype(np.float32))
    if probability == 0:
        assert (weight == 1).all()
        assert not there.any()
    if alphas[1] == 0:
        assert not there.any()
    if alphas[0] == 0:
        assert (weight[~there] == 1).all()
    # Two partners are mixed alike where they share a draw, so that nothing of a picture is lost.
    other = np.arange(40 * group) + partner
    pictures = [weight.reshape(40, group), box.reshape(40, group, 4)]
    if scope == "group":
        assert all((column == column[:, :1]).all() for column in pictures)
    if scope in ("group", "pair"):
        assert np.array_equal(weight, weight[other])
        assert np.array_equal(box, box[other])
    if probability == 1 and size == 32 and alphas == (0.8, 1.0):
        different = {"group": 1, "pair": group // 2, "sample": group}[scope]
        counts = Counter(len(np.unique(row)) for row in pictures[0])
        assert counts.most_common(1)[0][0] == different


def test_mixing_leaves_what_it_does_not_share() -> None:
    """The same groups of another size, or another scope, mix otherwise; ids change nothing."""
    base = mixed(Mix(), 4, 8)
    recipe = Augmentation("a", (View("v", (RandomCrop(SIZE),)),), group=8, mix=Mix())
    other = dict(drawn(recipe, np.arange(100, 132)).mix)
    assert all(np.array_equal(base[name], other[name]) for name in base)
    elsewhere = dict(drawn(recipe, 32, position=32).mix)
    assert not np.array_equal(base["weight"], elsewhere["weight"])


# A method's own draws


def declared(draw: Draw, samples: int, *, group: int = 4, **options: Any) -> NDArray[Any]:
    recipe = Augmentation("a", (View("v", (RandomCrop(8),)),), group=group, draws=(draw,))
    return drawn(recipe, samples, **options).draws[draw.name]


@pytest.mark.parametrize(
    ("distribution", "shape", "dtype", "expected"),
    [
        (Uniform(), (), np.float32, ()),
        (Uniform(-3.0, 5.0), (2, 3), np.float32, (2, 3)),
        (Integers(1), (5,), np.int64, (5,)),
        (Integers(2**31), (), np.int64, ()),
        (Permutation(9), (), np.int64, (9,)),
        (Permutation(2), (3, 2), np.int64, (3, 2, 2)),
    ],
)
def test_draws_have_the_declared_shape(
    distribution: Distribution, shape: tuple[int, ...], dtype: type, expected: tuple[int, ...]
) -> None:
    for samples in (0, 8):
        values = declared(Draw("d", distribution, shape), samples)
        assert (values.dtype, values.shape) == (dtype, (samples, *expected))
    match distribution:
        case Uniform():
            assert distribution.low <= values.min() <= values.max() <= distribution.high
        case Integers():
            assert 0 <= values.min() <= values.max() < distribution.limit
        case Permutation():
            assert (np.sort(values, axis=-1) == np.arange(distribution.length)).all()


def test_draws_are_uniform_and_independent() -> None:
    with seeded():
        theirs = {f"{place}": torch.empty(4000).uniform_(-1, 3).numpy() for place in range(3)}

    def ours(distribution: Uniform) -> Sample:
        values = declared(Draw("d", distribution, (3,)), 8000)
        return {f"{place}": values[:, place] for place in range(3)}

    wrong = [Uniform(-1, 2.98), Uniform(-0.98, 3)]
    assert_same_distribution(theirs, ours, Uniform(-1, 3), wrong)
    dice = declared(Draw("d", Integers(6), (2,)), 8000)
    assert chi_square(dice @ [6, 1], 36) < 35 + 4 * math.sqrt(2 * 35)
    orders = declared(Draw("d", Permutation(4)), 8000)
    assert chi_square(orders @ [64, 16, 4, 1], 24) < 23 + 4 * math.sqrt(2 * 23)


def test_draws_of_one_name_are_of_one_place() -> None:
    """Numbered in order: the second draw is not the first, whatever it is called."""
    recipe = Augmentation(
        "a",
        (View("v", (RandomCrop(8),)),),
        group=4,
        draws=(Draw("first", Uniform()), Draw("second", Uniform()), Draw("third", Uniform())),
    )
    plan = drawn(recipe, 4000)
    values = np.stack(list(plan.draws.values()))
    assert np.abs(np.corrcoef(values) - np.eye(3)).max() < 5 / math.sqrt(4000)
    renamed = replace(recipe, draws=(Draw("other", Uniform()), *recipe.draws[1:2]))
    again = drawn(renamed, 4000)
    assert np.array_equal(plan.draws["first"], again.draws["other"])
    assert np.array_equal(plan.draws["second"], again.draws["second"])
