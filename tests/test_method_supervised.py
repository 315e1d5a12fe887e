"""Supervised classification: against timm on mixed samples, over ranks, and what it evaluates."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.data import mixup
from timm.loss.cross_entropy import SoftTargetCrossEntropy

from headrace.pipelines.batch import Batch, Mixed
from headrace.training.backbones import EncoderFactory
from headrace.training.blocks import classifier
from headrace.training.blocks.targets import has_label
from headrace.training.method import Facts
from headrace.training.preset import ConfigError
from tests.objective_checks import mixed_with
from tests.tiny_methods import (
    CLASSES,
    batch_of,
    build,
    module_of,
    progress_at,
    small_preset,
)

mixup_target: Any = mixup.mixup_target


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
    monkeypatch.setattr(classifier, "mean_over_ranks", lambda _: labelled / 2)
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


def test_supervised_ignores_samples_without_label() -> None:
    method, batch = build("supervised", "test_vit").eval(), batch_of("supervised")
    labels = batch.labels.clone()
    labels[10:] = -1
    partly = method(replace(batch, labels=labels), progress_at(0))[0]["loss"]
    first = replace(batch, views=(batch.views[0][:10],), labels=labels[:10], ids=batch.ids[:10])
    torch.testing.assert_close(partly, method(first, progress_at(0))[0]["loss"])
    nothing = method(replace(batch, labels=labels.fill_(-1)), progress_at(0))[0]["loss"]
    assert nothing == 0


def test_supervised_evaluates_the_labelled_samples() -> None:
    method, batch = build("supervised", "test_resnet").eval(), batch_of("supervised")
    with torch.no_grad():
        order = method.embed(batch, progress_at(0))["logits"].argsort(dim=1, descending=True)
    labels = torch.stack([order[row, row % CLASSES] for row in range(16)])
    labels[3] = -1
    results = method.evaluate(replace(batch, labels=labels))
    ranks = [row for row in range(16) if row != 3]
    assert results["top1"].tolist() == [rank == 0 for rank in ranks]
    assert results["top5"].tolist() == [rank < 5 for rank in ranks]


def test_supervised_says_what_it_needs() -> None:
    module, objective = module_of("supervised"), small_preset("supervised").objective
    factory = EncoderFactory("test_resnet", {})
    with pytest.raises(ConfigError, match="needs labels"):
        module.build(objective, factory, Facts(0, 64, (32,), 16, 4, 20))
    with pytest.raises(ConfigError, match="one view"):
        module.build(objective, factory, Facts(9, 64, (32, 32), 16, 4, 20))


def test_supervised_decays_everything_where_asked() -> None:
    method = build("supervised", "test_resnet", decay_everything=True)
    assert [group["decay"] for group in method.param_groups()] == [True]
    method = build("supervised", "test_resnet", decay_everything=False)
    assert [group["decay"] for group in method.param_groups()] == [True, False]
