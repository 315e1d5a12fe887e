"""One call without the GIL that makes all views of one picture: the other kernels, in order.

A view passes through the caches once: cut and resampled into planes, then every step of its chain
in place, then interleaved into the batch, as bytes or finished. What is to be done is plain numbers
in arrays (`program` packs them, once per batch), so one compiled function serves every
recipe; another call finishes two views that are mixed.
"""

from enum import IntEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.engines.fused import finish
from headrace.pipelines.engines.fused.affine import rotate, shear_rows, shift_columns, shift_rows
from headrace.pipelines.engines.fused.augment import (
    add_level,
    auto_contrast,
    equalize,
    invert,
    posterize,
    sharpen,
    solarize_add,
)
from headrace.pipelines.engines.fused.blur import blur
from headrace.pipelines.engines.fused.color import (
    blend_constant,
    blend_luma,
    mean_luma,
    solarize,
    to_luma,
    turn_hue,
)
from headrace.pipelines.engines.fused.finish import erase, waiting_place, write_bytes, write_floats
from headrace.pipelines.engines.fused.resample import padded_stride, plane_length, resample
from headrace.pipelines.engines.fused.simd import transpose

KERNEL_FILES = (
    "affine", "augment", "blur", "color", "finish", "render", "resample", "sample", "simd"
)  # fmt: skip
"""What is compiled, by the names of its files. tests/test_house.py holds the list complete."""


class Step(IntEnum):
    """One step of a view's chain. Its number: a factor, hue steps, a threshold, a sigma, a level,
    or what RandAugment's `argument` is."""

    NONE = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4
    GRAYSCALE = 5
    SOLARIZE = 6
    BLUR = 7
    ADD = 8
    AUTO_CONTRAST = 9
    EQUALIZE = 10
    INVERT = 11
    ROTATE = 12
    POSTERIZE = 13
    SOLARIZE_ADD = 14
    SHARPNESS = 15
    SHEAR_X = 16
    SHEAR_Y = 17
    TRANSLATE_X = 18
    TRANSLATE_Y = 19


class Program(NamedTuple):
    """What to do with B pictures, V views of each, in at most S steps, and with up to N boxes.

    shapes: int64 [V, 2], the views' heights and widths. starts: int64 [V], where each view's
    [B, H, W, 3] block begins in the target. reaches: int64 [V], 2 for bicubic, 1 for bilinear.
    geometries: int32 [B, V, 8], flips: bool [B, V], see `resample`.
    codes: uint8 [B, V, S] of `Step`; numbers: float32 [B, V, S]; radii: int32 [B, V, S], a blur's
    taps to each side, an affine step's reach. fills: uint8 [V, S, 3], an affine step's colour.
    finished: whether the target is float32, for which alone the rest is.
    scale_bias: float32 [6], three factors and three summands. boxes: int32 [B, V, N, 4], colors:
    float32 [B, V, N, 3], noisy: bool [V], keys: uint64 [B, V], of what is erased; quantiles:
    float32, read-only, empty without noise. partners: int32 [B], -1 where nothing is mixed;
    weights: float32 [B], cuts: int32 [B, 4], as in Mix.
    """

    shapes: NDArray[np.int64]
    starts: NDArray[np.int64]
    reaches: NDArray[np.int64]
    geometries: NDArray[np.int32]
    flips: NDArray[np.bool_]
    codes: NDArray[np.uint8]
    numbers: NDArray[np.float32]
    radii: NDArray[np.int32]
    fills: NDArray[np.uint8]
    finished: bool
    scale_bias: NDArray[np.float32]
    boxes: NDArray[np.int32]
    colors: NDArray[np.float32]
    noisy: NDArray[np.bool_]
    keys: NDArray[np.uint64]
    quantiles: NDArray[np.float32]
    partners: NDArray[np.int32]
    weights: NDArray[np.float32]
    cuts: NDArray[np.int32]


class Scratch(NamedTuple):
    """One thread's memory between the passes, one-dimensional; `memory` says how long.

    columns: uint8, the picture transposed. half, turned: uint8, a view between the two passes of
    the resampler; and its copy, or one with borders, in a step that needs one. planes: uint8, a
    view. firsts, counts: int32, weights: float32, of what is weighed. line, across: float32, for
    the blur; line also for two lines that are mixed. histogram: int32, table: uint8, for
    RandAugment. offsets: int64, parts: float64, for its Rotate. words: uint32, for noise.
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
    histogram: NDArray[np.int32]
    table: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    parts: NDArray[np.float64]
    words: NDArray[np.uint32]


def _digest() -> str:
    """Of the sources of all kernels: numba's cache looks at a function's own file only. The
    engine's other files are not among them, so that editing those compiles nothing."""
    sources = [Path(__file__).parent / f"{name}.py" for name in KERNEL_FILES]
    return sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


# What `render` is put together of is inlined before it is compiled, not after it was: a quarter of
# the time to compile.
@numba.njit(nogil=True, inline="always")
def _change_colors(code, number, planes, plane, pixels, scratch):
    every = planes[: 2 * plane + pixels]
    red = planes[:pixels]
    green = planes[plane : plane + pixels]
    blue = planes[2 * plane : 2 * plane + pixels]
    if code == Step.BRIGHTNESS:
        blend_constant(every, 0, number)
    elif code == Step.CONTRAST:
        blend_constant(every, mean_luma(red, green, blue), number)
    elif code == Step.SATURATION:
        blend_luma(red, green, blue, number)
    elif code == Step.HUE:
        turn_hue(red, green, blue, number)
    elif code == Step.GRAYSCALE:
        to_luma(red, green, blue)
    elif code == Step.SOLARIZE:
        solarize(every, int(number))
    elif code == Step.ADD:
        add_level(every, int(number))
    elif code == Step.INVERT:
        invert(every)
    elif code == Step.POSTERIZE:
        posterize(every, int(number))
    elif code == Step.SOLARIZE_ADD:
        solarize_add(every, int(number))
    elif code == Step.AUTO_CONTRAST:
        for channel in (red, green, blue):
            auto_contrast(channel, scratch.table)
    elif code == Step.EQUALIZE:
        for channel in (red, green, blue):
            equalize(channel, scratch.histogram, scratch.table)


@numba.njit(nogil=True, inline="always")
def _run_chain(codes, numbers, radii, fills, shape, scratch):
    planes, copy = scratch.planes, scratch.half
    height, width = shape[0], shape[1]
    size = width  # of the square that every view with RandAugment is
    plane = plane_length(height * width)
    weights, line, across = scratch.weights, scratch.line, scratch.across
    for step in range(codes.size):
        code, number, radius, fill = codes[step], numbers[step], radii[step], fills[step]
        if code == Step.BLUR:
            blur(planes, plane, height, width, number, radius, weights, line, across)
        elif code == Step.SHARPNESS:
            sharpen(planes, plane, size, number, copy)
        elif code == Step.SHEAR_X:
            shift_columns(planes, plane, size, np.float64(number), 0.0, radius, fill, copy)
        elif code == Step.TRANSLATE_X:
            shift_columns(planes, plane, size, 0.0, np.float64(number) * size, radius, fill, copy)
        elif code == Step.SHEAR_Y:
            shear_rows(planes, plane, size, np.float64(number), radius, fill, copy)
        elif code == Step.TRANSLATE_Y:
            shift_rows(planes, plane, size, np.float64(number) * size, radius, fill, copy)
        elif code == Step.ROTATE:
            rotate(
                planes,
                plane,
                size,
                np.float64(number),
                radius,
                fill,
                scratch.turned,
                copy,
                scratch.offsets,
                scratch.parts,
            )
        elif code != Step.NONE:
            _change_colors(code, number, planes, plane, height * width, scratch)


@numba.njit(nogil=True, inline="always")
def _write(program, row, view, scratch, values, pixels):
    width = program.shapes[view, 1]
    area = program.shapes[view, 0] * width
    plane = plane_length(area)
    red = scratch.planes[:area]
    green = scratch.planes[plane : plane + area]
    blue = scratch.planes[2 * plane : 2 * plane + area]
    start, length = program.starts[view] + row * 3 * area, 3 * area
    if not program.finished:
        write_bytes(red, green, blue, pixels[start : start + length])
    elif program.partners[row] >= 0:
        waiting = waiting_place(start, length)
        write_bytes(red, green, blue, pixels[waiting : waiting + length])
    else:
        finished = values[start : start + length]
        write_floats(red, green, blue, program.scale_bias, finished)
        erase(
            finished,
            width,
            0,
            program.boxes[row, view],
            program.colors[row, view],
            program.noisy[view],
            program.keys[row, view],
            program.quantiles,
            scratch.words,
        )


def _compiled(sources: str) -> tuple[Any, Any]:
    """`render` and `mix`, compiled when called; numba keeps the result for equal `sources` only.

    That the functions mention `sources` makes them part of what numba's cache compares.
    """

    @numba.njit(nogil=True, cache=True)
    def render(source, first, height, width, program, row, scratch, values, pixels):
        """Make all views of picture `row` of a program and write them to their places.

        source: uint8 [n], `height` x `width` interleaved RGB pixels from byte `first` on. pixels:
        uint8, one-dimensional, the batch's memory; values: the same as float32, empty unless
        program.finished. A view with a partner is not finished: see `mix`.
        """
        _ = sources
        geometries = program.geometries[row]
        top, bottom, left, right = height, 0, width, 0
        for view in range(program.starts.size):
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
        for view in range(program.starts.size):
            shape = program.shapes[view]
            resample(
                source,
                first,
                row_bytes,
                scratch.columns,
                stride,
                geometries[view],
                program.flips[row, view],
                shape,
                program.reaches[view],
                scratch.firsts,
                scratch.counts,
                scratch.weights,
                scratch.half,
                scratch.turned,
                scratch.planes,
            )
            codes, numbers = program.codes[row, view], program.numbers[row, view]
            radii, fills = program.radii[row, view], program.fills[view]
            _run_chain(codes, numbers, radii, fills, shape, scratch)
            _write(program, row, view, scratch, values, pixels)

    @numba.njit(nogil=True, cache=True)
    def mix(program, row, partner, scratch, values, pixels):
        """Finish the views of two pictures that are each other's partner, after both `render`s."""
        _ = sources
        finish.mix(program, row, partner, values, pixels, scratch.line, scratch.words)

    return render, mix


render, mix = _compiled(_digest())
