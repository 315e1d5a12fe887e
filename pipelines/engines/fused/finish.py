"""From planar uint8 views to what is handed out: interleaved bytes, or `device_stage`'s floats.

A view that is not mixed is written once, as bytes or normalised, and then its erased boxes. One
that is mixed waits for its partner as bytes, in the last quarter of the memory that its floats will
have. The thread that finishes the second of the two makes both, line by line: either's bytes become
floats in the first cache level, are erased and mixed there, and only then written. So mixing costs
little more than writing, and a batch is never swept over once more.

Every value is `device_stage`'s to the bit: one fused multiply-add where the CPU has one, erased in
float32, mixed by two products and their sum, each rounded.
"""

import numba
import numpy as np

from headrace.pipelines.engines.fused.simd import multiply_add

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLY_0 = np.uint64(0xD2511F53)
_MULTIPLY_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_SIGN = np.uint32(0x8000)
_MAGNITUDE = np.uint32(0x7FFF)

LINES_OF_A_PAIR = 8  # that are mixed at a time, four of each: what the first cache level holds


@numba.njit(nogil=True)
def write_bytes(red, green, blue, target):
    """Three planes as interleaved pixels, uint8."""
    for i in range(red.size):
        target[3 * i] = red[i]
        target[3 * i + 1] = green[i]
        target[3 * i + 2] = blue[i]


@numba.njit(nogil=True)
def write_floats(red, green, blue, scale_bias, target):
    """Three planes as interleaved pixels, normalised, float32."""
    for i in range(red.size):
        target[3 * i] = _normalized(red[i], scale_bias, 0)
        target[3 * i + 1] = _normalized(green[i], scale_bias, 1)
        target[3 * i + 2] = _normalized(blue[i], scale_bias, 2)


@numba.njit(nogil=True)
def normalize_line(pixels, scale_bias, target):
    """Interleaved pixels, normalised."""
    for i in range(pixels.size // 3):
        for channel in range(3):
            target[3 * i + channel] = _normalized(pixels[3 * i + channel], scale_bias, channel)


@numba.njit(nogil=True)
def _normalized(level, scale_bias, channel):
    # torch rounds once, too, where the CPU can, and twice where it cannot.
    return multiply_add(np.float32(level), scale_bias[channel], scale_bias[3 + channel])


@numba.njit(nogil=True)
def _philox(key, first, count, words):
    """words[4 * i + k] = word k of Philox 4x32-10 of `key` and the counter (first + i, 0, 0, 0)."""
    for i in range(count):
        word_0 = np.uint64(first + i)
        word_1 = np.uint64(0)
        word_2 = np.uint64(0)
        word_3 = np.uint64(0)
        key_0 = key & _LOW
        key_1 = key >> _HALF
        for _ in range(10):
            product_0 = _MULTIPLY_0 * word_0
            product_1 = _MULTIPLY_1 * word_2
            word_0 = (product_1 >> _HALF) ^ word_1 ^ key_0
            word_1 = product_1 & _LOW
            word_2 = (product_0 >> _HALF) ^ word_3 ^ key_1
            word_3 = product_0 & _LOW
            key_0 = (key_0 + _WEYL_0) & _LOW
            key_1 = (key_1 + _WEYL_1) & _LOW
        words[4 * i] = word_0
        words[4 * i + 1] = word_1
        words[4 * i + 2] = word_2
        words[4 * i + 3] = word_3


@numba.njit(nogil=True)
def _write_noise(values, first, key, quantiles, words):
    """`noise`'s values from number `first` on. words: uint32 scratch [values.size / 2 + 8]."""
    block = first // 8
    _philox(key, block, (first + values.size + 7) // 8 - block, words)
    skipped = first - 8 * block
    for i in range(values.size):
        word = words[(skipped + i) // 2]
        bits = word >> np.uint32(16 * ((skipped + i) % 2))
        magnitude = quantiles[bits & _MAGNITUDE]
        values[i] = -magnitude if bits & _SIGN else magnitude


@numba.njit(nogil=True)
def erase(values, pixels, first, boxes, colors, noisy, key, quantiles, words):
    """Overwrite what the boxes cover of a view's rows from `first` on, of `pixels` each.

    boxes: int32 [n, 4], colors: float32 [n, 3]; where `noisy`, noise of `key` instead of colours.
    """
    width = 3 * pixels
    end = first + values.size // width
    for place in range(boxes.shape[0]):
        top, left, high, wide = boxes[place]
        for y in range(max(top, first), min(top + high, end)):
            start = (y - first) * width + 3 * left
            erased = values[start : start + 3 * wide]
            if noisy:
                _write_noise(erased, y * width + 3 * left, key, quantiles, words)
            else:
                for x in range(wide):
                    for channel in range(3):
                        erased[3 * x + channel] = colors[place, channel]


@numba.njit(nogil=True)
def _write_mixed(values, other, pixels, first, weight, box, target):
    """Rows of a sample's mixture with its partner, CutMix where `box` has any pixel."""
    top, left, high, wide = box
    if high > 0 and wide > 0:
        for i in range(target.size):
            target[i] = values[i]
        width = 3 * pixels
        for y in range(max(top, first), min(top + high, first + target.size // width)):
            start = (y - first) * width + 3 * left
            cut, pasted = target[start : start + 3 * wide], other[start : start + 3 * wide]
            for i in range(cut.size):
                cut[i] = pasted[i]
        return
    rest = np.float32(1) - weight
    for i in range(target.size):
        target[i] = weight * values[i] + rest * other[i]


@numba.njit(nogil=True)
def waiting_place(start, length):
    """Where in a batch's bytes the view waits that will be `length` floats from `start` on."""
    return 4 * start + 3 * length


@numba.njit(nogil=True)
def mix(program, row, partner, values, pixels, lines, words):
    """Finish two views that wait for each other.

    program: see `kernels`. values, pixels: the batch as float32 and, the same memory, as uint8.
    lines: float32 scratch [LINES_OF_A_PAIR * 3 * the view's width], words: uint32 scratch.
    """
    height, pixels_across = program.shapes[0, 0], program.shapes[0, 1]
    width = 3 * pixels_across
    area = height * width
    pair = (row, partner)
    starts = (program.starts[0] + row * area, program.starts[0] + partner * area)
    rows = LINES_OF_A_PAIR // 2
    for y in range(0, height, rows):
        length = min(rows, height - y) * width
        both = (lines[:length], lines[rows * width : rows * width + length])
        for which, sample in enumerate(pair):
            # The bytes of a row end where its floats do, or later: whatever is written now was
            # read before.
            first = waiting_place(starts[which], area) + y * width
            normalize_line(pixels[first : first + length], program.scale_bias, both[which])
            erase(
                both[which],
                pixels_across,
                y,
                program.boxes[sample, 0],
                program.colors[sample, 0],
                program.noisy[0],
                program.keys[sample, 0],
                program.quantiles,
                words,
            )
        for which, sample in enumerate(pair):
            first = starts[which] + y * width
            _write_mixed(
                both[which],
                both[1 - which],
                pixels_across,
                y,
                program.weights[sample],
                program.cuts[sample],
                values[first : first + length],
            )
