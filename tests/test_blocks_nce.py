"""NCE against float64 transcriptions, its noise, its banks and their Z.

The oracles go entry by entry and multiply probabilities, where the implementation adds logarithms.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.blocks.nce import (
    FeatureBank,
    estimate_log_normalizer,
    nce_loss,
    own_and_noise,
    softmax_loss,
    unit,
)
from tests.bank_checks import bank_of, nce_oracle
from tests.objective_checks import (
    Array,
    as_float32,
    assert_same,
    differs,
    log_softmax,
    tensor,
    unit_rows,
)
from tests.tiny_methods import progress_at

# ---- losses


@pytest.mark.parametrize(
    ("batch", "noise", "samples", "dim", "temperature"),
    [(3, 5, 11, 4, 0.07), (1, 1, 3, 2, 0.1), (4, 40, 20, 6, 0.5), (2, 7, 1000, 3, 0.03)],
)
def test_nce_loss(batch: int, noise: int, samples: int, dim: int, temperature: float) -> None:
    random = np.random.default_rng(samples)
    features = as_float32(random.normal(size=(batch, dim)))
    rows = random.normal(size=(samples, dim))
    rows[:batch] = features + 0.5 * rows[:batch]
    rows = as_float32(unit_rows(rows))
    numbers = random.integers(samples, size=(batch, 1 + noise))
    numbers[:, 0] = np.arange(batch)
    z = float(np.float32(2.5)) * samples
    bank = bank_of(rows)

    def ours(x: Tensor) -> Tensor:
        logits = bank.compare(unit(x), torch.tensor(numbers), temperature)
        return nce_loss(logits, torch.tensor(math.log(z)), samples)

    def oracle(x: Array, **mistake: Any) -> float:
        return nce_oracle(x, rows, numbers, temperature, z, **mistake)

    assert_same(ours, oracle, features)
    value = oracle(features)
    assert differs(value, nce_oracle(features, rows, numbers, temperature, z / samples))
    assert differs(value, nce_oracle(features, rows, numbers, 1.2 * temperature, z))
    assert differs(value, oracle(features, own_is_noise=True))
    if noise > 1:
        assert differs(value, oracle(features, averaged_noise=True))
        assert differs(value, oracle(features, share_of_one=True))


def test_nce_loss_has_the_epsilon_of_the_code() -> None:
    """Few noise rows out of many samples: there 1e-7 beside m / N is seen."""
    random = np.random.default_rng(0)
    features, rows = random.normal(size=(2, 3)), unit_rows(random.normal(size=(10**6, 3)))
    numbers = random.integers(10**6, size=(2, 9))
    logits = bank_of(rows).compare(unit(tensor(features)), torch.tensor(numbers), 0.1)
    ours = float(nce_loss(logits, torch.tensor(math.log(1e7)), 10**6))
    assert ours == pytest.approx(nce_oracle(features, rows, numbers, 0.1, 1e7), rel=1e-5)
    assert differs(ours, nce_oracle(features, rows, numbers, 0.1, 1e7, with_epsilon=False))


def test_nce_loss_outlives_small_temperatures() -> None:
    """exp(1 / 0.01) is no float32; the loss of a feature that is its own row is still right."""
    rows = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    numbers, features = np.array([[0, 1, 2, 0]]), np.array([[1.0, 0.0]])
    log_z = torch.tensor(100.0 - 1.0)
    at = tensor(features).requires_grad_()
    logits = bank_of(rows).compare(unit(at), torch.tensor(numbers), 0.01)
    assert not logits.exp().isfinite().all()
    loss = nce_loss(logits, log_z, len(rows))
    loss.backward()
    expected = nce_oracle(features, rows, numbers, 0.01, math.exp(99.0))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert at.grad is not None
    assert at.grad.isfinite().all()


def test_normalizer_is_the_mean_over_own_and_noise_rows_times_their_number() -> None:
    """lemniscate lib/NCEAverage.py: `params[2] = out.mean() * outputSize`."""
    logits = np.random.default_rng(0).normal(size=(3, 6))
    logits[:, 0] += 3
    z = np.exp(logits).mean() * 50
    assert float(estimate_log_normalizer(tensor(logits), 50).exp()) == pytest.approx(z, rel=1e-5)
    assert differs(z, np.exp(logits[:, 1:]).mean() * 50)
    large = torch.full((2, 3), 200.0)
    assert float(estimate_log_normalizer(large, 7)) == pytest.approx(200 + math.log(7))


@pytest.mark.parametrize("shape", [(1, 2), (4, 9)])
def test_softmax_loss(shape: tuple[int, int]) -> None:
    """CMC NCE/NCECriterion.py, NCESoftmaxLoss: cross-entropy with the label 0."""
    logits = as_float32(np.random.default_rng(0).normal(size=shape) * 5)

    def oracle(x: Array) -> float:
        return float(-np.mean([log_softmax(row)[0] for row in x]))

    assert_same(softmax_loss, oracle, logits)
    assert differs(oracle(logits), float(-np.mean([log_softmax(row)[1] for row in logits])))


def test_first_step_takes_its_normalizer_as_constant() -> None:
    """lemniscate lib/NCEAverage.py: `Z = params[2].item()`."""
    random = np.random.default_rng(0)
    features, rows = as_float32(random.normal(size=(3, 4))), unit_rows(random.normal(size=(9, 4)))
    bank, numbers = bank_of(rows), random.integers(9, size=(3, 6))

    def ours(x: Tensor) -> Tensor:
        logits = bank.compare(unit(x), torch.tensor(numbers), 0.3)
        return bank.loss(logits, "nce", progress_at(0))

    def z(x: Array) -> float:
        cosines = np.einsum("nkd,nd->nk", rows[numbers], unit_rows(x))
        return float(np.exp(cosines / 0.3).mean() * 9)

    constant = z(features)
    assert_same(ours, lambda x: nce_oracle(x, rows, numbers, 0.3, constant), features)
    with pytest.raises(AssertionError):
        assert_same(ours, lambda x: nce_oracle(x, rows, numbers, 0.3, z(x)), features)


# ---- noise and banks


def test_noise_is_uniform_and_of_the_step() -> None:
    ids = torch.arange(64)
    drawn = own_and_noise(ids, 500, 64, progress_at(3))
    assert torch.equal(drawn[:, 0], ids)
    counts = drawn[:, 1:].flatten().bincount(minlength=64)
    assert len(counts) == 64
    assert counts.min() > 400
    assert counts.max() < 600
    assert torch.equal(drawn, own_and_noise(ids, 500, 64, progress_at(3)))
    assert not torch.equal(drawn, own_and_noise(ids, 500, 64, progress_at(4)))


def test_bank_keeps_the_share_of_its_momentum() -> None:
    bank = FeatureBank(6, 3)
    assert not torch.allclose(bank.memory.rows.norm(dim=1), torch.ones(6))
    before, features = bank.memory.rows.clone(), unit(torch.randn(2, 3))
    bank.follow(torch.tensor([4, 1]), features, 0.8)
    for row, feature in ((4, features[0]), (1, features[1])):
        mixed = 0.8 * before[row] + 0.2 * feature
        torch.testing.assert_close(bank.memory.rows[row], mixed / mixed.norm())
    assert torch.equal(bank.memory.rows[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_bank_starts_with_rows_of_length_1_on_average() -> None:
    rows = FeatureBank(2000, 32).memory.rows
    assert float(rows.square().sum(dim=1).mean()) == pytest.approx(1, abs=0.02)
    assert float(rows.abs().max()) <= math.sqrt(3 / 32)
