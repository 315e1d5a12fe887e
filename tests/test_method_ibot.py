"""iBOT: its loss of patches against a float64 transcription, and its centres and temperatures.

What it shares with DINOv2 is in test_blocks_masked_views.py and test_blocks_self_distillation.py.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.blocks.self_distillation import (
    patch_loss,
)
from tests.masked_checks import distributions, masks, patch_oracle
from tests.objective_checks import Array, as_float32, assert_same, differs
from tests.tiny_methods import (
    batch_of,
    build,
    progress_at,
    sgd,
    train_step,
)


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


def test_nothing_masked_is_no_loss() -> None:
    student = torch.randn(2, 2, 3, 4, requires_grad=True)
    targets = torch.full((2, 2, 3, 4), 0.25)
    loss = patch_loss(student, targets, torch.zeros(2, 2, 3, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_patch_center_follows_all_patches() -> None:
    """Masked or not, as in the code."""
    method: Any = build("ibot", "test_vit")
    batch = batch_of("ibot")
    rows = []
    with torch.no_grad():
        for view in range(2):
            tokens = method.encoder.forward_features(batch.views[view])[:, 1:]
            rows.append(method.teacher_head.classes(tokens).flatten(0, 1))
    train_step(method, sgd(method), [batch], progress_at(0))
    expected = 0.1 * torch.cat(rows).mean(dim=0)
    torch.testing.assert_close(method.patch_center, expected, rtol=1e-4, atol=1e-6)


def test_patches_may_have_prototypes_of_their_own() -> None:
    method, shared = (
        build("ibot", "test_vit", shared_head=False, patch_out_dim=24),
        build("ibot", "test_vit"),
    )
    assert len(list(method.parameters())) > len(list(shared.parameters()))
    outputs, embeddings = method(batch_of("ibot"), progress_at(0))
    outputs["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters() if p.requires_grad)
    assert embeddings["student_patch"].shape[-1] == 24
    train_step(method, sgd(method), [batch_of("ibot")], progress_at(0))


def test_ibot_temperatures_move_by_epoch() -> None:
    method: Any = build(
        "ibot",
        "test_vit",
        teacher_temperature=0.3,
        warmup_teacher_temperature=0.1,
        teacher_patch_temperature=0.4,
        warmup_teacher_patch_temperature=0.2,
        warmup_teacher_temperature_epochs=3,
    )
    batch = batch_of("ibot")
    embeddings = method.embed(batch, progress_at(0))
    for epoch, (of_classes, of_patches) in enumerate([(0.1, 0.2), (0.2, 0.3), (0.3, 0.4)]):
        constant: Any = build(
            "ibot",
            "test_vit",
            teacher_temperature=of_classes,
            teacher_patch_temperature=of_patches,
            warmup_teacher_temperature_epochs=0,
        )
        ours, expected = (
            each.objective(embeddings, batch, progress_at(4 * epoch + 3))
            for each in (method, constant)
        )
        torch.testing.assert_close(ours, expected)
