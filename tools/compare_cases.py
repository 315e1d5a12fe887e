"""What `compare_engines.py` compares: every op alone, every operation of RandAugment, every recipe.

An op that changes colours gets pictures of the view's size, so that nothing but the op happens to
them; ops always happen, with the strengths of their recipes or all strengths there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from headrace.pipelines import recipes
from headrace.pipelines.ops import (
    RAND_AUGMENT_OPERATIONS,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Interpolation,
    RandAugment,
    RandAugmentOperation,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
    ViewOp,
)
from headrace.pipelines.recipe import IMAGENET_STD, Augmentation, Mix, RandomErasing, View

PIXELS = 224

# Mean over pixels of |difference| from `reference` that is allowed, in 8-bit levels, by engine.
# "exact": geometry, flip, solarize, posterize, mixing. "colour": what computes new values.
Limits = Literal["exact", "colour", "recipe"]
LIMITS: dict[Limits, dict[str, float]] = {
    "exact": {"fused": 1.0, "dali": 1.0},
    "colour": {"fused": 1.0, "dali": 2.0},
    "recipe": {"fused": 2.0, "dali": 4.0},
}


Source = Literal["jpeg", "photo", "square", "faded"]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    source: "jpeg", the stored files; "photo", their decoded pixels; "square", the pixels of their
    central squares of the view's size; "faded", these with half the contrast, for an op that has
    nothing to do where all levels are used. finished: compare what the network gets.
    """

    name: str
    limits: Limits
    augmentation: Augmentation
    source: Source
    finished: bool = False

    @property
    def kind(self) -> Literal["op", "recipe"]:
        return "recipe" if self.limits == "recipe" else "op"


_AFFINE: tuple[RandAugmentOperation, ...] = (
    "Rotate",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
_EXACT: tuple[RandAugmentOperation, ...] = (
    *_AFFINE,
    "Invert",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
)


def _op(name: str, limits: Limits, *ops: ViewOp, source: Source = "square") -> Case:
    first: tuple[ViewOp, ...] = () if source == "photo" else (CenterCrop(PIXELS),)
    augmentation = Augmentation("one op", (View("view", (*first, *ops)),))
    return Case(name, limits, augmentation, source)


def _finishing(name: str, erase: RandomErasing | None = None, mix: Mix | None = None) -> Case:
    view = View("view", (CenterCrop(PIXELS),), erase=erase)
    augmentation = Augmentation("one op", (view,), mix=mix, group=1 if mix is None else 4)
    return Case(name, "exact", augmentation, "square", finished=True)


def _operation(operation: RandAugmentOperation, interpolation: Interpolation) -> Case:
    """One operation of RandAugment at magnitudes from 0 to 10."""
    op = RandAugment(5.0, 3.0, 1, 1.0, interpolation, operations=(operation,))
    affine = operation in _AFFINE
    return _op(
        f"RandAugment {operation}" + (f", {interpolation}" if affine else ""),
        "exact" if operation in _EXACT else "colour",
        op,
        source="faded" if operation == "AutoContrast" else "square",
    )


def op_cases() -> Iterator[Case]:
    """Every op alone."""
    for interpolation in ("bilinear", "bicubic"):
        crop = RandomResizedCrop(PIXELS, (0.08, 1.0), interpolation=interpolation)
        yield _op(f"random resized crop, {interpolation}", "exact", crop, source="photo")
    small = RandomResizedCrop(96, (0.05, 0.4), interpolation="bicubic")
    yield _op("random resized crop to 96, bicubic", "exact", small, source="photo")
    for interpolation in ("bilinear", "bicubic"):
        ops = (Resize(256, interpolation), CenterCrop(PIXELS))
        yield _op(f"resize and centre crop, {interpolation}", "exact", *ops, source="photo")
    yield _op("random crop, padded", "exact", RandomCrop(PIXELS, 16), source="photo")
    resized = (Resize(PIXELS, "bicubic"), RandomCrop(PIXELS, 4))
    yield _op("resize and random crop", "exact", *resized, source="photo")
    yield _op("flip", "exact", Flip(1.0))
    yield _op("brightness", "colour", ColorJitter(0.8, 0, 0, 0))
    added = ColorJitter(0.8, 0, 0, 0, additive_brightness=True)
    yield _op("brightness, added", "colour", added)
    yield _op("contrast", "colour", ColorJitter(0, 0.8, 0, 0))
    yield _op("saturation", "colour", ColorJitter(0, 0, 0.8, 0))
    yield _op("hue", "colour", ColorJitter(0, 0, 0, 0.2))
    yield _op("colour jitter of DINO", "colour", ColorJitter(0.4, 0.4, 0.2, 0.1))
    yield _op("colour jitter of SimCLR", "colour", ColorJitter(0.8, 0.8, 0.8, 0.2))
    yield _op("grayscale", "colour", Grayscale(1.0))
    yield _op("Gaussian blur", "colour", GaussianBlur(1.0, (0.1, 2.0)))
    yield _op("Gaussian blur, 23 pixels", "colour", GaussianBlur(1.0, (0.1, 2.0), 23))
    yield _op("solarize", "exact", Solarize(1.0, 128))
    for operation in RAND_AUGMENT_OPERATIONS:
        for interpolation in ("bilinear", "bicubic") if operation in _AFFINE else ("bicubic",):
            yield _operation(operation, interpolation)
    yield _finishing("normalisation")
    yield _finishing("erasing, mean colour", RandomErasing(1.0, fill="const", count=(1, 3)))
    yield _finishing("erasing, one colour", RandomErasing(1.0, fill="rand", count=(1, 3)))
    yield _finishing("erasing, noise", RandomErasing(1.0, fill="pixel", count=(1, 3)))
    yield _finishing("Mixup", mix=Mix(0.8, 0.0, scope="pair"))
    yield _finishing("CutMix", mix=Mix(0.0, 1.0, scope="pair"))


def recipe_cases(names: Sequence[str], samples: int) -> Iterator[Case]:
    """The recipes by name. Their groups are no larger than the number of samples, and even.

    Raises RecipeError for a name that is none.
    """
    for name in names:
        recipe = recipes.named(name)
        group = min(recipe.group, samples - samples % 2)
        recipe = replace(recipe, group=max(1, group) if recipe.group > 1 else 1)
        finished = recipe.mix is not None or any(view.erase for view in recipe.views)
        yield Case(name, "recipe", recipe, "jpeg", finished)


def levels_of_one(std: Sequence[float] = IMAGENET_STD) -> list[float]:
    """8-bit levels that a difference of 1 in a finished view is worth, by channel."""
    return [255 * value for value in std]
