"""Which tars belong together: a file, or a folder of them; splits are in names or folders."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.shards.index import ShardError
from headrace.shards.split_names import splits_in
from headrace.shards.tar_samples import IMAGE_EXTENSIONS

IMAGENET_PREFIX = "ILSVRC2012_img_"
"""ImageNet's own tars begin with it; `imagenet` lists them."""
_SPLITS = ("", "train", "val", "test", "unlabeled")
_PACKED = {
    ".tar.gz": "tar -xzf",
    ".tgz": "tar -xzf",
    ".tar.bz2": "tar -xjf",
    ".tar.xz": "tar -xJf",
    ".tar.zst": "tar --zstd -xf",
    ".zip": "unzip",
    ".7z": "7z x",
    ".rar": "unrar x",
    ".gz": "gunzip",
}


@dataclass(frozen=True)
class TarSet:
    """Tars that belong together.

    splits: "train", "val", "test", or "" for tars whose names say none, to the tars of each, sorted
    by path.
    """

    splits: Mapping[str, tuple[Path, ...]]


def recognise_tars(path: Path) -> TarSet | None:
    """The WebDataset tars that a path is: a .tar, or a folder of tars, or one of such folders.

    None where there are none, where images or other folders lie beside them (those say then what
    the folder is), and for ImageNet's own tars. No tar is opened.
    Raises `ShardError` where some names say a split and others do not, or one says several.
    """
    if path.is_file():
        return tar_set([path], named=True) if path.suffix.lower() == ".tar" else None
    tars, folders = _tars_and_folders(path)
    if tars and folders:
        return None
    for folder in folders:
        inner_tars, inner_folders = _tars_and_folders(folder)
        if inner_folders or not inner_tars:
            return None
        tars += inner_tars
    return tar_set(tars)


def _tars_and_folders(path: Path) -> tuple[list[Path], list[Path]]:
    """What a folder holds of these, hidden ones left out; nothing where an image lies in it."""
    tars: list[Path] = []
    folders: list[Path] = []
    with os.scandir(path) as entries:
        for entry in entries:
            ending = os.path.splitext(entry.name)[1].lower().removeprefix(".")
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if entry.is_dir():
                folders.append(path / entry.name)
            elif ending == "tar":
                tars.append(path / entry.name)
            elif ending in IMAGE_EXTENSIONS:
                return [], []
    return tars, sorted(folders)


def tar_set(paths: Iterable[Path], *, named: bool = False) -> TarSet | None:
    """The same for tars that were found, or were all `named` one by one: these have one split."""
    kept = sorted(p for p in paths if p.name[0] != "." and not p.name.startswith(IMAGENET_PREFIX))
    if not kept:
        return None
    in_folders = len({path.parent for path in kept}) > 1
    groups: dict[str, list[Path]] = {}
    for path in kept:
        names = (path.stem, path.parent.name) if in_folders else (path.stem,)
        groups.setdefault(_split_of(path, names), []).append(path)
    if named and len(groups) == 1:
        groups = {"": kept}
    if "" in groups and len(groups) > 1:
        other = next(paths[0] for split, paths in groups.items() if split)
        raise ShardError(
            f"{groups[''][0]}: its name says no split, but {other.name} does; name the tars of one "
            f"split (such as {other.parent / re.sub('[0-9]+', '*', other.name)}), or move it away"
        )
    return TarSet({split: tuple(groups[split]) for split in _SPLITS if split in groups})


def _split_of(path: Path, names: Sequence[str]) -> str:
    """What the first of `names` says that says anything."""
    for name in names:
        splits = splits_in(name)
        if len(splits) > 1:
            raise ShardError(f"{path}: {name} names several splits; keep one in it")
        if splits:
            return min(splits)
    return ""


def refuse_packed(path: Path) -> None:
    """Raises `ShardError` for a packed archive, or a folder that holds one, with the way out."""
    names = [path.name] if path.is_file() else sorted(os.listdir(path))
    for name in names:
        command = next((c for end, c in _PACKED.items() if name.lower().endswith(end)), None)
        if command is not None:
            where = path if path.is_file() else path / name
            raise ShardError(
                f"{where} is packed, and images inside cannot be read in place: unpack it "
                f"({command} {name}) and name the folder or the tar that comes out"
            )
