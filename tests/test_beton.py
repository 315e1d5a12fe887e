"""FFCV's .beton files: ours, those that FFCV wrote, and damaged ones."""

import importlib.util
import io
import subprocess
import sys
import textwrap
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from headrace.shards.beton import (
    PAGE_BYTES_AT_LEAST,
    beton_item,
    page_bytes_for,
    read_beton_index,
    write_beton,
)
from headrace.shards.index import ENCODED, INDEX_DTYPE, RAW, Record, ShardError, content_hash
from headrace.shards.manifest import ShardFile


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


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


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


def beton_rows(records: list[Record]) -> tuple[np.ndarray, list[bytes]]:
    rows = np.zeros(len(records), INDEX_DTYPE)
    items = [beton_item(source.image) for source in records]
    for row, source, item in zip(rows, records, items, strict=True):
        row["label"], row["length"], row["encoding"] = source.label, len(item.data), item.encoding
        row["height"], row["width"] = item.height, item.width
    return rows, [item.data for item in items]


def test_beton_item_keeps_plain_jpegs_and_decodes_the_rest() -> None:
    image = picture(5, 12, 18)
    for data in (encoded(image), encoded(image.convert("L")), encoded(image, progressive=True)):
        assert beton_item(data) == (data, ENCODED, 12, 18)
    alpha = picture(5, 12, 18, "RGBA")
    alpha.putalpha(7)
    for data in (
        encoded(image, "PNG"),
        encoded(alpha, "PNG"),
        encoded(image.convert("P"), "PNG"),
        encoded(image, keep_rgb=True),
        encoded(image.convert("CMYK")),
    ):
        item = beton_item(data)
        assert (item.encoding, item.height, item.width) == (RAW, 12, 18)
        assert item.data == pixels_of(data).tobytes()
    assert beton_item(encoded(alpha, "PNG")).data == image.tobytes()


def test_beton_item_refuses() -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(ShardError, match="8 bits per channel"):
        beton_item(encoded(deep, "PNG"))
    with pytest.raises(ShardError, match="not an image"):
        beton_item(b"rubbish")
    png = encoded(picture(1, 30, 30), "PNG")
    with pytest.raises(ShardError, match="cannot be decoded"):
        beton_item(png[: len(png) // 2])
    wide = b"P5 65536 1 255\n" + bytes(65536)
    with pytest.raises(ShardError, match="65536 x 1 pixels"):
        beton_item(wide)


def test_beton_round_trip(tmp_path: Path) -> None:
    records = mixed_records(9)
    rows, items = beton_rows(records)
    written, shard = write_beton(tmp_path / "a.beton", rows, iter(items))
    write_beton(tmp_path / "b.beton", rows, iter(items))
    data = (tmp_path / "a.beton").read_bytes()
    assert data == (tmp_path / "b.beton").read_bytes()
    assert shard == ShardFile("a.beton", 9, len(data), sha256(data).hexdigest())
    for row, item in zip(written, items, strict=True):
        assert data[int(row["offset"]) : int(row["offset"] + row["length"])] == item
        assert row["content_hash"] == content_hash(item)
    read = read_beton_index(tmp_path / "a.beton")
    for column in ("shard", "offset", "length", "label", "height", "width", "encoding"):
        assert (read[column] == written[column]).all()
    assert set(read["encoding"]) == {ENCODED, RAW}


def test_beton_items_stay_within_pages(tmp_path: Path) -> None:
    lengths = [900_000, 900_000, 900_000, 2_097_152, 5, 2_097_147, 1]
    rows = np.zeros(len(lengths), INDEX_DTYPE)
    rows["length"], rows["height"], rows["width"] = lengths, 1, 1
    written, _ = write_beton(tmp_path / "a.beton", rows, (bytes(n) for n in lengths))
    pages = (written["offset"] // PAGE_BYTES_AT_LEAST).tolist()
    last = ((written["offset"] + written["length"] - 1) // PAGE_BYTES_AT_LEAST).tolist()
    assert pages == last == [1, 1, 2, 3, 4, 4, 5]
    assert (read_beton_index(tmp_path / "a.beton")["length"] == lengths).all()


@given(st.integers(1, 1 << 31))
def test_page_holds_the_largest_item(largest: int) -> None:
    page = page_bytes_for(largest)
    assert page >= max(largest, PAGE_BYTES_AT_LEAST)
    assert page & (page - 1) == 0
    assert page == PAGE_BYTES_AT_LEAST or page // 2 < largest


def test_beton_writer_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    rows, items = beton_rows(mixed_records(3))
    with pytest.raises(ShardError, match="3 samples are declared, 2 came"):
        write_beton(path, rows, items[:2])
    with pytest.raises(ShardError, match="more samples came than the 3"):
        write_beton(path, rows, [*items, b"x"])
    with pytest.raises(ShardError, match="sample 1 are not the declared"):
        write_beton(path, rows, [items[0], items[0], items[2]])
    hashed = rows.copy()
    hashed["content_hash"] = [content_hash(item) for item in items]
    damaged = bytes([items[2][0] ^ 1]) + items[2][1:]
    with pytest.raises(ShardError, match="sample 2 are not the declared"):
        write_beton(path, hashed, [*items[:2], damaged])
    short = rows.copy()
    short["height"][1] += 1
    with pytest.raises(ShardError, match="sample 1 cannot be stored"):
        write_beton(path, short, items)
    with pytest.raises(ShardError, match="at least one sample"):
        write_beton(path, rows[:0], [])
    with pytest.raises(ShardError, match="items up to"):
        page_bytes_for((1 << 31) + 1)
    assert list(tmp_path.iterdir()) == []


def test_damaged_beton_is_refused(tmp_path: Path) -> None:
    rows, items = beton_rows(mixed_records(5))
    path = tmp_path / "a.beton"
    write_beton(path, rows, items)
    whole = path.read_bytes()
    wrong_version = b"\x09\x00" + whole[2:]
    no_image = bytearray(whole)
    no_image[24] = 0  # the first field's type: a float, of another size
    own_field = bytearray(whole)
    own_field[24] = 255
    for data, words in (
        (b"", "not a whole .beton"),
        (b"P6 " * 5000, "not a .beton file of version 2"),
        (wrong_version, "not a .beton file of version 2"),
        (bytes(no_image), "no RGB image field; its fields are image, label"),
        (bytes(own_field), "'image' has a type of its own"),
        (whole[: len(whole) - 24 * 5], "no whole allocation table"),
        (whole[:3_000], "not a whole .beton"),
        (whole[:900], "not a whole .beton"),
        (whole[:16] + b"\xff" * 8 + whole[24:], "not a whole .beton"),
        (whole[:8] + b"\xff" * 8 + whole[16:], "not a whole .beton"),
    ):
        path.write_bytes(data)
        with pytest.raises(ShardError, match=words):
            read_beton_index(path)


FFCV_SCRIPT = """
    import sys
    import numpy as np
    from ffcv.fields import BytesField, FloatField, IntField, RGBImageField
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    directory = sys.argv[1]
    given = np.load(f"{directory}/given.npz")
    pictures = [given[f"picture{i}"] for i in range(len(given.files))]

    class Pictures:
        def __init__(self, row):
            self.row = row
        def __len__(self):
            return len(pictures)
        def __getitem__(self, i):
            return self.row(i)

    modes = {
        "raw": RGBImageField(write_mode="raw"),
        "jpg": RGBImageField(write_mode="jpg", jpeg_quality=95),
        "smart": RGBImageField(write_mode="smart", smart_threshold=4_000, jpeg_quality=95),
        "proportion": RGBImageField(write_mode="proportion", compress_probability=0.5),
    }
    for name, field in modes.items():
        writer = DatasetWriter(f"{directory}/{name}.beton", {"image": field, "label": IntField()},
                               num_workers=2)
        writer.from_indexed_dataset(Pictures(lambda i: (pictures[i], 10 + i)), chunksize=2)
    writer = DatasetWriter(
        f"{directory}/many.beton",
        {"index": IntField(), "weight": FloatField(), "text": BytesField(),
         "picture": RGBImageField(write_mode="raw"), "target": IntField()},
        num_workers=1,
    )
    text = np.frombuffer(b"some text", np.uint8)
    writer.from_indexed_dataset(Pictures(lambda i: (1000 + i, 0.5, text, pictures[i], 20 + i)))
    writer = DatasetWriter(f"{directory}/none.beton", {"label": IntField(), "text": BytesField()},
                           num_workers=1)
    writer.from_indexed_dataset(Pictures(lambda i: (i, text)))

    for os_cache in (True, False):
        loader = Loader(f"{directory}/ours.beton", batch_size=4, num_workers=1, os_cache=os_cache,
                        order=OrderOption.SEQUENTIAL, drop_last=False)
        images, labels = zip(*((i.numpy().copy(), l.numpy().copy()) for i, l in loader))
        np.savez(f"{directory}/seen-{os_cache}.npz", images=np.concatenate(images),
                 labels=np.concatenate(labels))
"""


@pytest.fixture(scope="module")
def ffcv_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ours.beton read by FFCV's loader, and files that FFCV's writer made.

    In a process of its own: FFCV's writer waits for ever for a worker that failed, and its
    finalizers raise at exit.
    """
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("ffcv is not installed")
    directory = tmp_path_factory.mktemp("ffcv")
    sizes = [(20, 30), (40, 50), (31, 33), (64, 64), (25, 90), (70, 21)]
    pictures = {f"picture{i}": np.asarray(picture(i, *size)) for i, size in enumerate(sizes)}
    np.savez(directory / "given.npz", allow_pickle=False, **pictures)
    rows, items = beton_rows(ours_for_ffcv())
    write_beton(directory / "ours.beton", rows, items)
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FFCV_SCRIPT), str(directory)]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    return directory


def ours_for_ffcv() -> list[Record]:
    """Equal sizes, as FFCV's simplest decoder wants: colour and grey JPEGs, and PNGs."""
    records = []
    for i in range(10):
        image = picture(50 + i, 48, 40, "L" if i % 5 == 4 else "RGB")
        data = encoded(image, "PNG") if i % 3 == 1 else encoded(image, quality=95)
        records.append(Record(i, "", i * 7, None, data, "png" if i % 3 == 1 else "jpg", 48, 40))
    return records


@pytest.mark.ffcv
@pytest.mark.slow
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_loader_reads_our_beton(ffcv_directory: Path, os_cache: bool) -> None:
    records = ours_for_ffcv()
    seen = np.load(ffcv_directory / f"seen-{os_cache}.npz")
    assert seen["labels"][:, 0].tolist() == [source.label for source in records]
    for image, source in zip(seen["images"], records, strict=True):
        expected = pixels_of(source.image)
        if source.extension == "png":
            assert (image == expected).all()
        else:  # FFCV decodes with libjpeg's fast DCT, Pillow with the exact one
            assert (image == simplejpeg.decode_jpeg(source.image, fastdct=True)).all()
            assert np.abs(image.astype(int) - expected).mean() < 2


@pytest.mark.ffcv
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first_label"),
    [("raw", 10), ("jpg", 10), ("smart", 10), ("proportion", 10), ("many", 20)],
)
def test_we_read_what_ffcv_wrote(ffcv_directory: Path, name: str, first_label: int) -> None:
    path = ffcv_directory / f"{name}.beton"
    given = np.load(ffcv_directory / "given.npz")
    rows, data = read_beton_index(path), path.read_bytes()
    assert rows["label"].tolist() == [first_label + i for i in range(6)]
    for i, row in enumerate(rows):
        expected = given[f"picture{i}"]
        assert (row["height"], row["width"]) == expected.shape[:2]
        item = data[int(row["offset"]) : int(row["offset"] + row["length"])]
        if row["encoding"] == RAW:
            assert item == expected.tobytes()
        else:
            assert np.abs(pixels_of(item).astype(int) - expected).mean() < 6
    raw = (rows["encoding"] == RAW).tolist()
    match name:
        case "raw" | "many":
            assert all(raw)
        case "jpg":
            assert not any(raw)
        case "smart":  # everything above the threshold in raw bytes is compressed
            assert raw == [True, False, True, False, False, False]
        case _:
            assert len(raw) == 6


@pytest.mark.ffcv
@pytest.mark.slow
def test_ffcv_file_without_pictures_is_refused(ffcv_directory: Path) -> None:
    with pytest.raises(ShardError, match="no RGB image field; its fields are label, text"):
        read_beton_index(ffcv_directory / "none.beton")
