"""Which sample stands where: a function of (seed, epoch, position), with random access.

An order is (index set) x (permutation) x (occurrences). No list is shuffled and nothing is walked
through to reach a position, so a resume costs nothing, every rank computes its own part, and 10^10
samples need no more memory than ten.

* Index set: all ids, or an explicit `subset` of them. `holdout` cuts it in two: the last fraction
  of a permutation fixed by the seed, not by the epoch, is part "holdout", the rest is "train".
* Permutation: "full" permutes the whole set. "window" permutes the shards, and samples only inside
  runs of `window_shards` of them, so that remote shards are read one after the other; this mixes
  less. "none" takes the ids in ascending order (evaluation). An epoch may have a `table` instead.
* Occurrences: with R of them, the permutation repeats every sample R times on end, as occurrence
  0 .. R - 1 (Hoffer et al. 2020), and a global batch is the next B of that sequence, sorted by
  occurrence. Copies of a sample are thus at least floor(B / R) positions apart: no group of so many
  holds a picture twice, which Mixup would mix with itself, nor does a share of R ranks or more. An
  epoch has R times the length or, with `keep_length`, shows only the first of the permutation.

DeiT's RASampler (deit `samplers.py`) is occurrences=3, keep_length=True: a step's global batch is
made of the same places of the permutation. Two things differ. It deals the sequence to the ranks
by turns, each rank gets every W-th, where ours gives them contiguous shares of a batch that is the
same for every W. And it cuts the epoch to a multiple of 256 samples first, ours to whole batches.

Memory: O(1) for "full" and "none", O(number of shards) for "window". A subset is kept as it is
(8 bytes per id), and so are the ids of a part of a hold-out under "window" and "none".
"""

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headrace.pipelines.counters import EPOCH_LIMIT, ID_LIMIT, OCCURRENCE_LIMIT, SEED_LIMIT, Kind
from headrace.pipelines.permutation import permute
from headrace.shards.errors import UserError

ORDER_VERSION = 1

Shuffle = Literal["full", "window", "none"]
Part = Literal["train", "holdout"]


class OrderError(UserError):
    """An order that cannot be: says which number is wrong and what it may be."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise OrderError(message)


class _Windows(NamedTuple):
    """One epoch of "window", as offsets into the index set and places in the epoch."""

    epoch: int
    firsts: NDArray[np.int64]  # [S] offset of the first sample of the shard at each place
    starts: NDArray[np.int64]  # [S + 1] place in the epoch at which that shard starts
    windows: NDArray[np.int64]  # [windows + 1] place in the epoch at which each window starts


@dataclass(frozen=True, eq=False)
class Order:
    """The sequence of samples of every epoch.

    samples: number of samples in the store. batch_size: samples in a global batch.
    seed: in [0, 2^64). shard_starts: int64 [S + 1], the id at which each shard starts and, last,
    `samples`; needed by "window" alone, as is window_shards.
    holdout: fraction in [0, 1); floor(fraction * n) ids of the index set's n are held out, at
    least one when it is not 0. The fraction is read as the decimal that it prints as: 0.29 of 100
    is 29. part: which side of the hold-out this order goes through.
    subset: distinct ids, in any order; the hold-out is then a fraction of the subset.
    occurrences: how often an epoch shows each sample, each time differently augmented.
    keep_length: an epoch has as many positions as with one occurrence.
    drop_last: training drops the positions after the last whole batch; evaluation (False) keeps
    them as a shorter last batch, so that it sees every sample exactly once.
    Raises OrderError for anything that cannot be, a batch larger than the epoch among it.
    """

    samples: int
    batch_size: int
    seed: int = 0
    shuffle: Shuffle = "full"
    occurrences: int = 1
    window_shards: int = 0
    shard_starts: ArrayLike | None = None
    holdout: float = 0.0
    part: Part = "train"
    subset: NDArray[np.int64] | None = None
    drop_last: bool = True
    keep_length: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.seed < SEED_LIMIT, f"seed is {self.seed}; it must be in [0, 2^64)")
        _require(
            0 < self.samples <= ID_LIMIT,
            f"samples is {self.samples}; an order needs at least 1 and takes up to 2^40",
        )
        _require(self.batch_size > 0, f"batch_size is {self.batch_size}; it must be positive")
        _require(
            0 < self.occurrences <= OCCURRENCE_LIMIT,
            f"occurrences is {self.occurrences}; it must be in [1, {OCCURRENCE_LIMIT}]",
        )
        _require(
            not self.keep_length or self.occurrences == 1 or self.shuffle != "none",
            "keep_length needs a shuffle: without one, every epoch would show the same samples",
        )
        _require(
            self.shuffle in ("full", "window", "none"),
            f"shuffle is {self.shuffle!r}; it must be 'full', 'window' or 'none'",
        )
        _require(
            self.part in ("train", "holdout"),
            f"part is {self.part!r}; it must be 'train' or 'holdout'",
        )
        _require(0 <= self.holdout < 1, f"holdout is {self.holdout}; it must be in [0, 1)")
        if self.subset is not None:
            object.__setattr__(self, "subset", _sorted_subset(self.subset, self.samples))
        if self.shuffle == "window":
            object.__setattr__(self, "shard_starts", _checked_starts(self))
        _require(
            self._kept > 0,
            "holdout is 0, so that part 'holdout' has no samples"
            if self.part == "holdout"
            else f"holdout {self.holdout} of {self._indexed} samples leaves none for training",
        )
        _require(
            self.steps_per_epoch > 0,
            f"batch_size {self.batch_size} is larger than an epoch of {self._positions} positions",
        )

    @property
    def epoch_length(self) -> int:
        """Positions in an epoch: occurrences counted, dropped ones not."""
        if self.drop_last:
            return self._positions - self._positions % self.batch_size
        return self._positions

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; the last is shorter where nothing is dropped."""
        return -(-self.epoch_length // self.batch_size)

    def global_batch(self, epoch: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """(ids int64 [B], occurrences int32 [B]) of one step, the same for every world size.

        Raises OrderError for a step outside of [0, steps_per_epoch).
        """
        _require(
            0 <= step < self.steps_per_epoch,
            f"step is {step}; an epoch has the steps 0 .. {self.steps_per_epoch - 1}",
        )
        first = step * self.batch_size
        end = min(first + self.batch_size, self.epoch_length)
        return self.at(epoch, np.arange(first, end, dtype=np.int64))

    def at(
        self, epoch: int, positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """(ids int64 [n], occurrences int32 [n]) at any positions int64 [n] of an epoch.

        Raises OrderError for a position outside of [0, epoch_length) or an epoch outside of
        [0, 2^32).
        """
        _require(0 <= epoch < EPOCH_LIMIT, f"epoch is {epoch}; it must be in [0, 2^32)")
        wrong = (positions < 0) | (positions >= self.epoch_length)
        if wrong.any():
            raise OrderError(
                f"position {positions[wrong][0]} is not in an epoch of {self.epoch_length}"
            )
        if self.occurrences == 1:
            return self._ids(epoch, positions), np.zeros(len(positions), np.int32)
        repeated = self._dealt(positions)
        occurrences = (repeated % self.occurrences).astype(np.int32)
        return self._ids(epoch, repeated // self.occurrences), occurrences

    def _dealt(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in the sequence of samples repeated on end: each batch is sorted by occurrence."""
        batches = positions // self.batch_size
        dealt = np.empty(len(positions), np.int64)
        for batch in np.unique(batches).tolist():
            first = batch * self.batch_size
            sequence = np.arange(first, min(first + self.batch_size, self.epoch_length))
            sequence = sequence[np.argsort(sequence % self.occurrences, kind="stable")]
            chosen = batches == batch
            dealt[chosen] = sequence[positions[chosen] - first]
        return dealt

    def holds(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [n]: which of these ids this order goes through."""
        ascending = self._ascending
        if ascending is None:
            return (ids >= 0) & (ids < self.samples)
        places = np.searchsorted(ascending, ids).clip(max=len(ascending) - 1)
        return ascending[places] == ids

    def declaration(self) -> dict[str, Any]:
        """JSON-ready: all that determines the sequence, for the fingerprint.

        Shards are part of it under "window" alone, so that formats with other shards agree.
        """
        windowed = self.shuffle == "window"
        return {
            "version": ORDER_VERSION,
            "samples": self.samples,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "occurrences": self.occurrences,
            "window_shards": self.window_shards if windowed else None,
            "shard_starts": _digest(self.shard_starts) if windowed else None,
            "holdout": self.holdout,
            "part": self.part,
            "subset": None if self.subset is None else _digest(self.subset),
            "drop_last": self.drop_last,
            "keep_length": self.keep_length and self.occurrences > 1,
        }

    @property
    def _indexed(self) -> int:
        """Samples in the index set, before the hold-out."""
        return self.samples if self.subset is None else len(self.subset)

    @property
    def _kept(self) -> int:
        """Samples in the part that this order goes through."""
        held_out = 0
        if self.holdout > 0:
            # As the decimal that was written: the double nearest to 0.29 is below it.
            held_out = max(1, math.floor(Fraction(repr(float(self.holdout))) * self._indexed))
        return held_out if self.part == "holdout" else self._indexed - held_out

    @property
    def _positions(self) -> int:
        return self._kept if self.keep_length else self._kept * self.occurrences

    def _part(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids of the numbered members of the part, in the order of the hold-out's permutation."""
        if self.holdout > 0:
            skipped = self._indexed - self._kept if self.part == "holdout" else 0
            numbers = permute(
                numbers + skipped, self._indexed, seed=self.seed, kind=Kind.HOLDOUT, epoch=0
            )
        return numbers if self.subset is None else self.subset[numbers]

    @cached_property
    def _ascending(self) -> NDArray[np.int64] | None:
        """The part's ids, sorted; None where they are all ids of the store."""
        if self.subset is None and self.holdout == 0:
            return None
        return np.sort(self._part(np.arange(self._kept, dtype=np.int64)))

    def _ids(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.shuffle == "full":
            return self._part(
                permute(places, self._kept, seed=self.seed, kind=Kind.FULL, epoch=epoch)
            )
        if self.shuffle == "window":
            places = self._windowed(epoch, places)
        return places if self._ascending is None else self._ascending[places]

    def _windowed(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Offsets into the ascending ids."""
        table = self._windows(epoch)
        inside = np.searchsorted(table.windows, places, side="right") - 1
        mixed = np.empty_like(places)
        for window in np.unique(inside):
            chosen = inside == window
            first, end = table.windows[window], table.windows[window + 1]
            mixed[chosen] = first + permute(
                places[chosen] - first,
                int(end - first),
                seed=self.seed,
                kind=Kind.WINDOW,
                epoch=epoch,
                index=int(window),
            )
        shard = np.searchsorted(table.starts, mixed, side="right") - 1
        return table.firsts[shard] + mixed - table.starts[shard]

    def _windows(self, epoch: int) -> _Windows:
        latest = self._latest_windows
        if latest and latest[0].epoch == epoch:
            return latest[0]
        starts = np.asarray(self.shard_starts, np.int64)
        if self._ascending is not None:
            starts = np.searchsorted(self._ascending, starts)
        shards = permute(
            np.arange(len(starts) - 1),
            len(starts) - 1,
            seed=self.seed,
            kind=Kind.SHARDS,
            epoch=epoch,
        )
        places = np.append(0, np.cumsum(np.diff(starts)[shards]))
        windows = np.append(places[: -1 : self.window_shards], places[-1])
        table = _Windows(epoch, starts[shards], places, windows)
        latest[:] = [table]
        return table

    @cached_property
    def _latest_windows(self) -> list[_Windows]:
        """The table of the epoch last asked for: making it takes a pass over the shards."""
        return []


def _sorted_subset(subset: NDArray[np.int64], samples: int) -> NDArray[np.int64]:
    ids = np.asarray(subset)
    _require(
        ids.ndim == 1 and len(ids) > 0 and ids.dtype.kind in "iu",
        f"subset is {ids.dtype} {list(ids.shape)}; it must be a list of at least one whole number",
    )
    ids = np.sort(ids.astype(np.int64))
    outside = ids[(ids < 0) | (ids >= samples)]
    _require(
        len(outside) == 0,
        f"subset holds the id {outside[:1]}; the store has the ids 0 .. {samples - 1}",
    )
    twice = ids[1:][ids[1:] == ids[:-1]]
    _require(len(twice) == 0, f"subset holds the id {twice[:1]} more than once")
    ids.flags.writeable = False
    return ids


def _checked_starts(order: Order) -> NDArray[np.int64]:
    _require(
        order.window_shards > 0,
        f"window_shards is {order.window_shards}; shuffle 'window' needs at least 1",
    )
    _require(order.shard_starts is not None, "shuffle 'window' needs the store's shard_starts")
    starts = np.array(order.shard_starts, np.int64)
    _require(
        starts.ndim == 1
        and len(starts) > 1
        and starts[0] == 0
        and starts[-1] == order.samples
        and bool((np.diff(starts) >= 0).all()),
        f"shard_starts must ascend from 0 to the number of samples, {order.samples}",
    )
    starts.flags.writeable = False
    return starts


def _digest(numbers: ArrayLike | None) -> str:
    return hashlib.sha256(np.asarray(numbers, "<i8").tobytes()).hexdigest()


def rank_slice(
    batch_length: int, world_size: int, rank: int, group: int = 1, drop_last: bool = True
) -> slice:
    """A rank's contiguous share of a global batch: whole groups, and rank after rank the batch.

    In training (drop_last) all shares are equal. In evaluation they may differ by a group and be
    empty, and the last group may be short: every sample is in exactly one share.
    Raises OrderError where a training batch cannot be cut like that.
    """
    _require(
        0 <= rank < world_size, f"rank is {rank}; a world of {world_size} has 0 .. {world_size - 1}"
    )
    _require(group > 0, f"group is {group}; at least 1")
    if drop_last:
        _require(
            batch_length % (world_size * group) == 0,
            f"a batch of {batch_length} cannot be cut into {world_size} equal shares of whole "
            f"groups of {group}; take a multiple of {world_size * group}",
        )
    groups = -(-batch_length // group)
    first, end = (groups * place // world_size * group for place in (rank, rank + 1))
    return slice(min(first, batch_length), min(end, batch_length))
