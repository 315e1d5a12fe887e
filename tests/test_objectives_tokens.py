"""Losses on class and patch tokens (iBOT, DINOv2, I-JEPA) against float64 transcriptions.

As in test_objectives.py: each oracle is numpy alone, loops entry by entry as the paper or its code
has it, and beside each stand the mistakes that the comparison would notice.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from headrace.training.blocks.koleo import koleo_loss
from headrace.training.blocks.self_distillation import (
    cross_view_entropy,
    mean_masked_logits,
    patch_loss,
    warmed_up,
)
from headrace.training.blocks.sinkhorn import sinkhorn
from headrace.training.methods.ijepa import feature_loss
from tests.objective_checks import Array, assert_same, differs, log_softmax, value_and_gradient

Mask = NDArray[np.bool_]


def distributions(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    drawn = np.exp(3 * random.normal(size=shape))
    return as_float32(drawn / drawn.sum(-1, keepdims=True))


def as_float32(values: Array) -> Array:
    """Values that float32 holds, or the inputs themselves would differ."""
    return values.astype(np.float32).astype(np.float64)


def masks(random: np.random.Generator, samples: int, places: int) -> Mask:
    """Of every size: all, none, and what is drawn."""
    drawn = random.random((samples, 2, places)) < 0.5
    drawn[0, 0], drawn[-1, 1] = True, False
    return drawn


# ---- iBOT: eq. 2; ibot main_ibot.py, iBOTLoss.forward, the terms with v == q


def patch_oracle(
    student: Array,
    targets: Array,
    masked: Mask,
    temperature: float,
    *,
    batch_wide: bool = False,
    skip_unmasked: bool = False,
) -> float:
    """student, targets [B, 2, n, K]; masked [B, 2, n]."""
    samples, views, places, _ = student.shape
    total, terms = 0.0, 0
    for view in range(views):
        per_sample = []
        for sample in range(samples):
            entropy, count = 0.0, 0
            for place in range(places):
                if masked[sample, view, place]:
                    logs = log_softmax(student[sample, view, place] / temperature)
                    entropy -= (targets[sample, view, place] * logs).sum()
                    count += 1
            per_sample.append(entropy if batch_wide else entropy / max(count, 1))
            if skip_unmasked and count == 0:
                per_sample.pop()
        total += np.sum(per_sample) / masked[:, view].sum() if batch_wide else np.mean(per_sample)
        terms += 1
    return float(total / terms)


@pytest.mark.parametrize(
    ("samples", "places", "prototypes", "temperature"),
    [(3, 4, 5, 0.1), (2, 6, 3, 0.2), (4, 1, 7, 1)],
)
def test_patch_loss(samples: int, places: int, prototypes: int, temperature: float) -> None:
    random = np.random.default_rng(samples)
    student = as_float32(random.uniform(-1, 1, (samples, 2, places, prototypes)))
    targets = distributions(random, student.shape)
    masked = masks(random, samples, places)

    def ours(x: Tensor) -> Tensor:
        return patch_loss(x, torch.tensor(targets).float(), torch.tensor(masked), temperature)

    def oracle(x: Array, **mistakes: bool) -> float:
        return patch_oracle(x, targets, masked, temperature, **mistakes)

    assert_same(ours, oracle, student)
    value = oracle(student)
    assert differs(value, oracle(student, skip_unmasked=True))
    assert differs(value, patch_oracle(student, targets, masked, 1.5 * temperature))
    assert differs(value, patch_oracle(student, targets, ~masked, temperature))
    if places > 1:
        assert differs(value, oracle(student, batch_wide=True))


def dinov2_patch_oracle(student: Array, targets: Array, masked: Mask, temperature: float) -> float:
    """dinov2 ibot_patch_loss.py, forward_masked, and its scales in ssl_meta_arch.py: masked patches
    of all views in one row, each weighted with 1 / the number in its view."""
    flat = masked.transpose(1, 0, 2).reshape(-1, masked.shape[-1])
    rows = [
        (values.transpose(1, 0, 2, 3).reshape(*flat.shape, -1)[flat])
        for values in (student, targets)
    ]
    weights = np.repeat(1 / np.maximum(flat.sum(-1), 1), flat.sum(-1))
    total = 0.0
    for logits, target, weight in zip(*rows, weights, strict=True):
        total -= weight * (target * log_softmax(logits / temperature)).sum()
    loss_scales, ibot_loss_scale = 2, 1 / 2
    return total / len(flat) * loss_scales * ibot_loss_scale


def test_dinov2_adds_the_same_patch_loss() -> None:
    random = np.random.default_rng(5)
    student = as_float32(random.uniform(-1, 1, (4, 2, 6, 5)))
    targets, masked = distributions(random, student.shape), masks(random, 4, 6)
    assert dinov2_patch_oracle(student, targets, masked, 0.1) == pytest.approx(
        patch_oracle(student, targets, masked, 0.1), rel=1e-12
    )


def test_nothing_masked_is_no_loss() -> None:
    student = torch.randn(2, 2, 3, 4, requires_grad=True)
    targets = torch.full((2, 2, 3, 4), 0.25)
    loss = patch_loss(student, targets, torch.zeros(2, 2, 3, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert not student.grad.any()


# ---- DINOv2's loss of class tokens: dinov2 ssl_meta_arch.py, forward_backward, and
# dino_clstoken_loss.py, DINOLoss.forward


def dinov2_class_oracle(
    student: Array, targets: Array, temperature: float, *, swapped: bool = True
) -> float:
    """student [V, B, K], global views first; targets [2, B, K]. Terms and scales as the code."""
    views, samples, _ = student.shape
    local_views = views - 2
    if swapped:  # "chunked and cat'd in reverse so A is matched to B"
        targets = targets[::-1]
    terms = 2 + 2 * local_views

    def loss(students: Array, teachers: Array) -> float:
        total = 0.0
        for s in students:
            for t in teachers:
                total -= np.mean(
                    [(t[row] * log_softmax(s[row] / temperature)).sum() for row in range(len(s))]
                )
        return float(total)

    local = loss(student[2:], targets) / terms if local_views else 0.0
    # Both global views in one list entry, as is the teacher's: row by row, not every pair.
    together = student[:2].reshape(1, 2 * samples, -1), targets.reshape(1, 2 * samples, -1)
    return float(local + loss(*together) * 2 / terms)


@pytest.mark.parametrize(("views", "samples", "prototypes"), [(4, 3, 5), (2, 2, 7), (10, 1, 4)])
def test_dinov2_class_loss(views: int, samples: int, prototypes: int) -> None:
    random = np.random.default_rng(views)
    student = as_float32(random.uniform(-1, 1, (views, samples, prototypes)))
    targets = distributions(random, (2, samples, prototypes))

    def ours(x: Tensor) -> Tensor:
        return cross_view_entropy(x, torch.tensor(targets).float(), 0.1)

    assert_same(ours, lambda x: dinov2_class_oracle(x, targets, 0.1), student)
    value = dinov2_class_oracle(student, targets, 0.1)
    assert differs(value, dinov2_class_oracle(student, targets, 0.1, swapped=False))


# ---- KoLeo: Sablayrolles et al. 2019, eq. 2; dinov2 koleo_loss.py


def koleo_oracle(features: Array, *, normalized: bool = True, squared: bool = False) -> float:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True) if normalized else features
    losses = []
    for row in range(len(unit)):
        others = [other for other in range(len(unit)) if other != row]
        nearest = max(others, key=lambda other: unit[row] @ unit[other])
        distance = np.sqrt(((unit[row] - unit[nearest] + 1e-8) ** 2).sum())
        losses.append(-np.log(distance ** (2 if squared else 1) + 1e-8))
    return float(np.mean(losses))


@pytest.mark.parametrize(("samples", "dim"), [(2, 3), (5, 4), (7, 2)])
def test_koleo_loss(samples: int, dim: int) -> None:
    random = np.random.default_rng(samples)
    features = as_float32(random.normal(size=(samples, dim)))
    assert_same(lambda x: koleo_loss(x, x, 0), koleo_oracle, features)
    assert differs(koleo_oracle(features), koleo_oracle(features, normalized=False))
    assert differs(koleo_oracle(features), koleo_oracle(features, squared=True))
    # A neighbour without gradient is another loss, though of the same value.
    value, gradient = value_and_gradient(lambda x: koleo_loss(x, x, 0), features)
    same, halved = value_and_gradient(lambda x: koleo_loss(x, x.detach(), 0), features)
    assert value == same
    assert np.linalg.norm(gradient - halved) > 0.1 * np.linalg.norm(gradient)


def test_koleo_of_a_share_looks_at_everyone() -> None:
    features = torch.randn(6, 3)
    shares = [
        koleo_loss(features[rows], features, rows.start) for rows in (slice(0, 2), slice(2, 6))
    ]
    weighted = (2 * shares[0] + 4 * shares[1]) / 6
    torch.testing.assert_close(weighted, koleo_loss(features, features, 0))


# ---- Sinkhorn-Knopp over masked patches: dinov2 ibot_patch_loss.py, sinkhorn_knopp_teacher


def sinkhorn_oracle(logits: Array, temperature: float, iterations: int) -> Array:
    codes = np.exp(logits / temperature).T
    prototypes, rows = codes.shape
    codes /= codes.sum()
    for _ in range(iterations):
        codes /= codes.sum(axis=1, keepdims=True)
        codes /= prototypes
        codes /= codes.sum(axis=0, keepdims=True)
        codes /= rows
    return (codes * rows).T


@pytest.mark.parametrize("temperature", [0.04, 0.07, 0.5])
def test_sinkhorn_leaves_out_padding(temperature: float) -> None:
    random = np.random.default_rng(0)
    logits = as_float32(random.uniform(-1, 1, (9, 5)))
    counted = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1], np.bool_)
    given = torch.tensor(logits).float(), torch.tensor(counted)
    ours = sinkhorn(given[0], epsilon=temperature, iterations=3, counted=given[1]).numpy()
    expected = sinkhorn_oracle(logits[counted], temperature, 3)
    np.testing.assert_allclose(ours[counted], expected, rtol=1e-4, atol=1e-6)
    whole = sinkhorn_oracle(logits, temperature, 3)[counted]
    assert np.abs(whole - expected).max() > 1e-2, "padding that counts would be noticed"


def test_sinkhorn_of_padding_alone_is_finite() -> None:
    nothing = torch.zeros(3, dtype=torch.bool)
    assert sinkhorn(torch.randn(3, 4), epsilon=0.1, iterations=3, counted=nothing).isfinite().all()


# ---- Centres and temperatures


def test_mean_of_masked_logits() -> None:
    """dinov2 ibot_patch_loss.py, reduce_center_update, of what `n_masked_patches` leaves."""
    random = np.random.default_rng(1)
    parts = [(random.normal(size=(3, 2, 4, 5)), masks(random, 3, 4)) for _ in range(2)]
    rows = np.concatenate([logits[masked] for logits, masked in parts])
    otherwise = torch.full((5,), 7.0)
    given = [(torch.tensor(logits).float(), torch.tensor(masked)) for logits, masked in parts]
    ours = mean_masked_logits(given, otherwise)
    np.testing.assert_allclose(ours.numpy(), rows.mean(axis=0), rtol=1e-5)
    nothing = [(logits, torch.zeros_like(masked)) for logits, masked in given]
    assert torch.equal(mean_masked_logits(nothing, otherwise), otherwise)


@pytest.mark.parametrize("warmup", [0, 1, 2, 30])
def test_temperatures_warm_up(warmup: int) -> None:
    """ibot main_ibot.py, iBOTLoss.__init__: np.linspace over the warm-up, then constant."""
    schedule = np.concatenate([np.linspace(0.04, 0.07, warmup), np.full(40 - warmup, 0.07)])
    ours = [warmed_up(epoch, warmup, 0.04, 0.07) for epoch in range(40)]
    np.testing.assert_allclose(ours, schedule, rtol=1e-12)


# ---- I-JEPA: section 3; ijepa train.py, loss_fn, on torch's smooth_l1_loss


def feature_oracle(
    prediction: Array, target: Array, counted: Mask, *, batch_wide: bool = False, kink: float = 1.0
) -> float:
    """[B, n, D], [B, n, D], [B, n]"""
    per_sample, places = [], []
    for sample in range(len(prediction)):
        errors = []
        for place in range(prediction.shape[1]):
            if counted[sample, place]:
                distances = np.abs(prediction[sample, place] - target[sample, place])
                small = distances < kink
                values = np.where(small, distances**2 / (2 * kink), distances - kink / 2)
                errors.append(values.mean())
        per_sample.append(np.sum(errors) if batch_wide else np.mean(errors))
        places.append(len(errors))
    return float(np.sum(per_sample) / np.sum(places) if batch_wide else np.mean(per_sample))


@pytest.mark.parametrize(("samples", "places", "dim"), [(3, 5, 4), (2, 3, 6), (4, 2, 1)])
def test_feature_loss(samples: int, places: int, dim: int) -> None:
    random = np.random.default_rng(samples)
    prediction, target = (as_float32(random.normal(size=(samples, places, dim))) for _ in range(2))
    counted = random.random((samples, places)) < 0.5
    counted[:, 0], counted[0], counted[-1, 1:] = True, True, False

    def ours(x: Tensor) -> Tensor:
        return feature_loss(x, torch.tensor(target).float(), torch.tensor(counted))

    assert_same(ours, lambda x: feature_oracle(x, target, counted), prediction)
    value = feature_oracle(prediction, target, counted)
    assert differs(value, feature_oracle(prediction, target, counted, batch_wide=True))
    assert differs(value, feature_oracle(prediction, target, counted, kink=0.5))


def test_feature_loss_of_equal_blocks_is_torch_s() -> None:
    prediction, target = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    ours = feature_loss(prediction, target, torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(ours, F.smooth_l1_loss(prediction, target))
