"""Draws which patches of a view are masked, as the declarations in `masks` say.

The loops that try blocks until they fit have a fixed number of attempts, so that every draw knows
its random words beforehand.
"""

import math
from typing import assert_never

import numba
import numpy as np
from numpy.typing import NDArray

from pipelines.counters import Kind
from pipelines.masks import BlockMask, Mask, MultiBlockMask, RandomMask
from pipelines.philox import uniforms
from pipelines.source import Source

_BLOCK_ATTEMPTS = 128  # blocks that one sample may try; BEiT's 75 of 196 patches take about 20
_FAILURES_IN_A_ROW = 10
_CONTEXT_ATTEMPTS = 20  # before another target may overlap the context


def mask(declared: Mask, size: int, source: Source) -> NDArray[np.bool_]:
    """bool [B, N] or [B, 1 + targets, N] over the patches of a view, as the declaration says."""
    side = size // declared.patch_pixels
    match declared:
        case RandomMask():
            return _random(declared, side * side, source)
        case BlockMask():
            return _blocks(declared, side, source)
        case MultiBlockMask():
            return _multi_block(declared, side, source)
        case _:
            assert_never(declared)


def _random(declared: RandomMask, patches: int, source: Source) -> NDArray[np.bool_]:
    """All but the int(N * (1 - ratio)) patches of the smallest noise."""
    kept = int(patches * (1 - declared.ratio))
    noise = source.words(Kind.MASK, 0, blocks=-(-patches // 4))[:, :patches]
    # The index in the low half breaks ties, so that exactly `kept` keys lie below the kept-th.
    keys = (noise.astype(np.uint64) << np.uint64(32)) | np.arange(patches, dtype=np.uint64)
    if kept == 0:
        return np.ones(keys.shape, np.bool_)
    return keys > np.partition(keys, kept - 1, axis=1)[:, kept - 1, None]


def _blocks(declared: BlockMask, side: int, source: Source) -> NDArray[np.bool_]:
    drawn = source.words(Kind.MASK, 0, blocks=1 + _BLOCK_ATTEMPTS)
    gate, level = uniforms(drawn[:, :2]).T
    ratio = declared.ratio[0] + level * (declared.ratio[1] - declared.ratio[0])
    wanted = np.where(gate < declared.probability, (ratio * side * side).astype(np.int64), 0)
    removed = np.zeros((len(drawn), side * side), np.bool_)
    _remove_blocks(
        drawn[:, 4:].reshape(-1, _BLOCK_ATTEMPTS, 4),
        wanted,
        side,
        float(declared.min_patches),
        math.log(declared.aspect[0]),
        math.log(declared.aspect[1]),
        removed,
    )
    return removed


# Lazily compiled and cached, as in `philox`. These take words instead of calling Philox because
# numba's cache does not notice a change in another file.
@numba.njit(cache=True, nogil=True)
def _remove_blocks(
    random_words: NDArray[np.uint32],
    wanted: NDArray[np.int64],
    side: int,
    min_patches: float,
    log_low: float,
    log_high: float,
    removed: NDArray[np.bool_],
) -> None:
    unit = 2.0**-32
    for row in range(random_words.shape[0]):
        left_over, failures = wanted[row], 0
        for attempt in range(random_words.shape[1]):
            if left_over <= 0 or failures == _FAILURES_IN_A_ROW:
                break
            draws = random_words[row, attempt]
            area = min_patches + draws[0] * unit * (left_over - min_patches)
            aspect = math.exp(log_low + draws[1] * unit * (log_high - log_low))
            height = np.int64(np.rint(math.sqrt(area * aspect)))
            width = np.int64(np.rint(math.sqrt(area / aspect)))
            failures += 1
            if height >= side or width >= side:
                continue
            top = (np.int64(draws[2]) * (side - height + 1)) >> 32
            left = (np.int64(draws[3]) * (side - width + 1)) >> 32
            new = 0
            for y in range(top, top + height):
                for x in range(left, left + width):
                    new += not removed[row, y * side + x]
            if 0 < new <= left_over:
                for y in range(top, top + height):
                    removed[row, y * side + left : y * side + left + width] = True
                left_over -= new
                failures = 0


def _multi_block(declared: MultiBlockMask, side: int, source: Source) -> NDArray[np.bool_]:
    tries = declared.targets + 1  # with every target kept out of the context, with one fewer, ...
    sizes = uniforms(source.words(Kind.MASK, 0, blocks=1, scope="group")[:, :2])
    target = _block_sizes(declared.target_scale, declared.target_aspect, side, sizes[:, 0])
    context = _block_sizes(declared.context_scale, (1.0, 1.0), side, sizes[:, 1])
    blocks = declared.targets + tries * _CONTEXT_ATTEMPTS
    places = source.words(Kind.MASK, 0, blocks=blocks).reshape(-1, blocks, 4)
    out = np.zeros((len(places), 1 + declared.targets, side, side), np.bool_)
    _place_blocks(places, target, context, declared.min_keep, out)
    out = out.reshape(*out.shape[:2], side * side)
    # Row 0 holds the context so far. Its k-th patch is kept in all samples of a group, or in none.
    rank = out[:, 0].cumsum(axis=1)
    shortest = np.full(len(source.own_groups), side * side)
    np.minimum.at(shortest, source.group_rows, rank[:, -1])
    out[:, 0] = ~(out[:, 0] & (rank <= shortest[source.group_rows, None]))
    return out


def _block_sizes(
    scale: tuple[float, float],
    aspect: tuple[float, float],
    side: int,
    uniform: NDArray[np.float64],
) -> NDArray[np.int64]:
    """int64 [B, 2], height and width. One number decides area and aspect, as in the code."""
    area = ((scale[0] + uniform * (scale[1] - scale[0])) * side * side).astype(np.int64)
    ratio = aspect[0] + uniform * (aspect[1] - aspect[0])
    sizes = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=1)
    return np.clip(np.rint(sizes), 1, max(side - 1, 1)).astype(np.int64)


@numba.njit(cache=True, nogil=True)
def _place_blocks(
    places: NDArray[np.uint32],
    target: NDArray[np.int64],
    context: NDArray[np.int64],
    min_keep: int,
    out: NDArray[np.bool_],
) -> None:
    targets, side = out.shape[1] - 1, out.shape[2]
    for row in range(places.shape[0]):
        height, width = target[row]
        for index in range(targets):
            # The code's upper limit is exclusive: no block reaches the last row or column.
            top = (np.int64(places[row, index, 0]) * max(side - height, 1)) >> 32
            left = (np.int64(places[row, index, 1]) * max(side - width, 1)) >> 32
            out[row, 1 + index, top : top + height, left : left + width] = True
        height, width = context[row]
        kept = out[row, 0]
        for attempt in range(places.shape[1] - targets):
            draws = places[row, targets + attempt]
            top = (np.int64(draws[0]) * max(side - height, 1)) >> 32
            left = (np.int64(draws[1]) * max(side - width, 1)) >> 32
            outside = max(targets - attempt // _CONTEXT_ATTEMPTS, 0)
            kept[:] = False
            kept[top : top + height, left : left + width] = True
            for index in range(outside):
                kept &= ~out[row, 1 + index]
            if kept.sum() > min_keep:
                break
