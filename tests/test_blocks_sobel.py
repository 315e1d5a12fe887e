"""Edges against the convolutions of DeepCluster's code, entry by entry."""

import numpy as np
import torch

from headrace.training.blocks.sobel import Sobel
from tests.objective_checks import Array


def normal(*shape: int, seed: int = 0) -> Array:
    """Such as float32 holds."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


def test_sobel_is_the_codes_two_convolutions() -> None:
    """deepcluster `models/alexnet.py`, rows 35 to 47, entry by entry."""
    pictures = normal(2, 3, 5, 6)
    kernel = [[1, 0, -1], [2, 0, -2], [1, 0, -1]]
    expected = np.zeros((2, 2, 5, 6))
    for sample, y, x, i, j in np.ndindex(2, 5, 6, 3, 3):
        row, column = y + i - 1, x + j - 1
        if 0 <= row < 5 and 0 <= column < 6:
            gray = pictures[sample, :, row, column].mean()
            expected[sample, 0, y, x] += kernel[i][j] * gray
            expected[sample, 1, y, x] += kernel[j][i] * gray
    edges = Sobel()(torch.tensor(pictures).float())
    np.testing.assert_allclose(edges.numpy(), expected, atol=1e-5)
