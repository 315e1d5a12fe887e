"""What happens to an image, declared once, as data.

A recipe is an `Augmentation`: views made of ops, an optional mask per view, and the numbers of the
final normalisation. Nothing here runs, draws or imports more than the standard library, so that a
recipe can be printed, compared, hashed into a fingerprint and lowered by any engine. `draw.draw`
turns it into random numbers, `engines/` into pixels.

Each op lists under "Draws" the columns that `draw.draw` gives for it, one row per sample
(B = samples in the batch). An op without "Draws" is a function of the picture's size alone.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Interpolation = Literal["bilinear", "bicubic"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RecipeError(ValueError):
    """A recipe that cannot mean anything: says which field of which op, and what it may be."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RecipeError(message)


def _require_probability(op: object, value: float) -> None:
    _require(0 <= value <= 1, f"{type(op).__name__}.probability is {value}; it must be in [0, 1]")


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crop a random box and resize it to `size` x `size`, antialiased.

    Sampling as torchvision's `RandomResizedCrop.get_params`: up to ten attempts, then the central
    box of the nearest admissible aspect ratio.
    Draws: `box` int32 [B, 4] = top, left, height, width in source pixels.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _require(self.size > 0, f"RandomResizedCrop.size is {self.size}; it must be positive")
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            _require(
                0 < low <= high,
                f"RandomResizedCrop.{name} is ({low}, {high}); it must be 0 < low <= high",
            )
        _require(self.scale[1] <= 1, f"RandomResizedCrop.scale is {self.scale}; at most 1")


@dataclass(frozen=True)
class Resize:
    """Resize the shorter side to `size` (torchvision's rounding), antialiased. No draws."""

    size: int
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _require(self.size > 0, f"Resize.size is {self.size}; it must be positive")


@dataclass(frozen=True)
class CenterCrop:
    """Cut the central `size` x `size` (torchvision's rounding). No draws."""

    size: int

    def __post_init__(self) -> None:
        _require(self.size > 0, f"CenterCrop.size is {self.size}; it must be positive")


@dataclass(frozen=True)
class Flip:
    """Mirror left and right. Draws: `apply` bool [B]."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        _require_probability(self, self.probability)


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter under a RandomApply: four factors in a random order.

    brightness, contrast, saturation: factor uniform in [max(0, 1 - x), 1 + x]; hue: shift uniform
    in [-hue, hue], a fraction of the colour circle. An op whose strength is 0 is left out.
    Draws: `apply` bool [B]; `factors` float32 [B, 4] = brightness, contrast, saturation, hue;
    `order` int8 [B, 4], the index into `factors` that is applied first, second, ...
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    probability: float = 1.0

    def __post_init__(self) -> None:
        _require_probability(self, self.probability)
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _require(value >= 0, f"ColorJitter.{name} is {value}; it must not be negative")
        _require(0 <= self.hue <= 0.5, f"ColorJitter.hue is {self.hue}; it must be in [0, 0.5]")


@dataclass(frozen=True)
class Grayscale:
    """Replace the colours by ITU-R 601 luma on all three channels. Draws: `apply` bool [B]."""

    probability: float = 0.2

    def __post_init__(self) -> None:
        _require_probability(self, self.probability)


@dataclass(frozen=True)
class GaussianBlur:
    """A true Gaussian as torchvision's `gaussian_blur`: reflected border, normalised kernel.

    `kernel_size` None takes 2 * ceil(3 * sigma) + 1 per sample, at most what the view's reflected
    border allows. Pillow's `GaussianBlur`, which DINO's and MoCo's code calls, approximates this
    one by three box blurs.
    Draws: `sigma` float32 [B] in pixels, 0 where the blur is not applied.
    """

    probability: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel_size: int | None = None

    def __post_init__(self) -> None:
        _require_probability(self, self.probability)
        low, high = self.sigma
        _require(0 < low <= high, f"GaussianBlur.sigma is ({low}, {high}); 0 < low <= high")
        size = self.kernel_size
        _require(
            size is None or (size > 0 and size % 2 == 1),
            f"GaussianBlur.kernel_size is {size}; it must be odd and positive, or None",
        )


@dataclass(frozen=True)
class Solarize:
    """Invert every value at or above `threshold` (0..256). Draws: `apply` bool [B]."""

    probability: float = 0.2
    threshold: int = 128

    def __post_init__(self) -> None:
        _require_probability(self, self.probability)
        _require(0 <= self.threshold <= 256, f"Solarize.threshold is {self.threshold}; 0..256")


Op = (
    RandomResizedCrop
    | Resize
    | CenterCrop
    | Flip
    | ColorJitter
    | Grayscale
    | GaussianBlur
    | Solarize
)


@dataclass(frozen=True)
class RandomMask:
    """MAE's mask: of the view's (size / patch)^2 patches a random `ratio` is removed.

    Keeps int(N * (1 - ratio)) patches per sample (He et al. 2021; mae `random_masking`).
    Draws: the view's `mask` bool [B, N], row-major over patches, True = removed.
    """

    patch_pixels: int = 16
    ratio: float = 0.75

    def __post_init__(self) -> None:
        _require(self.patch_pixels > 0, f"RandomMask.patch_pixels is {self.patch_pixels}")
        _require(0 < self.ratio < 1, f"RandomMask.ratio is {self.ratio}; it must be in (0, 1)")


Mask = RandomMask


@dataclass(frozen=True)
class View:
    """`count` pictures made from one image by the same ops, with independent draws.

    The ops begin with what fixes the size: RandomResizedCrop, or Resize then CenterCrop, or
    CenterCrop alone.
    """

    name: str
    ops: tuple[Op, ...]
    count: int = 1
    mask: Mask | None = None

    def __post_init__(self) -> None:
        _require(self.count > 0, f"view {self.name!r}: count is {self.count}; at least 1")
        geometry = [
            op for op in self.ops if isinstance(op, RandomResizedCrop | Resize | CenterCrop)
        ]
        first = self.ops[: len(geometry)]
        kinds = tuple(type(op) for op in first)
        _require(
            len(geometry) > 0
            and list(first) == geometry
            and kinds in ((RandomResizedCrop,), (Resize, CenterCrop), (CenterCrop,)),
            f"view {self.name!r}: its ops must begin with RandomResizedCrop, or Resize and "
            f"CenterCrop, or CenterCrop, and have no other geometry",
        )
        if self.mask is not None:
            _require(
                self.size % self.mask.patch_pixels == 0,
                f"view {self.name!r}: size {self.size} is no multiple of the mask's "
                f"patch_pixels {self.mask.patch_pixels}",
            )

    @property
    def size(self) -> int:
        """Side of the finished view in pixels."""
        crop = next(op for op in self.ops if isinstance(op, RandomResizedCrop | CenterCrop))
        return crop.size


@dataclass(frozen=True)
class Augmentation:
    """A whole recipe: the views of one image and the normalisation of all of them.

    `mean` and `std` are in units of [0, 1] pixels: out = (uint8 / 255 - mean) / std.
    `group` is the number of consecutive positions of the order that share group-scoped draws.
    """

    name: str
    views: tuple[View, ...]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    group: int = 1
    deviations: tuple[str, ...] = field(default=(), metadata={"help": "from paper or its code"})

    def __post_init__(self) -> None:
        _require(len(self.views) > 0, f"augmentation {self.name!r} has no views")
        names = [view.name for view in self.views]
        _require(
            len(set(names)) == len(names),
            f"augmentation {self.name!r}: two views are called the same, among {names}",
        )
        _require(min(self.std) > 0, f"augmentation {self.name!r}: std {self.std} must be positive")
        _require(self.group > 0, f"augmentation {self.name!r}: group is {self.group}; at least 1")

    @property
    def flat_views(self) -> tuple[View, ...]:
        """One entry per picture: each view repeated `count` times, the order of `Batch.views`."""
        return tuple(view for view in self.views for _ in range(view.count))

    def declaration(self) -> dict[str, Any]:
        """JSON-ready and stable: what enters the fingerprint (without the deviations' prose)."""
        data = asdict(self)
        del data["deviations"]
        for view, shown in zip(self.views, data["views"], strict=True):
            for op, fields in zip(view.ops, shown["ops"], strict=True):
                fields["op"] = type(op).__name__
            if view.mask is not None:
                shown["mask"]["op"] = type(view.mask).__name__
        return data


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
