"""One look at a data set: every image is used or counted, both ways in list the same samples with
the same labels, and labels agree with pixels: every picture has the colour of its class."""

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headrace.shards import ShardError, open_store
from headrace.shards.convert import convert
from headrace.shards.sources import SampleReader, list_source, recognise
from headrace.shards.sources.layout import AS_FOUND, Choices, Layout
from headrace.shards.sources.vocabulary import IMAGE_EXTENSIONS

COLOURS = {"a": (220, 30, 30), "b": (30, 200, 30), "c": (30, 30, 220), "d": (220, 220, 30)}
NO_CLASS = "d"


def picture(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), COLOURS[colour]).save(buffer, kind)
    return buffer.getvalue()


def colour_of(data: np.ndarray) -> str:
    pixel = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))[2, 2].astype(int)
    return min(COLOURS, key=lambda name: int(np.abs(pixel - COLOURS[name]).sum()))


def plant(root: Path, images: Mapping[str, str], texts: Mapping[str, str]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, colour in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(colour))
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def classes(inside: str, names: Mapping[str, str], count: int = 2) -> dict[str, str]:
    """count images of each class: {"inside/<name>/0.png": colour}."""
    return {
        f"{inside}/{name}/{i}.png": colour for name, colour in names.items() for i in range(count)
    }


def flat(inside: str, colours: str, stem: str = "") -> dict[str, str]:
    return {f"{inside}/{stem}{i}.png": colour for i, colour in enumerate(colours)}


ABC = {"a": "a", "b": "b", "c": "c"}
WORDNET = {"n01443537": "a", "n01629819": "b", "n01641577": "c"}


@dataclass(frozen=True)
class Case:
    """A tree and what it must be read as.

    splits: the class names of each split in the order of their labels; () for no labels. colour_of:
    class name -> colour. unused: number of image files that are in no split.
    """

    images: Mapping[str, str]
    splits: Mapping[str, tuple[str, ...]]
    texts: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=lambda: ABC)
    unused: int = 0
    choices: Choices = AS_FOUND


CASES = {
    "class folders": Case(classes("x", ABC), {"": tuple("abc")}),
    "splits": Case(
        classes("train", ABC) | classes("val", {"c": "c"}),
        {"train": tuple("abc"), "val": tuple("abc")},
    ),
    "other words for splits, in capitals": Case(
        classes("Training", ABC) | classes("VALID", {"b": "b"}),
        {"train": tuple("abc"), "val": tuple("abc")},
    ),
    "more than splits in a root": Case(
        classes("train", ABC) | classes("val", ABC) | classes("small_classes", {"x": "d"}),
        {"train": tuple("abc"), "val": tuple("abc")},
        {"meta/classes.txt": "a\nb\nc\n"},
        unused=2,
    ),
    "one split alone": Case(classes("train", ABC), {"train": tuple("abc")}, {"readme.txt": ""}),
    "unlabeled images are a split": Case(
        classes("train", ABC) | classes("test", ABC) | flat("unlabeled", "ddd"),
        {"train": tuple("abc"), "test": tuple("abc"), "unlabeled": ()},
    ),
    "ImageNet-21k as processed": Case(
        classes("imagenet21k_train", ABC)
        | classes("imagenet21k_val", {"b": "b"})
        | classes("imagenet21k_small_classes", {"x": "d"}),
        {"train": tuple("abc"), "val": tuple("abc")},
        unused=2,
    ),
    "COCO": Case(
        flat("train2017", "dd") | flat("val2017", "d") | flat("unlabeled2017", "d"),
        {"train": (), "val": (), "unlabeled": ()},
        {"annotations/instances_train2017.json": "{}"},
    ),
    "COCO with panoptic maps": Case(
        flat("train2017", "dd") | flat("val2017", "d") | flat("panoptic_train2017", "dd"),
        {"train": (), "val": ()},
        unused=2,
    ),
    "Intel scenes": Case(
        classes("seg_train/seg_train", ABC)
        | classes("seg_test/seg_test", ABC)
        | flat("seg_pred/seg_pred", "dd"),
        {"train": tuple("abc"), "test": tuple("abc")},
        unused=2,
    ),
    "GTSRB": Case(
        classes("GTSRB/Final_Training/Images", {"00000": "a", "00001": "b"})
        | flat("GTSRB/Final_Test/Images", "dd"),
        {"train": ("00000", "00001"), "test": ()},
        {"GTSRB/Final_Training/Images/00000/GT-00000.csv": "Filename;ClassId\n"},
        {"00000": "a", "00001": "b"},
    ),
    "cats and dogs": Case(
        flat("train", "dd", "cat.") | flat("test1", "d"),
        {"train": (), "test": ()},
        {"sampleSubmission.csv": "id,label\n1,0\n"},
    ),
    "Food-101": Case(
        classes("food-101/images", ABC),
        {"": tuple("abc")},
        {"food-101/meta/train.txt": "a/0\n", "food-101/meta/classes.txt": "a\n"},
    ),
    "CUB": Case(
        classes("images", ABC) | classes("segmentations", ABC),
        {"": tuple("abc")},
        {"parts/parts.txt": "1", "attributes/x.txt": "1", "image_class_labels.txt": "1 1\n"},
        unused=6,
    ),
    "Stanford Dogs": Case(
        classes("Images", ABC), {"": tuple("abc")}, {"Annotation/a/0": "", "Annotation/b/0": ""}
    ),
    "Pets": Case(
        flat("images", "dd", "Abyssinian_") | flat("annotations/trimaps", "dd", "Abyssinian_"),
        {"": ()},
        unused=2,
    ),
    "VOC": Case(
        flat("VOC2012/JPEGImages", "ddd") | flat("VOC2012/SegmentationClass", "dd"),
        {"": ()},
        {"VOC2012/Annotations/0.xml": "<a/>"},
        unused=2,
    ),
    "masks inside of splits": Case(
        flat("train/images", "dd") | flat("train/masks", "dd") | flat("val/images", "d"),
        {"train": (), "val": ()},
        unused=2,
    ),
    "YOLO": Case(
        flat("images/train", "dd") | flat("images/val", "d"),
        {"train": (), "val": ()},
        {"labels/train/0.txt": "0 .5 .5 .1 .1", "labels/val/0.txt": "0 .5 .5 .1 .1"},
    ),
    "ADE20K": Case(
        flat("ADE/images/training", "dd")
        | flat("ADE/images/validation", "d")
        | flat("ADE/annotations/training", "dd")
        | flat("ADE/annotations/validation", "d"),
        {"train": (), "val": ()},
        unused=3,
    ),
    "Cityscapes": Case(
        flat("leftImg8bit/train/ulm", "d")
        | flat("leftImg8bit/train/bonn", "d")
        | flat("leftImg8bit/val/ulm", "d")
        | flat("gtFine/train/ulm", "dd"),
        {"train": ("bonn", "ulm"), "val": ("bonn", "ulm")},
        names={"bonn": "d", "ulm": "d"},
        unused=2,
    ),
    "tiny-imagenet": Case(
        {f"train/{wnid}/images/{i}.png": colour for wnid, colour in WORDNET.items() for i in (0, 1)}
        | flat("val/images", "cab", "val_")
        | flat("test/images", "dd"),
        {"train": tuple(WORDNET), "val": tuple(WORDNET), "test": ()},
        {
            "val/val_annotations.txt": "val_0.png\tn01641577\t0\t0\t62\t62\n"
            "val_1.png\tn01443537\t0\t0\t62\t62\nval_2.png\tn01629819\t0\t0\t62\t62\n",
            "wnids.txt": "n01641577\nn01443537\nn01629819\n",
        },
        WORDNET,
    ),
    "ImageNet with meta": Case(
        classes("train", WORDNET) | flat("val", "bac", "ILSVRC2012_val_0000000"),
        {"train": tuple(WORDNET), "val": tuple(WORDNET)},
        {
            "meta/val.txt": "".join(
                f"ILSVRC2012_val_0000000{i}.png {n}\n" for i, n in enumerate((1, 0, 2))
            )
        },
        WORDNET,
    ),
    "Kaggle's list": Case(
        flat("train", "abcab"),
        {"train": tuple("abc")},
        {"trainLabels.csv": "id,label\n0,a\n1,b\n2,c\n3,a\n4,b\n"},
    ),
    "metadata.csv": Case(
        flat("train", "ab") | flat("test", "ba"),
        {"train": ("0", "1"), "test": ("0", "1")},
        {
            "train/metadata.csv": "file_name,label\n0.png,0\n1.png,1\n",
            "test/metadata.csv": "file_name,label\n0.png,1\n1.png,0\n",
        },
        {"0": "a", "1": "b"},
    ),
    "metadata.jsonl": Case(
        flat("images", "ba"),
        {"": ("a", "b")},
        {
            "images/metadata.jsonl": '{"file_name": "0.png", "label": "b"}\n'
            '{"file_name": "1.png", "label": "a"}\n'
        },
    ),
    "captions are no labels": Case(
        flat("images", "dd"),
        {"": ()},
        {"images/metadata.csv": "file_name,text\n0.png,hi\n1.png,ho\n"},
    ),
    "CelebA": Case(flat("celeba/img_align_celeba", "dd"), {"": ()}, {"celeba/list.txt": "x"}),
    "what systems leave behind": Case(
        classes("x", ABC)
        | {"__MACOSX/x/a/._0.png": "d", "x/a/.ipynb_checkpoints/0-checkpoint.png": "d"}
        | {".thumbnails/0.png": "d", "x/b/._1.png": "d", "x/@eaDir/0.png": "d"},
        {"": tuple("abc")},
        unused=5,
    ),
    "a class without images keeps its number": Case(
        classes("x", {"a": "a", "c": "c"}), {"": ("a", "b", "c")}, {"x/b/none.txt": ""}
    ),
    "a class called train": Case(
        classes("x", {"bus": "a", "car": "b", "train": "c"}),
        {"": ("bus", "car", "train")},
        names={"bus": "a", "car": "b", "train": "c"},
    ),
    "two words of splits among many classes": Case(
        classes("x", {"bullet_train": "a", "test_tube": "b", "p": "c", "q": "c", "r": "c"}),
        {"": ("bullet_train", "p", "q", "r", "test_tube")},
        names={"bullet_train": "a", "test_tube": "b", "p": "c", "q": "c", "r": "c"},
    ),
    "loose images beside classes": Case(
        classes("x", ABC) | {"x/overview.png": "d"}, {"": tuple("abc")}, unused=1
    ),
    "splits of one word beside many other folders": Case(
        flat("bounding_box_train", "dd")
        | flat("bounding_box_test", "d")
        | flat("query", "d")
        | flat("gt_query", "d")
        | flat("distractors", "d"),
        {"train": (), "test": ()},
        unused=3,
    ),
    "a folder of val that was emptied": Case(
        classes("train", ABC) | classes("val", ABC),
        {"train": tuple("abc"), "val": tuple("abc")},
        {"val/images/readme.txt": "", "train/images/readme.txt": ""},
    ),
    "--layout splits, also inside of them": Case(
        {
            f"{split}/{kind}/{i}.png": colour
            for split in ("train", "val")
            for i in (0, 1)
            for kind, colour in (("photos", "a"), ("drawings", "b"))
        },
        {"train": ("drawings", "photos"), "val": ("drawings", "photos")},
        names={"photos": "a", "drawings": "b"},
        choices=Choices(layout="splits"),
    ),
    "--layout splits": Case(
        classes("train", ABC) | classes("extra", {"z": "d"}),
        {"train": tuple("abc")},
        unused=2,
        choices=Choices(layout="splits"),
    ),
    "--layout folders": Case(
        classes("train", {"x": "a"}) | classes("val", {"y": "b"}),
        {"": ("train", "val")},
        names={"train": "a", "val": "b"},
        choices=Choices(layout="folders"),
    ),
    "--layout innermost": Case(
        {
            f"{split}/{place}/{name}/{i}.png": name
            for split in ("train", "val")
            for i in (0, 1)
            for place, names in (("p", "ab"), ("q", "bc"))
            for name in names
        },
        {"train": tuple("abc"), "val": tuple("abc")},
        choices=Choices(layout="innermost"),
    ),
    "masks called after the pictures beside them": Case(
        {f"{c}/{c} ({i}){end}.png": c for c in "ab" for i in (0, 1) for end in ("", "_mask")}
        | {"a/a (0)_mask_1.png": "d", "b/alone_mask.png": "b"},
        {"": ("a", "b")},
        unused=5,
    ),
    "--layout flat": Case(
        classes("x", {"p": "d"}) | flat("x", "dd"), {"": ()}, choices=Choices(layout="flat")
    ),
    "--images of a folder": Case(
        flat("photo", "dd") | flat("sketch", "ddd"),
        {"": ()},
        unused=3,
        choices=Choices(images="photo"),
    ),
    "--images inside of splits": Case(
        flat("train/rgb", "dd") | flat("train/thermal", "dd") | flat("val/rgb", "d"),
        {"train": (), "val": ()},
        unused=2,
        choices=Choices(images="rgb"),
    ),
}


def images_below(root: Path) -> int:
    return sum(
        os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS
        for _, _, names in os.walk(root)
        for name in names
    )


@pytest.mark.parametrize("name", CASES)
def test_every_image_is_used_or_counted_and_both_ways_in_agree(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    root = plant(tmp_path / "root", case.images, case.texts)
    recognised = recognise(root, None, case.choices)
    assert {split.name: tuple(c.id for c in split.classes) for split in recognised.splits} == (
        case.splits
    )
    used = sum(len(split.samples) for split in recognised.splits)
    unused = sum(one.images for one in recognised.unused)
    assert (unused, used + unused) == (case.unused, images_below(root))
    census = "\n".join(recognised.census())
    assert (f"not used: {unused} image" in census) == bool(unused)
    for chosen in recognised.splits:
        if chosen.name:
            alone = recognise(root, (chosen.name,), case.choices)
            assert [split.name for split in alone.splits] == [chosen.name]
            others = sum(count or 0 for count in alone.other_splits.values())
            assert others + len(chosen.samples) == used
    for split in recognised.splits:
        layout, images = case.choices.layout, case.choices.images
        store = open_store(root, split.name or None, layout=layout, images=images)
        ids = np.arange(len(store))
        assert store.names(ids) == [sample.name for sample in split.samples]
        assert store.labels(ids).tolist() == [sample.label for sample in split.samples]
        assert store.classes == tuple(entry.id for entry in split.classes)
        again = pickle.loads(pickle.dumps(store))
        assert (again.fingerprint, again.names(ids)) == (store.fingerprint, store.names(ids))
        for label, data in zip(store.labels(ids).tolist(), store.read(ids), strict=True):
            expected = NO_CLASS if label < 0 else case.names[split.classes[label].id]
            assert colour_of(data) == expected


REFUSED = {
    "a split or a class": (
        {f"{name}/2020/{i}.png": "d" for name in ("bus", "train") for i in (0, 1)},
        r"train/ is called like a split, and bus/ beside .*--layout splits .*--layout folders",
    ),
    "a split or a class, both flat": (
        flat("train", "dd") | flat("sample", "dd"), "train/ is called .* and sample/ beside it not"
    ),
    "a folder of all photographs inside of a split": (
        classes("train", {"photos": "a", "drawings": "b"}) | classes("val", {"photos": "a"}),
        "photos/ is called like .*--layout splits makes each of drawings/, photos/ one class"
    ),
    "folders of classes or classes of folders": (
        {f"{place}/{name}/0.png": "d" for place in ("Art", "Real") for name in ("cup", "pen")},
        "Art/, Real/ hold no images themselves .*cup/, pen/.*--layout innermost"
    ),
    "words of splits that share nothing": (
        classes(".", {"bullet_train": "a", "test_tube": "b"}),
        "bullet_train/, test_tube/ are called like splits, each differently",
    ),
    "two folders of one split": (
        classes("val", ABC) | classes("validation", ABC) | classes("train", ABC),
        "val and validation are both a val split",
    ),
    "several sets": (
        classes("fold1/train", ABC) | classes("fold1/val", ABC) | classes("fold2/train", ABC),
        "more than one data set: fold1/, fold2/",
    ),
    "a set and images beside it": (
        classes("set/train", ABC) | classes("set/val", ABC) | classes("more", ABC),
        "set/ with splits inside, and more/",
    ),
    "photographs and something else": (
        flat("images", "d") | flat("crops", "d"), r"images/ is called like .*crops/: --images DIR"
    ),
    "maps of the pictures beside them": (
        flat("scans", "dd") | flat("masks", "dd"), "masks/ looks like label maps of scans/"
    ),
    "more loose images than in folders": (
        flat(".", "ddd") | flat("y", "d"), r"both loose \(3, as .*--layout folders"
    ),
    "a class that train lacks": (
        classes("train", ABC) | classes("val", {"z": "d"}), "folder.* that train lacks, as 'z'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused_by_both(tmp_path: Path, name: str) -> None:
    images, words = REFUSED[name]
    root = plant(tmp_path / "root", images, {})
    with pytest.raises(ShardError, match=words):
        list_source(root)
    with pytest.raises(ShardError, match=words):
        open_store(root, "val" if "val" in words else None)


folder_names = st.sampled_from(
    ["a", "b", "c", "train", "val", "test", "train2017", "seg_test", "images", "masks", "unlabeled",
     "labels", "meta", ".hidden", "__MACOSX", "Images", "Real World", "data"]
)  # fmt: skip
file_names = st.sampled_from(
    ["0.png", "1.JPG", "2.jpeg", "x.txt", "metadata.csv", ".h.png", "y.gif"]
)
trees = st.recursive(
    st.dictionaries(file_names, st.none(), max_size=4),
    lambda inner: st.dictionaries(folder_names, inner, min_size=1, max_size=4),
    max_leaves=12,
)


def touch_all(root: Path, tree: Mapping[str, object]) -> None:
    root.mkdir()
    for name, inside in tree.items():
        if isinstance(inside, Mapping):
            touch_all(root / name, inside)
        else:
            (root / name).touch()


@settings(max_examples=150)
@given(trees, st.sampled_from(["auto", "splits", "folders", "flat"]))
def test_any_tree_is_refused_or_counted_whole(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object], layout: Layout
) -> None:
    root = tmp_path_factory.mktemp("tree") / "root"
    touch_all(root, tree)
    try:
        recognised = recognise(root, None, Choices(layout=layout))
    except ShardError:
        return
    paths = [s.reference.path for split in recognised.splits for s in split.samples]
    assert len(set(paths)) == len(paths)
    assert all(os.path.exists(path) for path in paths)
    unused = sum(one.images for one in recognised.unused)
    assert len(paths) + unused == images_below(root)


# ---------------------------------------------------------------- links


def test_links_to_folders_are_followed_where_they_are_looked_at(tmp_path: Path) -> None:
    plant(tmp_path / "full", classes("train", ABC) | classes("val", ABC), {})
    (tmp_path / "subset/train").mkdir(parents=True)
    for name in ("a", "c"):
        (tmp_path / "subset/train" / name).symlink_to(tmp_path / "full/train" / name)
    (tmp_path / "subset/val").symlink_to("../full/train")
    splits = {s.name: s for s in list_source(tmp_path / "subset", "train")}
    assert [sample.label for sample in splits["train"].samples] == [0, 0, 1, 1]
    assert open_store(tmp_path / "subset", "train").classes == ("a", "c")
    with pytest.raises(ShardError, match="train lacks, as 'b'"):
        open_store(tmp_path / "subset", "val")


def test_links_in_a_circle_are_refused_by_both(tmp_path: Path) -> None:
    root = plant(tmp_path / "root", classes(".", ABC), {})
    (root / "a/b").symlink_to("../b")
    (root / "b/a").symlink_to("../a")
    for look in (list_source, open_store):
        with pytest.raises(ShardError, match="is a link to a folder around it"):
            look(root)


def test_links_that_lead_nowhere_are_named_together(tmp_path: Path) -> None:
    root = plant(tmp_path / "root", classes("train", ABC) | classes("val", ABC), {})
    for name in ("train/a/7.png", "train/b/8.png", "train/z", "test"):
        (root / name).symlink_to("/nowhere/at/all")
    for look in (list_source, open_store):
        with pytest.raises(ShardError, match=r"3 link\(s\) lead nowhere: .*z, .*7\.png, .*8\.png"):
            look(root, "train")
        look(root, "val")
    with pytest.raises(ShardError, match=r"1 link\(s\) lead nowhere: .*test"):
        list_source(root)


# ---------------------------------------------------------------- names


def test_what_ends_otherwise_is_named_by_both(tmp_path: Path) -> None:
    root = plant(tmp_path / "root", classes(".", ABC), {"a/x.HEIC": "", "a/y.jpg?w=300": ""})
    (root / "b/z.gif").write_bytes(picture("b", "GIF"))
    (split,) = list_source(root)
    (note,) = split.notes
    assert "2 file(s)" in note
    assert ".heic 1, .jpg?... 1" in note
    assert "convert HEIC to JPEG" in note
    store = open_store(root)
    assert store.notes == split.notes
    assert "b/z.gif" in store.names(np.arange(len(store)))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (classes(".", {str(n): "a" for n in range(11)}, 1), "'10' has label 2"),
        ({f"train\\a\\{i}.png": "d" for i in range(2)}, "every name holds a backslash"),
    ],
)
def test_what_may_surprise_is_noted(tmp_path: Path, images: dict[str, str], words: str) -> None:
    root = plant(tmp_path / "root", images, {})
    (split,) = list_source(root)
    assert any(words in note for note in split.notes)


# ---------------------------------------------------------------- lists of labels and classes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "image,breed\n0.png,a\n1.png,b\n"),
        ("l.csv", "id;class\n0;a\n1;b\n"),
        ("l.tsv", "0.png\ta\n1.png\tb\n"),
        ("l.txt", "# a comment\nimages/0.png a 1\nimages/1.png b 2\n"),
        ("l.csv", 'id,label,text\n0,a,"two\nlines"\n1,b,x\n'),
        ("l.json", '{"0.png": "a", "1.png": "b"}'),
        ("l.json", '{"labels": [["images/0.png", "a"], ["images/1.png", "b"]]}'),
        ("l.jsonl", '\ufeff{"file_name": "./0.png", "label": "a"}\n{"file_name": "1.png", '
                    '"label": "b"}\n'),
    ],
)  # fmt: skip
def test_labels_from_a_list(tmp_path: Path, name: str, text: str) -> None:
    root = plant(tmp_path / "root", flat("images", "ab"), {name: text})
    (split,) = list_source(root, None, Choices(labels=root / name))
    assert [entry.id for entry in split.classes] == ["a", "b"]
    assert [sample.label for sample in split.samples] == [0, 1]
    store = open_store(root, labels=root / name)
    assert store.labels([0, 1]).tolist() == [0, 1]
    assert open_store(root).labels([0, 1]).tolist() == [-1, -1]  # and its index is another


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("l.csv", "id,label\n0,a\n", "a label for 1 of 2 images .* first without is '1.png'"),
        ("l.csv", "id,label\n8,a\n", "names none of the images"),
        ("l.csv", "id,label\n0,a\n1,b\n0,b\n", "gives '0.png' several labels"),
        ("l.csv", "width,height\n1,2\n", "has the columns width, height"),
        ("l.txt", "0.png\n", "line 1: '0.png' is no name with a label"),
        ("l.json", "[1]", "expected .*file_name"),
        ("l.csv", "id,target\n0,0.25\n1,3.5\n", "labels are fractions, such as 0.25"),
        ("l.xml", "<a/>", "must end in one of"),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    root = plant(tmp_path / "root", flat("images", "ab"), {name: text})
    with pytest.raises(ShardError, match=words):
        list_source(root, None, Choices(labels=root / name))


def test_a_list_says_which_of_two_images_of_one_name_it_means(tmp_path: Path) -> None:
    images = flat("train", "ab") | flat("test", "ba")
    root = plant(tmp_path / "splits", images, {"labels.csv": "id,label\n0,a\n1,b\n"})
    with pytest.raises(ShardError, match=r"names '0\.png', and several splits have an image"):
        open_store(root, "test")
    whole = "name,label\ntrain/0.png,a\ntrain/1.png,b\ntest/0.png,b\ntest/1.png,a\n"
    (root / "labels.csv").write_text(whole)
    assert open_store(root, "train").labels([0, 1]).tolist() == [0, 1]
    assert open_store(root, "test").labels([0, 1]).tolist() == [1, 0]
    images = flat("p", "ab") | flat("q", "ba")
    root = plant(tmp_path / "folders", images, {"l.csv": "id,label\n0,a\n1,b\n"})
    with pytest.raises(ShardError, match=r"which of 'p/0\.png' and 'q/0\.png' it means by '0"):
        open_store(root, labels=root / "l.csv")


def test_a_known_list_that_disagrees_is_refused(tmp_path: Path) -> None:
    texts = {"labels.csv": "id,label\n0,a\n1,b\n", "x/metadata.csv": "file_name,label\n0,b\n1,a\n"}
    root = plant(tmp_path / "one folder", flat("x", "ab"), texts)
    with pytest.raises(ShardError, match="give the same images other labels: --labels FILE"):
        list_source(root)
    pairs = [["00/0.png", 1], ["00/1.png", 0], ["01/2.png", 1]]
    numbered = {"00/0.png": "b", "00/1.png": "a", "01/2.png": "b"}
    style = plant(tmp_path / "style", numbered, {"dataset.json": json.dumps({"labels": pairs})})
    with pytest.raises(ShardError, match="divide the images differently: --labels"):
        open_store(style)
    store = open_store(style, labels=style / "dataset.json")
    assert store.labels([0, 1, 2]).tolist() == [1, 0, 1]


def test_classes_in_an_order_of_ones_own(tmp_path: Path) -> None:
    root = plant(tmp_path / "root", classes("x", ABC, 1), {"order.txt": "c\na\nb\n"})
    (split,) = list_source(root, None, Choices(classes=root / "order.txt"))
    assert [sample.label for sample in split.samples] == [1, 2, 0]
    assert open_store(root, classes=root / "order.txt").classes == ("c", "a", "b")
    (root / "order.txt").write_text("c\na\n")
    with pytest.raises(ShardError, match="'b'"):
        list_source(root, None, Choices(classes=root / "order.txt"))


# ---------------------------------------------------------------- arrays as they are downloaded


def planar(colours: str) -> np.ndarray:
    """uint8 [n, 3072] as CIFAR stores it: all red, all green, all blue."""
    pixels = [np.repeat(np.array(COLOURS[colour], np.uint8), 32 * 32) for colour in colours]
    return np.stack(pixels)


def read_colours(root: Path, split: str) -> list[tuple[str, str]]:
    (listed,) = list_source(root, split)
    reader = SampleReader()
    found = []
    for sample in listed.samples:
        pixels = reader.read(sample)
        assert isinstance(pixels, np.ndarray)
        assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
        colour = next(c for c, rgb in COLOURS.items() if tuple(pixels[3, 9]) == rgb)
        found.append((listed.classes[sample.label].id, colour))
    return found


def test_downsampled_imagenet_in_parts_with_labels_from_1(tmp_path: Path) -> None:
    for part, colours in ((1, "abc"), (2, "cb"), (10, "a")):
        numbers = np.array(["abc".index(colour) + 1 for colour in colours])
        path = tmp_path / f"train_data_batch_{part}.npz"
        np.savez(path, data=planar(colours), labels=numbers, mean=np.zeros(3072))
    np.savez(tmp_path / "val_data.npz", data=planar("ca"), labels=np.array([3, 1]))
    by_number = {"1": "a", "2": "b", "3": "c"}
    for split, count in (("train", 6), ("val", 2)):
        found = read_colours(tmp_path, split)
        assert len(found) == count
        assert all(by_number[number] == colour for number, colour in found)
    assert [c for _, c in read_colours(tmp_path, "train")] == list("abccba")
    (split,) = list_source(tmp_path, "train")
    assert any("'1' has label 0" in note for note in split.notes)


def test_cifar_pickles_and_nothing_that_runs(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, colours in (("data_batch_1", "ab"), ("data_batch_2", "c"), ("test_batch", "ca")):
        numbers = ["abc".index(colour) for colour in colours]
        values = {b"data": planar(colours), b"labels": numbers, b"filenames": [b"x.png"]}
        (folder / name).write_bytes(pickle.dumps(values, protocol=2))
    names = pickle.dumps({b"label_names": [b"a", b"b", b"c"]}, protocol=2)
    (folder / "batches.meta").write_bytes(names)
    assert read_colours(tmp_path, "train") == [("a", "a"), ("b", "b"), ("c", "c")]
    assert read_colours(tmp_path, "test") == [("c", "c"), ("a", "a")]

    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": Harmful(), b"labels": [0]}))
    with pytest.raises(ShardError, match=r"data_batch_2 cannot be used \(it would run"):
        list_source(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_arrays_without_classes_and_grey_ones(tmp_path: Path) -> None:
    grey = np.full((3, 6, 5), 7, np.uint8)
    np.savez(tmp_path / "train.npz", images=grey, labels=np.array([[0], [2], [2]]))
    (split,) = list_source(tmp_path)
    assert [entry.id for entry in split.classes] == ["0", "1", "2"]
    assert [sample.label for sample in split.samples] == [0, 2, 2]
    pixels = SampleReader().read(split.samples[1])
    assert isinstance(pixels, np.ndarray)
    assert (pixels.shape, int(pixels.min()), int(pixels.max())) == ((6, 5, 3), 7, 7)
    with pytest.raises(ShardError, match=r"holds arrays, .* convert it with make_shards"):
        open_store(tmp_path)


# ---------------------------------------------------------------- the command


def test_shards_of_a_split_are_numbered_as_the_folder_is(tmp_path: Path) -> None:
    root = plant(tmp_path / "root", classes("train", ABC) | classes("val", {"b": "b"}), {})
    for split in list_source(root):
        convert(split, tmp_path / "out" / split.name, workers=1)
    for name in ("train", "val"):
        shards, folder = open_store(tmp_path / "out", name), open_store(root, name)
        assert shards.classes == folder.classes
        pairs = [
            sorted(zip(s.names(np.arange(len(s))), s.labels(np.arange(len(s))), strict=True))
            for s in (shards, folder)
        ]
        assert pairs[0] == pairs[1]


def test_make_shards_prints_the_census_and_stays_out_of_its_source(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    images = classes(f"{odd}/train", ABC) | classes(f"{odd}/val", ABC) | flat(f"{odd}/extra", "dd")
    plant(tmp_path / "root", images, {})
    program = "import sys; from headrace.tools import make_shards; sys.exit(make_shards.main())"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
        command = [sys.executable, "-c", program, *arguments, "--workers", "1"]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )

    inside = run("root", "--out", "root/shards")
    assert inside.returncode != 0
    assert "lies inside root" in inside.stderr
    made = run(f"root/{odd}", "--out", "out")
    assert made.returncode == 0, made.stderr
    assert "train: 6 images, 3 classes" in made.stdout
    assert "not used: 2 image file(s)" in made.stdout
    assert "caf\\udce9/extra: none of the splits train, val" in made.stdout
    assert len(open_store(tmp_path / "out", "val")) == 6
