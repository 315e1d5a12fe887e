"""RandAugment's draws: those of timm's own transform, whose operations are watched being called."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from timm.data.auto_augment import RandAugment as TimmsRandAugment
from timm.data.transforms_factory import create_transform

from headrace.pipelines.ops import RAND_AUGMENT_OPERATIONS, RandAugment
from tests.draws import Sample, assert_same_distribution, chi_square, columns, seeded

BENDING = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
WITHOUT_ARGUMENT = ("AutoContrast", "Equalize", "Invert")
NAMES: tuple[str, ...] = RAND_AUGMENT_OPERATIONS
SAMPLES = 9000


def our_name(name: str) -> str:
    return name.removesuffix("Increasing").removesuffix("Rel")


def watched(transform: TimmsRandAugment) -> list[tuple[str, float, dict[str, Any]]]:
    """The calls of the last picture: timm's name, argument (0 for none) and options."""
    calls: list[tuple[str, float, dict[str, Any]]] = []

    def watch(op: AugmentOp) -> None:
        def call(picture: Image.Image, *arguments: float, **options: Any) -> Image.Image:
            calls.append((op.name, arguments[0] if arguments else 0.0, options))
            return picture

        op.aug_fn = call

    for op in transform.ops:
        watch(op)
    return calls


def theirs(config: str, samples: int = SAMPLES) -> Sample:
    """What timm's transform does to so many pictures, by our columns."""
    transform = rand_augment_transform(config, {"interpolation": Image.Resampling.BICUBIC})
    calls = watched(transform)
    shape = (samples, transform.num_layers)
    operation, argument = np.full(shape, -1), np.zeros(shape, np.float32)
    picture = Image.new("RGB", (1, 1))
    with seeded():
        for row in range(samples):
            calls.clear()
            transform(picture)
            for layer, (name, value, _) in enumerate(calls):
                operation[row, layer] = NAMES.index(our_name(name))
                argument[row, layer] = value
    return sample({"operation": operation, "argument": argument})


def sample(drawn: Mapping[str, NDArray[Any]]) -> Sample:
    """How many operations a picture gets, which, and each one's arguments."""
    operation, argument = drawn["operation"], drawn["argument"]
    applied = operation >= 0
    return {
        "number": applied.sum(axis=1),
        "operation": operation[applied],
        **{
            f"argument of {name}": argument[operation == place]
            for place, name in enumerate(RAND_AUGMENT_OPERATIONS)
        },
    }


def ours(op: RandAugment, samples: int = 2 * SAMPLES) -> Sample:
    return sample(columns(op, samples))


@pytest.mark.parametrize(
    ("config", "op"),
    [
        ("rand-m9-mstd0.5-inc1", RandAugment()),
        ("rand-m10-n3-p0.8-mstd2-inc1", RandAugment(10, 2, 3, 0.8)),
        ("rand-m1-mstd1.0-inc1", RandAugment(1, 1)),
    ],
)
def test_it_is_distributed_as_timms(config: str, op: RandAugment) -> None:
    lower = max(0.0, op.magnitude - 0.4 * op.magnitude_std)
    assert_same_distribution(
        theirs(config),
        ours,
        op,
        wrong=[
            replace(op, magnitude=lower),
            replace(op, magnitude_std=1.5 * op.magnitude_std),
            replace(op, probability=op.probability + 0.04),
            replace(op, translate_fraction=0.3),
            replace(op, operations=(*op.operations, "Invert")),
        ],
    )


def test_a_magnitude_without_noise_gives_timms_arguments() -> None:
    for magnitude in range(11):
        wanted = theirs(f"rand-m{magnitude}-p1.0-inc1", 500)
        found = ours(RandAugment(magnitude, 0, probability=1), 1000)
        for name in wanted.keys() - {"number", "operation"}:
            assert np.allclose(np.unique(found[name]), np.unique(wanted[name]), rtol=1e-6), name


def test_the_default_is_what_timm_makes_for_deit() -> None:
    pipeline = create_transform(
        224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic"
    )
    parts: list[Any] = pipeline.transforms  # pyright: ignore[reportAttributeAccessIssue]
    (transform,) = (part for part in parts if isinstance(part, TimmsRandAugment))
    names = [our_name(op.name) for op in transform.ops]
    assert tuple(names) == RAND_AUGMENT_OPERATIONS == RandAugment().operations
    assert transform.num_layers == RandAugment().num_ops
    calls = watched(transform)
    for op in transform.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)
        op.prob = 1
        op(Image.new("RGB", (1, 1)))
    for _, _, options in calls:
        wanted = {"fillcolor": RandAugment().fill, "resample": Image.Resampling.BICUBIC}
        assert options == wanted
    assert len(calls) == 15


def test_two_operations_are_drawn_apart() -> None:
    drawn = columns(RandAugment(probability=0.5), 12_000)
    assert [array.dtype for array in drawn.values()] == [np.int8, np.float32, np.bool_]
    assert {array.shape for array in drawn.values()} == {(12_000, 2)}
    operation, argument = drawn["operation"], drawn["argument"]
    applied = operation >= 0
    assert chi_square(applied @ [1, 2], 4) < 3 + 4 * math.sqrt(2 * 3)
    both = operation[applied.all(axis=1)].astype(int)
    assert chi_square(both @ [15, 1], 225) < 224 + 4 * math.sqrt(2 * 224)
    assert (argument[~applied] == 0).all()
    # Sign and strength: of two rotations neither says anything of the other.
    turns = argument[(operation == RAND_AUGMENT_OPERATIONS.index("Rotate")).all(axis=1)]
    strong = np.concatenate([np.sign(turns), np.abs(turns)], axis=1)
    correlation = np.corrcoef(strong.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(turns))


@pytest.mark.parametrize(("interpolation", "share"), [("bilinear", 0), ("bicubic", 1)])
def test_interpolation_is_that_of_bending_operations(interpolation: Any, share: float) -> None:
    drawn = columns(RandAugment(interpolation=interpolation))
    bends = np.isin(drawn["operation"], [RAND_AUGMENT_OPERATIONS.index(name) for name in BENDING])
    assert not drawn["bicubic"][~bends].any()
    assert drawn["bicubic"][bends].mean() == share


def test_a_random_interpolation_is_one_of_two() -> None:
    transform = rand_augment_transform("rand-m9-inc1")
    assert {op.kwargs["resample"] for op in transform.ops} == {
        (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    }
    drawn, fixed = (columns(RandAugment(interpolation=how)) for how in ("random", "bicubic"))
    bicubic = drawn["bicubic"][fixed["bicubic"]]
    assert abs(bicubic.mean() - 0.5) < 5 * math.sqrt(0.25 / len(bicubic))
    assert not drawn["bicubic"][~fixed["bicubic"]].any()
    assert np.array_equal(drawn["operation"], fixed["operation"])
    assert np.array_equal(drawn["argument"], fixed["argument"])


def test_some_operations_alone() -> None:
    chosen = columns(RandAugment(operations=("Invert", "Solarize"), probability=1))["operation"]
    names = [RAND_AUGMENT_OPERATIONS[place] for place in np.unique(chosen)]
    assert names == ["Invert", "Solarize"]
    assert chi_square(chosen.ravel(), 2) < 1 + 4 * math.sqrt(2)


def test_arguments_stay_within_what_an_operation_takes() -> None:
    """At any noise: 0 to 4 bits, a threshold in 0 .. 256, a factor that is not negative."""
    limits = {
        "Rotate": (-30, 30),
        "Posterize": (0, 4),
        "Solarize": (0, 256),
        "SolarizeAdd": (0, 110),
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), (0.1, 1.9)),
        **dict.fromkeys(("ShearX", "ShearY"), (-0.3, 0.3)),
        **dict.fromkeys(("TranslateX", "TranslateY"), (-0.45, 0.45)),
        **dict.fromkeys(WITHOUT_ARGUMENT, (0, 0)),
    }
    assert limits.keys() == set(NAMES)
    found = ours(RandAugment(5, 20, probability=1))
    for name, limit in limits.items():
        values = found[f"argument of {name}"]
        assert np.allclose((values.min(), values.max()), limit), name
