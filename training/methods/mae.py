"""MAE: an encoder that sees a quarter of the patches, a small decoder that paints the others.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377); code:
facebookresearch/mae. Leaving the masked patches out of the encoder makes pre-training cheap. The
features want fine-tuning: kNN and linear probes stay behind those of contrastive methods.

The encoder is a plain timm VisionTransformer: its weights load in `timm.create_model` of the same
name. Its features are the mean of the patch tokens after the final norm (BACKBONE_OPTIONS: no
parameter is added or renamed). Deviations: timm's "jax" initialisation, which is Xavier on linear
layers as in the code, but LeCun on the patch embedding, nearly 0 for the class token and, where the
code has 0, a deviation of 1e-6 for the biases of MLPs; float32 loss under autocast.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.patches import (
    as_pictures,
    if_even,
    mask_over,
    normalize_patches,
    patchify,
    random_mask,
    reconstruction_loss,
)
from headrace.training.blocks.positions import fix_positions, sine_cosine
from headrace.training.blocks.tokens import (
    embed_patches,
    encode_tokens,
    kept_patches,
    most_masked,
    require_patches,
    take,
    vision_transformer,
)
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset

BACKBONE_OPTIONS = {"global_pool": "avg", "fc_norm": False}
JUDGED_BY = "linear"


@dataclass(frozen=True)
class Objective:
    """MAE's hyper-parameters; the share of masked patches belongs to the augmentation."""

    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    normalize_pixels: bool = True
    """Predict each patch's pixels with that patch's mean and deviation taken out."""


class Decoder(nn.Module):
    """Tokens of the kept patches -> pixels of all patches; a ViT narrower than the encoder."""

    positions: Tensor

    def __init__(
        self, options: Objective, in_dim: int, grid: tuple[int, int], prefix: int, out_dim: int
    ) -> None:
        super().__init__()
        width = options.decoder_dim
        self.prefix = prefix
        self.embed = nn.Linear(in_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        positions = sine_cosine(width, *grid, prefix_tokens=prefix)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(
            *(
                Block(width, options.decoder_heads, qkv_bias=True)
                for _ in range(options.decoder_depth)
            )
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, out_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """tokens [B, prefix + n, in_dim], kept int64 [B, n] -> [B, N, out_dim]."""
        tokens = self.embed(tokens)
        prefix, visible = tokens.split([self.prefix, kept.shape[1]], dim=1)
        places = kept[..., None].expand_as(visible)
        patches = len(self.positions) - self.prefix
        # mask_token is float32, and `tokens` need not be under autocast.
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), patches, -1)
        tokens = torch.cat([prefix, hidden.scatter(1, places, visible)], dim=1) + self.positions
        return self.pixels(self.norm(self.blocks(tokens))[:, self.prefix :])


class Mae(Method):
    """The encoder and the decoder; no state across steps. removed: patches of each sample."""

    depends_on_length = False
    couples_samples = False

    def __init__(self, options: Objective, encoder: VisionTransformer, removed: int) -> None:
        super().__init__()
        self.options = options
        self.encoder = encoder
        self.removed = removed
        self.grid: tuple[int, int] = encoder.patch_embed.grid_size
        self.patch: int = encoder.patch_embed.patch_size[0]
        fix_positions(encoder)
        prefix = encoder.num_prefix_tokens
        self.decoder = Decoder(options, encoder.embed_dim, self.grid, prefix, self.patch**2 * 3)

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Pixels "prediction" [B, N, patch * patch * 3] of every patch."""
        return {"prediction": self.predict(batch)}

    def predict(self, batch: Batch) -> Tensor:
        """[B, N, patch * patch * 3]: what every patch's pixels are taken to be."""
        mask = self._mask(batch)
        kept = kept_patches(mask, mask.shape[1] - self.removed)
        return self.decoder(self.encode(batch.views[0], kept), kept)

    def encode(self, pictures: Tensor, kept: Tensor) -> Tensor:
        """[B, 3, H, W], kept int64 [B, n] -> tokens [B, prefix + n, D]: the encoder on these."""
        encoder = self.encoder
        assert isinstance(encoder, VisionTransformer)
        tokens = embed_patches(encoder, pictures)
        prefix, patches = tokens.tensor_split([encoder.num_prefix_tokens], dim=1)
        return encode_tokens(encoder, torch.cat([prefix, take(patches, kept)], dim=1))

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        mask = self._mask(batch)
        target = patchify(batch.views[0].float(), self.patch)
        if self.options.normalize_pixels:
            target = normalize_patches(target)
        loss = reconstruction_loss(embeddings["prediction"], target, mask)
        return {"loss": if_even(loss, mask, self.removed)}

    def reconstruct(self, batch: Batch) -> tuple[Tensor, str]:
        """Every patch as predicted, [B, 3, H, W] in the view's units, and what was added."""
        normalized = self.options.normalize_pixels
        return as_pictures(self.predict(batch), batch.views[0], self.grid[0], normalized=normalized)

    def _mask(self, batch: Batch) -> Tensor:
        return mask_over("mae", batch.masks[0], self.grid[0] * self.grid[1])


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Mae:
    """Raises ConfigError for a backbone without patch tokens, or views that do not fit it."""
    encoder = vision_transformer("mae", make_encoder, **BACKBONE_OPTIONS, weight_init="jax")
    mask = random_mask("mae", facts)
    require_patches("mae", mask, encoder)
    size = encoder.patch_embed.img_size
    if size != (facts.view_pixels[0],) * 2:
        raise ConfigError(
            f"mae needs a view of the encoder's {size} pixels, and the augmentation's has "
            f"{facts.view_pixels[0]}"
        )
    width, heads = objective.decoder_dim, objective.decoder_heads
    if width % 4 or width % heads:
        raise ConfigError(
            f"mae needs a decoder_dim that is a multiple of 4 and of decoder_heads, {heads}, not "
            f"{width}"
        )
    return Mae(objective, encoder, most_masked(mask, encoder.patch_embed.num_patches))


_OPTIM = Optim(
    name="adamw", learning_rate=1.5e-4, warmup_epochs=40, weight_decay=0.05, betas=(0.9, 0.95)
)


def _published(backbone: str, patch_pixels: int, notes: str) -> Preset:
    return Preset(
        backbone=backbone,
        augmentation=recipes.mae(patch_pixels=patch_pixels),
        test=recipes.center(),
        optim=_OPTIM,
        batch_size=4096,
        epochs=800,
        objective=Objective(),
        notes=notes,
    )


PRESETS = {
    "imagenet": _published(
        "vit_base_patch16_224", 16, "1600 epochs in the paper: fine-tuned 83.6, linear 68.0."
    ),
    "vit_large": _published(
        "vit_large_patch16_224",
        16,
        "800 epochs: fine-tuned 85.4; 1600: 85.9, linear 75.8. The code: 42 hours on 64 V100.",
    ),
    "vit_huge": _published(
        "vit_huge_patch14_224", 14, "1600 epochs in the paper: fine-tuned 86.9, linear 76.6."
    ),
    "cifar": Preset(
        backbone="vit_tiny_patch16_224",
        backbone_options={
            "img_size": 32,
            "patch_size": 4,
            "depth": 4,
            "embed_dim": 96,
            "num_heads": 3,
        },
        augmentation=recipes.mae(32, patch_pixels=4),
        test=recipes.center(32, 32),
        optim=replace(_OPTIM, learning_rate=4e-3, warmup_epochs=1),
        batch_size=128,
        epochs=10,
        objective=Objective(decoder_dim=64, decoder_depth=1, decoder_heads=4),
        notes="Not from the paper: patches of 4 pixels, sized for two CPU cores.",
    ),
}
