"""Pairs: both losses against float64 transcriptions, and who is paired with whom."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.training.methods.pair import Pair, logistic_loss, margin_loss, pair_cosines
from headrace.training.preset import ConfigError
from tests.objective_checks import Array, as_float32, assert_same, differs, tensor
from tests.tiny_methods import batch_of, build, progress_at, train_step

# ---- Hadsell et al. 2006, eq. 4; binary cross-entropy as Koch et al. 2015, section 3.2


def pair_oracle(
    views: Array,
    others: NDArray[Any],
    margin: float,
    *,
    squared_hinge: bool = False,
    halves: bool = True,
) -> float:
    """views [B, 2, D]; others [B, k]. Eq. 4 with Y = 0 for view 2 of the same image."""
    near, far = [], []
    for (first, _), second, rows in zip(views, views[:, 1], others.astype(int), strict=True):
        distance = np.linalg.norm(first / np.linalg.norm(first) - second / np.linalg.norm(second))
        near.append((0.5 if halves else 1) * distance**2)
        for row in rows:
            other = views[row, 1] / np.linalg.norm(views[row, 1])
            distance = np.linalg.norm(first / np.linalg.norm(first) - other)
            slack = max(0.0, margin**2 - distance**2 if squared_hinge else margin - distance)
            far.append(0.5 * (slack if squared_hinge else slack**2))
    return float(0.5 * np.mean(near) + 0.5 * np.mean(far))


@pytest.mark.parametrize(
    ("samples", "dim", "margin", "drawn"),
    [(4, 3, 1.0, False), (3, 5, 2.0, False), (5, 2, 1.5, True), (2, 4, 1.9, True)],
)
def test_margin_loss(samples: int, dim: int, margin: float, drawn: bool) -> None:
    random = np.random.default_rng(samples)
    views = as_float32(
        random.normal(size=(samples, 1, dim)) + 0.5 * random.normal(size=(samples, 2, dim))
    )
    rows = np.arange(samples)[:, None]
    others = (rows + 1 if drawn else rows + np.arange(1, samples)) % samples

    def ours(x: Tensor) -> Tensor:
        return margin_loss(*pair_cosines(x, x, torch.tensor(others)), margin)

    assert_same(ours, lambda x: pair_oracle(x, others, margin), views)
    value = pair_oracle(views, others, margin)
    assert differs(value, pair_oracle(views, others, 1.1 * margin))
    assert differs(value, pair_oracle(views, others, margin, squared_hinge=True))
    assert differs(value, pair_oracle(views, others, margin, halves=False))
    assert differs(value, pair_oracle(views, rows, margin))


def test_margin_loss_of_a_collapse_has_a_finite_gradient() -> None:
    x = torch.ones(3, 2, 4, requires_grad=True)
    loss = margin_loss(*pair_cosines(x, x, torch.tensor([[1], [2], [0]])), 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.25, abs=1e-3)
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("temperature", "bias"), [(0.1, -3.0), (1.0, 0.5), (0.05, 0.0)])
def test_logistic_loss(temperature: float, bias: float) -> None:
    random = np.random.default_rng(0)
    same = as_float32(random.uniform(-1, 1, 3))
    different = tensor(as_float32(random.uniform(-1, 1, (3, 5))))

    def probability(cosine: float) -> float:
        return 1 / (1 + math.exp(-(cosine / temperature + bias)))

    def oracle(x: Array) -> float:
        near = [-math.log(probability(cosine)) for cosine in x]
        far = [-math.log(1 - probability(cosine)) for cosine in different.flatten().tolist()]
        return float(np.mean(near) + np.mean(far)) / 2

    def ours(x: Tensor) -> Tensor:
        return logistic_loss(x, different, temperature, torch.tensor(bias))

    assert_same(ours, oracle, same)
    assert differs(oracle(same), float(ours(-tensor(same))))


# ---- the method


def test_pairs_are_with_all_others_or_with_one() -> None:
    every, one = (build("pair", "test_resnet", partners=partners) for partners in ("all", "one"))
    assert isinstance(every, Pair)
    assert isinstance(one, Pair)
    device = torch.device("cpu")
    assert [sorted(row) for row in every._others(5, progress_at(0), device).tolist()] == [
        [other for other in range(5) if other != own] for own in range(5)
    ]
    drawn = [one._others(5, progress_at(step), device).flatten().tolist() for step in range(20)]
    for partners in drawn:
        assert sorted(partners) == list(range(5))
        assert all(partner != own for own, partner in enumerate(partners))
    assert len({tuple(partners) for partners in drawn}) > 5


@pytest.mark.parametrize("partners", ["all", "one"])
def test_logistic_pairs_learn(partners: str) -> None:
    method = build("pair", "test_resnet", loss="logistic", partners=partners)
    batch = batch_of("pair", samples=8)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = [train_step(method, optimizer, [batch], progress_at(step)) for step in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_an_impossible_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="distances of unit vectors"):
        build("pair", "test_resnet", margin=2.5)
