"""The one walk through a directory: every folder is listed once, and no file is opened or asked for
its size.

What is skipped is skipped for every way into a data set: hidden names, and what macOS, Synology and
file systems leave behind. Links to folders are followed, as people make subsets of links; one that
leads back into itself is refused, and one that leads nowhere is kept by name.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from headrace.shards.index import ShardError
from headrace.shards.sources.vocabulary import is_image, maps_among

_SKIPPED = frozenset(
    ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
)
_DEPTH_AT_MOST = 100


@dataclass(frozen=True, slots=True)
class Folder:
    """What one directory holds. Names are sorted.

    name: the last part of `path`. others: names of files that do not end like an image's. dangling:
    names of links that lead nowhere. skipped: number of image names in skipped folders and files.
    maps: number of images that are called after another one here, as label maps of it.
    images_below: number of images here and in all folders below.
    """

    name: str
    path: str
    folders: tuple["Folder", ...]
    images: tuple[str, ...]
    others: tuple[str, ...]
    dangling: tuple[str, ...]
    skipped: int
    maps: int
    images_below: int

    @property
    def inner(self) -> tuple["Folder", ...]:
        """The folders directly inside that have images at any depth."""
        return tuple(folder for folder in self.folders if folder.images_below)

    def below(self) -> Iterator["Folder"]:
        """This folder and every one below it, in the order of torchvision: sorted by path."""
        yield from sorted(self._all(), key=lambda folder: folder.path)

    def chain_to(self, folder: "Folder") -> tuple["Folder", ...]:
        """The folders from this one down to `folder`, which lies below it or is it."""
        if folder is self:
            return (self,)
        for inner in self.folders:
            if folder.path == inner.path or folder.path.startswith(os.path.join(inner.path, "")):
                return (self, *inner.chain_to(folder))
        return (self,)

    def _all(self) -> Iterator["Folder"]:
        yield self
        for folder in self.folders:
            yield from folder._all()


def walk(path: str) -> Folder:
    """Everything below a directory. Raises `ShardError` for a link that leads back to a folder
    around it, OSError for a folder that cannot be read."""
    return _walk(path, os.path.basename(path), (os.path.realpath(path),))


def _walk(path: str, name: str, around: tuple[str, ...]) -> Folder:
    """around: the real paths of the folders that this one lies in, itself the last."""
    if len(around) > _DEPTH_AT_MOST:
        raise ShardError(f"{path} lies {_DEPTH_AT_MOST} folders deep: point at what is meant")
    inner: list[tuple[str, str]] = []
    images, others, dangling = [], [], []
    skipped = 0
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _SKIPPED:
                skipped += _images_in(entry)
            elif entry.is_dir():
                real = os.path.join(around[-1], entry.name)
                inner.append(
                    (entry.name, _real_link(entry, around) if entry.is_symlink() else real)
                )
            elif entry.is_file():
                (images if is_image(entry.name) else others).append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                dangling.append(entry.name)
    folders = tuple(
        _walk(os.path.join(path, inner_name), inner_name, (*around, real))
        for inner_name, real in sorted(inner)
    )
    maps = maps_among(images)
    images = [name for name in images if name not in maps]
    below = len(images) + sum(folder.images_below for folder in folders)
    return Folder(
        name,
        path,
        folders,
        images=tuple(sorted(images)),
        others=tuple(sorted(others)),
        dangling=tuple(sorted(dangling)),
        skipped=skipped,
        maps=len(maps),
        images_below=below,
    )


def _real_link(entry: os.DirEntry[str], around: tuple[str, ...]) -> str:
    real = os.path.realpath(entry.path)
    if any(place == real or place.startswith(os.path.join(real, "")) for place in around):
        raise ShardError(f"{entry.path} is a link to a folder around it: take it out")
    return real


def _images_in(entry: os.DirEntry[str]) -> int:
    """How many names end like an image's in what is skipped; links are not followed."""
    if not entry.is_dir(follow_symlinks=False):
        return int(is_image(entry.name))
    try:
        return sum(
            is_image(name)
            for _, _, names in os.walk(entry.path, followlinks=False)
            for name in names
        )
    except OSError:
        return 0
