"""Odd images: what is kept, mended or left out, and that engines take what remains."""

import io
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headrace.shards.encode import (
    ALPHA_DROPPED,
    BOMB,
    DAMAGED_REENCODED,
    END_MARKER_APPENDED,
    FIRST_FRAME,
    NO_BYTES,
    PNG_REWRITTEN,
    SIXTEEN_BITS,
    TOO_LONG,
    TRUNCATED,
    Encoded,
    EncodeOptions,
    LeftOut,
    check_decodes,
    encode,
    encode_pixels,
)
from headrace.shards.index import ShardError
from headrace.shards.pixels import NO_IMAGE, UNDEFINED_RANGE

HEIGHT, WIDTH = 120, 160


def picture(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth colours with a little noise: what JPEG keeps nearly as it is."""
    rows, columns = np.mgrid[0:height, 0:width]
    colours = np.stack([rows, columns, (rows + columns) / 2], -1) * 200 / max(height, width)
    noise = np.random.default_rng(0).integers(0, 24, (height, width, 3))
    return Image.fromarray((colours + noise).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def sixteen_bit_rgb_png() -> bytes:
    """Pillow writes no 16-bit RGB, so the chunks are put together here."""
    rows = b"".join(
        b"\0" + (np.asarray(picture())[y].astype(">u2") * 257).tobytes() for y in range(HEIGHT)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    header = WIDTH.to_bytes(4, "big") + HEIGHT.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    )


def odd_images() -> dict[str, bytes]:
    image = picture()
    grey = image.convert("L")
    jpeg = saved(image, "JPEG", quality=90)
    progressive = saved(image, "JPEG", quality=90, progressive=True)
    png = saved(image, "PNG")
    transparent = image.convert("RGBA")
    transparent.putalpha(grey)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    strict_bmp = bytearray(saved(image.resize((2, 2)), "BMP"))
    strict_bmp[18:26] = (40_000).to_bytes(4, "little") * 2
    scan = jpeg.index(b"\xff\xda")
    return {
        "jpeg": jpeg,
        "progressive": progressive,
        "grey": saved(grey, "JPEG"),
        "rotated by exif": saved(image, "JPEG", exif=rotated),
        "trailing bytes": jpeg + b"\0" * 100,
        "restart markers": saved(image, "JPEG", restart_marker_blocks=4),
        "row": saved(picture(1, 300), "JPEG"),
        "column": saved(picture(300, 1), "JPEG"),
        "one pixel": saved(picture(1, 1), "JPEG"),
        "mpo": saved(image, "MPO", save_all=True, append_images=[image.rotate(90)]),
        "png": png,
        "grey png": saved(grey, "PNG"),
        "palette png": saved(image.quantize(64), "PNG"),
        "one bit png": saved(image.convert("1"), "PNG"),
        "cmyk": saved(image.convert("CMYK"), "JPEG"),
        "rgb jpeg": saved(image, "JPEG", keep_rgb=True),
        "transparent png": saved(transparent, "PNG"),
        "grey transparent png": saved(transparent.convert("LA"), "PNG"),
        "transparent colour png": saved(image.quantize(64), "PNG", transparency=3),
        "16 bit grey png": saved(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"),
        "16 bit png": sixteen_bit_rgb_png(),
        "gif": saved(image, "GIF"),
        "moving gif": saved(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "moving png": saved(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
        "webp": saved(image, "WEBP", quality=90),
        "lossless webp": saved(image, "WEBP", lossless=True),
        "bmp": saved(image, "BMP"),
        "tiff": saved(image, "TIFF"),
        "jpeg in tiff": saved(image, "TIFF", compression="jpeg"),
        "ppm": saved(image, "PPM"),
        "no end marker": jpeg[:-2],
        "half an end marker": jpeg[:-1],
        "progressive without end marker": progressive[:-2],
        "stray bytes": jpeg[:scan] + b"\0\0\0" + jpeg[scan:],
        "png without end": png[:-12] + b"\0\0\0\0IEND\0\0\0\0",
        "half": jpeg[: len(jpeg) // 2],
        "half with end marker": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "half progressive": progressive[: len(progressive) // 2],
        "without the last scan": progressive[: progressive.rfind(b"\xff\xda")],
        "half a png": png[: len(png) // 2],
        "nothing": b"",
        "text": b"<html>404 not found</html>",
        "header alone": jpeg[:20],
        "bomb": bytes(strict_bmp),
        "float tiff": saved(grey.convert("F"), "TIFF"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def odd() -> dict[str, bytes]:
    return odd_images()


def encoded(data: bytes, options: EncodeOptions | None = None) -> Encoded:
    result = encode(data, options or EncodeOptions())
    assert isinstance(result, Encoded), result
    return result


KEPT = {
    "jpeg": "jpg", "progressive": "jpg", "grey": "jpg", "rotated by exif": "jpg",
    "trailing bytes": "jpg", "restart markers": "jpg", "row": "jpg", "column": "jpg",
    "one pixel": "jpg", "mpo": "jpg", "png": "png", "grey png": "png", "palette png": "png",
    "one bit png": "png",
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_ordinary_files_keep_their_bytes(odd: dict[str, bytes], name: str) -> None:
    result = encoded(odd[name])
    assert (result.data, result.extension, result.repair) == (odd[name], KEPT[name], None)
    assert pixels_of(odd[name]).shape == (result.height, result.width, 3)


LOSSLESS = {
    "transparent png": ALPHA_DROPPED,
    "grey transparent png": ALPHA_DROPPED,
    "transparent colour png": ALPHA_DROPPED,
    "16 bit png": SIXTEEN_BITS,
    "gif": "GIF converted",
    "moving gif": FIRST_FRAME,
    "moving png": FIRST_FRAME,
    "lossless webp": "WEBP converted",
    "bmp": "BMP converted",
    "tiff": "TIFF converted",
    "ppm": "PPM converted",
    "png without end": PNG_REWRITTEN,
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_sources_become_png_with_pillows_pixels(odd: dict[str, bytes], name: str) -> None:
    result = encoded(odd[name])
    assert (result.extension, result.repair) == ("png", LOSSLESS[name])
    np.testing.assert_array_equal(pixels_of(result.data), pixels_of(odd[name]))


LOSSY = {
    "cmyk": "CMYK JPEG converted to YCbCr",
    "rgb jpeg": "RGB JPEG converted to YCbCr",
    "webp": "WEBP converted",
    "jpeg in tiff": "TIFF converted",
}


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_sources_become_fine_jpeg(odd: dict[str, bytes], name: str) -> None:
    result = encoded(odd[name])
    assert (result.extension, result.repair) == ("jpg", LOSSY[name])
    difference = pixels_of(result.data).astype(float) - pixels_of(odd[name])
    assert np.abs(difference).mean() < 3
    assert simplejpeg.decode_jpeg_header(result.data)[2:] == ("YCbCr", "444")


def test_16_bit_grey_keeps_the_high_byte(odd: dict[str, bytes]) -> None:
    result = encoded(odd["16 bit grey png"])
    assert (result.extension, result.repair) == ("png", SIXTEEN_BITS)
    expected = np.asarray(picture().convert("L"))
    np.testing.assert_array_equal(pixels_of(result.data)[..., 0], expected)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("no end marker", "jpeg"),
        ("half an end marker", "jpeg"),
        ("progressive without end marker", "progressive"),
    ],
)
def test_a_missing_end_marker_is_appended(odd: dict[str, bytes], name: str, whole: str) -> None:
    result = encoded(odd[name])
    assert (result.data, result.repair) == (odd[whole], END_MARKER_APPENDED)


def test_warnings_with_a_whole_image_lead_to_a_new_jpeg(odd: dict[str, bytes]) -> None:
    mended = encoded(odd["stray bytes"])
    assert mended.repair == DAMAGED_REENCODED
    difference = pixels_of(mended.data).astype(float) - pixels_of(odd["jpeg"])
    assert np.abs(difference).mean() < 3


LEFT_OUT = {
    "half": TRUNCATED, "half with end marker": TRUNCATED, "half progressive": TRUNCATED,
    "without the last scan": TRUNCATED, "half a png": TRUNCATED, "nothing": NO_BYTES,
    "text": "an HTML page", "header alone": NO_IMAGE, "bomb": BOMB, "float tiff": UNDEFINED_RANGE,
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_not_whole_is_left_out(odd: dict[str, bytes], name: str) -> None:
    result = encode(odd[name])
    assert isinstance(result, LeftOut)
    assert result.reason == LEFT_OUT[name]


def test_every_odd_image_has_a_test(odd: dict[str, bytes]) -> None:
    mended = {name for name in odd if "end marker" in name and "half with" not in name}
    others = {"16 bit grey png", "stray bytes"}
    assert {*KEPT, *LOSSLESS, *LOSSY, *LEFT_OUT, *mended, *others} == set(odd)


def test_the_result_can_be_encoded_again_without_change(odd: dict[str, bytes]) -> None:
    for name, data in odd.items():
        result = encode(data)
        if isinstance(result, Encoded):
            check_decodes(result.data, result.height, result.width)
            again = encoded(result.data)
            assert (again.data, again.repair) == (result.data, None), name


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("shape", "limit", "expected"),
    [((120, 160), 80, (60, 80)), ((120, 160), 160, (120, 160)), ((1, 300), 50, (1, 50))],
)
def test_max_side(kind: str, shape: tuple[int, int], limit: int, expected: tuple[int, int]) -> None:
    data = saved(picture(*shape), kind)
    result = encoded(data, EncodeOptions(max_side_pixels=limit))
    assert (result.height, result.width) == expected == pixels_of(result.data).shape[:2]
    assert result.extension == {"JPEG": "jpg", "PNG": "png"}[kind]
    assert (result.data == data) == (shape == expected)
    assert result.repair is None


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((100, 100, 3), np.uint8)
    stripes[:, ::2] = 255
    result = encoded(saved(Image.fromarray(stripes), "PNG"), EncodeOptions(max_side_pixels=25))
    assert np.abs(pixels_of(result.data)[5:-5, 5:-5].astype(int) - 127).max() <= 2


def test_quality_makes_everything_jpeg(odd: dict[str, bytes]) -> None:
    small = encoded(odd["jpeg"], EncodeOptions(quality=30))
    assert len(small.data) < len(odd["jpeg"])
    assert simplejpeg.decode_jpeg_header(small.data)[3] == "420"
    assert encoded(odd["png"], EncodeOptions(quality=90)).extension == "jpg"
    grey = encoded(odd["grey"], EncodeOptions(quality=90))
    assert simplejpeg.decode_jpeg_header(grey.data)[2] == "Gray"


def test_a_side_that_no_format_can_hold_is_left_out_unless_shrunk() -> None:
    strip = saved(Image.new("RGB", (65_600, 1)), "PNG")
    result = encode(strip)
    assert isinstance(result, LeftOut)
    assert result.reason == TOO_LONG
    assert encoded(strip, EncodeOptions(max_side_pixels=1000)).width == 1000


@pytest.mark.parametrize("options", [{"max_side_pixels": 0}, {"quality": 0}, {"quality": 101}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ShardError, match=next(iter(options))):
        EncodeOptions(**options)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_pixels_survive(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    result = encode_pixels(pixels)
    assert isinstance(result, Encoded)
    assert (result.height, result.width, result.extension) == (height, width, "png")
    np.testing.assert_array_equal(pixels_of(result.data), pixels)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_never_gets_through(data: st.DataObject) -> None:
    """Whatever is cut off or overwritten: an exception never, and what is kept decodes strictly."""
    source = bytearray(data.draw(st.sampled_from(list(odd_images_once().values()))))
    for _ in range(data.draw(st.integers(0, 3))):
        if source:
            position = data.draw(st.integers(0, len(source) - 1))
            source[position] = data.draw(st.integers(0, 255))
    result = encode(bytes(source[: data.draw(st.integers(0, len(source)))]))
    if isinstance(result, Encoded):
        check_decodes(result.data, result.height, result.width)


def odd_images_once(cache: list[dict[str, bytes]] = []) -> dict[str, bytes]:  # noqa: B006
    if not cache:
        cache.append(odd_images())
    return cache[0]


def dali_decoder() -> Callable[[bytes], np.ndarray]:
    """Decodes as the DALI engine does."""
    fn = pytest.importorskip("nvidia.dali.fn")
    types = pytest.importorskip("nvidia.dali.types")
    pipeline_def = pytest.importorskip("nvidia.dali.pipeline").pipeline_def
    current: list[bytes] = []

    @pipeline_def(
        batch_size=1, num_threads=1, device_id=None, exec_async=False, exec_pipelined=False
    )
    def decoder():
        data = fn.external_source(lambda: [np.frombuffer(current[0], np.uint8)])
        return fn.decoders.image(data, output_type=types.RGB, adjust_orientation=False)

    pipeline = decoder(prefetch_queue_depth=1)
    pipeline.build()

    def decode(data: bytes) -> np.ndarray:
        current[:] = [data]
        (images,) = pipeline.run()
        return np.asarray(images[0])

    return decode


@pytest.mark.dali
@pytest.mark.filterwarnings("default")
def test_dali_decodes_everything_that_is_written(odd: dict[str, bytes]) -> None:
    decode = dali_decoder()
    written = 0
    for name, data in odd.items():
        result = encode(data)
        if isinstance(result, Encoded):
            written += 1
            np.testing.assert_array_equal(decode(result.data), pixels_of(result.data), name)
    assert written > 30


PILLOW_SDIST_SHA256 = "cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510"


@pytest.fixture(scope="module")
def pillow_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Pillow's own test images: a thousand files that were odd enough to be reported as bugs."""
    from hashlib import sha256

    directory = tmp_path_factory.mktemp("pillow")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(directory), "pillow==13.0.0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    found = list(directory.glob("pillow-*.tar.gz"))
    if result.returncode != 0 or not found:
        print(result.stderr)
        pytest.skip("Pillow's source package could not be downloaded with pip")
    assert sha256(found[0].read_bytes()).hexdigest() == PILLOW_SDIST_SHA256
    images: dict[str, bytes] = {}
    with tarfile.open(found[0]) as tar:
        for member in tar:
            if "/Tests/images/" in member.name and member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                images[Path(member.name).name] = file.read()
    return images


@pytest.mark.slow
@pytest.mark.dali
@pytest.mark.filterwarnings("default")
def test_pillows_corpus(pillow_images: dict[str, bytes]) -> None:
    decode = dali_decoder()
    results = {name: encode(data) for name, data in pillow_images.items()}
    for name, result in results.items():
        if isinstance(result, Encoded):
            pixels = decode(result.data)
            assert pixels.shape == (result.height, result.width, 3), name
            np.testing.assert_array_equal(pixels, pixels_of(result.data), name)

    def reason(name: str) -> str | None:
        result = results[name]
        return result.reason if isinstance(result, LeftOut) else result.repair

    assert sum(isinstance(result, Encoded) for result in results.values()) > 600
    assert reason("hopper.jpg") is None
    assert reason("hopper_orientation_6.jpg") is None
    assert reason("pil_sample_cmyk.jpg") == "YCCK JPEG converted to YCbCr"
    assert reason("truncated_jpeg.jpg") == END_MARKER_APPENDED
    assert reason("junk_jpeg_header.jpg") == DAMAGED_REENCODED
    assert reason("hopper.gif") == "GIF converted"
    assert reason("iss634.gif") == FIRST_FRAME
    assert reason("truncated_image.png") == TRUNCATED
    assert reason("decompression_bomb.gif") == BOMB
