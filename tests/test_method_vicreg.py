"""VICReg: its loss against a float64 transcription."""

import numpy as np
import pytest
import torch

from headrace.training.methods.vicreg import Objective, vicreg_loss
from tests.objective_checks import (
    Array,
    assert_same,
    differs,
    far_apart,
    float32_normal,
    numeric_gradient,
    value_and_gradient,
)
from tests.two_view_checks import (
    assert_a_collapse_is_logged,
    assert_each_view_has_batch_norm_of_its_own,
    assert_residual_blocks_start_as_identities,
    assert_takes_two_views,
    assert_views_are_those_of_barlow_twins,
)

# ---- eq. 1 to 6; vicreg main_vicreg.py, VICReg.forward


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
    at = float32_normal(np.random.default_rng(samples), samples, 2, channels)
    at = (at * scales).astype(np.float32).astype(np.float64)
    assert_same(
        lambda x: vicreg_loss(x[:, 0], x[:, 1], chosen)["loss"],
        lambda x: vicreg_oracle(x, chosen),
        at,
    )


def test_mistakes_in_vicreg_are_noticed() -> None:
    at, weights = float32_normal(np.random.default_rng(5), 6, 2, 4, scale=0.7), Objective()
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
    at, weights = float32_normal(np.random.default_rng(6), 6, 2, 4, scale=0.5), Objective()
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


def test_a_shift_of_a_channel_changes_nothing() -> None:
    """What takes the mean as constant, and does not lose digits by it."""
    at = torch.randn(16, 2, 6, generator=torch.Generator().manual_seed(0))
    shifted = at + torch.linspace(-100, 100, 6)
    losses = [vicreg_loss(x[:, 0], x[:, 1], Objective())["loss"] for x in (shifted, at)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


# ---- as the other methods of two views


def test_views_are_the_codes() -> None:
    assert_views_are_those_of_barlow_twins("vicreg")


def test_each_view_is_a_batch_of_its_own_to_batch_norm() -> None:
    assert_each_view_has_batch_norm_of_its_own("vicreg")


def test_it_takes_two_views() -> None:
    assert_takes_two_views("vicreg")


def test_a_collapse_is_logged() -> None:
    assert_a_collapse_is_logged("vicreg")


def test_residual_blocks_start_as_identities() -> None:
    assert_residual_blocks_start_as_identities("vicreg")
