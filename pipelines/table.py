"""An order of somebody else's making: the ids of one epoch's positions, in place of a permutation.

A method that clusters wants its epochs uniform over clusters, so that some samples come many times
and others not at all. A table lives for one epoch and is made anew for the next; it costs 12 bytes
per position, where a permutation costs none. Its hash goes into the state of a loader, so that a
resume with another one is refused.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.counters import OCCURRENCE_LIMIT
from headrace.pipelines.order import Order, OrderError


@dataclass(frozen=True, eq=False)
class Table:
    """ids int64 [epoch_length], occurrences int32 [epoch_length] by position, in epoch `epoch`.

    digest: sha256 of the ids, in hex.
    """

    epoch: int
    ids: NDArray[np.int64]
    occurrences: NDArray[np.int32]
    digest: str


def make_table(order: Order, epoch: int, ids: NDArray[np.int64]) -> Table:
    """`ids` [n] as the order of an epoch that keeps the length, batches and samples of `order`.

    n is at least the order's epoch_length; what is beyond is dropped. An id may repeat: its k-th
    appearance is its occurrence k, so that each is augmented differently. After 1024 of them, for
    which counters have room, the augmentations begin again: a sample that comes so often in one
    epoch is a cluster of its own, and refusing it would end a run for what does it no harm.
    Raises OrderError for a table that is too short or holds what is not in the order's part.
    """
    given = np.asarray(ids)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise OrderError(f"a table is {given.dtype} {list(given.shape)}; it is a list of ids")
    if len(given) < order.epoch_length:
        raise OrderError(
            f"a table has {len(given)} ids, and an epoch {order.epoch_length} positions"
        )
    kept = np.array(given[: order.epoch_length], np.int64)
    foreign = kept[~order.holds(kept)]
    if len(foreign):
        raise OrderError(
            f"a table holds the id {foreign[0]}, which is not among the {order.part!r} samples "
            f"that this order goes through"
        )
    kept.flags.writeable = False
    digest = hashlib.sha256(kept.astype("<i8").tobytes()).hexdigest()
    return Table(epoch, kept, _appearances(kept) % OCCURRENCE_LIMIT, digest)


def _appearances(ids: NDArray[np.int64]) -> NDArray[np.int32]:
    """How often each position's id stands before it, int32 [n]."""
    places = np.argsort(ids, kind="stable")
    ascending = ids[places]
    begins = np.append(True, ascending[1:] != ascending[:-1])  # of each id's run
    running = np.arange(len(ids))
    counted = np.empty(len(ids), np.int32)
    counted[places] = running - np.maximum.accumulate(np.where(begins, running, 0))
    return counted
