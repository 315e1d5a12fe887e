"""Sizes and offsets of many pictures at once, rounded as `ops` says for one."""

import numpy as np
from numpy.typing import NDArray


def resized_sizes(sizes: NDArray[np.int32], shorter: int) -> NDArray[np.int32]:
    """`ops.resized_shape` of int32 [B, 2] = height, width."""
    return (shorter * sizes.astype(np.int64) / sizes.min(axis=1, keepdims=True)).astype(np.int32)


def centered_offsets(lengths: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    """`ops.centered_offset` of lengths of any shape."""
    inside = np.rint((lengths - size) / 2.0).astype(np.int32)
    return np.where(lengths >= size, inside, -((size - lengths) // 2)).astype(np.int32)
