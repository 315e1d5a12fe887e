"""Soft targets against timm's, and cross-entropy against a float64 transcription."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.data import mixup
from torch import Tensor

from headrace.training.blocks.targets import agreement, cross_entropy, has_label, soft_targets
from tests.objective_checks import (
    Array,
    assert_same,
    differs,
    log_softmax,
    mixed_with,
)

mixup_target: Any = mixup.mixup_target


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("weight", [0.0, 0.123, 0.5, 1.0])
def test_targets_are_timms(weight: float, smoothing: float) -> None:
    labels = torch.tensor([0, 3, 3, 2, 3, 4])
    found = soft_targets(labels, mixed_with(labels, [weight] * 6), 5, smoothing)
    assert found.dtype == torch.float32
    expected = mixup_target(labels, 5, weight, smoothing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6))


def test_each_sample_has_its_own_weight() -> None:
    labels, weights = torch.tensor([0, 1, 2, 2]), [0.25, 0.5, 1.0, 0.75]
    found = soft_targets(labels, mixed_with(labels, weights), 3)
    expected = [[0.25, 0, 0.75], [0, 0.5, 0.5], [0, 0, 1], [0.25, 0, 0.75]]
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(found, mixup_target(labels, 3, torch.tensor(weights)[:, None]))


def test_without_mixing_they_are_smoothed_labels() -> None:
    labels = torch.tensor([2, 0, -1])
    found = soft_targets(labels, None, 4, 0.2)
    expected = [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05], [0, 0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_an_unknown_class_asks_for_nothing_unless_it_has_no_part() -> None:
    labels, weights = torch.tensor([-1, -1, 1, 1, 0, 2]), [0.0, 0.5, 0.5, 0.5, 1.0, 0.3]
    mixed = mixed_with(labels, weights)
    known = [True, False, True, True, True, False]
    assert has_label(labels, mixed).tolist() == known
    found = soft_targets(labels, mixed, 3, 0.1)
    torch.testing.assert_close(found.sum(dim=1), torch.tensor(known).float())
    torch.testing.assert_close(found[0], soft_targets(labels[5:], None, 3, 0.1)[0])
    torch.testing.assert_close(found[4], soft_targets(labels[4:], None, 3, 0.1)[0])
    assert has_label(labels, None).tolist() == (labels >= 0).tolist()


def test_a_class_that_there_is_not_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        soft_targets(torch.tensor([0, 5]), None, 5)


# ---- cross-entropy with smoothed targets (Szegedy et al. 2015, section 7)


def cross_entropy_oracle(
    logits: Array, labels: NDArray[np.int64], smoothing: float, *, over_all: bool = False
) -> float:
    losses = []
    for row, label in zip(logits, labels, strict=True):
        if label >= 0:
            target = np.full(len(row), smoothing / len(row))
            target[label] += 1 - smoothing
            losses.append(-(target * log_softmax(row)).sum())
    return float(np.sum(losses) / (len(labels) if over_all else len(losses)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("labels", [[0, 2, 1], [3, -1, 0, -1, 2]])
def test_cross_entropy(labels: list[int], smoothing: float) -> None:
    random = np.random.default_rng(len(labels))
    at = random.normal(size=(len(labels), 4)).astype(np.float32).astype(np.float64)
    as_array = np.array(labels)

    def ours(x: Tensor) -> Tensor:
        return cross_entropy(x, torch.tensor(labels), smoothing=smoothing)

    assert_same(ours, lambda x: cross_entropy_oracle(x, as_array, smoothing), at)
    value = cross_entropy_oracle(at, as_array, smoothing)
    assert differs(value, cross_entropy_oracle(at, as_array, smoothing + 0.2))
    if -1 in labels:
        assert differs(value, cross_entropy_oracle(at, as_array, smoothing, over_all=True))


def test_cross_entropy_without_any_label_is_zero() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), -1))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_no_known_label_is_no_loss() -> None:
    labels = torch.full((4,), -1)
    logits = torch.randn(4, 3, requires_grad=True)
    loss = cross_entropy(logits, labels, mixed_with(labels, [0.5] * 4), smoothing=0.1)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_train_top1_is_the_share_of_the_class_that_was_predicted() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    mixed = mixed_with(labels, [0.75, 0.5, 1.0, 0.25])  # with 3, 2, 1, 0
    predicted = torch.tensor([0, 2, 1, 0])
    logits = torch.nn.functional.one_hot(predicted, 4).float()
    assert agreement(logits, labels, mixed) == 0.75 + 0.5 + 0 + 0.75
    assert agreement(logits, labels) == 1
    unknown = replace(mixed, labels=torch.tensor([3, -1, 1, -1]))
    assert agreement(logits, labels, unknown) == 0.75
    same = mixed_with(torch.tensor([2, 1, 1, 2]), [0.1, 0.2, 0.8, 0.9])
    assert agreement(logits, torch.tensor([2, 1, 1, 2]), same) == 1  # the third, whole


def test_nothing_asks_the_device() -> None:
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    mixed = mixed_with(torch.zeros(4, dtype=torch.int64), [0.5] * 4).map(lambda t: t.to("meta"))
    logits = torch.zeros(4, 3, device="meta")
    assert cross_entropy(logits, labels, mixed, smoothing=0.1).is_meta
    assert agreement(logits, labels, mixed).is_meta
