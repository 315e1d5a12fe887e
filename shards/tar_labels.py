"""The labels of WebDataset tars taken together, and the classes that they mean."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headrace.shards.class_numbers import ClassNumbers, class_numbers
from headrace.shards.index import ShardError
from headrace.shards.tar_samples import TarScan

CLASSES_FILE = "classes.txt"
_WORDNET_ID = re.compile(r"n\d{8}")


def number_labels(
    paths: Sequence[Path], scans: Sequence[TarScan], class_names: tuple[str, ...]
) -> ClassNumbers:
    """Class numbers of all samples of `paths`, scanned as `scans`, in their order.

    class_names: what `read_class_names` found; they name the classes where labels are class
    numbers. Tars that hold images alone and are named like classes (WordNet ids, or names that end
    in no number) are the classes.
    Raises `ShardError` where there are fewer names than classes.
    """
    labels = np.array([image.label for scan in scans for image in scan.images], np.int64)
    notes = _notes(paths, scans)
    given = class_numbers(labels)
    unlabelled = int((labels < 0).sum())
    if unlabelled == len(labels):
        names = _classes_by_tar(paths, scans)
        if not names:
            return given._replace(notes=(*notes, *_notes_on_names(paths, scans)))
        of_tars = [names.index(path.stem) for path in paths]
        labels = np.repeat(of_tars, [len(scan.images) for scan in scans])
        return ClassNumbers(labels, names, (*notes, "each tar is a class, by its name"))
    if unlabelled:
        notes += (f"{unlabelled:,} sample(s) have no label, and others do",)
    notes += given.notes
    identifiers = given.classes[-1] != str(len(given.classes) - 1)
    if not class_names or identifiers:
        return given._replace(notes=notes)
    if len(class_names) < len(given.classes):
        raise ShardError(
            f"{paths[0].parent / CLASSES_FILE} names {len(class_names)} classes, and the label "
            f"{len(given.classes) - 1} occurs in the tars beside it: one name a line, the first of "
            "class 0"
        )
    return ClassNumbers(labels, class_names, notes)


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


def _notes_on_names(paths: Sequence[Path], scans: Sequence[TarScan]) -> tuple[str, ...]:
    """Names that may be meant as classes, where nothing else says a class."""
    inside = {image.key.rpartition("/")[0] for scan in scans for image in scan.images}
    inside = {folder.removeprefix("./") for folder in inside} - {"", "."}
    around = {path.parent.name for path in paths}
    # Shards are called alike but for their numbers.
    called = {path.stem.rstrip("0123456789") for path in paths}
    return tuple(
        f"{len(names):,} {what} are not read as classes, as {min(names)!r}"
        for names, what in (
            (inside, "folder(s) inside the tars"),
            (around, "folder(s) of tars"),
            (called, "kind(s) of names of tars"),
        )
        if len(names) > 1
    )
