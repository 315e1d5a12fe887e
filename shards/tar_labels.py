"""The labels of WebDataset tars taken together, and the classes that they mean."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.shards.index import ShardError
from headrace.shards.tar_samples import TarScan

CLASSES_FILE = "classes.txt"
NUMBERED_BELOW = 65_536
"""Labels up to here are class numbers as they stand; beyond, many gaps make them identifiers."""
_GAPS_AT_MOST = 10  # numbers for each class that occurs, or they are identifiers
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class TarLabels:
    """The labels of several tars together.

    labels: int64 [n] of each tar, positions in `classes`, or -1. classes: names, () where nothing
    is labelled. notes: sentences about what a user may not expect.
    """

    labels: list[NDArray[np.int64]]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def number_labels(
    paths: Sequence[Path], scans: Sequence[TarScan], class_names: tuple[str, ...]
) -> TarLabels:
    """Class numbers of all samples of `paths`, scanned as `scans`, and the classes' names.

    class_names: what `read_class_names` found. Labels are class numbers as they stand, and the
    classes are called so, or by their number where there are no names. Numbers that are mostly gaps
    are identifiers: the classes are then those that occur, ascending. Tars that hold images alone
    and are named like classes (WordNet ids, or names that end in no number) are the classes.
    Raises `ShardError` where there are fewer names than classes.
    """
    labels = [np.array([i.label for i in scan.images], np.int64) for scan in scans]
    notes = _notes(paths, scans)
    everything = np.concatenate(labels)
    occurring = np.unique(everything[everything >= 0])
    if len(occurring) == 0:
        names = _classes_by_tar(paths, scans)
        if names:
            labels = [
                np.full(len(scan.images), names.index(path.stem))
                for path, scan in zip(paths, scans, strict=True)
            ]
            return TarLabels(labels, names, (*notes, "each tar is a class, by its name"))
        return TarLabels(labels, (), (*notes, *_folder_note(scans)))
    unlabelled = int((everything < 0).sum())
    if unlabelled:
        notes += (f"{unlabelled:,} sample(s) have no label, and others do",)
    highest = int(occurring[-1])
    if highest < NUMBERED_BELOW or highest < _GAPS_AT_MOST * len(occurring):
        names = class_names or tuple(str(label) for label in range(highest + 1))
        if len(names) <= highest:
            raise ShardError(
                f"{paths[0].parent / CLASSES_FILE} names {len(names)} classes, and the label "
                f"{highest} occurs in the tars beside it: one name a line, the first of class 0"
            )
        return TarLabels(labels, names, notes)
    note = (
        f"labels go up to {highest:,} and {len(occurring):,} occur: they are taken for identifiers "
        "and numbered in ascending order"
    )
    numbered = [
        np.where(part < 0, -1, np.searchsorted(occurring, part)).astype(np.int64) for part in labels
    ]
    return TarLabels(numbered, tuple(str(label) for label in occurring), (*notes, note))


def _classes_by_tar(paths: Sequence[Path], scans: Sequence[TarScan]) -> tuple[str, ...]:
    names = sorted({path.stem for path in paths})
    if len(names) < 2 or len(names) < len(paths) or not all(s.only_images for s in scans):
        return ()
    wordnet = all(_WORDNET_ID.fullmatch(name) for name in names)
    shards = any(name[-1].isdigit() for name in names)
    return tuple(names) if wordnet or not shards else ()


def read_class_names(directory: Path) -> tuple[str, ...]:
    """The lines of `directory`'s classes.txt, () where there is none. Raises `ShardError`."""
    path = directory / CLASSES_FILE
    if not path.is_file():
        return ()
    try:
        return tuple(line.strip() for line in path.read_text("utf-8-sig").strip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"{path} cannot be read ({error}): one class name a line") from error


def _notes(paths: Sequence[Path], scans: Sequence[TarScan]) -> tuple[str, ...]:
    together: dict[str, tuple[int, str]] = {}
    for path, scan in zip(paths, scans, strict=True):
        for remark, (count, example) in scan.remarks.items():
            before, first = together.get(remark, (0, f"{example!r} in {path.name}"))
            together[remark] = (before + count, first)
    return tuple(f"{n:,} {remark}, as {example}" for remark, (n, example) in together.items())


def _folder_note(scans: Sequence[TarScan]) -> tuple[str, ...]:
    folders = {image.key.rpartition("/")[0] for scan in scans for image in scan.images}
    folders = {folder.removeprefix("./") for folder in folders} - {"", "."}
    if len(folders) < 2:
        return ()
    return (
        f"{len(folders):,} folder(s) inside the tars are not read as classes, as {min(folders)!r}",
    )


def renumbered(labels: TarLabels, classes: tuple[str, ...], where: str) -> TarLabels:
    """The same labels as positions in `classes`, by name: those of train for another split.

    Raises `ShardError` for a class that `classes` lacks.
    """
    if labels.classes == classes:
        return labels
    position = {name: number for number, name in enumerate(classes)}
    used = sorted({int(n) for part in labels.labels for n in np.unique(part) if n >= 0})
    unknown = [labels.classes[number] for number in used if labels.classes[number] not in position]
    if unknown:
        raise ShardError(
            f"{where} have {len(unknown)} class(es) that train lacks, as {unknown[0]!r}: labels "
            "would have no meaning; add them to train or take them out"
        )
    new = np.array([position.get(name, -1) for name in labels.classes] + [-1], np.int64)
    return TarLabels([new[part] for part in labels.labels], classes, labels.notes)
