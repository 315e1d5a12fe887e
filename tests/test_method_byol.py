"""BYOL: its loss against a float64 transcription, and how its target moves."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.methods.byol import Byol, byol_loss
from tests.objective_checks import (
    Array,
    assert_same,
    assert_targets_are_constant,
    differs,
    float32_normal,
    tensor,
)
from tests.tiny_methods import batch_of, build, progress_at, sgd, train_step
from tests.two_view_checks import (
    assert_a_collapse_is_logged,
    assert_each_view_has_batch_norm_of_its_own,
    assert_residual_blocks_start_as_identities,
    assert_takes_two_views,
)

# ---- eq. 2; byol helpers.py, regression_loss, and byol_experiment.py, loss_fn


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


@pytest.mark.parametrize(("samples", "dim", "scale"), [(1, 3, 1.0), (4, 5, 10.0), (3, 16, 0.1)])
def test_byol_loss(samples: int, dim: int, scale: float) -> None:
    random = np.random.default_rng(dim)
    predictions, targets = (float32_normal(random, samples, 2, dim, scale=scale) for _ in range(2))
    assert_same(
        lambda x: byol_loss(x, tensor(targets)), lambda x: byol_oracle(x, targets), predictions
    )


def test_a_stop_gradient_elsewhere_is_noticed() -> None:
    assert_targets_are_constant(byol_loss, byol_oracle)


def test_mistakes_are_noticed() -> None:
    random = np.random.default_rng(1)
    q, z = float32_normal(random, 4, 2, 6), float32_normal(random, 4, 2, 6)
    value = byol_oracle(q, z)
    assert differs(value, byol_oracle(q, z, same_view=True))
    assert differs(value, byol_oracle(q, z, one_direction=True))
    assert differs(value, byol_oracle(q, z, normalized=False))


def test_the_loss_is_0_to_8() -> None:
    """Equal and opposite directions are the ends."""
    x = torch.randn(5, 1, 7).expand(5, 2, 7)
    assert float(byol_loss(x, 3 * x)) == pytest.approx(0.0, abs=1e-5)
    assert float(byol_loss(x, -3 * x)) == pytest.approx(8.0, abs=1e-5)


# ---- the target


def byol() -> Byol:
    method = build("byol", "test_resnet", teacher_momentum=0.9)
    assert isinstance(method, Byol)
    return method


def parameters(*modules: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def test_byol_target_starts_from_weights_of_its_own() -> None:
    method = byol()
    for online, target in [
        (method.encoder, method.teacher),
        (method.projection, method.teacher_projection),
    ]:
        pairs = zip(parameters(online), parameters(target), strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)


@pytest.mark.parametrize("step", [0, 7, 19])
def test_byol_target_follows_the_updated_network(step: int) -> None:
    """byol schedules.py, target_ema, and byol_experiment.py, _update_fn: after the optimiser, with
    this step's momentum."""
    method, batch = byol(), batch_of("byol")
    before = parameters(method.teacher, method.teacher_projection)
    train_step(method, sgd(method, 0.1), [batch], progress_at(step))
    momentum = 1 - (1 - 0.9) * (math.cos(math.pi * step / 20) + 1) / 2
    online = parameters(method.encoder, method.projection)
    after = parameters(method.teacher, method.teacher_projection)
    for old, new, target in zip(before, online, after, strict=True):
        torch.testing.assert_close(target, old + (1 - momentum) * (new - old))


def test_byol_target_keeps_its_own_running_statistics() -> None:
    """They come from its own features, in training mode; a copy would be the online network's."""
    method, batch = byol(), batch_of("byol")
    method.train()
    key = "running_mean"
    start = {name: b.clone() for name, b in method.teacher.named_buffers() if name.endswith(key)}
    train_step(method, sgd(method), [batch], progress_at(0))
    online = dict(method.encoder.named_buffers())
    now = dict(method.teacher.named_buffers())
    assert start
    for name, value in start.items():
        assert not torch.equal(now[name], value), name
        assert not torch.equal(now[name], online[name]), name


def test_byol_gradient_stops_at_the_target() -> None:
    method, batch = byol(), batch_of("byol")
    embeddings = method.embed(batch, progress_at(0))
    assert embeddings["prediction"].requires_grad
    assert not embeddings["target"].requires_grad


# ---- as the other methods of two views


def test_each_view_is_a_batch_of_its_own_to_batch_norm() -> None:
    assert_each_view_has_batch_norm_of_its_own("byol")


def test_it_takes_two_views() -> None:
    assert_takes_two_views("byol")


def test_a_collapse_is_logged() -> None:
    assert_a_collapse_is_logged("byol")


def test_residual_blocks_start_as_identities() -> None:
    assert_residual_blocks_start_as_identities("byol")
