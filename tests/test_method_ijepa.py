"""I-JEPA: its loss against a float64 transcription, and what its two encoders see."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.pipelines.batch import Batch
from headrace.pipelines.masks import BlockMask, MultiBlockMask
from headrace.training.backbones import EncoderFactory
from headrace.training.blocks.tokens import (
    embed_patches,
    encode_tokens,
)
from headrace.training.method import Facts, Method, Progress
from headrace.training.methods.ijepa import feature_loss
from headrace.training.preset import ConfigError
from tests.masked_checks import Mask, mask_of, painted
from tests.objective_checks import Array, as_float32, assert_same, differs
from tests.tiny_methods import (
    batch_of,
    build,
    make_batch,
    module_of,
    progress_at,
    sgd,
    small_preset,
    train_step,
)


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


def test_ijepa_context_is_all_that_its_encoder_sees() -> None:
    method, batch = build("ijepa", "test_vit"), batch_of("ijepa", samples=4)
    embeddings = method.embed(batch, progress_at(0))
    removed = mask_of(batch)[:, 0]
    elsewhere = method.embed(painted(batch, 0, removed), progress_at(0))
    torch.testing.assert_close(elsewhere["prediction"], embeddings["prediction"])
    assert not torch.allclose(elsewhere["target"], embeddings["target"])
    inside = method.embed(painted(batch, 0, ~removed), progress_at(0))
    assert not torch.allclose(inside["prediction"], embeddings["prediction"])


def unpadded_loss(method: Any, batch: Batch, sample: int) -> Tensor:
    """ijepa `train.py`, one sample and one block at a time, each of its own length."""
    mask, picture = mask_of(batch)[sample], batch.views[0][sample : sample + 1]
    kept = (~mask[0]).nonzero().flatten()[: method.context_places]
    context = embed_patches(method.context_encoder, picture)[:, kept]
    context = encode_tokens(method.context_encoder, context)
    features = method.encoder.forward_features(picture)
    features = nn.functional.layer_norm(features, features.shape[-1:])
    predictor, losses = method.predictor, []
    for block in mask[1:]:
        places = block.nonzero().flatten()
        tokens = torch.cat(
            [
                predictor.embed(context) + predictor.positions[kept],
                predictor.mask_token + predictor.positions[places],
            ],
            dim=1,
        )
        predicted = predictor.out(predictor.norm(predictor.blocks(tokens)[:, len(kept) :]))
        losses.append(nn.functional.smooth_l1_loss(predicted, features[:, places]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("context_share", [0.6, 0.15])
def test_ijepa_padding_changes_nothing(context_share: float) -> None:
    """Groups of different sizes in one batch, contexts that are cut included."""
    method: Any = build("ijepa", "test_vit", context_share=context_share)
    batch = batch_of("ijepa", samples=16)
    contexts, blocks = (~mask_of(batch)[:, 0]).sum(1), mask_of(batch)[:, 1].sum(1)
    assert len(contexts.unique()) > 1
    assert len(blocks.unique()) > 1
    assert (contexts.max() > method.context_places) == (context_share == 0.15)
    ours = method(batch, progress_at(0))[0]["loss"]
    expected = torch.stack([unpadded_loss(method, batch, sample) for sample in range(16)]).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    gradients = []
    for loss in (ours, expected):
        method.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in method.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("side", [8, 14, 16, 28])
def test_ijepa_has_room_for_every_block(side: int) -> None:
    augmentation = small_preset("ijepa").augmentation
    mask = MultiBlockMask(4, min_keep=4)
    ops = (replace(augmentation.views[0].ops[0], size=4 * side),)  # pyright: ignore[reportCallIssue]
    view = replace(augmentation.views[0], ops=ops, mask=mask)
    largest = module_of("ijepa").largest_target(mask, side)
    largest_drawn = max(
        int(
            mask_of(make_batch(replace(augmentation, views=(view,), group=1), 64, seed))[:, 1:]
            .sum(-1)
            .max()
        )
        for seed in range(4)
    )
    assert largest_drawn == largest


def test_ijepa_target_encoder_follows_on_a_straight_line() -> None:
    method: Any = build("ijepa", "test_vit", teacher_momentum=0.5)
    before = {key: value.clone() for key, value in method.encoder.state_dict().items()}
    at = Progress(step=10, total_steps=20, steps_per_epoch=4, seed=5)
    train_step(method, sgd(method, 1.0), [batch_of("ijepa")], at)
    student = method.context_encoder.state_dict()
    for key, value in method.encoder.state_dict().items():
        expected = 0.75 * before[key] + 0.25 * student[key]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(method.encoder.pos_embed, before["pos_embed"])


def test_ijepa_says_what_it_needs() -> None:
    preset, module = small_preset("ijepa"), module_of("ijepa")
    make = EncoderFactory("test_vit", {"img_size": 32, "patch_size": 4, "global_pool": "avg"})

    def built(objective: object, *masks: object) -> Method:
        given: Any = masks
        return module.build(objective, make, Facts(0, 64, (32,), 16, 4, 20, masks=given))

    mask = preset.augmentation.views[0].mask
    for masks in [(), (None,), (BlockMask(4),), (mask, mask)]:
        with pytest.raises(ConfigError, match="needs one view with a MultiBlockMask"):
            built(preset.objective, *masks)
    with pytest.raises(ConfigError, match="have 4 pixels, and the augmentation's masks"):
        built(preset.objective, MultiBlockMask(8))
    with pytest.raises(ConfigError, match="multiple of 4 and of predictor_heads"):
        built(replace(preset.objective, predictor_heads=5), mask)
