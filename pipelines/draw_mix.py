"""Draws what happens to finished pictures: erasing, mixing, and what a method asks for itself."""

import math
from typing import Any, assert_never

import numba
import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.counters import Kind
from headrace.pipelines.noise import normals
from headrace.pipelines.philox import uniforms
from headrace.pipelines.recipe import Draw, Integers, Mix, Permutation, RandomErasing, Uniform
from headrace.pipelines.source import Source, below, between

_ERASE_ATTEMPTS = 10
_BLOCKS_PER_BOX = 1 + _ERASE_ATTEMPTS  # a colour, then attempts at a place
_GAMMA_ATTEMPTS = 8  # each is accepted with a probability above 0.95
_MIX_BLOCKS = 2 + _GAMMA_ATTEMPTS

Columns = dict[str, NDArray[Any]]


def erase(declared: RandomErasing, shape: tuple[int, int], source: Source) -> Columns:
    """The columns of RandomErasing, for a view of `shape`, its height and width in pixels."""
    least, most = declared.count
    blocks = 1 + most * _BLOCKS_PER_BOX
    drawn = source.words(Kind.ERASE, 0, blocks).reshape(-1, blocks, 4)
    head = drawn[:, 0]
    apply = uniforms(head[:, 0]) < declared.probability
    counts = np.where(apply, least + below(head[:, 1], most - least + 1), 0)
    box = np.zeros((len(drawn), most, 4), np.int32)
    _erase_boxes(
        drawn,
        counts,
        *shape,
        float(declared.area[0]),
        float(declared.area[1]),
        math.log(declared.ratio[0]),
        math.log(declared.ratio[1]),
        box,
    )
    match declared.fill:
        case "const":
            return {"box": box}
        case "rand":
            return {"box": box, "color": normals(drawn[:, 1::_BLOCKS_PER_BOX, :3] & 0xFFFF)}
        case "pixel":
            key = head[:, 2].astype(np.uint64) | (head[:, 3].astype(np.uint64) << np.uint64(32))
            return {"box": box, "key": key}
        case _:
            assert_never(declared.fill)


@numba.njit(cache=True, nogil=True)
def _erase_boxes(
    random_words: NDArray[np.uint32],
    counts: NDArray[np.int64],
    view_height: int,
    view_width: int,
    area_low: float,
    area_high: float,
    log_low: float,
    log_high: float,
    out: NDArray[np.int32],
) -> None:
    unit = 2.0**-32
    for row in range(random_words.shape[0]):
        for index in range(counts[row]):
            first = 1 + index * _BLOCKS_PER_BOX
            for block in range(first + 1, first + _BLOCKS_PER_BOX):
                draws = random_words[row, block]
                area = area_low + draws[0] * unit * (area_high - area_low)
                area *= view_height * view_width / counts[row]
                ratio = math.exp(log_low + draws[1] * unit * (log_high - log_low))
                height = np.int64(np.rint(math.sqrt(area * ratio)))
                width = np.int64(np.rint(math.sqrt(area / ratio)))
                if 0 < height < view_height and 0 < width < view_width:
                    out[row, index, 0] = (np.int64(draws[2]) * (view_height - height + 1)) >> 32
                    out[row, index, 1] = (np.int64(draws[3]) * (view_width - width + 1)) >> 32
                    out[row, index, 2] = height
                    out[row, index, 3] = width
                    break


def mix(declared: Mix, shape: tuple[int, int], source: Source) -> Columns:
    """The columns of Mix, for a view of `shape`, its height and width in pixels; the batch holds
    whole groups."""
    samples, group = len(source.ids), source.group
    place = np.arange(samples) - np.searchsorted(source.groups, source.groups)
    partner = group - 1 - 2 * place
    match declared.scope:
        case "group":
            drawn = source.words(Kind.MIX, 0, blocks=_MIX_BLOCKS, scope="group")
        case "pair":
            pairs = source.group_words(Kind.MIX, 0, blocks=group // 2 * _MIX_BLOCKS)
            pairs = pairs.reshape(-1, group // 2, 4 * _MIX_BLOCKS)
            drawn = pairs[source.group_rows, np.minimum(place, group - 1 - place)]
        case "sample":
            drawn = source.words(Kind.MIX, 0, blocks=_MIX_BLOCKS)
        case _:
            assert_never(declared.scope)
    gate, switch = uniforms(drawn[:, :2]).T
    if declared.mixup_alpha > 0 and declared.cutmix_alpha > 0:
        cut = switch < declared.switch_probability
    else:
        cut = np.full(samples, declared.cutmix_alpha > 0)
    weight = _symmetric_beta(np.where(cut, declared.cutmix_alpha, declared.mixup_alpha), drawn)
    weight = np.where(gate < declared.probability, weight, 1.0)
    box = np.where(cut[:, None], _cut_boxes(weight, drawn[:, 2:4], shape), np.int32(0))
    outside = 1.0 - box[:, 2].astype(np.float64) * box[:, 3] / (shape[0] * shape[1])
    return {
        "partner": partner.astype(np.int32),
        "weight": np.where(cut, outside, weight).astype(np.float32),
        "box": box,
    }


def _symmetric_beta(alpha: NDArray[np.float64], drawn: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Beta(alpha, alpha), as one of two equally distributed gammas' share of their sum."""
    boosts = uniforms(drawn[:, 4:6])
    attempts = drawn[:, 8:].reshape(len(drawn), _GAMMA_ATTEMPTS, 2, 2)
    first = _log_gamma(alpha, boosts[:, 0], attempts[:, :, 0])
    second = _log_gamma(alpha, boosts[:, 1], attempts[:, :, 1])
    return np.exp(first - np.logaddexp(first, second))


def _log_gamma(
    alpha: NDArray[np.float64], boost: NDArray[np.float64], attempts: NDArray[np.uint32]
) -> NDArray[np.float64]:
    """The logarithm of a Gamma(alpha) variable, which itself may be too small for a double.

    After Marsaglia and Tsang (2000): Gamma(alpha + 1) times U^(1 / alpha).
    attempts: uint32 [n, attempts, 2]. The last one is taken should all be refused.
    """
    d = alpha[:, None] + 1 - 1 / 3
    x = normals(attempts[:, :, 0] & 0xFFFF).astype(np.float64)
    log_v = 3 * np.log(np.maximum(1 + x / np.sqrt(9 * d), 1e-9))
    uniform = 1.0 - uniforms(attempts[:, :, 1])  # in (0, 1]
    accepted = np.log(uniform) < 0.5 * x * x + d - d * np.exp(log_v) + d * log_v
    accepted[:, -1] = True
    chosen = accepted.argmax(axis=1)
    return np.log(d[:, 0]) + log_v[np.arange(len(log_v)), chosen] + np.log(1.0 - boost) / alpha


def _cut_boxes(
    weight: NDArray[np.float64], centers: NDArray[np.uint32], shape: tuple[int, int]
) -> NDArray[np.int32]:
    """int32 [B, 4]: timm's `rand_bbox`, a box of the view's aspect ratio and (1 - weight) of its
    area, clipped.

    All 0 where less than a pixel is left of it.
    """
    whole = np.array(shape, np.int64)
    sides = (whole * np.sqrt(1.0 - weight)[:, None]).astype(np.int64)
    center = below(centers, whole)
    start = np.clip(center - sides // 2, 0, whole)
    end = np.clip(center + (sides + 1) // 2, 0, whole)
    box = np.concatenate([start, end - start], axis=1)
    return np.where(sides.min(axis=1, keepdims=True) > 0, box, 0).astype(np.int32)


def declared_draw(declared: Draw, ordinal: int, source: Source) -> NDArray[Any]:
    """The values of the method's `ordinal`-th Draw: [B, *shape] or, permuted, one axis more."""
    distribution = declared.distribution
    shape = declared.shape
    if isinstance(distribution, Permutation):
        shape = (*shape, distribution.length)
    count = math.prod(shape)
    drawn = source.words(Kind.DECLARED, ordinal, blocks=-(-count // 4), scope=declared.scope)
    drawn = drawn[:, :count].reshape(-1, *shape)
    match distribution:
        case Uniform():
            return between(distribution.low, distribution.high, uniforms(drawn))
        case Integers():
            return below(drawn, distribution.limit)
        case Permutation():
            return drawn.argsort(axis=-1, kind="stable")
        case _:
            assert_never(distribution)
