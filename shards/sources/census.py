"""What was found at a path: its splits, and every image below it that is not used, with why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.shards.sources.layout import Place
from headrace.shards.sources.samples import SourceSplit
from headrace.shards.sources.vocabulary import is_maps
from headrace.shards.sources.walk import Folder

_LINES = 12


@dataclass(frozen=True)
class Unused:
    """Image files at or below `path` that no split has, and why."""

    path: str
    images: int
    reason: str


@dataclass(frozen=True)
class Recognised:
    """What a path is.

    splits: those that were asked for, listed. other_splits: names of the rest, and how many images
    they have (None: not counted, as they lie in other files than images). unused: every image file
    below the path that is in no split.
    """

    source: Path
    splits: tuple[SourceSplit, ...]
    other_splits: Mapping[str, int | None]
    unused: tuple[Unused, ...] = ()

    @property
    def split_names(self) -> tuple[str, ...]:
        """Of all splits; () where the source has none."""
        return tuple(name for name in (*(s.name for s in self.splits), *self.other_splits) if name)

    def census(self) -> list[str]:
        """Lines to print before work starts: what was recognised, and what is not used."""
        lines = [_described(split) for split in self.splits]
        if self.other_splits:
            others = (
                name if images is None else f"{name} ({images:,} images)"
                for name, images in self.other_splits.items()
            )
            lines.append(f"not asked for: {', '.join(others)}")
        if self.unused:
            total = sum(one.images for one in self.unused)
            lines.append(f"not used: {total:,} image file(s)")
            lines += [
                f"  {one.images:,} in {one.path}: {one.reason}" for one in self.unused[:_LINES]
            ]
            if len(self.unused) > _LINES:
                rest = self.unused[_LINES:]
                images = sum(one.images for one in rest)
                lines.append(f"  {images:,} in {len(rest)} more folders")
        return lines


def _described(split: SourceSplit) -> str:
    name = f"{split.name}: " if split.name else ""
    classes = f", {len(split.classes):,} classes" if split.classes else ", no labels"
    return f"{name}{len(split.samples):,} images{classes} ({split.kind})"


def unused_images(tree: Folder, places: Sequence[Place]) -> tuple[Unused, ...]:
    """Every image of a tree that is in no place."""
    found: list[Unused] = []
    _collect(tree, places, found)
    for folder in tree.below():
        if folder.maps:
            reason = "label maps, called after the photographs beside them"
            found.append(Unused(folder.path, folder.maps, reason))
    skipped = sum(folder.skipped for folder in tree.below())
    if skipped:
        found.append(
            Unused(tree.path, skipped, "hidden, or left behind by macOS or another system")
        )
    return tuple(found)


def _collect(folder: Folder, places: Sequence[Place], found: list[Unused]) -> None:
    """Add what is unused of a folder that is, or lies around, a place."""
    here = next((place for place in places if place.folder is folder), None)
    if here is not None and (here.deep or here.kind == "innermost"):
        return
    if folder.images and not (here and here.kind == "flat"):
        reason = "loose beside the folders that count" if places else _reason(places)
        found.append(Unused(folder.path, len(folder.images), reason))
    for inner in folder.inner:
        if here is not None and here.kind == "classes":
            continue
        if any(inner is one for place in places for one in _around(folder, place)):
            _collect(inner, places, found)
            continue
        reason = "label maps, no photographs" if is_maps(inner.name) else _reason(places)
        found.append(Unused(inner.path, inner.images_below, reason))


def _around(folder: Folder, place: Place) -> tuple[Folder, ...]:
    return folder.chain_to(place.folder)[1:2]


def _reason(places: Sequence[Place]) -> str:
    if not places:
        return "beside arrays or Parquet"
    splits = ", ".join(place.split for place in places if place.split)
    return f"none of the splits {splits}" if splits else "beside the folder of photographs"
