"""Labels and classes from lists, and arrays as they are downloaded: labels agree with pixels."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from headrace.shards import ShardError, open_store
from headrace.shards.sources import SampleReader, list_source
from headrace.shards.sources.layout import Choices
from tests.planted import ABC, COLOURS, classes, flat, plant

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
