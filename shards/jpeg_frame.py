"""The frame header of a JPEG: size, precision, coding and colours, without decoding."""

import struct
from dataclasses import dataclass

_STANDALONE_MARKERS = frozenset((0x01, *range(0xD0, 0xD8)))  # TEM and RSTn carry no length
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOFn, not DHT, JPG, DAC
_HUFFMAN_DCT_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """precision_bits: of a sample. height, width: pixels; a height of 0 means that it follows
    later. plain: 8-bit, Huffman-coded, grey or YCbCr: what every JPEG decoder turns into RGB."""

    precision_bits: int
    height: int
    width: int
    plain: bool


def find_frame(data: bytes | memoryview) -> JpegFrame | None:
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
            return JpegFrame(precision, height, width, plain)
        if marker == 0xE0 and bytes(data[body : body + 5]) == b"JFIF\0":
            has_jfif = True
        elif marker == 0xEE and length >= 14 and bytes(data[body : body + 5]) == b"Adobe":
            adobe_transform = data[body + 11] if body + 11 < end else None
        position += 2 + max(length, 2)
    return None
