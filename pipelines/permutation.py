"""Permutations of a range that are computed element by element: a Feistel network.

The network permutes the next power of two and is walked until it lands inside the range (Black and
Rogaway 2002), so that any element costs the same few nanoseconds and nothing is stored.

Keys come from Philox in scope ORDER. Four rounds are a strong pseudorandom permutation (Luby and
Rackoff 1988) while few values are seen; an epoch shows all, so there are ten, as in NIST's FF1.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.counters import Kind, Scope, counters, owners
from headrace.pipelines.philox import words

_ROUNDS = 10
_ROUNDS_PER_BLOCK = 2  # a round takes a 64-bit key, a block of Philox gives two
_LEAST_BITS = 8  # narrower networks favour some permutations


@numba.njit(cache=True, nogil=True)
def _permuted(
    positions: NDArray[np.int64], size: int, keys: NDArray[np.uint64], out: NDArray[np.int64]
) -> None:
    bits = _LEAST_BITS
    while size > 1 << bits:
        bits += 1
    low_bits = np.uint64(bits // 2)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    limit = np.uint64(size)
    for row in range(positions.shape[0]):
        value = np.uint64(positions[row])
        while True:
            high = value >> low_bits
            low = value & low_mask
            for turn in range(keys.shape[0]):
                # The two halves take turns instead of changing places: they differ in width where
                # the number of bits is odd. The mixer is SplitMix64's (Steele et al. 2014).
                mixed = (low if turn % 2 == 0 else high) ^ keys[turn]
                mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                mixed = mixed ^ (mixed >> np.uint64(31))
                if turn % 2 == 0:
                    high ^= mixed & high_mask
                else:
                    low ^= mixed & low_mask
            value = (high << low_bits) | low
            if value < limit:
                break
        out[row] = value


def permute(
    positions: NDArray[np.int64], size: int, *, seed: int, kind: Kind, epoch: int, index: int = 0
) -> NDArray[np.int64]:
    """Where the permutation of [0, size) that belongs to (seed, kind, epoch, index) takes them.

    positions: int64 [n] in [0, size). Returns int64 [n].
    """
    whose = owners(Scope.ORDER, np.array([index]), epoch=epoch)
    chosen = counters(whose, kind, blocks=_ROUNDS // _ROUNDS_PER_BLOCK)
    keys = words(seed, chosen).astype(np.uint64).reshape(_ROUNDS, 2)
    keys = keys[:, 0] | (keys[:, 1] << np.uint64(32))
    out = np.empty(len(positions), np.int64)
    # A copy, because read-only memory would be another type to numba.
    _permuted(np.array(positions, np.int64, order="C"), size, keys, out)
    return out
