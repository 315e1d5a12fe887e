"""WebDataset tar shards of ours, written. `tar_samples` reads them, and anybody else's.

Ours are plain USTAR files whose bytes depend on the records alone (fixed time, owner and mode),
so every WebDataset reader takes them and two conversions can be compared by hash. The image of a
sample lies in the tar as it is; the index points straight at it, and nothing has to be unpacked.
"""

import json
import struct
import tarfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from headrace.shards.atomic import HashedFile, atomic_file
from headrace.shards.index import ENCODED, INDEX_DTYPE, Record, ShardError, content_hash
from headrace.shards.manifest import ShardFile, read_manifest
from headrace.shards.tar_samples import BLOCK_BYTES, Member, iterate_members

_OWNER = "headrace"
_MODE = 0o444


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
