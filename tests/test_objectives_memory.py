"""Losses of pairs, banks and in-batch classes against float64 transcriptions; see objective_checks.

The oracles go entry by entry and multiply probabilities, where the implementation adds logarithms.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.pipelines.batch import Batch
from headrace.training.blocks.nce import (
    FeatureBank,
    estimate_log_normalizer,
    nce_loss,
    own_and_noise,
    softmax_loss,
    unit,
)
from headrace.training.methods.cmc import Cmc
from headrace.training.methods.invariant_spread import spreading_loss
from headrace.training.methods.npid import Npid, proximal_term
from headrace.training.methods.pair import logistic_loss, margin_loss, pair_cosines
from tests.objective_checks import Array, assert_same, differs, log_softmax, value_and_gradient
from tests.tiny_methods import SAMPLES, batch_of, build, progress_at


def float32(x: Array) -> Array:
    """Values that float32 holds, or the inputs themselves would differ."""
    return x.astype(np.float32).astype(np.float64)


def normalized(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def tensor(x: Array) -> Tensor:
    return torch.tensor(x, dtype=torch.float32)


# ---- NCE: Wu et al. 2018, eq. 4 to 8; lemniscate lib/NCEAverage.py and lib/NCECriterion.py, which
# ---- CMC NCE/NCECriterion.py repeats


def nce_oracle(
    features: Array,
    bank: Array,
    numbers: NDArray[Any],
    temperature: float,
    z: float,
    *,
    share_of_one: bool = False,
    averaged_noise: bool = False,
    own_is_noise: bool = False,
    with_epsilon: bool = True,
) -> float:
    samples, noise = len(bank), numbers.shape[1] - 1
    epsilon = 1e-7 if with_epsilon else 0.0
    share = (1 if share_of_one else noise) / samples
    total = 0.0
    for feature, row_numbers in zip(normalized(features), numbers.astype(int), strict=True):
        p = [math.exp(bank[number] @ feature / temperature) / z for number in row_numbers]
        total += math.log(p[0] / (p[0] + share + epsilon))
        others = [
            math.log(share / (each + share + epsilon)) for each in p[0 if own_is_noise else 1 :]
        ]
        total += sum(others) / (noise if averaged_noise else 1)
    return -total / len(features)


def bank_of(rows: Array) -> FeatureBank:
    bank = FeatureBank(*rows.shape)
    bank.memory.rows.copy_(tensor(rows))
    return bank


@pytest.mark.parametrize(
    ("batch", "noise", "samples", "dim", "temperature"),
    [(3, 5, 11, 4, 0.07), (1, 1, 3, 2, 0.1), (4, 40, 20, 6, 0.5), (2, 7, 1000, 3, 0.03)],
)
def test_nce_loss(batch: int, noise: int, samples: int, dim: int, temperature: float) -> None:
    random = np.random.default_rng(samples)
    features = float32(random.normal(size=(batch, dim)))
    rows = random.normal(size=(samples, dim))
    rows[:batch] = features + 0.5 * rows[:batch]
    rows = float32(normalized(rows))
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
    features, rows = random.normal(size=(2, 3)), normalized(random.normal(size=(10**6, 3)))
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
    logits = float32(np.random.default_rng(0).normal(size=shape) * 5)

    def oracle(x: Array) -> float:
        return float(-np.mean([log_softmax(row)[0] for row in x]))

    assert_same(softmax_loss, oracle, logits)
    assert differs(oracle(logits), float(-np.mean([log_softmax(row)[1] for row in logits])))


def test_first_step_takes_its_normalizer_as_constant() -> None:
    """lemniscate lib/NCEAverage.py: `Z = params[2].item()`."""
    random = np.random.default_rng(0)
    features, rows = float32(random.normal(size=(3, 4))), normalized(random.normal(size=(9, 4)))
    bank, numbers = bank_of(rows), random.integers(9, size=(3, 6))

    def ours(x: Tensor) -> Tensor:
        logits = bank.compare(unit(x), torch.tensor(numbers), 0.3)
        return bank.loss(logits, "nce", progress_at(0))

    def z(x: Array) -> float:
        cosines = np.einsum("nkd,nd->nk", rows[numbers], normalized(x))
        return float(np.exp(cosines / 0.3).mean() * 9)

    constant = z(features)
    assert_same(ours, lambda x: nce_oracle(x, rows, numbers, 0.3, constant), features)
    with pytest.raises(AssertionError):
        assert_same(ours, lambda x: nce_oracle(x, rows, numbers, 0.3, z(x)), features)


# ---- NPID


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_softmax_over_the_whole_bank(temperature: float) -> None:
    """lemniscate lib/LinearAverage.py (--nce-k 0): logits of all N rows, cross-entropy by index."""
    method = build("npid", "test_resnet", loss="softmax", negatives=0, temperature=temperature)
    assert isinstance(method, Npid)
    batch = replace(batch_of("npid", samples=4), ids=torch.tensor([3, 60, 0, 17]))
    rows = method.bank.memory.rows.double().numpy()
    features = float32(np.random.default_rng(0).normal(size=(4, rows.shape[1])))

    def ours(x: Tensor) -> Tensor:
        return method.objective({"projection": x}, batch, progress_at(0))["loss"]

    def oracle(x: Array) -> float:
        per_sample = [
            log_softmax(rows @ feature / temperature)[number]
            for feature, number in zip(normalized(x), batch.ids.tolist(), strict=True)
        ]
        return float(-np.mean(per_sample))

    assert_same(ours, oracle, features)


def test_proximal_term() -> None:
    """Eq. 9 of the paper: the squared distance to the row of the last visit."""
    random = np.random.default_rng(0)
    features, rows = (float32(random.normal(size=(3, 4))) for _ in range(2))

    def oracle(x: Array) -> float:
        pairs = zip(x, rows, strict=True)
        return float(np.mean([sum((a - b) ** 2) for a, b in pairs]))

    assert_same(lambda x: proximal_term(x, tensor(rows)), oracle, features)
    assert differs(oracle(features), oracle(features) / 4)


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
    x, fixed, count = normalized(views), normalized(constant), len(views)
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
    embeddings = float32(both)
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


# ---- pairs: Hadsell et al. 2006, eq. 4; binary cross-entropy as Koch et al. 2015, section 3.2


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
    views = float32(
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
    same = float32(random.uniform(-1, 1, 3))
    different = tensor(float32(random.uniform(-1, 1, (3, 5))))

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


# ---- CMC


@pytest.mark.parametrize("loss", ["nce", "softmax"])
def test_cmc_compares_each_side_with_the_other_sides_bank(loss: str) -> None:
    """CMC NCE/NCEAverage.py: memory_l against ab, memory_ab against l; train_CMC.py adds both."""
    method = build("cmc", "test_resnet", loss=loss)
    assert isinstance(method, Cmc)
    batch: Batch = batch_of("cmc", samples=4)
    banks = method.light_bank, method.color_bank
    for bank, log_z in zip(banks, (5.0, 4.0), strict=True):
        bank.log_normalizer.fill_(log_z)
    memory_l, memory_ab = (bank.memory.rows.double().numpy() for bank in banks)
    numbers = own_and_noise(batch.ids, method.options.negatives, SAMPLES, progress_at(2)).numpy()
    temperature, random = method.options.temperature, np.random.default_rng(0)
    light, color = (float32(random.normal(size=(4, memory_l.shape[1]))) for _ in range(2))

    def direction(x: Array, memory: Array, z: float) -> float:
        if loss == "nce":
            return nce_oracle(x, memory, numbers, temperature, z)
        logits = np.einsum("nkd,nd->nk", memory[numbers], normalized(x)) / temperature
        return float(-np.mean([log_softmax(row)[0] for row in logits]))

    def oracle(l: Array, ab: Array) -> float:  # noqa: E741
        return direction(l, memory_ab, math.exp(4.0)) + direction(ab, memory_l, math.exp(5.0))

    def ours(l: Tensor, ab: Tensor) -> Tensor:  # noqa: E741
        return method.objective({"light": l, "color": ab}, batch, progress_at(2))["loss"]

    assert_same(lambda x: ours(x, tensor(color)), lambda x: oracle(x, color), light)
    assert_same(lambda x: ours(tensor(light), x), lambda x: oracle(light, x), color)
    assert differs(oracle(light, color), oracle(color, light))
    assert differs(oracle(light, color), oracle(light, color) / 2)
