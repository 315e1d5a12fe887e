"""The torch noise: bit for bit what `philox` and `noise` define, and as normal as can be told."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from headrace.pipelines import noise
from headrace.pipelines.engines.device_noise import philox, pixel_noise
from headrace.pipelines.philox import words

KEYS = [0, 1, 0xFFFFFFFF, 1 << 32, 1 << 63, (1 << 64) - 1, 0x123456789ABCDEF0]


def as_torch(keys: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(keys, np.uint64).view(np.int64))


def defined_noise(key: int, count: int) -> NDArray[np.float32]:
    """`noise`'s docstring, value by value, with the compiled Philox."""
    counters = np.zeros((count // 8 + 1, 4), np.uint32)
    counters[:, 0] = np.arange(len(counters))
    drawn = words(key, counters)
    bits = [int(drawn[v // 8, v % 8 // 2]) >> (16 * (v % 2)) & 0xFFFF for v in range(count)]
    return noise.normals(np.array(bits))


def test_philox_is_the_compiled_one() -> None:
    """Over keys and counters of which every bit is set somewhere."""
    random = np.random.default_rng(0)
    counters = random.integers(0, 1 << 32, (50, 4), dtype=np.uint32)
    counters[0], counters[1] = 0, 0xFFFFFFFF
    word_columns = torch.from_numpy(counters.astype(np.int64)).unbind(1)
    a, b, c, d = word_columns
    found = torch.stack(philox(as_torch(KEYS)[:, None], (a, b, c, d)), dim=-1)
    for key, of_key in zip(KEYS, found.numpy(), strict=True):
        np.testing.assert_array_equal(of_key, words(key, counters))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 495])
def test_noise_is_its_definition(count: int) -> None:
    found = pixel_noise(as_torch(KEYS), count)
    assert found.dtype == torch.float32
    assert found.shape == (len(KEYS), count)
    for key, of_key in zip(KEYS, found.numpy(), strict=True):
        np.testing.assert_array_equal(of_key, defined_noise(key, count))


def test_noise_is_normal_and_independent() -> None:
    """Bounds of five standard errors, on keys that differ in one bit."""
    count = 224 * 224 * 3
    found = pixel_noise(as_torch([0, 1, 2, 1 << 32, 1 << 63]), count).double()
    error = count**-0.5
    assert found.mean(dim=1).abs().max() < 5 * error
    assert (found.std(dim=1) - 1).abs().max() < 5 * error
    assert (found.pow(3).mean(dim=1)).abs().max() < 5 * 15**0.5 * error
    assert (found.pow(4).mean(dim=1) - 3).abs().max() < 5 * 96**0.5 * error
    between = torch.corrcoef(found) - torch.eye(len(found))
    assert between.abs().max() < 5 * error
    for lag in (1, 2, 3, 7, 8, 224 * 3):  # the other channel, the next pixel, block and line
        products = (found[:, lag:] * found[:, :-lag]).mean(dim=1)
        assert products.abs().max() < 5 * error
