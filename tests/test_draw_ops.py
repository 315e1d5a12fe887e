"""What each op draws: distributed as torchvision's and timm's own samplers, and seen not to be."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision import transforms

from headrace.pipelines import recipes
from headrace.pipelines.counters import Kind, Scope, counters, owners
from headrace.pipelines.ops import (
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    OneOf,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
    height_and_width,
)
from headrace.pipelines.philox import words
from headrace.pipelines.recipe import Augmentation, View
from tests.draws import (
    GROUP,
    THREE_AUGMENT,
    assert_same_distribution,
    boxes_of,
    chi_square,
    columns,
    drawn,
    one,
    seeded,
)


def plain_crop(seed: int, sample: int, op: RandomResizedCrop, height: int, width: int) -> list[int]:
    """torchvision's get_params in plain Python, on the words of the sample's counters."""
    rows = counters(owners(Scope.SAMPLE, np.array([sample])), Kind.CROP, blocks=10)
    low, high = (math.log(ratio) for ratio in op.ratio)
    for row in words(seed, rows).tolist():
        area_uniform, ratio_uniform = row[0] / 2**32, row[1] / 2**32
        area = height * width * (op.scale[0] + area_uniform * (op.scale[1] - op.scale[0]))
        ratio = math.exp(low + ratio_uniform * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [row[2] * (height - h + 1) // 2**32, row[3] * (width - w + 1) // 2**32, h, w]
    if width / height < min(op.ratio):
        w, h = width, round(width / min(op.ratio))
    elif width / height > max(op.ratio):
        w, h = round(height * max(op.ratio)), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(
    ("op", "height", "width"),
    [
        (RandomResizedCrop(224), 375, 500),
        (RandomResizedCrop(224, (0.4, 1.0)), 500, 333),
        (RandomResizedCrop(96, (0.05, 0.4)), 60, 1000),
        (RandomResizedCrop(96, (0.9, 1.0)), 1000, 60),
        (RandomResizedCrop(16, (1.0, 1.0), (1.0, 1.0)), 33, 32),
        (RandomResizedCrop(16, (0.5, 0.5), (2.0, 2.0)), 7, 5),
        (RandomResizedCrop(16), 1, 1),
        (RandomResizedCrop(16), 1, 4000),
        (RandomResizedCrop(16), 60_000, 60_000),
    ],
)
def test_crop_is_torchvisions_algorithm(op: RandomResizedCrop, height: int, width: int) -> None:
    boxes = columns(op, 300, height=height, width=width)["box"]
    assert boxes.dtype == np.int32
    expected = [plain_crop(1, sample, op, height, width) for sample in range(300)]
    assert np.abs(boxes - np.array(expected)).max() <= 1
    assert (boxes >= [0, 0, 1, 1]).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()


@pytest.mark.parametrize(
    ("scale", "height", "width"),
    [
        ((0.08, 1.0), 375, 500),
        ((0.4, 1.0), 500, 333),
        ((0.05, 0.4), 200, 900),
        ((0.2, 1.0), 32, 32),
    ],
)
def test_crop_is_distributed_as_torchvisions(
    scale: tuple[float, float], height: int, width: int
) -> None:
    picture = torch.empty(3, height, width, dtype=torch.uint8)
    with seeded():
        theirs = [
            transforms.RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3])
            for _ in range(3000)
        ]

    def ours(op: RandomResizedCrop) -> dict[str, NDArray[Any]]:
        return boxes_of(columns(op, 6000, height=height, width=width)["box"])

    low, high = scale
    assert_same_distribution(
        boxes_of(np.array(theirs)),
        ours,
        RandomResizedCrop(96, scale),
        wrong=[
            RandomResizedCrop(96, (low + 0.02, high)),
            RandomResizedCrop(96, (low, 0.6 * high)),
            RandomResizedCrop(96, scale, (0.72, 4 / 3)),
            RandomResizedCrop(96, scale, (3 / 4, 1.28)),
        ],
    )


def torchvisions_starts(
    crop: transforms.RandomCrop, height: int, width: int
) -> dict[str, NDArray[Any]]:
    """Where it begins in the picture, told from the numbers of the pixels that it hands out."""
    picture = torch.arange(1, height * width + 1, dtype=torch.int32).reshape(1, height, width)
    starts = []
    with seeded():
        for _ in range(3000):
            cut = np.asarray(crop(picture))[0]
            row, column = divmod(int((cut > 0).argmax()), cut.shape[1])
            number = cut[row, column] - 1
            starts.append((number // width - row, number % width - column))
    top, left = np.array(starts).T
    return {"top": top, "left": left, "diagonal": top - left}


@pytest.mark.parametrize(
    ("op", "height", "width"),
    [
        (RandomCrop(32, 4), 32, 32),
        (RandomCrop(224), 375, 500),
        (RandomCrop(224), 200, 150),
        (RandomCrop(32, 4), 20, 50),
        (RandomCrop(7, 3), 1, 1),
        (RandomCrop(8), 8, 8),
    ],
)
def test_random_crop_is_distributed_as_torchvisions(
    op: RandomCrop, height: int, width: int
) -> None:
    module = transforms.RandomCrop(op.size, op.padding_pixels or None, pad_if_needed=True)

    def ours(op: RandomCrop) -> dict[str, NDArray[Any]]:
        start = columns(op, 6000, height=height, width=width)["start"]
        assert start.dtype == np.int32
        return {"top": start[:, 0], "left": start[:, 1], "diagonal": start[:, 0] - start[:, 1]}

    theirs = torchvisions_starts(module, height, width)
    # The crop moves by a whole pixel at least; a change of a twentieth is seen in any picture.
    side = height_and_width(op.size)[0]
    more = max(1, side // 20)
    wrong = [RandomCrop(op.size, op.padding_pixels + more), RandomCrop(side + more)]
    assert_same_distribution(theirs, ours, op, wrong)
    mine = ours(op)
    for name in ("top", "left"):
        assert {int(theirs[name].min()), int(theirs[name].max())} <= set(mine[name].tolist())


def test_random_crop_knows_the_size_that_it_is_given() -> None:
    view = View("v", (Resize(40), RandomCrop(32, 4)))
    start = drawn(Augmentation("a", (view,)), 4000, height=300, width=400).views[0].ops[1]["start"]
    assert [start[:, 0].min(), start[:, 0].max()] == [-4, 40 + 4 - 32]
    assert [start[:, 1].min(), start[:, 1].max()] == [-4, 53 + 4 - 32]


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.2, 0.1), (0.8, 1.5, 0.8, 0.5)])
def test_jitter_is_distributed_as_torchvisions(
    strengths: tuple[float, float, float, float],
) -> None:
    module = transforms.ColorJitter(*strengths)
    with seeded():
        sampled = [
            transforms.ColorJitter.get_params(
                module.brightness,  # pyright: ignore[reportArgumentType]
                module.contrast,  # pyright: ignore[reportArgumentType]
                module.saturation,  # pyright: ignore[reportArgumentType]
                module.hue,  # pyright: ignore[reportArgumentType]
            )
            for _ in range(3000)
        ]
    names = ("brightness", "contrast", "saturation", "hue")
    theirs = {name: np.array([row[1 + i] for row in sampled]) for i, name in enumerate(names)}
    theirs |= {
        f"place of {name}": np.array([row[0].tolist().index(i) for row in sampled])
        for i, name in enumerate(names)
    }

    def ours(op: ColorJitter) -> dict[str, NDArray[Any]]:
        drawn_ = columns(op, 6000)
        places = np.argsort(drawn_["order"], axis=1)
        return {name: drawn_["factors"][:, i] for i, name in enumerate(names)} | {
            f"place of {name}": places[:, i] for i, name in enumerate(names)
        }

    right = ColorJitter(*strengths, probability=0.8)
    changed = [
        replace(right, **{name: 0.95 * getattr(right, name)})
        for name in ("brightness", "contrast", "saturation", "hue")
    ]
    assert_same_distribution(
        theirs, ours, right, [*changed, replace(right, additive_brightness=True)]
    )
    own = columns(right, 6000)
    assert (own["factors"].dtype, own["order"].dtype) == (np.float32, np.int8)
    assert np.array_equal(np.sort(own["order"], axis=1), np.tile(np.arange(4), (6000, 1)))
    assert chi_square(own["order"] @ [64, 16, 4, 1], 24) < 23 + 4 * math.sqrt(2 * 23)
    assert abs(own["apply"].mean() - 0.8) < 5 * math.sqrt(0.8 * 0.2 / 6000)
    correlation = np.corrcoef(np.column_stack([own["factors"], own["apply"]]).T) - np.eye(5)
    assert np.abs(correlation).max() < 5 / math.sqrt(6000)


def test_additive_brightness_is_a_shift_and_the_rest_stays() -> None:
    factor = ColorJitter(0.4, 0.3, 0.2, 0.1)
    shift = replace(factor, additive_brightness=True)
    with seeded():
        theirs = {"shift": torch.empty(3000).uniform_(-0.4, 0.4).numpy()}
    assert_same_distribution(
        theirs,
        lambda op: {"shift": columns(op)["factors"][:, 0]},
        shift,
        [factor, replace(shift, brightness=0.39)],
    )
    before, after = columns(factor), columns(shift)
    assert np.array_equal(before["factors"][:, 1:], after["factors"][:, 1:])
    assert np.array_equal(before["order"], after["order"])


def test_jitter_of_no_strength_changes_nothing() -> None:
    factors = columns(ColorJitter(0, 0, 0, 0))["factors"]
    assert np.array_equal(factors, np.tile(np.array([1, 1, 1, 0], np.float32), (4000, 1)))


@pytest.mark.parametrize("op", [Flip, Grayscale, Solarize])
@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_gates_open_as_often_as_declared(op: type[Flip], probability: float) -> None:
    gate = columns(op(probability))["apply"]
    assert gate.dtype == np.bool_
    assert abs(gate.mean() - probability) <= 5 * math.sqrt(probability * (1 - probability) / 4000)


@pytest.mark.parametrize("group", [1, 4])
def test_blur_is_distributed_as_torchvisions(group: int) -> None:
    with seeded():
        theirs = [transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(3000)]
    right = GaussianBlur(1.0, (0.1, 2.0), scope="sample" if group == 1 else "group")

    def ours(op: GaussianBlur) -> dict[str, NDArray[Any]]:
        return {"sigma": columns(op, 6000 * group, group=group)["sigma"][::group]}

    wrong = [replace(right, sigma=(0.12, 2.0)), replace(right, sigma=(0.1, 1.95))]
    assert_same_distribution({"sigma": np.array(theirs)}, ours, right, wrong)


def test_blur_is_applied_as_often_as_declared() -> None:
    for scope in ("sample", "group"):
        sigma = columns(GaussianBlur(0.5, scope=scope), group=GROUP)["sigma"]
        assert sigma.dtype == np.float32
        assert abs((sigma > 0).mean() - 0.5) < 5 * math.sqrt(0.25 / 4000)
        assert sigma[sigma > 0].min() >= np.float32(0.1)
        # Whether it is applied is each sample's own: the 16 patterns of four are equally frequent.
        patterns = (sigma > 0).reshape(-1, GROUP) @ [1, 2, 4, 8]
        assert chi_square(patterns, 16) < 15 + 4 * math.sqrt(2 * 15)
        assert (columns(GaussianBlur(0.0, scope=scope))["sigma"] == 0).all()
        assert (columns(GaussianBlur(1.0, scope=scope))["sigma"] > 0).all()


def test_one_of_applies_one() -> None:
    ops = drawn(one(THREE_AUGMENT), 6000).views[0].ops[1:]
    applied = np.stack([next(iter(op.values())) > 0 for op in ops])
    assert (applied.sum(axis=0) == 1).all()
    assert chi_square(applied.argmax(axis=0), 3) < 2 + 4 * math.sqrt(2 * 2)
    assert [next(iter(op.values())).dtype for op in ops] == [np.bool_, np.bool_, np.float32]
    # An op that was chosen then has its own probability, and its own draws are not touched.
    seldom = OneOf((Solarize(0.5), GaussianBlur(0.3, (1.0, 2.0))))
    ops = drawn(one(seldom), 6000).views[0].ops[1:]
    assert abs(ops[0]["apply"].mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 6000)
    assert abs((ops[1]["sigma"] > 0).mean() - 0.15) < 5 * math.sqrt(0.15 * 0.85 / 6000)
    alone = columns(GaussianBlur(0.3, (1.0, 2.0)), 6000)["sigma"]
    assert np.array_equal(ops[1]["sigma"][ops[1]["sigma"] > 0], alone[ops[1]["sigma"] > 0])


def test_ops_without_draws_have_empty_columns() -> None:
    plan = drawn(recipes.center(), 3)
    assert [dict(op) for op in plan.views[0].ops] == [{}, {}]
    assert plan.views[0].mask is None
    assert (plan.views[0].erase, plan.mix, plan.draws) == ({}, {}, {})
