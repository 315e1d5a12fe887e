"""What tests of losses stand on: float64 oracles, their gradients, and the comparison with ours."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.pipelines.batch import Mixed

Array = NDArray[np.float64]


def numeric_gradient(loss: Callable[[Array], float], at: Array, width: float = 1e-5) -> Array:
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = width
        gradient[index] = (loss(at + step) - loss(at - step)) / (2 * width)
    return gradient


def value_and_gradient(
    loss: Callable[[Tensor], Tensor], at: Array
) -> tuple[float, NDArray[np.float32]]:
    x = torch.tensor(at, dtype=torch.float32, requires_grad=True)
    value = loss(x)
    value.backward()
    assert x.grad is not None
    return float(value.detach()), x.grad.numpy()


def assert_same(
    ours: Callable[[Tensor], Tensor], oracle: Callable[[Array], float], at: Array
) -> None:
    value, gradient = value_and_gradient(ours, at)
    assert value == pytest.approx(oracle(at), rel=2e-6, abs=1e-6)
    expected = numeric_gradient(oracle, at)
    scale = np.linalg.norm(expected)
    assert scale > 1e-4, "a gradient of nothing would agree with anything"
    assert np.linalg.norm(gradient - expected) < 1e-5 * scale


def differs(ours: float, mutated: float) -> bool:
    return abs(ours - mutated) > 1e-4 * abs(ours)


def log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def as_float32(values: Array) -> Array:
    """Values that float32 holds, or the inputs themselves would differ."""
    return values.astype(np.float32).astype(np.float64)


def mixed_with(labels: Tensor, weights: list[float]) -> Mixed:
    """Every sample with the one as far from the end as it is from the beginning."""
    partners = torch.arange(len(labels)).flip(0)
    return Mixed(
        partners=partners,
        labels=labels[partners],
        weights=torch.tensor(weights),
        boxes=torch.zeros(len(labels), 4, dtype=torch.int32),
    )
