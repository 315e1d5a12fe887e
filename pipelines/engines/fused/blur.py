"""torchvision's Gaussian blur on planar views: a true Gaussian, separable, border reflected.

Both passes are the weighted sum of `simd`, in float32, rounded to 8 bits once at the end as
in torchvision. Taps of the first are a pixel apart, in a row that carries its reflected border
along; taps of the second are a row apart. Columns come first (torchvision begins with rows, and
float32 hardly tells), because then each byte becomes a float once and not once per tap.
"""

import math

import numba
import numpy as np

from headrace.pipelines.engines.fused.simd import SLACK, weigh_row


@numba.njit(nogil=True)
def _reflected(index, length):
    """-1 is 1, `length` is length - 2: the border pixel is not repeated."""
    index = abs(index)
    return index if index < length else 2 * (length - 1) - index


@numba.njit(nogil=True)
def _fill_line(planes, first, size, radius, line, place):
    """A row as floats, with `radius` reflected pixels before and behind it."""
    row = planes[first : first + size]
    inner = line[place + radius : place + radius + size]
    for x in range(size):
        inner[x] = np.float32(row[x])
    for k in range(1, radius + 1):
        line[place + radius - k] = line[place + radius + k]
        line[place + radius + size - 1 + k] = line[place + radius + size - 1 - k]


@numba.njit(nogil=True)
def blur(planes, plane, height, width, sigma, radius, weights, line, across):
    """Blur a `height` x `width` view of three planes, `plane` bytes apart, in place.

    radius: taps to each side, less than either. Scratch of float32: weights [4 * radius + 2],
    line [2 * (width + 2 * radius + SLACK)], across [height * width + SLACK].
    """
    taps = 2 * radius + 1
    total = 0.0
    for k in range(taps):
        total += math.exp(-0.5 * ((k - radius) / sigma) ** 2)
    for k in range(taps):
        weights[k] = np.float32(math.exp(-0.5 * ((k - radius) / sigma) ** 2) / total)
    stride = width + 2 * radius + SLACK
    for channel in range(3):
        start = channel * plane
        _fill_line(planes, start, width, radius, line, 0)
        for y in range(height):
            # The next row is filled before this one is weighed: reading across bytes that were
            # just written, in other pieces, would wait for them to arrive in the cache.
            if y + 1 < height:
                below = start + (y + 1) * width
                _fill_line(planes, below, width, radius, line, (y + 1) % 2 * stride)
            weigh_row(line, y % 2 * stride, 1, weights, 0, taps, across, y * width, width)
        for y in range(height):
            low, high = max(y - radius, 0), min(y + radius, height - 1)
            at = 0
            if high - low < 2 * radius:
                # At the border: the rows that are there, with the weights of those reflected too.
                at = taps
                for row in range(low, high + 1):
                    weights[at + row - low] = 0
                for k in range(taps):
                    weights[at + _reflected(y - radius + k, height) - low] += weights[k]
            first, rows = low * width, high - low + 1
            weigh_row(across, first, width, weights, at, rows, planes, start + y * width, width)
