"""Arrays as a source: `<split>.npz` with `images`, `labels` and `classes`."""

from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from headrace.shards.index import ShardError
from headrace.shards.manifest import ClassName
from headrace.shards.sources.samples import ArrayReference, Sample, SourceSplit, open_images

_LAYOUT = "images uint8 [n, height, width, 3], labels integer [n], classes str [k]"


def list_arrays(files: Mapping[str, list[Path]], only: str | None) -> list[SourceSplit]:
    """List .npz files, given by split; one file per split. Names are `<file stem>/<row>`."""
    splits: list[SourceSplit] = []
    for name, paths in files.items():
        if only not in (None, name) or (name == "" and len(files) > 1):
            continue
        if len(paths) > 1:
            listed = ", ".join(path.name for path in paths)
            raise ShardError(f"{paths[0].parent}: {listed} are all a {name} split; keep one")
        splits.append(_list_file(name, paths[0]))
    if len({split.classes for split in splits}) > 1:
        raise ShardError(f"{splits[0].kind}: the splits do not have the same classes")
    return splits


def _list_file(split: str, path: Path) -> SourceSplit:
    try:
        images = open_images(str(path))
        with np.load(path, allow_pickle=False) as arrays:
            labels, classes = arrays["labels"], [str(name) for name in arrays["classes"]]
    except (KeyError, ValueError, BadZipFile, EOFError) as error:
        raise ShardError(f"{path} cannot be used ({error}); expected {_LAYOUT}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ShardError(f"{path}: images are {images.dtype} {images.shape}; expected {_LAYOUT}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ShardError(f"{path}: labels are {labels.dtype} {labels.shape}; expected {_LAYOUT}")
    if len(labels) and not (labels.min() >= -1 and labels.max() < len(classes)):
        raise ShardError(f"{path}: labels must be from 0 to {len(classes) - 1}, or -1 for none")
    samples = [
        Sample(f"{path.stem}/{row:08d}", int(label), ArrayReference(str(path), row))
        for row, label in enumerate(labels)
    ]
    return SourceSplit(split, "arrays", tuple(ClassName(name) for name in classes), samples)
