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
from headrace.shards.jpeg_frame import find_frame
from headrace.shards.kinds import unreadable_kind
from headrace.shards.pixels import PixelError, in_words, require_defined_range

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
    """None where no frame header is found."""
    doubled = bytes(data[2:4]) == b"\xff\xd8"
    frame = None if doubled else find_frame(data)
    if doubled or (frame is not None and (frame.precision_bits != 8 or frame.height == 0)):
        raise HeaderError(str(unreadable_kind(data)))
    return None if frame is None else ImageHeader("jpeg", frame.height, frame.width, frame.plain)


def _ask_pillow(data: bytes | memoryview) -> ImageHeader:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            kind = "jpeg" if image.format in ("JPEG", "MPO") else "other"
            require_defined_range(image)
    except PixelError as error:
        raise HeaderError(str(error)) from error
    except PILLOW_ERRORS as error:
        words = unreadable_kind(data) or in_words(error)
        raise HeaderError(words) from error
    if height == 0 or width == 0:
        raise HeaderError(f"an image of {width} x {height} pixels")
    return ImageHeader(kind, height, width)
