"""Vision transformers token by token: some patches left out, hidden, padded, or taken.

The encoder stays a plain timm VisionTransformer, whose parts are run here in its own order. Masks
differ in size from sample to sample, and the host does not know the sizes; so tensors have the
length of the largest mask that the recipe can draw, and a bool tensor beside them says which
places count.
"""

from typing import assert_never

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from headrace.pipelines.masks import BlockMask, Mask, MultiBlockMask, RandomMask
from headrace.training.method import MakeEncoder
from headrace.training.preset import ConfigError


def vision_transformer(
    method: str, make_encoder: MakeEncoder, **timm_options: object
) -> VisionTransformer:
    """Raises ConfigError for a backbone without patch tokens, absolute positions or last norm."""
    try:
        encoder = make_encoder(**timm_options)
    except ConfigError as error:
        raise ConfigError(f"{method} needs a timm VisionTransformer (vit_*): {error}") from error
    if not isinstance(encoder, VisionTransformer) or encoder.pos_embed is None:
        raise ConfigError(
            f"{method} needs a timm VisionTransformer (vit_*) with absolute positions, not "
            f"{type(encoder).__name__}"
        )
    if isinstance(encoder.norm, nn.Identity):
        raise ConfigError(
            f"{method} needs tokens that a last norm has seen: --backbone-options fc_norm=False"
        )
    return encoder


def require_patches(method: str, mask: Mask, encoder: VisionTransformer) -> None:
    """Raises ConfigError where the mask's patches are not those that the encoder cuts."""
    patch = encoder.patch_embed.patch_size
    if patch != (mask.patch_pixels,) * 2:
        raise ConfigError(
            f"{method} needs masks over the encoder's patches, which have {patch[0]} pixels, and "
            f"the augmentation's masks have patch_pixels {mask.patch_pixels}"
        )


def most_masked(mask: Mask, patches: int) -> int:
    """The largest number of a view's patches that this mask can remove (at least 1)."""
    match mask:
        case RandomMask():
            return patches - int(patches * (1 - mask.ratio))
        case BlockMask():
            return max(1, int(mask.ratio[1] * patches))
        case MultiBlockMask():
            return patches
        case _:
            assert_never(mask)


def kept_patches(mask: Tensor, count: int) -> Tensor:
    """int64 [B, count]: where `mask` [B, N] is False, in ascending order."""
    return mask.byte().argsort(dim=1, stable=True)[:, :count]


def masked_patches(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where `mask` [B, N] is True, in ascending order, padded or cut to `count` places.

    int64 [B, count], and bool [B, count]: whether the place is one of these or fills up.
    """
    places = kept_patches(~mask, count)
    return places, mask.gather(1, places)


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens [B, N, D], indices int64 [B, n] -> [B, n, D]."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def embed_patches(
    encoder: VisionTransformer,
    pictures: Tensor,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> Tensor:
    """[B, 3, H, W] -> [B, prefix + N, D]: class tokens and patches, with their positions.

    Where mask (bool [B, N]) is True, `mask_token` (broadcastable to [D]) stands for the patch.
    """
    patches = encoder.patch_embed(pictures)  # [B, N, D], or [B, h, w, D] for dynamic_img_size
    if mask is not None:
        assert mask_token is not None
        hidden = mask.view(*patches.shape[:-1], 1)
        patches = torch.where(hidden, mask_token.to(patches.dtype), patches)
    return encoder._pos_embed(patches)


def run_blocks(blocks: nn.Module, tokens: Tensor, counted: Tensor | None = None) -> Tensor:
    """[B, n, D] -> [B, n, D]; no token looks at those of which counted (bool [B, n]) is False."""
    attended = None if counted is None else counted[:, None, None, :]
    for block in blocks.children():
        tokens = block(tokens, attn_mask=attended)
    return tokens


def encode_tokens(
    encoder: VisionTransformer, tokens: Tensor, counted: Tensor | None = None
) -> Tensor:
    """What follows `embed_patches`, up to and with the last norm: [B, n, D] -> [B, n, D]."""
    return encoder.norm(run_blocks(encoder.blocks, encoder.norm_pre(tokens), counted))
