"""NPID: its losses against float64 transcriptions, and the Z of its bank."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.blocks.nce import own_and_noise, unit
from headrace.training.methods.npid import Npid, proximal_term
from headrace.training.preset import ConfigError
from tests.bank_checks import assert_normalizer_is_that_of_the_first_batch, normalizers
from tests.objective_checks import (
    Array,
    as_float32,
    assert_same,
    differs,
    log_softmax,
    tensor,
    unit_rows,
)
from tests.tiny_methods import SAMPLES, batch_of, build, progress_at, sgd, train_step


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_softmax_over_the_whole_bank(temperature: float) -> None:
    """lemniscate lib/LinearAverage.py (--nce-k 0): logits of all N rows, cross-entropy by index."""
    method = build("npid", "test_resnet", loss="softmax", negatives=0, temperature=temperature)
    assert isinstance(method, Npid)
    batch = replace(batch_of("npid", samples=4), ids=torch.tensor([3, 60, 0, 17]))
    rows = method.bank.memory.rows.double().numpy()
    features = as_float32(np.random.default_rng(0).normal(size=(4, rows.shape[1])))

    def ours(x: Tensor) -> Tensor:
        return method.objective({"projection": x}, batch, progress_at(0))["loss"]

    def oracle(x: Array) -> float:
        per_sample = [
            log_softmax(rows @ feature / temperature)[number]
            for feature, number in zip(unit_rows(x), batch.ids.tolist(), strict=True)
        ]
        return float(-np.mean(per_sample))

    assert_same(ours, oracle, features)


def test_proximal_term() -> None:
    """Eq. 9 of the paper: the squared distance to the row of the last visit."""
    random = np.random.default_rng(0)
    features, rows = (as_float32(random.normal(size=(3, 4))) for _ in range(2))

    def oracle(x: Array) -> float:
        pairs = zip(x, rows, strict=True)
        return float(np.mean([sum((a - b) ** 2) for a, b in pairs]))

    assert_same(lambda x: proximal_term(x, tensor(rows)), oracle, features)
    assert differs(oracle(features), oracle(features) / 4)


def test_normalizer_is_that_of_the_first_batch_for_ever() -> None:
    assert_normalizer_is_that_of_the_first_batch("npid", count=1)


def test_first_step_estimates_from_its_own_logits() -> None:
    method, batch = build("npid", "test_resnet"), batch_of("npid")
    assert isinstance(method, Npid)
    features = unit(method.embed(batch, progress_at(0))["projection"].detach())
    rows = method.bank.memory.rows.clone()
    numbers = own_and_noise(batch.ids, method.options.negatives, SAMPLES, progress_at(0))
    cosines = np.einsum("nkd,nd->nk", rows[numbers].double().numpy(), features.double().numpy())
    z = np.exp(cosines / method.options.temperature).mean() * SAMPLES
    train_step(method, sgd(method), [batch], progress_at(0))
    assert float(method.bank.log_normalizer) == pytest.approx(math.log(z), rel=1e-5)


def test_state_of_a_softmax_needs_no_normalizer() -> None:
    method = build("npid", "test_resnet", loss="softmax")
    train_step(method, sgd(method), [batch_of("npid")], progress_at(0))
    assert [float(value) for value in normalizers(method).values()] == [0.0]


def test_proximal_term_is_added_with_its_weight() -> None:
    batch, losses = batch_of("npid"), []
    for weight in (0.0, 1.0, 3.0):
        method = build("npid", "test_resnet", proximal_weight=weight)
        losses.append(float(method(batch, progress_at(1))[0]["loss"].detach()))
    assert losses[1] > losses[0]
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)


def test_an_impossible_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="npid's nce loss needs at least 1"):
        build("npid", "test_resnet", negatives=0)
