"""Sizes and offsets of many pictures at once, rounded as `ops` says for one."""

import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.ops import Size, height_and_width


def resized_sizes(sizes: NDArray[np.int32], shorter: int) -> NDArray[np.int32]:
    """`ops.resized_shape` of int32 [B, 2] = height, width."""
    return (shorter * sizes.astype(np.int64) / sizes.min(axis=1, keepdims=True)).astype(np.int32)


def centered_offsets(lengths: NDArray[np.int32], size: Size) -> NDArray[np.int32]:
    """`ops.centered_offset` of int32 [B, 2] = height, width."""
    cut = np.array(height_and_width(size), np.int32)
    inside = np.rint((lengths - cut) / 2.0).astype(np.int32)
    return np.where(lengths >= cut, inside, -((cut - lengths) // 2)).astype(np.int32)
