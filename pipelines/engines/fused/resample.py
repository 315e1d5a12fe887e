"""Pillow's antialiased resampling, one axis after the other, always along contiguous memory.

Pillow's order and rounding are kept: columns are weighed first, rounded to 8 bits, then rows; the
weights have Pillow's 22 bits and the sums are float32, which differs from Pillow's integers in
about one pixel of ten thousand, by one level. A sum over neighbours *within* a row would not fill
vectors, so the source is transposed once per picture and the half-resampled picture once per view:
then both passes weigh whole rows, and a mirrored view only stores its columns in reverse.
"""

import math

import numba
import numpy as np

from headrace.pipelines.engines.fused.simd import TILE, transpose, weigh_row, weigh_row_inside

_WEIGHT_ONE = float(1 << 22)


@numba.njit(nogil=True)
def padded_stride(length):
    """Elements between rows of `length`: whole tiles, and an odd number of them.

    An even number would put the rows of a tile that is transposed into the same few cache sets.
    """
    tiles = (length + TILE - 1) // TILE
    return (tiles | 1) * TILE


@numba.njit(nogil=True)
def most_taps(length, size, reach):
    """Room for one output's weights: source pixels under a filter of `reach` (1 or 2) to a side."""
    return math.ceil(reach * max(length / size, 1.0)) * 2 + 1


@numba.njit(nogil=True, error_model="numpy")
def _axis_weights(length, full, offset, at, size, reach, room, firsts, counts, weights):
    """Weights of `size` outputs, from the `offset`-th of `full`, over `length` source pixels.

    Output i is a sum over counts[at + i] source pixels from firsts[at + i] on, none where it lies
    outside of the picture. Its weights begin at weights[(at + i) * room].
    Pillow's `precompute_coeffs`: Keys' cubic with a = -1/2 (`reach` 2) or a triangle (1), stretched
    where the picture is reduced, normalised, rounded to 22 bits.
    """
    scale = length / full
    stretch = max(scale, 1.0)
    support = reach * stretch
    inverse = 1.0 / stretch
    for i in range(size):
        place = (at + i) * room
        firsts[at + i] = 0
        counts[at + i] = 0
        if offset + i < 0 or offset + i >= full:
            continue
        centre = (offset + i + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        taps = min(int(centre + support + 0.5), length) - first
        firsts[at + i] = first
        counts[at + i] = taps
        start = first - centre + 0.5
        total = 0.0
        if reach == 2:
            for k in range(taps):
                x = abs((k + start) * inverse)
                near = (1.5 * x - 2.5) * x * x + 1.0
                far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
                weight = near if x < 1.0 else far
                weight = weight if x < 2.0 else 0.0
                weights[place + k] = weight
                total += weight
        else:
            for k in range(taps):
                weight = max(1.0 - abs((k + start) * inverse), 0.0)
                weights[place + k] = weight
                total += weight
        unit = _WEIGHT_ONE / total
        for k in range(taps):
            fixed = np.rint(weights[place + k] * unit)
            weights[place + k] = fixed * (1.0 / _WEIGHT_ONE)


@numba.njit(nogil=True)
def _used(firsts, counts, at, size):
    """The source pixels that any of `size` outputs reads: from and up to; (0, 0) if none."""
    low, high = firsts[at], firsts[at]
    for i in range(at, at + size):
        if counts[i] > 0:
            low = firsts[i] if low == high else min(low, firsts[i])
            high = max(high, firsts[i] + counts[i])
    return low, high


@numba.njit(nogil=True)
def plane_length(area):
    """Bytes from one channel of a planar view to the next: whole tiles, with room behind.

    area: the view's pixels.
    """
    return (area + 2 * TILE - 1) // TILE * TILE


@numba.njit(nogil=True)
def resample(
    source,
    source_first,
    source_stride,
    columns,
    columns_stride,
    geometry,
    flip,
    shape,
    reach,
    firsts,
    counts,
    weights,
    half,
    turned,
    planes,
):
    """A view, planar, out of a picture that is there twice: in rows and turned.

    shape: int64 [2], the view's height and width.

    source: uint8, the interleaved picture, from byte `source_first` on, rows of `source_stride`.
    columns: uint8, the same transposed: row 3 * x + channel holds that byte of every pixel row.
    geometry: int32 [8] = top, height of the source box, height of the whole resized box, first of
    its rows that is in the view; then left, width, width, first column for the other axis.
    reach: 2 for bicubic, 1 for bilinear. firsts, counts: int32 [rows + across], weights:
    float32, half, turned: uint8, scratch. planes: uint8, three of `plane_length` are written.
    """
    rows, across = shape[0], shape[1]
    top, height, full_height = geometry[0], geometry[1], geometry[2]
    left, width, full_width = geometry[4], geometry[5], geometry[6]
    room = max(most_taps(height, full_height, reach), most_taps(width, full_width, reach))
    filters = (reach, room, firsts, counts, weights)
    # Those of the columns come first, those of the rows `across` further on.
    _axis_weights(width, full_width, geometry[7], 0, across, *filters)
    _axis_weights(height, full_height, geometry[3], across, rows, *filters)
    plane = plane_length(rows * across)
    # Pillow 13's rule; older ones always begin with the columns, which rounds differently.
    if height > full_height and height - full_height > 2 * (width - full_width):
        low, high = _used(firsts, counts, 0, across)
        used = 3 * (high - low)
        stride = padded_stride(used)
        turned_stride = padded_stride(rows)
        for y in range(rows):
            at = across + y
            weigh_row_inside(
                source,
                source_first + (top + firsts[at]) * source_stride + 3 * (left + low),
                source_stride,
                weights,
                at * room,
                counts[at],
                half,
                y * stride,
                used,
            )
        transpose(half, 0, stride, rows, used, turned, 0, turned_stride)
        for x in range(across):
            to = across - 1 - x if flip else x
            for channel in range(3):
                weigh_row(
                    turned,
                    (3 * (firsts[x] - low) + channel) * turned_stride,
                    3 * turned_stride,
                    weights,
                    x * room,
                    counts[x],
                    half,
                    (channel * across + to) * turned_stride,
                    rows,
                )
        for channel in range(3):
            first = channel * across * turned_stride
            transpose(half, first, turned_stride, across, rows, planes, channel * plane, across)
        return
    low, high = _used(firsts, counts, across, rows)
    stride = padded_stride(high - low)
    turned_stride = padded_stride(across)
    for x in range(across):
        to = across - 1 - x if flip else x
        for channel in range(3):
            weigh_row(
                columns,
                (3 * (left + firsts[x]) + channel) * columns_stride + top + low,
                3 * columns_stride,
                weights,
                x * room,
                counts[x],
                half,
                (channel * across + to) * stride,
                high - low,
            )
    for channel in range(3):
        first = channel * across * stride
        transpose(half, first, stride, across, high - low, turned, 0, turned_stride)
        for y in range(rows):
            at = across + y
            weigh_row(
                turned,
                (firsts[at] - low) * turned_stride,
                turned_stride,
                weights,
                at * room,
                counts[at],
                planes,
                channel * plane + y * across,
                across,
            )
