"""What numbers given as labels mean: class numbers as they stand, or identifiers to be numbered."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.shards.index import ShardError

NUMBERED_BELOW = 65_536
"""Labels up to here are class numbers as they stand; beyond, many gaps make them identifiers."""
_GAPS_AT_MOST = 10  # numbers for each class that occurs, or they are identifiers


class ClassNumbers(NamedTuple):
    """labels: int64 [n], positions in `classes`, or -1. classes: names, () where none occurs.
    notes: sentences about what a user may not expect."""

    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def class_numbers(labels: NDArray[np.int64]) -> ClassNumbers:
    """The classes of labels [n] (below 0: none), named by number.

    Class numbers stay as they are. Numbers that are mostly gaps are identifiers: the classes are
    then those that occur, ascending.
    """
    occurring = np.unique(labels[labels >= 0])
    if len(occurring) == 0:
        return ClassNumbers(np.full(len(labels), -1), ())
    highest = int(occurring[-1])
    if highest < NUMBERED_BELOW or highest < _GAPS_AT_MOST * len(occurring):
        notes = ()
        if occurring[0] > 0:
            notes = (f"labels run from {occurring[0]} to {highest}: class 0 has no image",)
        return ClassNumbers(labels, tuple(str(label) for label in range(highest + 1)), notes)
    note = (
        f"labels go up to {highest:,} and {len(occurring):,} occur: they are taken for identifiers "
        "and numbered in ascending order"
    )
    numbered = np.where(labels < 0, -1, np.searchsorted(occurring, labels)).astype(np.int64)
    return ClassNumbers(numbered, tuple(str(label) for label in occurring), (note,))


def numbered_by(given: ClassNumbers, classes: tuple[str, ...], where: str) -> ClassNumbers:
    """The same labels as positions in `classes`, by name: those of train for another split.

    Raises `ShardError` for a class that `classes` lacks.
    """
    if given.classes == classes:
        return given
    position = {name: number for number, name in enumerate(classes)}
    used = np.unique(given.labels[given.labels >= 0]).tolist()
    unknown = [given.classes[number] for number in used if given.classes[number] not in position]
    if unknown:
        raise ShardError(
            f"{where} have {len(unknown)} class(es) that train lacks, as {unknown[0]!r}: labels "
            "would have no meaning; add them to train or take them out"
        )
    new = np.array([*(position.get(name, -1) for name in given.classes), -1], np.int64)
    return ClassNumbers(new[given.labels], classes, given.notes)
