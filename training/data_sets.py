"""The data sets as a run was given them: opened once per process, without torch."""

from functools import cache
from pathlib import Path

import numpy as np

from headrace.shards.errors import printable
from headrace.shards.local import local_path
from headrace.shards.sources.vocabulary import split_within
from headrace.shards.store import (
    IndexedStore,
    ShardError,
    Store,
    find_dataset,
    open_store,
    split_names,
)
from headrace.training.class_numbers import RenumberedStore


def open_train(path: Path | None) -> IndexedStore:
    """The training split of a data set; of the only one under ./data for None.

    Opened once per process: the command line looks at its sizes before the loop reads it.
    """
    return _open_once(local_path(path or find_dataset()), "train")


def open_val(path: Path) -> IndexedStore:
    """The split to evaluate on: `val`, else `test`, of a root that has splits. Opened once too."""
    return _open_once(local_path(path), ("val", "test"))


@cache
def _open_once(path: Path, split: str | tuple[str, ...]) -> IndexedStore:
    return open_store(path, split)


def largest_side_pixels(store: Store) -> int:
    """Of all images, from the index alone."""
    return int(store.sizes(np.arange(len(store), dtype=np.int64)).max(initial=0))


def root_with_val(train: Path) -> Path | None:
    """The root with a val or test split that a training set is or lies in, where there is one."""
    train = local_path(train)
    # Looked at from above only where the name says that it is a split: above may be anything.
    for root in (train, train.parent) if split_within(train.name) else (train,):
        try:
            names = split_names(root)
        except ShardError:
            continue  # not clear what it is: --data.val says it
        if {"val", "test"}.intersection(names):
            return root
    return None


def census_of(*stores: Store) -> list[str]:
    """Lines of what was found where the stores lie, what is not used, and what may surprise."""
    lines: list[str] = []
    for store in stores:
        inner = store.store if isinstance(store, RenumberedStore) else store
        if isinstance(inner, IndexedStore):
            lines += [*inner.census, *(f"  note: {note}" for note in inner.notes)]
    return [printable(line) for line in lines]
