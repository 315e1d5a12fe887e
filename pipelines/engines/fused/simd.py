"""The few loops that LLVM does not find by itself, written as vectors for numba.

numba compiles scalar loops and leaves vectors to LLVM's optimiser, which is good at one simple loop
over contiguous memory and at nothing else. Some kernels that decide the speed are not of that kind:
a weighted sum of rows whose accumulators stay in registers over all taps, a transposition of bytes
(and, in `sample`, a picture's levels between its pixels). They are built in LLVM's own
vectors, which it lowers to whatever the CPU has (AVX-512, AVX2, SSE, NEON); nothing in here names
an instruction set. Copying and filling are LLVM's too, because numba's slices are slow at both.

All work on flat C-contiguous arrays and element offsets, and check nothing.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 64  # bytes that the wide sums make at once; half of it by the narrow ones
LANES = 16  # pixels of a vector: one AVX-512 register of float32, two of AVX2, four of NEON
SLACK = 2 * TILE  # elements that a tile may read or write behind the last one that is asked for

_BYTE = ir.IntType(8)
INT = ir.IntType(32)
_INDEX = ir.IntType(64)
_FLOAT = ir.FloatType()
BYTES = ir.VectorType(_BYTE, LANES)
INTS = ir.VectorType(INT, LANES)
_FLOATS = ir.VectorType(_FLOAT, LANES)


def data_of(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Pointer to an array's first element."""
    return context.make_array(kind)(context, builder, array).data


def constant_index(value: int) -> ir.Constant:
    return ir.Constant(_INDEX, value)


def vector_at(builder: Any, data: Any, offset: Any, vector: ir.VectorType) -> Any:
    """Pointer to the vector that starts at element `offset`."""
    return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())


def _load_floats(builder: Any, data: Any, offset: Any, element: Any) -> Any:
    """LANES elements, bytes or floats, as floats."""
    if isinstance(element, types.Float):
        return builder.load(vector_at(builder, data, offset, _FLOATS), align=4)
    raw = builder.load(vector_at(builder, data, offset, BYTES), align=1)
    return builder.uitofp(builder.zext(raw, INTS), _FLOATS)


def splat(builder: Any, scalar: Any, vector: ir.VectorType = _FLOATS) -> Any:
    """A scalar in all lanes."""
    undefined = ir.Constant(vector, ir.Undefined)
    single = builder.insert_element(undefined, scalar, ir.Constant(INT, 0))
    return builder.shuffle_vector(single, undefined, ir.Constant(INTS, [0] * LANES))


def clipped_bytes(builder: Any, floats: Any) -> Any:
    """LANES floats or doubles as bytes, limited to 0..255 and cut towards zero."""
    for order, bound in ((">", 0.0), ("<", 255.0)):
        limit = ir.Constant(floats.type, [bound] * LANES)
        floats = builder.select(builder.fcmp_ordered(order, floats, limit), floats, limit)
    return builder.trunc(builder.fptosi(floats, INTS), BYTES)


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once on a CPU with fused multiply-add and twice on another.

    The flag that only *allows* a compiler to fuse leaves it to chance in which loop it does: the
    same source then gives other bits from numba's cache than right after it was compiled.
    """
    name = "llvm.fmuladd." + ("f32" if z.type == _FLOAT else f"v{LANES}f32")
    kind = ir.FunctionType(z.type, (z.type, z.type, z.type))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), (x, y, z))


def _typed_multiply_add(_context: Any, x: Any, y: Any, z: Any) -> Any:
    """As `_multiply_add`, of float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _multiply_add(builder, *arguments)

    return types.float32(x, y, z), generate


multiply_add: Callable[..., Any] = intrinsic(_typed_multiply_add)


def _typed_copy(
    _context: Any, source: Any, _first: Any, target: Any, _place: Any, _length: Any
) -> Any:
    """target[place + i] = source[first + i] for i < length, bytes that do not overlap."""
    size = types.int64
    signature = types.void(source, size, target, size, size)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, first, target, place, length = arguments
        start = builder.gep(data_of(context, builder, signature.args[0], source), [first])
        to = builder.gep(data_of(context, builder, signature.args[2], target), [place])
        cgutils.raw_memcpy(builder, to, start, length, 1)
        return context.get_dummy_value()

    return signature, generate


def _typed_filling(_context: Any, target: Any, _first: Any, _length: Any, _level: Any) -> Any:
    """target[first + i] = level for i < length, bytes."""
    size = types.int64
    signature = types.void(target, size, size, types.uint8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, first, length, level = arguments
        start = builder.gep(data_of(context, builder, signature.args[0], target), [first])
        cgutils.memset(builder, start, length, level)
        return context.get_dummy_value()

    return signature, generate


copy_bytes: Callable[..., None] = intrinsic(_typed_copy)
fill_bytes: Callable[..., None] = intrinsic(_typed_filling)


def _weighted_sum(tile: int) -> Callable[..., None]:
    """A function (source, first, stride, weights, at, taps, target, place) of one tile.

    target[place + i] = sum over k < taps of weights[at + k] * source[first + k * stride + i], for
    i < `tile`. source and target are uint8 or float32; to bytes it rounds half up and clips.
    """

    def typed(
        _context: Any,
        source: Any,
        _first: Any,
        _stride: Any,
        weights: Any,
        _at: Any,
        _taps: Any,
        target: Any,
        _place: Any,
    ) -> Any:
        size = types.int64
        signature = types.void(source, size, size, weights, size, size, target, size)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, offset, stride, weights, first_weight, taps, target, place = arguments
            source = data_of(context, builder, signature.args[0], source)
            weights = data_of(context, builder, signature.args[3], weights)
            target = data_of(context, builder, signature.args[6], target)
            from_element, to_element = signature.args[0].dtype, signature.args[6].dtype
            to_bytes = not isinstance(to_element, types.Float)
            start = ir.Constant(_FLOATS, [0.5 if to_bytes else 0.0] * LANES)
            vectors = range(0, tile, LANES)
            sums = [cgutils.alloca_once_value(builder, start) for _ in vectors]
            with cgutils.for_range(builder, taps, intp=_INDEX) as loop:
                row = builder.add(offset, builder.mul(stride, loop.index))
                place_of_weight = builder.add(first_weight, loop.index)
                weight = splat(builder, builder.load(builder.gep(weights, [place_of_weight])))
                for total, column in zip(sums, vectors, strict=True):
                    at = builder.add(row, constant_index(column))
                    values = _load_floats(builder, source, at, from_element)
                    added = _multiply_add(builder, values, weight, builder.load(total))
                    builder.store(added, total)
            for total, column in zip(sums, vectors, strict=True):
                at, floats = builder.add(place, constant_index(column)), builder.load(total)
                if to_bytes:
                    clipped = clipped_bytes(builder, floats)
                    builder.store(clipped, vector_at(builder, target, at, BYTES), align=1)
                else:
                    builder.store(floats, vector_at(builder, target, at, _FLOATS), align=4)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(typed)


_sum_wide = _weighted_sum(TILE)
_sum_narrow = _weighted_sum(TILE // 2)


def _typed_transposition(
    _context: Any,
    source: Any,
    _first: Any,
    _stride: Any,
    target: Any,
    _place: Any,
    _target_stride: Any,
) -> Any:
    """Transpose 16 x 16 bytes, as `transpose` does many."""
    size = types.int64
    signature = types.void(source, size, size, target, size, size)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, place, stride, target, to_place, to_stride = arguments
        source = data_of(context, builder, signature.args[0], source)
        target = data_of(context, builder, signature.args[3], target)
        rows = []
        for _ in range(LANES):
            rows.append(builder.load(vector_at(builder, source, place, BYTES), align=1))
            place = builder.add(place, stride)
        half = LANES // 2
        low = [lane for pair in range(half) for lane in (pair, LANES + pair)]
        high = [half + lane for lane in low]
        # Interleaving row i with row i + 8 is one round of a perfect shuffle of all 256 bytes;
        # four of eight address bits' rotations exchange row and column.
        for _ in range(4):
            rows = [
                builder.shuffle_vector(rows[row], rows[row + half], ir.Constant(INTS, lanes))
                for row in range(half)
                for lanes in (low, high)
            ]
        for row in rows:
            builder.store(row, vector_at(builder, target, to_place, BYTES), align=1)
            to_place = builder.add(to_place, to_stride)
        return context.get_dummy_value()

    return signature, generate


_transpose_tile: Callable[..., None] = intrinsic(_typed_transposition)


@numba.njit(nogil=True)
def weigh_row(source, first, stride, weights, at, taps, target, place, length):
    """A row out of `taps` rows, by the formula of `_weighted_sum`, for i < `length`.

    Reads and writes up to TILE - 1 elements behind the end.
    """
    done = 0
    while length - done > TILE // 2:
        _sum_wide(source, first + done, stride, weights, at, taps, target, place + done)
        done += TILE
    if done < length:
        _sum_narrow(source, first + done, stride, weights, at, taps, target, place + done)


@numba.njit(nogil=True)
def weigh_row_inside(source, first, stride, weights, at, taps, target, place, length):
    """As `weigh_row` of bytes, but touching nothing outside of the rows.

    The last tile lies over its neighbour.
    """
    narrow = TILE // 2
    if length < narrow:
        for i in range(length):
            total = np.float32(0.5)
            for k in range(taps):
                total += weights[at + k] * np.float32(source[first + k * stride + i])
            target[place + i] = np.uint8(min(max(total, np.float32(0)), np.float32(255)))
        return
    done = 0
    while length - done >= TILE:
        _sum_wide(source, first + done, stride, weights, at, taps, target, place + done)
        done += TILE
    while done < length:
        i = min(done, length - narrow)
        _sum_narrow(source, first + i, stride, weights, at, taps, target, place + i)
        done = i + narrow


@numba.njit(nogil=True)
def transpose(source, first, stride, rows, columns, target, place, target_stride):
    """target[place + j * target_stride + i] = source[first + i * stride + j], bytes.

    Touches nothing outside of the two pictures: tiles at the end lie over their neighbours.
    """
    if rows < LANES or columns < LANES:
        for j in range(columns):
            for i in range(rows):
                target[place + j * target_stride + i] = source[first + i * stride + j]
        return
    for top in range(0, rows, LANES):
        i = min(top, rows - LANES)
        for left in range(0, columns, LANES):
            j = min(left, columns - LANES)
            from_, to = first + i * stride + j, place + j * target_stride + i
            _transpose_tile(source, from_, stride, target, to, target_stride)
