"""A reader of MATLAB 5 files, as far as ImageNet's meta.mat needs it.

The devkit's map from ILSVRC2012_IDs to WordNet ids exists only in this format, and SciPy would be a
large dependency for one table. Structs, strings and real numbers are read; the rest is refused.
Layout: "MAT-File Format", MathWorks, the chapter on level 5.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_HEADER_BYTES = 128
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {
    1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8",
    12: "<i8", 13: "<u8",
}  # fmt: skip
_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}
_CELL_CLASS, _STRUCT_CLASS, _CHAR_CLASS = 1, 2, 4
_NUMBER_CLASSES = range(6, 16)
_COMPLEX = 0x08


def read_matlab(data: bytes) -> dict[str, Any]:
    """Variables by name: a struct array as a list of dicts, a string as str, numbers as 1-D arrays.

    Column-major order. Raises ValueError if the data are damaged or hold anything else.
    """
    if len(data) < _HEADER_BYTES or data[126:128] != b"IM":
        raise ValueError("not a little-endian MATLAB 5 file")
    variables: dict[str, Any] = {}
    try:
        for kind, payload in _elements(data[_HEADER_BYTES:]):
            if kind == _COMPRESSED:
                ((kind, payload),) = _elements(zlib.decompress(payload))
            if kind != _MATRIX:
                raise ValueError(f"element of type {kind} where a variable was expected")
            name, value = _matrix(payload)
            variables[name] = value
    except (struct.error, zlib.error, StopIteration, KeyError, IndexError) as error:
        raise ValueError(f"damaged MATLAB file ({error!r})") from error
    return variables


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of the data elements that follow each other in `data`."""
    position = 0
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<II", data, position)
        if kind >> 16:
            # The small format: length and type share the first word, up to 4 bytes the second.
            yield kind & 0xFFFF, data[position + 4 : position + 4 + (kind >> 16)]
            position += 8
            continue
        start = position + 8
        if start + length > len(data):
            raise ValueError("damaged MATLAB file (an element is longer than the file)")
        yield kind, data[start : start + length]
        position = start + (length if kind == _COMPRESSED else -(-length // 8) * 8)


def _matrix(data: bytes) -> tuple[str, Any]:
    if not data:
        return "", np.zeros(0)
    elements = _elements(data)
    flags = struct.unpack_from("<I", next(elements)[1])[0]
    count = int(np.prod(np.frombuffer(next(elements)[1], "<i4")))
    name = next(elements)[1].decode("latin-1")
    array_class = flags & 0xFF
    if array_class == _STRUCT_CLASS:
        name_bytes = struct.unpack("<i", next(elements)[1])[0]
        packed = next(elements)[1]
        fields = [
            packed[start : start + name_bytes].split(b"\0")[0].decode("latin-1")
            for start in range(0, len(packed), name_bytes)
        ]
        return name, [
            {field: _matrix(next(elements)[1])[1] for field in fields} for _ in range(count)
        ]
    if array_class == _CELL_CLASS:
        return name, [_matrix(next(elements)[1])[1] for _ in range(count)]
    kind, payload = next(elements) if count else (0, b"")
    if array_class == _CHAR_CLASS:
        return name, payload.decode(_ENCODINGS[kind]) if count else ""
    if array_class in _NUMBER_CLASSES and not flags >> 8 & _COMPLEX:
        return name, np.frombuffer(payload, _NUMBERS[kind]) if count else np.zeros(0)
    raise ValueError(f"array {name!r} is of a class that is not read here ({array_class})")
