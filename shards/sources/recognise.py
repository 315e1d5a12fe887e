"""Recognise what a directory or file of images is, by looking, and list its samples.

Nobody should have to describe a data set that explains itself. What is looked for, in this order:
arrays (train.npz), ImageNet's tars, Hugging Face's Parquet, and directories: splits at any depth,
classes as folders, or images without classes. Anything else is an error that says what was found
and what was expected; guessing further would give wrong labels.

Labels: position of the class in the sorted folder names (torchvision's ImageFolder order); ImageNet
in any of its packagings gives the same labels, the position among the sorted WordNet ids.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from headrace.shards.index import ShardError
from headrace.shards.manifest import MANIFEST_FILE, ClassName
from headrace.shards.sources.arrays import list_arrays
from headrace.shards.sources.imagenet import ImageNetFacts, find_facts, list_tars
from headrace.shards.sources.parquet import list_parquet
from headrace.shards.sources.samples import FileReference, Sample, SourceSplit
from headrace.shards.sources.tars import list_tar_of_tars, list_tar_set
from headrace.shards.split_names import SPLIT_NAMES
from headrace.shards.tar_sets import recognise_tars, refuse_packed

IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".ppm", ".pgm", ".pnm", ".bmp", ".tif", ".tiff", ".webp",
     ".gif", ".jp2", ".avif", ".mpo")
)  # fmt: skip
"""What is looked at in a folder. torchvision's list and the formats that are converted."""

EXPECTED = (
    "expected one of: a folder with one sub-folder of images per class, at the top or in "
    "train/, val/, test/ at any depth; a folder of images; ImageNet's tars "
    "(ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12) or Kaggle's "
    "ILSVRC folder; WebDataset tars; Parquet files as Hugging Face writes them; arrays "
    "(train.npz with images, labels, classes)"
)
_SPLIT_ORDER = ("", "train", "val", "test")
_DEPTH_AT_MOST = 5


def list_source(source: Path, only: str | None = None) -> list[SourceSplit]:
    """List the splits of a source: train, val, test as far as they are there, or one named "".

    only: the name of the one split wanted; the others are not listed then.
    Raises `ShardError` if nothing is recognised, the split is missing, val or test have a class
    that train lacks, or something cannot be read.
    """
    source = Path(os.path.abspath(source.expanduser()))
    if not source.exists():
        raise ShardError(f"{source} does not exist; {EXPECTED}")
    try:
        splits = _list(source, only)
    except OSError as error:
        where = error.filename or source
        raise ShardError(f"cannot read {where}: {error.strerror or error}") from error
    if not splits:
        refuse_packed(source)
        wanted = f"no split {only!r}" if only else "no images"
        raise ShardError(f"{source}: {wanted} found ({_describe(source)}); {EXPECTED}")
    for split in splits:
        if not split.samples:
            raise ShardError(f"{source}: the split {split.name!r} ({split.kind}) holds no image")
    return sorted(splits, key=lambda split: _SPLIT_ORDER.index(split.name))


def _list(source: Path, only: str | None) -> list[SourceSplit]:
    if source.is_file():
        match source.suffix:
            case ".npz":
                return list_arrays({"": [source]}, only)
            case ".parquet":
                return list_parquet({"": [source]}, only)
            case ".tar":
                return _list_tar(source, only)
            case _:
                return []
    arrays = _by_split(source.glob("*.npz"))
    if arrays.keys() - {""}:
        return list_arrays(arrays, only)
    if (source / MANIFEST_FILE).is_file() or any(source.glob(f"*/{MANIFEST_FILE}")):
        raise ShardError(f"{source} already holds shards that make_shards wrote; open them as such")
    tar_set = recognise_tars(source)
    if tar_set is not None:
        return list_tar_set(tar_set, only)
    parquet = _by_split(chain(source.glob("*.parquet"), source.glob("*/*.parquet")))
    if parquet:
        return list_parquet(parquet, only)
    tars = sorted(source.glob("ILSVRC2012_img_*.tar"))
    facts = find_facts(source)
    splits = list_tars(tars, facts, only)
    root = _find_root(source)
    if root is not None:
        listed = {split.name for split in splits}
        splits += [s for s in _list_tree(root, facts, only, bool(tars)) if s.name not in listed]
    return splits


def _list_tar(source: Path, only: str | None) -> list[SourceSplit]:
    tar_set = recognise_tars(source)
    if tar_set is None:
        return list_tars([source], find_facts(source.parent), only)
    return list_tar_of_tars(source) or list_tar_set(tar_set, only)


def _by_split(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files grouped by the split that their name (train-00000-of-00010) or folder says."""
    groups: dict[str, list[Path]] = {}
    for file in sorted(files):
        words = file.stem.lower().replace("_", "-").split("-")
        name = SPLIT_NAMES.get(words[0], SPLIT_NAMES.get(file.parent.name.lower(), ""))
        groups.setdefault(name, []).append(file)
    return groups


@dataclass
class _Folder:
    """What one directory holds, names sorted; hidden entries do not count."""

    path: Path
    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    others: int = 0


def _look(path: Path) -> _Folder:
    folder = _Folder(path)
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folder.folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS:
                folder.images.append(entry.name)
            else:
                folder.others += 1
    folder.folders.sort()
    folder.images.sort()
    return folder


def _find_root(source: Path) -> Path | None:
    """The directory that holds the splits or, failing that, the classes or images."""
    for inside in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"):
        # Known by name: beside it lie half a million annotation files in a tree of the same shape.
        if (source / inside).is_dir():
            return source / inside
    level = [_look(source)]
    for _ in range(_DEPTH_AT_MOST):
        for folder in level:
            if _split_folders(folder):
                return folder.path
        if any(folder.images for folder in level):
            break
        level = [_look(folder.path / name) for folder in level for name in folder.folders]
    else:
        return None
    # No splits: down to the first directory that has images, or several directories.
    folder = _look(source)
    while not folder.images and len(folder.folders) == 1:
        inner = _look(folder.path / folder.folders[0])
        if inner.images:
            break
        folder = inner
    has_images = bool(folder.images) or any(
        True for name in folder.folders for _ in _walk_images(folder.path / name)
    )
    return folder.path if has_images else None


def _split_folders(folder: _Folder) -> dict[str, str]:
    """Split name -> folder name, {} if the sub-folders are no splits.

    A class may be called "train" too. It is one if it holds images itself, and so does a neighbour
    that is not named like a split.
    """
    named = {
        name: SPLIT_NAMES[name.lower()] for name in folder.folders if name.lower() in SPLIT_NAMES
    }
    held = {name: _look(folder.path / name) for name in named}
    held = {name: look for name, look in held.items() if look.folders or look.images}
    if any(look.images for look in held.values()):
        neighbours = (name for name in folder.folders if name not in named)
        if any(_look(folder.path / name).images for name in neighbours):
            return {}
    splits: dict[str, str] = {}
    for name in held:
        if not any(True for _ in _walk_images(folder.path / name)):
            continue
        if named[name] in splits:
            other = splits[named[name]]
            raise ShardError(f"{folder.path}: {other} and {name} are both a {named[name]} split")
        splits[named[name]] = name
    return splits


def _list_tree(
    root: Path, facts: ImageNetFacts, only: str | None, only_splits: bool
) -> list[SourceSplit]:
    top = _look(root)
    folders = _split_folders(top)
    if not folders:
        if only or only_splits:
            return []
        return [_list_folder("", top, None, facts)]
    train = _look(root / folders["train"]) if "train" in folders else None
    train_classes = train.folders if train is not None and train.folders else None
    return [
        _list_folder(name, _look(root / folder), train_classes, facts)
        for name, folder in folders.items()
        if only in (None, name)
    ]


def _list_folder(
    name: str, folder: _Folder, train_classes: list[str] | None, facts: ImageNetFacts
) -> SourceSplit:
    if folder.folders:
        return _list_classes(name, folder, train_classes, facts)
    split = SourceSplit(
        name,
        "images without class folders",
        (),
        [Sample(i, -1, FileReference(os.path.join(folder.path, i))) for i in folder.images],
        _ignored(folder.others),
    )
    if facts.wordnet_ids and name in ("val", ""):
        labelled = facts.labelled(split, train_classes)
        if labelled is not None:
            return labelled
    if train_classes is None:
        return split
    note = (
        f"{folder.path} has no class folders and no list of its labels was found "
        "(LOC_val_solution.csv, ILSVRC2012_devkit_t12): its labels are -1"
    )
    return replace(split, notes=(*split.notes, note))


def _list_classes(
    name: str, folder: _Folder, train_classes: list[str] | None, facts: ImageNetFacts
) -> SourceSplit:
    ids = folder.folders if train_classes is None else train_classes
    unknown = sorted(set(folder.folders) - set(ids))
    if unknown:
        raise ShardError(
            f"{folder.path} has {len(unknown)} class folder(s) that train lacks, as {unknown[0]!r}:"
            " labels would have no meaning; add them to train or take them out"
        )
    label_of = {class_id: label for label, class_id in enumerate(ids)}
    samples: list[Sample] = []
    others, empty = 0, []
    for class_id in folder.folders:
        before = len(samples)
        for inside, images, ignored in _walk(folder.path / class_id):
            prefix = class_id if inside == "." else f"{class_id}/{inside}"
            samples += [
                Sample(
                    f"{prefix}/{image}",
                    label_of[class_id],
                    FileReference(os.path.join(folder.path, prefix, image)),
                )
                for image in images
            ]
            others += ignored
        if len(samples) == before:
            empty.append(class_id)
    notes = _ignored(others + folder.others)
    if folder.images:
        notes += (
            f"{len(folder.images)} image(s) directly in {folder.path} belong to no class folder "
            "and are not converted",
        )
    if empty:
        notes += (f"{len(empty)} class folder(s) hold no image, as {empty[0]!r}",)
    classes = tuple(ClassName(class_id, facts.class_names.get(class_id, "")) for class_id in ids)
    return SourceSplit(name, "class folders", classes, samples, notes)


def _ignored(others: int) -> tuple[str, ...]:
    return (
        (f"{others} file(s) whose names do not end like an image's are ignored",) if others else ()
    )


def _walk(root: Path) -> Iterator[tuple[str, list[str], int]]:
    """(path below root, image names, number of other files) of every directory with files.

    In torchvision's order: directories sorted by path, names sorted within. Links are followed.
    """

    def refuse(error: OSError) -> None:
        raise error

    walked: list[tuple[str, list[str], int]] = []
    for directory, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        for name in folders:
            inner = os.path.join(directory, name)
            if os.path.islink(inner) and os.path.realpath(directory).startswith(
                os.path.join(os.path.realpath(inner), "")
            ):
                raise ShardError(f"{inner} is a link to a folder around it: take it out")
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = sorted(
            name
            for name in files
            if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and name[0] != "."
        )
        others = sum(not name.startswith(".") for name in files) - len(images)
        if images or others:
            walked.append((directory, images, others))
    for directory, images, others in sorted(walked):
        yield os.path.relpath(directory, root), images, others


def _walk_images(root: Path) -> Iterator[str]:
    """Names of image files at any depth, as they come: to see whether there is one at all."""
    for _, _, files in os.walk(root, followlinks=False):
        for name in files:
            if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS:
                yield name


def _describe(source: Path) -> str:
    if source.is_file():
        return f"a file that ends in {source.suffix!r}"
    names = sorted(os.listdir(source))
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"it holds {listed}" if names else "it is empty"
