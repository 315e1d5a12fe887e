"""Parquet as Hugging Face writes it: a column of image bytes and a column of labels.

Class names come from the schema's `huggingface` metadata. Only labels and paths are read to list a
file; image bytes are read by the workers, a row group at a time.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.shards.index import ShardError
from headrace.shards.manifest import ClassName
from headrace.shards.sources.samples import ParquetReference, Sample, SourceSplit

if TYPE_CHECKING:
    import pyarrow

_LABEL_COLUMNS = ("label", "labels", "fine_label")


def list_parquet(files: Mapping[str, Sequence[Path]], only: str | None) -> list[SourceSplit]:
    """List Parquet files, given by split; a split's files count in the order given.

    A sample's name is the path stored beside its bytes, else `<file stem>/<row>`.
    Raises `ShardError` if pyarrow is missing or a file has no column of image bytes.
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
    return [
        _list_split(name, paths) for name, paths in files.items() if only is None or only == name
    ]


def _list_split(name: str, paths: Sequence[Path]) -> SourceSplit:
    samples: list[Sample] = []
    classes: tuple[ClassName, ...] | None = None
    for path in paths:
        listed, names = _list_file(path)
        if classes is not None and names != classes:
            raise ShardError(f"{path} names other classes than {paths[0]}")
        classes = names
        samples += listed
    highest = max((sample.label for sample in samples), default=-1)
    if not classes:
        classes = tuple(ClassName(str(label)) for label in range(highest + 1))
    if highest >= len(classes):
        raise ShardError(f"{paths[0]}: label {highest}, but only {len(classes)} class names")
    return SourceSplit(name, "Parquet", classes, samples)


def _list_file(path: Path) -> tuple[list[Sample], tuple[ClassName, ...]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            features = _features(schema.metadata)
            image = _image_column(path, schema)
            label = _label_column(schema, features)
            has_paths = schema.field(image).type.get_field_index("path") >= 0
            columns = [f"{image}.path"] * has_paths + ([] if label is None else [label])
            samples: list[Sample] = []
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                count = file.metadata.row_group(group).num_rows
                cells = table.column(image).to_pylist() if has_paths else [{"path": None}] * count
                samples += [
                    Sample(
                        cell["path"] or f"{path.stem}/{len(samples) + row:08d}",
                        sample_label,
                        ParquetReference(str(path), image, group, row),
                    )
                    for row, (cell, sample_label) in enumerate(
                        zip(cells, _labels(path, table, label, count), strict=True)
                    )
                ]
    except pyarrow.ArrowException as error:
        raise ShardError(f"{path} is damaged or no Parquet file: {error}") from error
    class_names = features.get(label or "", {}).get("names") or ()
    return samples, tuple(ClassName(str(name)) for name in class_names)


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


def _label_column(schema: "pyarrow.Schema", features: Mapping[str, Any]) -> str | None:
    import pyarrow

    for name in _LABEL_COLUMNS:
        if name in schema.names and pyarrow.types.is_integer(schema.field(name).type):
            return name
    declared = [
        name
        for name in schema.names
        if isinstance(features.get(name), dict) and features[name].get("_type") == "ClassLabel"
    ]
    return declared[0] if len(declared) == 1 else None


def _labels(path: Path, table: "pyarrow.Table", label: str | None, count: int) -> list[int]:
    if label is None:
        return [-1] * count
    labels = [-1 if value is None else value for value in table.column(label).to_pylist()]
    if any(value < -1 for value in labels):
        raise ShardError(f"{path}: the column {label} holds labels below -1")
    return labels
