"""Colour ops on one planar view, with Pillow's own arithmetic and rounding, in place.

Each op is one or two passes of plain loops, which LLVM turns into vectors; a view lies in the
first or second cache level, so that a pass costs little more than its arithmetic. Arithmetic beats
a table here: looking up a byte takes three memory operations for each, a vector of floats does
sixteen at once. All of it is exact to the bit, hue included (the comments say where that is
delicate).

A view is three planes, `plane` bytes apart, of `length` bytes each; all arrays are flat uint8.
"""

import numba
import numpy as np

F = np.float32

# Pillow's conversion from RGB to L: (19595 r + 38470 g + 7471 b + 32768) >> 16. Every term and sum
# is a whole number below 2^24, which float32 holds exactly.
_RED, _GREEN, _BLUE, _HALF, _UNIT = F(19595), F(38470), F(7471), F(32768), F(2.0**-16)


@numba.njit(nogil=True)
def _luma(red, green, blue):
    """Of three float32 channels, a whole number."""
    return np.floor((red * _RED + green * _GREEN + blue * _BLUE + _HALF) * _UNIT)


@numba.njit(nogil=True)
def _blended(value, background, factor):
    """Pillow's `ImagingBlend`: in float32, cut towards zero and to 0..255."""
    blend = background + factor * (value - background)
    return np.uint8(min(max(blend, F(0)), F(255)))


@numba.njit(nogil=True)
def blend_constant(values, background, factor):
    """Away from (factor > 1) or towards a constant: brightness has 0, contrast the mean luma."""
    for i in range(values.size):
        values[i] = _blended(F(values[i]), F(background), factor)


@numba.njit(nogil=True)
def mean_luma(red, green, blue):
    """Mean of the rounded lumas, rounded half up: what Pillow's contrast turns around."""
    total = 0
    for i in range(red.size):
        # `_luma` in integers, which a sum has to end in anyway: half the time.
        weighted = np.int32(red[i]) * np.int32(19595) + np.int32(green[i]) * np.int32(38470)
        weighted += np.int32(blue[i]) * np.int32(7471)
        total += np.int32(weighted + 32768) >> np.int32(16)
    return int(total / red.size + 0.5)


@numba.njit(nogil=True)
def blend_luma(red, green, blue, factor):
    """Saturation: every channel away from or towards the pixel's luma."""
    for i in range(red.size):
        r, g, b = F(red[i]), F(green[i]), F(blue[i])
        gray = _luma(r, g, b)
        red[i] = _blended(r, gray, factor)
        green[i] = _blended(g, gray, factor)
        blue[i] = _blended(b, gray, factor)


@numba.njit(nogil=True)
def to_luma(red, green, blue):
    """Grayscale on three channels."""
    for i in range(red.size):
        gray = np.uint8(_luma(F(red[i]), F(green[i]), F(blue[i])))
        red[i] = gray
        green[i] = gray
        blue[i] = gray


@numba.njit(nogil=True)
def solarize(values, threshold):
    """Invert what is at or above the threshold, 0..256."""
    if threshold <= 0:
        for i in range(values.size):
            values[i] = ~values[i]
        return
    kept = np.uint8(threshold - 1)
    for i in range(values.size):
        value = values[i]
        values[i] = value if value <= kept else ~value


@numba.njit(nogil=True)
def _scaled_255(fraction):
    """floor(255 * fraction) for fractions in [0, 1], exactly: the product itself would round."""
    scaled = fraction * F(256)
    whole = np.floor(scaled)
    return whole - F(1) if scaled - whole < fraction else whole


@numba.njit(nogil=True)
def _level(distance, high, middle, bottom):
    """A channel's value, by the distance in sectors between the hue and that channel's own."""
    return high if distance < F(1) else (middle if distance < F(2) else bottom)


@numba.njit(nogil=True, error_model="numpy")
def turn_hue(red, green, blue, shift):
    """Turn the hue by `shift` of 255 steps, through Pillow's HSV of 3 x 8 bits and back.

    Pillow mixes float and double here. Below all is float32, every value is what Pillow's is
    before its next cut to 8 bits, and no picture of all 2^24 colours differs.
    """
    turned = F(shift)
    for i in range(red.size):
        r, g, b = F(red[i]), F(green[i]), F(blue[i])
        high = max(r, max(g, b))
        low = min(r, min(g, b))
        chroma = high - low
        # Which channel is lowest tells two of six sectors; the difference of the others, signed,
        # goes on from the border between the two. Red's border is at 0 and at 6 sectors.
        border = F(1) if b == low else (F(3) if r == low else (F(-1) if r == high else F(5)))
        away = g - r if b == low else (b - g if r == low else r - b)
        turn = (border + away / max(chroma, F(1))) / F(6)
        turn = turn + F(1) if turn < F(0) else turn
        hue = _scaled_255(turn) + turned
        saturation = _scaled_255(chroma / max(high, F(1))) * F(1 / 255)
        hue = hue - F(256) if hue >= F(256) else hue
        sixfold = hue * F(6)
        sector = np.floor((sixfold + F(0.5)) * F(1 / 255))
        part = (sixfold - sector * F(255)) * F(1 / 255)
        sector = sector - F(6) if sector == F(6) else sector
        half = sector * F(0.5)
        ramp = F(1) - part if half == np.floor(half) else part
        bottom = np.floor(high * (F(1) - saturation) + F(0.5))
        middle = np.floor(high * (F(1) - saturation * ramp) + F(0.5))
        red[i] = np.uint8(_level(F(3) - abs(sector - F(2.5)), high, middle, bottom))
        green[i] = np.uint8(_level(abs(sector - F(1.5)), high, middle, bottom))
        blue[i] = np.uint8(_level(abs(sector - F(3.5)), high, middle, bottom))
