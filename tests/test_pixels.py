"""One rule from any picture to 8-bit RGB: converted or opened as it is, through every engine."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headrace.pipelines.loader import open_loader
from headrace.pipelines.ops import CenterCrop
from headrace.pipelines.recipe import Augmentation, View
from headrace.shards.convert import convert
from headrace.shards.encode import START_MARKER_REMOVED, Encoded, LeftOut, encode
from headrace.shards.headers import HeaderError, read_header
from headrace.shards.sources import list_source
from headrace.shards.store import Store, open_store

SIDE = 24
VIEW = View("view", (CenterCrop(SIDE),))
AS_STORED = Augmentation("as_stored", (VIEW,), mean=(0, 0, 0), std=(1, 1, 1))


def colours() -> Image.Image:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    return Image.fromarray(
        np.stack([7 * columns, 10 * rows, 3 * columns + 5 * rows], -1).astype(np.uint8)
    )


def sixteen_bit() -> np.ndarray:
    return np.asarray(colours().convert("L")).astype(np.uint16) * 256 + 77


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pnm(start: str, pixels: np.ndarray) -> bytes:
    return f"{start}\n{SIDE} {SIDE}\n".encode() + pixels.tobytes()


def odd_pictures() -> dict[str, bytes]:
    image = colours()
    grey = image.convert("L")
    transparent = image.convert("RGBA")
    transparent.putalpha(grey)
    deep = Image.fromarray(sixteen_bit())
    text = b"P3\n%d %d\n255\n" % image.size + b" ".join(b"%d" % v for v in image.tobytes())
    return {
        "16-bit grey.png": saved(deep, "PNG"),
        "16-bit grey.tif": saved(deep, "TIFF", compression="tiff_lzw"),
        "16-bit grey.pgm": pnm("P5", np.frombuffer(b"65535\n", np.uint8))
        + sixteen_bit().astype(">u2").tobytes(),
        "lab.tif": saved(Image.frombytes("LAB", image.size, image.tobytes()), "TIFF"),
        "ycbcr.tif": saved(image.convert("YCbCr"), "TIFF"),
        "cmyk.tif": saved(image.convert("CMYK"), "TIFF"),
        "one bit.tif": saved(image.convert("1"), "TIFF"),
        "alpha.png": saved(transparent, "PNG"),
        "grey alpha.png": saved(transparent.convert("LA"), "PNG"),
        "palette.png": saved(image.quantize(64), "PNG"),
        "palette alpha.png": saved(image.quantize(64), "PNG", transparency=3),
        "palette.bmp": saved(image.quantize(32), "BMP"),
        "alpha.webp": saved(transparent, "WEBP", lossless=True),
        "text.ppm": text,
        "up to 100.pgm": pnm("P5", np.frombuffer(b"100\n", np.uint8))
        + (np.asarray(grey) % 101).tobytes(),
    }


def pixels(store: Store, engine: str) -> dict[str, np.ndarray]:
    with open_loader(
        store, AS_STORED, batch_size=8, engine=engine, shuffle="none", drop_last=False,
        stage=False, passes=1, threads=1,
    ) as loader:  # fmt: skip
        batches = list(loader)
    views = [view.permute(1, 2, 0).numpy() for batch in batches for view in batch.views[0]]
    return dict(zip(store.names(np.arange(len(store))), views, strict=True))


@pytest.mark.parametrize(
    "engine", ["reference", "fused", pytest.param("dali", marks=pytest.mark.dali)]
)
def test_the_same_pixels_both_ways_in(tmp_path: Path, engine: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    odd = odd_pictures()
    for name, data in odd.items():
        (folder / name).write_bytes(data)
    convert(list_source(folder)[0], tmp_path / "set", workers=1)
    converted = pixels(open_store(tmp_path / "set"), "reference")
    direct = pixels(open_store(folder), engine)
    assert direct.keys() == converted.keys() == odd.keys()
    for name in odd:
        np.testing.assert_array_equal(direct[name], converted[name], name)
    high_byte = (sixteen_bit() >> 8)[..., None].repeat(3, axis=-1)
    for name in ("16-bit grey.png", "16-bit grey.tif", "16-bit grey.pgm"):
        np.testing.assert_array_equal(direct[name], high_byte, name)


def jpeg() -> bytes:
    return saved(colours(), "JPEG")


def with_frame(change: Callable[[bytearray, int], None]) -> bytes:
    data = bytearray(jpeg())
    change(data, data.index(b"\xff\xc0") + 4)  # precision, height, width
    return bytes(data)


def set_precision(data: bytearray, at: int) -> None:
    data[at] = 12


def no_height(data: bytearray, at: int) -> None:
    data[at + 1 : at + 3] = b"\0\0"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "32-bit pixels"),
        (saved(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "32-bit pixels"),
        (with_frame(set_precision), "12-bit JPEG"),
        (with_frame(no_height), "height is not in its header"),
        (b"\0\0\0\x18ftypheic" + bytes(64), "HEIC"),
        (b"\xff\x0a" + bytes(64), "JPEG XL"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (bytes(128) + b"DICM" + bytes(32), "DICOM"),
        (b"<!DOCTYPE html><title>404</title>", "HTML"),
        (b"%PDF-1.4\n" + bytes(64), "PDF"),
        (b"rubbish", "no known format"),
    ],
)
def test_what_is_no_picture_is_named_by_its_kind_both_ways_in(data: bytes, kind: str) -> None:
    result = encode(data)
    assert isinstance(result, LeftOut)
    assert kind in result.reason
    with pytest.raises(HeaderError, match=kind) as refused:
        read_header(data)
    assert "0x" not in result.detail + str(refused.value)


def test_a_second_start_marker_is_removed() -> None:
    result = encode(b"\xff\xd8" + jpeg())
    assert isinstance(result, Encoded)
    assert (result.data, result.repair) == (jpeg(), START_MARKER_REMOVED)
    with pytest.raises(HeaderError, match="JPEG with two start markers"):
        read_header(b"\xff\xd8" + jpeg())


def test_a_bad_picture_in_a_batch_is_named_without_an_address(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved(colours(), "PNG"))
    store = open_store(tmp_path)
    (tmp_path / "a.png").write_bytes(bytes(len(saved(colours(), "PNG"))))
    with pytest.raises(ValueError, match=r"'a\.png'.*no known format") as refused:
        pixels(store, "reference")
    assert "0x" not in str(refused.value)
