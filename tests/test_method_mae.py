"""MAE: its loss against a float64 transcription, patch by patch, and where its tokens stand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headrace.training.blocks.patches import (
    normalize_patches,
    patchify,
    reconstruction_loss,
)
from headrace.training.preset import ConfigError
from tests.masked_checks import assert_asks_for_hidden_pixels, assert_shows_a_perfect_prediction
from tests.objective_checks import Array, assert_same, differs
from tests.tiny_methods import (
    batch_of,
    build,
    progress_at,
)


def patches_oracle(pictures: Array, patch: int) -> Array:
    batch, _, height, width = pictures.shape
    rows = [
        pictures[b, :, top : top + patch, left : left + patch].transpose(1, 2, 0).ravel()
        for b in range(batch)
        for top in range(0, height, patch)
        for left in range(0, width, patch)
    ]
    return np.array(rows).reshape(batch, -1, patch * patch * 3)


def mae_oracle(
    prediction: Array,
    pictures: Array,
    mask: NDArray[np.bool_],
    patch: int,
    *,
    ddof: int = 1,
    per_sample: bool = False,
    everywhere: bool = False,
) -> float:
    target = patches_oracle(pictures, patch)
    mean = target.mean(-1, keepdims=True)
    target = (target - mean) / np.sqrt(target.var(-1, ddof=ddof, keepdims=True) + 1e-6)
    error = ((prediction - target) ** 2).mean(-1)
    if everywhere:
        return float(error.mean())
    if per_sample:
        return float(np.mean([error[b][mask[b]].mean() for b in range(len(mask))]))
    return float(error[mask].mean())


@pytest.mark.parametrize(("batch", "side", "patch"), [(2, 4, 2), (1, 6, 3), (3, 6, 2)])
def test_reconstruction_loss(batch: int, side: int, patch: int) -> None:
    random = np.random.default_rng(side)
    pictures = random.normal(size=(batch, 3, side, side)).astype(np.float32).astype(np.float64)
    patches = (side // patch) ** 2
    mask = random.permuted(np.tile(np.arange(patches) % 4 != 0, (batch, 1)), axis=1)
    at = random.normal(size=(batch, patches, patch * patch * 3))
    at = at.astype(np.float32).astype(np.float64)
    target = normalize_patches(patchify(torch.tensor(pictures), patch))

    def ours(x: Tensor) -> Tensor:
        return reconstruction_loss(x, target, torch.tensor(mask))

    assert_same(ours, lambda x: mae_oracle(x, pictures, mask, patch), at)
    value = mae_oracle(at, pictures, mask, patch)
    assert differs(value, mae_oracle(at, pictures, mask, patch, ddof=0))
    assert differs(value, mae_oracle(at, pictures, mask, patch, everywhere=True))


def test_reconstruction_loss_weighs_patches_and_not_samples_alike() -> None:
    """Only a mask of unequal counts tells sum(loss * mask) / sum(mask) from a mean of means."""
    random = np.random.default_rng(3)
    pictures, at = random.normal(size=(2, 3, 4, 4)), random.normal(size=(2, 4, 12))
    mask = np.array([[True, False, False, False], [True, True, True, False]])
    target = normalize_patches(patchify(torch.tensor(pictures), 2))
    value = float(reconstruction_loss(torch.tensor(at), target, torch.tensor(mask)))
    assert value == pytest.approx(mae_oracle(at, pictures, mask, 2), rel=1e-5)
    assert differs(value, mae_oracle(at, pictures, mask, 2, per_sample=True))


def test_normalize_patches_adds_to_the_variance_and_not_to_the_deviation() -> None:
    """Only nearly flat patches tell: here the variance is about the 1e-6 that is added."""
    pictures = 1e-3 * np.random.default_rng(4).normal(size=(1, 3, 4, 4))
    patches = patches_oracle(pictures, 2)
    centered = patches - patches.mean(-1, keepdims=True)
    variance = patches.var(-1, ddof=1, keepdims=True)
    ours = normalize_patches(patchify(torch.tensor(pictures), 2)).numpy()
    np.testing.assert_allclose(ours, centered / np.sqrt(variance + 1e-6), rtol=1e-9)
    assert not np.allclose(ours, centered / (np.sqrt(variance) + 1e-6), rtol=0.1)


@pytest.mark.parametrize("normalize", [True, False])
def test_it_asks_for_hidden_pixels(normalize: bool) -> None:
    assert_asks_for_hidden_pixels("mae", "test_vit", normalize=normalize)


def test_a_perfect_prediction_is_shown_as_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_shows_a_perfect_prediction("mae", "test_vit", monkeypatch)


def test_mae_shows_plain_pixels_as_they_are() -> None:
    method: Any = build("mae", "test_vit", normalize_pixels=False)
    batch = batch_of("mae", samples=2)
    shown, note = method.reconstruct(batch)
    torch.testing.assert_close(patchify(shown, 4), method.predict(batch))
    assert "true" not in note


def test_mae_encoder_sees_the_kept_patches_alone() -> None:
    method, batch = build("mae", "test_vit"), batch_of("mae", samples=2)
    mask = batch.masks[0]
    assert mask is not None
    prediction = method.embed(batch, progress_at(0))["prediction"]
    painted = batch.views[0].clone()
    hidden = mask.view(2, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    painted.masked_fill_(hidden[:, None], 100.0)
    changed = replace(batch, views=(painted,))
    torch.testing.assert_close(method.embed(changed, progress_at(0))["prediction"], prediction)
    painted = batch.views[0].masked_fill(~hidden[:, None], 100.0)
    changed = replace(batch, views=(painted,))
    assert not torch.allclose(method.embed(changed, progress_at(0))["prediction"], prediction)


def test_mae_puts_tokens_back_where_they_were() -> None:
    """With nothing masked the encoder's tokens are timm's own, in order."""
    method = build("mae", "test_vit").eval()
    x = batch_of("mae", samples=2).views[0]
    kept = torch.arange(64).expand(2, -1)
    encode: Any = method.encode
    features: Any = method.encoder.forward_features
    torch.testing.assert_close(encode(x, kept), features(x))


def test_mae_decoder_has_each_token_in_its_place() -> None:
    """Around blocks that do nothing: the kept patches' tokens, and mask tokens everywhere else."""
    method = build("mae", "test_vit")
    decoder: Any = method.decoder
    decoder.blocks = decoder.norm = decoder.pixels = nn.Identity()
    tokens, kept = torch.randn(2, 1 + 3, 64), torch.tensor([[1, 5, 40], [0, 2, 63]])
    painted = decoder(tokens, kept) - decoder.positions[1:]
    expected = decoder.mask_token.expand(2, 64, -1).clone()
    for sample in range(2):
        expected[sample, kept[sample]] = decoder.embed(tokens[sample, 1:])
    torch.testing.assert_close(painted, expected)


def test_mae_does_not_take_another_mask_for_its_own() -> None:
    method, batch = build("mae", "test_vit"), batch_of("mae")
    assert method(batch, progress_at(0))[0]["loss"].isfinite()
    mask = batch.masks[0]
    assert mask is not None
    fewer = mask.clone()
    fewer[0, int(mask[0].byte().argmax())] = False
    assert method(replace(batch, masks=(fewer,)), progress_at(1))[0]["loss"].isnan()
    for masks, text in [((None,), "no mask"), ((mask[:, :16],), "a mask over 16 patches")]:
        with pytest.raises(ConfigError, match=text):
            method(replace(batch, masks=masks), progress_at(1))
