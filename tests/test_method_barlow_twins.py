"""Barlow Twins: its loss against a float64 transcription, and its learning rates."""

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.methods.barlow_twins import barlow_twins_loss, cross_correlation
from headrace.training.preset import Preset
from tests.objective_checks import (
    Array,
    assert_same,
    differs,
    far_apart,
    float32_normal,
    numeric_gradient,
    value_and_gradient,
)
from tests.tiny_methods import batch_of, build, module_of, progress_at, rates
from tests.two_view_checks import (
    assert_a_collapse_is_logged,
    assert_each_view_has_batch_norm_of_its_own,
    assert_residual_blocks_start_as_identities,
    assert_takes_two_views,
    assert_views_are_those_of_barlow_twins,
)

# ---- eq. 1 and 2; barlowtwins main.py, BarlowTwins.forward


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
    at = float32_normal(np.random.default_rng(samples), samples, 2, channels)
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
    at = float32_normal(np.random.default_rng(3), 5, 2, 4)
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
    torch.testing.assert_close(barlow(shifted, 0.1), barlow(at, 0.1), rtol=1e-4, atol=0)


# ---- the optimiser's groups


def test_barlow_twins_biases_and_norms_have_a_learning_rate_of_their_own() -> None:
    """barlowtwins main.py: 0.2 and 0.0048, times batch / 256, after ten epochs of warm-up."""
    preset: Preset = module_of("barlow_twins").PRESETS["imagenet"]
    scale = preset.objective.bias_learning_rate_scale
    method = build("barlow_twins", "test_resnet", bias_learning_rate_scale=scale)
    weights, others = rates(method, preset, 10 / 1000)
    assert weights[1:] == (pytest.approx(0.2 * 8), 1e-6)
    assert others[1:] == (pytest.approx(0.0048 * 8), 0.0)
    assert others[0] == {id(p) for p in method.parameters() if p.ndim == 1}
    ends = rates(method, preset, 1.0)
    assert [group[1] for group in ends] == [pytest.approx(0.0016), pytest.approx(3.84e-5)]


def test_barlow_twins_loss_scale_multiplies_the_loss() -> None:
    batch = batch_of("barlow_twins")
    whole, part = (
        build("barlow_twins", "test_resnet", loss_scale=scale)(batch, progress_at(0))[0]["loss"]
        for scale in (1.0, 1 / 32)
    )
    torch.testing.assert_close(part, whole / 32)


# ---- as the other methods of two views


def test_views_are_the_codes() -> None:
    assert_views_are_those_of_barlow_twins("barlow_twins")


def test_each_view_is_a_batch_of_its_own_to_batch_norm() -> None:
    assert_each_view_has_batch_norm_of_its_own("barlow_twins")


def test_it_takes_two_views() -> None:
    assert_takes_two_views("barlow_twins")


def test_a_collapse_is_logged() -> None:
    assert_a_collapse_is_logged("barlow_twins")


def test_residual_blocks_start_as_identities() -> None:
    assert_residual_blocks_start_as_identities("barlow_twins")
