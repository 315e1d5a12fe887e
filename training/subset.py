"""The samples that a text file lists: `--data.subset`."""

from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from headrace.shards.store import Store
from headrace.training.preset import ConfigError

_MISSING, _AMBIGUOUS = -1, -2


def read_subset(path: Path | None, store: Store) -> NDArray[np.int64] | None:
    """Sorted ids of the samples that a text file names, one per line, without repetition.

    None, for all samples, without a file.
    A line is an id, an original name as the store has it, or the last part of one (the form of
    SimCLR's 1 % and 10 % lists).
    Raises ConfigError for what is not in the store or is there more than once.
    """
    if path is None:
        return None
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--data.subset {path} cannot be read: {error}") from error
    entries = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not entries:
        raise ConfigError(f"--data.subset {path} lists no sample")
    names = {} if all(_is_id(line) for _, line in entries) else _ids_by_name(store)
    ids: set[int] = set()
    for number, line in entries:
        where = f"--data.subset {path}, line {number}: {line!r}"
        if _is_id(line):
            if int(line) >= len(store):
                raise ConfigError(f"{where} is no id of {store.uri}, which has {len(store)}")
            ids.add(int(line))
            continue
        match = names.get(line, _MISSING)
        if match == _MISSING:
            raise ConfigError(f"{where} is no name of a sample in {store.uri}")
        if match == _AMBIGUOUS:
            raise ConfigError(f"{where} names several samples of {store.uri}: write the whole name")
        ids.add(match)
    return np.array(sorted(ids), dtype=np.int64)


def _is_id(line: str) -> bool:
    return line.isascii() and line.isdigit()


def _ids_by_name(store: Store) -> dict[str, int]:
    """Whole names and their last parts; a whole name wins over another one's last part."""
    names = store.names(np.arange(len(store), dtype=np.int64))
    last_parts = [PurePosixPath(name).name for name in names]
    times = Counter(last_parts)
    ids = {
        part: sample if times[part] == 1 else _AMBIGUOUS for sample, part in enumerate(last_parts)
    }
    return ids | {name: sample for sample, name in enumerate(names)}
