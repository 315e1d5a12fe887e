"""Centres, temperatures and held prototypes of iBOT and DINOv2; means of logits."""

from typing import Any

import numpy as np
import pytest
import torch

from headrace.training.blocks.self_distillation import (
    mean_masked_logits,
    warmed_up,
)
from tests.masked_checks import masks
from tests.tiny_methods import (
    batch_of,
    build,
    progress_at,
    sgd,
    share,
    train_step,
)

NAMES = ["ibot", "dinov2"]


@pytest.mark.parametrize("name", NAMES)
def test_centers_move_once_per_step_from_all_micro_batches(name: str) -> None:
    changes: dict[str, Any] = {"drop_path": 0.2}
    changes |= {"centering": "mean", "koleo_weight": 0.0} if name == "dinov2" else {}
    one, two = (build(name, "test_vit", **changes) for _ in range(2))
    whole = batch_of(name)
    halves = [share(whole, slice(0, 8)), share(whole, slice(8, 16))]
    optimizers = [sgd(method) for method in (one, two)]
    for step in range(2):
        losses = [
            train_step(one, optimizers[0], [whole], progress_at(step)),
            train_step(two, optimizers[1], halves, progress_at(step)),
        ]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for center in ("center", "patch_center"):
        assert one.get_buffer(center).any()
        torch.testing.assert_close(one.get_buffer(center), two.get_buffer(center))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", [0, 1])
def test_prototypes_are_held(name: str, frozen: int) -> None:
    method = build(name, "test_vit", freeze_last_layer_epochs=frozen)
    method(batch_of(name), progress_at(0))[0]["loss"].backward()
    method.after_backward(progress_at(0))
    held = {key for key, p in method.named_parameters() if p.requires_grad and p.grad is None}
    assert (len(held) > 0) == bool(frozen)
    assert all("prototypes" in key for key in held)


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
