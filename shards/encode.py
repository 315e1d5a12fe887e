"""Image file in, image file out: keep it, shrink it, convert it, repair it, or say why not.

What is written here is decoded by every engine later, and an engine cannot skip a sample: one bad
file ends a run of days. So each file is decoded whole *now*, by Pillow and, for JPEG, by
libjpeg-turbo with warnings taken as errors. That costs two decodes per image, once.

The policy, in the order in which it is applied:

* Left out: no bytes, not an image, more pixels than Pillow's limit (its decompression bomb check
  stays as it is), truncated (data that the decoder would have to invent), 32-bit pixels (their
  range is undefined), a side above 65,500 pixels (neither JPEG nor .beton can hold it).
* Kept byte for byte: grey and YCbCr JPEG (baseline, extended, progressive; also the first picture
  of an MPO), and 8-bit PNG without alpha. The content decides, never the file name. EXIF rotation
  is neither applied nor removed: pixels are what `pixels` makes of them, for every engine too.
* Repaired: a missing JPEG end marker is appended, a second start marker removed. JPEGs with other
  corrupt-data warnings but a whole image are encoded again as they decode.
* Converted: everything else. Lossless sources (PNG with alpha or 16 bits, GIF's first frame, BMP,
  TIFF, ...) become PNG, the others (CMYK or RGB JPEG, lossy WebP, AVIF, ...) JPEG of quality 95.
* Asked for: `max_side_pixels` shrinks (lossless stays lossless), `quality` makes everything JPEG.

JPEGs made here have full colour resolution (4:4:4) where a file is merely converted, because the
aim is to keep its pixels; they are 4:2:0 where the user asked for a smaller or recompressed image,
because fewer bytes are then the aim and decode time follows bytes.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from headrace.shards.index import ShardError
from headrace.shards.kinds import unreadable_kind
from headrace.shards.pixels import NO_IMAGE, PixelError, eight_bit, in_words

CONVERSION_QUALITY = 95
LARGEST_SIDE_PIXELS = 65_500

# Formats that Pillow decodes itself. A closed list: Pillow would also start Ghostscript for EPS.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_START_MARKER, _END_MARKER = b"\xff\xd8", b"\xff\xd9"

NO_BYTES = "zero bytes"
TRUNCATED = "truncated or damaged: cannot be decoded whole"
BOMB = "more pixels than Pillow's decompression bomb limit"
TOO_LONG = "a side above 65,500 pixels"

START_MARKER_REMOVED = "second JPEG start marker removed"
END_MARKER_APPENDED = "missing JPEG end marker appended"
DAMAGED_REENCODED = "JPEG with corrupt-data warnings encoded again as it decodes"
PNG_REWRITTEN = "PNG with damaged chunks written again"
ALPHA_DROPPED = "alpha dropped"
SIXTEEN_BITS = "16 bits per channel reduced to 8"
FIRST_FRAME = "animation: first frame taken"


@dataclass(frozen=True)
class EncodeOptions:
    """What is asked of every image.

    max_side_pixels: shrink (antialiased bicubic) so that the longest side has at most this many
    pixels; images that are small enough are not touched. quality: encode every image as JPEG of
    this quality, 1 to 100.
    """

    max_side_pixels: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.max_side_pixels is not None and self.max_side_pixels < 1:
            raise ShardError(f"max_side_pixels is {self.max_side_pixels}; it must be at least 1")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ShardError(f"quality is {self.quality}; it must be from 1 to 100")


@dataclass(frozen=True)
class Encoded:
    """A file that every engine can decode. extension: "jpg" or "png"; sides in pixels.

    repair: None if nothing but what was asked for was done, else the reason.
    """

    data: bytes
    extension: str
    height: int
    width: int
    repair: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """A sample that is not stored. reason: one of a few; detail: what the decoder said."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class _Decoded:
    """A decoded source: mode L or RGB. kept: the bytes to store if no pixel has to change."""

    image: Image.Image
    lossless: bool
    kept: bytes | None
    repair: str | None


class _Rejected(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.left_out = LeftOut(reason, detail)


def encode(data: bytes, options: EncodeOptions = EncodeOptions()) -> Encoded | LeftOut:
    """Turn the bytes of an image file into bytes that are safe to store.

    Deterministic for equal versions of Pillow, libjpeg-turbo and zlib.
    """
    try:
        # Odd EXIF blocks and large pictures warn; neither matters here, and a program that turns
        # warnings into errors must not lose samples by it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _stored(_decode(data), options)
    except _Rejected as rejected:
        return rejected.left_out


def encode_pixels(
    pixels: NDArray[np.uint8], options: EncodeOptions = EncodeOptions()
) -> Encoded | LeftOut:
    """Encode uint8 pixels [height, width, 3] as PNG, or as JPEG if a quality is asked for."""
    try:
        return _stored(_Decoded(Image.fromarray(pixels), True, None, None), options)
    except _Rejected as rejected:
        return rejected.left_out


def check_decodes(data: bytes | memoryview | NDArray[np.uint8], height: int, width: int) -> None:
    """Decode a stored JPEG or PNG as strictly as training does.

    Raises `ShardError` if it does not decode whole, or not to `height` x `width` pixels.
    """
    data = bytes(data)
    try:
        image = _load(data)
        if image.format in ("JPEG", "MPO"):
            _decode_strictly(data, "GRAY" if image.mode == "L" else "RGB")
    except _Rejected as rejected:
        detail = rejected.left_out.detail
        raise ShardError(f"does not decode ({detail or rejected.left_out.reason})") from rejected
    except ValueError as error:
        raise ShardError(f"does not decode without warnings ({error})") from error
    if image.size != (width, height):
        raise ShardError(
            f"has {image.height} x {image.width} pixels where the index says {height} x {width}"
        )


def _stored(decoded: _Decoded, options: EncodeOptions) -> Encoded:
    image = decoded.image
    size = _shrunk_size(image.size, options.max_side_pixels)
    changed = size != image.size or options.quality is not None
    if max(size) > LARGEST_SIDE_PIXELS:
        raise _Rejected(TOO_LONG, f"{image.height} x {image.width} pixels")
    if decoded.kept is not None and not changed:
        extension = "png" if decoded.lossless else "jpg"
        return Encoded(decoded.kept, extension, image.height, image.width, decoded.repair)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    if decoded.lossless and options.quality is None:
        data, extension = _to_png(image), "png"
    else:
        quality = CONVERSION_QUALITY if options.quality is None else options.quality
        data, extension = _to_jpeg(image, quality, "420" if changed else "444"), "jpg"
    check_decodes(data, image.height, image.width)
    return Encoded(data, extension, image.height, image.width, decoded.repair)


def _shrunk_size(size: tuple[int, int], max_side_pixels: int | None) -> tuple[int, int]:
    longest = max(size)
    if max_side_pixels is None or longest <= max_side_pixels:
        return size
    width, height = (max(1, round(side * max_side_pixels / longest)) for side in size)
    return width, height


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # Pillow would carry over profiles and text; only pixels count.
    image.info = {}
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _to_jpeg(image: Image.Image, quality: int, subsampling: str) -> bytes:
    pixels = np.ascontiguousarray(image)
    if image.mode == "L":
        return simplejpeg.encode_jpeg(pixels[..., None], quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", subsampling)


def _decode(data: bytes) -> _Decoded:
    if not data:
        raise _Rejected(NO_BYTES)
    if data.startswith(b"\xff\xd8"):
        return _decode_jpeg(data)
    image = _load(data)
    if getattr(image, "n_frames", 1) > 1:
        return _Decoded(_eight_bit(image), _is_lossless(image, data), None, FIRST_FRAME)
    if image.format != "PNG":
        repair = f"{image.format} converted"
        return _Decoded(_eight_bit(image), _is_lossless(image, data), None, repair)
    if data[24] == 16:
        repair = SIXTEEN_BITS
    elif image.mode not in ("1", "L", "P", "RGB") or "transparency" in image.info:
        repair = ALPHA_DROPPED
    elif not _png_is_sound(data):
        repair = PNG_REWRITTEN
    else:
        return _Decoded(_eight_bit(image), True, data, None)
    return _Decoded(_eight_bit(image), True, None, repair)


def _decode_jpeg(data: bytes) -> _Decoded:
    repair = None
    if data.startswith(_START_MARKER + _START_MARKER):
        # Some cameras write it twice. Browsers take that, Pillow does not.
        data, repair = data[len(_START_MARKER) :], START_MARKER_REMOVED
    complaint = _complaint(data)
    if complaint is not None:
        # Appending an end marker mends what lacks nothing else; the rest still complains.
        ended = data + (_END_MARKER[1:] if data.endswith(b"\xff") else _END_MARKER)
        if _complaint(ended) is None:
            if not _has_all_scans(ended):
                raise _Rejected(TRUNCATED, "progressive JPEG that ends before its last scans")
            data, complaint, repair = ended, None, END_MARKER_APPENDED
    # Pillow refuses what ends before the last line; libjpeg-turbo names the gap as it fills it.
    image = _load(data)
    if complaint is not None:
        if "premature end" in complaint.lower():
            raise _Rejected(TRUNCATED, complaint)
        return _Decoded(_eight_bit(image), False, None, DAMAGED_REENCODED)
    colour_space = simplejpeg.decode_jpeg_header(data)[2]
    frame = _frame_marker(data)
    if colour_space not in ("Gray", "YCbCr"):
        return _Decoded(_eight_bit(image), False, None, f"{colour_space} JPEG converted to YCbCr")
    if frame not in (_BASELINE, _EXTENDED, _PROGRESSIVE):
        # Arithmetic-coded and lossless JPEG: libjpeg-turbo reads them, GPU decoders do not.
        return _Decoded(_eight_bit(image), False, None, "JPEG of a rare coding encoded again")
    return _Decoded(image, False, data, repair)


def _complaint(data: bytes) -> str | None:
    """What libjpeg-turbo says about a JPEG if warnings count as errors, None if nothing."""
    try:
        colour_space = simplejpeg.decode_jpeg_header(data)[2]
        target = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(colour_space, "RGB")
        _decode_strictly(data, target)
    except ValueError as error:
        return str(error)
    return None


def _decode_strictly(data: bytes, colour_space: str) -> None:
    simplejpeg.decode_jpeg(data, colour_space, strict=True)


def _load(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise _Rejected(BOMB, str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise _Rejected(unreadable_kind(data) or NO_IMAGE) from error
    except Exception as error:
        # Parsers of broken headers raise nearly anything; every kind means the same here.
        raise _Rejected(TRUNCATED, in_words(error)) from error
    try:
        image.load()
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise _Rejected(BOMB, str(error)) from error
    except Exception as error:
        raise _Rejected(TRUNCATED, in_words(error)) from error
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """The pixels as 8-bit grey or RGB, alpha dropped."""
    try:
        return eight_bit(image)
    except PixelError as error:
        raise _Rejected(error.reason, error.detail) from error


def _is_lossless(image: Image.Image, data: bytes) -> bool:
    match image.format:
        case "WEBP":
            return _webp_is_lossless(data)
        case "TIFF":
            return "jpeg" not in str(image.info.get("compression", ""))
        case "PNG" | "GIF" | "BMP" | "PPM":
            return True
        case _:
            return False


def _webp_is_lossless(data: bytes) -> bool:
    """Whether the picture is a VP8L chunk; other chunks, as profiles, may stand before it."""
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind in (b"VP8L", b"VP8 "):
            return kind == b"VP8L"
        # An animation's frames lie inside ANMF, behind 16 bytes of its own.
        position += 24 if kind == b"ANMF" else 8 + length + length % 2
    return False


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, payload) of every JPEG segment that has a payload, scans' coded data skipped."""
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            # Inside coded data, or fill bytes: on to the next 0xFF.
            position = data.find(b"\xff", position + 1)
            if position < 0:
                return
            continue
        if marker == 0xD9:
            return
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        yield marker, data[position + 4 : position + 2 + length]
        position += 2 + length


def _frame_marker(data: bytes) -> int:
    """The start-of-frame marker of a JPEG that decodes: which coding it uses."""
    frames = (0xC0, 0xC1, 0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
    return next((marker for marker, _ in _segments(data) if marker in frames), 0)


def _has_all_scans(data: bytes) -> bool:
    """Whether a JPEG's scans bring every coefficient to its last bit (JPEG standard, annex G).

    A progressive file that is cut between two scans decodes without a warning, but blurred.
    """
    missing_bits: dict[int, NDArray[np.int64]] = {}
    for marker, payload in _segments(data):
        if marker == _PROGRESSIVE:
            missing_bits = {payload[6 + 3 * i]: np.full(64, 15) for i in range(payload[5])}
        elif marker == 0xDA and missing_bits:
            count = payload[0]
            first, last, approximation = payload[1 + 2 * count : 4 + 2 * count]
            for i in range(count):
                missing_bits[payload[1 + 2 * i]][first : last + 1] = approximation & 15
    return not any(bits.any() for bits in missing_bits.values())


def _png_is_sound(data: bytes) -> bool:
    """Whether every chunk up to IEND is there with the right checksum.

    Pillow forgives a missing end and damaged optional chunks, other decoders do not.
    """
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            return False
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if kind == b"IEND":
            return True
        position = end + 4
    return False
