"""RandAugment by the DALI engine: each operation, the chain of all, what it approximates."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("nvidia.dali")

from headrace.pipelines import engines, recipes
from headrace.pipelines.approximation import APPROXIMATIONS, Approximation
from headrace.pipelines.engines import Unsupported, Work
from headrace.pipelines.engines.dali.columns import AFFINE, layer_prefix, policy_columns
from headrace.pipelines.engines.reference import apply_op
from headrace.pipelines.ops import (
    RAND_AUGMENT_OPERATIONS,
    CenterCrop,
    Flip,
    RandAugment,
    RandAugmentOperation,
)
from headrace.pipelines.plan import ViewPlan
from headrace.pipelines.recipe import Augmentation
from tests.dali_cases import (
    CPU,
    levels_apart,
    make_work,
    one_view,
    photo_and_smooth_pictures,
    run_dali,
    run_reference,
)

pytestmark = pytest.mark.dali

SIDE = 140
CUT = CenterCrop(SIDE)
BILINEAR = RandAugment(interpolation="bilinear", probability=1.0)

# Mean over the worst picture, in 8-bit levels. The engine promises 1 for geometry and 2 for colour.
NEARLY = 0.1
EQUALIZE = 0.5


def with_draws(work: Work, operation: list[list[int]], argument: list[list[float]]) -> Work:
    """The same work with these operations, [B, num_ops], in the place of those that were drawn."""
    (view,) = work.plan.views
    columns = {
        "operation": np.array(operation, np.int8),
        "argument": np.array(argument, np.float32),
        "bicubic": np.zeros((len(operation), len(operation[0])), np.bool_),
    }
    views = (ViewPlan((*view.ops[:-1], columns)),)
    return replace(work, plan=replace(work.plan, views=views))


def work_with(
    augmentation: Augmentation,
    pictures: Sequence[Image.Image],
    operation: Sequence[RandAugmentOperation],
    argument: Sequence[float],
) -> Work:
    """Every picture with every (operation, argument)."""
    places = [[RAND_AUGMENT_OPERATIONS.index(name)] for name in operation]
    arguments = [[value] for value in argument]
    work = make_work(augmentation, [picture for picture in pictures for _ in operation])
    return with_draws(work, places * len(pictures), arguments * len(pictures))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return list(photo_and_smooth_pictures())


CASES: dict[RandAugmentOperation, tuple[Sequence[float], float]] = {
    "AutoContrast": ((0,), NEARLY),
    "Equalize": ((0,), EQUALIZE),
    "Invert": ((0,), 0),
    "Rotate": ((30, -26.8, 3, 0), NEARLY),
    "Posterize": ((0, 1, 4, 8), 0),
    "Solarize": ((0, 25, 128, 256), 0),
    "SolarizeAdd": ((40, 128, 0), 0),
    "Color": ((0.1, 0.7, 1, 1.9), NEARLY),
    "Contrast": ((0.1, 0.7, 1, 1.9), NEARLY),
    "Brightness": ((0.1, 0.7, 1, 1.9), NEARLY),
    "Sharpness": ((0.1, 0.7, 1, 1.9), 0.002),
    "ShearX": ((0.3, -0.27, 0), NEARLY),
    "ShearY": ((0.3, -0.27, 0), NEARLY),
    "TranslateX": ((0.44, -0.207, 0.013, 0), NEARLY),
    "TranslateY": ((0.44, -0.207, 0.013, 0), NEARLY),
}


@pytest.mark.parametrize("name", RAND_AUGMENT_OPERATIONS)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among-all"])
def test_every_operation_is_the_references(
    pictures: list[Image.Image], name: RandAugmentOperation, alone: bool
) -> None:
    """In a graph of its own, and in the graph of all operations, whose numbers change nothing."""
    arguments, tolerance = CASES[name]
    operations = (name,) if alone else RAND_AUGMENT_OPERATIONS
    op = replace(BILINEAR, num_ops=1, operations=operations)
    augmentation = one_view(CUT, op)
    work = work_with(augmentation, pictures, (name,) * len(arguments), arguments)
    expected = run_reference(augmentation, [work])
    made = run_dali(augmentation, [work])
    assert levels_apart(made, expected).max() <= tolerance
    plain = run_dali(one_view(CUT), [make_work(one_view(CUT), pictures)])
    different = expected[0].views[0][:: len(arguments)] != plain[0].views[0]
    assert different.any()


def test_equalize_keeps_a_flat_picture_and_takes_few_colours() -> None:
    gradient = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
    flat = Image.new("RGB", (SIDE, SIDE), (9, 100, 255))
    two = flat.copy()
    two.paste((30, 40, 50), (0, 0, SIDE // 3, SIDE))
    op = replace(BILINEAR, num_ops=1, operations=("Equalize", "AutoContrast"))
    augmentation = one_view(CUT, op)
    names: list[RandAugmentOperation] = ["Equalize", "AutoContrast"]
    work = work_with(augmentation, [gradient, flat, two], names, [0, 0])
    made, expected = run_dali(augmentation, [work]), run_reference(augmentation, [work])
    assert levels_apart(made, expected).max() <= 1.5
    assert levels_apart(made, expected)[2:4].max() == 0


@pytest.mark.parametrize("num_ops", [1, 2, 3])
def test_layers_follow_one_another(pictures: list[Image.Image], num_ops: int) -> None:
    op = replace(BILINEAR, num_ops=num_ops, probability=0.8, magnitude_std=2.0)
    augmentation = one_view(CUT, Flip(), op)
    work = [make_work(augmentation, pictures, seed=seed) for seed in range(4)]
    apart = levels_apart(run_dali(augmentation, work), run_reference(augmentation, work))
    assert apart.max() <= 2
    assert apart.mean() <= 0.2


def test_views_of_several_pictures_have_operations_of_their_own(
    pictures: list[Image.Image],
) -> None:
    single = one_view(CUT, BILINEAR)
    augmentation = replace(single, views=(replace(single.views[0], count=3),))
    work = [make_work(augmentation, pictures)]
    made, expected = run_dali(augmentation, work), run_reference(augmentation, work)
    assert levels_apart(made, expected).max() <= 2
    assert not (made[0].views[0] == made[0].views[1]).all()


def test_a_bicubic_recipe_is_refused_unless_its_approximations_are_asked_for(
    pictures: list[Image.Image],
) -> None:
    deit = recipes.deit()
    reasons = engines.unsupported("dali", deit)
    assert len(reasons) == 2
    assert "bilinearly; --data.approximate affine-bilinear" in reasons[0]
    assert "OpenCV's; --data.approximate equalize-opencv" in reasons[1]
    (left,) = engines.unsupported("dali", deit, approximate=("affine-bilinear",))
    assert "equalize-opencv" in left
    assert "affine-bilinear" not in left
    with pytest.raises(Unsupported, match="affine-bilinear"):
        engines.open_engine("dali", deit)
    assert engines.unsupported("dali", deit, approximate=APPROXIMATIONS) == []

    augmentation = one_view(CUT, RandAugment(probability=1.0, operations=tuple(AFFINE)))
    work = [make_work(augmentation, pictures, seed=seed) for seed in range(2)]
    made = run_dali(augmentation, work, approximate=("affine-bilinear",))
    apart = levels_apart(made, run_reference(augmentation, work))
    assert NEARLY < apart.mean() <= 4


@pytest.mark.parametrize(
    ("op", "made"),
    [
        (RandAugment(), ("affine-bilinear", "equalize-opencv")),
        (RandAugment(interpolation="random", operations=("ShearX",)), ("affine-bilinear",)),
        (RandAugment(interpolation="bilinear"), ("equalize-opencv",)),
        (RandAugment(operations=("Color", "Sharpness")), ()),
        (RandAugment(interpolation="bilinear", operations=("Rotate", "Invert")), ()),
    ],
)
def test_an_engine_names_the_approximations_that_it_makes(
    op: RandAugment, made: tuple[Approximation, ...]
) -> None:
    augmentation = one_view(CUT, op)
    engine = engines.open_engine("dali", augmentation, approximate=APPROXIMATIONS)
    assert engine.approximations == made
    assert len(engines.unsupported("dali", augmentation, CPU)) == len(made)


def affine_by_columns(columns: dict[str, NDArray], x: float, y: float) -> NDArray[np.float32]:
    return columns[layer_prefix(0) + "matrix"][0] @ np.array([x, y, 1], np.float32)


@given(degrees=st.floats(-30, 30), side=st.integers(8, 300))
def test_rotation_turns_about_the_middle(degrees: float, side: int) -> None:
    draws = {
        "operation": np.array([[RAND_AUGMENT_OPERATIONS.index("Rotate")]], np.int8),
        "argument": np.array([[degrees]], np.float32),
    }
    columns = policy_columns(RandAugment(num_ops=1), draws, side)
    middle = side / 2
    np.testing.assert_allclose(affine_by_columns(columns, middle, middle), middle, rtol=1e-5)
    # Counter-clockwise: what is seen right of the middle was above it, for a quarter turn.
    x, y = affine_by_columns(columns, middle + 1, middle) - middle
    np.testing.assert_allclose(
        [x, y], [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], atol=1e-4
    )


def test_what_is_not_drawn_has_neutral_numbers() -> None:
    draws = {"operation": np.array([[-1]], np.int8), "argument": np.array([[0.5]], np.float32)}
    columns = policy_columns(RandAugment(num_ops=1), draws, 64)
    expected = {
        "scale": 1, "gray": 0, "mean": 0, "stretch": 0, "sharpness": 0, "threshold": 256,
        "kept": 255, "addend": 0, "equalize": 0,
    }  # fmt: skip
    numbers = {name.removeprefix(layer_prefix(0)): column for name, column in columns.items()}
    assert np.array_equal(numbers.pop("matrix")[0], np.eye(2, 3))
    assert {name: column.item() for name, column in numbers.items()} == expected


def test_a_policy_has_the_columns_of_its_operations_only() -> None:
    draws = {"operation": np.array([[6]], np.int8), "argument": np.array([[3]], np.float32)}
    op = RandAugment(num_ops=1, operations=("SolarizeAdd", "Brightness"))
    columns = policy_columns(op, draws, 64)
    assert {name.removeprefix(layer_prefix(0)) for name in columns} == {"addend", "scale"}


def test_an_operation_is_what_apply_op_says(pictures: list[Image.Image]) -> None:
    """The reference engine's own function, on the same pixels, for one sample."""
    op = replace(BILINEAR, num_ops=2)
    augmentation = one_view(CUT, op)
    work = make_work(augmentation, pictures[:2])
    (made,) = run_dali(augmentation, [work])
    plan = work.plan.views[0]
    for row, picture in enumerate(pictures[:2]):
        expected = picture
        for one, draws in zip(augmentation.views[0].executed, plan.ops, strict=True):
            expected = apply_op(expected, one, draws, row)
        found = made.views[0][row].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - np.asarray(expected)).mean() <= 1
