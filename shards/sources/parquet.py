"""Parquet as Hugging Face writes it: a column of image bytes and a column of labels.

Class names come from the schema's `huggingface` metadata. Only labels and paths are read to list a
file; image bytes are read by the workers, a row group at a time.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.shards.class_numbers import ClassNumbers, class_numbers, numbered_by
from headrace.shards.index import ShardError
from headrace.shards.manifest import ClassName
from headrace.shards.sources.samples import ParquetReference, Sample, SourceSplit
from headrace.shards.split_names import splits_in

if TYPE_CHECKING:
    import pyarrow

_LABEL_COLUMNS = ("label", "labels", "fine_label")
_PART = re.compile(r"[^=]+=.*|([a-zA-Z]+[-_]?)?\d+")  # a folder that is a part: year=2020, part-07
_Label = int | str | None


@dataclass(frozen=True)
class _Listed:
    """Samples of some files, all labels -1 as yet, and what their label column holds.

    class_names: of a ClassLabel column, () where there are none. notes: what is not used.
    """

    samples: list[Sample]
    labels: list[_Label]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def list_parquet(files: Mapping[str, Sequence[Path]], only: str | None) -> list[SourceSplit]:
    """List Parquet files, given by split; a split's files count in the order given.

    A sample's name is the path stored beside its bytes, else `<file stem>/<row>`. Labels are whole
    numbers, or text, whose sorted distinct values are the classes. Every split is numbered by
    train's classes.
    Raises `ShardError` if pyarrow is missing, a file has no column of image bytes, or a split has a
    class that train lacks.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ShardError(
            "reading Parquet needs pyarrow, which is not installed: pip install pyarrow"
        ) from error
    if "" in files and len(files) > 1:
        path = files[""][0]
        raise ShardError(f"{path}: its name says no split, but other files' do; move it away")
    for paths in files.values():
        _require_one_set(paths)
    train = None
    if "train" in files:
        listed = _list_files(files["train"])
        train = listed, _numbered(files["train"][0], listed)
    splits: list[SourceSplit] = []
    for name, paths in files.items():
        if only not in (None, name):
            continue
        if name == "train" and train is not None:
            listed, numbers = train
        else:
            listed = _list_files(paths)
            numbers = _numbered(paths[0], listed)
            if train is not None and train[1].classes and numbers.classes:
                numbers = numbered_by(numbers, train[1].classes, f"{name} ({paths[0]})")
        samples = [
            replace(sample, label=label)
            for sample, label in zip(listed.samples, numbers.labels.tolist(), strict=True)
        ]
        classes = tuple(ClassName(class_name) for class_name in numbers.classes)
        notes = (*listed.notes, *numbers.notes)
        splits.append(SourceSplit(name, "Parquet", classes, samples, notes))
    return splits


def _require_one_set(paths: Sequence[Path]) -> None:
    """Raise `ShardError` where the files of a split lie in folders that say different things, as a
    data set of several configurations has them. Numbered parts of one set are joined."""
    folders: set[Path] = set()
    for path in paths:
        folder = path.parent
        while splits_in(folder.name):
            folder = folder.parent
        folders.add(folder)
    if len(folders) > 1 and not all(_PART.fullmatch(folder.name) for folder in folders):
        listed = ", ".join(str(folder) for folder in sorted(folders))
        raise ShardError(
            f"{len(folders)} folders hold Parquet files of one split: name one, {listed}"
        )


def _list_files(paths: Sequence[Path]) -> _Listed:
    first, *rest = (_list_file(path) for path in paths)
    samples, labels, notes = list(first.samples), list(first.labels), list(first.notes)
    for path, listed in zip(paths[1:], rest, strict=True):
        if listed.class_names != first.class_names:
            raise ShardError(f"{path} names other classes than {paths[0]}")
        samples += listed.samples
        labels += listed.labels
        notes += listed.notes
    return _Listed(samples, labels, first.class_names, tuple(dict.fromkeys(notes)))


def _numbered(path: Path, listed: _Listed) -> ClassNumbers:
    """The class numbers of a label column. Raises `ShardError`."""
    texts = sorted({label for label in listed.labels if isinstance(label, str)})
    if texts:
        position = {text: number for number, text in enumerate(texts)}
        if any(isinstance(label, int) for label in listed.labels):
            raise ShardError(f"{path}: labels are text there and numbers in another file")
        numbers = [-1 if label is None else position[str(label)] for label in listed.labels]
        note = "labels are text: the classes are its sorted distinct values"
        return ClassNumbers(np.array(numbers, np.int64), tuple(texts), (note,))
    labels = np.array([-1 if label is None else label for label in listed.labels], np.int64)
    if len(labels) and labels.min() < -1:
        raise ShardError(f"{path}: the label column holds labels below -1")
    if not listed.class_names:
        return class_numbers(labels)
    highest = int(labels.max(initial=-1))
    if highest >= len(listed.class_names):
        raise ShardError(f"{path}: label {highest}, but only {len(listed.class_names)} class names")
    return ClassNumbers(labels, listed.class_names)


def _list_file(path: Path) -> _Listed:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            features = _features(schema.metadata)
            image = _image_column(path, schema)
            label, notes = _label_column(schema, features, image)
            has_paths = schema.field(image).type.get_field_index("path") >= 0
            columns = [f"{image}.path"] * has_paths + ([] if label is None else [label])
            samples: list[Sample] = []
            labels: list[_Label] = []
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                count = file.metadata.row_group(group).num_rows
                cells = table.column(image).to_pylist() if has_paths else [None] * count
                samples += [
                    Sample(
                        (cell or {}).get("path") or f"{path.stem}/{len(samples) + row:08d}",
                        -1,
                        ParquetReference(str(path), image, group, row),
                    )
                    for row, cell in enumerate(cells)
                ]
                labels += [None] * count if label is None else table.column(label).to_pylist()
    except pyarrow.ArrowException as error:
        raise ShardError(f"{path} is damaged or no Parquet file: {error}") from error
    class_names = features.get(label or "", {}).get("names") or ()
    return _Listed(samples, labels, tuple(str(name) for name in class_names), notes)


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def _image_column(path: Path, schema: "pyarrow.Schema") -> str:
    import pyarrow

    columns = [
        field.name
        for field in schema
        if pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    if len(columns) != 1:
        raise ShardError(
            f"{path} has {len(columns)} columns of image bytes (of {', '.join(schema.names)}); "
            "expected one, a struct with `bytes` and `path`, as Hugging Face's Image feature"
        )
    return columns[0]


def _label_column(
    schema: "pyarrow.Schema", features: Mapping[str, Any], image: str
) -> tuple[str | None, tuple[str, ...]]:
    """The column of labels, None if there is none, and notes on columns that look like one."""
    named = [name for name in _LABEL_COLUMNS if name in schema.names]
    declared = [
        name
        for name in schema.names
        if isinstance(features.get(name), dict) and features[name].get("_type") == "ClassLabel"
    ]
    usable = [name for name in (*named, *declared) if _is_label(schema.field(name).type)]
    if usable and (usable[0] in named or len(declared) == 1):
        others = [name for name in dict.fromkeys((*named, *declared)) if name != usable[0]]
        return usable[0], tuple(f"the column {name!r} is not used" for name in others)
    if named:
        held = schema.field(named[0]).type
        return None, (f"the column {named[0]!r} holds {held}, no class numbers, and is not used",)
    others = [
        f"{field.name} ({field.type})"
        for field in schema
        if field.name != image and _is_label(field.type)
    ]
    note = f"no column is called {', '.join(_LABEL_COLUMNS)}; not read: {', '.join(others)}"
    return None, (note,) if others else ()


def _is_label(kind: "pyarrow.DataType") -> bool:
    """Whole numbers or text."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
