"""Recognise what a directory or file of images is, by looking: the one look for every way in.

Nobody should have to describe a data set that explains itself. What is looked for, in this order:
arrays (train.npz, CIFAR's pickles), Hugging Face's Parquet, ImageNet's tars, and directories:
splits at any depth, classes as folders, or images without classes. Anything else is an error that
says what was found and what was expected; where several readings are likely it names them and the
option that decides. The whole tree is listed once, and every image that is not used is counted.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from headrace.shards.index import INDEX_FILE, ShardError
from headrace.shards.local import local_path
from headrace.shards.manifest import MANIFEST_FILE, PARTS_DIRECTORY
from headrace.shards.patterns import expand, is_pattern
from headrace.shards.sources.arrays import ArrayFiles, find_arrays, list_arrays
from headrace.shards.sources.census import Recognised, unused_images
from headrace.shards.sources.folders import list_places, refuse_dangling_images
from headrace.shards.sources.imagenet import find_facts, find_tars, list_tars
from headrace.shards.sources.layout import AS_FOUND, Choices, find_places
from headrace.shards.sources.parquet import list_parquet
from headrace.shards.sources.samples import SourceSplit
from headrace.shards.sources.tars import list_tar_of_tars, list_tar_set
from headrace.shards.sources.vocabulary import SPLIT_ORDER, SPLITS, split_of
from headrace.shards.sources.walk import Folder, walk
from headrace.shards.tar_sets import recognise_tars, refuse_packed, tar_set

_NOT_COUNTED: Mapping[str, int] = {}
EXPECTED = (
    "expected one of: a folder with one sub-folder of images per class, at the top or in "
    "train/, val/, test/ at any depth; a folder of images; ImageNet's tars "
    "(ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12) or Kaggle's "
    "ILSVRC folder; WebDataset tars; Parquet files as Hugging Face writes them; arrays "
    "(train.npz with images, labels, classes)"
)


class NothingFound(ShardError):
    """There is something at the path, and nothing of it is recognised."""


def recognise(
    source: Path, wanted: Sequence[str] | None = None, choices: Choices = AS_FOUND
) -> Recognised:
    """Look at a path: its splits, or one called "", and what is not used.

    wanted: names of splits, of which the first that is there is listed; None: all. It is without
    effect where there are no splits. choices: what a person says of a source that is not clear.
    Raises `ShardError` if nothing is recognised, several readings are likely, a split that is
    listed has a class that train lacks, or something cannot be read.
    """
    source = local_path(source)
    pattern = not source.exists() and is_pattern(str(source))
    if not source.exists() and not pattern:
        raise ShardError(f"{source} does not exist; {EXPECTED}")
    try:
        look = _look_at_pattern if pattern else _look
        recognised = look(source, wanted, choices)
    except OSError as error:
        where = error.filename or source
        raise ShardError(f"cannot read {where}: {error.strerror or error}") from error
    if not recognised.splits and not recognised.other_splits:
        refuse_packed(source)
        raise NothingFound(f"{source}: no images found ({_describe(source)}); {EXPECTED}")
    for split in recognised.splits:
        if not split.samples:
            raise ShardError(f"{source}: the split {split.name!r} ({split.kind}) holds no image")
    return recognised


def list_source(
    source: Path, only: str | None = None, choices: Choices = AS_FOUND
) -> list[SourceSplit]:
    """The splits of a source: train, val, test, unlabeled as far as they are there, or one "".

    only: the name of the one split wanted; the others are not listed then. See `recognise`.
    """
    recognised = recognise(source, None if only is None else (only,), choices)
    require_split(recognised, only)
    return list(recognised.splits)


def require_split(recognised: Recognised, only: str | None) -> None:
    """Raise `ShardError` if a split is asked for that is not there."""
    if only is not None and only not in recognised.split_names:
        there = ", ".join(recognised.split_names) or "no splits"
        raise ShardError(f"{recognised.source}: no split {only!r} found, it has {there}")


def _look(source: Path, wanted: Sequence[str] | None, choices: Choices) -> Recognised:
    if source.is_file():
        refuse_choices(source, choices)
        return _look_at_file(source)
    tree = walk(str(source))
    arrays = find_arrays(tree)
    if arrays is not None:
        refuse_choices(source, choices)
        only = _chosen(arrays.by_split, wanted)
        splits = list_arrays(arrays, only)
        return Recognised(
            source, _sorted(splits), _others(arrays.by_split, splits), unused_images(tree, ())
        )
    _refuse_shards(source)
    tars_of_others = recognise_tars(source)
    if tars_of_others is not None:
        refuse_choices(source, choices)
        splits = list_tar_set(tars_of_others, _chosen(tars_of_others.splits, wanted))
        return Recognised(source, _sorted(splits), _others(tars_of_others.splits, splits))
    parquet = _by_split(source, _files_of(tree, ".parquet"))
    if parquet and not tree.images_below:
        refuse_choices(source, choices)
        only = _chosen(parquet, wanted)
        splits = list_parquet(parquet, only)
        return Recognised(
            source, _sorted(splits), _others(parquet, splits), unused_images(tree, ())
        )
    facts = find_facts(source)
    tars = find_tars(sorted(source.glob("ILSVRC2012_img_*.tar")))
    places = find_places(tree, choices)
    if not places and not tars:
        refuse_dangling_images(tree)
    if tars:
        places = [place for place in places if place.split and place.split not in tars]
    names = [*tars, *(place.split for place in places)]
    only = _chosen(names, wanted)
    splits = list_tars(tars, facts, only) if only is None or only in tars else []
    splits += list_places(tree, places, choices, facts, None if only is None else (only,))
    counts = {place.split: place.images for place in places}
    others = _others(names, splits, counts)
    return Recognised(source, _sorted(splits), others, unused_images(tree, places))


def _look_at_pattern(source: Path, wanted: Sequence[str] | None, choices: Choices) -> Recognised:
    """WebDataset tars that a glob or braces name."""
    refuse_choices(source, choices)
    paths = tuple(expand(str(source)))
    others = [path for path in paths if path.suffix != ".tar"]
    if others:
        raise ShardError(f"{others[0]} is no tar: {source} may name WebDataset tars and no others")
    tars = tar_set(paths, named=True)
    assert tars is not None or not paths
    if tars is None:
        return Recognised(source, (), {})
    splits = list_tar_set(tars, _chosen(tars.splits, wanted))
    return Recognised(source, _sorted(splits), _others(tars.splits, splits))


def refuse_choices(source: Path, choices: Choices) -> None:
    """Raise `ShardError` where something is said that is without effect: this is no folder."""
    given = [part.name for part in fields(choices) if getattr(choices, part.name) != part.default]
    if given:
        raise ShardError(
            f"{source}: {' and '.join(given)} say how folders of images are read, and this is "
            "none: leave it out (a classes.txt beside tars names their classes)"
        )


def _refuse_shards(source: Path) -> None:
    """What make_shards wrote, or began to write, is no source."""
    if (source / MANIFEST_FILE).is_file() or any(source.glob(f"*/{MANIFEST_FILE}")):
        raise ShardError(f"{source} already holds shards that make_shards wrote; open them as such")
    for folder in (source, *(source / split for split in SPLITS)):
        if (folder / INDEX_FILE).exists() or (folder / PARTS_DIRECTORY).exists():
            raise ShardError(
                f"{folder} holds shards and no {MANIFEST_FILE}: make_shards did not end there, run "
                "it again to finish"
            )


def _look_at_file(source: Path) -> Recognised:
    match source.suffix:
        case ".npz":
            splits = list_arrays(ArrayFiles({"": [source]}))
        case ".parquet":
            splits = list_parquet({"": [source]}, None)
        case ".tar":
            splits = _list_tar(source)
        case _:
            splits = []
    return Recognised(source, tuple(splits), {})


def _list_tar(source: Path) -> list[SourceSplit]:
    tar_set = recognise_tars(source)
    if tar_set is None:
        return list_tars(find_tars([source]), find_facts(source.parent), None)
    return list_tar_of_tars(source) or list_tar_set(tar_set, None)


def _chosen(names: Iterable[str], wanted: Sequence[str] | None) -> str | None:
    """The split to list: the first of those wanted that is there. None: all of them."""
    names = list(names)
    if wanted is None or not any(names):
        return None
    return next((name for name in wanted if name in names), "none of them")


def _sorted(splits: Iterable[SourceSplit]) -> tuple[SourceSplit, ...]:
    return tuple(sorted(splits, key=lambda split: SPLIT_ORDER.index(split.name)))


def _others(
    names: Iterable[str], splits: Iterable[SourceSplit], counts: Mapping[str, int] = _NOT_COUNTED
) -> dict[str, int | None]:
    """Splits that are not listed, and how many images they have as far as that is known."""
    left = set(names) - {split.name for split in splits}
    return {name: counts.get(name) for name in SPLIT_ORDER if name in left}


def _files_of(tree: Folder, ending: str) -> list[Path]:
    return [Path(f.path) / name for f in tree.below() for name in f.others if name.endswith(ending)]


def _by_split(source: Path, files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files grouped by the split that their name (train-00000-of-00010) or a folder says."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        first = file.stem.lower().replace("_", "-").split("-")[0]
        around = file.parent.relative_to(source.parent).parts[::-1]
        name = next((split for part in (first, *around) if (split := split_of(part))), "")
        groups.setdefault(name, []).append(file)
    return groups


def _describe(source: Path) -> str:
    if source.is_file():
        return f"a file that ends in {source.suffix!r}"
    names = sorted(os.listdir(source))
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    phone = any(name.lower().endswith((".heic", ".heif")) for name in names)
    advice = "; convert HEIC to JPEG to have them" if phone else ""
    return f"it holds {listed}{advice}" if names else "it is empty"
