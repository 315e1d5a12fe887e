"""DINOv2: its losses against float64 transcriptions, clipping, layer decay, drop path and centring.

What it shares with iBOT is in test_blocks_masked_views.py and test_blocks_self_distillation.py.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.blocks.drop_path import KeyedDropPath
from headrace.training.blocks.self_distillation import (
    cross_view_entropy,
)
from tests.masked_checks import Mask, distributions, mask_of, masks, patch_oracle
from tests.objective_checks import Array, as_float32, assert_same, differs, log_softmax
from tests.tiny_methods import (
    batch_of,
    build,
    progress_at,
    sgd,
    train_step,
)


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


def dinov2_class_oracle(
    student: Array, targets: Array, temperature: float, *, swapped: bool = True
) -> float:
    """dinov2 ssl_meta_arch.py, forward_backward, and dino_clstoken_loss.py, DINOLoss.forward.

    student [B, V, K], global views first; targets [B, 2, K]. Terms and scales as the code.
    """
    student, targets = student.swapaxes(0, 1), targets.swapaxes(0, 1)
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
    student = as_float32(random.uniform(-1, 1, (samples, views, prototypes)))
    targets = distributions(random, (samples, 2, prototypes))

    def ours(x: Tensor) -> Tensor:
        return cross_view_entropy(x, torch.tensor(targets).float(), 0.1)

    assert_same(ours, lambda x: dinov2_class_oracle(x, targets, 0.1), student)
    value = dinov2_class_oracle(student, targets, 0.1)
    assert differs(value, dinov2_class_oracle(student, targets, 0.1, swapped=False))


def test_patch_center_follows_masked_patches_alone() -> None:
    method: Any = build("dinov2", "test_vit", centering="mean")
    batch = batch_of("dinov2")
    rows = []
    with torch.no_grad():
        for view in range(2):
            tokens = method.encoder.forward_features(batch.views[view])[:, 1:]
            rows.append(method.teacher_heads[-1](tokens)[mask_of(batch, view)])
    train_step(method, sgd(method), [batch], progress_at(0))
    expected = 0.1 * torch.cat(rows).mean(dim=0)
    torch.testing.assert_close(method.patch_center, expected, rtol=1e-4, atol=1e-6)


def test_patches_may_have_prototypes_of_their_own() -> None:
    method, shared = build("dinov2", "test_vit", separate_heads=True), build("dinov2", "test_vit")
    assert len(list(method.parameters())) > len(list(shared.parameters()))
    outputs, embeddings = method(batch_of("dinov2"), progress_at(0))
    outputs["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters() if p.requires_grad)
    assert embeddings["student_patch"].shape[-1] == 48
    train_step(method, sgd(method), [batch_of("dinov2")], progress_at(0))


def test_dinov2_clips_backbone_and_heads_each_as_a_whole() -> None:
    method: Any = build("dinov2", "test_vit", separate_heads=True, clip=0.01)
    method(batch_of("dinov2"), progress_at(0))[0]["loss"].backward()
    method.after_backward(progress_at(0))
    parts = [
        [*method.student.parameters(), method.mask_token],
        *(head.parameters() for head in method.student_heads),
    ]
    for part in parts:
        norm = torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
        torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)


def test_dinov2_deeper_layers_learn_slower() -> None:
    """dinov2 `utils/param_groups.py`, get_vit_lr_decay_rate, for a backbone of three blocks."""
    method = build("dinov2", "test_vit", layer_decay=0.5, patch_embed_scale=0.2)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    for group in method.param_groups():
        parameters: Any = group["params"]
        for parameter in parameters:
            name = names[id(parameter)]
            if ".blocks." in name and name.startswith("student."):
                layer = int(name.split(".")[2]) + 1
            elif any(part in name for part in ("pos_embed", "patch_embed", "mask_token", "cls_")):
                layer = 0
            else:
                assert name.startswith(("student_heads.", "student.norm."))
                layer = 4
            scale = 0.5 ** (4 - layer) * (0.2 if "patch_embed" in name else 1.0)
            assert group["learning_rate_scale"] == pytest.approx(scale), name
            decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
            assert group["decay"] == decays, name


def test_dinov2_drops_paths_alike_in_all_blocks() -> None:
    method: Any = build("dinov2", "test_vit", drop_path=0.3)
    layers = [m for m in method.student.modules() if isinstance(m, KeyedDropPath)]
    assert [layer.probability for layer in layers] == [0.3] * 6
    assert len({layer.layer for layer in layers}) == 6
    assert not any(isinstance(m, KeyedDropPath) for m in method.encoder.modules())


def test_dinov2_sinkhorn_needs_no_center() -> None:
    method: Any = build("dinov2", "test_vit", centering="sinkhorn")
    batch = batch_of("dinov2")
    for step in range(2):
        train_step(method, sgd(method), [batch], progress_at(step))
    assert not method.center.any()
    assert not method.patch_center.any()
    logits = method.embed(batch, progress_at(2))["teacher"]
    codes = method.targets(logits, method.center, 0.1).flatten(0, 1)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(32))
    spread = codes.sum(dim=0) / codes.sum()
    softmax = (logits / 0.1).flatten(0, 1).softmax(dim=1).sum(dim=0) / 32
    assert (spread - 1 / 48).abs().max() < 0.5 * (softmax - 1 / 48).abs().max()


def test_dinov2_temperature_moves_by_step() -> None:
    method: Any = build("dinov2", "test_vit", warmup_teacher_temperature_epochs=2)
    method.options = replace(
        method.options, warmup_teacher_temperature=0.1, teacher_temperature=0.8
    )
    ours = [method.teacher_temperature(progress_at(step)) for step in range(10)]
    assert ours == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8])
