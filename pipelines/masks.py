"""The masks of masked image modelling: which patches of a view a method may not see, declared.

A mask changes no pixel. `draw.draw` draws it, it travels beside the view in `Batch.masks`, and the
method does with it what its paper says. `recipe.View` has one.
"""

import math
from dataclasses import dataclass
from typing import assert_never

from headrace.pipelines.ops import require, require_probability, require_range


@dataclass(frozen=True)
class RandomMask:
    """MAE's mask: of the view's (size / patch)^2 patches a random `ratio` is removed.

    Keeps int(N * (1 - ratio)) patches per sample (He et al. 2021; mae `random_masking`).
    Draws: the view's `mask` bool [B, N], row-major over patches, True = removed.
    """

    patch_pixels: int = 16
    ratio: float = 0.75

    def __post_init__(self) -> None:
        require(self.patch_pixels > 0, f"RandomMask.patch_pixels is {self.patch_pixels}")
        require(0 < self.ratio < 1, f"RandomMask.ratio is {self.ratio}; it must be in (0, 1)")


@dataclass(frozen=True)
class BlockMask:
    """BEiT's block-wise mask, with iBOT's random ratio and probability.

    A sample is masked with `probability`; then a ratio is drawn, and blocks of at least
    `min_patches` patches and of an aspect ratio log-uniform in `aspect` are removed until int(ratio
    * N) patches are, ten attempts in a row find no place, or 128 were made in all (Bao et al. 2021,
    algorithm 1; beit `masking_generator.py`; ibot `loader.py`). It never removes more.
    Draws: the view's `mask` bool [B, N], row-major over patches, True = removed.
    """

    patch_pixels: int = 16
    ratio: tuple[float, float] = (0.4, 0.4)
    min_patches: int = 16
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    probability: float = 1.0

    def __post_init__(self) -> None:
        require(self.patch_pixels > 0, f"BlockMask.patch_pixels is {self.patch_pixels}")
        require_probability(self, self.probability)
        require_range(self, "ratio", 0, 1)
        require_range(self, "aspect", 1e-3, 1e3)
        require(self.min_patches > 0, f"BlockMask.min_patches is {self.min_patches}; at least 1")


@dataclass(frozen=True)
class MultiBlockMask:
    """I-JEPA's masks: `targets` blocks to predict, and a context block without them.

    Per group, as the code draws per batch: one size for all target blocks (area in `target_scale`,
    height / width in `target_aspect`) and one for the context (area in `context_scale`, square).
    Per sample: where they lie. A context that keeps no more than `min_keep` patches is drawn again,
    every 20 times with one target block fewer taken out of it. The contexts of a group are cut, in
    row-major order, to the length of the shortest, so that they stack (Assran et al. 2023; ijepa
    `masks/multiblock.py`).
    Draws: the view's `mask` bool [B, 1 + targets, N]: row 0 is True where a patch is *removed* from
    the context, row 1 + t True where a patch belongs to target t.
    """

    patch_pixels: int = 16
    context_scale: tuple[float, float] = (0.85, 1.0)
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    targets: int = 4
    min_keep: int = 10

    def __post_init__(self) -> None:
        require(self.patch_pixels > 0, f"MultiBlockMask.patch_pixels is {self.patch_pixels}")
        require_range(self, "context_scale", 1e-3, 1)
        require_range(self, "target_scale", 1e-3, 1)
        require_range(self, "target_aspect", 1e-3, 1e3)
        require(self.targets > 0, f"MultiBlockMask.targets is {self.targets}; at least 1")
        require(self.min_keep > 0, f"MultiBlockMask.min_keep is {self.min_keep}; at least 1")


Mask = RandomMask | BlockMask | MultiBlockMask


def block_size(
    scale: tuple[float, float], aspect: tuple[float, float], side: int, uniform: float
) -> tuple[int, int]:
    """(height, width) in patches of one of I-JEPA's blocks, each in 1 .. side - 1.

    uniform: in [0, 1]. The one number decides area and aspect ratio, as in the code.
    """
    area = int(side * side * (scale[0] + uniform * (scale[1] - scale[0])))
    ratio = aspect[0] + uniform * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return max(1, min(height, side - 1)), max(1, min(width, side - 1))


def require_fit(mask: Mask, side: int, where: str) -> None:
    """Raise RecipeError if side x side patches have no room for what is declared `where`."""
    match mask:
        case RandomMask():
            pass
        case BlockMask():
            require(
                side > 1, f"{where}: {side} x {side} patches have no room for BlockMask's blocks"
            )
        case MultiBlockMask():
            uniforms = [number / 256 for number in range(257)]
            contexts, targets = (
                [math.prod(block_size(scale, aspect, side, uniform)) for uniform in uniforms]
                for scale, aspect in (
                    (mask.context_scale, (1.0, 1.0)),
                    (mask.target_scale, mask.target_aspect),
                )
            )
            for name, patches in (("contexts", min(contexts)), ("targets at most", max(targets))):
                require(
                    patches > mask.min_keep,
                    f"{where}: MultiBlockMask has {name} of {patches} of {side} x {side} patches; "
                    f"they must be more than its min_keep, {mask.min_keep}",
                )
        case _:
            assert_never(mask)
