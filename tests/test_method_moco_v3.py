"""MoCo v3: its loss against a float64 transcription, its heads, and what it never trains."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from headrace.training.backbones import EncoderFactory
from headrace.training.blocks.info_nce import batch_info_nce
from headrace.training.blocks.positions import sine_cosine
from headrace.training.method import Facts
from headrace.training.methods import moco_v3
from headrace.training.methods.moco_v3 import moco_v3_loss
from tests.objective_checks import (
    Array,
    assert_same,
    batch_info_nce_oracle,
    differs,
    float32_normal,
    value_and_gradient,
)
from tests.tiny_methods import ENCODERS, batch_of, build, progress_at, sgd, small_preset, train_step

# ---- algorithm 1; moco-v3 builder.py, MoCo.forward


def moco_v3_oracle(
    predictions: Array,
    targets: Array,
    first_row: int,
    temperature: float,
    *,
    same_view: bool = False,
    averaged: bool = False,
) -> float:
    total = 0.0
    for view in range(2):
        target = targets[:, view if same_view else 1 - view]
        total += batch_info_nce_oracle(predictions[:, view], target, first_row, temperature)
    return 2 * temperature * (total / 2 if averaged else total)


@pytest.mark.parametrize(
    ("n", "batch", "first_row", "temperature"), [(3, 3, 0, 0.2), (2, 6, 4, 1.0), (4, 8, 0, 0.3)]
)
def test_moco_v3_loss(n: int, batch: int, first_row: int, temperature: float) -> None:
    predictions, targets = (
        float32_normal(np.random.default_rng(1), n, 2, 4),
        float32_normal(np.random.default_rng(2), batch, 2, 4),
    )

    def ours(x: Tensor) -> Tensor:
        return moco_v3_loss(x, torch.tensor(targets).float(), first_row, temperature)[0]

    def oracle(x: Array, **mistake: bool) -> float:
        return moco_v3_oracle(x, targets, first_row, temperature, **mistake)

    assert_same(ours, oracle, predictions)
    value = oracle(predictions)
    assert differs(value, oracle(predictions, same_view=True))
    assert differs(value, oracle(predictions, averaged=True))
    assert differs(value, value / (2 * temperature))


def test_moco_v3_takes_its_targets_as_constant() -> None:
    """Without the stop-gradient the gradient would be another, and the value the same."""
    both = float32_normal(np.random.default_rng(3), 4, 2, 6)
    constant = torch.tensor(both).float()
    value, stopped = value_and_gradient(lambda x: moco_v3_loss(x, x, 0, 0.2)[0], both)
    again, expected = value_and_gradient(lambda x: moco_v3_loss(x, constant, 0, 0.2)[0], both)
    assert value == again
    np.testing.assert_array_equal(stopped, expected)

    def without_stop(x: Tensor) -> Tensor:
        losses = [batch_info_nce(x[:, view], x[:, 1 - view], 0, 0.2)[0] for view in range(2)]
        return 2 * 0.2 * (losses[0] + losses[1])

    moved_value, moved = value_and_gradient(without_stop, both)
    assert moved_value == pytest.approx(value, rel=1e-6)
    assert np.linalg.norm(moved - stopped) > 0.1 * np.linalg.norm(stopped)


# ---- the method


def moco_v3_of(encoder: str, **changes: Any) -> moco_v3.MocoV3:
    method = build("moco_v3", encoder, **changes)
    assert isinstance(method, moco_v3.MocoV3)
    return method


def test_moco_v3_never_trains_the_patch_projection_and_the_positions() -> None:
    """moco-v3 vits.py: uniform by Xavier over the flattened patch; fixed sine-cosine positions."""
    method, batch = moco_v3_of("test_vit"), batch_of("moco_v3")
    encoder = method.encoder
    assert isinstance(encoder, VisionTransformer)
    projection: Any = encoder.patch_embed.proj
    bound = math.sqrt(6 / (3 * 4 * 4 + encoder.embed_dim))
    assert 0.95 * bound < projection.weight.abs().max() <= bound
    assert not projection.bias.any()
    assert encoder.pos_embed is not None
    table = sine_cosine(encoder.embed_dim, 8, 8, prefix_tokens=encoder.num_prefix_tokens)
    assert torch.equal(encoder.pos_embed[0], table)
    teacher: Any = method.teacher
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, teacher.get_parameter(name))
    fixed = projection.weight.clone()
    for step in range(2):
        train_step(method, sgd(method, 0.1), [batch], progress_at(step))
    assert torch.equal(encoder.pos_embed[0], table)
    assert torch.equal(projection.weight, fixed)
    assert torch.equal(teacher.patch_embed.proj.weight, fixed)

    encoder = moco_v3_of("test_vit", freeze_patch_projection=False).encoder
    assert isinstance(encoder, VisionTransformer)
    assert encoder.patch_embed.proj.weight.requires_grad


def test_moco_v3_keeps_what_init_brought(tmp_path: Any) -> None:
    options = {**ENCODERS["test_vit"], "img_size": 32}
    start = EncoderFactory("test_vit", options)().state_dict()
    factory = EncoderFactory("test_vit", options, initial=start)
    facts = Facts(0, 64, (32, 32), 16, 4, 20, init=tmp_path)
    method = moco_v3.build(small_preset("moco_v3").objective, factory, facts)
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(value, start[name]), name
    encoder: Any = method.encoder
    assert not encoder.patch_embed.proj.weight.requires_grad
    assert not encoder.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("encoder", "projection_layers", "last_prediction"),
    [("test_vit", 3, nn.BatchNorm1d), ("test_resnet", 2, nn.Linear)],
)
def test_moco_v3_heads(
    encoder: str, projection_layers: int, last_prediction: type[nn.Module]
) -> None:
    """moco-v3 builder.py, MoCo_ViT and MoCo_ResNet, `_build_projector_and_predictor_mlps`."""
    method = moco_v3_of(encoder)
    linear = [layer for layer in method.projection if isinstance(layer, nn.Linear)]
    assert len(linear) == projection_layers
    last: Any = method.projection[-1]
    assert isinstance(last, nn.BatchNorm1d)
    assert not last.affine
    assert sum(isinstance(layer, nn.Linear) for layer in method.prediction) == 2
    assert type(method.prediction[-1]) is last_prediction
    layers = [*method.projection, *method.prediction]
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("step", [0, 7, 19])
def test_moco_v3_momentum_reaches_one_on_a_cosine(step: int) -> None:
    """moco-v3 main_moco.py, `adjust_moco_momentum`; before the targets are made."""
    method = moco_v3_of("test_vit", teacher_momentum=0.9)
    with torch.no_grad():
        for parameter in [*method.encoder.parameters(), *method.projection.parameters()]:
            parameter.add_(torch.randn(parameter.shape))
    pairs = [
        *zip(method.teacher.parameters(), method.encoder.parameters(), strict=True),
        *zip(method.teacher_projection.parameters(), method.projection.parameters(), strict=True),
    ]
    momentum = 1 - 0.5 * (1 + math.cos(math.pi * step / 20)) * (1 - 0.9)
    expected = [momentum * t.detach() + (1 - momentum) * s.detach() for t, s in pairs]
    method.before_step(progress_at(step))
    for (teacher, _), value in zip(pairs, expected, strict=True):
        torch.testing.assert_close(teacher.detach(), value, rtol=1e-5, atol=1e-6)


def test_moco_v3_passes_each_view_alone() -> None:
    """Batch norm sees one view at a time, and targets take no gradient."""
    method, batch = moco_v3_of("test_resnet"), batch_of("moco_v3")
    other = replace(batch, views=(batch.views[0], batch.views[1] + torch.randn(16, 3, 1, 1)))
    one, two = (copy.deepcopy(method).embed(each, progress_at(0)) for each in (batch, other))
    for name in ("prediction", "target"):
        assert torch.equal(one[name][:, 0], two[name][:, 0])
        assert not torch.equal(one[name][:, 1], two[name][:, 1])
    assert one["prediction"].requires_grad
    assert not one["target"].requires_grad


def test_moco_v3_small_vision_transformer_has_the_codes_heads() -> None:
    preset = moco_v3.PRESETS["vit_s16_imagenet"]
    with torch.device("meta"):
        encoder: Any = timm.create_model(preset.backbone, **preset.backbone_options)
    assert [block.attn.num_heads for block in encoder.blocks] == [12] * 12


def test_everything_decays() -> None:
    assert [group["decay"] for group in build("moco_v3", "test_resnet").param_groups()] == [True]
