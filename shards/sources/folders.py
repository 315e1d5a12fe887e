"""The samples and labels of folders of images, once it is known where they lie.

Labels: position of the class in the sorted folder names (torchvision's ImageFolder order), or in
those of train for every other split of a set; ImageNet in any of its packagings gives the same
labels, the position among the sorted WordNet ids.
"""

import os
from collections.abc import Container, Sequence
from dataclasses import replace

from headrace.shards.index import ShardError
from headrace.shards.manifest import ClassName
from headrace.shards.sources.imagenet import ImageNetFacts
from headrace.shards.sources.labels import (
    LabelList,
    agree,
    find_lists,
    note_of_numbers,
    number_labels,
    read_classes,
    read_labels,
    unread_lists,
)
from headrace.shards.sources.layout import Ambiguous, Choices, Place
from headrace.shards.sources.samples import FolderSamples, SourceSplit
from headrace.shards.sources.vocabulary import (
    LIST_EXTENSIONS,
    PACKED_ENDINGS,
    endings,
    is_image,
    split_of,
    split_within,
    splits_within,
)
from headrace.shards.sources.walk import Folder
from headrace.shards.tar_sets import IMAGENET_PREFIX

_NAMED = 10
_LIST_BYTES_AT_MOST = 1 << 28  # what is longer is read where --labels names it
_WITHOUT = "--layout flat does without labels"


def list_places(
    tree: Folder,
    places: Sequence[Place],
    choices: Choices,
    facts: ImageNetFacts,
    wanted: Sequence[str] | None,
) -> list[SourceSplit]:
    """List the splits that are wanted (None: all), all numbered by the classes of train.

    Raises `ShardError` for links that lead nowhere, classes that train lacks, and lists of labels
    that do not fit the images.
    """
    base = None if choices.classes is None else read_classes(choices.classes)
    labels = None if choices.labels is None else read_labels(choices.labels)
    splits: list[SourceSplit] = []
    _refuse_dangling_splits(tree, places, wanted)
    for place in places:
        chosen = wanted is None or place.split in wanted
        if not chosen and place.split != "train":
            continue
        if chosen:
            _refuse_dangling(place)
        elsewhere = {name for other in places if other is not place for name in _loose_names(other)}
        split = _list_place(tree, place, base, facts, labels, choices, elsewhere)
        if place.split == "train" and split.classes:
            base = split.classes
        if chosen:
            splits.append(split)
    if splits:
        notes = _empty_splits(tree, places) if splits[0].name else _lists_of_splits(tree)
        notes = (*splits[0].notes, *notes, *_packed_files(tree))
        splits[0] = replace(splits[0], notes=notes)
    if labels is not None and splits and not any(split.classes for split in splits):
        raise ShardError(f"{labels.path} names none of the images below {tree.path}")
    return splits


def _list_place(
    tree: Folder,
    place: Place,
    base: tuple[ClassName, ...] | None,
    facts: ImageNetFacts,
    labels: LabelList | None,
    choices: Choices,
    elsewhere: Container[str],
) -> SourceSplit:
    """elsewhere: names of images of the other splits."""
    around = tree.chain_to(place.folder)[::-1]
    if labels is not None:
        _refuse_shared(labels, place, elsewhere)
        split = _flat(place, [labels])
        by_list = _labelled(split, [labels], base, partly=f"complete {labels.path}")
        note = f"{labels.path} names none of these images"
        return by_list or replace(split, notes=(*split.notes, note))
    lone = place.kind == "classes" and len(place.folder.inner) == 1
    around = (*place.folder.inner, *around) if lone else around
    lists = () if choices.layout in ("flat", "folders") else _known_lists(place, around, lone)
    if lone and lists:
        # One folder alone is hardly a class where a list gives its images labels.
        whole = replace(place, kind="flat", deep=True)
        by_list = _labelled(_flat(whole, lists), lists, base, partly=_WITHOUT)
        if by_list is not None:
            return by_list
    if place.kind != "flat":
        split = _classes(place, base, facts)
        for found in lists:
            _refuse_other_classes(split, found)
        return split
    for found in lists:
        _refuse_shared(found, place, elsewhere)
    split = _flat(place, lists)
    if facts.wordnet_ids and place.split in ("val", ""):
        ids = None if base is None else [entry.id for entry in base]
        by_facts = facts.labelled(split, ids)
        if by_facts is not None:
            return by_facts
    by_list = _labelled(split, lists, base, partly=_WITHOUT)
    if by_list is not None:
        return by_list
    notes = split.notes
    if base is not None and place.split not in ("", "unlabeled"):
        notes += (
            f"{place.folder.path} has no class folders and no list of its labels was found "
            "(LOC_val_solution.csv, ILSVRC2012_devkit_t12, meta/val.txt): its labels are -1",
        )
    unread = unread_lists(around, ())
    if unread and choices.layout != "flat":
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        notes += (
            f"{unread[0]}{more} lies beside the images and is not read: --labels FILE reads a list "
            "of names and labels",
        )
    return replace(split, notes=notes)


def _empty_splits(tree: Folder, places: Sequence[Place]) -> tuple[str, ...]:
    """A note on folders beside splits that are called like one and hold no image."""
    around = {f.path: f for place in places for f in tree.chain_to(place.top)[-2:-1]}
    return tuple(
        f"{inner.path} is called like a split and holds no image"
        for folder in around.values()
        for inner in folder.folders
        if split_of(inner.name) and not inner.images_below
    )


def _packed_files(tree: Folder) -> tuple[str, ...]:
    """A note on files that may hold images, beside the folders that do."""
    packed = [
        os.path.join(folder.path, name)
        for folder in tree.below()
        for name in folder.others
        if name.lower().endswith(PACKED_ENDINGS) and not name.startswith(IMAGENET_PREFIX)
    ]
    if not packed:
        return ()
    return (
        f"{len(packed)} file(s) that may hold images are not looked into ({endings(packed)}), as "
        f"{packed[0]}",
    )


def _lists_of_splits(tree: Folder) -> tuple[str, ...]:
    """A note where a set without folders of splits has lists called like splits."""
    named = [
        os.path.join(folder.path, name)
        for folder in tree.below()
        for name in folder.others
        if os.path.splitext(name)[1].lower() in (*LIST_EXTENSIONS, ".mat") and splits_within(name)
    ]
    if not named:
        return ()
    more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
    return (
        f"{named[0]}{more} may say which images are of which split, and is not read: all images "
        "are one set",
    )


def _known_lists(place: Place, around: Sequence[Folder], lone: bool) -> list[LabelList]:
    """Lists that by their names belong to the split, as far as they are lists of labels.

    Beside class folders only those that are never lists of a split's names.
    """
    named = place.split or split_of(place.top.name) or ""
    lists: list[LabelList] = []
    for path in find_lists(named if place.kind == "flat" or lone else "", around):
        try:
            if path.stat().st_size <= _LIST_BYTES_AT_MOST:
                lists.append(read_labels(path))
        except ShardError:
            continue  # captions, boxes or names alone; what is not read is said
    return lists


def _flat(place: Place, lists: Sequence[LabelList]) -> SourceSplit:
    prefix = len(os.path.join(place.folder.path, ""))
    folders = list(place.folder.below()) if place.deep else [place.folder]
    names = [
        os.path.join(folder.path, image)[prefix:] for folder in folders for image in folder.images
    ]
    samples = FolderSamples(place.folder.path, names, [-1] * len(names))
    read = {str(found.path) for found in lists}
    notes = _unread([n for f in folders for n in f.others if os.path.join(f.path, n) not in read])
    if names and all("\\" in name for name in names):
        notes += (
            "every name holds a backslash, as a zip made on Windows leaves it: unpack it with a "
            "program that makes folders of them, or their classes are not seen",
        )
    return SourceSplit(place.split, "images without class folders", (), samples, notes)


def _classes(place: Place, base: tuple[ClassName, ...] | None, facts: ImageNetFacts) -> SourceSplit:
    folder, ids = place.folder, place.class_ids
    if base is None:
        classes = tuple(ClassName(id_, facts.class_names.get(id_, "")) for id_ in ids)
    else:
        classes = base
    label_of = {entry.id: label for label, entry in enumerate(classes)}
    empty = {one.name for one in folder.folders if not one.images_below}
    unknown = [id_ for id_ in ids if id_ not in label_of and id_ not in empty]
    if unknown:
        raise ShardError(
            f"{folder.path} has {len(unknown)} class folder(s) that train lacks, as {unknown[0]!r}:"
            " labels would have no meaning; add them to train or take them out"
        )
    names: list[str] = []
    labels: list[int] = []
    prefix = len(os.path.join(folder.path, ""))
    class_folders = [one for one in folder.folders if one.name in label_of]
    for class_folder in class_folders if place.kind == "classes" else (folder,):
        for inner in class_folder.below():
            names += [os.path.join(inner.path, image)[prefix:] for image in inner.images]
            class_id = inner.name if place.kind == "innermost" else class_folder.name
            labels += [label_of[class_id]] * len(inner.images) if inner.images else []
    notes = _notes_of_classes(place, class_folders, classes)
    return SourceSplit(
        place.split, "class folders", classes, FolderSamples(folder.path, names, labels), notes
    )


def _notes_of_classes(
    place: Place, class_folders: Sequence[Folder], classes: Sequence[ClassName]
) -> tuple[str, ...]:
    folder = place.folder
    others = [name for one in class_folders for inner in one.below() for name in inner.others]
    notes = _unread([*folder.others, *others])
    if place.kind == "innermost":
        return notes
    if folder.images:
        notes += (
            f"{len(folder.images)} image(s) directly in {folder.path} belong to no class folder "
            "and are not used",
        )
    empty = [one.name for one in class_folders if not one.images_below]
    if empty:
        notes += (f"{len(empty)} class folder(s) hold no image, as {empty[0]!r}",)
    numbers = note_of_numbers([entry.id for entry in classes])
    return (*notes, numbers) if numbers else notes


def _labelled(
    split: SourceSplit,
    lists: Sequence[LabelList],
    base: tuple[ClassName, ...] | None,
    *,
    partly: str,
) -> SourceSplit | None:
    """`split` with the labels of the one list that is about its images; None if none is.

    Raises `ShardError` if a list names only some of them, or two lists disagree.
    """
    samples = split.samples
    assert isinstance(samples, FolderSamples)
    labelled: SourceSplit | None = None
    origin = ""
    for found in lists:
        labels = found.labels_of(samples.names, samples.directory)
        known = [label for label in labels if label is not None]
        if not known:
            continue
        if len(known) < len(labels):
            first = samples.names[labels.index(None)]
            raise ShardError(
                f"{found.path} has a label for {len(known)} of {len(labels)} images of "
                f"{samples.directory}; the first without is {first!r}: {partly}"
            )
        numbers, classes, note = number_labels(known, base, str(found.path))
        if labelled is not None:
            if labelled.samples != replace(samples, labels=numbers):
                raise Ambiguous(
                    f"{origin} and {found.path} give the same images other labels: --labels FILE "
                    "says which one counts"
                )
            continue
        origin = str(found.path)
        labelled = replace(
            split,
            kind=f"images, labels from {found.path.name}",
            classes=classes,
            samples=replace(samples, labels=numbers),
            notes=(*split.notes, note) if note else split.notes,
        )
    return labelled


def _loose_names(place: Place) -> tuple[str, ...]:
    """Names of images that no folder of a class tells apart from those of other splits."""
    return place.folder.images if place.kind == "flat" else ()


def _refuse_shared(found: LabelList, place: Place, elsewhere: Container[str]) -> None:
    """A list for several splits must say which of two images of one name it means."""
    of_this_split = found.path.is_relative_to(place.top.path)
    if of_this_split or split_within(found.path.stem) == (place.split or None):
        return
    shared = found.shares(_loose_names(place), elsewhere)
    if shared is not None:
        raise Ambiguous(
            f"{found.path} names {shared!r}, and several splits have an image of this name: put "
            f"the list into {place.top.path}, or write names with their folders"
        )


def _refuse_other_classes(split: SourceSplit, found: LabelList) -> None:
    samples = split.samples
    assert isinstance(samples, FolderSamples)
    labels = found.labels_of(samples.names, samples.directory)
    if None not in labels and not agree(labels, samples.labels):
        raise Ambiguous(
            f"{samples.directory}: its folders and {found.path} divide the images differently: "
            f"--labels {found.path} takes the list, --layout folders the folders as classes"
        )


def _refuse_dangling_splits(
    tree: Folder, places: Sequence[Place], wanted: Sequence[str] | None
) -> None:
    """Links that lead nowhere beside splits, where they would be one that is wanted."""
    around = {folder.path: folder for place in places for folder in tree.chain_to(place.top)}
    nowhere = [
        os.path.join(folder.path, name)
        for folder in around.values()
        for name in folder.dangling
        if (split := split_within(name)) and (wanted is None or split in wanted)
    ]
    if nowhere:
        raise _lead_nowhere(nowhere)


def _refuse_dangling(place: Place) -> None:
    """Links that lead nowhere where a class or an image would be."""
    nowhere: list[str] = []
    if place.kind == "classes":
        nowhere += [
            os.path.join(place.folder.path, name)
            for name in place.folder.dangling
            if os.path.splitext(name)[1].lower() not in LIST_EXTENSIONS and not is_image(name)
        ]
    nowhere += _dangling_images(place.folder)
    if nowhere:
        raise _lead_nowhere(nowhere)


def refuse_dangling_images(tree: Folder) -> None:
    """Raise `ShardError` where there are links to images and none leads to one."""
    nowhere = _dangling_images(tree)
    if nowhere:
        raise _lead_nowhere(nowhere)


def _dangling_images(folder: Folder) -> list[str]:
    return [os.path.join(f.path, n) for f in folder.below() for n in f.dangling if is_image(n)]


def _lead_nowhere(paths: Sequence[str]) -> ShardError:
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ShardError(
        f"{len(paths)} link(s) lead nowhere: {', '.join(paths[:_NAMED])}{more}; fetch or mount "
        "what they point at, or take them out"
    )


def _unread(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    heic = any(name.lower().endswith((".heic", ".heif")) for name in names)
    advice = "; convert HEIC to JPEG to have them" if heic else ""
    return (
        f"{len(names)} file(s) whose names do not end like an image's are ignored "
        f"({endings(names)}){advice}",
    )
