"""The fused engine's RandAugment, random crops and added brightness against the reference."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.pipelines import recipes
from headrace.pipelines.draw import draw
from headrace.pipelines.engines import Work
from headrace.pipelines.engines.fused.program import Layout, lower
from headrace.pipelines.engines.fused.render import mix, render
from headrace.pipelines.ops import (
    RAND_AUGMENT_OPERATIONS,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    OneOf,
    Op,
    RandAugment,
    RandAugmentOperation,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
    resized_shape,
)
from headrace.pipelines.plan import ViewPlan
from headrace.pipelines.recipe import Augmentation, RandomErasing, View
from tests.fused_cases import (
    RESAMPLED_LEVELS,
    SAME_ROUNDING,
    Pixels,
    differences,
    encoded,
    one_view,
    pieces,
    run,
    whole_photograph,
    work_for,
)

ARGUMENTS: Mapping[RandAugmentOperation, tuple[float, ...]] = {
    "AutoContrast": (0,),
    "Equalize": (0,),
    "Invert": (0,),
    "Rotate": (-30, -13.7, 0, 4.2, 26.99, 90, 180, 345),
    "Posterize": (0, 1, 2, 3, 4, 8),
    "Solarize": (0, 1, 26, 128, 255, 256),
    "SolarizeAdd": (0, 1, 99, 110, 128),
    "Color": (0.1, 0.55, 1, 1.9),
    "Contrast": (0.1, 0.55, 1, 1.9),
    "Brightness": (0.1, 0.55, 1, 1.9),
    "Sharpness": (0.1, 0.55, 1, 1.9),
    "ShearX": (-0.3, -0.111, 0, 0.27, 0.5),
    "ShearY": (-0.3, -0.111, 0, 0.27, 0.5),
    "TranslateX": (-0.45, -0.111, 0, 0.5, 0.41, 1.5),
    "TranslateY": (-0.45, -0.111, 0, 0.5, 0.41, -1.5),
}
AFFINE = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}


def with_columns(work: Work, op: int, **columns: NDArray[Any]) -> Work:
    """The work with other numbers for one op of its only view."""
    (view,) = work.plan.views
    ops = (*view.ops[:op], {**view.ops[op], **columns}, *view.ops[op + 1 :])
    changed = ViewPlan(ops, view.mask, view.erase)
    return Work(replace(work.plan, views=(changed,)), work.encoded, work.labels)


def one_operation(
    augmentation: Augmentation,
    files: list[Pixels],
    name: RandAugmentOperation,
    argument: float,
    bicubic: bool,
) -> Work:
    count = len(files)
    place = RAND_AUGMENT_OPERATIONS.index(name)
    return with_columns(
        work_for(augmentation, files),
        1,
        operation=np.full((count, 1), place, np.int8),
        argument=np.full((count, 1), argument, np.float32),
        bicubic=np.full((count, 1), bicubic),
    )


@pytest.mark.parametrize("size", [1, 2, 3, 16, 33, 96])
@pytest.mark.parametrize("name", RAND_AUGMENT_OPERATIONS)
def test_operations_are_pillows_to_the_bit(name: RandAugmentOperation, size: int) -> None:
    augmentation = one_view(CenterCrop(size), RandAugment(num_ops=1, fill=(124, 1, 255)))
    dim = (pieces(whole_photograph(), size, size, 1)[0] // 3 + 20).astype(np.uint8)
    files = [encoded(picture) for picture in (*pieces(whole_photograph(), size, size), dim)]
    for argument in ARGUMENTS[name]:
        for bicubic in (False, True) if name in AFFINE else (False,):
            work = one_operation(augmentation, files, name, argument, bicubic)
            (difference,) = differences(augmentation, work)
            if SAME_ROUNDING or name not in AFFINE:
                assert difference.max() == 0
            assert difference.max() <= 1
            assert difference.mean() <= 1e-3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("size", [17, 64])
def test_chains_of_operations_are_the_references(size: int, interpolation: Any) -> None:
    augmentation = one_view(
        CenterCrop(size),
        Flip(0.5),
        RandAugment(9, 3.0, num_ops=4, probability=0.9, interpolation=interpolation),
        GaussianBlur(0.3),
        RandAugment(5, num_ops=1, fill=(0, 255, 3)),
    )
    files = [encoded(picture) for picture in pieces(whole_photograph(), size, size, 30)]
    for epoch in range(4):
        (difference,) = differences(augmentation, work_for(augmentation, files, epoch))
        assert difference.mean() <= 1e-3  # the blur's ties, amplified by what follows
        assert np.quantile(difference, 0.999) == 0


@pytest.mark.parametrize("size", [1, 16, 33])
def test_added_brightness_is_the_references_to_the_bit(size: int) -> None:
    jitter = ColorJitter(0.9, 0.4, 0.2, 0.1, additive_brightness=True)
    augmentation = one_view(CenterCrop(size), jitter)
    files = [encoded(picture) for picture in pieces(whole_photograph(), size, size, 20)]
    for epoch in range(3):
        (difference,) = differences(augmentation, work_for(augmentation, files, epoch))
        assert difference.max() == 0
    work = work_for(augmentation, files)
    factors = work.plan.views[0].ops[1]["factors"].copy()
    # Halves are rounded to even, and every shift that there is must not wrap around.
    factors[:, 0] = np.resize([-1, -0.5 / 255, 0, 0.5 / 255, 1.5 / 255, 1], len(files))
    (difference,) = differences(augmentation, with_columns(work, 1, factors=factors))
    assert difference.max() == 0


@pytest.mark.parametrize("shape", [(1, 9), (20, 30), (33, 32), (120, 75), (75, 300)])
@pytest.mark.parametrize(
    "ops",
    [
        (RandomCrop(25),),
        (RandomCrop(32, 4),),
        (RandomCrop(80),),
        (RandomCrop(33, 40),),
        (Resize(32), RandomCrop(32, 4)),
        (Resize(40), RandomCrop(33)),
        (Resize(20, "bilinear"), RandomCrop(31)),
    ],
)
def test_random_crops_are_the_references(ops: tuple[Op, ...], shape: tuple[int, int]) -> None:
    """Also with a border of black, and where the picture is smaller than the crop."""
    augmentation = one_view(*ops, Flip(0.5), Solarize(0.5, 20))
    files = [encoded(picture) for picture in pieces(whole_photograph(), *shape)]
    for epoch in range(3):
        (difference,) = differences(augmentation, work_for(augmentation, files, epoch))
        if not isinstance(ops[0], Resize):
            assert difference.max() == 0
        assert difference.mean() <= 2 * RESAMPLED_LEVELS  # solarizing amplifies


@settings(max_examples=200)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(0, 40),
    st.booleans(),
)
def test_geometry_of_random_crops_is_the_recipes(
    height: int, width: int, shorter: int, crop: int, padding: int, resizes: bool
) -> None:
    augmentation = one_view(*((Resize(shorter),) if resizes else ()), RandomCrop(crop, padding))
    plan = draw(
        augmentation,
        seed=height,
        epoch=0,
        position=0,
        ids=np.zeros(1, np.int64),
        occurrences=np.zeros(1, np.int32),
        sizes=np.array([[height, width]], np.int32),
    )
    found = lower(Layout.of(augmentation), plan).geometries[0, 0].tolist()
    high, wide = resized_shape(height, width, shorter) if resizes else (height, width)
    top, left = plan.views[0].ops[-1]["start"][0].tolist()
    assert found == [0, height, high, top, 0, width, wide, left]


def test_one_of_runs_the_one_that_was_chosen() -> None:
    chosen = OneOf((Grayscale(1.0), Solarize(1.0), GaussianBlur(1.0)))
    augmentation = one_view(RandomResizedCrop(48), Flip(), chosen, ColorJitter(0.3, 0.3, 0.3, 0))
    files = [encoded(picture) for picture in pieces(whole_photograph(), 90, 80, 30)]
    (difference,) = differences(augmentation, work_for(augmentation, files))
    assert difference.mean() <= 3 * RESAMPLED_LEVELS


COMPILED_ONCE = {
    "dino": recipes.dino(40, 24, 2),
    "simclr": recipes.simclr(32, blur=False),
    "deit": recipes.deit(33, group=2),
    "deit without mixing": recipes.deit(32, mix=None),
    "colours that are erased": one_view(RandomCrop(16), erase=RandomErasing(1, fill="rand")),
    "views of many kinds": Augmentation(
        "many",
        (
            View("one", (Resize(30), RandomCrop(24, 2), RandAugment(num_ops=3))),
            View("other", (CenterCrop(20),), count=2, erase=RandomErasing(1, count=(2, 4))),
        ),
    ),
    "center": recipes.center(16, 20),
}


def test_every_recipe_runs_through_the_same_compiled_functions() -> None:
    """Compiling takes seconds, so that one more type of argument would be a pause in a run."""
    for kind in ("JPEG", "PPM", "PNG"):
        files = [encoded(picture, kind) for picture in pieces(whole_photograph(), 50, 40)[:4]]
        for augmentation in COMPILED_ONCE.values():
            for finished in (None, torch.float32):
                work = work_for(augmentation, files)
                run("fused", augmentation, work, finished=finished)
                alone = Work(work.plan.rows(slice(0, 2)), files[:2], work.labels[:2])
                run("fused", augmentation, alone, finished=finished)
    assert len(render.signatures) == 1
    assert len(mix.signatures) == 1
