"""Shards from parts: cut the final order into shard files and write those that are missing."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, assert_never

import numpy as np
from numpy.typing import NDArray

from headrace.shards.atomic import atomic_file
from headrace.shards.beton import write_beton
from headrace.shards.dataset import BETON_FILE, tar_file
from headrace.shards.index import ENCODED, INDEX_DTYPE, RAW, Record
from headrace.shards.manifest import Format, ShardFile
from headrace.shards.parts import EXTENSIONS, PIXELS, read_stored
from headrace.shards.sources import SourceSplit
from headrace.shards.webdataset import write_tar

SAMPLES_PER_TAR_AT_MOST = 10_000
_TAR_BLOCK_BYTES = 512
_MEMBERS_PER_SAMPLE = 4


class Run(Protocol):
    """Calls a function on argument tuples, perhaps in other processes; results in any order."""

    def __call__(
        self, function: Callable[..., Any], tasks: Iterator[tuple[Any, ...]]
    ) -> Iterator[Any]: ...


class _Described(NamedTuple):
    """What a tar says of a sample besides its image."""

    name: str
    label: int
    class_name: str | None


def write_shards(
    run: Run,
    advance: Callable[[int], Any],
    directory: Path,
    parts_directory: Path,
    split: SourceSplit,
    stored: NDArray[np.void],
    order: NDArray[np.int64],
    format: Format,  # noqa: A002  (the word of the manifest and of the command line)
    shard_bytes: int,
) -> tuple[NDArray[np.void], list[ShardFile]]:
    """Write all shards that are not there yet; returns index rows and entries of the manifest.

    stored: [n] of `PART_DTYPE` in id order. order: int64 [n], position in `split.samples` of each
    id. advance: called with the number of samples of each shard.
    """
    match format:
        case "webdataset":
            starts = tar_starts(stored["length"], shard_bytes)
            ranges = list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
            files = [tar_file(number) for number in range(len(ranges))]
        case "beton":
            ranges, files = [(0, len(order))], [BETON_FILE]
        case _:
            assert_never(format)

    def tasks() -> Iterator[tuple[Any, ...]]:
        for number, (start, stop) in enumerate(ranges):
            if _read_marker(directory, parts_directory, files[number]) is not None:
                continue
            described = [_describe(split, position) for position in order[start:stop].tolist()]
            place = (directory, parts_directory, files[number], number, start)
            yield (*place, stored[start:stop], described, format)

    written = 0
    for count in run(_write_shard, tasks()):
        written += count
        advance(count)
    advance(len(order) - written)
    markers = [_read_marker(directory, parts_directory, file) for file in files]
    tables, shards = zip(*(marker for marker in markers if marker is not None), strict=True)
    return np.concatenate(tables), list(shards)


def tar_starts(lengths: NDArray[np.uint64], shard_bytes: int) -> NDArray[np.int64]:
    """First id of each tar shard, then n: int64 [shards + 1].

    As few shards as keep the mean at or below `shard_bytes` and the count at or below 10,000, all
    with the same number of samples but for one: ranks that take shards in turn then finish
    together.
    """
    blocks = -(-lengths.astype(np.int64) // _TAR_BLOCK_BYTES) + 2 * _MEMBERS_PER_SAMPLE - 1
    total_bytes = int(blocks.sum()) * _TAR_BLOCK_BYTES
    count = max(-(-total_bytes // shard_bytes), -(-len(lengths) // SAMPLES_PER_TAR_AT_MOST))
    count = min(count, len(lengths))
    return np.arange(count + 1, dtype=np.int64) * len(lengths) // count


def _describe(split: SourceSplit, position: int) -> _Described:
    sample = split.samples[position]
    labelled = 0 <= sample.label < len(split.classes)
    entry = split.classes[sample.label] if labelled else None
    return _Described(sample.name, sample.label, (entry.name or entry.id) if entry else None)


def _write_shard(
    directory: Path,
    parts_directory: Path,
    file_name: str,
    number: int,
    first_id: int,
    stored: NDArray[np.void],
    described: list[_Described],
    format: Format,  # noqa: A002
) -> int:
    path = directory / file_name
    match format:
        case "webdataset":
            records = (
                Record(
                    first_id + i, sample.name, sample.label, sample.class_name,
                    read_stored(parts_directory, row), EXTENSIONS[int(row["kind"])],
                    int(row["height"]), int(row["width"]),
                )
                for i, (row, sample) in enumerate(zip(stored, described, strict=True))
            )  # fmt: skip
            rows, shard = write_tar(path, records, number)
        case "beton":
            declared = np.zeros(len(stored), INDEX_DTYPE)
            for column in ("length", "height", "width", "content_hash"):
                declared[column] = stored[column]
            declared["encoding"] = np.where(stored["kind"] == PIXELS, RAW, ENCODED)
            declared["label"] = [sample.label for sample in described]
            items = (read_stored(parts_directory, row) for row in stored)
            rows, shard = write_beton(path, declared, items)
        case _:
            assert_never(format)
    with atomic_file(parts_directory / f"{file_name}.npy") as file:
        np.lib.format.write_array(file, rows, version=(1, 0), allow_pickle=False)
    with atomic_file(parts_directory / f"{file_name}.json") as file:
        file.write(json.dumps(asdict(shard)).encode("ascii"))
    return len(rows)


def _read_marker(
    directory: Path, parts_directory: Path, file_name: str
) -> tuple[NDArray[np.void], ShardFile] | None:
    """What was noted when a shard was finished; None if it was not, or is not what it was."""
    marker = parts_directory / f"{file_name}.json"
    if not marker.exists():
        return None
    shard = ShardFile(**json.loads(marker.read_bytes()))
    path = directory / file_name
    if not path.exists() or path.stat().st_size != shard.bytes:
        return None
    return np.load(parts_directory / f"{file_name}.npy", allow_pickle=False), shard
