"""Every packaging of a data set gives the same samples; what is not understood is refused."""

import base64
import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headrace.shards.index import ShardError
from headrace.shards.manifest import ClassName
from headrace.shards.sources import list_source
from headrace.shards.sources.layout import Choices
from headrace.shards.sources.matlab import read_matlab
from headrace.shards.sources.samples import SampleReader, SourceSplit, estimate_bytes
from headrace.shards.store import open_store

# Written by scipy.io.savemat: four synsets in the devkit's form, the last one an inner node. The
# order of ids (1, 2, 3) is not that of WordNet ids (n03, n01, n02), as in the real file.
META_MAT = base64.b64decode(
    "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFN1biBOb3YgMjIgMDY6MDA6NT"
    "kgMjAyNgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAAYgEA"
    "AHic42NgYFjBwcDABqSBFAMTAwSwQvksQMwIxexAXFyZV5xaUgyUZ2EQhIp3ALGnT3BYkLORgaFRvKcLyIBwPwgNB+"
    "X5RSnFyALpOfnFKAJ5pbnxyRmZOSlFqXlgARQOzIy81JL4jNTM9IwSqJaSosTMvPjM3MT01GIGPqCgBQPCP2xo/mFE"
    "wiDACRWHgA/2IP0GSPpZsOhnRtIvAOTlGRiD7XUgoI8bRR+En5yRWlRUqaNQlJoCFkd3PzZz2NHMYYcFpkIyhf6H2G"
    "+ARz8MIOvH5m5y7CVbf8AUBwrtdyAv3g2Jii9WBtT4AvETCwpyUrH4m7T4ThyNb7Ls5yAzvo2IyucCDKjxBcJJiXlA"
    "qKNQkJOYVwIsr8iJd5A4JN4PrxyR8d4xmcJ4FyAz3g3IzudpRaWZJQyY4Y1NPyOKfkaGdErDC5rOPQjoZ0bTLwHX/8"
    "EeynBANo/S+pWS9AMA7wtV3A=="
)
WORDNET_IDS = ("n01", "n02", "n03")
TRAIN = {
    "n02/n02_1.JPEG": b"b1",
    "n01/n01_1.JPEG": b"a1",
    "n01/n01_2.JPEG": b"a2",
    "n03/n03_1.JPEG": b"c1",
}
VAL = {f"ILSVRC2012_val_{n:08d}.JPEG": f"v{n}".encode() for n in range(1, 5)}
TRUTH = "2\n1\n3\n2\n"  # -> n01, n03, n02, n01
VAL_LABELS = {"v1": 0, "v2": 2, "v3": 1, "v4": 0}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path.read_bytes()


def below(prefix: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{prefix}/{name}": data for name, data in files.items()}


def contents(split: SourceSplit) -> dict[str, int]:
    """What a reader gets, after a trip to another process: bytes -> label."""
    reader = SampleReader()
    found: dict[str, int] = {}
    for sample in pickle.loads(pickle.dumps(list(split.samples))):
        data = reader.read(sample)
        assert isinstance(data, bytes)
        found[data.decode()] = sample.label
    reader.close()
    assert len(found) == len(split.samples)
    return found


def by_name(splits: list[SourceSplit]) -> dict[str, SourceSplit]:
    return {split.name: split for split in splits}


TRAIN_LABELS = {"a1": 0, "a2": 0, "b1": 1, "c1": 2}


@pytest.mark.parametrize("depth", ["", "images", "a/b/c"])
@pytest.mark.parametrize("names", [("train", "val"), ("Training", "validation")])
def test_class_folders_in_splits_at_any_depth(
    tmp_path: Path, depth: str, names: tuple[str, str]
) -> None:
    root = tmp_path / depth
    write(root / names[0], TRAIN)
    write(root / names[1], {"n03/x.png": b"v"})
    splits = by_name(list_source(tmp_path))
    assert list(splits) == ["train", "val"]
    assert contents(splits["train"]) == TRAIN_LABELS
    assert contents(splits["val"]) == {"v": 2}  # the label that train gives, not 0
    assert [entry.id for entry in splits["val"].classes] == list(WORDNET_IDS)
    assert [sample.name for sample in splits["val"].samples] == ["n03/x.png"]


def test_one_split_can_be_chosen(tmp_path: Path) -> None:
    write(tmp_path / "train", TRAIN)
    write(tmp_path / "val", {"n03/x.png": b"v"})
    (split,) = list_source(tmp_path, "val")
    assert contents(split) == {"v": 2}
    with pytest.raises(ShardError, match="no split 'test' found"):
        list_source(tmp_path, "test")


@pytest.mark.parametrize("depth", ["", "images"])
def test_class_folders_without_splits(tmp_path: Path, depth: str) -> None:
    write(tmp_path / depth, TRAIN)
    (split,) = list_source(tmp_path)
    assert (split.name, contents(split)) == ("", TRAIN_LABELS)


def test_order_is_that_of_image_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    names = [
        "b/2.jpg",
        "b/10.jpg",
        "b/sub/1.jpg",
        "b/a.b/1.jpg",
        "B/1.JPG",
        "ä/1.png",
        "10/1.jpg",
        "9/x y.jpg",
    ]
    write(tmp_path, {name: name.encode() for name in names})
    (split,) = list_source(tmp_path)
    expected = datasets.ImageFolder(str(tmp_path))
    assert [entry.id for entry in split.classes] == expected.classes
    assert [(str(tmp_path / s.name), s.label) for s in split.samples] == expected.samples


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write(tmp_path, {"bus/1.jpg": b"1", "train/1.jpg": b"2", "valley/1.jpg": b"3"})
    (split,) = list_source(tmp_path)
    assert (split.name, contents(split)) == ("", {"1": 0, "2": 1, "3": 2})


def test_flat_folders_have_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "one", {"x.jpg": b"1", ".hidden.jpg": b"h", "read.me": b"t"})
    (split,) = list_source(tmp_path / "one")
    assert (split.name, split.classes, contents(split)) == ("", (), {"1": -1})
    (note,) = split.notes
    assert "1 file(s) whose names do not end like an image's are ignored (.me 1)" in note
    write(tmp_path / "two", {"train/x.jpg": b"1", "val/y.jpg": b"2"})
    assert {s.name: contents(s) for s in list_source(tmp_path / "two")} == {
        "train": {"1": -1},
        "val": {"2": -1},
    }


def test_notes_tell_what_is_not_converted(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.jpg": b"1", "b/notes.txt": b"t", "stray.jpg": b"2"})
    (split,) = list_source(tmp_path)
    assert contents(split) == {"1": 0}
    assert [entry.id for entry in split.classes] == ["a", "b"]
    told = " ".join(split.notes)
    assert "1 image(s) directly in" in told
    assert "1 class folder(s) hold no image, as 'b'" in told


def test_a_class_of_val_that_train_lacks_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"train/a/1.jpg": b"1", "val/a/1.jpg": b"1", "val/b/1.jpg": b"1"})
    with pytest.raises(ShardError, match=r"val has 1 class folder\(s\) that train lacks, as 'b'"):
        list_source(tmp_path)


def test_a_link_to_a_folder_around_it_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.jpg": b"1"})
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    with pytest.raises(ShardError, match="again is a link to a folder around it"):
        list_source(tmp_path)


def devkit() -> dict[str, bytes]:
    inside = "ILSVRC2012_devkit_t12/data"
    return {
        f"{inside}/ILSVRC2012_validation_ground_truth.txt": TRUTH.encode(),
        f"{inside}/meta.mat": META_MAT,
    }


def write_imagenet_tars(root: Path) -> None:
    classes = {
        f"{wordnet_id}.tar": write_tar(
            root.parent / "inner" / f"{wordnet_id}.tar",
            {Path(n).name: d for n, d in TRAIN.items() if n.startswith(wordnet_id)},
        )
        for wordnet_id in ("n02", "n01", "n03")
    }
    write_tar(root / "ILSVRC2012_img_train.tar", classes)
    write_tar(root / "ILSVRC2012_img_val.tar", dict(reversed(VAL.items())))


@pytest.mark.parametrize("packed", [True, False])
def test_imagenet_tars(tmp_path: Path, packed: bool) -> None:
    root = tmp_path / "imagenet"
    write_imagenet_tars(root)
    if packed:
        write_tar(root / "ILSVRC2012_devkit_t12.tar.gz", devkit())
    else:
        write(root, devkit())
    splits = by_name(list_source(root))
    assert contents(splits["train"]) == TRAIN_LABELS
    assert contents(splits["val"]) == VAL_LABELS
    assert splits["train"].classes == splits["val"].classes
    assert splits["train"].classes == (
        ClassName("n01", "apple"),
        ClassName("n02", "banana, plantain"),
        ClassName("n03", "cherry, red"),
    )
    assert [sample.name for sample in splits["val"].samples] == sorted(VAL)
    assert "n01/n01_1.JPEG" in {sample.name for sample in splits["train"].samples}
    (alone,) = list_source(root, "val")
    assert contents(alone) == VAL_LABELS


def test_imagenet_val_tar_needs_labels(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    write_imagenet_tars(root)
    with pytest.raises(ShardError, match=r"val.tar has no labels: put ILSVRC2012_devkit_t12"):
        list_source(root)
    assert contents(list_source(root, "train")[0]) == TRAIN_LABELS


def test_an_incomplete_tar_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    write_imagenet_tars(root)
    path = root / "ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    for kept in (5000, 21_000, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(ShardError, match=r"incomplete|not copied completely"):
            list_source(root, "train")


def test_a_class_of_the_devkit_that_train_lacks_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, {"train/n01/1.jpg": b"1", **below("val", VAL), **devkit()})
    with pytest.raises(ShardError, match="is of class n03, which train lacks"):
        list_source(root)


def kaggle(labels: bool = True) -> dict[str, bytes]:
    inside = "ILSVRC/Data/CLS-LOC"
    truth = zip(VAL, (0, 2, 1, 0), strict=True)
    solution = "ImageId,PredictionString\n" + "".join(
        f"{Path(name).stem},{WORDNET_IDS[label]} 1 2 3 4 {WORDNET_IDS[label]} 5 6 7 8 \n"
        for name, label in truth
    )
    names = "n01 apple\nn02 banana, plantain\nn03 cherry, red\n"
    lists = {"LOC_val_solution.csv": solution.encode(), "LOC_synset_mapping.txt": names.encode()}
    return {
        **below(f"{inside}/train", TRAIN),
        **below(f"{inside}/val", VAL),
        f"{inside}/test/ILSVRC2012_test_00000001.JPEG": b"t1",
        "ILSVRC/Annotations/CLS-LOC/train/n01/n01_1.xml": b"<x/>",
        "ILSVRC/ImageSets/CLS-LOC/val.txt": b"x",
        **(lists if labels else {}),
    }


@pytest.mark.parametrize("entry", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_tree(tmp_path: Path, entry: str) -> None:
    write(tmp_path, kaggle())
    splits = by_name(list_source(tmp_path / entry))
    assert contents(splits["train"]) == TRAIN_LABELS
    assert contents(splits["val"]) == VAL_LABELS
    assert contents(splits["test"]) == {"t1": -1}
    assert splits["val"].classes[1] == ClassName("n02", "banana, plantain")


def test_flat_val_without_labels_is_said(tmp_path: Path) -> None:
    write(tmp_path, kaggle(labels=False))
    split = by_name(list_source(tmp_path))["val"]
    assert set(contents(split).values()) == {-1}
    assert "no list of its labels was found" in split.notes[-1]


def test_every_packaging_of_imagenet_gives_the_same_labels(tmp_path: Path) -> None:
    write_imagenet_tars(tmp_path / "tars")
    write(tmp_path / "tars", devkit())
    write(tmp_path / "kaggle", kaggle())
    val_folders = {f"val/{WORDNET_IDS[VAL_LABELS[d.decode()]]}/{n}": d for n, d in VAL.items()}
    write(tmp_path / "folders", {**below("train", TRAIN), **val_folders})
    listed = [
        {
            split.name: contents(split)
            for split in list_source(tmp_path / name)
            if split.name != "test"
        }
        for name in ("tars", "kaggle", "folders")
    ]
    assert listed[0] == listed[1] == listed[2]


def test_matlab_reader() -> None:
    synsets = read_matlab(META_MAT)["synsets"]
    assert [synset["WNID"] for synset in synsets] == ["n03", "n01", "n02", "n00"]
    assert [int(synset["ILSVRC2012_ID"][0]) for synset in synsets] == [1, 2, 3, 4]
    assert synsets[3]["children"].tolist() == [1, 2, 3]
    assert synsets[2]["gloss"] == "gloss é"
    for cut in range(0, len(META_MAT), 7):
        with pytest.raises((ValueError, KeyError)):
            read_matlab(META_MAT[:cut])["synsets"]


def write_parquet(
    path: Path, rows: list[tuple[bytes, str | None, int]], names: bool = True
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "label": pyarrow.array([label for _, _, label in rows], pyarrow.int64()),
            "image": pyarrow.array(
                [{"bytes": data, "path": name} for data, name, _ in rows],
                pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
            ),
        }
    )
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    }
    if names:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00002.parquet", "{}/0000.parquet"])
def test_hugging_face_parquet(tmp_path: Path, layout: str) -> None:
    rows = [(f"p{n}".encode(), f"n{n}.jpg" if n else None, n % 2) for n in range(5)]
    write_parquet(tmp_path / layout.format("train"), rows[:3])
    second = layout.format("train").replace("00000-of", "00001-of").replace("0000.", "0001.")
    write_parquet(tmp_path / second, rows[3:])
    write_parquet(tmp_path / layout.format("validation"), [(b"v", None, -1)])
    splits = by_name(list_source(tmp_path))
    assert contents(splits["train"]) == {f"p{n}": n % 2 for n in range(5)}
    assert contents(splits["val"]) == {"v": -1}
    assert splits["train"].classes == (ClassName("cat"), ClassName("dog"))
    stem = Path(layout.format("train")).stem
    assert [s.name for s in splits["train"].samples[:2]] == [f"{stem}/00000000", "n1.jpg"]
    assert 0 < estimate_bytes(splits["train"].samples) < 1e5


def test_parquet_without_class_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "some.parquet", [(b"1", None, 0), (b"2", None, 2)], names=False)
    (split,) = list_source(tmp_path / "some.parquet")
    assert (split.name, contents(split)) == ("", {"1": 0, "2": 2})
    assert [entry.id for entry in split.classes] == ["0", "1", "2"]


def test_parquet_without_bytes_is_refused(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"text": ["a"]})
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ShardError, match="has 0 columns of image bytes"):
        list_source(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(ShardError, match="is damaged or no Parquet file"):
        list_source(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays(tmp_path: Path, save: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 4, 6, 3), np.uint8)
    labels = np.array([1, 0, 1, -1, 0])
    for name in ("train", "test"):
        save(tmp_path / f"{name}.npz", images=images, labels=labels, classes=np.array(["a", "b"]))
    np.savez(tmp_path / "statistics.npz", mean=np.zeros(3))
    splits = by_name(list_source(tmp_path))
    assert list(splits) == ["train", "test"]
    assert splits["train"].classes == (ClassName("a"), ClassName("b"))
    assert [sample.label for sample in splits["train"].samples] == labels.tolist()
    reader = SampleReader()
    for sample, image in zip(
        pickle.loads(pickle.dumps(splits["test"].samples)), images, strict=True
    ):
        np.testing.assert_array_equal(reader.read(sample), image)
    assert estimate_bytes(splits["train"].samples) == images.nbytes


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"labels": np.zeros(2, int)}, "images.npy"),
        ({"images": np.zeros((2, 4, 4, 3)), "labels": np.zeros(2, int)}, "images are float64"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, int)}, "labels are"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.full(2, 7)}, "from 0 to 0"),
    ],
)
def test_wrong_arrays_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    np.savez(tmp_path / "train.npz", classes=np.array(["a"]), **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ShardError, match=words):
        list_source(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "it is empty"),
        ({"a.txt": b"", "b/c.csv": b""}, "it holds a.txt, b"),
        ({"shard-000000.tar": b""}, "shard-000000.tar is not a whole, uncompressed tar"),
        ({"a.tgz": b""}, r"a.tgz is packed.* unpack it \(tar -xzf a.tgz\)"),
        ({"manifest.json": b"{}"}, "already holds shards"),
        ({"train/manifest.json": b"{}"}, "already holds shards"),
    ],
)
def test_what_is_not_recognised_is_described(
    tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    with pytest.raises(ShardError, match=words):
        list_source(write(tmp_path, files))


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="nowhere does not exist; expected one of: a folder"):
        list_source(tmp_path / "nowhere")
    write(tmp_path, {"video.mp4": b"", "other.tar": b""})
    with pytest.raises(ShardError, match=r"a file that ends in '.mp4'"):
        list_source(tmp_path / "video.mp4")
    with pytest.raises(ShardError, match=r"other.tar is not a whole, uncompressed tar"):
        list_source(tmp_path / "other.tar")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.jpg": b"1", "a/2.jpg": b"2"})
    (split,) = list_source(tmp_path)
    (tmp_path / "a" / "2.jpg").unlink()
    with pytest.raises(ShardError, match=r"cannot read .*a/2.jpg: No such file or directory; make"):
        SampleReader().read(split.samples[1])


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    write(tmp_path, {f"a/{name}": b"1", f"a/{'x' * 240}.jpg": b"2", "a/two words\nü.jpg": b"3"})
    (split,) = list_source(tmp_path)
    assert contents(split) == {"1": 0, "2": 0, "3": 0}
    assert f"a/{name}" in {sample.name for sample in split.samples}


# ---------------------------------------------------------------- WebDataset tars


def shard_files(first: int, count: int, label: Callable[[int], int] = lambda i: i % 3):
    """Members of a WebDataset shard: pictures whose grey level is ten times their label."""
    files: dict[str, bytes] = {}
    for i in range(first, first + count):
        buffer = io.BytesIO()
        Image.new("L", (9, 8), 10 * label(i)).save(buffer, "PNG")
        files[f"{i:04d}.png"] = buffer.getvalue()
        files[f"{i:04d}.cls"] = str(label(i)).encode()
    return files


def read_all(split: SourceSplit) -> list[tuple[bytes | np.ndarray, int]]:
    reader = SampleReader()
    everything = [(reader.read(sample), sample.label) for sample in split.samples]
    reader.close()
    return everything


def assert_opened_alike(root: Path, split: SourceSplit) -> None:
    """open_store lists what make_shards converts, and the bytes are those of the names."""
    store = open_store(root, split.name or None)
    ids = np.arange(len(store))
    assert store.names(ids) == [sample.name for sample in split.samples]
    assert store.labels(ids).tolist() == [sample.label for sample in split.samples]
    assert store.classes == tuple(entry.id for entry in split.classes)
    sources = [data for data, _ in read_all(split)]
    assert [data.tobytes() for data in store.read(ids)] == sources


def test_webdataset_tars_are_a_source_with_labels_and_splits(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0000.tar", shard_files(0, 4))
    write_tar(tmp_path / "train-0001.tar", shard_files(4, 4))
    write_tar(tmp_path / "validation-0000.tar", shard_files(8, 2, lambda i: i % 2))
    splits = by_name(list_source(tmp_path))
    assert {name: len(split.samples) for name, split in splits.items()} == {"train": 8, "val": 2}
    classes = tuple(ClassName(str(label)) for label in range(3))
    assert splits["train"].classes == splits["val"].classes == classes
    assert [sample.label for sample in splits["train"].samples] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [s.name for s in list_source(tmp_path, "val")] == ["val"]
    for split in splits.values():
        assert_opened_alike(tmp_path, split)
    with pytest.raises(ShardError, match=r"has the splits train, val: choose one"):
        open_store(tmp_path / "*.tar")
    assert len(open_store(tmp_path / "*.tar", "train")) == 8
    store = open_store(tmp_path, "val")
    assert pickle.loads(pickle.dumps(store)).names([0]) == store.names([0])


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{0000,0001}.tar"])
def test_a_pattern_of_tars_is_a_source(tmp_path: Path, pattern: str) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"train-{shard:04d}.tar", shard_files(3 * shard, 3))
    write_tar(tmp_path / "val-0000.tar", shard_files(8, 1))
    (split,) = list_source(tmp_path / pattern)
    assert len(split.samples) == 6
    assert_opened_alike(tmp_path / pattern, split)
    assert {s.name for s in list_source(tmp_path / "*.tar")} == {"train", "val"}
    with pytest.raises(ShardError, match="does not exist"):
        list_source(tmp_path / "nothing-*.tar")


def test_a_tar_of_no_split_beside_others_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0000.tar", shard_files(0, 1))
    write_tar(tmp_path / "more-0000.tar", shard_files(1, 1))
    with pytest.raises(ShardError, match=r"more-0000.tar: its name says no split.*train-\*\.tar"):
        list_source(tmp_path)


def test_identifiers_as_labels_are_numbered_by_train(tmp_path: Path) -> None:
    def taxon(i: int) -> int:
        return (47219, 1234567, 99)[i % 3]

    write_tar(tmp_path / "train.tar", shard_files(0, 6, taxon))
    write_tar(tmp_path / "val.tar", shard_files(6, 1, lambda _: 1234567))
    splits = by_name(list_source(tmp_path))
    assert [entry.id for entry in splits["train"].classes] == ["99", "47219", "1234567"]
    assert [sample.label for sample in splits["train"].samples] == [1, 2, 0, 1, 2, 0]
    assert [sample.label for sample in splits["val"].samples] == [2]
    for split in splits.values():
        assert_opened_alike(tmp_path, split)
    write_tar(tmp_path / "val.tar", shard_files(6, 1, lambda _: 7_654_321))
    with pytest.raises(ShardError, match=r"1 class.es. that train lacks, as '7654321'"):
        list_source(tmp_path)
    with pytest.raises(ShardError, match=r"1 class.es. that train lacks, as '7654321'"):
        open_store(tmp_path, "val")


def test_names_of_classes_beside_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "a-0.tar", shard_files(0, 3))
    names = "cat\ndog\nnewt\nnobody\n"
    for text in ("", "\ufeff"):
        (tmp_path / "classes.txt").write_text(text + names, "utf-8")
        (split,) = list_source(tmp_path)
        assert [entry.id for entry in split.classes] == ["cat", "dog", "newt", "nobody"]
        assert_opened_alike(tmp_path, split)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ShardError, match=r"classes.txt names 2 classes, and the label 2 occurs"):
        list_source(tmp_path)


@pytest.mark.parametrize("names", [("n00004475", "n00005787"), ("cat", "dog")])
def test_a_tar_per_class(tmp_path: Path, names: tuple[str, str]) -> None:
    outer = tmp_path / "whole.tar"
    inner: dict[str, bytes] = {}
    for number, name in enumerate(names):
        members = {
            f"{name}_{n}.png": data for n, data in shard_files(number, 2).items() if "png" in n
        }
        inner[f"whole/{name}.tar"] = write_tar(tmp_path / f"folder/{name}.tar", members)
    (split,) = list_source(tmp_path / "folder")
    assert [entry.id for entry in split.classes] == list(names)
    assert [sample.label for sample in split.samples] == [0, 0, 1, 1]
    assert_opened_alike(tmp_path / "folder", split)
    write_tar(outer, inner)
    (packed,) = list_source(outer)
    assert read_all(packed) == read_all(split)
    assert packed.classes == split.classes


def test_unlabelled_shards_are_no_classes(tmp_path: Path) -> None:
    for shard in range(2):
        pictures = {n: d for n, d in shard_files(2 * shard, 2).items() if n.endswith("png")}
        write_tar(tmp_path / f"part-{shard:04d}.tar", pictures)
    (split,) = list_source(tmp_path)
    assert (split.classes, [sample.label for sample in split.samples]) == ((), [-1] * 4)
    assert split.notes == ()


def test_folders_of_tars_that_are_not_read_as_classes_are_said(tmp_path: Path) -> None:
    for folder in ("cat", "dog"):
        pictures = {n: d for n, d in shard_files(0, 1).items() if n.endswith("png")}
        write_tar(tmp_path / folder / "000.tar", pictures)
    (split,) = list_source(tmp_path)
    assert split.notes == ("2 folder(s) of tars are not read as classes, as 'cat'",)
    for name in ("cat1", "dog2"):
        pictures = {n: d for n, d in shard_files(0, 1).items() if n.endswith("png")}
        write_tar(tmp_path / "flat" / f"{name}.tar", pictures)
    (split,) = list_source(tmp_path / "flat")
    assert split.notes == ("2 kind(s) of names of tars are not read as classes, as 'cat'",)


def test_tars_beside_unpacked_folders_are_not_taken_for_the_set(tmp_path: Path) -> None:
    write(tmp_path, below("train", TRAIN))
    write_tar(tmp_path / "train.tar", shard_files(0, 1))
    (split,) = list_source(tmp_path)
    assert len(split.samples) == len(TRAIN)


# ---------------------------------------------------------------- Parquet: labels and nulls


def parquet_of(path: Path, columns: dict[str, list], images: list[bytes | None]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    cells = [None if data is None else {"bytes": data, "path": None} for data in images]
    arrays = {name: pyarrow.array(values) for name, values in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"image": pyarrow.array(cells, kind), **arrays}), path)
    return path


def test_parquet_of_several_configurations_is_refused(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        parquet_of(tmp_path / name / "train" / "0.parquet", {"label": [0]}, [name.encode()])
    with pytest.raises(ShardError, match=r"2 folders hold Parquet files of one split: name one, "):
        list_source(tmp_path)
    assert contents(list_source(tmp_path / "red")[0]) == {"red": 0}
    for part in ("part-0", "part-1"):
        path = tmp_path / "parts" / part / "train-0.parquet"
        parquet_of(path, {"label": [0]}, [part.encode()])
    assert contents(list_source(tmp_path / "parts")[0]) == {"part-0": 0, "part-1": 0}


def test_text_labels_of_parquet_are_classes_numbered_by_train(tmp_path: Path) -> None:
    parquet_of(tmp_path / "train-0.parquet", {"label": ["dog", "cat", None]}, [b"1", b"2", b"3"])
    parquet_of(tmp_path / "test-0.parquet", {"label": ["dog"]}, [b"4"])
    splits = by_name(list_source(tmp_path))
    assert contents(splits["train"]) == {"1": 1, "2": 0, "3": -1}
    assert contents(splits["test"]) == {"4": 1}
    assert splits["train"].classes == splits["test"].classes == (ClassName("cat"), ClassName("dog"))
    assert contents(list_source(tmp_path, "test")[0]) == {"4": 1}
    parquet_of(tmp_path / "test-0.parquet", {"label": ["newt"]}, [b"4"])
    with pytest.raises(ShardError, match=r"test .* 1 class.* that train lacks, as 'newt'"):
        list_source(tmp_path)


def test_classes_in_another_order_are_mapped_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [(b"1", None, 0), (b"2", None, 1)])
    parquet_of(tmp_path / "test-0.parquet", {"label": ["dog", "cat"]}, [b"3", b"4"])
    assert contents(by_name(list_source(tmp_path))["test"]) == {"3": 1, "4": 0}


@pytest.mark.parametrize(
    ("columns", "note"),
    [
        ({"labels": [[0, 1], [1]]}, "the column 'labels' holds list.* is not used"),
        ({"class": [0, 1]}, r"no column is called label.*; not read: class \(int64\)"),
        ({"label": [0.5, 1.0]}, "the column 'label' holds double.* is not used"),
    ],
)
def test_labels_of_parquet_that_are_not_used_are_said(
    tmp_path: Path, columns: dict[str, list], note: str
) -> None:
    (split,) = list_source(parquet_of(tmp_path / "some.parquet", columns, [b"1", b"2"]))
    assert set(contents(split).values()) == {-1}
    assert re.search(note, " ".join(split.notes))


def test_labels_from_one_are_said(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "some.parquet", {"label": [1, 2]}, [b"1", b"2"])
    (split,) = list_source(path)
    assert "class 0 has no image" in " ".join(split.notes)
    assert contents(split) == {"1": 1, "2": 2}


def test_nulls_of_parquet_are_files_of_no_bytes(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "some.parquet", {"label": [0, 1, 1]}, [b"1", None, b"3"])
    (split,) = list_source(path)
    assert [data for data, _ in read_all(split)] == [b"1", b"", b"3"]


def test_a_folder_of_a_phones_pictures_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.HEIC").write_bytes(b"")
    with pytest.raises(ShardError, match=r"no images found .*; convert HEIC to JPEG to have them"):
        list_source(tmp_path)


@pytest.mark.parametrize("choices", [Choices(layout="flat"), Choices(classes=Path("c.txt"))])
def test_what_is_said_of_folders_is_refused_for_anything_else(
    tmp_path: Path, choices: Choices
) -> None:
    tars, arrays, parquet = (tmp_path / name for name in ("tars", "arrays", "parquet"))
    write_tar(tars / "train-0.tar", shard_files(0, 2))
    arrays.mkdir()
    images = np.zeros((1, 4, 4, 3), np.uint8)
    np.savez(arrays / "train.npz", images=images, labels=np.array([0]), classes=np.array(["a"]))
    parquet_of(parquet / "train-0.parquet", {"label": [0]}, [b"1"])
    for source in (tars, tars / "train-0.tar", arrays, parquet):
        with pytest.raises(ShardError, match=r"say how folders of images are read"):
            list_source(source, choices=choices)
    with pytest.raises(ShardError, match=r"say how folders of images are read"):
        open_store(tars, "train", layout="flat")
