"""What an image file says about itself in its first bytes: kind, height, width, colour.

Opening a folder or a tar made by others asks this of every image once, so JPEG, PNG and PNM are
parsed here (microseconds, nothing decoded); Pillow answers for all other kinds.
"""

import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from headrace.shards.errors import UserError

PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,  # what Pillow's PNG reader raises for a broken file
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow is known to raise for files that are damaged, huge or no images."""

_PNM = re.compile(rb"P[1-6](?:\s+#[^\n]*\n)*\s+(\d+)(?:\s+#[^\n]*\n)*\s+(\d+)\s")
_PNM_HEADER_BYTES = 512
_STANDALONE_MARKERS = frozenset((0x01, *range(0xD0, 0xD8)))  # TEM and RSTn carry no length
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn, not DHT, JPG, DAC
_HUFFMAN_DCT_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive


class HeaderError(UserError):
    """The bytes are no image that can be read; says why, the caller says which file."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Kind and size of an image file.

    height, width: pixels as stored (EXIF rotation ignored). plain_jpeg: an 8-bit Huffman-coded grey
    or YCbCr JPEG, which every JPEG decoder turns into RGB.
    """

    kind: Literal["jpeg", "png", "pnm", "other"]
    height: int
    width: int
    plain_jpeg: bool = False


def read_header(data: bytes | memoryview) -> ImageHeader:
    """Kind and size of the image file `data`. Raises `HeaderError` if it is not one."""
    if len(data) == 0:
        raise HeaderError("the file is empty")
    start = bytes(data[:2])
    header = None
    if start == b"\xff\xd8":
        header = _jpeg(data)
    elif bytes(data[:8]) == b"\x89PNG\r\n\x1a\n" and bytes(data[12:16]) == b"IHDR":
        width, height = struct.unpack_from(">II", data, 16) if len(data) >= 24 else (0, 0)
        header = ImageHeader("png", height, width)
    elif start[:1] == b"P" and (match := _PNM.match(bytes(data[:_PNM_HEADER_BYTES]))):
        header = ImageHeader("pnm", int(match[2]), int(match[1]))
    if header is None or header.height == 0 or header.width == 0:
        header = _ask_pillow(data)
    return header


def _jpeg(data: bytes | memoryview) -> ImageHeader | None:
    """Walk the segments up to the frame header (ITU-T T.81, annex B); None if there is none.

    The colour space of three components follows from markers as libjpeg decides it: JFIF means
    YCbCr, else Adobe's transform flag, else the component ids "RGB" mean RGB.
    """
    position, end = 2, len(data)
    has_jfif, adobe_transform = False, None
    while position + 4 <= end:
        if data[position] != 0xFF:
            position += 1  # junk between segments; decoders skip it too
            continue
        marker = data[position + 1]
        if marker in (0xFF, 0x00):
            position += 1
            continue
        if marker in _STANDALONE_MARKERS:
            position += 2
            continue
        if marker in (0xD9, 0xDA):  # end of image or start of scan before any frame
            return None
        length = (data[position + 2] << 8) | data[position + 3]
        body = position + 4
        if marker in _FRAME_MARKERS and body + 6 <= end:
            precision, height, width, components = struct.unpack_from(">BHHB", data, body)
            ids = bytes(data[body + 6 : body + 6 + 3 * components : 3])
            if components == 3 and not has_jfif:
                is_rgb = adobe_transform == 0 if adobe_transform is not None else ids == b"RGB"
            else:
                is_rgb = False
            plain = (
                components in (1, 3)
                and not is_rgb
                and precision == 8
                and marker in _HUFFMAN_DCT_FRAMES
            )
            return ImageHeader("jpeg", height, width, plain)
        if marker == 0xE0 and bytes(data[body : body + 5]) == b"JFIF\0":
            has_jfif = True
        elif marker == 0xEE and length >= 14 and bytes(data[body : body + 5]) == b"Adobe":
            adobe_transform = data[body + 11] if body + 11 < end else None
        position += 2 + max(length, 2)
    return None


def _ask_pillow(data: bytes | memoryview) -> ImageHeader:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            kind = "jpeg" if image.format in ("JPEG", "MPO") else "other"
    except PILLOW_ERRORS as error:
        raise HeaderError(f"not a readable image ({error})") from error
    if height == 0 or width == 0:
        raise HeaderError(f"an image of {width} x {height} pixels")
    return ImageHeader(kind, height, width)
