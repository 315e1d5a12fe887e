"""Draws which patches of a view are masked, as the declarations in `masks` say.

The loops that try blocks until they fit have a fixed number of attempts, so that every draw knows
its random words beforehand.
"""

import math
from typing import assert_never

import numba
import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.counters import Kind
from headrace.pipelines.masks import BlockMask, Mask, MultiBlockMask, RandomMask, block_size
from headrace.pipelines.philox import uniforms
from headrace.pipelines.source import Source

_BLOCK_ATTEMPTS = 128  # blocks that one sample may try; BEiT's 75 of 196 patches take 11, seldom 30
_FAILURES_IN_A_ROW = 10
_CONTEXT_ATTEMPTS = 20  # contexts, before another target may overlap them


def mask(declared: Mask, shape: tuple[int, int], source: Source) -> NDArray[np.bool_]:
    """bool [B, N] or [B, 1 + targets, N] over the patches of a view, as the declaration says."""
    rows, columns = (length // declared.patch_pixels for length in shape)
    match declared:
        case RandomMask():
            return _random(declared, rows * columns, source)
        case BlockMask():
            return _blocks(declared, rows, source)  # View has these two on squares alone
        case MultiBlockMask():
            return _multi_block(declared, rows, source)
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
    blocks = 1 + _BLOCK_ATTEMPTS
    drawn = source.words(Kind.MASK, 0, blocks).reshape(-1, blocks, 4)
    gate, level = uniforms(drawn[:, 0, :2]).T
    ratio = declared.ratio[0] + level * (declared.ratio[1] - declared.ratio[0])
    patches = side * side
    wanted = np.where(gate < declared.probability, (ratio * patches).astype(np.int64), 0)
    removed = np.zeros((len(drawn), patches), np.bool_)
    _remove_blocks(
        drawn,
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
        for block in range(1, random_words.shape[1]):
            if left_over <= 0 or failures == _FAILURES_IN_A_ROW:
                break
            draws = random_words[row, block]
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
    uniform = uniforms(source.group_words(Kind.MASK, 0, blocks=1)[:, :2]).tolist()
    target = [
        block_size(declared.target_scale, declared.target_aspect, side, of_target)
        for of_target, _ in uniform
    ]
    context = [
        block_size(declared.context_scale, (1.0, 1.0), side, of_context)
        for _, of_context in uniform
    ]
    # With every target kept out of the context, with one fewer, ..., and once with none.
    blocks = declared.targets + declared.targets * _CONTEXT_ATTEMPTS + 1
    places = source.words(Kind.MASK, 0, blocks=blocks).reshape(-1, blocks, 4)
    out = np.zeros((len(places), 1 + declared.targets, side, side), np.bool_)
    _place_blocks(
        places,
        np.array(target, np.int64).reshape(-1, 2)[source.group_rows],
        np.array(context, np.int64).reshape(-1, 2)[source.group_rows],
        declared.min_keep,
        out,
    )
    out = out.reshape(*out.shape[:2], side * side)
    # Row 0 holds the context so far. Its k-th patch is kept in all samples of a group, or in none.
    rank = out[:, 0].cumsum(axis=1)
    shortest = np.full(len(source.own_groups), side * side)
    np.minimum.at(shortest, source.group_rows, rank[:, -1])
    out[:, 0] = ~(out[:, 0] & (rank <= shortest[source.group_rows, None]))
    return out


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
            top = (np.int64(places[row, index, 0]) * (side - height)) >> 32
            left = (np.int64(places[row, index, 1]) * (side - width)) >> 32
            out[row, 1 + index, top : top + height, left : left + width] = True
        height, width = context[row]
        kept = out[row, 0]
        for attempt in range(places.shape[1] - targets):
            draws = places[row, targets + attempt]
            top = (np.int64(draws[0]) * (side - height)) >> 32
            left = (np.int64(draws[1]) * (side - width)) >> 32
            outside = targets - attempt // _CONTEXT_ATTEMPTS
            kept[:] = False
            kept[top : top + height, left : left + width] = True
            for index in range(outside):
                kept &= ~out[row, 1 + index]
            if kept.sum() > min_keep:
                break
