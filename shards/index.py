"""The binary index of a data set: where each sample lies, and what is known without reading it.

One fixed-size row per sample, row number = sample id, mapped into memory: opening a million
samples costs a page fault, and sizes and labels are there before any image byte is read. Names are
of varying length and rarely needed, so they live in a second file that the rows point into.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b, file_digest
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.shards.atomic import atomic_file
from headrace.shards.errors import UserError

ENCODED = 0
"""`encoding` of a row whose bytes are an image file (JPEG, PNG, ...)."""
RAW = 1
"""`encoding` of a row whose bytes are height x width x 3 uint8 RGB pixels without a header."""

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # number of the shard file
        ("offset", "<u8"),  # of the image's first byte in the shard file
        ("length", "<u8"),  # of the image, bytes
        ("label", "<i4"),  # -1 = none
        ("height", "<u4"),  # pixels as stored, EXIF rotation ignored
        ("width", "<u4"),
        ("content_hash", "<u8"),  # content_hash(stored bytes); 0 = not computed
        ("name_offset", "<u8"),  # into names.bin
        ("name_length", "<u4"),  # bytes
        ("encoding", "u1"),  # ENCODED or RAW
    ]
)
INDEX_FILE = "index.npy"
NAMES_FILE = "names.bin"


class ShardError(UserError):
    """Something about a data set on disk is wrong; says what, where, and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sample on its way into a shard.

    `image` is a whole JPEG or PNG file and `extension` says which; `height` and `width` are its
    pixels as stored. `label` is -1 where there is none, `class_name` None where unknown.
    """

    id: int
    name: str
    label: int
    class_name: str | None
    image: bytes
    extension: str
    height: int
    width: int


@dataclass(frozen=True)
class Index:
    """An open index. `rows` [n] of `INDEX_DTYPE` and `names` uint8 [bytes], both read-only."""

    rows: NDArray[np.void]
    names: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, sample_id: int) -> str:
        """The name that the sample had in its source (undecodable bytes as surrogates)."""
        row = self.rows[sample_id]
        start = int(row["name_offset"])
        return decode_name(self.names[start : start + int(row["name_length"])].tobytes())


def content_hash(data: bytes | memoryview) -> int:
    """64-bit BLAKE2b of the bytes as stored in the shard, for finding damage and duplicates."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def encode_name(name: str) -> bytes:
    """UTF-8; names that the file system gave in another encoding keep their bytes."""
    return name.encode("utf-8", "surrogateescape")


def decode_name(data: bytes) -> str:
    """The inverse of `encode_name`."""
    return data.decode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    """A name on one line, for a terminal or a picture: undecodable bytes and control characters
    are escaped (\\xe9, \\n)."""
    return "".join(map(_escaped, name))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that is no UTF-8, as `decode_name` keeps it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def with_names(rows: NDArray[np.void], names: Iterable[str]) -> tuple[NDArray[np.void], bytes]:
    """A copy of `rows` that points at `names` (one per row), and the bytes of names.bin."""
    encoded = [encode_name(name) for name in names]
    if len(encoded) != len(rows):
        raise ShardError(f"{len(rows)} index rows came with {len(encoded)} names; one per row")
    named = np.array(rows, INDEX_DTYPE)
    lengths = [len(name) for name in encoded]
    named["name_length"] = lengths
    named["name_offset"] = list(accumulate(lengths, initial=0))[:-1]
    return named, b"".join(encoded)


def write_index(directory: Path, rows: NDArray[np.void], names: Iterable[str]) -> dict[str, str]:
    """Write `index.npy` and `names.bin`, each atomically; returns file name -> sha256 (hex).

    rows: [n] of `INDEX_DTYPE` in id order, n > 0; `name_offset` and `name_length` are filled in
    here. names: one per row. Raises `ShardError` if there is no row or the counts differ.
    """
    if len(rows) == 0:
        raise ShardError(f"{directory}: there is no sample to index")
    named, name_bytes = with_names(rows, names)
    with atomic_file(directory / NAMES_FILE) as file:
        file.write(name_bytes)
    with atomic_file(directory / INDEX_FILE) as file:
        np.lib.format.write_array(file, named, version=(1, 0), allow_pickle=False)
    return {name: hash_file(directory / name) for name in (INDEX_FILE, NAMES_FILE)}


def hash_file(path: Path) -> str:
    """sha256 (hex) of a whole file."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def read_index(directory: Path) -> Index:
    """Map the index of `directory` into memory; takes the same time for any number of samples.

    Raises `ShardError` if a file is missing, damaged, or of another layout.
    """
    path, names_path = directory / INDEX_FILE, directory / NAMES_FILE
    remedy = "write the data set again, or restore the file"
    for needed in (path, names_path):
        if not needed.is_file():
            raise ShardError(f"{needed} is missing: {remedy}")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ShardError(f"{path} is damaged ({error}): {remedy}") from error
    if rows.dtype != INDEX_DTYPE or rows.ndim != 1 or len(rows) == 0:
        raise ShardError(f"{path} has rows of another layout than this version reads: {remedy}")
    name_bytes = int(rows["name_offset"][-1]) + int(rows["name_length"][-1])
    if names_path.stat().st_size != name_bytes:
        raise ShardError(
            f"{names_path} has {names_path.stat().st_size} bytes where {INDEX_FILE} says "
            f"{name_bytes}: {remedy}"
        )
    # An empty file cannot be mapped.
    names = np.memmap(names_path, np.uint8, "r") if name_bytes else np.zeros(0, np.uint8)
    return Index(np.asarray(rows), np.asarray(names))  # views: plain arrays index faster
