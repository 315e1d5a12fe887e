"""What becomes of a sample that cannot be read or decoded, where a loader is told to go on.

Its place in the batch is filled, so that batches keep their length, ranks stay in step and the
order of everything else is what it was. "replace" fills it with the sample that stands at the same
place of the next batch of the epoch, or of the one after it where that one is bad too, drawn as an
occurrence that the epoch does not have: a function of (seed, epoch, position), the same for every
engine and number of ranks. "report" fills it with black and leaves the rest to whoever takes the
batch: no step may be taken with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.counters import OCCURRENCE_LIMIT
from headrace.pipelines.order import Order
from headrace.pipelines.table import Table
from headrace.shards.index import ShardError
from headrace.shards.store import Store

OnError = Literal["raise", "report", "replace"]
_CANDIDATES = 64  # bad in a row, and the data set is at fault, not a sample

Unusable = dict[int, str]
"""id -> reason, of what was met so far. Grows."""


@dataclass(frozen=True)
class Fault:
    """A sample that could not be used at its place.

    epoch, position: where in the order it stood. reason: what the decoder or the disk said.
    replacement: the id that filled its place; None: black pixels, which nothing may learn from.
    """

    sample_id: int
    epoch: int
    position: int
    reason: str
    replacement: int | None = None


class Filled(NamedTuple):
    """A share of a batch in which every place has bytes. ids int64 [B], occurrences int32 [B],
    encoded: B arrays uint8 [bytes]; faults: of the places that were filled."""

    ids: NDArray[np.int64]
    occurrences: NDArray[np.int32]
    encoded: list[NDArray[np.uint8]]
    faults: tuple[Fault, ...]


def fill(
    store: Store,
    ids: NDArray[np.int64],
    occurrences: NDArray[np.int32],
    unusable: Unusable,
    *,
    epoch: int,
    first: int,
    others: Callable[[int], Iterator[tuple[int, int]]] | None,
) -> Filled:
    """Read samples that stand from position `first` of an epoch on, and fill the places of those
    that are `unusable` or turn out to be.

    others: (id, occurrence) of what may take the place of a position, in order; None: black.
    """
    encoded = _read_sound(store, ids, unusable)
    faults: list[Fault] = []
    ids, occurrences = ids.copy(), occurrences.copy()
    for row, data in enumerate(encoded):
        if data is not None:
            continue
        bad, position = int(ids[row]), first + row
        for other, occurrence in others(position) if others is not None else ():
            (read,) = _read_sound(store, np.array([other]), unusable)
            if read is not None:
                ids[row], occurrences[row], encoded[row] = other, occurrence, read
                faults.append(Fault(bad, epoch, position, unusable[bad], other))
                break
        else:
            encoded[row] = _black(store, bad)
            faults.append(Fault(bad, epoch, position, unusable[bad]))
    return Filled(ids, occurrences, [data for data in encoded if data is not None], tuple(faults))


def others_of(
    order: Order, table: Table | None, epoch: int, position: int
) -> Iterator[tuple[int, int]]:
    """(id, occurrence) of the samples at the same place of the batches that follow, and around.

    One place further with every time around, so that an epoch of one batch has others too.
    """
    steps = order.steps_per_epoch
    for turn in range(1, _CANDIDATES + 1):
        place = (position + turn * order.batch_size + turn // steps) % order.epoch_length
        if table is not None and table.epoch == epoch:
            sample, occurrence = table.ids[place], table.occurrences[place]
        else:
            (sample,), (occurrence,) = order.at(epoch, np.array([place], np.int64))
        # Half a turn of the counters away: augmented otherwise than at its own place.
        yield int(sample), (int(occurrence) + OCCURRENCE_LIMIT // 2) % OCCURRENCE_LIMIT


def _read_sound(
    store: Store, ids: NDArray[np.int64], unusable: Unusable
) -> list[NDArray[np.uint8] | None]:
    """Bytes of each sample, None for the unusable ones."""
    if unusable.keys().isdisjoint(ids.tolist()):
        try:
            return [*store.read(ids)]
        except ShardError:
            pass  # one of them; which, is found below
    encoded: list[NDArray[np.uint8] | None] = []
    for sample in ids.tolist():
        data = None
        if sample not in unusable:
            try:
                (data,) = store.read([sample])
            except ShardError as error:
                unusable[sample] = str(error)
        encoded.append(data)
    return encoded


def _black(store: Store, sample: int) -> NDArray[np.uint8]:
    """A black picture of the sample's size, as a PNM file."""
    ((height, width),) = store.sizes([sample]).tolist()
    header = np.frombuffer(b"P6\n%d %d\n255\n" % (width, height), np.uint8)
    return np.concatenate((header, np.zeros(3 * height * width, np.uint8)))
