"""The numbers that DALI's graph is fed, checked without DALI."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.pipelines import recipes
from headrace.pipelines.draw import draw
from headrace.pipelines.engines.dali.columns import (
    FINE_STEPS,
    LUMA,
    PILLOW_STEPS,
    linear_slots,
    op_columns,
    plan_columns,
)
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    Resize,
    Solarize,
)

NO_SIZES = np.empty((0, 2), np.int32)


def clamp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(values, 0, 255)


def turned(pixels: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Something that does not commute with the linear steps, in the place of a hue shift."""
    return np.roll(pixels, round(shift), axis=1) ** 2 / 255


def one_by_one(
    pixels: NDArray[np.float64], op: ColorJitter, factors: NDArray, order: NDArray
) -> NDArray[np.float64]:
    """The jitter's steps as its docstring orders them."""
    for index in order:
        factor = float(factors[index])
        gray = (pixels @ LUMA)[:, None]
        if index == 0 and op.brightness > 0 and op.additive_brightness:
            pixels = clamp(pixels + np.rint(255 * factor))
        elif index == 0 and op.brightness > 0:
            pixels = clamp(pixels * factor)
        elif index == 1 and op.contrast > 0:
            pixels = clamp(pixels * factor + (1 - factor) * gray.mean())
        elif index == 2 and op.saturation > 0:
            pixels = clamp(pixels * factor + (1 - factor) * gray)
        elif index == 3 and op.hue > 0:
            pixels = turned(pixels, np.trunc(factor * 255) % 256)
    return pixels


def by_slots(
    pixels: NDArray[np.float64], op: ColorJitter, columns: dict[str, NDArray], row: int
) -> NDArray[np.float64]:
    """The jitter as the graph runs it."""
    before, after = linear_slots(op)
    for slot in range(before + after):
        if slot == before and op.hue > 0:
            pixels = turned(pixels, float(columns["hue.shift"][row]))
        gray = (pixels @ LUMA)[:, None]
        made = pixels * columns[f"{slot}.scale"][row]
        if f"{slot}.mean" in columns:
            made = made + columns[f"{slot}.mean"][row] * gray.mean()
        if f"{slot}.gray" in columns:
            made = made + columns[f"{slot}.gray"][row] * gray
        if f"{slot}.shift" in columns:
            made = made + columns[f"{slot}.shift"][row]
        pixels = clamp(made)
    if after == 0 and op.hue > 0:
        pixels = turned(pixels, float(columns["hue.shift"][row]))
    return pixels


strengths = st.sampled_from([0.0, 0.4, 0.8])


@given(
    op=st.builds(
        ColorJitter,
        strengths,
        strengths,
        strengths,
        st.sampled_from([0.0, 0.2, 0.5]),
        additive_brightness=st.booleans(),
    ),
    orders=st.lists(st.permutations(range(4)), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_jitter_slots_are_the_steps_in_their_order(
    op: ColorJitter, orders: list[list[int]], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    samples = len(orders)
    factors = generator.uniform(0.2, 1.8, (samples, 4)).astype(np.float32)
    factors[:, 3] = generator.uniform(-0.5, 0.5, samples)
    draws = {
        "apply": np.ones(samples, bool),
        "factors": factors,
        "order": np.array(orders, np.int8),
    }
    columns = op_columns(op, draws, NO_SIZES, 32)
    pixels = generator.uniform(0, 255, (7, 3))
    for row in range(samples):
        np.testing.assert_allclose(
            by_slots(pixels, op, columns, row),
            one_by_one(pixels, op, factors[row], draws["order"][row]),
            rtol=1e-4,
            atol=1e-3,
        )


def test_jitter_that_is_not_drawn_has_neutral_numbers() -> None:
    op = ColorJitter(0.8, 0.8, 0.8, 0.2)
    draws = {
        "apply": np.array([False, True]),
        "factors": np.array([[0.3, 0.3, 0.3, 0.1]] * 2, np.float32),
        "order": np.array([[2, 3, 1, 0]] * 2, np.int8),
    }
    columns = op_columns(op, draws, NO_SIZES, 32)
    assert linear_slots(op) == (3, 3)
    for name, column in columns.items():
        neutral = 1 if name.endswith("scale") else FINE_STEPS if name.endswith("steps") else 0
        assert column[0] == neutral, name
    assert columns["hue.steps"][1] == PILLOW_STEPS
    assert columns["hue.shift"][1] == 25
    assert [columns[f"{slot}.scale"][1] for slot in range(6)] == pytest.approx(
        [0.3, 1, 1, 0.3, 0.3, 1]
    )


def test_added_brightness_is_a_whole_number_of_levels() -> None:
    op = ColorJitter(0.4, 0, 0, 0, additive_brightness=True)
    draws = {
        "apply": np.array([False, True, True]),
        "factors": np.array([[0.3, 1, 1, 0], [0.1, 1, 1, 0], [-0.399, 1, 1, 0]], np.float32),
        "order": np.array([[0, 1, 2, 3]] * 3, np.int8),
    }
    columns = op_columns(op, draws, NO_SIZES, 32)
    assert columns["0.shift"].tolist() == [0, 26, -102]  # of 25.5 and -101.7; halves to even
    assert columns["0.scale"].tolist() == [1, 1, 1]
    assert set(columns) == {"0.shift", "0.scale"}


@given(shift=st.floats(-0.5, 0.5, width=32))
def test_hue_shift_wraps_as_eight_bits_do(shift: float) -> None:
    draws = {
        "apply": np.ones(1, bool),
        "factors": np.array([[1, 1, 1, shift]], np.float32),
        "order": np.array([[0, 1, 2, 3]], np.int8),
    }
    column = op_columns(ColorJitter(0, 0, 0, 0.5), draws, NO_SIZES, 32)["hue.shift"]
    assert column[0] == np.int32(float(np.float32(shift)) * 255).astype(np.uint8)


def test_blur_takes_three_sigmas_and_one_pixel_for_none() -> None:
    sigma = np.array([0, 0.1, 1.0, 2.0, 9.0], np.float32)
    columns = op_columns(GaussianBlur(), {"sigma": sigma}, NO_SIZES, 20)
    assert columns["window"].tolist() == [1, 3, 7, 13, 39]
    assert columns["sigma"].tolist() == [1, *sigma[1:].tolist()]
    fixed = op_columns(GaussianBlur(kernel_size=23), {"sigma": sigma}, NO_SIZES, 224)
    assert fixed["window"].tolist() == [1, 23, 23, 23, 23]


def test_gray_and_solarize_leave_alone_what_is_not_drawn() -> None:
    draws = {"apply": np.array([False, True])}
    matrix = op_columns(Grayscale(), draws, NO_SIZES, 32)["matrix"]
    assert np.array_equal(matrix[0], np.eye(3))
    assert np.array_equal(matrix[1], np.tile(LUMA, (3, 1)))
    assert LUMA.sum() == 1
    threshold = op_columns(Solarize(threshold=100), draws, NO_SIZES, 32)["threshold"]
    assert threshold.tolist() == [256, 100]


def test_centre_crop_sits_in_the_resized_picture() -> None:
    augmentation = recipes.center(32, 40)
    sizes = np.array([(100, 80), (30, 90)], np.int32)
    plan = draw(
        augmentation,
        seed=0,
        epoch=0,
        position=0,
        ids=np.arange(2),
        occurrences=np.zeros(2, np.int32),
        sizes=sizes,
    )
    columns = plan_columns(augmentation, plan)
    assert columns["view.0.picture.0.op.0.size"].tolist() == [[50, 40], [40, 120]]
    assert columns["view.0.picture.0.op.1.start"].tolist() == [[9, 4], [4, 44]]
    assert isinstance(augmentation.views[0].ops[0], Resize)
    assert isinstance(augmentation.views[0].ops[1], CenterCrop)


def test_columns_of_a_batch_are_those_of_its_parts() -> None:
    augmentation = recipes.dino(32, 16, 3)
    plan = draw(
        augmentation,
        seed=3,
        epoch=1,
        position=0,
        ids=np.arange(5),
        occurrences=np.zeros(5, np.int32),
        sizes=np.full((5, 2), 50, np.int32),
    )
    whole = plan_columns(augmentation, plan)
    parts = [plan_columns(augmentation, plan.rows(rows)) for rows in (slice(0, 2), slice(2, 5))]
    for name, column in whole.items():
        assert column.flags.c_contiguous, name
        joined = np.concatenate([part[name] for part in parts])
        assert joined.dtype == column.dtype, name
        assert np.array_equal(joined, column), name
    assert whole["view.2.op.2.0.scale"].shape == (5, 3, 1, 1, 1)
    assert whole["view.2.op.4.sigma"].shape == (5, 3)
