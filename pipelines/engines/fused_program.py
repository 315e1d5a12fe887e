"""From a recipe and a Plan to the plain numbers that the fused engine's kernels read.

What is the same for every batch is fixed once (`Layout`); what a Plan says becomes arrays in a few
numpy operations per view and op, a few microseconds per picture.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.engines.kernels import Program, Scratch, Step
from pipelines.engines.kernels_resample import padded_stride, plane_length
from pipelines.engines.kernels_simd import SLACK, TILE
from pipelines.plan import Plan
from pipelines.recipe import (
    Augmentation,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Op,
    RandomResizedCrop,
    Resize,
    Solarize,
    View,
)

_JITTER_STEPS = np.array([Step.BRIGHTNESS, Step.CONTRAST, Step.SATURATION, Step.HUE], np.uint8)


@dataclass(frozen=True)
class Layout:
    """The views of a recipe in the order of `flat_views`, and where they lie in a batch.

    sizes: side of each view in pixels. reaches: 2 for bicubic, 1 for bilinear. steps: room in every
    view's chain. scale_bias: the normalisation, as `device_stage` has it.
    """

    views: tuple[View, ...]
    sizes: NDArray[np.int64]
    reaches: NDArray[np.int64]
    steps: int
    scale_bias: NDArray[np.float32]

    @classmethod
    def of(cls, augmentation: Augmentation) -> Self:
        views = augmentation.flat_views
        scale = [1 / (255 * std) for std in augmentation.std]
        bias = [-m / s for m, s in zip(augmentation.mean, augmentation.std, strict=True)]
        return cls(
            views=views,
            sizes=np.array([view.size for view in views], np.int64),
            reaches=np.array([_reach(view) for view in views], np.int64),
            steps=max(1, *(sum(_room(op) for op in view.ops) for view in views)),
            scale_bias=np.array([*scale, *bias], np.float32),
        )

    def starts(self, samples: int) -> tuple[NDArray[np.int64], int]:
        """First element of each view's [B, H, W, 3] block, tile by tile, and of what follows."""
        lengths = samples * self.sizes**2 * 3
        ends = np.cumsum(-(-lengths // TILE) * TILE)
        return np.concatenate([[0], ends[:-1]]), int(ends[-1])

    def views_of(self, finished: NDArray[Any], samples: int) -> tuple[torch.Tensor, ...]:
        """The blocks in one flat array as [B, 3, H, W] tensors with channels-last strides."""
        whole = torch.from_numpy(finished)
        return tuple(
            whole[start : start + samples * size * size * 3]
            .view(samples, size, size, 3)
            .permute(0, 3, 1, 2)
            for start, size in zip(
                self.starts(samples)[0].tolist(), self.sizes.tolist(), strict=True
            )
        )


def _reach(view: View) -> int:
    first = view.ops[0]
    match first:
        case RandomResizedCrop() | Resize():
            return 2 if first.interpolation == "bicubic" else 1
        case _:
            return 1  # a centre crop alone is no resampling: any filter keeps its pixels


def _room(op: Op) -> int:
    match op:
        case ColorJitter():
            return len(_JITTER_STEPS)
        case Grayscale() | Solarize() | GaussianBlur():
            return 1
        case RandomResizedCrop() | Resize() | CenterCrop() | Flip():
            return 0
        case _:
            assert_never(op)


def lower(layout: Layout, plan: Plan) -> Program:
    """The program of a batch."""
    samples, views = len(plan), len(layout.views)
    program = Program(
        sizes=layout.sizes,
        starts=layout.starts(samples)[0],
        reaches=layout.reaches,
        geometries=np.zeros((samples, views, 8), np.int32),
        flips=np.zeros((samples, views), np.bool_),
        codes=np.zeros((samples, views, layout.steps), np.uint8),
        numbers=np.zeros((samples, views, layout.steps), np.float32),
        radii=np.zeros((samples, views, layout.steps), np.int32),
        scale_bias=layout.scale_bias,
    )
    for index, (view, planned) in enumerate(zip(layout.views, plan.views, strict=True)):
        program.geometries[:, index] = _geometry(view, planned.ops, plan.sizes)
        step = 0
        for op, draws in zip(view.ops, planned.ops, strict=True):
            if isinstance(op, Flip):
                # Mirroring commutes with every step of a chain: it is done where columns are cut.
                program.flips[:, index] ^= draws["apply"]
            used = slice(step, step + _room(op))
            step = used.stop
            _chain(
                op,
                draws,
                view.size,
                program.codes[:, index, used],
                program.numbers[:, index, used],
                program.radii[:, index, used],
            )
    return program


def _chain(
    op: Op,
    draws: Mapping[str, NDArray[Any]],
    size: int,
    codes: NDArray[np.uint8],
    numbers: NDArray[np.float32],
    radii: NDArray[np.int32],
) -> None:
    """Fill in one op's steps, [B, steps of the op] each."""
    match op:
        case ColorJitter():
            strengths = np.array([op.brightness, op.contrast, op.saturation, op.hue])
            kinds = np.where(strengths > 0, _JITTER_STEPS, np.uint8(Step.NONE))
            factors = draws["factors"].copy()
            # torchvision's `adjust_hue`: cut to whole steps, which Pillow adds modulo 256.
            factors[:, 3] = (factors[:, 3].astype(np.float64) * 255).astype(np.int32) & 255
            codes[:] = np.where(draws["apply"][:, None], kinds[draws["order"]], Step.NONE)
            numbers[:] = np.take_along_axis(factors, draws["order"].astype(np.int64), axis=1)
        case Grayscale():
            codes[:, 0] = np.where(draws["apply"], Step.GRAYSCALE, Step.NONE)
        case Solarize():
            codes[:, 0] = np.where(draws["apply"], Step.SOLARIZE, Step.NONE)
            numbers[:, 0] = op.threshold
        case GaussianBlur():
            sigma = draws["sigma"]
            radius = np.ceil(3 * sigma.astype(np.float64))
            if op.kernel_size is not None:
                radius[:] = op.kernel_size // 2
            codes[:, 0] = np.where(sigma > 0, Step.BLUR, Step.NONE)
            numbers[:, 0] = sigma
            radii[:, 0] = np.minimum(radius, size - 1)
        case RandomResizedCrop() | Resize() | CenterCrop() | Flip():
            pass
        case _:
            assert_never(op)


def _geometry(
    view: View, draws: tuple[Mapping[str, NDArray[Any]], ...], sizes: NDArray[np.int32]
) -> NDArray[np.int32]:
    """int32 [B, 8]: for rows, then columns, where the source box begins, its length, the length
    that it is resized to, and which of those pixels is the view's first."""
    first, crop = view.ops[0], view.size
    whole = np.zeros_like(sizes)
    match first:
        case RandomResizedCrop():
            box = draws[0]["box"]
            start, length = box[:, :2], box[:, 2:]
            full, offset = np.full_like(length, crop), whole
        case Resize():
            start, length = whole, sizes
            shorter = sizes.min(axis=1, keepdims=True)
            # As `recipe.resized_shape`, for many pictures at once.
            full = (first.size * sizes.astype(np.int64) / shorter).astype(np.int32)
            offset = _centered_offsets(full, crop)
        case CenterCrop():
            start, length, full = whole, sizes, sizes
            offset = _centered_offsets(full, crop)
        case _:
            raise AssertionError(f"View lets no recipe begin with {first}")
    return np.stack([start, length, full, offset], axis=2).reshape(-1, 8)


def _centered_offsets(lengths: NDArray[np.int32], crop: int) -> NDArray[np.int32]:
    """As `recipe.centered_offset`, for many pictures at once."""
    inside = np.rint((lengths - crop) / 2.0).astype(np.int32)
    return np.where(lengths >= crop, inside, -((crop - lengths) // 2)).astype(np.int32)


class Room(NamedTuple):
    """Elements of each array of `Scratch`, in its order, and of a decoded picture."""

    columns: int
    half: int
    turned: int
    planes: int
    firsts: int
    counts: int
    weights: int
    line: int
    across: int
    picture: int


def room(layout: Layout, program: Program, sizes: NDArray[np.int32]) -> Room:
    """What one thread needs for any picture of a program, whose `sizes` are int32 [B, 2]."""
    height, width = sizes.astype(np.int64).T
    size = int(layout.sizes.max())
    padded = padded_stride.py_func
    lengths, fulls = (program.geometries[..., [first, first + 4]] for first in (1, 2))
    stretch = np.maximum(lengths / fulls, 1.0).max()
    taps = 2 * math.ceil(float(layout.reaches.max() * stretch)) + 1
    return Room(
        columns=int((3 * width * padded(height)).max()) + SLACK,
        half=size * int(np.maximum(3 * padded(np.maximum(height, size)), padded(3 * width)).max()),
        turned=int(np.maximum(height, 3 * width).max()) * padded(size) + SLACK,
        planes=3 * plane_length.py_func(size) + SLACK,
        firsts=2 * size,
        counts=2 * size,
        weights=max(2 * size * taps, 4 * size + 2),
        line=2 * (3 * size + SLACK),
        across=size * size + SLACK,
        picture=int((3 * height * width).max()),
    )


def allocate(room: Room) -> Scratch:
    """Memory for one thread, from the start of a cache line on."""
    kinds = [np.uint8] * 4 + [np.int32] * 2 + [np.float32] * 3
    arrays = [aligned(length, kind) for length, kind in zip(room[:-1], kinds, strict=True)]
    return Scratch(*arrays)


def aligned(length: int, kind: type[np.generic]) -> NDArray[Any]:
    """One-dimensional and uninitialised; a vector that crosses cache lines takes twice as long."""
    size = length * np.dtype(kind).itemsize
    block = np.empty(size + TILE, np.uint8)
    offset = -block.ctypes.data % TILE
    return block[offset : offset + size].view(kind)
