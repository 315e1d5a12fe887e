"""RandAugment's operations against timm's own code on a photograph, one by one and as a chain."""

from collections import deque
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from timm.data import auto_augment

from headrace.pipelines.draw import draw
from headrace.pipelines.engines.reference import apply_op
from headrace.pipelines.engines.reference_augment import apply_operation
from headrace.pipelines.ops import (
    RAND_AUGMENT_OPERATIONS,
    CenterCrop,
    RandAugment,
    RandAugmentOperation,
)
from headrace.pipelines.recipe import Augmentation, View

timm_data: Any = auto_augment

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
FILLS = ((124, 116, 104), (1, 255, 77))

TIMM_NAMES: dict[RandAugmentOperation, str] = {
    "AutoContrast": "AutoContrast",
    "Equalize": "Equalize",
    "Invert": "Invert",
    "Rotate": "Rotate",
    "Posterize": "PosterizeIncreasing",
    "Solarize": "SolarizeIncreasing",
    "SolarizeAdd": "SolarizeAdd",
    "Color": "ColorIncreasing",
    "Contrast": "ContrastIncreasing",
    "Brightness": "BrightnessIncreasing",
    "Sharpness": "SharpnessIncreasing",
    "ShearX": "ShearX",
    "ShearY": "ShearY",
    "TranslateX": "TranslateXRel",
    "TranslateY": "TranslateYRel",
}
ARGUMENTS: dict[RandAugmentOperation, tuple[float, ...]] = {
    "AutoContrast": (0,),
    "Equalize": (0,),
    "Invert": (0,),
    "Rotate": (-30, -13.7, 0, 4.2, 27),
    "Posterize": (1, 2, 3, 4),
    "Solarize": (0, 26, 128, 256),
    "SolarizeAdd": (0, 37, 99, 110),
    "Color": (0.1, 0.55, 1, 1.9),
    "Contrast": (0.1, 0.55, 1, 1.9),
    "Brightness": (0.1, 0.55, 1, 1.9),
    "Sharpness": (0.1, 0.55, 1, 1.9),
    "ShearX": (-0.3, -0.111, 0.27),
    "ShearY": (-0.3, -0.111, 0.27),
    "TranslateX": (-0.45, 0.021, 0.405),
    "TranslateY": (-0.45, 0.021, 0.405),
}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Parts of a photograph, square and not, dark and grey; noise; a picture of one colour."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    whole = Image.open(path).convert("RGB")
    random = np.random.default_rng(5)
    noise = random.integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return [
        whole.resize((224, 224)),
        whole.crop((150, 60, 281, 157)),
        whole.crop((0, 400, 96, 496)).point([level // 3 + 20 for level in range(256)] * 3),
        whole.crop((60, 90, 156, 186)).convert("L").convert("RGB"),
        Image.fromarray(noise),
        Image.new("RGB", (32, 32), (200, 13, 90)),
    ]


def assert_same(found: Image.Image, expected: Image.Image) -> None:
    __tracebackhide__ = True
    assert (found.mode, found.size) == (expected.mode, expected.size)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name in RAND_AUGMENT_OPERATIONS for argument in ARGUMENTS[name]],
)
@pytest.mark.parametrize(("resample", "fill"), [(BILINEAR, FILLS[0]), (BICUBIC, FILLS[1])])
def test_each_operation_is_timms(
    pictures: list[Image.Image],
    name: RandAugmentOperation,
    argument: float,
    resample: Image.Resampling,
    fill: tuple[int, int, int],
) -> None:
    theirs = timm_data.NAME_TO_OP[TIMM_NAMES[name]]
    argument = float(np.float32(argument))
    takes_none = timm_data.LEVEL_TO_ARG[TIMM_NAMES[name]] is None
    takes_integer = name in ("Posterize", "Solarize", "SolarizeAdd")
    arguments = () if takes_none else (int(argument),) if takes_integer else (argument,)
    for picture in pictures:
        before = picture.copy()
        found = apply_operation(picture, name, argument, resample, fill)
        assert_same(found, theirs(picture.copy(), *arguments, resample=resample, fillcolor=fill))
        assert_same(picture, before)


def test_operations_change_a_photograph_and_differ(pictures: list[Image.Image]) -> None:
    """So that the comparison above is not one of pictures that nothing was done to."""
    results = [
        apply_operation(
            pictures[2], name, ARGUMENTS[name][1 % len(ARGUMENTS[name])], BICUBIC, FILLS[0]
        ).tobytes()
        for name in RAND_AUGMENT_OPERATIONS
    ]
    assert pictures[2].tobytes() not in results
    assert len(set(results)) == len(results)


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
def test_interpolation_and_fill_have_their_effect(
    pictures: list[Image.Image], name: RandAugmentOperation
) -> None:
    argument = ARGUMENTS[name][0]
    bicubic, bilinear = (
        np.asarray(apply_operation(pictures[0], name, argument, resample, FILLS[1]))
        for resample in (BICUBIC, BILINEAR)
    )
    outside = (bicubic == FILLS[1]).all(axis=-1)
    assert 0.1 < outside.mean() < 0.5
    np.testing.assert_array_equal(outside, (bilinear == FILLS[1]).all(axis=-1))
    assert (bicubic != bilinear).any(axis=-1)[~outside].mean() > 0.5


def test_no_bits_are_black(pictures: list[Image.Image]) -> None:
    """What Pillow's table gave before it began to refuse it."""
    for picture in pictures:
        found = apply_operation(picture, "Posterize", 0, BICUBIC, FILLS[0])
        assert_same(found, Image.new("RGB", picture.size))


def magnitude(name: RandAugmentOperation, argument: float, op: RandAugment) -> float:
    """One that `LEVEL_TO_ARG` turns into the argument, up to its sign."""
    match name:
        case "AutoContrast" | "Equalize" | "Invert":
            return 5.0
        case "Rotate":
            return abs(argument) / 3
        case "ShearX" | "ShearY":
            return abs(argument) / 0.03
        case "TranslateX" | "TranslateY":
            return abs(argument) / op.translate_fraction * 10
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return abs(argument - 1) / 0.09
        case "Posterize":
            return (4 - argument + 0.5) / 0.4
        case "Solarize":
            return (256 - argument + 0.5) / 25.6
        case "SolarizeAdd":
            return (argument + 0.5) / 11


class Scripted:
    """In the place of the module `random`: the next of the numbers that were drawn already."""

    def __init__(self) -> None:
        self.script: deque[tuple[str, Any]] = deque()

    def _next(self, name: str) -> Any:
        expected, value = self.script.popleft()
        assert name == expected
        return value

    def random(self) -> float:
        return self._next("random")

    def gauss(self, mean: float, deviation: float) -> float:
        assert (mean, deviation) == (9, 0.5)
        return self._next("gauss")

    def choice(self, options: tuple[Image.Resampling, ...]) -> Image.Resampling:
        chosen = self._next("choice")
        assert chosen in options
        return chosen


def test_a_whole_chain_is_timms(
    pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's RandAugment with every random number replaced by the Plan's."""
    op = RandAugment(interpolation="random")
    # mmax11: an argument is a float32, which may lie beyond what a magnitude of 10 gives.
    theirs = timm_data.rand_augment_transform(
        "rand-m9-mstd0.5-mmax11-inc1",
        {"img_mean": op.fill, "translate_pct": op.translate_fraction},
    )
    assert [step.name for step in theirs.ops] == [
        TIMM_NAMES[name] for name in RAND_AUGMENT_OPERATIONS
    ]
    assert (theirs.num_layers, {step.prob for step in theirs.ops}) == (op.num_ops, {op.probability})
    chosen: list[int] = []
    scripted = Scripted()

    def choice(ops: list[Any], count: int, *, replace: bool, p: None) -> list[Any]:
        assert (count, replace, p) == (len(chosen), True, None)
        return [ops[place] for place in chosen]

    monkeypatch.setattr(timm_data, "random", scripted)
    monkeypatch.setattr(timm_data.np.random, "choice", choice)

    samples = 400
    columns = drawn(op, samples)
    seen: set[tuple[str, bool]] = set()
    for row in range(samples):
        picture = pictures[row % 3]
        operations, arguments, bicubic = (
            columns[name][row].tolist() for name in ("operation", "argument", "bicubic")
        )
        refused = any(
            place == RAND_AUGMENT_OPERATIONS.index("Posterize") and argument == 0
            for place, argument in zip(operations, arguments, strict=True)
        )
        if refused:  # by Pillow 13; see test_no_bits_are_black
            continue
        chosen[:] = [max(place, 0) for place in operations]
        for place, argument, is_bicubic in zip(operations, arguments, bicubic, strict=True):
            scripted.script.append(("random", 1.0 if place < 0 else 0.0))
            if place < 0:
                continue
            name = RAND_AUGMENT_OPERATIONS[place]
            seen.add((name, is_bicubic))
            scripted.script.append(("gauss", magnitude(name, argument, op)))
            if name in ("Color", "Contrast", "Brightness", "Sharpness"):
                scripted.script.append(("random", 1.0 if argument < 1 else 0.0))
            elif name.startswith(("Rotate", "Shear", "Translate")):
                scripted.script.append(("random", 1.0 if argument < 0 else 0.0))
                scripted.script.append(("choice", BICUBIC if is_bicubic else BILINEAR))
        assert_same(apply_op(picture, op, columns, row), theirs(picture))
        assert not scripted.script
    bending = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
    assert seen == {(name, False) for name in RAND_AUGMENT_OPERATIONS} | {
        (name, True) for name in bending
    }


def drawn(op: RandAugment, samples: int) -> dict[str, NDArray[Any]]:
    recipe = Augmentation("augmented", (View("view", (CenterCrop(96), op)),))
    plan = draw(
        recipe,
        seed=3,
        epoch=0,
        position=0,
        ids=np.arange(samples),
        occurrences=np.zeros(samples, np.int32),
        sizes=np.full((samples, 2), 128, np.int32),
    )
    return dict(plan.views[0].ops[1])


def test_what_is_not_drawn_is_not_done(pictures: list[Image.Image]) -> None:
    columns = {
        "operation": np.array([[-1, 2, -1], [-1, -1, -1]], np.int8),
        "argument": np.zeros((2, 3), np.float32),
        "bicubic": np.zeros((2, 3), np.bool_),
    }
    inverted = apply_op(pictures[1], RandAugment(num_ops=3), columns, 0)
    np.testing.assert_array_equal(np.asarray(inverted), 255 - np.asarray(pictures[1]))
    assert_same(apply_op(pictures[1], RandAugment(num_ops=3), columns, 1), pictures[1])
