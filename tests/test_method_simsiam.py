"""SimSiam: its loss against a float64 transcription, and its predictor's learning rate."""

import math

import numpy as np
import pytest
import torch

from headrace.training.methods.simsiam import SimSiam, simsiam_loss
from headrace.training.preset import Preset
from tests.objective_checks import (
    Array,
    assert_same,
    assert_targets_are_constant,
    differs,
    float32_normal,
    tensor,
)
from tests.tiny_methods import build, module_of, rates
from tests.two_view_checks import (
    assert_a_collapse_is_logged,
    assert_each_view_has_batch_norm_of_its_own,
    assert_residual_blocks_start_as_identities,
    assert_takes_two_views,
)

# ---- eq. 1 to 4; simsiam main_simsiam.py, train


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


@pytest.mark.parametrize(("samples", "dim", "scale"), [(1, 3, 1.0), (4, 5, 10.0), (3, 16, 0.1)])
def test_simsiam_loss(samples: int, dim: int, scale: float) -> None:
    random = np.random.default_rng(dim)
    predictions, targets = (float32_normal(random, samples, 2, dim, scale=scale) for _ in range(2))
    assert_same(
        lambda x: simsiam_loss(x, tensor(targets)),
        lambda x: simsiam_oracle(x, targets),
        predictions,
    )


def test_a_stop_gradient_elsewhere_is_noticed() -> None:
    assert_targets_are_constant(simsiam_loss, simsiam_oracle)


def test_mistakes_are_noticed() -> None:
    random = np.random.default_rng(1)
    q, z = float32_normal(random, 4, 2, 6), float32_normal(random, 4, 2, 6)
    value = simsiam_oracle(q, z)
    assert differs(value, simsiam_oracle(q, z, same_view=True))
    assert differs(value, simsiam_oracle(q, z, halved=False))


def test_the_loss_is_minus_1_to_1() -> None:
    """Equal and opposite directions are the ends."""
    x = torch.randn(5, 1, 7).expand(5, 2, 7)
    assert float(simsiam_loss(x, 3 * x)) == pytest.approx(-1.0, abs=1e-5)
    assert float(simsiam_loss(x, -3 * x)) == pytest.approx(1.0, abs=1e-5)


# ---- the optimiser's groups


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.9])
def test_simsiam_predictor_keeps_its_learning_rate(progress: float) -> None:
    method = build("simsiam", "test_resnet")
    assert isinstance(method, SimSiam)
    preset: Preset = module_of("simsiam").PRESETS["imagenet"]
    predictor = {id(p) for p in method.prediction.parameters()}
    others = {id(p) for p in method.parameters()} - predictor
    groups = rates(method, preset, progress)
    assert [group[0] for group in groups] == [others, predictor]
    assert groups[0][1] == pytest.approx(0.1 * (1 + math.cos(math.pi * progress)) / 2)
    assert groups[1][1] == pytest.approx(0.1)
    # Biases and norms too.
    assert [group[2] for group in groups] == [1e-4, 1e-4]


# ---- as the other methods of two views


def test_each_view_is_a_batch_of_its_own_to_batch_norm() -> None:
    assert_each_view_has_batch_norm_of_its_own("simsiam")


def test_it_takes_two_views() -> None:
    assert_takes_two_views("simsiam")


def test_a_collapse_is_logged() -> None:
    assert_a_collapse_is_logged("simsiam")


def test_residual_blocks_start_as_identities() -> None:
    assert_residual_blocks_start_as_identities("simsiam")
