"""RELIC against a float64 transcription of its equation 3.

The oracle is numpy alone and goes entry by entry. Beside the loss stand the mistakes that are
easily made, to show that the comparison would notice them.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.method import Facts
from headrace.training.methods.relic import relic_loss
from headrace.training.preset import ConfigError
from tests.objective_checks import (
    Array,
    assert_same,
    differs,
    float32_normal,
    kl,
    log_softmax,
    unit_rows,
)
from tests.tiny_methods import module_of, small_preset


def relic_oracle(
    predictions: Array,
    targets: Array,
    first: int,
    temperature: float,
    weight: float,
    *,
    constant: Array | None = None,
    other_way: bool = False,
    same_view: bool = False,
    normalized: bool = True,
) -> float:
    """predictions [n, 2, D], targets [B, 2, D]. constant: predictions that give the second
    distribution of the divergence, through which no gradient flows."""
    scale: Callable[[Array], Array] = unit_rows if normalized else lambda x: x

    def p(given: Array, sample: int, view: int) -> Array:
        other = view if same_view else 1 - view
        similar = [scale(given[sample, view]) @ scale(target) for target in targets[:, other]]
        return log_softmax(np.array(similar) / temperature)

    fixed = predictions if constant is None else constant
    total = 0.0
    for i in range(len(predictions)):
        for view in range(2):
            ours, theirs = p(predictions, i, view), p(fixed, i, 1 - view)
            if other_way:
                ours, theirs = p(fixed, i, view), p(predictions, i, 1 - view)
                total += -p(predictions, i, view)[first + i] + weight * kl(ours, theirs)
            else:
                total += -ours[first + i] + weight * kl(ours, theirs)
    return total / len(predictions)


@pytest.mark.parametrize(
    ("batch", "samples", "first", "temperature", "weight"),
    [(4, 4, 0, 0.1, 1.0), (6, 2, 3, 0.5, 0.3), (3, 1, 2, 1.0, 5.0), (5, 5, 0, 0.2, 0.0)],
)
def test_relic_loss(
    batch: int, samples: int, first: int, temperature: float, weight: float
) -> None:
    random = np.random.default_rng(batch)
    predictions, targets = (
        float32_normal(random, samples, 2, 7),
        float32_normal(random, batch, 2, 7),
    )
    options = {"temperature": temperature, "invariance_weight": weight}

    def ours(x: Tensor) -> Tensor:
        return relic_loss(x, torch.tensor(targets, dtype=torch.float32), first, **options)["loss"]

    def oracle(x: Array, **mistake: object) -> float:
        given = (x, targets, first, temperature, weight)
        return relic_oracle(*given, **{"constant": predictions, **mistake})  # pyright: ignore[reportArgumentType]

    assert_same(ours, oracle, predictions)
    value = oracle(predictions)
    assert differs(value, oracle(predictions, same_view=True))
    assert differs(value, oracle(predictions, normalized=False))
    assert differs(value, relic_oracle(predictions, targets, first, 1.3 * temperature, weight))
    if weight > 0:
        heavier = relic_oracle(predictions, targets, first, temperature, 2 * weight)
        assert differs(value, heavier)
        # A gradient through the other distribution, or through that one alone, would be another.
        for moved in ({"constant": None}, {"other_way": True}):
            with pytest.raises(AssertionError):
                assert_same(ours, lambda x, moved=moved: oracle(x, **moved), predictions)


def test_relic_takes_targets_as_constant_and_counts_partners() -> None:
    predictions = torch.eye(4)[:, None].repeat(1, 2, 1).requires_grad_()
    targets = torch.eye(4)[:, None].repeat(1, 2, 1).requires_grad_()
    outputs = relic_loss(predictions, targets, 0, temperature=0.1, invariance_weight=1.0)
    outputs["loss"].backward()
    assert targets.grad is None
    assert predictions.grad is not None
    assert outputs["partner_found"] == 1
    assert outputs["invariance"].abs() < 1e-6  # both views say the same
    shifted = relic_loss(predictions, targets.roll(1, 0), 0, temperature=0.1, invariance_weight=1.0)
    assert shifted["partner_found"] == 0


def test_other_than_two_views_are_refused() -> None:
    objective, facts = small_preset("relic").objective, Facts(10, 100, (32, 32, 16), 16, 4, 20)
    with pytest.raises(ConfigError, match="relic needs two views"):
        module_of("relic").build(objective, lambda: torch.nn.Identity(), facts)
