"""open_store: any data set on this machine as one thing, ids 0..n-1 with sizes, labels and bytes.

A store is an index and a way to get at bytes; that is all a training loop knows of the disk. Sizes
and labels come from the index alone, so everything random about a batch can be drawn before a byte
of it is read. Bytes are views into the page cache wherever the file holds them as they are.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headrace.shards.beton import read_beton_index
from headrace.shards.class_numbers import class_numbers
from headrace.shards.foreign import fingerprint_of, numbered_by, open_folder, open_tars
from headrace.shards.index import INDEX_FILE, RAW, Index, ShardError, read_index
from headrace.shards.local import local_path
from headrace.shards.manifest import MANIFEST_FILE, PARTS_DIRECTORY, read_manifest
from headrace.shards.mapping import MappedFiles
from headrace.shards.patterns import expand, is_pattern
from headrace.shards.sources.layout import AS_FOUND, Ambiguous, Choices, Layout
from headrace.shards.sources.recognise import NothingFound, recognise, refuse_choices
from headrace.shards.sources.samples import FolderSamples
from headrace.shards.sources.vocabulary import SPLITS
from headrace.shards.tar_sets import TarSet, recognise_tars, refuse_packed, tar_set

_SHARD_ENDINGS = (".tar", ".beton")
_OF_A_FILE = ("length", "height", "width")
_EXPECTED = (
    "expected a directory that make_shards wrote, a .beton file, WebDataset tars (a path, a glob, "
    "or x-{000..012}.tar), or a folder of images (one directory per class, or flat)"
)


class Store(Protocol):
    """Samples with ids 0..n-1. Read-only, safe to share among threads; pickles by re-opening.

    uri: absolute path or pattern. fingerprint: hex, equal for equal data. classes: human names, or
    ids where there are no names; () if unknown. shard_starts: int64 [shards + 1], the id at which
    each shard starts, then n. ids are integers [n]; one out of range is a `ShardError`.
    """

    @property
    def uri(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def shard_starts(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def sizes(self, ids: ArrayLike) -> NDArray[np.int32]:
        """Height and width in pixels, int32 [n, 2], from the index alone."""
        ...

    def labels(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Class numbers int64 [n], -1 = none, from the index alone."""
        ...

    def names(self, ids: ArrayLike) -> list[str]:
        """What the samples were called where they came from; for people."""
        ...

    def read(self, ids: ArrayLike) -> list[NDArray[np.uint8]]:
        """Encoded bytes, one read-only array uint8 [bytes] per id.

        Views into mapped files; raw pixels are copied behind a PNM header (P6). `ShardError` if a
        file vanished or changed.
        """
        ...


class _Bytes(Protocol):
    """Where an indexed store gets a sample's bytes from."""

    def read(self, shard: int, offset: int, length: int) -> NDArray[np.uint8]: ...


class IndexedStore:
    """The one implementation of `Store`: an index, and files that are mapped or read one by one."""

    def __init__(
        self,
        uri: str,
        fingerprint: str,
        classes: tuple[str, ...],
        shard_starts: NDArray[np.int64],
        index: Index,
        files: _Bytes | None,
        *,
        opened: "Opened | None" = None,
        census: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        """files: None where every sample is a file of its own, named by the index below `uri`.

        opened: what gives this store again, `uri` alone if None. census: what was found there and
        what is not used. notes: sentences about what a user may not expect.
        """
        self.uri = uri
        self.fingerprint = fingerprint
        self.classes = classes
        self.shard_starts = shard_starts
        self._index = index
        self._files = files
        self._opened = opened or Opened(uri)
        known = f"{len(classes):,} classes" if classes else "no class names"
        found = (f"{uri}:", *(f"  {line}" for line in census))
        self.census = found if census else (f"{uri}: {len(index):,} images, {known}",)
        """Lines to print before work starts."""
        self.notes = notes

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"<store of {len(self)} samples at {self.uri}>"

    def sizes(self, ids: ArrayLike) -> NDArray[np.int32]:
        """See `Store.sizes`."""
        ids = self._checked(ids)
        rows = self._index.rows
        return np.stack((rows["height"][ids], rows["width"][ids]), axis=1).astype(np.int32)

    def labels(self, ids: ArrayLike) -> NDArray[np.int64]:
        """See `Store.labels`."""
        return self._index.rows["label"][self._checked(ids)].astype(np.int64)

    def names(self, ids: ArrayLike) -> list[str]:
        """See `Store.names`. A .beton file made by others holds no names: the ids serve."""
        return [self._index.name(i) or f"{i:09d}" for i in self._checked(ids).tolist()]

    def read(self, ids: ArrayLike) -> list[NDArray[np.uint8]]:
        """See `Store.read`."""
        ids = self._checked(ids)
        rows = self._index.rows[ids]
        if self._files is None:
            return [
                self._read_file(i, int(row["length"])) for i, row in zip(ids, rows, strict=True)
            ]
        encoded = []
        for shard, offset, length, height, width, encoding in zip(
            *(
                rows[c].tolist()
                for c in ("shard", "offset", "length", "height", "width", "encoding")
            ),
            strict=True,
        ):
            data = self._files.read(shard, offset, length)
            encoded.append(_with_pnm_header(data, height, width) if encoding == RAW else data)
        return encoded

    def file_row(self, sample_id: int) -> dict[str, int]:
        """What the index says of a file: "length" in bytes, "height" and "width" in pixels."""
        (sample_id,) = self._checked([sample_id])
        return {column: int(self._index.rows[sample_id][column]) for column in _OF_A_FILE}

    def fingerprint_with(self, files: Mapping[int, Mapping[str, int]]) -> str:
        """The fingerprint that this folder had, if some samples' files had other `file_row`s.

        Of shards the fingerprint that they have: a sample in them does not change by itself.
        """
        if self._files is not None:
            return self.fingerprint
        rows = np.array(self._index.rows)
        for sample, values in files.items():
            for column in _OF_A_FILE:
                rows[column][sample] = values[column]
        names = map(self._index.name, range(len(rows)))
        listed = zip(names, rows["length"].tolist(), strict=True)
        return fingerprint_of(listed, rows, self._index.names.tobytes())

    def _read_file(self, sample_id: int, length: int) -> NDArray[np.uint8]:
        path = Path(self.uri) / self._index.name(sample_id)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ShardError(f"{path} cannot be read any more ({error.strerror})") from error
        if len(data) != length:
            raise ShardError(
                f"{path} had {length} bytes when the folder was opened and has {len(data)} now: "
                "open the folder again"
            )
        return np.frombuffer(data, np.uint8)

    def _checked(self, ids: ArrayLike) -> NDArray[np.int64]:
        ids = np.asarray(ids)
        if ids.size == 0:
            return np.zeros(0, np.int64)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ShardError(f"ids are integers [n], not {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= len(self):
            unknown = ids[(ids < 0) | (ids >= len(self))][0]
            raise ShardError(
                f"{self.uri} has no sample {unknown}; ids run from 0 to {len(self) - 1}"
            )
        return ids.astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._opened, self.fingerprint)


def _with_pnm_header(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    header = np.frombuffer(b"P6\n%d %d\n255\n" % (width, height), np.uint8)
    image = np.concatenate((header, pixels))
    image.flags.writeable = False
    return image


@dataclass(frozen=True)
class Opened:
    """What `open_store` was asked for: a path or pattern, a split, and what was said of it."""

    uri: str
    split: str | None = None
    choices: Choices = AS_FOUND


def _reopen(opened: Opened, fingerprint: str) -> Store:
    store = _open(opened.uri, opened.split, opened.choices)
    if store.fingerprint != fingerprint:
        raise ShardError(
            f"{opened.uri} changed between two openings by one program: start it again"
        )
    return store


def open_store(
    uri: str | Path,
    split: str | Sequence[str] | None = None,
    *,
    layout: Layout = "auto",
    images: str | None = None,
    labels: str | Path | None = None,
    classes: str | Path | None = None,
) -> IndexedStore:
    """Open a data set.

    uri: a directory that make_shards wrote, or its root with splits; a .beton file; WebDataset tars
    (path, glob, brace pattern such as `x-{000000..000012}.tar`, or a folder of them, with splits in
    the names); a folder of images, recognised as make_shards recognises it: one directory per class
    or flat, or splits of such folders.
    split: which one of a root that has splits, or several, of which the first that is there counts;
    without effect where there are none, and not needed where there is one.
    layout, images, labels, classes: what decides where a folder can be read in several ways: see
    `headrace.shards.sources.layout.Choices`; refused for anything but folders.
    Raises `ShardError`: nothing there, not recognised, a split missing or not chosen, a shard
    missing or of another size than the manifest says.
    """
    choices = Choices(
        layout, images, None if labels is None else Path(labels).absolute(),
        None if classes is None else Path(classes).absolute(),
    )  # fmt: skip
    return _open(os.fspath(uri), split, choices)


def _open(text: str, split: str | Sequence[str] | None, choices: Choices) -> IndexedStore:
    path = local_path(text)
    if not path.exists() and not is_pattern(text):
        raise ShardError(f"{path} does not exist; {_EXPECTED}")
    written = _is_written(path)
    if choices != AS_FOUND and (written or not path.is_dir()):
        raise ShardError(
            f"{path} is no folder of images: layout, images, labels and classes say how one is read"
        )
    tars = _tars_of_others(path) if path.is_dir() else None
    if tars is not None:
        refuse_choices(path, choices)
        return _open_tar_set(str(path), tars, split)
    if path.is_dir() and not written:
        return _open_folder(path, split, choices)
    if path.is_dir():
        return _open_written(path if (path / MANIFEST_FILE).is_file() else _split_of(path, split))
    if path.suffix == ".beton":
        return _open_beton(path)
    paths = (path,) if path.is_file() else tuple(expand(str(path)))
    return _open_tars(str(path), paths, None if path.is_file() else split)


def split_names(path: Path) -> tuple[str, ...]:
    """The splits that a data set has; () if it has none. Raises `ShardError` as `open_store`."""
    path = path.expanduser()
    if (path / MANIFEST_FILE).is_file() or not path.is_dir():
        return ()
    tars = _tars_of_others(path)
    if tars is not None:
        return tuple(name for name in tars.splits if name)
    return _written_splits(path) or recognise(path, ()).split_names


def _written_splits(path: Path) -> tuple[str, ...]:
    return tuple(name for name in SPLITS if (path / name / MANIFEST_FILE).is_file())


def _split_of(path: Path, wanted: str | Sequence[str] | None) -> Path:
    """The directory of a split below a root that make_shards wrote."""
    return path / choose_split(path, _written_splits(path), wanted)


def choose_split(path: Path | str, names: Sequence[str], wanted: str | Sequence[str] | None) -> str:
    """The first of the splits wanted that is there, or the only one if none is named."""
    listed = ", ".join(names)
    if wanted is None:
        if len(names) > 1:
            raise ShardError(f"{path} has the splits {listed}: choose one")
        return names[0]
    asked = (wanted,) if isinstance(wanted, str) else wanted
    chosen = next((name for name in asked if name in names), None)
    if chosen is None:
        raise ShardError(f"{path} has no split {' or '.join(map(repr, asked))}, it has {listed}")
    return chosen


def find_dataset(root: Path = Path("data")) -> Path:
    """The only data set that make_shards wrote at or directly below `root`.

    A root with splits counts once. Raises `ShardError` if there is none, or several (listed).
    """
    if not root.is_dir():
        raise ShardError(f"there is no directory {root}: name a data set, or make one there")
    candidates = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    written = [path for path in candidates if _is_written(path)]
    if root in written:
        return root
    match written:
        case [only]:
            return only
        case []:
            raise ShardError(f"no data set under {root}: make one there with make_shards")
        case _:
            listed = ", ".join(str(path) for path in written)
            raise ShardError(f"{len(written)} data sets under {root}, name one: {listed}")


def _is_written(path: Path) -> bool:
    return (path / MANIFEST_FILE).is_file() or bool(_written_splits(path))


def _open_folder(path: Path, wanted: str | Sequence[str] | None, choices: Choices) -> IndexedStore:
    asked = (wanted,) if isinstance(wanted, str) else wanted
    try:
        recognised = recognise(path, asked, choices)
    except Ambiguous as error:
        raise ShardError(
            f"{error} (these are options of make_shards, and arguments of open_store)"
        ) from error
    except NothingFound as error:
        shards = sorted(entry.name for entry in path.iterdir() if entry.suffix in _SHARD_ENDINGS)
        if not shards:
            raise
        raise ShardError(
            f"{path} holds {shards[0]} and no {MANIFEST_FILE}: if make_shards was writing it, run "
            f"it again to finish; if others made it, name the files (such as {path}/*.tar)"
        ) from error
    names = recognised.split_names
    name = choose_split(path, names, wanted) if names else ""
    split = next(split for split in recognised.splits if split.name == name)
    samples = split.samples
    if not isinstance(samples, FolderSamples):
        raise ShardError(
            f"{path} holds {split.kind}, which is not read as it is: convert it with make_shards"
        )
    foreign = open_folder(split)
    return IndexedStore(
        samples.directory,
        foreign.fingerprint,
        foreign.classes,
        np.array([0, len(foreign.index)], np.int64),
        foreign.index,
        None,
        opened=Opened(str(path), name or None, choices),
        census=tuple(recognised.census()),
        notes=split.notes,
    )


def _tars_of_others(path: Path) -> TarSet | None:
    """None for what make_shards wrote or is writing."""
    folders = (path, *(path / split for split in SPLITS))
    ours = (MANIFEST_FILE, INDEX_FILE, PARTS_DIRECTORY)
    if any((folder / name).exists() for folder in folders for name in ours):
        return None
    return recognise_tars(path)


def _open_written(path: Path) -> IndexedStore:
    manifest = read_manifest(path)
    index = read_index(path)
    if len(index) != manifest.samples:
        raise ShardError(
            f"{path}: the index has {len(index)} samples, the manifest {manifest.samples}: "
            "the files do not belong together, write the data set again"
        )
    files = tuple(path / shard.file for shard in manifest.shards)
    for file, shard in zip(files, manifest.shards, strict=True):
        try:
            size_bytes = file.stat().st_size
        except OSError as error:
            raise ShardError(
                f"{file} is missing or unreadable ({error.strerror}): fetch it, or write the data "
                "set again"
            ) from error
        if size_bytes != shard.bytes:
            raise ShardError(
                f"{file} has {size_bytes} bytes, the manifest says {shard.bytes}: fetch it again, "
                "or write the data set again"
            )
    return IndexedStore(
        str(path),
        manifest.fingerprint,
        tuple(entry.name or entry.id for entry in manifest.classes),
        np.cumsum([0, *(shard.samples for shard in manifest.shards)], dtype=np.int64),
        index,
        MappedFiles(files, tuple(shard.bytes for shard in manifest.shards)),
    )


def _open_beton(path: Path) -> IndexedStore:
    rows = read_beton_index(path)
    size_bytes = path.stat().st_size
    numbers = class_numbers(rows["label"].astype(np.int64))
    rows["label"] = numbers.labels
    return IndexedStore(
        str(path),
        fingerprint_of([(path.name, size_bytes)], rows, b""),
        numbers.classes,
        np.array([0, len(rows)], np.int64),
        Index(rows, np.zeros(0, np.uint8)),
        MappedFiles((path,), (size_bytes,)),
        notes=numbers.notes,
    )


def _open_tars(
    uri: str, paths: tuple[Path, ...], split: str | Sequence[str] | None
) -> IndexedStore:
    """Tars named one by one; where their names hold several splits, those of one."""
    for path in paths:
        if path.suffix != ".tar":
            refuse_packed(path)
            raise ShardError(f"{path} is neither .tar nor .beton; {_EXPECTED}")
    tars = tar_set(paths, named=True)
    if tars is None or tars.splits.keys() == {""}:
        tars, split = TarSet({"": paths}), None
    return _open_tar_set(uri, tars, split)


def _open_tar_set(uri: str, tars: TarSet, split: str | Sequence[str] | None) -> IndexedStore:
    chosen = None if "" in tars.splits else choose_split(uri, tuple(tars.splits), split)
    paths = tars.splits[chosen or ""]
    foreign = open_tars(paths)
    if chosen not in (None, "train") and "train" in tars.splits:
        train = open_tars(tars.splits["train"])
        foreign = numbered_by(foreign, train, f"the {chosen} tars of {uri}")
    notes = foreign.notes
    others = [name for name in tars.splits if name and name != chosen]
    if others:
        notes += (f"these are the {chosen} tars; those of {' and '.join(others)} are not used",)
    per_shard = np.bincount(foreign.index.rows["shard"], minlength=len(paths))
    return IndexedStore(
        uri,
        foreign.fingerprint,
        foreign.classes,
        np.concatenate(([0], np.cumsum(per_shard))).astype(np.int64),
        foreign.index,
        MappedFiles(paths, tuple(path.stat().st_size for path in paths)),
        notes=notes,
        opened=Opened(uri, chosen),
    )
