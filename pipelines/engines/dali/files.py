"""What DALI is given of a file: the file, or its pixels where DALI would make others of it.

DALI decodes JPEG and 8-bit PNG as Pillow does. Of the rest it refuses some (GIF, AVIF, text PNM,
one-bit TIFF) and takes some otherwise (LAB, floats, the largest value of a PNM): those are decoded
here, by the rule of `shards.pixels`, and given as PNM.
"""

import re

import numpy as np
from numpy.typing import NDArray

from headrace.shards.pixels import PixelError, decode_rgb

_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_BIT_DEPTH = 24  # which byte says it
_PNM = re.compile(rb"P6\s\d+\s\d+\s255\s")
_START_BYTES = 64


def file_for_dali(encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [bytes]: the same file, or its RGB pixels with a PNM header.

    What cannot be decoded is given on, for DALI to refuse. Raises `PixelError` for what it would
    take, without a defined range.
    """
    start = encoded[:_START_BYTES].tobytes()
    if start.startswith(_JPEG) or _PNM.match(start):
        return encoded
    if start.startswith(_PNG) and start[_PNG_BIT_DEPTH : _PNG_BIT_DEPTH + 1] <= b"\x08":
        return encoded
    try:
        picture = decode_rgb(encoded)
    except PixelError:
        raise
    except Exception:  # Pillow's plugins raise nearly anything on damaged files
        return encoded
    header = np.frombuffer(b"P6\n%d %d\n255\n" % picture.size, np.uint8)
    return np.concatenate((header, np.asarray(picture).reshape(-1)))
