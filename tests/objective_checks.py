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


def float32_normal(random: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    """Normal numbers that float32 holds, or the inputs themselves would differ."""
    return as_float32(random.normal(0, scale, shape))


def as_float32(x: Array) -> Array:
    """The nearest numbers that float32 holds."""
    return x.astype(np.float32).astype(np.float64)


def tensor(x: Array) -> Tensor:
    return torch.tensor(x, dtype=torch.float32)


def unit_rows(x: Array) -> Array:
    """[..., D] with rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def far_apart(ours: NDArray[np.float32], other: Array) -> bool:
    return bool(np.linalg.norm(ours - other) > 0.05 * np.linalg.norm(other))


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))


def info_nce(query: Array, key: Array, others: list[Array], temperature: float) -> float:
    """-log(exp(q k+ / t) / sum of exp(q k / t) over the key and the others)."""
    own = np.exp(cosine(query, key) / temperature)
    return -np.log(own / (own + sum(np.exp(cosine(query, each) / temperature) for each in others)))


def batch_info_nce_oracle(
    queries: Array, keys: Array, first_row: int, temperature: float, *, own_twice: bool = False
) -> float:
    """Each query among all keys: MoCo v3, Chen et al. 2021, eq. 1; moco-v3 builder.py,
    MoCo.contrastive_loss. own_twice: the mistake of an own key that is also its negative."""
    losses = []
    for i in range(len(queries)):
        own = first_row + i
        others = [keys[j] for j in range(len(keys)) if own_twice or j != own]
        losses.append(info_nce(queries[i], keys[own], others, temperature))
    return float(np.mean(losses))


def kl(log_p: Array, log_q: Array) -> float:
    return float(sum(np.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))


def assert_targets_are_constant(
    ours: Callable[[Tensor, Tensor], Tensor], oracle: Callable[[Array, Array], float]
) -> None:
    """Both networks see the same: only the predictions may hand a gradient back to it.

    ours and oracle take predictions and targets [B, 2, D].
    """
    random = np.random.default_rng(0)
    at = float32_normal(random, 3, 2, 4)
    online, target = float32_normal(random, 4, 5), float32_normal(random, 4, 5)

    def both(x: Tensor) -> Tensor:
        return ours(x @ tensor(online), x @ tensor(target))

    assert_same(both, lambda x: oracle(x @ online, at @ target), at)
    _, gradient = value_and_gradient(both, at)
    assert far_apart(gradient, numeric_gradient(lambda x: oracle(x @ online, x @ target), at))
    assert far_apart(gradient, numeric_gradient(lambda x: oracle(at @ online, x @ target), at))


def mixed_with(labels: Tensor, weights: list[float]) -> Mixed:
    """Every sample with the one as far from the end as it is from the beginning."""
    partners = torch.arange(len(labels)).flip(0)
    return Mixed(
        partners=partners,
        labels=labels[partners],
        weights=torch.tensor(weights),
        boxes=torch.zeros(len(labels), 4, dtype=torch.int32),
    )
