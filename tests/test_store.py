"""open_store: the same samples from every kind of data set, and clear words for everything else."""

import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headrace.shards import ShardError, Store, foreign, mapping, open_store
from headrace.shards.beton import beton_item
from headrace.shards.dataset import write_dataset
from headrace.shards.index import Record
from headrace.shards.manifest import ClassName, Format
from headrace.shards.store import find_dataset, split_names

FORMATS: tuple[Format, ...] = ("webdataset", "beton")
COUNT = 11
CLASSES = (ClassName("n01", "tench"), ClassName("n02"))


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test writes into the cache of whoever runs it."""
    home = tmp_path / "cache-home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


def image_bytes(seed: int, height: int = 16, width: int = 24, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def records() -> list[Record]:
    made = []
    for i in range(COUNT):
        extension = "png" if i % 4 == 3 else "jpg"
        height, width = 10 + i, 20 + 2 * i
        data = image_bytes(i, height, width, "PNG" if extension == "png" else "JPEG")
        made.append(Record(i, f"dir/ä {i}", i % 2, None, data, extension, height, width))
    return made


def written(directory: Path, kind: Format) -> Path:
    write_dataset(directory, kind, records(), CLASSES, samples_per_shard=4)
    return directory


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_plain_tar(path: Path, samples: dict[str, tuple[bytes, int]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for key, (image, label) in samples.items():
            for name, data in ((f"{key}.jpg", image), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def three_tars(directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    return [
        write_plain_tar(
            directory / f"x-{shard:03d}.tar",
            {f"s{shard}k{i}": (image_bytes(10 * shard + i), shard) for i in range(shard + 1)},
        )
        for shard in range(3)
    ]


def pixels_of(data: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))


def assert_same(store: Store, other: Store) -> None:
    ids = np.arange(len(store))
    assert len(store) == len(other)
    assert store.fingerprint == other.fingerprint
    assert store.names(ids) == other.names(ids)
    assert [d.tobytes() for d in store.read(ids)] == [d.tobytes() for d in other.read(ids)]


# ---------------------------------------------------------------- our own data sets


@pytest.mark.parametrize("kind", FORMATS)
def test_written_data_set(tmp_path: Path, kind: Format) -> None:
    store = open_store(written(tmp_path / "set", kind))
    sources = records()
    assert len(store) == COUNT
    assert store.classes == ("tench", "n02")
    assert store.uri == str(tmp_path / "set")
    expected_starts = [0, 4, 8, 11] if kind == "webdataset" else [0, 11]
    assert store.shard_starts.tolist() == expected_starts
    ids = np.array([9, 3, 3, 0, 7])
    sizes, labels = store.sizes(ids), store.labels(ids)
    assert (sizes.dtype, labels.dtype) == (np.int32, np.int64)
    assert sizes.tolist() == [[sources[i].height, sources[i].width] for i in ids]
    assert labels.tolist() == [sources[i].label for i in ids]
    assert store.names(ids) == [sources[i].name for i in ids]
    for i, data in zip(ids, store.read(ids), strict=True):
        assert (data.dtype, data.ndim, data.flags.writeable) == (np.uint8, 1, False)
        assert (pixels_of(data) == pixels_of(np.frombuffer(sources[i].image, np.uint8))).all()
        if kind == "webdataset" or sources[i].extension == "jpg":
            assert data.tobytes() == sources[i].image
        else:
            item = beton_item(sources[i].image)
            assert data.tobytes() == b"P6\n%d %d\n255\n" % (item.width, item.height) + item.data


@pytest.mark.parametrize("kind", FORMATS)
def test_equal_data_equal_fingerprint_wherever_it_lies(tmp_path: Path, kind: Format) -> None:
    first, second = (open_store(written(tmp_path / name, kind)) for name in ("a", "b"))
    assert_same(first, second)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_reading_copies_nothing(tmp_path: Path) -> None:
    store = open_store(written(tmp_path / "set", "webdataset"))
    first, again = store.read([2])[0], store.read([2])[0]
    assert np.shares_memory(first, again)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0, COUNT], f"no sample {COUNT}; ids run from 0 to {COUNT - 1}"),
        ([-1], "no sample -1"),
        ([0.5], "ids are integers"),
        ([[1]], "ids are integers"),
        (np.array([True]), "ids are integers"),
    ],
)
def test_unknown_ids_are_refused(tmp_path: Path, ids, words: str) -> None:
    store = open_store(written(tmp_path / "set", "beton"))
    for method in (store.sizes, store.labels, store.names, store.read):
        with pytest.raises(ShardError, match=words):
            method(ids)


def test_no_ids_give_nothing(tmp_path: Path) -> None:
    store = open_store(written(tmp_path / "set", "beton"))
    assert store.sizes([]).shape == (0, 2)
    assert store.labels([]).shape == (0,)
    assert (store.names([]), store.read([])) == ([], [])


def test_missing_and_changed_shards_are_named(tmp_path: Path) -> None:
    directory = written(tmp_path / "set", "webdataset")
    store = open_store(directory)
    shard = directory / "shard-000001.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    with pytest.raises(ShardError, match=r"shard-000001\.tar has \d+ bytes, the manifest says"):
        open_store(directory)
    with pytest.raises(ShardError, match=r"shard-000001\.tar had \d+ bytes when"):
        store.read([5])
    shard.unlink()
    with pytest.raises(ShardError, match=r"shard-000001\.tar is missing"):
        open_store(directory)
    with pytest.raises(ShardError, match=r"shard-000001\.tar cannot be read any more"):
        store.read([5])
    assert len(store.read([0, 9])) == 2


def test_unfinished_and_mixed_up_data_sets(tmp_path: Path) -> None:
    directory = written(tmp_path / "set", "webdataset")
    manifest = (directory / "manifest.json").read_text()
    (directory / "manifest.json").unlink()
    with pytest.raises(ShardError, match="run it again to finish"):
        open_store(directory)
    values = json.loads(manifest)
    values["samples"] = 3
    (directory / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ShardError, match="the index has 11 samples, the manifest 3"):
        open_store(directory)


def read_elsewhere(store: Store, ids: list[int]) -> list[bytes]:
    return [data.tobytes() for data in store.read(ids)]


@pytest.mark.dist
def test_store_travels_to_another_process(tmp_path: Path, monkeypatch) -> None:
    written(tmp_path / "set", "beton")
    monkeypatch.chdir(tmp_path)
    store = open_store("set")
    monkeypatch.chdir("/")
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert_same(store, pickle.loads(pickled))
    program = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print(len(s.read([0])[0]))"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        input=pickled,
        capture_output=True,
        check=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert int(ran.stdout) == len(store.read([0])[0])
    write_dataset(tmp_path / "set", "beton", records()[:5])
    with pytest.raises(ShardError, match="changed between two openings"):
        pickle.loads(pickled)


@pytest.mark.dist
def test_store_survives_a_fork(tmp_path: Path) -> None:
    store = open_store(written(tmp_path / "set", "webdataset"))
    expected = read_elsewhere(store, [1, 6])
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(read_elsewhere(store, [1, 6])))
    child.start()
    assert receiver.poll(30)
    assert receiver.recv() == expected
    child.join(30)
    assert child.exitcode == 0


def test_threads_share_a_store_with_few_open_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(mapping, "_mappings_at_most", lambda: 1)
    store = open_store(written(tmp_path / "set", "webdataset"))
    expected = [source.image for source in records()]
    generator = np.random.default_rng(0)
    batches = [generator.permutation(COUNT) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for ids, batch in zip(batches, pool.map(store.read, batches), strict=True):
            assert [data.tobytes() for data in batch] == [expected[i] for i in ids]


# ---------------------------------------------------------------- splits, and finding data sets


def test_splits(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for split in ("val", "train"):
        written(root / split, "beton")
    assert split_names(root) == ("train", "val")
    assert split_names(root / "train") == ()
    with pytest.raises(ShardError, match="has the splits train, val: choose one"):
        open_store(root)
    with pytest.raises(ShardError, match="no split 'test', it has train, val"):
        open_store(root, "test")
    store = open_store(root, "val")
    assert store.uri == str(root / "val")
    assert_same(store, open_store(root / "val"))
    assert_same(store, open_store(root / "val", "train"))  # a split itself has no splits
    assert_same(store, pickle.loads(pickle.dumps(store)))


def test_find_dataset(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with pytest.raises(ShardError, match="there is no directory"):
        find_dataset(data)
    write_folder(data, {"plain/a.jpg": image_bytes(0)})
    with pytest.raises(ShardError, match="no data set under"):
        find_dataset(data)
    written(data / "one" / "train", "beton")
    assert find_dataset(data) == data / "one"
    written(data / "two", "beton")
    with pytest.raises(ShardError, match=r"2 data sets under .*one, .*two"):
        find_dataset(data)
    assert find_dataset(data / "two") == data / "two"


# ---------------------------------------------------------------- made by others: tars


@pytest.mark.parametrize(
    "pattern", ["x-{000..002}.tar", "x-*.tar", "x-00[0-2].tar", "{x-000,x-001,x-002}.tar"]
)
def test_tar_patterns(tmp_path: Path, pattern: str) -> None:
    three_tars(tmp_path / "tars")
    store = open_store(tmp_path / "tars" / pattern)
    assert store.shard_starts.tolist() == [0, 1, 3, 6]
    ids = np.arange(6)
    assert store.labels(ids).tolist() == [0, 1, 1, 2, 2, 2]
    assert store.sizes(ids).tolist() == [[16, 24]] * 6
    assert store.names([0, 5]) == ["s0k0.jpg", "s2k2.jpg"]
    assert store.read([5])[0].tobytes() == image_bytes(22)
    assert_same(store, pickle.loads(pickle.dumps(store)))


def test_single_tar_and_brace_order(tmp_path: Path) -> None:
    tars = three_tars(tmp_path)
    assert len(open_store(tars[2])) == 3
    backwards = open_store(f"{tmp_path}/x-{{002,000}}.tar")
    assert backwards.names([0, 3]) == ["s2k0.jpg", "s0k0.jpg"]


def test_tar_index_is_kept_and_renewed(tmp_path: Path, cache_home: Path, monkeypatch) -> None:
    tars = three_tars(tmp_path / "tars")
    pattern = tmp_path / "tars" / "x-{000..002}.tar"
    first = open_store(pattern)
    kept = [path.name for path in (tmp_path / "tars").iterdir() if path.is_dir()]
    assert len(kept) == 1
    assert not cache_home.exists()

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(foreign, "scan_tar", refuse)
        assert_same(open_store(pattern), first)

    write_plain_tar(tars[1], {"new": (image_bytes(99, 8, 9), 5)})
    second = open_store(pattern)
    assert second.fingerprint != first.fingerprint
    assert second.shard_starts.tolist() == [0, 1, 2, 5]
    assert second.names([1]) == ["new.jpg"]
    now_kept = [path.name for path in (tmp_path / "tars").iterdir() if path.is_dir()]
    assert len(now_kept) == 1
    assert now_kept != kept
    # A touch changes no data: the index is made anew, the fingerprint stays.
    os.utime(tars[0], ns=(1, 1))
    assert open_store(pattern).fingerprint == second.fingerprint


def test_tar_index_goes_to_the_user_cache(tmp_path: Path, cache_home: Path, monkeypatch) -> None:
    three_tars(tmp_path / "tars")
    monkeypatch.setattr(foreign.os, "access", lambda *_: False)
    store = open_store(tmp_path / "tars" / "*.tar")
    assert [p.suffix for p in (tmp_path / "tars").iterdir()] == [".tar"] * 3
    assert len(list((cache_home / "headrace").iterdir())) == 1
    monkeypatch.setattr(foreign, "scan_tar", None)
    assert_same(store, open_store(tmp_path / "tars" / "*.tar"))


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    folder = write_folder(tmp_path / "folder", {"a.jpg": image_bytes(0)})
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ShardError, match="let XDG_CACHE_HOME name a writable directory"):
        open_store(folder)


def test_damaged_cache_is_named(tmp_path: Path, cache_home: Path) -> None:
    folder = write_folder(tmp_path / "folder", {"a.jpg": image_bytes(0)})
    open_store(folder)
    (source,) = cache_home.glob("headrace/*/source.json")
    source.write_text("{}")
    with pytest.raises(ShardError, match=r"is damaged.*delete it"):
        open_store(folder)


def test_tar_with_a_file_that_is_no_image(tmp_path: Path) -> None:
    samples = {"good": (image_bytes(0), 0), "bad": (b"rubbish", 1), "empty": (b"", 1)}
    write_plain_tar(tmp_path / "a.tar", samples)
    with pytest.raises(ShardError, match=r"2 file\(s\) are no readable images \(bad\.jpg in"):
        open_store(tmp_path / "a.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


# ---------------------------------------------------------------- made by others: beton, folders


def test_beton_file_alone(tmp_path: Path) -> None:
    whole = open_store(written(tmp_path / "set", "beton"))
    store = open_store(tmp_path / "set" / "data.beton")
    ids = np.arange(COUNT)
    assert [d.tobytes() for d in store.read(ids)] == [d.tobytes() for d in whole.read(ids)]
    assert store.labels(ids).tolist() == whole.labels(ids).tolist()
    assert store.sizes(ids).tolist() == whole.sizes(ids).tolist()
    assert store.classes == tuple(str(label) for label in range(max(whole.labels(ids)) + 1))
    assert store.names([3]) == ["000000003"]
    assert_same(store, pickle.loads(pickle.dumps(store)))


def test_class_folder(tmp_path: Path, monkeypatch) -> None:
    files = {
        "dog/b.jpg": image_bytes(1),
        "dog/deep/a.PNG": image_bytes(2, 5, 6, "PNG"),
        "cat/ü.jpeg": image_bytes(3, 7, 8),
        "cat/notes.txt": b"no image",
        "cat/.hidden.jpg": b"",
        "empty/none.txt": b"",
        ".git/x.jpg": b"",
    }
    root = write_folder(tmp_path / "folder", files)
    store = open_store(root)
    assert store.classes == ("cat", "dog", "empty")
    names = ["cat/ü.jpeg", "dog/b.jpg", "dog/deep/a.PNG"]
    assert store.names([0, 1, 2]) == names
    assert store.labels([0, 1, 2]).tolist() == [0, 1, 1]
    assert store.sizes([0, 1, 2]).tolist() == [[7, 8], [16, 24], [5, 6]]
    assert [data.tobytes() for data in store.read([0, 1, 2])] == [files[name] for name in names]
    assert not store.read([0])[0].flags.writeable
    assert store.shard_starts.tolist() == [0, 3]
    assert_same(store, pickle.loads(pickle.dumps(store)))
    with monkeypatch.context() as patch:
        patch.setattr(foreign, "read_header", None)
        assert_same(store, open_store(root))
    (root / "bird").mkdir()  # a class without images still moves the labels, as in ImageFolder
    assert open_store(root).labels([0, 1, 2]).tolist() == [1, 2, 2]


def test_flat_folder_and_changes_in_it(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "flat", {"b.jpg": image_bytes(0), "a.jpg": image_bytes(1)})
    store = open_store(root)
    assert (store.names([0, 1]), store.classes) == (["a.jpg", "b.jpg"], ())
    assert store.labels([0, 1]).tolist() == [-1, -1]
    (root / "a.jpg").write_bytes(b"short")
    with pytest.raises(ShardError, match=r"a\.jpg had \d+ bytes when the folder was opened"):
        store.read([0])
    with pytest.raises(ShardError, match=r"1 file\(s\) are no readable images .*a\.jpg"):
        open_store(root)
    (root / "a.jpg").unlink()
    with pytest.raises(ShardError, match=r"a\.jpg cannot be read any more"):
        store.read([0])
    assert len(open_store(root)) == 1


def test_folder_with_long_metadata_before_the_frame(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (33, 22)).save(buffer, "JPEG", icc_profile=bytes(200_000))
    root = write_folder(tmp_path / "flat", {"a.jpg": buffer.getvalue()})
    assert open_store(root).sizes([0]).tolist() == [[22, 33]]


def test_folder_with_splits(tmp_path: Path) -> None:
    files = {f"{split}/dog/{i}.jpg": image_bytes(i) for split in ("train", "val") for i in range(2)}
    root = write_folder(tmp_path / "root", files)
    with pytest.raises(ShardError, match="has the splits train, val: choose one"):
        open_store(root)
    assert open_store(root, "train").classes == ("dog",)
    write_folder(root, {"car/a.jpg": image_bytes(0)})  # beside two splits it is no class
    with pytest.raises(ShardError, match="has the splits train, val: choose one"):
        open_store(root)
    store = open_store(root, "train")
    assert store.classes == ("dog",)
    assert any("1 in " in line and line.count("car") for line in store.census)
    assert_same(store, pickle.loads(pickle.dumps(store)))
    assert open_store(root, layout="folders").classes == ("car", "train", "val")


@pytest.mark.parametrize(
    ("files", "uri", "words"),
    [
        ({}, "absent", "absent does not exist; expected a directory that make_shards wrote"),
        ({}, "absent-{00..01}.tar", "absent-00.tar does not exist"),
        ({"a-00.tar": b""}, "a-{00..01}.tar", "a-01.tar does not exist"),
        ({}, "a-{5..1}.tar", "runs backwards"),
        ({}, "*.tar", "does not exist"),
        ({}, "s3://bucket/x.tar", "only files on this machine"),
        ({"notes.txt": b"x"}, "notes.txt", "neither .tar nor .beton"),
        ({"notes.txt": b"x"}, "", "no images found .it holds notes.txt.; expected one of"),
        ({"x.tar": b"x"}, "", "not a whole, uncompressed tar"),
        ({"x.beton": b"x"}, "", "holds x.beton and no manifest"),
        ({"x.tar.gz": b"x"}, "", r"x.tar.gz is packed.* unpack it \(tar -xzf x.tar.gz\)"),
        ({"x.zip": b"x"}, "x.zip", r"x.zip is packed.* unpack it \(unzip x.zip\)"),
        ({"x.tar": b"not a tar" * 100}, "x.tar", "not a whole, uncompressed tar"),
        ({"x.beton": b"x"}, "x.beton", "not a whole .beton file"),
        ({"a.jpg": b"x", "b.jpg": b"", "dog/b.jpg": b"y"}, "", "both loose .*--layout folders"),
    ],
)
def test_what_is_not_recognised(tmp_path: Path, files, uri: str, words: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write_folder(root, files)
    with pytest.raises(ShardError, match=words):
        open_store(uri if "://" in uri else root / uri)


def test_shards_does_not_import_heavy_packages() -> None:
    program = (
        "import sys, shards, headrace.shards.dataset; "
        "print([m for m in ('torch', 'webdataset', 'ffcv', 'pyarrow') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert ran.stdout.strip() == "[]"
