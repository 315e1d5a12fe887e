"""Where every random number of a run comes from.

Each word is Philox 4x32-10 of the run's seed (the 64-bit key) and a 128-bit counter, laid out as

    word 0   bits  0-31  index, low 32 bits
    word 1   bits  0-31  epoch
    word 2   bits  0-7   index, high 8 bits
             bits  8-17  occurrence of the sample in the epoch
             bits 18-27  view, its place in Augmentation.flat_views
             bits 28-29  scope
             bits 30-31  zero
    word 3   bits  0-19  block: 4 words each, counted inside one draw
             bits 20-25  ordinal: place among the ops of the same kind in the view
             bits 26-31  kind

Scope SAMPLE is keyed by the sample id (index) and everything above; scope GROUP by the group's
number in the epoch (index), with occurrence 0; scope ORDER belongs to `permutation`. The fields do
not overlap, so two draws of a run never share a counter.
"""

import enum

import numpy as np
from numpy.typing import NDArray

from headrace.shards.errors import UserError

SEED_LIMIT = 1 << 64
ID_LIMIT = 1 << 40
EPOCH_LIMIT = 1 << 32
OCCURRENCE_LIMIT = 1 << 10
_VIEW_LIMIT = 1 << 10
_ORDINAL_LIMIT = 1 << 6
_BLOCK_LIMIT = 1 << 20


class PlanError(UserError):
    """A plan that cannot be drawn, or a file that holds none: says which value and why."""


class Scope(enum.IntEnum):
    """What the index of a counter counts."""

    SAMPLE = 0
    GROUP = 1
    ORDER = 2


class Kind(enum.IntEnum):
    """What a draw is for. Numbers are never given to another kind."""

    CROP = 1
    FLIP = 2
    JITTER = 3
    GRAYSCALE = 4
    BLUR = 5
    SOLARIZE = 6
    RAND_AUGMENT = 7
    ONE_OF = 8
    RANDOM_CROP = 9
    MASK = 32
    ERASE = 33
    MIX = 34
    DECLARED = 35  # what a method asks for by a Draw
    FULL = 48  # of Scope.ORDER: the permutation of an epoch's samples,
    SHARDS = 49  # of its shards,
    WINDOW = 50  # of the samples in one of its windows,
    HOLDOUT = 51  # and the one that holds samples out


def owners(
    scope: Scope,
    index: NDArray[np.int64],
    *,
    epoch: int = 0,
    occurrence: NDArray[np.int32] | int = 0,
    view: int = 0,
) -> NDArray[np.uint32]:
    """Words 0 to 2 of the counters of n draws, uint32 [n, 3]: whose they are.

    index: int64 [n] in [0, ID_LIMIT); occurrence: in [0, OCCURRENCE_LIMIT); epoch: in
    [0, EPOCH_LIMIT). Their owners check those once per batch. Raises PlanError for more views than
    the layout has room for.
    """
    _require_room("view", view, _VIEW_LIMIT)
    out = np.empty((len(index), 3), np.uint32)
    out[:, 0] = index & 0xFFFFFFFF
    out[:, 1] = epoch
    out[:, 2] = (
        (index >> 32) | (np.asarray(occurrence, np.int64) << 8) | (view << 18) | (scope << 28)
    )
    return out


def counters(
    whose: NDArray[np.uint32], kind: Kind, *, ordinal: int = 0, blocks: int = 1
) -> NDArray[np.uint32]:
    """Counters uint32 [n * blocks, 4] of n draws of `blocks` blocks each, one draw after another.

    whose: uint32 [n, 3] by `owners`. Raises PlanError for more ops of a kind or blocks than the
    layout has room for.
    """
    _require_room("place among the ops of its kind", ordinal, _ORDINAL_LIMIT)
    _require_room("last block of random words", blocks - 1, _BLOCK_LIMIT)
    out = np.empty((len(whose), blocks, 4), np.uint32)
    out[:, :, :3] = whose[:, None]
    first = (ordinal << 20) | (kind << 26)
    out[:, :, 3] = np.arange(first, first + blocks)
    return out.reshape(-1, 4)


def _require_room(name: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise PlanError(f"a draw's {name} is {value}; there is room for {limit}")
