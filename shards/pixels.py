"""The one rule by which any picture becomes 8-bit RGB, for conversion and for every engine.

8-bit pictures are what Pillow's `convert("RGB")` gives: grey is repeated, palettes are looked up,
CMYK, YCbCr and LAB are computed, alpha is dropped and EXIF rotation ignored. Of 16 bits the high
byte is taken, as Pillow itself does for colour (for grey, `convert` would clip at 255). Pixels of
32 bits, whole numbers or floats, have no agreed range and are refused.
"""

import re
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from headrace.shards.errors import UserError

UNDEFINED_RANGE = "32-bit pixels, whose range is undefined"
NO_IMAGE = "not an image, or of no known format"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class PixelError(UserError):
    """A picture that is not turned into 8-bit RGB. reason: why, detail: what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


def require_defined_range(image: Image.Image) -> None:
    """Raises `PixelError` for 32-bit pixels, which may be asked before anything is decoded."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):
        raise PixelError(UNDEFINED_RANGE, f"mode {image.mode}")


def eight_bit(image: Image.Image) -> Image.Image:
    """The pixels as 8-bit grey (mode L) or RGB, alpha dropped. Raises `PixelError`."""
    require_defined_range(image)
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    if mode == "I" or mode.startswith("I;16"):
        # Pillow reads 16-bit PGM, and in older versions PNG, as mode I.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    try:
        return image.convert("L" if mode in ("1", "LA") else "RGB")
    except (ValueError, OSError) as error:
        raise PixelError(NO_IMAGE, f"mode {mode}: {error}") from error


def decode_rgb(encoded: NDArray[np.uint8]) -> Image.Image:
    """The RGB picture in an encoded file, uint8 [bytes].

    Raises `PixelError`, or what Pillow raises where the file is damaged, cut off or no picture.
    """
    with Image.open(BytesIO(encoded.data)) as file:
        return eight_bit(file).convert("RGB")


def in_words(error: Exception) -> str:
    """What a decoder said, for a person: no buffer's address in it."""
    if isinstance(error, UnidentifiedImageError):
        return NO_IMAGE
    if isinstance(error, PixelError):
        return str(error)
    return _ADDRESS.sub("", f"{type(error).__name__}: {error}")
