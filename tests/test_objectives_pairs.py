"""BYOL, SimSiam, Barlow Twins and VICReg against float64 transcriptions of their equations.

Value and gradient, the latter by central differences. Each oracle is numpy, entry by entry; its
keyword arguments are the mistakes that are easily made, to show that they would be noticed.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.training.blocks.cosine import spread
from headrace.training.methods.barlow_twins import barlow_twins_loss, cross_correlation
from headrace.training.methods.byol import byol_loss
from headrace.training.methods.simsiam import simsiam_loss
from headrace.training.methods.vicreg import Objective, vicreg_loss
from tests.objective_checks import (
    Array,
    assert_same,
    differs,
    numeric_gradient,
    value_and_gradient,
)


def floats(random: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    """Normal numbers that float32 holds exactly."""
    return random.normal(0, scale, shape).astype(np.float32).astype(np.float64)


def tensor(values: Array) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def far_apart(ours: NDArray[np.float32], other: Array) -> bool:
    return bool(np.linalg.norm(ours - other) > 0.05 * np.linalg.norm(other))


# ---- BYOL: eq. 2; byol helpers.py, regression_loss, and byol_experiment.py, loss_fn
# ---- SimSiam: eq. 1 to 4; simsiam main_simsiam.py, train


def byol_oracle(
    predictions: Array,
    targets: Array,
    *,
    same_view: bool = False,
    one_direction: bool = False,
    normalized: bool = True,
) -> float:
    per_sample = []
    for q, z in zip(predictions, targets, strict=True):
        total = 0.0
        for view in range(1 if one_direction else 2):
            one, other = q[view], z[view if same_view else 1 - view]
            if normalized:
                one, other = one / np.sqrt(one @ one), other / np.sqrt(other @ other)
            total += sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
        per_sample.append(total)
    return float(np.mean(per_sample))


def simsiam_oracle(
    predictions: Array, targets: Array, *, same_view: bool = False, halved: bool = True
) -> float:
    def distance(p: Array, z: Array) -> float:
        return -float(p @ z / (np.linalg.norm(p) * np.linalg.norm(z)))

    total = 0.0
    for (p_1, p_2), (z_1, z_2) in zip(predictions, targets, strict=True):
        if same_view:
            z_1, z_2 = z_2, z_1
        total += (0.5 if halved else 1.0) * (distance(p_1, z_2) + distance(p_2, z_1))
    return total / len(predictions)


Ours = Callable[[Tensor, Tensor], Tensor]
Oracle = Callable[[Array, Array], float]


@pytest.mark.parametrize(
    ("ours", "oracle"), [(byol_loss, byol_oracle), (simsiam_loss, simsiam_oracle)]
)
@pytest.mark.parametrize(("samples", "dim", "scale"), [(1, 3, 1.0), (4, 5, 10.0), (3, 16, 0.1)])
def test_pairs_of_views_by_cosine(
    ours: Ours, oracle: Oracle, samples: int, dim: int, scale: float
) -> None:
    random = np.random.default_rng(dim)
    predictions, targets = (floats(random, samples, 2, dim, scale=scale) for _ in range(2))
    assert_same(lambda x: ours(x, tensor(targets)), lambda x: oracle(x, targets), predictions)


@pytest.mark.parametrize(
    ("ours", "oracle"), [(byol_loss, byol_oracle), (simsiam_loss, simsiam_oracle)]
)
def test_a_stop_gradient_elsewhere_is_noticed(ours: Ours, oracle: Oracle) -> None:
    """Both networks see the same: only the predictions may hand a gradient back to it."""
    random = np.random.default_rng(0)
    at = floats(random, 3, 2, 4)
    online, target = floats(random, 4, 5), floats(random, 4, 5)

    def both(x: Tensor) -> Tensor:
        return ours(x @ tensor(online), x @ tensor(target))

    assert_same(both, lambda x: oracle(x @ online, at @ target), at)
    _, gradient = value_and_gradient(both, at)
    assert far_apart(gradient, numeric_gradient(lambda x: oracle(x @ online, x @ target), at))
    assert far_apart(gradient, numeric_gradient(lambda x: oracle(at @ online, x @ target), at))


def test_mistakes_in_pairs_are_noticed() -> None:
    random = np.random.default_rng(1)
    q, z = floats(random, 4, 2, 6), floats(random, 4, 2, 6)
    value = byol_oracle(q, z)
    assert differs(value, byol_oracle(q, z, same_view=True))
    assert differs(value, byol_oracle(q, z, one_direction=True))
    assert differs(value, byol_oracle(q, z, normalized=False))
    value = simsiam_oracle(q, z)
    assert differs(value, simsiam_oracle(q, z, same_view=True))
    assert differs(value, simsiam_oracle(q, z, halved=False))


def test_the_scales_of_the_losses() -> None:
    """BYOL's is 0 to 8, SimSiam's -1 to 1; equal and opposite directions are the ends."""
    x = torch.randn(5, 1, 7).expand(5, 2, 7)
    for ours, best, worst in [(byol_loss, 0.0, 8.0), (simsiam_loss, -1.0, 1.0)]:
        assert float(ours(x, 3 * x)) == pytest.approx(best, abs=1e-5)
        assert float(ours(x, -3 * x)) == pytest.approx(worst, abs=1e-5)


# ---- Barlow Twins: eq. 1 and 2; barlowtwins main.py, BarlowTwins.forward


def barlow_oracle(
    views: Array,
    weight: float,
    *,
    frozen: Array | None = None,
    ddof: int = 0,
    centered: bool = True,
    epsilon: float = 1e-5,
    whole: bool = False,
) -> float:
    """views [B, 2, D]. frozen: where the standard deviations are taken from instead."""
    samples, _, channels = views.shape
    measured = views if frozen is None else frozen
    z = np.empty_like(views)
    for view in range(2):
        for i in range(channels):
            column = views[:, view, i]
            mean = column.mean() if centered else 0.0
            own = measured[:, view, i]
            variance = ((own - (own.mean() if centered else 0.0)) ** 2).sum() / (samples - ddof)
            z[:, view, i] = (column - mean) / np.sqrt(variance + epsilon)
    loss = 0.0
    for i in range(channels):
        for j in range(channels):
            c = sum(z[b, 0, i] * z[b, 1, j] for b in range(samples)) / samples
            if i == j:
                loss += (1 - c) ** 2
            if i != j or whole:
                loss += weight * c**2
    return loss


def barlow(views: Tensor, weight: float) -> Tensor:
    return barlow_twins_loss(cross_correlation(views[:, 0], views[:, 1]), weight)


# Powers of two, by which float32 loses nothing; the smallest makes the added 1e-5 count.
@pytest.mark.parametrize(
    ("samples", "channels", "weight", "scale"),
    [(4, 3, 0.0051, 1.0), (8, 5, 0.5, 1 / 128), (3, 6, 0.1, 16.0)],
)
def test_barlow_twins_loss(samples: int, channels: int, weight: float, scale: float) -> None:
    at = floats(np.random.default_rng(samples), samples, 2, channels)
    assert_same(lambda x: barlow(scale * x, weight), lambda x: barlow_oracle(scale * x, weight), at)
    at *= scale
    value = barlow_oracle(at, weight)
    assert differs(value, barlow_oracle(at, weight, ddof=1))
    assert differs(value, barlow_oracle(at, weight, centered=False))
    assert differs(value, barlow_oracle(at, weight, whole=True))
    assert differs(value, barlow_oracle(at, 1.5 * weight))
    if scale < 1:
        assert differs(value, barlow_oracle(at, weight, epsilon=0.0))


def test_barlow_twins_normaliser_carries_gradient() -> None:
    """A constant standard deviation has the same value and another gradient; so has one view."""
    at = floats(np.random.default_rng(3), 5, 2, 4)
    value, gradient = value_and_gradient(lambda x: barlow(x, 0.2), at)
    assert value == pytest.approx(barlow_oracle(at, 0.2, frozen=at), rel=1e-5)
    moved = numeric_gradient(lambda x: barlow_oracle(x, 0.2, frozen=at), at)
    assert far_apart(gradient, moved)

    def one_sided(x: Array) -> float:
        return barlow_oracle(np.stack([x[:, 0], at[:, 1]], axis=1), 0.2)

    assert far_apart(gradient, numeric_gradient(one_sided, at))


def test_a_shift_of_a_channel_changes_nothing() -> None:
    """What takes the mean as constant, and does not lose digits by it."""
    at = torch.randn(16, 2, 6, generator=torch.Generator().manual_seed(0))
    shifted = at + torch.linspace(-100, 100, 6)
    for loss in (
        lambda x: barlow(x, 0.1),
        lambda x: vicreg_loss(x[:, 0], x[:, 1], Objective())["loss"],
    ):
        torch.testing.assert_close(loss(shifted), loss(at), rtol=1e-4, atol=0)


# ---- VICReg: eq. 1 to 6; vicreg main_vicreg.py, VICReg.forward


def vicreg_oracle(
    views: Array,
    weights: Objective,
    *,
    frozen: Array | None = None,
    variance_ddof: int = 1,
    covariance_ddof: int = 1,
    epsilon: float = 1e-4,
    variances_averaged: bool = True,
    per_channel: bool = True,
    invariance_per_channel: bool = True,
    whole: bool = False,
) -> float:
    """views [B, 2, D]. frozen: where the standard deviations are taken from instead."""
    samples, _, channels = views.shape
    difference = ((views[:, 0] - views[:, 1]) ** 2).sum() / samples
    invariance = difference / channels if invariance_per_channel else difference
    variance = covariance = 0.0
    measured = views if frozen is None else frozen
    for view in range(2):
        for i in range(channels):
            deviation = np.sqrt(measured[:, view, i].var(ddof=variance_ddof) + epsilon)
            variance += max(0.0, 1 - deviation) / channels / (2 if variances_averaged else 1)
        centered = [views[b, view] - views[:, view].mean(axis=0) for b in range(samples)]
        for i in range(channels):
            for j in range(channels):
                if i != j or whole:
                    c = sum(row[i] * row[j] for row in centered) / (samples - covariance_ddof)
                    covariance += c**2 / (channels if per_channel else 1)
    return float(
        weights.invariance_weight * invariance
        + weights.variance_weight * variance
        + weights.covariance_weight * covariance
    )


WEIGHTS = [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("samples", "channels"), [(4, 3), (8, 5)])
def test_vicreg_loss(samples: int, channels: int, weights: tuple[float, float, float]) -> None:
    chosen = Objective(
        invariance_weight=weights[0], variance_weight=weights[1], covariance_weight=weights[2]
    )
    # Channels on both sides of the hinge.
    scales = np.linspace(0.2, 2.0, channels).astype(np.float32)
    at = floats(np.random.default_rng(samples), samples, 2, channels)
    at = (at * scales).astype(np.float32).astype(np.float64)
    assert_same(
        lambda x: vicreg_loss(x[:, 0], x[:, 1], chosen)["loss"],
        lambda x: vicreg_oracle(x, chosen),
        at,
    )


def test_mistakes_in_vicreg_are_noticed() -> None:
    at, weights = floats(np.random.default_rng(5), 6, 2, 4, scale=0.7), Objective()
    value = vicreg_oracle(at, weights)
    assert differs(value, vicreg_oracle(at, weights, variance_ddof=0))
    assert differs(value, vicreg_oracle(at, weights, covariance_ddof=0))
    assert differs(value, vicreg_oracle(at, weights, variances_averaged=False))
    assert differs(value, vicreg_oracle(at, weights, per_channel=False))
    assert differs(value, vicreg_oracle(at, weights, invariance_per_channel=False))
    assert differs(value, vicreg_oracle(at, weights, whole=True))
    small = 0.1 * at
    assert differs(vicreg_oracle(small, weights), vicreg_oracle(small, weights, epsilon=0.0))


def test_vicreg_deviations_carry_gradient() -> None:
    """The same value and another gradient: a constant deviation, and one view held constant."""
    at, weights = floats(np.random.default_rng(6), 6, 2, 4, scale=0.5), Objective()
    _, gradient = value_and_gradient(lambda x: vicreg_loss(x[:, 0], x[:, 1], weights)["loss"], at)
    frozen = numeric_gradient(lambda x: vicreg_oracle(x, weights, frozen=at), at)
    assert far_apart(gradient, frozen)

    def one_sided(x: Array) -> float:
        return vicreg_oracle(np.stack([x[:, 0], at[:, 1]], axis=1), weights)

    assert far_apart(gradient, numeric_gradient(one_sided, at))


def test_vicreg_says_what_its_loss_is_made_of() -> None:
    x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(2))
    seen = vicreg_loss(x[:, 0], x[:, 1], Objective(25, 10, 2, 3.0, 5.0, 7.0))
    terms = 3 * seen["invariance"] + 5 * seen["variance"] + 7 * seen["covariance"]
    torch.testing.assert_close(seen["loss"], terms)


# ---- The sign of a collapse


def test_spread_is_0_for_a_constant_and_1_for_directions_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    constant = torch.randn(1, 2, 64, generator=generator)
    lengths = 1 + torch.rand(256, 1, 1, generator=generator)
    assert float(spread(constant * lengths)) == pytest.approx(0, abs=1e-4)
    everywhere = torch.randn(256, 2, 64, generator=generator)
    assert float(spread(everywhere)) == pytest.approx(1, abs=0.02)
    assert 0.05 < float(spread(constant + 0.1 * everywhere)) < 0.2
