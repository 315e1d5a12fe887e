"""One call without the GIL that makes all views of one picture: the other kernels, in order.

A view passes through the caches once: cut and resampled into planes, then every step of its colour
chain in place, then interleaved into the batch, as bytes or already normalised. What is to be done
is plain numbers in arrays (`fused` packs them, once per batch), so one compiled function serves
every recipe.
"""

from enum import IntEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from pipelines.engines.kernels_blur import blur
from pipelines.engines.kernels_color import (
    blend_constant,
    blend_luma,
    mean_luma,
    solarize,
    to_luma,
    turn_hue,
)
from pipelines.engines.kernels_resample import padded_stride, plane_length, resample
from pipelines.engines.kernels_simd import transpose


class Step(IntEnum):
    """One step of a view's chain. Its number: a factor, hue steps, a threshold or a sigma."""

    NONE = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4
    GRAYSCALE = 5
    SOLARIZE = 6
    BLUR = 7


class Program(NamedTuple):
    """What to do with B pictures, V views of each, in at most S steps.

    sizes: int64 [V], the views' sides. starts: int64 [V], where each view's [B, H, W, 3] block
    begins in the target. reaches: int64 [V], 2 for bicubic, 1 for bilinear.
    geometries: int32 [B, V, 8], flips: bool [B, V], see `resample`.
    codes: uint8 [B, V, S] of `Step`; numbers: float32 [B, V, S]; radii: int32 [B, V, S] of blurs.
    scale_bias: float32 [6], three factors and three summands; used where the target is float32.
    """

    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    reaches: NDArray[np.int64]
    geometries: NDArray[np.int32]
    flips: NDArray[np.bool_]
    codes: NDArray[np.uint8]
    numbers: NDArray[np.float32]
    radii: NDArray[np.int32]
    scale_bias: NDArray[np.float32]


class Scratch(NamedTuple):
    """One thread's memory between the passes, one-dimensional; `fused_program.room` says how long.

    columns: uint8, the picture transposed. half, turned: uint8, a view between its two passes.
    planes: uint8, a view. firsts, counts: int32, weights: float32, of what is
    weighed. line, across: float32, for the blur.
    """

    columns: NDArray[np.uint8]
    half: NDArray[np.uint8]
    turned: NDArray[np.uint8]
    planes: NDArray[np.uint8]
    firsts: NDArray[np.int32]
    counts: NDArray[np.int32]
    weights: NDArray[np.float32]
    line: NDArray[np.float32]
    across: NDArray[np.float32]


_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAYSCALE, _SOLARIZE, _BLUR = (
    int(step) for step in list(Step)[1:]
)


def _digest() -> str:
    """Of the sources of all kernels: numba's cache looks at a function's own file only."""
    sources = sorted(Path(__file__).parent.glob("kernels*.py"))
    return sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


@numba.njit(nogil=True)
def _run_chain(codes, numbers, radii, size, scratch):
    planes = scratch.planes
    pixels = size * size
    plane = plane_length(size)
    every = planes[: 2 * plane + pixels]
    red = planes[:pixels]
    green = planes[plane : plane + pixels]
    blue = planes[2 * plane : 2 * plane + pixels]
    for step in range(codes.size):
        code, number = codes[step], numbers[step]
        if code == _BRIGHTNESS:
            blend_constant(every, 0, number)
        elif code == _CONTRAST:
            blend_constant(every, mean_luma(red, green, blue), number)
        elif code == _SATURATION:
            blend_luma(red, green, blue, number)
        elif code == _HUE:
            turn_hue(red, green, blue, number)
        elif code == _GRAYSCALE:
            to_luma(red, green, blue)
        elif code == _SOLARIZE:
            solarize(every, int(number))
        elif code == _BLUR:
            radius = radii[step]
            blur(planes, plane, size, number, radius, scratch.weights, scratch.line, scratch.across)


# The sum must round once where torch's does, on a CPU with fused multiply-add, and twice where it
# does not: "contract" follows the CPU too.
@numba.njit(nogil=True, fastmath={"contract"})
def _write_floats(red, green, blue, scale_bias, target):
    for i in range(red.size):
        target[3 * i] = np.float32(red[i]) * scale_bias[0] + scale_bias[3]
        target[3 * i + 1] = np.float32(green[i]) * scale_bias[1] + scale_bias[4]
        target[3 * i + 2] = np.float32(blue[i]) * scale_bias[2] + scale_bias[5]


@numba.njit(nogil=True)
def _write_bytes(red, green, blue, target):
    for i in range(red.size):
        target[3 * i] = red[i]
        target[3 * i + 1] = green[i]
        target[3 * i + 2] = blue[i]


def _compiled(sources: str) -> Any:
    """`render`, compiled when it is called; numba keeps the result for equal `sources` only.

    That the function mentions `sources` makes them part of what numba's cache compares.
    """

    @numba.njit(nogil=True, cache=True)
    def render(source, first, height, width, program, row, scratch, normalized, target):
        """Make all views of picture `row` of a program and write them to their places.

        source: uint8 [n], `height` x `width` interleaved RGB pixels from byte `first` on.
        target: float32 where `normalized`, else uint8; one-dimensional.
        """
        _ = sources
        geometries = program.geometries[row]
        top, bottom, left, right = height, 0, width, 0
        for view in range(program.sizes.size):
            box = geometries[view]
            top, bottom = min(top, box[0]), max(bottom, box[0] + box[1])
            left, right = min(left, box[4]), max(right, box[4] + box[5])
        row_bytes = 3 * width
        stride = padded_stride(height)
        transpose(
            source,
            first + top * row_bytes + 3 * left,
            row_bytes,
            bottom - top,
            3 * (right - left),
            scratch.columns,
            3 * left * stride + top,
            stride,
        )
        for view in range(program.sizes.size):
            size = program.sizes[view]
            resample(
                source,
                first,
                row_bytes,
                scratch.columns,
                stride,
                geometries[view],
                program.flips[row, view],
                size,
                program.reaches[view],
                scratch.firsts,
                scratch.counts,
                scratch.weights,
                scratch.half,
                scratch.turned,
                scratch.planes,
            )
            codes, numbers = program.codes[row, view], program.numbers[row, view]
            _run_chain(codes, numbers, program.radii[row, view], size, scratch)
            pixels = size * size
            plane = plane_length(size)
            red = scratch.planes[:pixels]
            green = scratch.planes[plane : plane + pixels]
            blue = scratch.planes[2 * plane : 2 * plane + pixels]
            start = program.starts[view] + row * 3 * pixels
            finished = target[start : start + 3 * pixels]
            if normalized:
                _write_floats(red, green, blue, program.scale_bias, finished)
            else:
                _write_bytes(red, green, blue, finished)

    return render


render = _compiled(_digest())
