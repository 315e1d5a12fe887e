"""Parts: the intermediate files of a conversion, written in parallel and never half.

A part holds the stored bytes of some consecutive samples of the source, one behind the other, and a
JSON file beside it says what they are. Parts follow the order of the *source*, so tars and Parquet
files are read forwards, once; the shuffle happens when parts become shards. What is in a part
depends on the source and the options alone, so a conversion that was killed goes on with whatever
parts are complete.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from headrace.shards.atomic import atomic_file
from headrace.shards.beton import beton_item
from headrace.shards.encode import Encoded, EncodeOptions, LeftOut, encode, encode_pixels
from headrace.shards.index import RAW, ShardError, content_hash
from headrace.shards.manifest import Format
from headrace.shards.sources import Sample, SampleReader

LEFT_OUT, JPG, PNG, PIXELS = range(4)
"""What a sample's bytes in a part are; PIXELS are raw RGB without a header."""
EXTENSIONS = {JPG: "jpg", PNG: "png"}

PART_DTYPE = np.dtype(
    [
        ("part", "<u4"),
        ("offset", "<u8"),  # in the part's data file
        ("length", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("content_hash", "<u8"),
        ("kind", "u1"),
    ]
)


@dataclass(frozen=True)
class Note:
    """A line of report.jsonl: what was done to a sample. action: "repaired" or "left out"."""

    name: str
    action: str
    reason: str
    detail: str = ""

    def to_json(self) -> str:
        """One line of JSON, ASCII, without the detail if there is none."""
        values = {"name": self.name, "action": self.action, "reason": self.reason}
        if self.detail:
            values["detail"] = self.detail
        return json.dumps(values)


def data_path(directory: Path, part: int) -> Path:
    """Where a part's bytes lie."""
    return directory / f"part-{part:06d}.bin"


def table_path(directory: Path, part: int) -> Path:
    """Where a part is described. Written last: a part that has it is complete."""
    return directory / f"part-{part:06d}.json"


def write_part(
    directory: Path,
    part: int,
    samples: Sequence[Sample],
    options: EncodeOptions,
    format: Format,  # noqa: A002  (the word of the manifest and of the command line)
) -> int:
    """Read, check and encode `samples`, and write them as one part. Returns their number.

    Raises `ShardError` if a source cannot be read; images that cannot be used are noted, not
    raised. OSError from the disk that is written to.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    notes: list[Note] = []
    reader = SampleReader()
    try:
        with atomic_file(data_path(directory, part)) as file:
            for sample in samples:
                source = reader.read(sample)
                result = _encode_for(source, options, format)
                match result:
                    case LeftOut(reason, detail):
                        notes.append(Note(sample.name, "left out", reason, detail))
                        rows.append((0, 0, 0, 0, LEFT_OUT))
                    case _Stored():
                        if result.repair is not None:
                            notes.append(Note(sample.name, "repaired", result.repair))
                        file.write(result.data)
                        digest = content_hash(result.data)
                        shape = (result.height, result.width)
                        rows.append((len(result.data), *shape, digest, result.kind))
                    case _:
                        assert_never(result)
    finally:
        reader.close()
    columns: list[Any] = [list(column) for column in zip(*rows, strict=True)]
    table = {
        **dict(zip(("length", "height", "width", "content_hash", "kind"), columns, strict=True)),
        "notes": [[note.name, note.action, note.reason, note.detail] for note in notes],
    }
    with atomic_file(table_path(directory, part)) as file:
        file.write(json.dumps(table).encode("ascii"))
    return len(samples)


def read_parts(directory: Path, parts: int) -> tuple[NDArray[np.void], list[Note]]:
    """All parts' tables: rows of `PART_DTYPE`, one per sample of the source, and the notes."""
    tables: list[NDArray[np.void]] = []
    notes: list[Note] = []
    for part in range(parts):
        values: Mapping[str, Any] = json.loads(table_path(directory, part).read_bytes())
        table = np.zeros(len(values["kind"]), PART_DTYPE)
        for column in ("length", "height", "width", "content_hash", "kind"):
            table[column] = values[column]
        table["part"] = part
        table["offset"][1:] = np.cumsum(table["length"])[:-1]
        tables.append(table)
        notes += [Note(*fields) for fields in values["notes"]]
    return np.concatenate(tables), notes


def read_stored(directory: Path, row: np.void) -> bytes:
    """The bytes that a row of `read_parts` points at. `ShardError` if they have changed."""
    path = data_path(directory, int(row["part"]))
    with path.open("rb") as file:
        file.seek(int(row["offset"]))
        data = file.read(int(row["length"]))
    if content_hash(data) != row["content_hash"]:
        raise ShardError(f"{path} is damaged: delete {directory} and run the conversion again")
    return data


@dataclass(frozen=True)
class _Stored:
    data: bytes
    kind: int
    height: int
    width: int
    repair: str | None


def _encode_for(
    source: bytes | NDArray[np.uint8],
    options: EncodeOptions,
    format: Format,  # noqa: A002
) -> _Stored | LeftOut:
    if isinstance(source, bytes):
        result = encode(source, options)
    elif format == "beton" and options == EncodeOptions():
        # The detour over PNG gives the same pixels, slower.
        return _Stored(source.tobytes(), PIXELS, source.shape[0], source.shape[1], None)
    else:
        result = encode_pixels(source, options)
    if isinstance(result, LeftOut):
        return result
    return _stored(result, format)


def _stored(encoded: Encoded, format: Format) -> _Stored:  # noqa: A002
    match format:
        case "webdataset":
            kind = JPG if encoded.extension == "jpg" else PNG
            return _Stored(encoded.data, kind, encoded.height, encoded.width, encoded.repair)
        case "beton":
            item = beton_item(encoded.data)
            kind = PIXELS if item.encoding == RAW else JPG
            return _Stored(item.data, kind, item.height, item.width, encoded.repair)
        case _:
            assert_never(format)
