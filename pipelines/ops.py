"""The ops that a view is made of: what may happen to one picture, declared and nothing more.

Each op lists under "Draws" the columns that `draw.draw` gives for it, one row per sample
(B = samples in the batch); `engines/reference.py` says in pixels what they mean. An op without
"Draws" is a function of the picture's size alone. `recipe.View` puts them together.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from headrace.shards.errors import UserError

Interpolation = Literal["bilinear", "bicubic"]
DrawScope = Literal["sample", "group"]
Size = int | tuple[int, int]
"""Of a view in pixels: the side of a square, or height and width."""


class RecipeError(UserError):
    """A recipe that cannot mean anything: says which field of which op, and what it may be."""


def require(holds: bool, message: str) -> None:
    """Raise RecipeError with `message` unless it holds."""
    if not holds:
        raise RecipeError(message)


def require_probability(declared: object, value: float) -> None:
    """Raise RecipeError unless `value`, the `probability` of `declared`, is in [0, 1]."""
    require(
        0 <= value <= 1, f"{type(declared).__name__}.probability is {value}; it must be in [0, 1]"
    )


def require_range(declared: object, name: str, least: float, most: float) -> None:
    """Raise RecipeError unless field `name` is a (low, high) within [least, most]."""
    low, high = getattr(declared, name)
    require(
        least <= low <= high <= most,
        f"{type(declared).__name__}.{name} is ({low}, {high}); it must be "
        f"{least} <= low <= high <= {most}",
    )


def height_and_width(size: Size) -> tuple[int, int]:
    """Of a view of this size."""
    return (size, size) if isinstance(size, int) else size


def require_size(declared: object, size: Size) -> None:
    """Raise RecipeError unless `size`, that of `declared`, has pixels."""
    require(
        min(height_and_width(size)) > 0,
        f"{type(declared).__name__}.size is {size}; it must be positive",
    )


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crop a random box and resize it to `size`, antialiased.

    Sampling as torchvision's `RandomResizedCrop.get_params`: up to ten attempts, then the central
    box of the nearest admissible aspect ratio.
    Draws: `box` int32 [B, 4] = top, left, height, width in source pixels.
    """

    size: Size
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        require_size(self, self.size)
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            require(
                0 < low <= high,
                f"RandomResizedCrop.{name} is ({low}, {high}); it must be 0 < low <= high",
            )
        require(self.scale[1] <= 1, f"RandomResizedCrop.scale is {self.scale}; at most 1")


@dataclass(frozen=True)
class Resize:
    """Resize the shorter side to `size` (torchvision's rounding), antialiased. No draws."""

    size: int
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        require(self.size > 0, f"Resize.size is {self.size}; it must be positive")


@dataclass(frozen=True)
class CenterCrop:
    """Cut the central `size` (torchvision's rounding). No draws."""

    size: Size

    def __post_init__(self) -> None:
        require_size(self, self.size)


@dataclass(frozen=True)
class RandomCrop:
    """Cut a random `size`; torchvision's `RandomCrop(size, padding, pad_if_needed)`.

    The picture is first surrounded by `padding_pixels` of black; where it is still smaller than the
    crop, both sides get as many more as are missing.
    Draws: `start` int32 [B, 2] = top, left in pixels of the picture that comes in; negative where
    the crop begins in the padding.
    """

    size: Size
    padding_pixels: int = 0

    def __post_init__(self) -> None:
        require_size(self, self.size)
        padding = self.padding_pixels
        require(padding >= 0, f"RandomCrop.padding_pixels is {padding}; it must not be negative")


@dataclass(frozen=True)
class Flip:
    """Mirror left and right. Draws: `apply` bool [B]."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        require_probability(self, self.probability)


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter under a RandomApply: four factors in a random order.

    brightness, contrast, saturation: factor uniform in [max(0, 1 - x), 1 + x]; hue: shift uniform
    in [-hue, hue], a fraction of the colour circle. An op whose strength is 0 is left out.
    With `additive_brightness` brightness is a shift uniform in [-x, x] that is added to every
    channel of [0, 1] pixels, as SimCLR v1's and BYOL's TensorFlow code has it: in 8 bits
    clamp(pixel + round(255 * shift)).
    Draws: `apply` bool [B]; `factors` float32 [B, 4] = brightness, contrast, saturation, hue;
    `order` int8 [B, 4], the index into `factors` that is applied first, second, ...
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    probability: float = 1.0
    additive_brightness: bool = False

    def __post_init__(self) -> None:
        require_probability(self, self.probability)
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(value >= 0, f"ColorJitter.{name} is {value}; it must not be negative")
        require(0 <= self.hue <= 0.5, f"ColorJitter.hue is {self.hue}; it must be in [0, 0.5]")


@dataclass(frozen=True)
class Grayscale:
    """Replace the colours by ITU-R 601 luma on all three channels. Draws: `apply` bool [B]."""

    probability: float = 0.2

    def __post_init__(self) -> None:
        require_probability(self, self.probability)


@dataclass(frozen=True)
class GaussianBlur:
    """A true Gaussian as torchvision's `gaussian_blur`: reflected border, normalised kernel.

    `kernel_size` None takes 2 * ceil(3 * sigma) + 1 per sample, at most what the view's reflected
    border allows. Pillow's `GaussianBlur`, which DINO's and MoCo's code calls, approximates this
    one by three box blurs. With `scope` "group" the samples of a group share sigma (SimCLR's code
    draws one for the batch); whether it is applied stays each sample's own.
    Draws: `sigma` float32 [B] in pixels, 0 where the blur is not applied.
    """

    probability: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel_size: int | None = None
    scope: DrawScope = "sample"

    def __post_init__(self) -> None:
        require_probability(self, self.probability)
        low, high = self.sigma
        require(0 < low <= high, f"GaussianBlur.sigma is ({low}, {high}); 0 < low <= high")
        size = self.kernel_size
        require(
            size is None or (size > 0 and size % 2 == 1),
            f"GaussianBlur.kernel_size is {size}; it must be odd and positive, or None",
        )


@dataclass(frozen=True)
class Solarize:
    """Invert every value at or above `threshold` (0..256). Draws: `apply` bool [B]."""

    probability: float = 0.2
    threshold: int = 128

    def __post_init__(self) -> None:
        require_probability(self, self.probability)
        require(0 <= self.threshold <= 256, f"Solarize.threshold is {self.threshold}; 0..256")


# timm's names without their suffixes; the order is part of a Plan's meaning and never changes.
RandAugmentOperation = Literal[
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
]
RAND_AUGMENT_OPERATIONS: tuple[RandAugmentOperation, ...] = get_args(RandAugmentOperation)


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment with increasing severities: by default `rand-m9-mstd0.5-inc1`.

    `num_ops` times one of `operations` is drawn, with repetition, and applied with `probability` at
    a magnitude from N(magnitude, magnitude_std) cut to [0, 10] (timm 1.0.31 `data/auto_augment.py`,
    `AugmentOp` and `rand_augment_transform`; Cubuk et al. 2020). What a magnitude becomes, with a
    random sign where one is named:

        Rotate +-3 m degrees; Shear +-0.03 m; Translate +-translate_fraction * m / 10 of the side;
        Color, Contrast, Brightness, Sharpness max(0.1, 1 +- 0.09 m); Posterize 4 - int(0.4 m) bits;
        Solarize from 256 - min(256, int(25.6 m)); SolarizeAdd min(128, int(11 m)) below 128

    `interpolation` is that of Rotate, Shear and Translate; "random" draws bilinear or bicubic each
    time. `fill` is the colour of what comes from outside of the picture, timm's rounded mean.
    Draws: `operation` int8 [B, num_ops], place in RAND_AUGMENT_OPERATIONS, -1 where none is
    applied; `argument` float32 [B, num_ops], what the operation is called with: degrees (positive:
    counter-clockwise), shear factor, fraction of the side, enhancement factor, bits that are kept,
    threshold, summand; 0 where it takes none; `bicubic` bool [B, num_ops].
    """

    magnitude: float = 9.0
    magnitude_std: float = 0.5
    num_ops: int = 2
    probability: float = 0.5
    interpolation: Interpolation | Literal["random"] = "bicubic"
    fill: tuple[int, int, int] = (124, 116, 104)
    translate_fraction: float = 0.45
    operations: tuple[RandAugmentOperation, ...] = RAND_AUGMENT_OPERATIONS

    def __post_init__(self) -> None:
        require_probability(self, self.probability)
        require(
            0 <= self.magnitude <= 10,
            f"RandAugment.magnitude is {self.magnitude}; it must be in [0, 10]",
        )
        deviation = self.magnitude_std
        require(deviation >= 0, f"RandAugment.magnitude_std is {deviation}; it must be at least 0")
        require(self.num_ops > 0, f"RandAugment.num_ops is {self.num_ops}; it must be at least 1")
        require(
            all(0 <= level <= 255 for level in self.fill),
            f"RandAugment.fill is {self.fill}; it must be three levels in 0..255",
        )
        require(
            0 <= self.translate_fraction <= 1,
            f"RandAugment.translate_fraction is {self.translate_fraction}; it must be in [0, 1]",
        )
        unknown = set(self.operations) - set(RAND_AUGMENT_OPERATIONS)
        require(
            len(self.operations) > 0 and not unknown,
            f"RandAugment.operations names {sorted(unknown) or 'nothing'}; "
            f"there are {', '.join(RAND_AUGMENT_OPERATIONS)}",
        )


ChosenOp = Grayscale | Solarize | GaussianBlur


@dataclass(frozen=True)
class OneOf:
    """One of `ops`, each equally likely, then with its own probability; torchvision's RandomChoice.

    DeiT III's 3-Augment is OneOf((Grayscale(1), Solarize(1), GaussianBlur(1))).
    An engine never sees it: `View.executed` has `ops` one after the other, and the draws of those
    that were not chosen say that they do not apply. Draws: those of `ops`.
    """

    ops: tuple[ChosenOp, ...]

    def __post_init__(self) -> None:
        require(len(self.ops) > 1, f"OneOf.ops has {len(self.ops)} ops; it needs at least two")


# What an engine executes, and what a view may declare.
Op = (
    RandomResizedCrop
    | Resize
    | CenterCrop
    | RandomCrop
    | Flip
    | ColorJitter
    | Grayscale
    | GaussianBlur
    | Solarize
    | RandAugment
)
ViewOp = Op | OneOf
GEOMETRY = (RandomResizedCrop, Resize, CenterCrop, RandomCrop)


def resized_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) after resizing the shorter side to `shorter`, rounded as torchvision does."""
    if width <= height:
        return int(shorter * height / width), shorter
    return shorter, int(shorter * width / height)


def centered_offset(length: int, size: int) -> int:
    """First row or column of a centre crop; torchvision's `int(round((length - size) / 2))`.

    Negative where the picture is smaller than the crop (then it is padded with black).
    """
    return round((length - size) / 2.0) if length >= size else -((size - length) // 2)
