"""What a source is made of: samples that point at bytes, and the reading of those bytes.

A listing of a million samples is made once and cut into chunks that travel to worker processes, so
a sample is small and picklable: where its bytes lie, not the bytes. Samples stand in the order in
which they lie on disk; a worker that gets consecutive ones reads forwards, and opens a Parquet row
group or an array file once.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, assert_never, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from headrace.shards.index import ShardError
from headrace.shards.manifest import ClassName
from headrace.shards.sources.array_files import open_images


@dataclass(frozen=True, slots=True)
class FileReference:
    """A whole file."""

    path: str


@dataclass(frozen=True, slots=True)
class RangeReference:
    """`length` bytes at `offset` of a file: a member of a tar, or of a tar inside a tar."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ParquetReference:
    """`<column>.bytes` in a row of a row group; `row` counts within the group."""

    path: str
    column: str
    row_group: int
    row: int


@dataclass(frozen=True, slots=True)
class ArrayReference:
    """images[row] of an .npz file: uint8 pixels [height, width, 3], not an image file."""

    path: str
    row: int


Reference = FileReference | RangeReference | ParquetReference | ArrayReference


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a source: its name there (for people), its label (-1 = none), its bytes."""

    name: str
    label: int
    reference: Reference


@dataclass(frozen=True)
class FolderSamples(Sequence[Sample]):
    """Files below a directory: two lists instead of a `Sample` for each of a million.

    names: paths below `directory`, in order. labels: class numbers, -1 = none.
    """

    directory: str
    names: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    @override
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self.names[index]
        return Sample(name, self.labels[index], FileReference(os.path.join(self.directory, name)))


def relabelled(samples: Sequence[Sample], labels: Sequence[int]) -> Sequence[Sample]:
    """The same samples with other labels."""
    if isinstance(samples, FolderSamples):
        return replace(samples, labels=labels)
    return [replace(sample, label=label) for sample, label in zip(samples, labels, strict=True)]


@dataclass(frozen=True)
class SourceSplit:
    """One split of a source.

    name: "train", "val", "test", "unlabeled", or "" if the source has no splits. kind: what was
    recognised, in words. classes: position = label. notes: sentences about what a user may not
    expect.
    """

    name: str
    kind: str
    classes: tuple[ClassName, ...]
    samples: Sequence[Sample]
    notes: tuple[str, ...] = ()


def estimate_bytes(samples: Sequence[Sample], looked_at: int = 256) -> int:
    """About how many bytes the samples hold, from looking at a few of them; no byte is read."""
    step = max(1, len(samples) // looked_at)
    some = [_estimate_one(sample.reference) for sample in samples[::step]]
    return round(sum(some) / len(some) * len(samples)) if some else 0


def _estimate_one(reference: Reference) -> float:
    try:
        match reference:
            case FileReference(path):
                return os.path.getsize(path)
            case RangeReference():
                return reference.length
            case ParquetReference(path):
                import pyarrow.parquet

                return os.path.getsize(path) / pyarrow.parquet.read_metadata(path).num_rows
            case ArrayReference(path):
                return _bytes_per_image(path)
            case _:
                assert_never(reference)
    except OSError:
        return 0  # reading it will say what is wrong


@lru_cache(maxsize=16)
def _bytes_per_image(path: str) -> int:
    """Of a file of arrays, which is read whole for it unless it is mapped."""
    return math.prod(open_images(path).shape[1:])


class SampleReader:
    """Reads what references point at; keeps the last file open. Not for sharing among threads."""

    def __init__(self) -> None:
        self._file: tuple[str, BinaryIO] | None = None
        self._row_group: tuple[tuple[str, str, int], Any] | None = None
        self._images: tuple[str, NDArray[np.uint8]] | None = None

    def read(self, sample: Sample) -> bytes | NDArray[np.uint8]:
        """The bytes of an image file, or pixels uint8 [height, width, 3].

        Raises `ShardError` if they cannot be read. What they contain is not judged here.
        """
        reference = sample.reference
        try:
            match reference:
                case FileReference(path):
                    return Path(path).read_bytes()
                case RangeReference():
                    return self._read_range(reference)
                case ParquetReference():
                    return self._read_cell(reference)
                case ArrayReference(path, row):
                    if self._images is None or self._images[0] != path:
                        self._images = (path, open_images(path))
                    return np.ascontiguousarray(self._images[1][row])
                case _:
                    assert_never(reference)
        except OSError as error:
            raise ShardError(
                f"cannot read {reference.path}: {error.strerror or error}; make it readable or take"
                " it out of the source, then run again"
            ) from error

    def close(self) -> None:
        """Close the file kept open; reading again opens it again."""
        if self._file is not None:
            self._file[1].close()
        self._file = self._row_group = self._images = None

    def _read_range(self, reference: RangeReference) -> bytes:
        if self._file is None or self._file[0] != reference.path:
            self.close()
            self._file = (reference.path, open(reference.path, "rb"))  # noqa: SIM115
        file = self._file[1]
        file.seek(reference.offset)
        data = file.read(reference.length)
        if len(data) != reference.length:
            raise ShardError(f"{reference.path} ends early: it was not copied completely")
        return data

    def _read_cell(self, reference: ParquetReference) -> bytes:
        import pyarrow
        import pyarrow.parquet

        key = (reference.path, reference.column, reference.row_group)
        if self._row_group is None or self._row_group[0] != key:
            try:
                with pyarrow.parquet.ParquetFile(reference.path) as file:
                    table = file.read_row_group(
                        reference.row_group, columns=[f"{reference.column}.bytes"]
                    )
            except pyarrow.ArrowException as error:
                raise ShardError(f"{reference.path} is damaged: {error}") from error
            self._row_group = (key, table.column(reference.column).combine_chunks().field("bytes"))
        # A null, as a failed download leaves it, is a file of no bytes: left out, by name.
        return self._row_group[1][reference.row].as_py() or b""
