"""How much memory a thread of the fused engine needs between the passes, and that memory.

It depends on the largest picture and view only, so that threads keep what they have.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.engines.fused.affine import BORDER
from headrace.pipelines.engines.fused.augment import HISTOGRAM, LEVELS
from headrace.pipelines.engines.fused.finish import LINES_OF_A_PAIR
from headrace.pipelines.engines.fused.program import Layout
from headrace.pipelines.engines.fused.render import Program, Scratch
from headrace.pipelines.engines.fused.resample import padded_stride, plane_length
from headrace.pipelines.engines.fused.simd import LANES, SLACK, TILE


class Room(NamedTuple):
    """Elements of each array of `Scratch`, in its order, and of a decoded picture."""

    columns: int
    half: int
    turned: int
    planes: int
    firsts: int
    counts: int
    weights: int
    line: int
    across: int
    histogram: int
    table: int
    offsets: int
    parts: int
    words: int
    picture: int


_KINDS: dict[str, type[np.generic]] = {
    "columns": np.uint8,
    "half": np.uint8,
    "turned": np.uint8,
    "planes": np.uint8,
    "firsts": np.int32,
    "counts": np.int32,
    "weights": np.float32,
    "line": np.float32,
    "across": np.float32,
    "histogram": np.int32,
    "table": np.uint8,
    "offsets": np.int64,
    "parts": np.float64,
    "words": np.uint32,
}


def room(layout: Layout, program: Program, sizes: NDArray[np.int32]) -> Room:
    """What one thread needs for any picture of a program, whose `sizes` are int32 [B, 2]."""
    height, width = sizes.astype(np.int64).T
    # Of all views together: as high as the highest, as wide as the widest.
    rows, across = (int(longest) for longest in layout.shapes.max(axis=0))
    longer = max(rows, across)
    padded = padded_stride.py_func
    lengths, fulls = (program.geometries[..., [first, first + 4]] for first in (1, 2))
    stretch = np.maximum(lengths / fulls, 1.0).max()
    taps = 2 * math.ceil(float(layout.reaches.max() * stretch)) + 1
    planes = 3 * plane_length.py_func(rows * across) + SLACK
    bordered = (longer + 2 * BORDER) ** 2
    half = longer * int(np.maximum(3 * padded(np.maximum(height, rows)), padded(3 * width)).max())
    turned = int(np.maximum(height, 3 * width).max()) * padded(longer)
    return Room(
        columns=int((3 * width * padded(height)).max()) + SLACK,
        half=max(half, planes, 3 * bordered) + SLACK,
        turned=max(turned, 4 * bordered) + SLACK,
        planes=planes,
        firsts=rows + across,
        counts=rows + across,
        weights=max((rows + across) * taps, 4 * longer + 2),
        line=max(2 * (3 * longer + SLACK), LINES_OF_A_PAIR * 3 * across),
        across=rows * across + SLACK,
        histogram=HISTOGRAM,
        table=LEVELS,
        offsets=longer + LANES,
        parts=2 * (longer + LANES),
        words=(3 * across // 8 + 2) * 4,
        picture=int((3 * height * width).max()),
    )


def allocate(room: Room) -> Scratch:
    """Memory for one thread, from the start of a cache line on."""
    return Scratch(**{name: aligned(getattr(room, name), kind) for name, kind in _KINDS.items()})


def aligned(length: int, kind: type[np.generic]) -> NDArray[Any]:
    """One-dimensional and uninitialised; a vector that crosses cache lines takes twice as long."""
    size = length * np.dtype(kind).itemsize
    block = np.empty(size + TILE, np.uint8)
    offset = -block.ctypes.data % TILE
    return block[offset : offset + size].view(kind)
