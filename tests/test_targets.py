"""Soft targets against timm's, and the supervised objective on mixed samples."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.data import mixup
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor

from headrace.pipelines.batch import Batch, Mixed
from headrace.training.blocks.targets import agreement, cross_entropy, has_label, soft_targets
from headrace.training.methods import supervised
from tests.tiny_methods import CLASSES, batch_of, build, progress_at

mixup_target: Any = mixup.mixup_target


def mixed_with(labels: Tensor, weights: list[float]) -> Mixed:
    """Every sample with the one as far from the end as it is from the beginning."""
    partners = torch.arange(len(labels)).flip(0)
    return Mixed(
        partners=partners,
        labels=labels[partners],
        weights=torch.tensor(weights),
        boxes=torch.zeros(len(labels), 4, dtype=torch.int32),
    )


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


# ---- the objective


def mixed_batch(weights: list[float]) -> Batch:
    batch = batch_of("supervised")
    return replace(batch, mixed=mixed_with(batch.labels, weights))


WEIGHTS = [round(0.9 - 0.05 * row, 2) for row in range(16)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_timms(smoothing: float) -> None:
    method = build("supervised", "test_vit", label_smoothing=smoothing).eval()
    batch = mixed_batch(WEIGHTS)
    outputs, embeddings = method(batch, progress_at(0))
    targets = mixup_target(batch.labels, CLASSES, torch.tensor(WEIGHTS)[:, None], smoothing)
    expected = SoftTargetCrossEntropy()(embeddings["logits"], targets)
    torch.testing.assert_close(outputs["loss"], expected)
    plain, _ = method(replace(batch, mixed=None), progress_at(0))
    assert not torch.allclose(plain["loss"], expected)
    unmixed, _ = method(mixed_batch([1.0] * 16), progress_at(0))
    torch.testing.assert_close(unmixed["loss"], plain["loss"])
    assert unmixed["train_top1"] == plain["train_top1"]


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


def test_the_mean_over_ranks_is_the_global_batchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ranks have different numbers of labelled samples: loss, accuracy and gradient."""
    method = build("supervised", "test_vit").eval()
    whole = mixed_batch([0.7] * 16)
    labels = whole.labels.clone()
    labels[[1, 2, 4, 5, 12]] = -1
    partners = torch.cat([torch.arange(8).flip(0), torch.arange(8, 16).flip(0)])  # groups of 8
    mixed = Mixed(
        partners, labels[partners], torch.full((16,), 0.7), torch.zeros(16, 4, dtype=torch.int32)
    )
    whole = replace(whole, labels=labels, mixed=mixed)
    outputs, _ = method(whole, progress_at(0))
    outputs["loss"].backward()
    gradients = {
        name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None
    }
    method.zero_grad()

    labelled = has_label(labels, mixed).sum().float()
    monkeypatch.setattr(supervised, "mean_over_ranks", lambda _: labelled / 2)
    shares = []
    for rows in (slice(0, 8), slice(8, 16)):
        own = replace(
            whole,
            views=(whole.views[0][rows],),
            labels=labels[rows],
            ids=whole.ids[rows],
            mixed=Mixed(
                mixed.partners[rows] - rows.start,
                mixed.labels[rows],
                mixed.weights[rows],
                mixed.boxes[rows],
            ),
        )
        share, _ = method(own, progress_at(0))
        (share["loss"] / 2).backward()
        shares.append(share)
    counts = [int(has_label(labels, mixed)[rows].sum()) for rows in (slice(0, 8), slice(8, 16))]
    assert counts[0] != counts[1]
    for name in ("loss", "train_top1"):
        mean = torch.stack([share[name] for share in shares]).mean()
        torch.testing.assert_close(mean, outputs[name])
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_no_known_label_is_no_loss() -> None:
    labels = torch.full((4,), -1)
    logits = torch.randn(4, 3, requires_grad=True)
    loss = cross_entropy(logits, labels, mixed_with(labels, [0.5] * 4), smoothing=0.1)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_nothing_asks_the_device() -> None:
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    mixed = mixed_with(torch.zeros(4, dtype=torch.int64), [0.5] * 4).map(lambda t: t.to("meta"))
    logits = torch.zeros(4, 3, device="meta")
    assert cross_entropy(logits, labels, mixed, smoothing=0.1).is_meta
    assert agreement(logits, labels, mixed).is_meta
