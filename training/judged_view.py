"""The view that images are judged in: it follows the training views, or does as it is told.

A preset declares both for one size. A run that trains at another size is judged at a size in the
same proportion to its largest training view, cut from a picture that was resized in proportion too,
and normalised as the training views are. `--test.*` replaces single numbers, in training and again
when a run is judged.
"""

import math
from dataclasses import dataclass, replace

from headrace.pipelines.ops import CenterCrop, RandomCrop, RandomResizedCrop, Resize, ViewOp
from headrace.pipelines.recipe import Augmentation, View
from headrace.training.preset import Preset, require, require_count


@dataclass(frozen=True)
class ViewChange:
    """What to judge images in, where it is not what training gives: the options --test.*."""

    size: int | None = None
    """Side of the square that is judged, in pixels. Default: the preset's, in proportion to the
    largest training view."""
    resize: int | None = None
    """Length of a picture's shorter side before the square is cut from it, in pixels. Default: the
    preset's, in proportion to the square."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from pixels in [0, 1]. Default: the training views'."""
    std: tuple[float, float, float] | None = None
    """Pixels are divided by it after that. Default: the training views'."""

    def __post_init__(self) -> None:
        require_count("test", self, "size", "resize")
        require_normalisation("--test", self.mean, self.std)


def require_normalisation(
    group: str, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> None:
    """Raises ConfigError unless both can be those of pixels in [0, 1]; `group` is --test, say."""
    for value in mean or ():
        require(
            0 <= value <= 1,
            f"{group}.mean has {value:g}; each must be in [0, 1], as pixels are (divide by 255)",
        )
    for value in std or ():
        require(
            0 < value < math.inf,
            f"{group}.std has {value:g}; each must be above 0, for pixels in [0, 1]",
        )


def following(preset: Preset, augmentation: Augmentation) -> Augmentation:
    """The preset's test view for a run that trains with `augmentation` instead of the preset's."""
    test, trained = preset.test, preset.augmentation
    if augmentation.mean != trained.mean:
        test = replace(test, mean=augmentation.mean)
    if augmentation.std != trained.std:
        test = replace(test, std=augmentation.std)
    before_pixels, pixels = largest_pixels(trained), largest_pixels(augmentation)
    if pixels == before_pixels:
        return test
    return _resized(test, max(1, round(judged_pixels(test) * pixels / before_pixels)))


def changed(test: Augmentation, change: ViewChange) -> Augmentation:
    """The test view with what --test.* says. Raises ConfigError where a view cannot be that."""
    if change.size is not None:
        test = _resized(test, change.size)
    if change.resize is not None:
        require(
            any(isinstance(op, Resize) for op in test.views[0].ops),
            "--test.resize: the test view of this preset resizes nothing",
        )
        require(
            change.resize >= judged_pixels(test),
            f"--test.resize is {change.resize}; it must be at least the side of the square that is "
            f"cut, {judged_pixels(test)} (--test.size)",
        )
        test = _with_sizes(test, judged_pixels(test), change.resize)
    mean = test.mean if change.mean is None else change.mean
    return replace(test, mean=mean, std=test.std if change.std is None else change.std)


def judged_pixels(test: Augmentation) -> int:
    """Side of the square that is judged."""
    return side_pixels(test.flat_views[0])


def largest_pixels(augmentation: Augmentation) -> int:
    """Side of the largest view."""
    return max(map(side_pixels, augmentation.flat_views))


def side_pixels(view: View) -> int:
    """Side of a square view. Raises ConfigError for another."""
    height, width = view.shape
    require(
        height == width,
        f"view {view.name!r} is {height} x {width} pixels; methods take square views, and other "
        f"shapes are for a loop of your own (headrace.pipelines.open_loader)",
    )
    return height


def _resized(test: Augmentation, pixels: int) -> Augmentation:
    """The same view at another size, of the same part of a picture."""
    before_pixels = judged_pixels(test)
    resize = [op.size for op in test.views[0].ops if isinstance(op, Resize)]
    return _with_sizes(test, pixels, round(resize[0] * pixels / before_pixels) if resize else 0)


def _with_sizes(test: Augmentation, pixels: int, resize_pixels: int) -> Augmentation:
    def sized(op: ViewOp) -> ViewOp:
        match op:
            case Resize():
                return replace(op, size=resize_pixels)
            case CenterCrop() | RandomCrop() | RandomResizedCrop():
                return replace(op, size=pixels)
            case _:
                return op

    views = tuple(replace(view, ops=tuple(map(sized, view.ops))) for view in test.views)
    return replace(test, views=views)
