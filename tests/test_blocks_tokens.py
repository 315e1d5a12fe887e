"""Tokens of a vision transformer: timm's own, hidden, padded, kept and taken."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

from headrace.pipelines.masks import BlockMask, RandomMask
from headrace.training.blocks.tokens import (
    embed_patches,
    encode_tokens,
    kept_patches,
    masked_patches,
    most_masked,
    take,
)
from tests.masked_checks import mask_of
from tests.tiny_methods import (
    make_batch,
    small_preset,
)


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}, {"reg_tokens": 2}])
def test_tokens_are_timm_s_own(options: dict[str, Any]) -> None:
    encoder: Any = timm.create_model(
        "test_vit", num_classes=0, img_size=32, patch_size=4, **options
    )
    x = torch.randn(2, 3, 32, 32)
    tokens = encode_tokens(encoder, embed_patches(encoder, x))
    torch.testing.assert_close(tokens, encoder.forward_features(x))
    if options.get("dynamic_img_size"):
        x = torch.randn(2, 3, 16, 24)
        tokens = encode_tokens(encoder, embed_patches(encoder, x))
        torch.testing.assert_close(tokens, encoder.forward_features(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_mask_token_stands_where_the_mask_is(dynamic: bool) -> None:
    """It has the position of the patch whose place it takes."""
    encoder: Any = timm.create_model(
        "test_vit", num_classes=0, img_size=32, patch_size=4, dynamic_img_size=dynamic
    )
    x, mask, token = torch.randn(2, 3, 32, 32), torch.rand(2, 64) < 0.3, torch.randn(1, 1, 64)
    whole, hidden = embed_patches(encoder, x), embed_patches(encoder, x, mask, token)
    assert torch.equal(hidden[:, 0], whole[:, 0])
    assert torch.equal(hidden[:, 1:][~mask], whole[:, 1:][~mask])
    expected = (token[0] + encoder.pos_embed[0, 1:]).expand(2, -1, -1)
    torch.testing.assert_close(hidden[:, 1:][mask], expected[mask])


def test_padding_is_not_seen() -> None:
    """Padded samples have the tokens that they have alone, without padding."""
    encoder: Any = timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=4)
    tokens, counted = torch.randn(3, 7, 64), torch.zeros(3, 7, dtype=torch.bool)
    for sample, length in enumerate((7, 4, 1)):
        counted[sample, :length] = True
    padded = encode_tokens(encoder, tokens, counted)
    for sample, length in enumerate((7, 4, 1)):
        alone = encode_tokens(encoder, tokens[sample : sample + 1, :length])
        torch.testing.assert_close(
            padded[sample : sample + 1, :length], alone, rtol=1e-4, atol=1e-5
        )


def test_masked_patches_pads_and_cuts() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    places, counted = masked_patches(mask, 2)
    assert places[0].tolist() == [1, 3]
    assert places[1, 0] == 4
    assert counted.tolist() == [[True, True], [True, False], [False, False]]
    assert kept_patches(mask, 2).tolist() == [[0, 2], [0, 1], [0, 1]]
    assert torch.equal(take(torch.arange(5.0).expand(3, 5)[..., None], places)[0, :, 0], places[0])


@pytest.mark.parametrize("mask", [BlockMask(4, (0.1, 0.5), 4), RandomMask(4, 0.6), BlockMask(4)])
def test_no_mask_is_larger_than_the_largest(mask: BlockMask | RandomMask) -> None:
    augmentation = small_preset("ibot").augmentation
    view = replace(augmentation.views[0], mask=mask)
    drawn = make_batch(replace(augmentation, views=(view, *augmentation.views[1:])), samples=64)
    sizes = mask_of(drawn).sum(dim=1)
    assert 0.9 * most_masked(mask, 64) - 2 < sizes.max() <= most_masked(mask, 64)


def test_kept_patches_are_where_the_mask_is_not() -> None:
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert kept_patches(mask, 2).tolist() == [[1, 3], [0, 1]]
