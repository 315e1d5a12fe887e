"""The training set as a run was given it: opened once per process, without torch."""

from functools import cache
from pathlib import Path

import numpy as np

from headrace.shards.local import local_path
from headrace.shards.store import Store, find_dataset, open_store


def open_train(path: Path | None) -> Store:
    """The training split of a data set; of the only one under ./data for None.

    Opened once per process: the command line looks at its sizes before the loop reads it.
    """
    return _open_once(local_path(path or find_dataset()))


@cache
def _open_once(path: Path) -> Store:
    return open_store(path, "train")


def largest_side_pixels(store: Store) -> int:
    """Of all images, from the index alone."""
    return int(store.sizes(np.arange(len(store), dtype=np.int64)).max(initial=0))
