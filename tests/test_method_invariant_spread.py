"""Invariant & spreading: its loss against a float64 transcription.

The oracle goes entry by entry and multiplies probabilities, where the implementation adds
logarithms.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.methods.invariant_spread import spreading_loss
from headrace.training.preset import ConfigError
from tests.objective_checks import (
    Array,
    as_float32,
    assert_same,
    differs,
    unit_rows,
    value_and_gradient,
)
from tests.tiny_methods import build

# ---- Ye et al. 2019; Unsupervised_Embedding_Learning BatchAverage.py, BatchCriterion.forward


def spreading_oracle(
    views: Array,
    constant: Array,
    temperature: float,
    weight: float,
    *,
    partner_is_negative: bool = False,
    weighs_the_sum_alone: bool = False,
) -> float:
    """views, constant [2B, D]: first views, then second ones; `constant` is the code's `.data`."""
    x, fixed, count = unit_rows(views), unit_rows(constant), len(views)
    exponentials = np.exp(x @ fixed.T / temperature)
    total = 0.0
    for i in range(count):
        partner = (i + count // 2) % count
        p = exponentials[i]
        negatives = [j for j in range(count) if j not in (i, partner)]
        divisor = weight * sum(p[j] for j in negatives) + p[partner]
        total += math.log(p[partner] / divisor)
        spread = [*negatives, partner] if partner_is_negative else negatives
        spreading = sum(math.log(1 - p[j] / divisor) for j in spread)
        total += spreading * (1 if weighs_the_sum_alone else weight)
    return -total / count


def view_major(x: Array) -> Array:
    """[B, 2, D] -> [2B, D]."""
    return np.concatenate([x[:, 0], x[:, 1]])


@pytest.mark.parametrize(
    ("samples", "dim", "temperature", "weight"),
    [(2, 3, 0.5, 1.0), (4, 4, 0.1, 1.0), (3, 5, 0.5, 2.5), (3, 5, 1.0, 0.5)],
)
def test_spreading_loss(samples: int, dim: int, temperature: float, weight: float) -> None:
    random = np.random.default_rng(samples)
    both = random.normal(size=(samples, 1, dim)) + 0.7 * random.normal(size=(samples, 2, dim))
    embeddings = as_float32(both)
    fixed = view_major(embeddings)

    def ours(x: Tensor) -> Tensor:
        return spreading_loss(x, x, 0, temperature, weight)[0]

    def oracle(x: Array, **mistake: Any) -> float:
        return spreading_oracle(view_major(x), fixed, temperature, weight, **mistake)

    assert_same(ours, oracle, embeddings)
    value = oracle(embeddings)
    assert differs(value, oracle(embeddings, partner_is_negative=True))
    if weight != 1:
        assert differs(value, oracle(embeddings, weighs_the_sum_alone=True))
    other = 1.7 if weight == 1 else 1.0
    assert differs(value, spreading_oracle(fixed, fixed, temperature, other))


def test_spreading_loss_takes_the_compared_features_as_constant() -> None:
    embeddings = np.random.default_rng(0).normal(size=(3, 2, 4))
    _, gradient = value_and_gradient(lambda x: spreading_loss(x, x, 0, 0.5)[0], embeddings)
    _, detached = value_and_gradient(lambda x: spreading_loss(x, x.detach(), 0, 0.5)[0], embeddings)
    assert np.array_equal(gradient, detached)

    def both_sides(x: Array) -> float:
        return spreading_oracle(view_major(x), view_major(x), 0.5, 1.0)

    with pytest.raises(AssertionError):
        assert_same(lambda x: spreading_loss(x, x, 0, 0.5)[0], both_sides, embeddings)


def test_spreading_losses_of_shares_average_to_the_whole() -> None:
    x = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    whole, found = spreading_loss(x, x, 0, 0.2, 1.5)
    shares = [spreading_loss(part, x, 3 * rank, 0.2, 1.5) for rank, part in enumerate(x.chunk(2))]
    torch.testing.assert_close(torch.stack([loss for loss, _ in shares]).mean(), whole)
    first, second = (hits.view(2, 3) for _, hits in shares)
    assert torch.equal(torch.cat([first, second], dim=1).flatten(), found)


def test_spreading_loss_stays_finite_where_a_negative_is_all_there_is() -> None:
    x = torch.tensor([[[1.0, 0], [-1, 0]], [[1, 0], [-1, 0]]], requires_grad=True)
    loss, found = spreading_loss(x, x, 0, 0.01)
    loss.backward()
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not found.any()


# ---- the method


def test_an_impossible_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        build("invariant_spread", "test_resnet", negative_weight=0.0)
