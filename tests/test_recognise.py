"""One look at a data set: every image is used or counted, both ways in list the same samples with
the same labels, and labels agree with pixels: every picture has the colour of its class."""

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

from headrace.shards import ShardError, open_store
from headrace.shards.convert import convert
from headrace.shards.sources import list_source, recognise
from headrace.shards.sources.layout import AS_FOUND, Choices, Layout
from headrace.shards.sources.vocabulary import IMAGE_EXTENSIONS
from headrace.training.data_sets import census_of
from tests.planted import ABC, NO_CLASS, WORDNET, classes, colour_of, flat, picture, plant


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_with_the_name_of_an_image_is_none(tmp_path: Path) -> None:
    root = plant(tmp_path / "root", classes(".", ABC), {})
    os.mkfifo(root / "a/7.png")  # whoever reads it waits for ever
    assert len(open_store(root)) == len(list_source(root)[0].samples) == 6


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
        ({"a/0.png": "a", "b/0.png": "b", "x/1.tar": "d"}, r"not looked into (.tar 1), as"),
    ],
)
def test_what_may_surprise_is_noted(tmp_path: Path, images: dict[str, str], words: str) -> None:
    root = plant(tmp_path / "root", images, {})
    (split,) = list_source(root)
    assert any(words in note for note in split.notes)


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


def test_what_training_and_judging_print_first(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    images = classes("train", {"10": "a", "2": "b"}) | classes("val", {"2": "b"}) | flat(odd, "d")
    root = plant(tmp_path / "root", images, {})
    lines = census_of(open_store(root, "train"))
    assert lines == [
        f"{root}/train:",
        "  train: 4 images, 2 classes (class folders)",
        "  not asked for: val (2 images)",
        "  not used: 1 image file(s)",
        f"    1 in {root}/caf\\udce9: none of the splits train, val",
        "  note: classes are called by numbers that are not their labels: '10' has label 0",
    ]


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
