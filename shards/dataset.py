"""A finished data set directory from records in final order, in one go.

The end of every conversion, and all of a small one: shards, then the index, then the manifest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

import numpy as np

from headrace.shards.beton import beton_item, write_beton
from headrace.shards.index import INDEX_DTYPE, Record, write_index
from headrace.shards.manifest import ClassName, Format, Manifest, write_manifest
from headrace.shards.webdataset import write_tar

BETON_FILE = "data.beton"


def tar_file(shard: int) -> str:
    """The name of a tar shard inside its data set."""
    return f"shard-{shard:06d}.tar"


def write_dataset(
    directory: Path,
    format: Format,  # noqa: A002  (the word of the manifest and of the command line)
    records: Sequence[Record],
    classes: Sequence[ClassName] = (),
    *,
    samples_per_shard: int = 1000,
    options: Mapping[str, Any] | None = None,
    tool: str = "headrace",
) -> Manifest:
    """Write `records` (ids 0..n-1 in order) as a data set that `open_store` opens.

    samples_per_shard: for webdataset; .beton is one file. Everything passes through memory: for
    what fits there. Raises `ShardError` for what cannot be stored.
    """
    directory.mkdir(parents=True, exist_ok=True)
    match format:
        case "webdataset":
            tables, shards = [], []
            for number, start in enumerate(range(0, len(records), samples_per_shard)):
                part = records[start : start + samples_per_shard]
                rows, shard = write_tar(directory / tar_file(number), part, number)
                tables.append(rows)
                shards.append(shard)
            rows = np.concatenate(tables) if tables else np.zeros(0, INDEX_DTYPE)
        case "beton":
            items = [beton_item(record.image) for record in records]
            rows = np.zeros(len(records), INDEX_DTYPE)
            for row, record, item in zip(rows, records, items, strict=True):
                row["label"], row["length"] = record.label, len(item.data)
                row["height"], row["width"] = item.height, item.width
                row["encoding"] = item.encoding
            rows, shard = write_beton(directory / BETON_FILE, rows, (item.data for item in items))
            shards = [shard]
        case _:
            assert_never(format)
    hashes = write_index(directory, rows, [record.name for record in records])
    manifest = Manifest(
        format, len(records), tuple(classes), tuple(shards), hashes, dict(options or {}), tool
    )
    write_manifest(directory, manifest)
    return manifest
