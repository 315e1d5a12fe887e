"""What names of files and folders mean: image endings, splits, photographs, label maps.

One place for all of it, so that every way into a data set reads a name alike.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable

from headrace.shards.split_names import SPLIT_NAMES

IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".png", ".ppm", ".pgm", ".pnm", ".bmp", ".tif",
     ".tiff", ".webp", ".gif", ".jp2", ".avif", ".mpo")
)  # fmt: skip
"""What counts as an image in a folder: torchvision's list and the formats that are converted."""

LIST_EXTENSIONS = frozenset((".csv", ".tsv", ".txt", ".json", ".jsonl"))
"""What a list of labels may end with."""

PACKED_ENDINGS = (
    ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip", ".7z", ".rar", ".parquet", ".arrow",
    ".npz", ".npy", ".h5", ".hdf5", ".lmdb", ".mdb", ".tfrecord", ".rec", ".beton", ".bin",
)  # fmt: skip
"""How files end that may hold many images."""

SPLITS = ("train", "val", "test", "unlabeled")
"""Names that a split of a data set can have."""

SPLIT_ORDER = ("", *SPLITS)
"""The same, and "" for a source without splits."""


def _words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PHOTOGRAPH_WORDS = _words_of(
    "image images img imgs jpegimages photo photos photograph photographs picture pictures pics "
    "jpg jpgs jpeg jpegs png pngs rgb"
)
_CONTAINER_WORDS = _PHOTOGRAPH_WORDS | {"data", "dataset", "files", "all", "raw", "frames"}
_MAP_WORDS = _words_of(
    "mask masks label labels labelmap labelmaps annotation annotations annot annos segmentation "
    "segmentations segs trimap trimaps groundtruth truth gt gts depth depths disparity panoptic "
    "semantic"
)
_BESIDE_MAP_WORDS = _PHOTOGRAPH_WORDS | _words_of(
    "ground class object aug fine coarse ids color binary instance instances map maps left "
    "right bit tr ts"
)
_BESIDE_PHOTOGRAPH_WORDS = _words_of("left right bit tr ts")
_FACT_WORDS = _MAP_WORDS | _words_of(
    "meta metadata attributes attribute parts lists list devkit docs doc splits imagesets "
    "bounding boxes bbox bboxes boxes xml xmls"
)
_LISTED_ENDINGS = 8
_MAP_SUFFIX = re.compile(
    r"[_-](mask|masks|seg|segmentation|gt|label|labels|labelids|trimap|parts)([_-]?\d+)?$",
    re.IGNORECASE,
)


def words(name: str) -> list[str]:
    """The words of a name in lower case: `leftImg8bit` has left, img, bit; digits are none."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def is_image(name: str) -> bool:
    """Whether a file's name ends like an image's."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def split_of(name: str) -> str | None:
    """The split that a whole name means: `Training` is train."""
    return SPLIT_NAMES.get(name.lower())


def splits_within(name: str) -> set[str]:
    """The splits that the words of a name mean."""
    return {SPLIT_NAMES[word] for word in words(name) if word in SPLIT_NAMES}


def split_within(name: str) -> str | None:
    """The one split that the words of a name mean: `train2017`, `seg_train`, `test1`."""
    meant = splits_within(name)
    return meant.pop() if len(meant) == 1 else None


def without_split(name: str) -> str:
    """The words of a name that mean no split: the same for `seg_train` and `seg_test`."""
    return " ".join(word for word in words(name) if word not in SPLIT_NAMES)


def is_photographs(name: str) -> bool:
    """Whether a folder is called after what all photographs are: `images`, `JPEGImages`, `img`."""
    parts = [word for word in words(name) if word not in _BESIDE_PHOTOGRAPH_WORDS]
    return bool(parts) and all(word in _PHOTOGRAPH_WORDS for word in parts)


def is_maps(name: str) -> bool:
    """Whether a folder is called after label maps: `masks`, `SegmentationClass`, `gtFine`."""
    parts = [word for word in words(name) if word not in SPLIT_NAMES]
    return any(word in _MAP_WORDS for word in parts) and all(
        word in _MAP_WORDS or word in _BESIDE_MAP_WORDS for word in parts
    )


def without_map_suffix(stem: str) -> str:
    """`x` for `x_mask`, `x-seg_2`, `x_segmentation`; what is called otherwise stays."""
    return _MAP_SUFFIX.sub("", stem)


def maps_among(names: Iterable[str]) -> set[str]:
    """Names of images that are called after another one, as maps of it: `x_mask.png` of `x.jpg`."""
    stem_of = {name: os.path.splitext(name)[0] for name in names}
    stems = set(stem_of.values())
    return {
        name
        for name, stem in stem_of.items()
        if (bare := without_map_suffix(stem)) != stem and bare in stems
    }


def is_facts(name: str) -> bool:
    """Whether a folder without images is called after facts about them: it is no empty class."""
    return name.lower() == "seg" or (bool(words(name)) and set(words(name)) <= _FACT_WORDS)


def is_container(name: str, parent: str) -> bool:
    """Whether a folder that lies alone in `parent` only holds the images, and is no class."""
    return (
        name.lower() == parent.lower()
        or bool(_CONTAINER_WORDS.intersection(words(name)))
        or split_within(name) is not None
    )


def endings(names: Iterable[str]) -> str:
    """`.txt 3, .heic 1, none 2`: how names end, the commonest first."""
    counts = Counter(_ending(name) for name in names)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{ending} {count}" for ending, count in ranked[:_LISTED_ENDINGS])
    rest = sum(count for _, count in ranked[_LISTED_ENDINGS:])
    return listed + (f", others {rest}" if rest else "")


def _ending(name: str) -> str:
    # A name may end with the question of the address that it was fetched from: x.jpg?w=300.
    extension = os.path.splitext(name.split("?")[0])[1].lower()
    return (extension or "none") + ("?..." if "?" in name else "")
