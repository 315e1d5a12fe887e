"""WebDataset tars as a source.

What a tar holds is `tar_samples`' to say, and `tar_labels` what its labels mean, so that converting
tars and opening them gives the same names and labels.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from headrace.shards.class_numbers import ClassNumbers, numbered_by
from headrace.shards.manifest import ClassName
from headrace.shards.sources.samples import RangeReference, Sample, SourceSplit
from headrace.shards.tar_labels import number_labels, read_class_names
from headrace.shards.tar_samples import Member, TarScan, iterate_members, scan_tar
from headrace.shards.tar_sets import TarSet


def list_tar_set(tars: TarSet, only: str | None) -> list[SourceSplit]:
    """List WebDataset tars as splits; classes are numbered alike in all of them, by train's.

    only: the name of the one split wanted.
    Raises `ShardError` for what is no tar, holds no image, or has a label that train lacks.
    """
    if only is not None and only not in tars.splits:
        return []
    listed: dict[str, tuple[list[Sample], ClassNumbers]] = {}
    for split, paths in tars.splits.items():
        scans = [scan_tar(path) for path in paths]
        numbers = number_labels(paths, scans, read_class_names(paths[0].parent))
        listed[split] = _samples(paths, scans), numbers
    _, first = next(iter(listed.values()))
    splits: list[SourceSplit] = []
    for split, (samples, numbers) in listed.items():
        if only not in (None, split):
            continue
        if first.classes and numbers.classes:
            numbers = numbered_by(numbers, first.classes, f"the {split} tars")
        labels = numbers.labels.tolist()
        samples = [
            replace(sample, label=label) for sample, label in zip(samples, labels, strict=True)
        ]
        classes = tuple(ClassName(name) for name in numbers.classes)
        splits.append(SourceSplit(split, "WebDataset tars", classes, samples, numbers.notes))
    return splits


def _samples(paths: Sequence[Path], scans: Sequence[TarScan]) -> list[Sample]:
    return [
        Sample(image.name, image.label, RangeReference(str(path), image.offset, image.length))
        for path, scan in zip(paths, scans, strict=True)
        for image in scan.images
    ]


def list_tar_of_tars(path: Path) -> list[SourceSplit] | None:
    """A tar that holds one tar of images per class, named after it; None if it holds other things.

    The inner tars are read in place.
    """
    inner: list[Member] = []
    for member in iterate_members(path):
        if not member.name.endswith(".tar"):
            return None
        inner.append(member)
    if not inner:
        return None
    names = sorted(PurePosixPath(member.name).stem for member in inner)
    samples: list[Sample] = []
    for member in inner:
        name = PurePosixPath(member.name).stem
        samples += [
            Sample(
                f"{name}/{PurePosixPath(image.name).name}",
                names.index(name),
                RangeReference(str(path), image.offset, image.length),
            )
            for image in iterate_members(path, member.offset)
        ]
    classes = tuple(ClassName(name) for name in names)
    return [SourceSplit("", "a tar of one tar per class", classes, samples)]
