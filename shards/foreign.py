"""Indexes of data that others made: WebDataset tars, and folders of image files.

Their sizes and labels are spread over many files, so they are gathered once (headers only, no
image is decoded) and kept: for tars in a hidden directory beside them, or, where that is not
writable and for folders always, in the user's cache directory. An index is used as long as names,
sizes and modification times of the files stay the same.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.shards import class_numbers
from headrace.shards.atomic import atomic_file
from headrace.shards.headers import HeaderError, ImageHeader, read_header
from headrace.shards.index import ENCODED, INDEX_DTYPE, Index, ShardError, encode_name, read_index
from headrace.shards.index import write_index as write_index_files
from headrace.shards.mapping import map_file
from headrace.shards.progress import progress_bar
from headrace.shards.sources.samples import FolderSamples, SourceSplit
from headrace.shards.tar_labels import number_labels, read_class_names
from headrace.shards.tar_samples import TarScan, scan_tar

CACHE_VERSION = 2
CACHE_PREFIX = ".headrace-index-"
SOURCE_FILE = "source.json"
_PROGRESS_AFTER_SECONDS = 2.0
_BAD_FILES_NAMED = 10
_HEADER_BYTES = 1 << 16  # read of a loose file at first; the frame header is nearly always inside


@dataclass(frozen=True)
class Foreign:
    """What stands in for a manifest: index, class names, and the fingerprint of names and rows.

    notes: sentences about what a user may not expect.
    """

    index: Index
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Gathered:
    """What an index is made of. rows: [n] of `INDEX_DTYPE`, names: one for each."""

    rows: NDArray[np.void]
    names: list[str]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _File:
    name: str
    size_bytes: int
    modified_nanoseconds: int


def fingerprint_of(files: Iterable[tuple[str, int]], rows: NDArray[np.void], names: bytes) -> str:
    """sha256 (hex) over (file name, size in bytes) of every file, the row table and the names."""
    digest = sha256()
    for name, size_bytes in files:
        digest.update(encode_name(name) + b"\0" + str(size_bytes).encode() + b"\0")
    digest.update(np.ascontiguousarray(rows).tobytes())
    digest.update(names)
    return digest.hexdigest()


def open_tars(paths: tuple[Path, ...]) -> Foreign:
    """Index of WebDataset tars, each a shard, in the order given."""
    files = [_file(path, path.name) for path in paths]
    class_names = read_class_names(paths[0].parent)

    def build() -> _Gathered:
        return _scan_tars(paths, class_names, sum(file.size_bytes for file in files))

    identity = [str(path) for path in paths]
    return _cached(paths[0].parent, identity, files, class_names, build, beside=True)


def numbered_by(foreign: Foreign, train: Foreign, where: str) -> Foreign:
    """`foreign` with the class numbers of the set's training split. Raises `ShardError`."""
    if not train.classes or foreign.classes in ((), train.classes):
        return foreign
    labels = foreign.index.rows["label"].astype(np.int64)
    numbers = class_numbers.numbered_by(
        class_numbers.ClassNumbers(labels, foreign.classes), train.classes, where
    ).labels
    if np.array_equal(numbers, labels):
        return replace(foreign, classes=train.classes)
    rows = np.array(foreign.index.rows)
    rows["label"] = numbers
    index = Index(rows, foreign.index.names)
    fingerprint = _hash_of([foreign.fingerprint, train.classes])
    return Foreign(index, train.classes, fingerprint, foreign.notes)


def _scan_tars(
    paths: tuple[Path, ...], class_names: tuple[str, ...], total_bytes: int
) -> _Gathered:
    scans: list[TarScan] = []
    tables, names = [], []
    bad = _BadFiles()
    with progress_bar(
        "indexing tars", total_bytes, unit="B", after_seconds=_PROGRESS_AFTER_SECONDS
    ) as progress:
        for shard, path in enumerate(paths):
            data = map_file(path)
            scan = scan_tar(path)
            scans.append(scan)
            rows = np.zeros(len(scan.images), INDEX_DTYPE)
            rows["shard"], rows["encoding"] = shard, ENCODED
            for row, image in zip(rows, scan.images, strict=True):
                try:
                    header = read_header(data[image.offset : image.offset + image.length].data)
                except HeaderError as error:
                    bad.add(f"{image.name} in {path}", error)
                    continue
                row["offset"], row["length"] = image.offset, image.length
                row["height"], row["width"] = header.height, header.width
                names.append(image.name)
                progress.update(image.length)
            progress.update(len(data) - sum(image.length for image in scan.images))
            tables.append(rows)
    bad.refuse("write the tars again without them")
    numbers = number_labels(paths, scans, class_names)
    rows = np.concatenate(tables)
    rows["label"] = numbers.labels
    return _Gathered(rows, names, numbers.classes, numbers.notes)


def open_folder(split: SourceSplit) -> Foreign:
    """Index of the files of a folder, as the look at it listed them."""
    samples = split.samples
    assert isinstance(samples, FolderSamples)
    root = Path(samples.directory)
    files = [_file(root / name, name) for name in samples.names]
    labels = np.asarray(samples.labels, np.int64)
    classes = tuple(entry.name or entry.id for entry in split.classes)

    def build() -> _Gathered:
        rows = _read_headers(root, labels, files)
        return _Gathered(rows, list(samples.names), classes, split.notes)

    said = (*classes, sha256(labels.tobytes()).hexdigest(), *split.notes)
    return _cached(root, [str(root)], files, said, build, beside=False)


def _read_headers(root: Path, labels: NDArray[np.int64], files: list[_File]) -> NDArray[np.void]:
    rows = np.zeros(len(files), INDEX_DTYPE)
    rows["encoding"] = ENCODED
    rows["length"] = [file.size_bytes for file in files]
    rows["label"] = labels
    bad = _BadFiles()
    with progress_bar(
        "reading image sizes", len(files), after_seconds=_PROGRESS_AFTER_SECONDS
    ) as progress:
        for row, file in zip(rows, files, strict=True):
            try:
                header = _read_loose_header(root / file.name)
                row["height"], row["width"] = header.height, header.width
            except HeaderError as error:
                bad.add(str(root / file.name), error)
            progress.update()
    bad.refuse("remove them, or convert the folder with make_shards, which leaves such files out")
    return rows


def _read_loose_header(path: Path) -> ImageHeader:
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
        try:
            return read_header(start)
        except HeaderError:
            rest = file.read()
            if not rest:
                raise
            return read_header(start + rest)


class _BadFiles:
    """Collects what cannot be used, to name it in one error instead of one per attempt."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._count = 0

    def add(self, where: str, error: HeaderError) -> None:
        self._count += 1
        if len(self._first) < _BAD_FILES_NAMED:
            self._first.append(f"{where}: {error}")

    def refuse(self, remedy: str) -> None:
        if self._count:
            more = self._count - len(self._first)
            listed = "; ".join(self._first) + (f"; and {more} more" if more else "")
            raise ShardError(f"{self._count} file(s) are no readable images ({listed}): {remedy}")


def _file(path: Path, name: str) -> _File:
    try:
        status = path.stat()
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror})") from error
    return _File(name, status.st_size, status.st_mtime_ns)


def _cached(
    directory: Path,
    identity: list[str],
    files: list[_File],
    classes: tuple[str, ...],
    build: Callable[[], _Gathered],
    *,
    beside: bool,
) -> Foreign:
    """The index kept for these files in this state, or the one that `build` makes now.

    identity: absolute paths. classes: what the index depends on besides the files. beside: keep it
    in `directory` if that can be written, else (and without `beside`) in the user's cache.

    The directory's name holds a hash of the paths and one of the files' state, and SOURCE_FILE is
    written last: processes that build the same index at once write the same bytes.
    """
    place = _hash16(identity)
    state = _hash16(
        [CACHE_VERSION, classes, *((f.name, f.size_bytes, f.modified_nanoseconds) for f in files)]
    )
    name = f"{CACHE_PREFIX}{place}-{state}"
    parents = [user_cache()]
    if beside:
        parents.insert(0, directory)
    for parent in parents:
        if (parent / name / SOURCE_FILE).is_file():
            return _read_cached(parent / name)
    parent = directory if beside and os.access(directory, os.W_OK) else user_cache()
    gathered = build()
    try:
        (parent / name).mkdir(parents=True, exist_ok=True)
        write_index_files(parent / name, gathered.rows, gathered.names)
        index = read_index(parent / name)
        fingerprint = fingerprint_of(
            ((f.name, f.size_bytes) for f in files), index.rows, index.names.tobytes()
        )
        source = {
            "classes": gathered.classes,
            "fingerprint": fingerprint,
            "notes": gathered.notes,
        }
        with atomic_file(parent / name / SOURCE_FILE) as file:
            file.write(json.dumps(source).encode("ascii"))
    except OSError as error:
        raise ShardError(
            f"the index of {directory} cannot be kept in {parent} ({error.strerror}): make room, "
            "or let XDG_CACHE_HOME name a writable directory"
        ) from error
    for stale in parent.glob(f"{CACHE_PREFIX}{place}-*"):
        if stale.name != name:
            shutil.rmtree(stale, ignore_errors=True)
    return Foreign(index, gathered.classes, fingerprint, gathered.notes)


def _read_cached(directory: Path) -> Foreign:
    try:
        source = json.loads((directory / SOURCE_FILE).read_bytes())
        return Foreign(
            read_index(directory),
            tuple(source["classes"]),
            source["fingerprint"],
            tuple(source["notes"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{directory} is damaged ({error}): delete it, it is made anew") from error


def _hash16(values: list[Any]) -> str:
    return _hash_of(values)[:16]


def _hash_of(values: list[Any]) -> str:
    return sha256(json.dumps(values).encode("ascii")).hexdigest()


def user_cache() -> Path:
    """Where indexes go that cannot lie beside the data (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"
