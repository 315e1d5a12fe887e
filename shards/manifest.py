"""What is in a data set: shards with sizes and hashes, classes, counts, options.

The manifest is canonical JSON without times or machine paths, so equal data sets have equal
manifests, and its hash is the data set's fingerprint. It is written last: a directory that has a
manifest is complete.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import features

from headrace.shards.atomic import atomic_file
from headrace.shards.index import ShardError

Format = Literal["webdataset", "beton"]
MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
PARTS_DIRECTORY = ".parts"  # beside or instead of a manifest: the conversion is under way


@dataclass(frozen=True)
class ClassName:
    """A class; its position in the manifest is its label. `name` is for humans, "" if unknown."""

    id: str
    name: str = ""


@dataclass(frozen=True)
class ShardFile:
    """One shard: file name inside the data set's directory, samples, bytes, sha256 (hex)."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    index: index file -> sha256 (hex): labels and names are part of what the fingerprint covers.
    options: what the conversion was asked for (JSON values only). tool: name and versions of what
    wrote the set. repairs, omissions: reason -> number of samples; names are in report.jsonl.
    """

    format: Format
    samples: int
    classes: tuple[ClassName, ...]
    shards: tuple[ShardFile, ...]
    index: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    tool: str = ""
    repairs: Mapping[str, int] = field(default_factory=dict)
    omissions: Mapping[str, int] = field(default_factory=dict)
    version: int = MANIFEST_VERSION

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, two spaces, ASCII, a newline at the end."""
        return json.dumps(asdict(self), sort_keys=True, indent=2) + "\n"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON: equal for equal data sets."""
        return sha256(self.to_json().encode("ascii")).hexdigest()


def tool_version() -> str:
    """What the bytes of a data set depend on besides its source and options."""
    try:
        headrace_version = version("headrace")
    except PackageNotFoundError:
        headrace_version = "unknown"
    libraries = {name: version(name) for name in ("pillow", "simplejpeg", "webdataset")}
    libraries["libjpeg-turbo"] = str(features.version("libjpeg_turbo"))
    listed = ", ".join(f"{name} {libraries[name]}" for name in sorted(libraries))
    return f"headrace {headrace_version} ({listed})"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically. Write it last: it declares the directory complete."""
    counted = sum(shard.samples for shard in manifest.shards)
    if counted != manifest.samples:
        raise ShardError(
            f"{directory}: the shards hold {counted} samples, the manifest says {manifest.samples}"
        )
    with atomic_file(directory / MANIFEST_FILE) as file:
        file.write(manifest.to_json().encode("ascii"))


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`. Raises `ShardError` naming the file and the key."""
    path = directory / MANIFEST_FILE
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ShardError(
            f"{directory} has no {MANIFEST_FILE}: it is no finished data set; "
            "run the conversion (again), it continues where it stopped"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path} cannot be read ({error}): write the data set again") from error
    if not isinstance(values, dict):
        raise ShardError(f"{path} is not a JSON object: write the data set again")
    if values.get("version") != MANIFEST_VERSION:
        raise ShardError(
            f"{path} has version {values.get('version')!r}, this program reads version "
            f"{MANIFEST_VERSION}: write the data set again"
        )
    _check_keys(path, "", values, Manifest)
    if values["format"] not in get_args(Format):
        raise ShardError(f"{path}: format is {values['format']!r}; one of {get_args(Format)}")
    _check_type(path, "samples", values["samples"], int)
    _check_type(path, "tool", values["tool"], str)
    for key in ("index", "options", "repairs", "omissions"):
        _check_type(path, key, values[key], dict)
    for key, kind in (("classes", ClassName), ("shards", ShardFile)):
        _check_type(path, key, values[key], list)
        for position, entry in enumerate(values[key]):
            _check_type(path, f"{key}[{position}]", entry, dict)
            _check_keys(path, f"{key}[{position}]", entry, kind)
            for part in fields(kind):
                expected = int if part.type in (int, "int") else str
                _check_type(path, f"{key}[{position}].{part.name}", entry[part.name], expected)
        values[key] = tuple(kind(**entry) for entry in values[key])
    return Manifest(**values)


def _check_keys(path: Path, where: str, values: dict[str, Any], kind: type) -> None:
    expected = {part.name for part in fields(kind)}
    if values.keys() != expected:
        wrong = ", ".join(sorted(values.keys() ^ expected))
        raise ShardError(f"{path}: {where or 'the object'} has missing or unknown keys: {wrong}")


def _check_type(path: Path, key: str, value: object, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ShardError(f"{path}: {key} is {value!r}, not {kind.__name__}")
