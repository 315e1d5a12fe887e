"""ImageNet (ILSVRC 2012) as people hold it: official tars, the devkit, Kaggle's lists.

The training tar holds one tar per class; its images are read in place, by offset. Validation images
lie flat in every packaging, and their labels stand elsewhere: in the devkit as ILSVRC2012_IDs,
whose order is *not* that of the sorted WordNet ids (meta.mat maps them), or in Kaggle's
LOC_val_solution.csv as WordNet ids. Labels here are positions among the sorted WordNet ids, as
torchvision's ImageFolder gives them for the training tree.
"""

import csv
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from headrace.shards.index import ShardError
from headrace.shards.manifest import ClassName
from headrace.shards.sources.matlab import read_matlab
from headrace.shards.sources.samples import (
    RangeReference,
    Sample,
    SourceSplit,
    relabelled,
)

SOLUTION_FILE = "LOC_val_solution.csv"
SYNSET_FILE = "LOC_synset_mapping.txt"
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH_FILE = "ILSVRC2012_validation_ground_truth.txt"
_TAR_PREFIX = "ILSVRC2012_img_"
_ANCESTORS = 3


@dataclass(frozen=True)
class ImageNetFacts:
    """What is known apart from the images.

    class_names: WordNet id -> human name. wordnet_ids: stem of a validation image -> WordNet id.
    origin: the file that says so.
    """

    class_names: dict[str, str] = field(default_factory=dict)
    wordnet_ids: dict[str, str] = field(default_factory=dict)
    origin: str = ""

    def labelled(
        self, split: SourceSplit, train_classes: Sequence[str] | None
    ) -> SourceSplit | None:
        """`split` with labels; None if these facts are about other images.

        Raises `ShardError` if a label is missing or means a class that train does not have.
        """
        wordnet_ids = [self.wordnet_ids.get(Path(sample.name).stem) for sample in split.samples]
        if not any(wordnet_ids):
            return None
        ids = sorted(set(self.wordnet_ids.values())) if train_classes is None else train_classes
        label_of = {wordnet_id: label for label, wordnet_id in enumerate(ids)}
        labels: list[int] = []
        for sample, wordnet_id in zip(split.samples, wordnet_ids, strict=True):
            if wordnet_id is None:
                raise ShardError(f"{self.origin} has no label for {sample.name}")
            if wordnet_id not in label_of:
                raise ShardError(
                    f"{self.origin}: {sample.name} is of class {wordnet_id}, which train lacks: "
                    "labels would have no meaning; complete train"
                )
            labels.append(label_of[wordnet_id])
        return replace(
            split,
            kind=f"{split.kind}, labels from {Path(self.origin).name}",
            classes=self.classes(ids),
            samples=relabelled(split.samples, labels),
        )

    def classes(self, wordnet_ids: Sequence[str]) -> tuple[ClassName, ...]:
        """Classes with human names as far as they are known."""
        return tuple(ClassName(id_, self.class_names.get(id_, "")) for id_ in wordnet_ids)


def find_facts(source: Path) -> ImageNetFacts:
    """Look for lists of labels and names in `source` and in up to three directories above it."""
    for place in (source, *list(source.parents)[:_ANCESTORS]):
        names = _read_synsets(place / SYNSET_FILE)
        solution = place / SOLUTION_FILE
        if solution.is_file():
            return ImageNetFacts(names, _read_solution(solution), str(solution))
        facts = _read_devkit(place)
        if facts is not None:
            return replace(facts, class_names={**facts.class_names, **names})
        if names:
            return ImageNetFacts(names)
    return ImageNetFacts()


def find_tars(paths: Sequence[Path]) -> dict[str, Path]:
    """ImageNet's own tars (ILSVRC2012_img_train.tar and so on) by split; others are refused."""
    by_split: dict[str, Path] = {}
    for path in paths:
        split = path.stem.removeprefix(_TAR_PREFIX).split("_")[0]
        if not path.stem.startswith(_TAR_PREFIX) or split not in ("train", "val", "test"):
            raise ShardError(
                f"{path} is none of ImageNet's tars (ILSVRC2012_img_train.tar, ..._val.tar): "
                "unpack it, or open it directly if it is a WebDataset shard"
            )
        if path.stem == f"{_TAR_PREFIX}train_t3":
            continue  # the dogs of a separate task, all of them also in the training tar
        by_split[split] = path
    return by_split


def list_tars(
    by_split: Mapping[str, Path], facts: ImageNetFacts, only: str | None
) -> list[SourceSplit]:
    """List the official tars of `find_tars`."""
    train_classes = _class_members(by_split["train"]) if "train" in by_split else None
    ids = None if train_classes is None else sorted(train_classes)
    splits: list[SourceSplit] = []
    for split, path in by_split.items():
        if only not in (None, split):
            continue
        if split == "train":
            splits.append(_list_train(path, train_classes or {}, facts))
            continue
        samples = [
            Sample(PurePosixPath(member.name).name, -1, _reference(path, member))
            for member in _members(path, 0, path.stat().st_size)
        ]
        samples.sort(key=lambda sample: sample.name)
        listed = SourceSplit(split, "ImageNet's tar", (), samples)
        if split == "val":
            listed = facts.labelled(listed, ids)
            if listed is None:
                raise ShardError(
                    f"{path} has no labels: put {DEVKIT}.tar.gz beside it (or Kaggle's "
                    f"{SOLUTION_FILE}), or convert only the training images with --split train"
                )
        splits.append(listed)
    return splits


def _list_train(
    path: Path, class_members: dict[str, tarfile.TarInfo], facts: ImageNetFacts
) -> SourceSplit:
    label_of = {wordnet_id: label for label, wordnet_id in enumerate(sorted(class_members))}
    samples: list[Sample] = []
    # In the order of the tar, so that workers read forwards.
    for wordnet_id, outer in class_members.items():
        for member in _members(path, outer.offset_data, outer.offset_data + outer.size):
            name = f"{wordnet_id}/{PurePosixPath(member.name).name}"
            samples.append(Sample(name, label_of[wordnet_id], _reference(path, member)))
    return SourceSplit("train", "ImageNet's tar of tars", facts.classes(list(label_of)), samples)


def _class_members(path: Path) -> dict[str, tarfile.TarInfo]:
    members = {PurePosixPath(m.name).stem: m for m in _members(path, 0, path.stat().st_size)}
    if not members or not all(m.name.endswith(".tar") for m in members.values()):
        raise ShardError(f"{path} is expected to hold one tar per class (n01440764.tar, ...)")
    return members


def _reference(path: Path, member: tarfile.TarInfo) -> RangeReference:
    return RangeReference(str(path), member.offset_data, member.size)


def _members(path: Path, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The regular files of the tar that lies in bytes start to end of `path`."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            # Reads headers from the current position; offsets stay those of the outer file.
            with tarfile.TarFile(fileobj=file) as tar:
                for member in tar:
                    if member.offset_data + member.size > end:
                        raise ShardError(f"{path} ends early: it was not copied completely")
                    if member.issym() or member.islnk():
                        raise ShardError(f"{path}: {member.name} is a link: pack the files")
                    if member.isfile():
                        yield member
    except tarfile.TarError as error:
        raise ShardError(f"{path} is damaged or incomplete: {error}") from error


def _read_synsets(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = path.read_text("utf-8").splitlines()
    return {id_: name for id_, _, name in (line.partition(" ") for line in lines) if id_}


def _read_solution(path: Path) -> dict[str, str]:
    """ImageId,PredictionString with "n01751748 111 108 230 366 ..." (class, box, class, box)."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    try:
        return {image: prediction.split()[0] for image, prediction, *_ in rows[1:]}
    except (ValueError, IndexError) as error:
        raise ShardError(
            f"{path} is not Kaggle's table: expected lines `ImageId,PredictionString`"
        ) from error


def _read_devkit(place: Path) -> ImageNetFacts | None:
    for suffix in ("", ".tar.gz", ".tgz", ".tar"):
        path = place / f"{DEVKIT}{suffix}"
        if not path.exists():
            continue
        try:
            truth, meta = (_devkit_file(path, name) for name in (TRUTH_FILE, "meta.mat"))
            return _facts_of(path, [int(line) for line in truth.split()], meta)
        except (KeyError, ValueError, OSError, tarfile.TarError, EOFError) as error:
            raise ShardError(
                f"{path} is not ImageNet's development kit ({error}): expected "
                f"{DEVKIT}/data/{TRUTH_FILE} and meta.mat in it"
            ) from error
    return None


def _devkit_file(devkit: Path, name: str) -> bytes:
    if devkit.is_dir():
        return (devkit / "data" / name).read_bytes()
    with tarfile.open(devkit) as tar:
        file = tar.extractfile(f"{DEVKIT}/data/{name}")
        if file is None:
            raise KeyError(f"{name} is not a regular file")
        return file.read()


def _facts_of(path: Path, truth: list[int], meta: bytes) -> ImageNetFacts:
    synsets = read_matlab(meta)["synsets"]
    # Synsets with children are inner nodes of the hierarchy; no image is labelled with them.
    leaves = [synset for synset in synsets if int(synset["num_children"][0]) == 0]
    wordnet_ids = {int(synset["ILSVRC2012_ID"][0]): synset["WNID"] for synset in leaves}
    return ImageNetFacts(
        {synset["WNID"]: synset["words"] for synset in leaves},
        {f"ILSVRC2012_val_{n:08d}": wordnet_ids[id_] for n, id_ in enumerate(truth, 1)},
        str(path),
    )
