"""A picture's levels between its pixels, sixteen at a time, as Pillow's affine transform has them.

The two loops are LLVM vectors for the reasons that `simd` gives: numba's would spend their
time in slices and in what vectors leave over (of one row after the other), or not become vectors
at all (of a rotation, whose points lie anywhere in a picture).

All work on flat C-contiguous arrays and element offsets, and check nothing.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from headrace.pipelines.engines.fused.simd import (
    BYTES,
    INT,
    INTS,
    LANES,
    clipped_bytes,
    constant_index,
    data_of,
    splat,
    vector_at,
)

_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
_FOUR_PIXELS = ir.VectorType(INT, 4)


def _picked(builder: Any, low: Any, high: Any, lanes: list[int]) -> Any:
    chosen = ir.Constant(ir.VectorType(INT, len(lanes)), lanes)
    return builder.shuffle_vector(low, high, chosen)


def _neighbours(builder: Any, source: Any, places: list[Any]) -> list[Any]:
    """Of LANES pixels of 4 bytes, the pixels themselves, those behind them, ...: 4 vectors."""
    fours = [builder.load(vector_at(builder, source, at, _FOUR_PIXELS), align=1) for at in places]
    while len(fours) > 4:
        both = list(range(2 * fours[0].type.count))
        pairs = zip(fours[::2], fours[1::2], strict=True)
        fours = [_picked(builder, low, high, both) for low, high in pairs]
    # Now each has four pixels with four neighbours; then eight with two, then sixteen with one.
    even = [4 * pixel + neighbour for neighbour in (0, 1) for pixel in range(8)]
    odd = [lane + 2 for lane in even]
    first = [*range(8), *range(LANES, LANES + 8)]
    second = [lane + 8 for lane in first]
    neighbours = []
    for pair in (even, odd):
        low, high = (_picked(builder, fours[i], fours[i + 1], pair) for i in (0, 2))
        neighbours += [_picked(builder, low, high, lanes) for lanes in (first, second)]
    return neighbours


def _polynomial(builder: Any, coefficients: list[Any], x: Any) -> Any:
    """By Horner's rule, lowest coefficient first."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = builder.fadd(coefficient, builder.fmul(x, value))
    return value


def _between(builder: Any, values: list[Any], x: Any) -> Any:
    """Pillow's interpolation at `x` in [0, 1) between the middle two of 2 or 4 vectors.

    Operation by operation, so that every rounding is Pillow's. Levels, which are integers, become
    doubles once it makes a difference.
    """
    exact = values[0].type == INTS
    add, subtract = (builder.add, builder.sub) if exact else (builder.fadd, builder.fsub)
    if len(values) == 2:
        coefficients = [values[0], subtract(values[1], values[0])]
    else:
        a, b, c, d = values
        bend = subtract(a, b)
        quadratic = subtract(add(add(bend, bend), c), d)
        cubic = add(subtract(subtract(b, a), c), d)
        coefficients = [b, subtract(c, a), quadratic, cubic]
    if exact:
        coefficients = [builder.sitofp(each, _DOUBLES) for each in coefficients]
    return _polynomial(builder, coefficients, x)


def _shifted(reach: int) -> Callable[..., None]:
    """A function (source, first, stride, part, target, place) of LANES pixels.

    target[place + i] is interpolated, `part` of the way from source[first + stride + i] to
    source[first + 2 * stride + i], bytes: for `reach` 2 with one more before and behind.
    """

    def typed(
        _context: Any,
        source: Any,
        _first: Any,
        _stride: Any,
        _part: Any,
        target: Any,
        _place: Any,
    ) -> Any:
        size = types.int64
        signature = types.void(source, size, size, types.float64, target, size)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, first, stride, part, target, place = arguments
            source = data_of(context, builder, signature.args[0], source)
            target = data_of(context, builder, signature.args[4], target)
            levels = []
            for k in (0, 1, 2, 3) if reach == 2 else (1, 2):
                at = builder.add(first, builder.mul(stride, constant_index(k)))
                raw = builder.load(vector_at(builder, source, at, BYTES), align=1)
                levels.append(builder.zext(raw, INTS))
            between = _between(builder, levels, splat(builder, part, _DOUBLES))
            to = vector_at(builder, target, place, BYTES)
            builder.store(clipped_bytes(builder, between), to, align=1)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(typed)


shift_bilinear = _shifted(1)
shift_bicubic = _shifted(2)


def _sampler(reach: int) -> Callable[..., None]:
    """A function (source, stride, offsets, parts, half, at, target, place, plane) of LANES pixels.

    source: uint8, pixels of 4 bytes in rows of `stride` bytes, of which three are channels.
    Pixel i is sampled in a window of 4 x 4 pixels from byte offsets[at + i] on, parts[at + i] right
    and parts[half + at + i] down of its second pixel and row: bicubically for `reach` 2, between
    the middle four pixels for 1. Its channels go to target[place + i], `plane` bytes apart.
    """

    def typed(
        _context: Any,
        source: Any,
        _stride: Any,
        offsets: Any,
        parts: Any,
        _half: Any,
        _at: Any,
        target: Any,
        _place: Any,
        _plane: Any,
    ) -> Any:
        size = types.int64
        signature = types.void(source, size, offsets, parts, size, size, target, size, size)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, stride, offsets, parts, half, at, target, place, plane = arguments
            source = data_of(context, builder, signature.args[0], source)
            offsets = data_of(context, builder, signature.args[2], offsets)
            parts = data_of(context, builder, signature.args[3], parts)
            target = data_of(context, builder, signature.args[6], target)
            right = builder.load(vector_at(builder, parts, at, _DOUBLES), align=8)
            at_down = builder.add(at, half)
            down = builder.load(vector_at(builder, parts, at_down, _DOUBLES), align=8)
            windows = [
                builder.load(builder.gep(offsets, [builder.add(at, constant_index(lane))]))
                for lane in range(LANES)
            ]
            used = slice(None) if reach == 2 else slice(1, 3)
            sums: list[list[Any]] = [[], [], []]
            for row in range(4)[used]:
                below = builder.mul(stride, constant_index(row))
                pixels = _neighbours(
                    builder, source, [builder.add(window, below) for window in windows]
                )[used]
                for channel, rows in enumerate(sums):
                    shift, mask = (ir.Constant(INTS, [k] * LANES) for k in (8 * channel, 255))
                    levels = [builder.and_(builder.lshr(each, shift), mask) for each in pixels]
                    rows.append(_between(builder, levels, right))
            for channel, rows in enumerate(sums):
                clipped = clipped_bytes(builder, _between(builder, rows, down))
                to = builder.add(place, builder.mul(plane, constant_index(channel)))
                builder.store(clipped, vector_at(builder, target, to, BYTES), align=1)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(typed)


sample_bilinear = _sampler(1)
sample_bicubic = _sampler(2)
