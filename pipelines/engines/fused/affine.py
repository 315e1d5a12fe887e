"""RandAugment's geometry on planar views, in place: Pillow's affine sampling with its own doubles.

Pillow samples output pixel (x, y) at a point of the input, interpolates between 2 x 2 or 4 x 4
neighbours (the border repeated), cuts towards zero, and takes a fill colour where the point is
outside. Of a shear or a translation the point's other coordinate is the middle of a row or a column
exactly: one dimension is left, and a whole row has one fraction, so that it is a plain loop over
shifted rows. Shears along columns are those along rows of the transposed view. A rotation needs all
of it (`sample` takes sixteen pixels at once).

Arithmetic is double although float32 takes half the time: what is cut towards zero shows the last
bit, and so every pixel is Pillow's.

A view is three planes of `size` x `size` bytes, `plane` bytes apart; fill: uint8 [3].
"""

import math

import numba
import numpy as np

from headrace.pipelines.engines.fused.sample import (
    sample_bicubic,
    sample_bilinear,
    shift_bicubic,
    shift_bilinear,
)
from headrace.pipelines.engines.fused.simd import LANES, copy_bytes, fill_bytes, transpose

BORDER = 2  # pixels that a window of four may reach over the edge, to each side


@numba.njit(nogil=True)
def _shift(source, first, stride, part, reach, target, place, length):
    """As `_shifted` of many pixels; up to LANES - 1 more are read and written."""
    for done in range(0, length, LANES):
        if reach == 2:
            shift_bicubic(source, first + done, stride, part, target, place + done)
        else:
            shift_bilinear(source, first + done, stride, part, target, place + done)


@numba.njit(nogil=True)
def _inside(size, shift):
    """From and up to which of `size` pixels the point `shift` further on is in the picture."""
    low = min(max(math.ceil(-shift - 0.5), 0), size)
    while low > 0 and (low - 0.5) + shift >= 0:
        low -= 1
    while low < size and (low + 0.5) + shift < 0:
        low += 1
    high = max(min(math.ceil(size - shift - 0.5), size), low)
    while high < size and (high + 0.5) + shift < size:
        high += 1
    while high > low and (high - 0.5) + shift >= size:
        high -= 1
    return low, high


@numba.njit(nogil=True)
def _split(first, shift):
    """How many whole pixels further on the point of pixel `first` lies, and which part of one."""
    point = ((first + 0.5) + shift) - 0.5
    whole = math.floor(point)
    return int(whole) - first, point - whole


@numba.njit(nogil=True)
def _bordered(planes, plane, size, copy):
    """Copy a view, the border repeated BORDER times on every side; the planes follow each other."""
    side = size + 2 * BORDER
    for channel in range(3):
        for y in range(-BORDER, size + BORDER):
            start = channel * plane + min(max(y, 0), size - 1) * size
            to = (channel * side + y + BORDER) * side
            fill_bytes(copy, to, BORDER, planes[start])
            copy_bytes(planes, start, copy, to + BORDER, size)
            fill_bytes(copy, to + BORDER + size, BORDER, planes[start + size - 1])


@numba.njit(nogil=True)
def shift_columns(planes, plane, size, slope, shift, reach, fill, copy):
    """Sample at (x + slope * y + shift, y): ShearX, TranslateX.

    copy: uint8 scratch [3 * (size + 2 * BORDER)^2 + SLACK].
    """
    _bordered(planes, plane, size, copy)
    side = size + 2 * BORDER
    for channel in range(3):
        level = fill[channel]
        for y in range(size):
            move = slope * (y + 0.5) + shift
            low, high = _inside(size, move)
            whole, part = _split(low, move)
            row = (channel * side + y + BORDER) * side + BORDER
            to = channel * plane + y * size
            _shift(copy, row + low + whole - 1, 1, part, reach, planes, to + low, high - low)
            fill_bytes(planes, to, low, level)
            fill_bytes(planes, to + high, size - high, level)


@numba.njit(nogil=True)
def shear_rows(planes, plane, size, slope, reach, fill, copy):
    """Sample at (x, y + slope * x): ShearY. copy as in `shift_columns`."""
    _turn(planes, plane, size, copy)
    shift_columns(planes, plane, size, slope, 0.0, reach, fill, copy)
    _turn(planes, plane, size, copy)


@numba.njit(nogil=True)
def _turn(planes, plane, size, copy):
    for channel in range(3):
        transpose(planes, channel * plane, size, size, size, copy, channel * plane, size)
    copy_bytes(copy, 0, planes, 0, 3 * plane)


@numba.njit(nogil=True)
def shift_rows(planes, plane, size, shift, reach, fill, copy):
    """Sample at (x, y + shift): TranslateY. copy as in `shift_columns`."""
    _bordered(planes, plane, size, copy)
    side = size + 2 * BORDER
    low, high = _inside(size, shift)
    whole, part = _split(low, shift)
    for channel in range(3):
        for y in range(low, high):
            row = (channel * side + y + whole - 1 + BORDER) * side + BORDER
            _shift(copy, row, side, part, reach, planes, channel * plane + y * size, size)
        start = channel * plane
        fill_bytes(planes, start, low * size, fill[channel])
        fill_bytes(planes, start + high * size, (size - high) * size, fill[channel])


@numba.njit(nogil=True)
def _interleave(planes, plane, size, pixels):
    """Planes as pixels of four bytes, the border repeated BORDER times on every side."""
    stride = 4 * (size + 2 * BORDER)
    for y in range(size):
        start = y * size
        red = planes[start : start + size]
        green = planes[plane + start : plane + start + size]
        blue = planes[2 * plane + start : 2 * plane + start + size]
        row = pixels[(y + BORDER) * stride : (y + BORDER + 1) * stride]
        inner = row[4 * BORDER : 4 * (BORDER + size)]
        for x in range(size):
            inner[4 * x] = red[x]
            inner[4 * x + 1] = green[x]
            inner[4 * x + 2] = blue[x]
            inner[4 * x + 3] = 0
        for k in range(4 * BORDER):
            row[k] = inner[k % 4]
            row[4 * (BORDER + size) + k] = inner[4 * (size - 1) + k % 4]
    for k in range(BORDER):
        copy_bytes(pixels, BORDER * stride, pixels, k * stride, stride)
        last = (size + BORDER - 1) * stride
        copy_bytes(pixels, last, pixels, last + (k + 1) * stride, stride)


@numba.njit(nogil=True)
def rotate(planes, plane, size, degrees, reach, fill, pixels, outside, offsets, parts):
    """Turn the view about its centre, counter-clockwise: Pillow's `Image.rotate`.

    Scratch: pixels uint8 [4 * (size + 2 * BORDER)^2], outside uint8 [size], offsets int64
    [size + LANES], parts float64 [2 * (size + LANES)]. Writes up to LANES - 1 bytes behind planes.
    """
    _interleave(planes, plane, size, pixels)
    angle = -math.radians(degrees % 360.0)
    # Pillow keeps 15 digits of them, which makes quarters of a turn exact.
    cosine, sine = np.rint(math.cos(angle) * 1e15) / 1e15, np.rint(math.sin(angle) * 1e15) / 1e15
    centre = size / 2
    start_x = (cosine * -centre + sine * -centre) + centre
    start_y = (-sine * -centre + cosine * -centre) + centre
    stride = 4 * (size + 2 * BORDER)
    half = size + LANES
    offsets[size:half] = 0
    at, right, down = offsets[:size], parts[:size], parts[half : half + size]
    for y in range(size):
        sine_y, cosine_y = sine * (y + 0.5), cosine * (y + 0.5)
        for x in range(size):
            point_x = cosine * (x + 0.5) + sine_y + start_x
            point_y = -sine * (x + 0.5) + cosine_y + start_y
            outside[x] = (point_x < 0) | (point_x >= size) | (point_y < 0) | (point_y >= size)
            point_x = min(max(point_x, 0.0), np.float64(size)) - 0.5
            point_y = min(max(point_y, 0.0), np.float64(size)) - 0.5
            left, top = np.floor(point_x), np.floor(point_y)
            right[x] = point_x - left
            down[x] = point_y - top
            # The window begins a pixel before; the border makes that one pixel after.
            at[x] = np.int64(top + (BORDER - 1)) * stride + np.int64(left + (BORDER - 1)) * 4
        for x in range(0, size, LANES):
            to = y * size + x
            if reach == 2:
                sample_bicubic(pixels, stride, offsets, parts, half, x, planes, to, plane)
            else:
                sample_bilinear(pixels, stride, offsets, parts, half, x, planes, to, plane)
        for channel in range(3):
            level = fill[channel]
            row = planes[channel * plane + y * size : channel * plane + (y + 1) * size]
            for x in range(size):
                row[x] = level if outside[x] else row[x]
