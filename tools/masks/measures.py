"""What stands out of a picture, by five classical measures without a parameter to learn.

Each takes a picture as Lab float32 [H, W, 3] and gives float32 [H, W], larger where more salient.
They err in different ways (at edges, in large objects, with textures, with objects that touch the
border), and so their vote is worth more than any of them.
"""

from collections.abc import Callable

import numba
import numpy as np
from numpy.typing import NDArray

from headrace.training.blocks.color import SRGB_TO_XYZ, WHITE

Map = NDArray[np.float32]

_SPECTRUM_PIXELS = 64  # the width at which spectral residuals are taken, and its blur in these
_SPECTRUM_SIGMA = 2.5
_LEVELS = 8  # per channel in which colours are counted
_COVERED = 0.95  # of the pixels, by the colours that are kept
_BORDER_SHARE = 0.1
_PASSES = 3


def lab(rgb: NDArray[np.uint8]) -> Map:
    """uint8 sRGB [H, W, 3] as CIE L*a*b* (D65) float32.

    As `blocks.color.rgb_to_lab`, in numpy: a pool of threads takes a picture each, and torch would
    divide each of them among threads of its own once more.
    """
    encoded = rgb.astype(np.float32) / 255
    linear = np.where(encoded > 0.04045, ((encoded + 0.055) / 1.055) ** 2.4, encoded / 12.92)
    to_share_of_white = np.array(SRGB_TO_XYZ, np.float32) / np.array(WHITE, np.float32)[:, None]
    share = linear @ to_share_of_white.T
    root = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=-1).astype(np.float32)


def spectral_residual(picture: Map) -> Map:
    """What is unexpected in the spectrum: Hou & Zhang 2007, "Saliency Detection: A Spectral
    Residual Approach". Of the lightness, at about 64 pixels, as in the authors' code."""
    height, width = picture.shape[:2]
    factor = max(1, round(width / _SPECTRUM_PIXELS))
    small = _shrunk(picture[..., 0], factor)
    spectrum = np.fft.fft2(small)
    amplitude = np.log(np.abs(spectrum) + 1e-6)
    around = sum(
        np.roll(amplitude, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)
    ) / np.float32(9)
    residual = np.exp(amplitude - around + 1j * np.angle(spectrum))
    saliency = (np.abs(np.fft.ifft2(residual)) ** 2)[: small.shape[0], : small.shape[1]]
    blurred = gaussian(saliency.astype(np.float32), _SPECTRUM_SIGMA * small.shape[1] / 64)
    return _enlarged(blurred, factor, height, width)


def frequency_tuned(picture: Map) -> Map:
    """Distance of the slightly blurred colour from the mean one: Achanta et al. 2009,
    "Frequency-tuned Salient Region Detection"."""
    taps = np.array([1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16], np.float32)
    blurred = np.stack([_filtered(picture[..., c], taps) for c in range(3)], axis=-1)
    return np.linalg.norm(blurred - picture.mean(axis=(0, 1)), axis=-1)


def histogram_contrast(picture: Map) -> Map:
    """How far a colour is from all others of the picture: Cheng et al. 2011, "Global Contrast
    based Salient Region Detection" (HC). Colours are counted in 8 levels of each of L, a and b over
    the range that the picture has; the paper has 12 of RGB."""
    pixels = picture.reshape(-1, 3)
    low, high = pixels.min(axis=0), pixels.max(axis=0)
    steps = np.maximum((high - low) / _LEVELS, 1e-3)
    cells = np.minimum((pixels - low) / steps, _LEVELS - 1).astype(np.int64)
    codes = (cells[:, 0] * _LEVELS + cells[:, 1]) * _LEVELS + cells[:, 2]
    _, where, counts = np.unique(codes, return_inverse=True, return_counts=True)
    sums = [np.bincount(where, pixels[:, channel]) for channel in range(3)]
    colours = np.stack(sums, axis=-1) / counts[:, None]

    by_count = np.argsort(-counts, kind="stable")
    enough = int(np.searchsorted(np.cumsum(counts[by_count]), _COVERED * len(pixels))) + 1
    kept = by_count[:enough]
    distances = np.linalg.norm(colours[:, None] - colours[kept][None], axis=-1)
    nearest = distances.argmin(axis=1)
    shares = np.bincount(nearest, counts, enough) / len(pixels)
    among = distances[kept]
    contrast = among @ shares

    # A colour's value is smoothed over those that are like it: the paper's eq. 5.
    alike = max(2, enough // 4)
    if enough > 2:
        closest = np.argsort(among, axis=1, kind="stable")[:, :alike]
        near = np.take_along_axis(among, closest, axis=1)
        total = near.sum(axis=1, keepdims=True)
        weights = total - near
        smooth = (weights * contrast[closest]).sum(axis=1)
        contrast = np.where(total[:, 0] > 0, smooth / np.maximum(weights.sum(axis=1), 1e-9), 0)
    return contrast[nearest][where].reshape(picture.shape[:2]).astype(np.float32)


def minimum_barrier(picture: Map) -> Map:
    """The least range of values on a path to the border: Zhang et al. 2015, "Minimum Barrier
    Salient Object Detection at 80 FPS" (algorithm 1), summed over the channels."""
    total = np.zeros(picture.shape[:2], np.float32)
    for channel in range(3):
        total += _barriers(np.ascontiguousarray(picture[..., channel]), _PASSES)
    return total


@numba.njit(cache=True, nogil=True)
def _barriers(values: Map, passes: int) -> Map:
    height, width = values.shape
    distance = np.full((height, width), np.float32(np.inf))
    highest, lowest = values.copy(), values.copy()
    for y in range(height):
        for x in range(width):
            if y == 0 or x == 0 or y == height - 1 or x == width - 1:
                distance[y, x] = 0
    for number in range(passes):
        back = number % 2 == 1
        step = -1 if back else 1
        for row in range(1, height - 1):
            y = height - 1 - row if back else row
            for column in range(1, width - 1):
                x = width - 1 - column if back else column
                for side in range(2):
                    from_y = y - step if side == 0 else y
                    from_x = x if side == 0 else x - step
                    top = max(highest[from_y, from_x], values[y, x])
                    bottom = min(lowest[from_y, from_x], values[y, x])
                    if top - bottom < distance[y, x]:
                        distance[y, x] = top - bottom
                        highest[y, x], lowest[y, x] = top, bottom
    return distance


def border_contrast(picture: Map) -> Map:
    """How unlike the colours of the borders: the backgroundness cue of Zhang et al. 2015 (eq. 9).

    Mahalanobis distances from each of the four sides, of which the largest is left out: an object
    may cover a side."""
    height, width = picture.shape[:2]
    rows = max(1, round(_BORDER_SHARE * height))
    columns = max(1, round(_BORDER_SHARE * width))
    sides = (picture[:rows], picture[-rows:], picture[:, :columns], picture[:, -columns:])
    distances = []
    for side in sides:
        pixels = side.reshape(-1, 3).astype(np.float64)
        covariance = np.cov(pixels.T) + np.eye(3)  # one level of noise: a side may be of one colour
        offset = picture - pixels.mean(axis=0)
        squares = np.einsum("hwc,cd,hwd->hw", offset, np.linalg.inv(covariance), offset)
        distance = np.sqrt(np.maximum(squares, 0))
        distances.append(distance / max(float(distance.max()), 1e-9))
    return (np.sum(distances, axis=0) - np.max(distances, axis=0)).astype(np.float32)


MEASURES: dict[str, Callable[[Map], Map]] = {
    "spectral residual": spectral_residual,
    "frequency-tuned": frequency_tuned,
    "histogram contrast": histogram_contrast,
    "minimum barrier": minimum_barrier,
    "border contrast": border_contrast,
}


def measured(rgb: NDArray[np.uint8]) -> dict[str, Map]:
    """Every measure of uint8 [H, W, 3] by name, scaled to 0..1 between the 1st and the 99th
    percentile; 0 everywhere where a measure tells nothing apart."""
    picture = lab(rgb)
    return {name: _scaled(measure(picture)) for name, measure in MEASURES.items()}


def consensus(maps: dict[str, Map]) -> Map:
    """The share of measures that call a pixel salient, each above its own threshold (Otsu 1979)."""
    votes = [map_ > otsu(map_) if map_.max() > 0 else map_ > 0 for map_ in maps.values()]
    return np.asarray(np.mean(votes, axis=0), np.float32)


def otsu(values: Map) -> float:
    """The threshold that parts values in 0..1 into two classes of the least variance within."""
    counts, edges = np.histogram(values, 64, (0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = sums / below - (sums[-1] - sums) / above
    between = np.where((below > 0) & (above > 0), below * above * gap**2, -1.0)
    return float(edges[1 + int(between.argmax())])


def gaussian(values: Map, sigma: float) -> Map:
    """Blurred along both axes, the border repeated."""
    radius = max(1, int(np.ceil(3 * sigma)))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return _filtered(values, (taps / taps.sum()).astype(np.float32))


def _filtered(values: Map, taps: Map) -> Map:
    radius = len(taps) // 2
    for axis in (0, 1):
        length = values.shape[axis]
        places = np.clip(np.arange(-radius, length + radius), 0, length - 1)
        padded = values.take(places, axis=axis)
        values = sum(
            (weight * padded.take(np.arange(tap, tap + length), axis=axis))
            for tap, weight in enumerate(taps)
        )  # pyright: ignore[reportAssignmentType]
    return values


def _scaled(values: Map) -> Map:
    low, high = np.percentile(values, (1, 99))
    if not high - low > 1e-4 * max(abs(high), 1e-6):
        return np.zeros_like(values)
    return np.clip((values - low) / (high - low), 0, 1).astype(np.float32)


def _shrunk(values: Map, factor: int) -> Map:
    """The mean of blocks; what is left over at the end is dropped."""
    height, width = (side // factor for side in values.shape)
    blocks = values[: height * factor, : width * factor].reshape(height, factor, width, factor)
    return blocks.mean(axis=(1, 3))


def _enlarged(values: Map, factor: int, height: int, width: int) -> Map:
    large = values.repeat(factor, 0).repeat(factor, 1)
    missing = ((0, height - large.shape[0]), (0, width - large.shape[1]))
    return np.pad(large, missing, mode="edge")
