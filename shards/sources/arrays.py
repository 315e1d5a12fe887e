"""Arrays as a source: `<split>.npz`, CIFAR's pickles, downsampled ImageNet in its parts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.shards.index import ShardError
from headrace.shards.manifest import ClassName
from headrace.shards.sources.array_files import (
    ARRAY_ERRORS,
    open_images,
    read_class_names,
    read_labels_and_classes,
)
from headrace.shards.sources.labels import number_labels
from headrace.shards.sources.samples import ArrayReference, Sample, SourceSplit
from headrace.shards.sources.vocabulary import SPLIT_NAMES
from headrace.shards.sources.walk import Folder

_LAYOUT = (
    "images uint8 [n, height, width, 3] (or data [n, 3 * side * side]), labels integer [n], "
    "classes str [k]"
)
_PICKLE = re.compile(r"(train_|val_|test_)?data(_batch_\d+)?|test_batch|train|test")
_META_FILES = ("batches.meta", "meta")


@dataclass(frozen=True)
class ArrayFiles:
    """Files of arrays by split, a split's parts in their order. classes: names in CIFAR's meta."""

    by_split: Mapping[str, Sequence[Path]]
    classes: tuple[str, ...] = ()


def find_arrays(tree: Folder) -> ArrayFiles | None:
    """The arrays of a folder whose files are called after splits, or of the only one below it."""
    found = _in_folder(tree)
    if found is None and not tree.images_below:
        below = [arrays for folder in tree.below() if (arrays := _in_folder(folder))]
        found = below[0] if len(below) == 1 else None
    return found


def _in_folder(folder: Folder) -> ArrayFiles | None:
    meta = next((name for name in _META_FILES if name in folder.others), None)
    pickles = [name for name in folder.others if _PICKLE.fullmatch(name)]
    npz = [name for name in folder.others if name.endswith(".npz")]
    by_split: dict[str, list[Path]] = {}
    for name in npz or (pickles if meta or len(pickles) > 1 else []):
        by_split.setdefault(_split(name), []).append(Path(folder.path) / name)
    if not by_split.keys() - {""}:
        return None
    if npz:
        by_split.pop("", None)  # statistics, features: not called after a split
    for paths in by_split.values():
        paths.sort(key=_part_number)
    try:
        classes = read_class_names(Path(folder.path) / meta) if meta and not npz else ()
    except ARRAY_ERRORS as error:
        raise ShardError(f"{folder.path}/{meta} cannot be used: {error}") from error
    return ArrayFiles(by_split, classes)


def _split(name: str) -> str:
    first = re.split(r"[-_.]", name.lower())[0]
    return SPLIT_NAMES.get(first, "train" if first == "data" and not name.endswith(".npz") else "")


def _part_number(path: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", path.stem)
    return (int(numbers[-1]) if numbers else 0, path.name)


def list_arrays(files: ArrayFiles, only: str | None = None) -> list[SourceSplit]:
    """List the splits, numbered by the classes of train. Names are `<file stem>/<row>`."""
    splits: list[SourceSplit] = []
    base = tuple(ClassName(name) for name in files.classes) or None
    for name in sorted(files.by_split, key=lambda split: split != "train"):
        if only in (None, name) or name == "train":
            split = _list_split(name, files.by_split[name], base)
            base = (split.classes or base) if name == "train" else base
            splits += [split] * (only in (None, name))
    return splits


def _list_split(
    name: str, paths: Sequence[Path], base: tuple[ClassName, ...] | None
) -> SourceSplit:
    samples: list[tuple[str, ArrayReference]] = []
    labels: list[int] = []
    named: set[tuple[str, ...]] = set()
    for path in paths:
        part_labels, classes = _read_part(path)
        labels += part_labels
        named.add(classes)
        samples += [
            (f"{path.stem}/{row:08d}", ArrayReference(str(path), row))
            for row in range(len(part_labels))
        ]
    if len(named) > 1:
        raise ShardError(f"{paths[0]} and {paths[-1]}: the parts do not have the same classes")
    own = tuple(ClassName(class_name) for class_name in named.pop())
    if own and base and own != base:
        raise ShardError(f"{paths[0]}: its classes are not those of train")
    origin, classes = str(paths[0]), own or base
    if own or (base and not any(entry.id.isdigit() for entry in base)):
        assert classes
        if max(labels, default=-1) >= len(classes):
            raise ShardError(
                f"{origin}: labels must be from 0 to {len(classes) - 1}, or -1 for none, as "
                f"{len(classes)} classes have a name; the highest is {max(labels)}"
            )
        note = ""
    else:
        known = [str(label) for label in labels if label >= 0]
        numbers, classes, note = number_labels(known, base, origin) if known else ([], (), "")
        numbered = iter(numbers)
        labels = [next(numbered) if label >= 0 else -1 for label in labels]
    listed = [Sample(n, label, ref) for (n, ref), label in zip(samples, labels, strict=True)]
    return SourceSplit(name, "arrays", classes, listed, (note,) if note else ())


def _read_part(path: Path) -> tuple[list[int], tuple[str, ...]]:
    """(the label of every image of a file, -1 = none, the class names it has)."""
    try:
        images = open_images(str(path))
        labels, classes = read_labels_and_classes(path)
    except ARRAY_ERRORS as error:
        raise ShardError(f"{path} cannot be used ({error}); expected {_LAYOUT}") from error
    if labels is None:
        return [-1] * len(images), classes
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ShardError(f"{path}: labels are {labels.dtype} {labels.shape}; expected {_LAYOUT}")
    if len(labels) and labels.min() < -1:
        raise ShardError(f"{path}: labels must be from 0, or -1 for none, not {labels.min()}")
    return [int(label) for label in np.asarray(labels)], classes
