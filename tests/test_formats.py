"""The files of a data set: index, manifest, image headers, and tars, ours and others'."""

import io
import json
import os
import struct
import tarfile
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from headrace.shards.atomic import atomic_file
from headrace.shards.dataset import write_dataset
from headrace.shards.headers import HeaderError, read_header
from headrace.shards.index import (
    ENCODED,
    INDEX_DTYPE,
    Record,
    ShardError,
    content_hash,
    printable,
    read_index,
    write_index,
)
from headrace.shards.manifest import (
    ClassName,
    Manifest,
    ShardFile,
    read_manifest,
    write_manifest,
)
from headrace.shards.store import open_store
from headrace.shards.tar_samples import scan_tar
from headrace.shards.webdataset import export_dali_index, write_tar


def picture(seed: int, height: int, width: int, mode: str = "RGB") -> Image.Image:
    """A smooth picture with some texture, different for every seed."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth.astype(np.int16) + generator.integers(-6, 7, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def record(sample_id: int, height: int = 20, width: int = 30, kind: str = "JPEG") -> Record:
    image = encoded(picture(sample_id, height, width), kind)
    extension = {"JPEG": "jpg", "PNG": "png"}[kind]
    label = sample_id % 3
    return Record(
        sample_id, f"odd näme {sample_id}", label, f"class {label}", image, extension, height, width
    )


def mixed_records(count: int) -> list[Record]:
    return [
        record(i, 20 + i % 5, 30 + i % 7, "PNG" if i % 3 == 1 else "JPEG") for i in range(count)
    ]


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


# ---------------------------------------------------------------- index


def test_index_round_trip(tmp_path: Path) -> None:
    names = ["plain.jpg", "", "Wörter/日本.png", os.fsdecode(b"latin-\xe9.jpg")]
    rows = np.zeros(4, INDEX_DTYPE)
    rows["label"] = [-1, 0, 5, 2**31 - 1]
    rows["content_hash"] = 2**64 - 1
    write_index(tmp_path, rows, names)
    index = read_index(tmp_path)
    assert [index.name(i) for i in range(4)] == names
    assert index.rows["label"].tolist() == [-1, 0, 5, 2**31 - 1]
    assert index.rows["content_hash"].tolist() == [2**64 - 1] * 4
    assert not index.rows.flags.writeable
    assert not index.names.flags.writeable
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.npy", "names.bin"]


def test_a_name_is_printed_on_one_line_in_any_encoding() -> None:
    name = os.fsdecode(b"caf\xe9\n\t") + "日本 1.jpg"
    assert printable(name) == "caf\\xe9\\n\\t日本 1.jpg"
    printable(name).encode("utf-8", "strict")


def test_index_of_1_28_million_samples_opens_at_once(tmp_path: Path) -> None:
    count = 1_280_000
    rows = np.zeros(count, INDEX_DTYPE)
    rows["height"] = np.arange(count)
    rows["name_offset"] = np.arange(count, dtype=np.uint64) * 9
    rows["name_length"] = 9
    np.save(tmp_path / "index.npy", rows)
    (tmp_path / "names.bin").write_bytes(b"".join(b"%09d" % i for i in range(count)))
    (tmp_path / "a.tar").write_bytes(b"tar")
    write_manifest(
        tmp_path, Manifest("webdataset", count, (), (ShardFile("a.tar", count, 3, "00"),), {})
    )
    start = time.perf_counter()
    store = open_store(tmp_path)
    assert (len(store), store.names([count - 1])) == (count, ["001279999"])
    assert store.sizes([777_777]).tolist() == [[777_777, 0]]
    assert time.perf_counter() - start < 1.0  # 2 s are allowed; mapping takes milliseconds


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "index.npy").unlink(), "index.npy is missing"),
        (lambda d: (d / "names.bin").unlink(), "names.bin is missing"),
        (lambda d: (d / "index.npy").write_bytes(b""), "index.npy is damaged"),
        (lambda d: os.truncate(d / "index.npy", 200), "index.npy is damaged"),
        (lambda d: np.save(d / "index.npy", np.zeros(3)), "another layout"),
        (lambda d: (d / "names.bin").write_bytes(b"abc"), "names.bin has 3 bytes"),
    ],
)
def test_damaged_index_is_refused(tmp_path: Path, damage, words: str) -> None:
    write_index(tmp_path, np.zeros(3, INDEX_DTYPE), ["a", "b", "cd"])
    damage(tmp_path)
    with pytest.raises(ShardError, match=words):
        read_index(tmp_path)


def test_index_needs_rows_and_one_name_each(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no sample"):
        write_index(tmp_path, np.zeros(0, INDEX_DTYPE), [])
    with pytest.raises(ShardError, match="2 index rows came with 1 names"):
        write_index(tmp_path, np.zeros(2, INDEX_DTYPE), ["a"])
    assert list(tmp_path.iterdir()) == []


def test_atomic_file_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_half_way() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


# ---------------------------------------------------------------- manifest


def manifest() -> Manifest:
    return Manifest(
        format="webdataset",
        samples=3,
        classes=(ClassName("n01", "tench"), ClassName("n02")),
        shards=(ShardFile("a.tar", 2, 10, "00"), ShardFile("b.tar", 1, 5, "ff")),
        index={"index.npy": "0a", "names.bin": "0b"},
        options={"quality": 90, "seed": 0},
        tool="headrace",
        repairs={"CMYK": 1},
        omissions={},
    )


def test_manifest_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest())
    assert read_manifest(tmp_path) == manifest()
    text = (tmp_path / "manifest.json").read_bytes()
    assert read_manifest(tmp_path).fingerprint == sha256(text).hexdigest()
    assert json.loads(text)["classes"][0] == {"id": "n01", "name": "tench"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "zip"}, "format is 'zip'"),
        ({"samples": "3"}, "samples is '3', not int"),
        ({"shards": [{"file": "a.tar"}]}, r"shards\[0\] has missing or unknown keys"),
        ({"classes": [{"id": 3, "name": ""}]}, r"classes\[0\].id is 3, not str"),
        ({"surplus": 1}, "unknown keys: surplus"),
    ],
)
def test_wrong_manifest_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    values = json.loads(manifest().to_json()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ShardError, match=words):
        read_manifest(tmp_path)


def test_manifest_absent_broken_or_contradictory(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no finished data set"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match="cannot be read"):
        read_manifest(tmp_path)
    with pytest.raises(ShardError, match="hold 0 samples, the manifest says 4"):
        write_manifest(tmp_path, Manifest("beton", 4, (), (), {}))


# ---------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("kind", "mode", "expected"),
    [
        ("JPEG", "RGB", "jpeg"),
        ("JPEG", "L", "jpeg"),
        ("JPEG", "CMYK", "jpeg"),
        ("PNG", "RGBA", "png"),
        ("PNG", "P", "png"),
        ("PPM", "RGB", "pnm"),
        ("PPM", "L", "pnm"),
        ("BMP", "RGB", "other"),
        ("WEBP", "RGB", "other"),
        ("TIFF", "RGB", "other"),
        ("GIF", "L", "other"),
    ],
)
def test_header_gives_size_and_kind(kind: str, mode: str, expected: str) -> None:
    data = encoded(picture(1, 37, 61, mode), kind)
    header = read_header(memoryview(data))
    assert (header.kind, header.height, header.width) == (expected, 37, 61)
    assert header.plain_jpeg == (kind == "JPEG" and mode != "CMYK")


def test_header_of_jpeg_variants() -> None:
    image = picture(2, 40, 24)
    assert read_header(encoded(image, progressive=True)).plain_jpeg
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn, which sizes ignore
    header = read_header(encoded(image, exif=exif, comment=b"x" * 60_000))
    assert (header.height, header.width, header.plain_jpeg) == (40, 24, True)
    rgb = read_header(encoded(image, keep_rgb=True))
    assert (rgb.height, rgb.width, rgb.plain_jpeg) == (40, 24, False)
    commented = read_header(b"P6\n# made by hand\n3 2\n255\n" + bytes(18))
    assert (commented.height, commented.width) == (2, 3)


@given(
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"P6 "]), st.binary(max_size=80)
)
def test_header_of_rubbish_is_a_header_error(start: bytes, rest: bytes) -> None:
    try:
        header = read_header(start + rest)
    except HeaderError:
        return
    assert header.height > 0
    assert header.width > 0


def test_header_of_cut_files() -> None:
    whole = encoded(picture(3, 30, 30))
    assert read_header(whole[: len(whole) // 2]).height == 30
    for cut in (0, 1, 2, 10, 100):
        with pytest.raises(HeaderError):
            read_header(whole[:cut])


# ---------------------------------------------------------------- tar: ours


def test_tar_layout_and_rows(tmp_path: Path) -> None:
    records = mixed_records(7)
    rows, shard = write_tar(tmp_path / "a.tar", records, shard=4)
    data = (tmp_path / "a.tar").read_bytes()
    assert shard == ShardFile("a.tar", 7, len(data), sha256(data).hexdigest())
    for row, source in zip(rows, records, strict=True):
        start = int(row["offset"])
        assert data[start : start + int(row["length"])] == source.image
        assert row["content_hash"] == content_hash(source.image)
        assert (row["shard"], row["encoding"], row["label"]) == (4, ENCODED, source.label)
        assert (row["height"], row["width"]) == (source.height, source.width)
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
        assert [m.name for m in members[:4]] == [
            f"000000000.{extension}" for extension in ("cls", "jpg", "json", "label")
        ]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.type) for m in members} == {
            (0, 0, 0, 0o444, tarfile.REGTYPE)
        }
        contents = {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    assert contents["000000005.cls"] == b"2"
    assert contents["000000005.label"] == struct.pack("<i", 2)
    assert json.loads(contents["000000005.json"]) == {
        "name": "odd näme 5",
        "label": 2,
        "class": "class 2",
    }
    assert data[257:265] == b"ustar\x0000"
    scanned = scan_tar(tmp_path / "a.tar").images
    assert [(s.offset, s.length, s.label) for s in scanned] == [
        (row["offset"], row["length"], row["label"]) for row in rows
    ]


def test_tar_offsets_for_every_padding(tmp_path: Path) -> None:
    lengths = [0, 1, 511, 512, 513, 1023, 1024, 1025, 70_000]
    records = [
        Record(i, "n" * length, -1, None, bytes([i]) * length, ("png", "jpg")[i % 2], 1, 1)
        for i, length in enumerate(lengths)
    ]
    rows, shard = write_tar(tmp_path / "a.tar", records)
    # As webdataset's own writer wrote it, which earlier versions used.
    assert shard.sha256 == "7542891c8d5412d7909830feae727b5fabba5cee49fb7cfe94e30e019fdf2df0"
    data = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        places = {m.name: m.offset_data for m in archive}
    for i, row in enumerate(rows):
        assert places[f"{i:09d}.{records[i].extension}"] == row["offset"]
        assert data[int(row["offset"]) : int(row["offset"] + row["length"])] == records[i].image


def test_webdataset_reads_our_tar(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    records = mixed_records(4)
    write_tar(tmp_path / "a.tar", records)
    with (tmp_path / "a.tar").open("rb") as stream:
        files = tar_file_expander([{"url": "a.tar", "stream": stream}])
        samples = list(group_by_keys(files))
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(4)]
    for sample, source in zip(samples, records, strict=True):
        assert sample[source.extension] == source.image
        assert int(sample["cls"]) == source.label


def test_tar_bytes_depend_on_records_alone(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, iter(mixed_records(3)))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_tar_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    good = record(0)
    gif = Record(1, "x.gif", 0, None, b"GIF89a", "gif", 1, 1)
    unlabelled = Record(1, "x", -2, None, good.image, "jpg", 20, 30)
    with pytest.raises(ShardError, match=r"sample 1 \('x.gif'\) has the extension 'gif'"):
        write_tar(tmp_path / "a.tar", [good, gif])
    with pytest.raises(ShardError, match="label -2"):
        write_tar(tmp_path / "a.tar", [good, unlabelled])
    with pytest.raises(ShardError, match="at least one sample"):
        write_tar(tmp_path / "a.tar", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.dali
def test_dali_reads_our_tar_with_the_exported_index(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    records = mixed_records(8)
    write_dataset(tmp_path, "webdataset", records, samples_per_shard=5)
    indexes = export_dali_index(tmp_path)
    assert [path.name for path in indexes] == ["shard-000000.idx", "shard-000001.idx"]

    pipeline = Pipeline(batch_size=8, num_threads=1, device_id=None)  # type: ignore[arg-type]
    with pipeline:
        outputs = fn.readers.webdataset(
            paths=[str(path.with_suffix(".tar")) for path in indexes],
            index_paths=[str(path) for path in indexes],
            ext=["jpg;png", "label"],
            dtypes=[types.DALIDataType.UINT8, types.DALIDataType.INT32],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(*outputs)  # type: ignore[misc]
    pipeline.build()
    images, labels = pipeline.run()
    for i, source in enumerate(records):
        assert np.asarray(images.at(i)).tobytes() == source.image
        assert np.asarray(labels.at(i)).tolist() == [source.label]


def test_dali_index_is_for_tars(tmp_path: Path) -> None:
    write_dataset(tmp_path, "beton", mixed_records(2))
    with pytest.raises(ShardError, match="index is for tars"):
        export_dali_index(tmp_path)


# ---------------------------------------------------------------- tar: made by others


def test_scan_groups_members_and_finds_labels(tmp_path: Path) -> None:
    image = record(0).image
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        directory = tarfile.TarInfo("dir.with.dots")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        add_member(archive, "__meta__", b"not a sample")
        add_member(archive, "dir.with.dots/a.seg.png", b"a mask, no image of its own")
        add_member(archive, "dir.with.dots/a.JPG", image)
        add_member(archive, "dir.with.dots/a.cls", b"7\n")
        add_member(archive, "b.json", b'{"label": 3}')
        add_member(archive, "c.label", struct.pack("<i", 300))
        add_member(archive, "c.png", b"png")
        add_member(archive, "c.jpeg", image)
        add_member(archive, "b.webp", b"webp")
        add_member(archive, "d.label", b"12")
        add_member(archive, "d.ppm", b"ppm")
        add_member(archive, "e.json", b'{"label": "tench"}')
        add_member(archive, "e.bmp", b"bmp")
        add_member(archive, "words.txt", b"no image")
        add_member(archive, f"{'long' * 50}.jpg", image)
        add_member(archive, ".hidden.jpg", image)
    found = {entry.name: entry for entry in scan_tar(tmp_path / "x.tar").images}
    assert {name: entry.label for name, entry in found.items()} == {
        "dir.with.dots/a.jpg": 7,
        "b.webp": 3,
        "c.jpeg": 300,
        "d.ppm": 12,
        "e.bmp": -1,
        f"{'long' * 50}.jpg": -1,
    }
    data = (tmp_path / "x.tar").read_bytes()
    entry = found["dir.with.dots/a.jpg"]
    assert data[entry.offset : entry.offset + entry.length] == image


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.jpg": b"x", "a.cls": b"dog"}, "label of a in .cls is b'dog'"),
        ({"a.jpg": b"x", "a.cls": b"-7"}, "label of a in .cls is -7"),
        ({"a.txt": b"x", "b.npy": b"y"}, "holds no image.*found: npy, txt"),
        ({}, "holds no image.*no member"),
    ],
)
def test_scan_refuses(tmp_path: Path, members: dict[str, bytes], words: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in members.items():
            add_member(archive, name, data)
    with pytest.raises(ShardError, match=words):
        scan_tar(tmp_path / "x.tar")


def test_a_second_tar_behind_the_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, mixed_records(2))
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(ShardError, match=r"x.tar goes on behind its end .*tar --concatenate"):
        scan_tar(path)


def test_scan_refuses_double_keys_and_damaged_tars(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        add_member(archive, "a.jpg", b"x")
        add_member(archive, "a.jpg", b"y")
    with pytest.raises(ShardError, match=r"holds a\.jpg twice"):
        scan_tar(path)
    with tarfile.open(path, "w:gz") as archive:
        add_member(archive, "a.jpg", b"x")
    with pytest.raises(ShardError, match="not a whole, uncompressed tar"):
        scan_tar(path)
    write_tar(path, mixed_records(4))
    whole, bad = path.read_bytes(), tmp_path / "bad.tar"
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive]
    for kept in (headers[1] + 512 + 700, headers[3] + 100, headers[5]):
        bad.write_bytes(whole[:kept])
        with pytest.raises(ShardError, match=r"bad\.tar .*(cut off|not a whole|ends inside)"):
            scan_tar(bad)
    bad.write_bytes(whole[: headers[6]] + b"?" + whole[headers[6] + 1 :])
    with pytest.raises(ShardError, match=f"damaged or cut off at byte {headers[6]}"):
        scan_tar(bad)


def scanned(path: Path, members: dict[str, bytes | tarfile.TarInfo]):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
            else:
                add_member(archive, name, data)
    return scan_tar(path)


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_hard_links_in_tars_are_what_they_link_to(tmp_path: Path) -> None:
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    members: dict[str, bytes | tarfile.TarInfo] = {
        "a.jpg": b"picture",
        "a.cls": b"5",
        "b.jpg": link("b.jpg", "a.jpg", hard),
        "b.cls": link("b.cls", "a.cls", hard),
        "c.jpg": link("c.jpg", "b.jpg", hard),
        "latest": link("latest", "a.jpg", soft),
    }
    images = {image.name: image for image in scanned(tmp_path / "x.tar", members).images}
    assert {name: image.label for name, image in images.items()} == {
        "a.jpg": 5,
        "b.jpg": 5,
        "c.jpg": -1,
    }
    data = (tmp_path / "x.tar").read_bytes()
    for image in images.values():
        assert data[image.offset : image.offset + image.length] == b"picture"
    for kind, target in ((soft, "a.jpg"), (hard, "elsewhere.jpg")):
        with pytest.raises(ShardError, match=rf"x.tar: d.jpg is a link to {target}"):
            scanned(tmp_path / "x.tar", {"a.jpg": b"x", "d.jpg": link("d.jpg", target, kind)})


@pytest.mark.parametrize(
    ("members", "samples", "remark"),
    [
        # Names with dots: the last one ends the key where nothing else gives an image.
        ({"a.v2.jpg": b"x", "a.v2.cls": b"1", "a.cls.txt": b""}, {"a.v2.jpg": 1}, "hold dots"),
        ({"a.5.1.jpg": b"x", "a.5.2.jpg": b"y"}, {"a.5.1.jpg": -1, "a.5.2.jpg": -1}, "hold dots"),
        # A part of a sample stays a part, and is counted.
        ({"a.jpg": b"x", "a.seg.png": b"y", "a.cls": b"1"}, {"a.jpg": 1}, "end like an image"),
        ({"a.jpg": b"x", "a.png": b"y"}, {"a.jpg": -1}, "end like an image"),
        ({"a.jpg": b"x", ".b.jpg": b"y"}, {"a.jpg": -1}, "hidden member"),
        ({"a.jpg": b"x", "b.json": b"{}"}, {"a.jpg": -1}, "have no image"),
        ({"a.tif": b"x"}, {"a.tif": -1}, ""),
        ({"a.jpg": b"x", "._a.jpg": b"mac"}, {"a.jpg": -1}, ""),
        # Labels: read, or said.
        ({"a.jpg": b"x", "a.json": b"1"}, {"a.jpg": 1}, ""),
        ({"a.jpg": b"x", "a.json": b'{"label": "1"}'}, {"a.jpg": 1}, ""),
        ({"a.jpg": b"x", "a.json": b'{"class_id": 1}'}, {"a.jpg": 1}, ""),
        ({"a.jpg": b"x", "a.json": b'{"label": 2.0}'}, {"a.jpg": 2}, ""),
        ({"a.jpg": b"x", "a.json": b'{"label": null}'}, {"a.jpg": -1}, ""),
        ({"a.jpg": b"x", "a.json": b'{"label": true}'}, {"a.jpg": -1}, "no class number"),
        ({"a.jpg": b"x", "a.json": b'{"label": "cat"}'}, {"a.jpg": -1}, "no class number"),
        ({"a.jpg": b"x", "a.json": b"{label"}, {"a.jpg": -1}, "no class number"),
        ({"a.jpg": b"x", "a.txt": b"1\n"}, {"a.jpg": -1}, "whole number"),
        ({"a.jpg": b"x", "a.index": b"3"}, {"a.jpg": -1}, "whole number"),
        ({"a.jpg": b"x", "a.txt": b"a cat"}, {"a.jpg": -1}, ""),
    ],
)  # fmt: skip
def test_what_a_tar_holds_is_used_or_said(
    tmp_path: Path, members: dict[str, bytes], samples: dict[str, int], remark: str
) -> None:
    scan = scanned(tmp_path / "x.tar", dict(members))
    assert {image.name: image.label for image in scan.images} == samples
    said = " ".join(scan.remarks)
    assert remark in said if remark else not said


@pytest.mark.parametrize(
    "members",
    [
        {"0.input.jpg": b"x", "0.output.cls": b"1"},
        {"0.image.jpg": b"x", "0.mask.png": b"y", "0.cls": b"1"},
        {"0.jpg": b"x", "0.cls": b"1_0"},
    ],
)
def test_a_tar_whose_parts_are_not_understood_is_refused(tmp_path: Path, members) -> None:
    with pytest.raises(ShardError, match=r"x.tar.* (of|name it) 0\b"):
        scanned(tmp_path / "x.tar", members)
