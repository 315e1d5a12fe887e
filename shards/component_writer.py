"""Write a component (component.py) in parts: stopped at any time, it goes on where it was.

Parts first, then one .beton file, then the manifest, after which the component exists.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.shards.atomic import PARTIAL_SUFFIX, atomic_file
from headrace.shards.beton import beton_item, write_beton
from headrace.shards.component import component_directory
from headrace.shards.dataset import BETON_FILE
from headrace.shards.index import ENCODED, INDEX_DTYPE, RAW, ShardError, content_hash, write_index
from headrace.shards.manifest import (
    MANIFEST_FILE,
    PARTS_DIRECTORY,
    Manifest,
    read_manifest,
    tool_version,
    write_manifest,
)
from headrace.shards.parts import (
    JPG,
    PIXELS,
    Note,
    data_path,
    read_parts,
    read_stored,
    table_path,
)
from headrace.shards.store import Store

_PLAN_FILE = "plan.json"
_SAMPLES_PER_PART = 1024


@dataclass(frozen=True)
class ComponentWriter:
    """Writes one component in parts of consecutive samples; a writer of the same goes on.

    options: JSON values that say how it is made; another writer's must be equal. Made by
    `begin_component`.
    """

    store: Store
    directory: Path
    options: Mapping[str, Any]

    @property
    def parts_directory(self) -> Path:
        """For parts, and for what else is needed until the component is there."""
        return self.directory / PARTS_DIRECTORY

    def missing(self) -> list[tuple[int, range]]:
        """(number, ids) of each part that is not there yet, in order."""
        starts = range(0, len(self.store), _SAMPLES_PER_PART)
        return [
            (part, range(start, min(start + _SAMPLES_PER_PART, len(self.store))))
            for part, start in enumerate(starts)
            if not table_path(self.parts_directory, part).exists()
        ]

    def write(self, part: int, images: Sequence[bytes], notes: Sequence[Note] = ()) -> None:
        """A part: one JPEG or PNG per sample of it, in order, and what is to be reported."""
        items = [beton_item(image) for image in images]
        with atomic_file(data_path(self.parts_directory, part)) as file:
            for item in items:
                file.write(item.data)
        table = {
            "length": [len(item.data) for item in items],
            "height": [item.height for item in items],
            "width": [item.width for item in items],
            "content_hash": [content_hash(item.data) for item in items],
            "kind": [JPG if item.encoding == ENCODED else PIXELS for item in items],
            "notes": [[note.name, note.action, note.reason, note.detail] for note in notes],
        }
        with atomic_file(table_path(self.parts_directory, part)) as file:
            file.write(json.dumps(table).encode("ascii"))

    def finish(self) -> Manifest:
        """From parts to the component. Raises `ShardError` while parts are missing."""
        parts = -(-len(self.store) // _SAMPLES_PER_PART)
        if missing := self.missing():
            raise ShardError(f"{self.directory}: {len(missing)} of {parts} parts are not there yet")
        table, notes = read_parts(self.parts_directory, parts)
        ids = np.arange(len(self.store), dtype=np.int64)
        rows = np.zeros(len(table), INDEX_DTYPE)
        for column in ("length", "height", "width", "content_hash"):
            rows[column] = table[column]
        rows["label"] = -1
        rows["encoding"] = np.where(table["kind"] == JPG, ENCODED, RAW)
        if (np.stack((rows["height"], rows["width"]), axis=1) != self.store.sizes(ids)).any():
            raise ShardError(f"{self.directory}: parts have other sizes than the samples have")
        stored = (read_stored(self.parts_directory, row) for row in table)
        rows, shard = write_beton(self.directory / BETON_FILE, rows, stored)
        hashes = write_index(self.directory, rows, _names(self.store))
        repairs = Counter(note.reason for note in notes)
        manifest = Manifest(
            format="beton",
            samples=len(rows),
            classes=(),
            shards=(shard,),
            index=hashes,
            options=dict(self.options),
            tool=tool_version(),
            repairs=dict(repairs),
        )
        write_manifest(self.directory, manifest)
        shutil.rmtree(self.parts_directory)
        return manifest


def begin_component(store: Store, name: str, options: Mapping[str, Any]) -> ComponentWriter | None:
    """A writer of the store's component `name`; None where that is there already, made alike.

    options: see `ComponentWriter`. Raises `ShardError` where one is there, or begun, that was made
    with other options or for another data set.
    """
    directory = component_directory(store, name)
    requested = json.loads(json.dumps({**options, "component_of": store.fingerprint}))
    if (directory / MANIFEST_FILE).is_file():
        _compare(directory, dict(read_manifest(directory).options), requested)
        return None
    writer = ComponentWriter(store, directory, requested)
    writer.parts_directory.mkdir(parents=True, exist_ok=True)
    plan = writer.parts_directory / _PLAN_FILE
    if plan.exists():
        _compare(directory, json.loads(plan.read_bytes()), requested)
        for place in (directory, writer.parts_directory):
            for left_over in place.glob(f".*{PARTIAL_SUFFIX}"):
                left_over.unlink()
    else:
        with atomic_file(plan) as file:
            file.write(json.dumps(requested, sort_keys=True, indent=2).encode("ascii"))
    return writer


def _compare(directory: Path, there: dict[str, Any], requested: dict[str, Any]) -> None:
    differing = sorted(
        key for key in there.keys() | requested.keys() if there.get(key) != requested.get(key)
    )
    if differing:
        listed = ", ".join(f"{key} is {there.get(key)} there" for key in differing)
        raise ShardError(
            f"{directory} holds a component that was made, or begun, otherwise ({listed}): repeat "
            f"those options, take another name, or delete it yourself"
        )


def _names(store: Store) -> Iterator[str]:
    for start in range(0, len(store), _SAMPLES_PER_PART):
        yield from store.names(np.arange(start, min(start + _SAMPLES_PER_PART, len(store))))
