"""One numbering of classes, the training set's, for all images that are judged by it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headrace.shards.store import Store
from headrace.training.preset import ConfigError, require

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class RenumberedStore:
    """A `Store` whose labels have other numbers. numbers: int64 [its own classes], the new ones."""

    store: Store
    classes: tuple[str, ...]
    numbers: NDArray[np.int64]

    @property
    def uri(self) -> str:
        return self.store.uri

    @property
    def fingerprint(self) -> str:
        return self.store.fingerprint

    @property
    def shard_starts(self) -> NDArray[np.int64]:
        return self.store.shard_starts

    def __len__(self) -> int:
        return len(self.store)

    def sizes(self, ids: ArrayLike) -> NDArray[np.int32]:
        """See `Store.sizes`."""
        return self.store.sizes(ids)

    def labels(self, ids: ArrayLike) -> NDArray[np.int64]:
        """See `Store.labels`."""
        own = self.store.labels(ids)
        return np.where(own < 0, own, self.numbers[own])

    def names(self, ids: ArrayLike) -> list[str]:
        """See `Store.names`."""
        return self.store.names(ids)

    def read(self, ids: ArrayLike) -> list[NDArray[np.uint8]]:
        """See `Store.read`."""
        return self.store.read(ids)


def numbered_alike(train: Store, val: Store) -> Store:
    """`val` with the class numbers of `train`, found by the names of classes.

    A set that names no classes is taken by its numbers. Raises ConfigError where images of `val`
    are of classes that `train` has not.
    """
    occurring = np.unique(val.labels(np.arange(len(val))))
    occurring = occurring[occurring >= 0]
    if not train.classes or train.classes == val.classes:
        return val
    if not val.classes:
        require(
            bool((occurring < len(train.classes)).all()),
            f"{val.uri} has images of class number {occurring.max(initial=0)} and names no "
            f"classes, and {train.uri} has {len(train.classes)}: their labels cannot be compared",
        )
        return val
    number_of = {name: number for number, name in enumerate(train.classes)}
    unknown = [
        name for name in (val.classes[label] for label in occurring) if name not in number_of
    ]
    if unknown:
        raise ConfigError(
            f"{train.uri} and {val.uri} have different classes: {len(unknown)} of the second, such "
            f"as {_some(unknown)}, are none of the {len(train.classes)} of the first, such as "
            f"{_some(train.classes)}: name a set whose classes are called alike"
        )
    numbers = np.array([number_of.get(name, -1) for name in val.classes], np.int64)
    return RenumberedStore(val, train.classes, numbers)


def unlabelled(store: Store, ids: NDArray[np.int64] | None = None) -> int:
    """How many of these images (None: of all) have no label."""
    ids = np.arange(len(store)) if ids is None else ids
    return int((store.labels(ids) < 0).sum())


def _some(names: "list[str] | tuple[str, ...]") -> str:
    return ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
