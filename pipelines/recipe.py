"""What happens to an image, declared once, as data.

A recipe is an `Augmentation`: views made of `ops`, what may be hidden or erased of each (`masks`,
RandomErasing), how samples are mixed, and the numbers of the final normalisation. Nothing here
runs, draws or imports more than the standard library, so that a recipe can be printed, compared,
hashed into a fingerprint and lowered by any engine. `draw.draw` turns it into random numbers,
`engines/` into pixels.

Ops are imported from `ops` and masks from `masks`; `declaration.WORDS` has all of them by name.
"Draws" names the columns that `draw.draw` gives, one row per sample (B = samples in the batch).
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from headrace.pipelines.masks import Mask, RandomMask, require_fit
from headrace.pipelines.ops import (
    GEOMETRY,
    CenterCrop,
    DrawScope,
    Flip,
    OneOf,
    Op,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Size,
    ViewOp,
    height_and_width,
    require,
    require_probability,
    require_range,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class RandomErasing:
    """Overwrite random boxes of the normalised view; timm's `RandomErasing`.

    A sample is erased with `probability`, then in `count` boxes (uniform between its two numbers)
    that share an area uniform in `area`, with a height / width log-uniform in `ratio`, ten attempts
    each (Zhong et al. 2017; timm `data/random_erasing.py`). `fill`: "const" is 0, the mean colour;
    "rand" one colour from N(0, 1) per box; "pixel" N(0, 1) for every value.
    Draws, as the view's `erase`: `box` int32 [B, most boxes, 4] = top, left, height, width in
    pixels of the view, all 0 where there is none; for "rand" `color` float32 [B, most boxes, 3];
    for "pixel" `key` uint64 [B], from which `noise` makes the values.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    fill: Literal["const", "rand", "pixel"] = "pixel"
    count: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        require_probability(self, self.probability)
        require_range(self, "area", 1e-6, 1)
        require_range(self, "ratio", 1e-3, 1e3)
        require_range(self, "count", 1, 64)


@dataclass(frozen=True)
class Mix:
    """Mixup, CutMix, or one of the two: what of its partner becomes part of a sample.

    The partner of sample i of a group of G is sample G - 1 - i, timm's `x.flip(0)` (Zhang et al.
    2017; Yun et al. 2019; timm `data/mixup.py`). With `probability` a weight lambda is drawn from
    Beta(alpha, alpha), of CutMix with `switch_probability` where both alphas are above 0. Mixup:
    x = lambda * x + (1 - lambda) * partner. CutMix: a box of (1 - lambda) of the area, clipped at
    the border, is the partner's, and lambda becomes the share outside of it.
    `scope`: one draw per "group" (timm's "batch"), "pair" or "sample" (timm's "elem").
    Draws, as the plan's `mix`: `partner` int32 [B], added to a sample's row in the batch; `weight`
    float32 [B], lambda after clipping, 1 where nothing is mixed; `box` int32 [B, 4] = top, left,
    height, width of what is cut from the partner, all 0 where nothing is.
    """

    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    probability: float = 1.0
    switch_probability: float = 0.5
    scope: Literal["group", "pair", "sample"] = "group"

    def __post_init__(self) -> None:
        require_probability(self, self.probability)
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            require(value >= 0, f"Mix.{name} is {value}; it must not be negative")
        require(
            self.mixup_alpha > 0 or self.cutmix_alpha > 0,
            "Mix.mixup_alpha and Mix.cutmix_alpha are both 0: nothing would be mixed",
        )
        require(
            0 <= self.switch_probability <= 1,
            f"Mix.switch_probability is {self.switch_probability}; it must be in [0, 1]",
        )


@dataclass(frozen=True)
class Uniform:
    """float32, uniform in [low, high]."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.low) and self.low < self.high < math.inf,
            f"Uniform is ({self.low}, {self.high}); it must be low < high",
        )


@dataclass(frozen=True)
class Integers:
    """int64, uniform in 0 .. limit - 1."""

    limit: int

    def __post_init__(self) -> None:
        require(0 < self.limit <= 1 << 31, f"Integers.limit is {self.limit}; 1 to 2^31")


@dataclass(frozen=True)
class Permutation:
    """int64, a uniform permutation of 0 .. length - 1 along one more axis."""

    length: int

    def __post_init__(self) -> None:
        require(1 < self.length <= 1 << 12, f"Permutation.length is {self.length}; 2 to 4096")


Distribution = Uniform | Integers | Permutation


@dataclass(frozen=True)
class Draw:
    """Random numbers that a method asks for itself and finds in `batch.draws[name]`.

    Draws, as the plan's `draws[name]`: [B, *shape], or [B, *shape, length] of a Permutation. With
    scope "group" all samples of a group have the same. No engine looks at them.
    """

    name: str
    distribution: Distribution
    shape: tuple[int, ...] = ()
    scope: DrawScope = "sample"

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), f"Draw.name is {self.name!r}; it must be an identifier")
        require(
            all(length > 0 for length in self.shape),
            f"Draw {self.name!r}: shape is {self.shape}; its lengths must be positive",
        )


_GEOMETRIES = (
    (RandomResizedCrop,),
    (Resize, CenterCrop),
    (Resize, RandomCrop),
    (CenterCrop,),
    (RandomCrop,),
)


@dataclass(frozen=True)
class View:
    """`count` pictures made from one image by the same ops, with independent draws.

    The ops begin with what fixes the size: RandomResizedCrop, or CenterCrop or RandomCrop, alone or
    after Resize. A Flip stands before RandAugment, whose turns it would reverse.
    mask: what the method hides of the view. erase: what is overwritten after normalisation.
    components: names of what the data set has beside its pictures (saliency masks, say) and is to
    be cropped and mirrored as the view is.
    """

    name: str
    ops: tuple[ViewOp, ...]
    count: int = 1
    mask: Mask | None = None
    erase: RandomErasing | None = None
    components: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.count > 0, f"view {self.name!r}: count is {self.count}; at least 1")
        geometry = [op for op in self.ops if isinstance(op, GEOMETRY)]
        first = self.ops[: len(geometry)]
        require(
            len(geometry) > 0
            and list(first) == geometry
            and tuple(type(op) for op in first) in _GEOMETRIES,
            f"view {self.name!r}: its ops must begin with RandomResizedCrop, or with CenterCrop or "
            f"RandomCrop, alone or after Resize, and have no other geometry",
        )
        kinds = [type(op) for op in self.ops]
        require(
            RandAugment not in kinds or Flip not in kinds[kinds.index(RandAugment) :],
            f"view {self.name!r}: Flip must stand before RandAugment",
        )
        height, width = self.shape
        require(
            height == width or RandAugment not in {type(op) for op in self.executed},
            f"view {self.name!r} is {height} x {width}, and RandAugment is for squares alone",
        )
        if self.mask is not None:
            patch_pixels = self.mask.patch_pixels
            require(
                height % patch_pixels == width % patch_pixels == 0,
                f"view {self.name!r}: size {self.size} is no multiple of the mask's "
                f"patch_pixels {patch_pixels}",
            )
            require(
                height == width or isinstance(self.mask, RandomMask),
                f"view {self.name!r} has {height} x {width} pixels, and a "
                f"{type(self.mask).__name__} is for squares alone",
            )
            if height == width:
                require_fit(self.mask, height // patch_pixels, f"view {self.name!r}")
        for name in self.components:
            require(name.isidentifier(), f"view {self.name!r}: component {name!r} is no identifier")
            require(
                RandAugment not in kinds,
                f"view {self.name!r}: component {name!r} cannot follow the turns of RandAugment",
            )

    @property
    def executed(self) -> tuple[Op, ...]:
        """What an engine runs, one after the other: `ops` with each OneOf's in its place."""
        return tuple(
            inner for op in self.ops for inner in (op.ops if isinstance(op, OneOf) else (op,))
        )

    @property
    def size(self) -> Size:
        """Of the finished view in pixels, as its crop declares it."""
        crops = (RandomResizedCrop, CenterCrop, RandomCrop)
        return next(op for op in self.ops if isinstance(op, crops)).size

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the finished view in pixels."""
        return height_and_width(self.size)


@dataclass(frozen=True)
class Augmentation:
    """A whole recipe: the views of one image, their mixing, and the normalisation of all of them.

    `mean` and `std` are in units of [0, 1] pixels: out = (uint8 / 255 - mean) / std.
    `group` is the number of consecutive positions of the order that share group-scoped draws and
    among which samples are mixed. `draws`: what the method asks for beside its pictures.
    """

    name: str
    views: tuple[View, ...]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    group: int = 1
    mix: Mix | None = None
    draws: tuple[Draw, ...] = ()
    deviations: tuple[str, ...] = field(default=(), metadata={"help": "from paper or its code"})

    def __post_init__(self) -> None:
        require(len(self.views) > 0, f"augmentation {self.name!r} has no views")
        for what, names in (
            ("views", [view.name for view in self.views]),
            ("draws", [draw.name for draw in self.draws]),
        ):
            require(
                len(set(names)) == len(names),
                f"augmentation {self.name!r}: two {what} are called the same, among {names}",
            )
        require(min(self.std) > 0, f"augmentation {self.name!r}: std {self.std} must be positive")
        require(self.group > 0, f"augmentation {self.name!r}: group is {self.group}; at least 1")
        if self.mix is not None:
            require(
                self.group % 2 == 0,
                f"augmentation {self.name!r}: group is {self.group}; Mix needs an even one, whose "
                f"samples have partners",
            )
            require(
                len(self.flat_views) == 1,
                f"augmentation {self.name!r} has {len(self.flat_views)} views; Mix needs one",
            )
            require(
                not self.components,
                f"augmentation {self.name!r}: Mix cannot mix its components",
            )

    @property
    def flat_views(self) -> tuple[View, ...]:
        """One entry per picture: each view repeated `count` times, the order of `Batch.views`."""
        return tuple(view for view in self.views for _ in range(view.count))

    @property
    def components(self) -> tuple[str, ...]:
        """Names of all components that any view asks for, sorted."""
        return tuple(sorted({name for view in self.views for name in view.components}))

    def declaration(self) -> dict[str, Any]:
        """JSON-ready and stable: what enters the fingerprint (without the deviations' prose)."""
        data = asdict(self)
        del data["deviations"]
        for view, declared in zip(self.views, data["views"], strict=True):
            for op, fields in zip(view.ops, declared["ops"], strict=True):
                _name(op, fields)
            if view.mask is not None:
                _name(view.mask, declared["mask"])
            if not view.components:  # so that a declaration from before there were any is the same
                del declared["components"]
        for draw, declared in zip(self.draws, data["draws"], strict=True):
            _name(draw.distribution, declared["distribution"])
        return data


def _name(declared: object, fields: dict[str, Any]) -> None:
    """Add to its fields which of several dataclasses it is: their fields may be the same."""
    fields["op"] = type(declared).__name__
    if isinstance(declared, OneOf):
        for op, inner in zip(declared.ops, fields["ops"], strict=True):
            _name(op, inner)
