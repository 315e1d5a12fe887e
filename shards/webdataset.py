"""WebDataset tar shards: write ours, list anybody's.

Ours are plain USTAR files whose bytes depend on the records alone (fixed time, owner and mode),
so every WebDataset reader takes them and two conversions can be compared by hash. The image of a
sample lies in the tar as it is; the index points straight at it, and nothing has to be unpacked.
"""

import json
import os
import struct
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from headrace.shards.atomic import HashedFile, atomic_file
from headrace.shards.index import ENCODED, INDEX_DTYPE, Record, ShardError, content_hash
from headrace.shards.manifest import ShardFile, read_manifest

BLOCK_BYTES = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
"""Extensions that mark the image of a sample, the preferred one first."""
LABEL_EXTENSIONS = ("cls", "label", "json")
"""Extensions that may hold a sample's label, asked in this order."""
_OWNER = "headrace"
_MODE = 0o444
_LABEL_BYTES_AT_MOST = 1 << 20  # a .json may be long; a label member beyond this is something else


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TarImage:
    """The image of one sample of a tar: member name, place of its bytes, label (-1 = none)."""

    key: str
    extension: str
    offset: int
    length: int
    label: int

    @property
    def name(self) -> str:
        """The member's name as it stands in the tar, extension in lower case."""
        return f"{self.key}.{self.extension}"


def write_tar(
    path: Path, records: Iterable[Record], shard: int = 0
) -> tuple[NDArray[np.void], ShardFile]:
    """Write one shard atomically; equal records give equal bytes.

    records: in id order; `extension` is "jpg" or "png"; shard: its number, for the index rows.
    Per sample, members `<id, 9 digits>.cls` (ASCII), `.jpg|.png`, `.json` ({"name", "label",
    "class" where known}), `.label` (little-endian int32).
    Returns the index rows [n] (`INDEX_DTYPE`, with offsets, hashes and `encoding` ENCODED; the name
    columns are filled by `write_index`) and the manifest's entry with the file's sha256.
    Raises `ShardError` for an extension or label that cannot be stored, OSError from the disk.
    """
    rows: list[tuple[int, ...]] = []
    with atomic_file(path) as file:
        hashed = HashedFile(file)
        # A stream, as `hashed` can do nothing but write.
        with tarfile.open(
            fileobj=cast(BinaryIO, hashed), mode="w|", format=tarfile.USTAR_FORMAT
        ) as archive:
            for record in records:
                image_offset = _add_sample(archive, path, record)
                rows.append(
                    (
                        shard,
                        image_offset,
                        len(record.image),
                        record.label,
                        record.height,
                        record.width,
                        content_hash(record.image),
                        0,
                        0,
                        ENCODED,
                    )
                )
        if not rows:
            raise ShardError(f"{path}: a shard needs at least one sample")
    written = ShardFile(path.name, len(rows), hashed.bytes_written, hashed.sha256)
    return np.array(rows, INDEX_DTYPE), written


def _add_sample(archive: tarfile.TarFile, path: Path, record: Record) -> int:
    """Append its members in the order of their extensions. Returns where the image's bytes lie."""
    image_offset = 0
    for extension, data in sorted(_members_of(path, record).items()):
        header = tarfile.TarInfo(f"{record.id:09d}.{extension}")
        header.size, header.mtime, header.mode = len(data), 0, _MODE
        header.uname = header.gname = _OWNER
        if extension == record.extension:
            image_offset = archive.offset + BLOCK_BYTES
        archive.addfile(header, BytesIO(data))
    return image_offset


def _members_of(path: Path, record: Record) -> dict[str, bytes]:
    if record.extension not in ("jpg", "png"):
        raise ShardError(
            f"{path}: sample {record.id} ({record.name!r}) has the extension "
            f"{record.extension!r}; jpg and png can be stored, convert it first"
        )
    if not -1 <= record.label < 1 << 31:
        raise ShardError(
            f"{path}: sample {record.id} ({record.name!r}) has the label {record.label}; "
            "a class number, or -1 for none"
        )
    description: dict[str, str | int] = {"name": record.name, "label": record.label}
    if record.class_name is not None:
        description["class"] = record.class_name
    return {
        "cls": str(record.label).encode("ascii"),
        record.extension: record.image,
        "json": json.dumps(description, sort_keys=True).encode("ascii"),
        "label": struct.pack("<i", record.label),
    }


def iterate_members(path: Path) -> Iterator[Member]:
    """The regular files of an uncompressed tar, in order.

    Raises `ShardError` if the file is no tar, is compressed, or ends too early.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                # Otherwise tarfile keeps every header in memory.
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if not member.isreg():
                    continue
                if member.issparse():
                    raise ShardError(f"{path}: {member.name} is stored sparse; pack it plainly")
                yield Member(member.name, member.offset_data, member.size)
            end = archive.offset
    except tarfile.TarError as error:
        raise ShardError(
            f"{path} is not a whole, uncompressed tar ({error}): unpack it from its compression, "
            "or fetch it again"
        ) from error
    # tarfile takes a damaged header for the end; the true end is a block of zeros.
    with path.open("rb") as file:
        if os.pread(file.fileno(), BLOCK_BYTES, end) != bytes(BLOCK_BYTES):
            raise ShardError(f"{path} is damaged or cut off at byte {end}: fetch or write it again")


def scan_tar(path: Path) -> Iterator[TarImage]:
    """The samples of anybody's WebDataset tar, in order of their images.

    Members belong together by path up to the first dot of the file name, the rest is the
    extension, upper case or not. Members of a sample need not be neighbours. The label comes from
    `.cls` (ASCII), else `.label` (ASCII or little-endian int32/int64), else an integer "label" or
    "cls" in `.json`; -1 if there is none. Samples without an image are passed over.
    Raises `ShardError` if there is no image at all, if a sample has one member twice, or if `.cls`
    or `.label` is not an integer.
    """
    samples: dict[str, dict[str, Member]] = {}
    file_bytes = path.stat().st_size
    for member in iterate_members(path):
        if member.offset + member.length > file_bytes:
            raise ShardError(f"{path} ends inside {member.name}: fetch or write it again")
        directory, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            continue  # hidden files, and metadata of the tar itself
        key = f"{directory}/{stem}" if directory else stem
        sample = samples.setdefault(key, {})
        extension = extension.lower()
        if extension in sample:
            raise ShardError(
                f"{path} holds {key}.{extension} twice: keys must be unique within a tar, and a "
                "key ends at the first dot of the file name"
            )
        sample[extension] = member
    with path.open("rb") as file:
        images = 0
        for key, sample in samples.items():
            extension = next((name for name in IMAGE_EXTENSIONS if name in sample), None)
            if extension is None:
                continue
            images += 1
            image = sample[extension]
            label = _label(path, key, sample, file)
            yield TarImage(key, extension, image.offset, image.length, label)
    if not images:
        seen = sorted({extension for sample in samples.values() for extension in sample})[:10]
        raise ShardError(
            f"{path} holds no image: members with the extensions {', '.join(IMAGE_EXTENSIONS)} "
            f"are images, found: {', '.join(seen) or 'no member'}"
        )


def _label(path: Path, key: str, sample: dict[str, Member], file: BinaryIO) -> int:
    for extension in LABEL_EXTENSIONS:
        member = sample.get(extension)
        if member is None or member.length > _LABEL_BYTES_AT_MOST:
            continue
        data = os.pread(file.fileno(), member.length, member.offset)
        label = _parse_label(extension, data)
        if label is None:
            continue
        if not isinstance(label, int) or not -1 <= label < 1 << 31:
            raise ShardError(
                f"{path}: the label of {key} in .{extension} is {label!r}; a class number from 0, "
                "or -1 for none, is expected"
            )
        return label
    return -1


def _parse_label(extension: str, data: bytes) -> int | bytes | None:
    """An int, None if the member says nothing of a class number, or the bytes that are not one."""
    if extension == "json":
        try:
            values = json.loads(data)
        except ValueError:
            return None
        label = values.get("label", values.get("cls")) if isinstance(values, dict) else None
        return label if isinstance(label, int) and not isinstance(label, bool) else None
    try:
        return int(data)
    except ValueError:
        if extension == "label" and len(data) in (4, 8):
            return int.from_bytes(data, "little", signed=True)
        return data[:40]


def export_dali_index(directory: Path) -> list[Path]:
    """Write `<shard>.idx` beside each tar of our data set, for DALI's own `readers.webdataset`.

    Text, version v1.2: a line with the number of samples, then for each sample
    `extension offset length name` of every member. Returns the paths in shard order.
    """
    manifest = read_manifest(directory)
    if manifest.format != "webdataset":
        raise ShardError(f"{directory} is a {manifest.format} data set; DALI's index is for tars")
    written = []
    for shard in manifest.shards:
        samples: dict[str, list[Member]] = {}
        for member in iterate_members(directory / shard.file):
            samples.setdefault(member.name.partition(".")[0], []).append(member)
        lines = [f"v1.2 {len(samples)}"]
        for members in samples.values():
            parts = [f"{m.name.partition('.')[2]} {m.offset} {m.length} {m.name}" for m in members]
            lines.append(" ".join(parts))
        path = (directory / shard.file).with_suffix(".idx")
        with atomic_file(path) as file:
            file.write(("\n".join(lines) + "\n").encode("ascii"))
        written.append(path)
    return written
