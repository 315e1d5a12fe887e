"""Lists of labels beside images: csv, tsv, txt, json, jsonl with a name and a label per image.

Kaggle's trainLabels.csv, Hugging Face's metadata.csv and metadata.jsonl, ImageNet's meta/val.txt,
tiny-imagenet's val_annotations.txt and StyleGAN's dataset.json are found by their names; any other
list is named by the user.
"""

import csv
import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from headrace.shards.index import ShardError
from headrace.shards.manifest import ClassName
from headrace.shards.sources.vocabulary import LIST_EXTENSIONS, SPLIT_NAMES, is_image
from headrace.shards.sources.walk import Folder

_NAME_COLUMNS = (
    "file_name", "filename", "file", "path", "image_path", "image_name", "image_id", "imageid",
    "image", "img", "id", "name",
)  # fmt: skip
_LABEL_COLUMNS = (
    "label", "labels", "class", "class_id", "classid", "class_name", "target", "category",
    "species", "breed", "level", "diagnosis",
)  # fmt: skip
_WORDNET_LINE = re.compile(r"n\d{8}\s+\S")
_CONFLICT = object()


@dataclass(frozen=True)
class LabelList:
    """A list as it was read: the name of an image and its label, both as they stand in `path`."""

    path: Path
    entries: tuple[tuple[str, str], ...]

    def labels_of(self, names: Sequence[str], folder: str) -> list[str | None]:
        """The label of every image: by its path from the list or from `folder`, below which the
        names are, or by the last part of it; each also without the ending.

        Raises `ShardError` where the list gives one image two labels, or one name to two images.
        """
        inside = os.path.relpath(folder, self.path.parent)
        labels: dict[str, Any] = {}
        for entry, label in self.entries:
            for key in _keys(entry.replace("\\", "/").removeprefix("./")):
                known = labels.setdefault(key, label)
                if known != label:
                    labels[key] = _CONFLICT
        found: list[str | None] = []
        named: dict[str, str] = {}
        for name in names:
            keys = sorted((*_keys(os.path.join(inside, name)), *_keys(name)), key=_depth)
            key = next((key for key in keys if key in labels), None)
            label = None if key is None else labels[key]
            if label is _CONFLICT:
                raise ShardError(
                    f"{self.path} gives {name!r} several labels: --labels FILE names another list, "
                    "--layout flat does without labels"
                )
            if key is not None and named.setdefault(key, name) != name:
                raise ShardError(
                    f"{self.path} does not say which of {named[key]!r} and {name!r} it means by "
                    f"{key!r}: write names with their folders"
                )
            found.append(label)
        return found

    def shares(self, names: Iterable[str], others: Container[str]) -> str | None:
        """One of `names` that is also among `others`, and that the list names without a folder."""
        bare = {key for entry, _ in self.entries if "/" not in entry for key in _keys(entry)}
        return next((n for n in names if n in others and bare.intersection(_keys(n))), None)


def _depth(key: str) -> int:
    return -key.count("/")


def _keys(name: str) -> Iterator[str]:
    base = os.path.basename(name)
    yield name
    if is_image(name):
        yield os.path.splitext(name)[0]
    yield base
    if is_image(base):
        yield os.path.splitext(base)[0]


def find_lists(split: str, folders: Sequence[Folder]) -> list[Path]:
    """The lists that by their names belong to a split's images.

    folders: where to look, the nearest first: the images' own folder and those around it.
    """
    aliases = [alias for alias, meant in SPLIT_NAMES.items() if meant == split]
    stems = {"metadata", "labels", "dataset"}
    for alias in aliases:
        stems |= {alias, *(f"{alias}{gap}{what}" for gap in ("", "_", "-") for what in ("labels",))}
        stems |= {f"{alias}_annotations", f"{alias}_map"}
    found: list[Path] = []
    for folder in folders:
        places = [folder, *(one for one in folder.folders if one.name in ("meta", "annotations"))]
        found += [
            Path(place.path) / name
            for place in places
            for name in place.others
            if _is_list(name) and os.path.splitext(name)[0].lower() in stems
        ]
    return found


def unread_lists(folders: Iterable[Folder], read: Iterable[Path]) -> list[str]:
    """Paths of what ends like a list beside images, and was not read."""
    known = {str(path) for path in read}
    paths = [
        os.path.join(folder.path, name)
        for folder in folders
        for name in folder.others
        if _is_list(name) and os.path.splitext(name)[0].lower() not in ("readme", "license")
    ]
    return [path for path in paths if path not in known]


def _is_list(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in LIST_EXTENSIONS


def read_labels(path: Path) -> LabelList:
    """Read a list. Raises `ShardError` that says what was expected and where it is otherwise."""
    if path.suffix.lower() not in LIST_EXTENSIONS:
        raise ShardError(
            f"{path} is no list of labels: its name must end in one of "
            f"{', '.join(sorted(LIST_EXTENSIONS))}"
        )
    try:
        text = path.read_text("utf-8-sig")
        match path.suffix.lower():
            case ".json":
                entries = _from_json(path, json.loads(text))
            case ".jsonl":
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
                entries = _from_rows(path, rows)
            case ".csv" | ".tsv":
                entries = _from_table(path, text)
            case _:
                entries = _from_lines(path, text)
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} cannot be read as a list of labels: {error}") from error
    if not entries:
        raise ShardError(f"{path} lists no image")
    return LabelList(path, tuple(_without_fractions(path, entries)))


def _without_fractions(path: Path, entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Numbers that were written with a point (`3.0`, as a table with gaps has them) as integers."""
    fractions = [label for _, label in entries if re.fullmatch(r"-?\d*\.\d+", label)]
    if not fractions:
        return entries
    broken = next((label for label in fractions if float(label) % 1), None)
    if broken is not None:
        raise ShardError(f"{path}: labels are fractions, such as {broken}, and so no classes")
    whole = set(fractions)
    return [(name, str(int(float(label))) if label in whole else label) for name, label in entries]


def _from_json(path: Path, value: Any) -> list[tuple[str, str]]:
    """{name: label}, [{"file_name": ..., "label": ...}], or StyleGAN's {"labels": [[n, label]]}."""
    if isinstance(value, dict) and isinstance(value.get("labels"), list):
        value = value["labels"]
    if isinstance(value, dict) and all(isinstance(v, str | int) for v in value.values()):
        return [(str(name), str(label)) for name, label in value.items()]
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return _from_rows(path, value)
    pairs = isinstance(value, list) and all(
        isinstance(row, list) and len(row) == 2 and isinstance(row[1], str | int) for row in value
    )
    if not pairs:
        raise ShardError(
            f'{path}: expected {{"name": label, ...}} or [{{"file_name": ..., "label": ...}}, ...]'
        )
    return [(str(name), str(label)) for name, label in value]


def _from_rows(path: Path, rows: Sequence[Any]) -> list[tuple[str, str]]:
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ShardError(f"{path}: expected an object per line, with a file name and a label")
    name, label = _columns(path, list(rows[0]))
    values = [(row.get(name), row.get(label)) for row in rows]
    for number, (_, value) in enumerate(values, 1):
        if not isinstance(value, str | int):
            raise ShardError(f"{path}: {label} of row {number} is {value!r}; a name or a number")
    return [(str(image), str(value)) for image, value in values]


def _from_table(path: Path, text: str) -> list[tuple[str, str]]:
    delimiter = max("\t,;", key=text.partition("\n")[0].count)
    rows = [row for row in csv.reader(StringIO(text), delimiter=delimiter) if row]
    if not rows:
        return []
    if is_image(rows[0][0]):  # no line of column names
        return [(row[0], _cell(path, row, 1)) for row in rows]
    name, label = _columns(path, rows[0])
    places = rows[0].index(name), rows[0].index(label)
    return [(_cell(path, row, places[0]), _cell(path, row, places[1])) for row in rows[1:]]


def _cell(path: Path, row: Sequence[str], column: int) -> str:
    if column >= len(row) or not row[column].strip():
        raise ShardError(f"{path}: the line that begins with {row[0]!r} has no label")
    return row[column].strip()


def _columns(path: Path, names: Sequence[str]) -> tuple[str, str]:
    """(the column of image names, the column of labels)."""
    lower = {str(name).strip().lower(): name for name in reversed(names)}
    name = next((lower[known] for known in _NAME_COLUMNS if known in lower), None)
    label = next((lower[known] for known in _LABEL_COLUMNS if known in lower), None)
    if name is None or label is None:
        raise ShardError(
            f"{path} has the columns {', '.join(map(str, names))}: expected one of file names "
            "(such as file_name or id) and one of labels (such as label or class)"
        )
    return name, label


def _from_lines(path: Path, text: str) -> list[tuple[str, str]]:
    """Lines `name label`, by tabs, commas or spaces; further columns are not looked at."""
    entries: list[tuple[str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = (
            line.split("\t") if "\t" in line else line.split(",") if "," in line else line.split()
        )
        if len(parts) < 2:
            raise ShardError(f"{path}, line {number}: {line!r} is no name with a label")
        entries.append((parts[0].strip(), parts[1].strip()))
    return entries


def read_classes(path: Path) -> tuple[ClassName, ...]:
    """Class names in the order of their labels: lines, or a list or an object in JSON.

    A line is an id, or an id and a name after a tab (after a space, for WordNet ids).
    """
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix.lower() == ".json":
            classes = _classes_of_json(json.loads(text))
        else:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            classes = [
                line.split(None, 1)
                if _WORDNET_LINE.match(line) and "\t" not in line
                else line.split("\t", 1)
                for line in lines
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} cannot be read as a list of classes: {error}") from error
    ids = [parts[0] for parts in classes]
    double = (
        next((id_ for id_ in ids if ids.count(id_) > 1), None) if len(set(ids)) < len(ids) else None
    )
    if not ids or double is not None:
        what = "lists no class" if not ids else f"lists the class {double!r} twice"
        raise ShardError(f"{path} {what}")
    return tuple(ClassName(*parts) for parts in classes)


def _classes_of_json(value: Any) -> list[list[str]]:
    """["a", "b"], {"0": "a"}, {"0": ["n01440764", "tench"]} or {"a": 0}."""
    if isinstance(value, dict) and all(isinstance(v, int) for v in value.values()):
        value = {str(label): name for name, label in value.items()}
    if isinstance(value, dict):
        value = [value[str(label)] for label in range(len(value))]
    return [[str(p) for p in entry] if isinstance(entry, list) else [str(entry)] for entry in value]


def number_labels(
    labels: Sequence[str], base: Sequence[ClassName] | None, origin: str
) -> tuple[list[int], tuple[ClassName, ...], str]:
    """(the number of each label, the classes, a note or "").

    base: the classes of train or of a list of classes, if there are any. Numbers that are no name
    of a class are positions in it. Raises `ShardError` for a class that `base` lacks.
    """
    distinct = sorted(set(labels))
    numbers = all(label.isascii() and label.isdigit() for label in distinct)
    if base is None:
        if numbers:
            distinct = _numbered(distinct)
        classes = tuple(ClassName(label) for label in distinct)
        label_of = {label: number for number, label in enumerate(distinct)}
        return [label_of[label] for label in labels], classes, note_of_numbers(distinct)
    label_of = {entry.id: number for number, entry in enumerate(base)}
    label_of |= {e.name: n for n, e in enumerate(base) if e.name and e.name not in label_of}
    note = ""
    if numbers and not label_of.keys() & set(distinct):
        note = f"labels in {origin} are numbers: positions among the {len(base)} classes, from 0"
        label_of = {label: int(label) for label in distinct if int(label) < len(base)}
    unknown = next((label for label in distinct if label not in label_of), None)
    if unknown is not None:
        raise ShardError(
            f"{origin}: class {unknown!r} is none of the {len(base)} classes of the set: labels "
            "would have no meaning"
        )
    return [label_of[label] for label in labels], tuple(base), note


def _numbered(distinct: Sequence[str]) -> list[str]:
    """Classes that are called by numbers: all of them from 0 on, where few are missing."""
    ordered = sorted(distinct, key=int)
    highest = int(ordered[-1])
    if ordered[0] == "0" and highest < 2 * len(ordered):
        return [str(label) for label in range(highest + 1)]
    return ordered


def note_of_numbers(ids: Sequence[str]) -> str:
    """What to say of classes that are called by numbers, "" if label and number agree."""
    if not all(id_.isascii() and id_.isdigit() for id_ in ids):
        return ""
    moved = next((n for n, id_ in enumerate(ids) if int(id_) != n), None)
    if moved is None:
        return ""
    return (
        f"classes are called by numbers that are not their labels: {ids[moved]!r} has label {moved}"
    )


def agree(labels: Sequence[str | None], numbers: Sequence[int]) -> bool:
    """Whether a list of labels and class folders divide the images alike."""
    pairs = set(zip(labels, numbers, strict=True))
    return len(pairs) == len({label for label, _ in pairs}) == len({n for _, n in pairs})
