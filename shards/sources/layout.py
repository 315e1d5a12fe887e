"""Where in a tree of folders the images of each split lie, and whether folders are classes.

What a person would see at a glance is decided here from names and counts alone: folders that are
splits, the photographs beside their label maps, the one folder that holds everything. What a person
would have to ask about is refused with the candidates and the option that decides.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headrace.shards.index import ShardError
from headrace.shards.sources.vocabulary import (
    SPLIT_ORDER,
    is_container,
    is_facts,
    is_maps,
    is_photographs,
    split_of,
    split_within,
    without_map_suffix,
    without_split,
)
from headrace.shards.sources.walk import Folder

Layout = Literal["auto", "splits", "folders", "innermost", "flat"]
_CHOOSE = "--images DIR names the folder of photographs"
Kind = Literal["classes", "innermost", "flat"]
_SETS_DEPTH = 4
_NAMED = 6
_LOOSE_PART = 10  # loose images are left aside where they are at most one in so many


@dataclass(frozen=True)
class Choices:
    """What a person says of a source that does not explain itself.

    layout: "splits": folders called like splits are splits; "folders": every folder is a class;
    "innermost": every folder that holds images itself is one, by its own name;
    "flat": all images, without classes. images: the folder, below the source or below each split,
    that has the photographs. labels: a list of names and labels. classes: the class names in the
    order of their labels.
    """

    layout: Layout = "auto"
    images: str | None = None
    labels: Path | None = None
    classes: Path | None = None


class Ambiguous(ShardError):
    """A source that can be read in several ways; names them, and the options that decide."""


AS_FOUND = Choices()
"""Nothing is said: the source explains itself."""


@dataclass(frozen=True)
class Place:
    """Where the images of one split lie.

    top: the split's folder, or the source's. folder: what names are relative to. kind: whether the
    folders inside are classes ("innermost": the last ones), or the images belong to none. deep:
    without classes, those of all folders below count too.
    """

    split: str
    top: Folder
    folder: Folder
    kind: Kind
    deep: bool = False

    @property
    def images(self) -> int:
        """How many images the split has."""
        loose = len(self.folder.images)
        if self.kind == "innermost" or self.deep:
            return self.folder.images_below
        return loose if self.kind == "flat" else self.folder.images_below - loose

    @property
    def class_ids(self) -> tuple[str, ...]:
        """Names of the class folders, sorted; one without images keeps its number."""
        if self.kind == "flat":
            return ()
        if self.kind == "innermost":
            return tuple(sorted({folder.name for folder in self.folder.below() if folder.images}))
        return tuple(
            folder.name
            for folder in self.folder.folders
            if folder.images_below or not (is_facts(folder.name) or is_photographs(folder.name))
        )


def find_places(tree: Folder, choices: Choices) -> list[Place]:
    """The splits of a tree, or one called ""; [] if it holds no image.

    Raises `ShardError` for what can be read in several ways.
    """
    start = tree if choices.images is None else _named_folder(tree, choices.images)
    inside = None if start is not None else choices.images
    folder = start or tree
    while folder.images_below:
        splits = find_splits(folder, choices.layout)
        if splits:
            return _places_of(splits, choices, inside)
        step = _step(folder, choices.layout, frozenset(), top=True)
        if not isinstance(step, Folder):
            if inside is not None:
                raise ShardError(f"{tree.path}: --images {inside} is no folder below it")
            return [_place("", folder, folder, step, choices)]
        folder = step
    return []


def _places_of(splits: dict[str, Folder], choices: Choices, images: str | None) -> list[Place]:
    places: list[Place] = []
    known: frozenset[str] = frozenset()
    for name in sorted(splits, key=SPLIT_ORDER.index):
        top = splits[name]
        folder = top if images is None else _named_folder(top, images)
        if folder is None:
            raise ShardError(f"{top.path}: --images {images} is no folder below it")
        step: Folder | Kind = folder
        while isinstance(step, Folder):
            folder = step
            step = _step(folder, choices.layout, known, top=False)
        places.append(_place(name, top, folder, step, choices))
        if name == "train":
            known = frozenset(places[-1].class_ids)
    return places


def _place(split: str, top: Folder, folder: Folder, kind: Kind, choices: Choices) -> Place:
    """A list of labels counts for all images below, whatever the folders are called."""
    listed = choices.labels is not None and kind != "flat"
    return Place(split, top, folder, "flat" if listed else kind, listed or choices.layout == "flat")


def _named_folder(tree: Folder, name: str) -> Folder | None:
    """The folder at a relative path below `tree`, or at an absolute one."""
    folder = tree
    relative = os.path.relpath(os.path.expanduser(name), tree.path) if name[:1] in "/~" else name
    for part in Path(relative).parts:
        match = [inner for inner in folder.folders if inner.name == part]
        if not match:
            return None
        folder = match[0]
    return folder


def _step(folder: Folder, layout: Layout, known: frozenset[str], *, top: bool) -> Folder | Kind:
    """What a folder without splits is, or the folder inside that has everything.

    known: train's classes. top: the folder is not inside a split.
    """
    inner = folder.inner
    lone = inner[0] if len(inner) == 1 else None
    if layout == "flat" or not inner:
        return "flat"
    if layout == "innermost":
        return "innermost"
    if layout == "folders":
        return lone if lone and not lone.images and not folder.images else "classes"
    if not folder.images and known and {one.name for one in inner} <= known:
        return "classes"
    if lone and not folder.images:
        holds_all = is_container(lone.name, folder.name) or len(lone.inner) > 1
        return lone if holds_all or (top and not lone.images) else "classes"
    maps = [one for one in inner if is_maps(one.name)]
    others = _without(inner, maps)
    if folder.images and not others:
        return "flat"
    photographs = [one for one in others if is_photographs(one.name)]
    if photographs and len(others) == 1 and not folder.images:
        return photographs[0]
    if top and layout == "auto":
        _refuse_several_sets(folder)
    doubt = _doubt(folder, maps, others, photographs)
    # Within a split, who says that splits are splits says that the folders inside are classes.
    if doubt is not None and (top or layout != "splits"):
        classes = "--layout folders" if top else "--layout splits"
        raise Ambiguous(
            f"{folder.path}: {doubt}, {classes} makes each of {_listed(folder.inner)} one class, "
            "--layout flat takes all images without classes"
        )
    return "classes"


def _doubt(
    folder: Folder,
    maps: Sequence[Folder],
    others: Sequence[Folder],
    photographs: Sequence[Folder],
) -> str | None:
    """Why the folders inside may be no classes, and what says which they are."""
    loose, inside = len(folder.images), sum(one.images_below for one in others)
    if loose and (maps or (loose > 1 and (len(others) == 1 or loose * _LOOSE_PART > inside))):
        return (
            f"images lie both loose ({loose}, as {folder.images[0]!r}) and in folders "
            f"({inside}, in {_listed(others)}): {_CHOOSE}"
        )
    if len(photographs) > 1:
        what = "are each called like a folder of all photographs"
        return f"{_listed(photographs)} {what}: {_CHOOSE}"
    if photographs:
        return (
            f"{_listed(photographs)} is called like a folder of all photographs, and other images "
            f"lie beside it, in {_listed(_without(folder.inner, photographs))}: {_CHOOSE}"
        )
    paired = [one for one in maps if any(_pairs(one, other) for other in others)]
    if paired:
        return f"{_listed(paired)} looks like label maps of {_listed(others)}: {_CHOOSE}"
    deeper = [inner.name for one in folder.inner for inner in one.inner]
    if len(deeper) > len(folder.inner) and not any(one.images for one in folder.inner):
        some = ", ".join(f"{name}/" for name in sorted(set(deeper))[:_NAMED])
        return (
            f"{_listed(folder.inner)} hold no images themselves but folders of them ({some}): "
            "--layout innermost makes each of the inner folders a class"
        )
    return None


def find_splits(folder: Folder, layout: Layout = "auto") -> dict[str, Folder]:
    """Split name -> folder; {} if the folders inside are no splits.

    A class may be called "train" too. It is one if it holds images itself, and so do neighbours
    that are not named like a split. Words in names (`train2017`, `seg_test`) count where several
    folders have them. Raises `ShardError` where both readings are likely.
    """
    if layout in ("folders", "flat"):
        return {}
    inner = [one for one in folder.inner if split_of(one.name) or not is_maps(one.name)]
    named = [one for one in inner if split_of(one.name)]
    exact = {split_of(one.name) for one in named}
    worded = [one for one in _without(inner, named) if split_within(one.name) not in (None, *exact)]
    rest = _without(inner, [*named, *worded])
    if not named and not _worded_splits(folder, worded, rest, layout):
        return {}
    if layout != "splits" and len(exact) == 1 and rest:
        direct = named[0].images and sum(bool(one.images) for one in rest) > 1
        if exact == {"train"} and direct and not worded:
            return {}
        raise _either(folder, [*named, *worded], rest)
    splits: dict[str, Folder] = {}
    for one in (*named, *worded):
        name = split_of(one.name) or split_within(one.name) or ""
        if name in splits:
            raise Ambiguous(
                f"{folder.path}: {splits[name].name} and {one.name} are both a {name} split: take "
                "one of them out, or point at it, or --layout folders makes each folder a class"
            )
        splits[name] = one
    return splits


def _worded_splits(
    folder: Folder, worded: Sequence[Folder], rest: Sequence[Folder], layout: Layout
) -> bool:
    """Whether folders with a split's word in their names are splits, none being called just so."""
    meant = {split_within(one.name) for one in worded}
    if layout == "splits" or (len(worded) == 1 and not rest):
        return bool(worded)
    if len(meant) < 2:
        return False
    if len({without_split(one.name) for one in worded}) == 1:
        return True
    if len(rest) <= len(worded):
        raise _either(folder, worded, rest)
    return False


def _either(folder: Folder, named: Sequence[Folder], rest: Sequence[Folder]) -> Ambiguous:
    what = "is called like a split" if len(named) == 1 else "are called like splits"
    beside = f", and {_listed(rest)} beside it not" if rest else ", each differently"
    return Ambiguous(
        f"{folder.path}: {_listed(named)} {what}{beside}: --layout splits takes {_listed(named)} "
        f"as such and nothing else, --layout folders makes each folder a class; or point at one "
        "of them"
    )


def _refuse_several_sets(folder: Folder) -> None:
    sets = [one for one in folder.inner if _holds_splits(one, _SETS_DEPTH)]
    if sets:
        beside = _without(folder.inner, sets)
        more = f", and {_listed(beside)} beside" if beside else ""
        raise Ambiguous(
            f"{folder.path} holds more than one data set: {_listed(sets)} with splits inside"
            f"{more}: point at one of them, --images DIR names it, --layout folders makes each a "
            "class"
        )


def _holds_splits(folder: Folder, depth: int) -> bool:
    if folder.images or depth == 0:
        return False
    meant = {split_within(one.name) for one in folder.inner} - {None}
    if any(split_of(one.name) for one in folder.inner) or len(meant) > 1:
        return True
    return any(_holds_splits(one, depth - 1) for one in folder.inner)


def _pairs(maps: Folder, others: Folder) -> bool:
    """Whether at least half of the maps have the name of a picture in `others`."""
    stems = {os.path.splitext(name)[0] for one in others.below() for name in one.images}
    mapped = [
        without_map_suffix(os.path.splitext(name)[0]) for one in maps.below() for name in one.images
    ]
    return 2 * sum(stem in stems for stem in mapped) >= len(mapped)


def _without(folders: Iterable[Folder], taken: Sequence[Folder]) -> list[Folder]:
    return [one for one in folders if all(one is not other for other in taken)]


def _listed(folders: Sequence[Folder]) -> str:
    names = ", ".join(f"{one.name}/" for one in folders[:_NAMED])
    return names + (f" and {len(folders) - _NAMED} more" if len(folders) > _NAMED else "")
