"""RandAugment's operations on levels and neighbours, on one planar view, in place, as in Pillow.

What is a function of the level alone is arithmetic where a few vector operations say it (Invert,
Posterize, SolarizeAdd), and a table where the picture decides it (AutoContrast, Equalize): then
each byte costs a load from it, and nothing is gained by any other way that is exact.

A view is three planes, `plane` bytes apart, of `length` bytes each; all arrays are flat uint8.
"""

import numba
import numpy as np

from headrace.pipelines.engines.fused.simd import copy_bytes

F = np.float32
LEVELS = 256
_HISTOGRAMS = 4  # neighbours often have one level, and an addition must wait for the one before
HISTOGRAM = _HISTOGRAMS * LEVELS


@numba.njit(nogil=True)
def add_level(values, shift):
    """clamp(value + shift), `shift` in -255..255."""
    if shift >= 0:
        summand, most = np.uint8(shift), np.uint8(255 - shift)
        for i in range(values.size):
            value = values[i]
            values[i] = np.uint8(value + summand) if value <= most else np.uint8(255)
    else:
        less = np.uint8(-shift)
        for i in range(values.size):
            value = values[i]
            values[i] = np.uint8(value - less) if value >= less else np.uint8(0)


@numba.njit(nogil=True)
def invert(values):
    for i in range(values.size):
        values[i] = ~values[i]


@numba.njit(nogil=True)
def posterize(values, bits):
    """Keep the `bits` upper bits of 8: none makes all black."""
    mask = np.uint8(0xFF00 >> bits & 0xFF)
    for i in range(values.size):
        values[i] &= mask


@numba.njit(nogil=True)
def solarize_add(values, summand):
    """Brighten what is below 128; `summand` in 0..255."""
    added = np.uint8(summand)
    most = np.uint8(255 - summand)
    for i in range(values.size):
        value = values[i]
        brighter = np.uint8(value + added) if value <= most else np.uint8(255)
        values[i] = brighter if value < np.uint8(128) else value


@numba.njit(nogil=True)
def _look_up(values, table):
    for i in range(values.size):
        values[i] = table[values[i]]


@numba.njit(nogil=True)
def auto_contrast(values, table):
    """Stretch one channel to 0..255: `ImageOps.autocontrast`. table: uint8 scratch [256]."""
    low, high = values[0], values[0]
    for i in range(values.size):
        low = min(low, values[i])
        high = max(high, values[i])
    if high <= low:
        return
    scale = 255.0 / (np.int64(high) - np.int64(low))
    offset = -np.float64(low) * scale
    for level in range(LEVELS):
        table[level] = np.uint8(min(max(level * scale + offset, 0.0), 255.0))
    _look_up(values, table)


@numba.njit(nogil=True)
def equalize(values, histogram, table):
    """Make one channel's levels equally frequent: `ImageOps.equalize`.

    Scratch: histogram int32 [HISTOGRAM], table uint8 [256].
    """
    histogram[:] = 0
    whole = values.size // _HISTOGRAMS * _HISTOGRAMS
    for i in range(0, whole, _HISTOGRAMS):
        for k in range(_HISTOGRAMS):
            histogram[k * LEVELS + values[i + k]] += 1
    for i in range(whole, values.size):
        histogram[values[i]] += 1
    last = 0
    for level in range(LEVELS):
        for k in range(1, _HISTOGRAMS):
            histogram[level] += histogram[k * LEVELS + level]
        if histogram[level] > 0:
            last = level
    # Pillow's two exceptions, one level only and a step of 0, are one.
    step = (values.size - histogram[last]) // 255
    if step == 0:
        return
    below = step // 2
    for level in range(LEVELS):
        table[level] = np.uint8(min(below // step, 255))
        below += histogram[level]
    _look_up(values, table)


@numba.njit(nogil=True)
def sharpen(planes, plane, size, factor, copy):
    """Away from (factor > 1) or towards Pillow's SMOOTH filter; the outermost pixels stay.

    copy: uint8 scratch, as long as `planes`.
    """
    if size < 3:
        return
    copy_bytes(planes, 0, copy, 0, 3 * plane)
    # One loop over all inner rows, since short ones lose their time in what vectors leave over:
    # from the second pixel of the second row to the last but one of the last but one.
    length = size * (size - 2) - 2
    for channel in range(3):
        first = channel * plane
        above = copy[first : first + length + 2]
        row = copy[first + size : first + size + length + 2]
        below = copy[first + 2 * size : first + 2 * size + length + 2]
        target = planes[first + size + 1 : first + size + 1 + length]
        for x in range(length):
            outer = F(above[x]) + F(above[x + 1]) + F(above[x + 2]) + F(row[x])
            outer += F(row[x + 2]) + F(below[x]) + F(below[x + 1]) + F(below[x + 2])
            value = F(row[x + 1])
            # Of 13 parts, rounded half up. No sum is so near to a half that float32 could err.
            smooth = np.floor((outer + F(5) * value + F(6.5)) * F(1 / 13))
            blend = smooth + factor * (value - smooth)
            target[x] = np.uint8(min(max(blend, F(0)), F(255)))
        for y in range(1, size - 1):
            for edge in (first + y * size, first + (y + 1) * size - 1):
                planes[edge] = copy[edge]
