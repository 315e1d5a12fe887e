"""MAE: an encoder that sees a quarter of the patches, a small decoder that paints the others.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377); code:
facebookresearch/mae. Leaving the masked patches out of the encoder makes pre-training cheap. The
features want fine-tuning: kNN and linear probes stay behind those of contrastive methods.

The encoder is a plain timm VisionTransformer: its weights load in `timm.create_model` of the same
name. Its features are the mean of the patch tokens after the final norm (BACKBONE_OPTIONS: no
parameter is added or renamed). Deviations: timm's "jax" initialisation, which is Xavier on linear
layers as in the code, but LeCun on the patch embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pipelines import recipes
from pipelines.batch import Batch
from training.blocks.gather import mean_over_ranks
from training.blocks.positions import sine_cosine
from training.blocks.tokens import kept_patches, take
from training.config import ConfigError, Optim, Recipe
from training.method import Facts, MakeEncoder, Method, Progress

BACKBONE_OPTIONS = {"global_pool": "avg", "fc_norm": False}


@dataclass(frozen=True)
class Objective:
    """MAE's hyper-parameters; the share of masked patches belongs to the augmentation."""

    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    normalize_pixels: bool = True
    """Predict each patch's pixels with that patch's mean and deviation taken out."""


def patchify(pictures: Tensor, patch: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, patch * patch * 3]: patches row by row, each as its pixels' RGB."""
    batch, channels, height, width = pictures.shape
    cut = pictures.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def normalize_patches(patches: Tensor) -> Tensor:
    """[..., P]: each patch to mean 0 and unbiased variance 1; 1e-6 is added to the variance."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def reconstruction_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, masked: Tensor | None = None
) -> Tensor:
    """Mean squared error of the masked patches (section 3, mae `models_mae.py`, `forward_loss`).

    prediction, target: [B, N, P]; mask: bool [B, N], True = removed. The mean over P, then the sum
    over masked patches of the batch divided by `masked` (scalar), their number: by default those
    here. Across ranks it is their mean number per rank, so that the mean over ranks is the global
    mean.
    """
    errors = (prediction.float() - target.float()).square().mean(dim=-1)
    if masked is None:
        masked = mask.sum()
    return (errors * mask).sum() / masked


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
    """The encoder and the decoder; no state across steps."""

    def __init__(self, options: Objective, encoder: VisionTransformer) -> None:
        super().__init__()
        self.options = options
        self.encoder = encoder
        self.grid: tuple[int, int] = encoder.patch_embed.grid_size
        self.patch: int = encoder.patch_embed.patch_size[0]
        self._kept: int | None = None
        prefix = encoder.num_prefix_tokens
        assert encoder.pos_embed is not None
        with torch.no_grad():
            own = 0 if encoder.no_embed_class else prefix
            encoder.pos_embed.copy_(sine_cosine(encoder.embed_dim, *self.grid, prefix_tokens=own))
        encoder.pos_embed.requires_grad_(False)
        self.decoder = Decoder(options, encoder.embed_dim, self.grid, prefix, self.patch**2 * 3)

    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:  # noqa: ARG002
        """ "prediction" [B, N, patch * patch * 3] of every patch's pixels."""
        mask = self._mask(batch)
        if self._kept is None:
            # The recipe removes equally many patches of every sample of a run; the host learns how
            # many from the first batch, the one time that it waits for the device.
            self._kept = int((~mask[0]).sum())
        kept = kept_patches(mask, self._kept)
        return {"prediction": self.decoder(self.encode(batch.views[0], kept), kept)}

    def encode(self, pictures: Tensor, kept: Tensor) -> Tensor:
        """[B, 3, H, W], kept int64 [B, n] -> tokens [B, prefix + n, D]: the encoder on these."""
        encoder = self.encoder
        assert isinstance(encoder, VisionTransformer)
        tokens = encoder._pos_embed(encoder.patch_embed(pictures))
        prefix, patches = tokens.tensor_split([encoder.num_prefix_tokens], dim=1)
        tokens = torch.cat([prefix, take(patches, kept)], dim=1)
        return encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))

    def objective(
        self,
        embeddings: Mapping[str, Tensor],
        batch: Batch,
        progress: Progress,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        mask = self._mask(batch)
        target = patchify(batch.views[0].float(), self.patch)
        if self.options.normalize_pixels:
            target = normalize_patches(target)
        masked = mean_over_ranks(mask.sum().float())
        loss = reconstruction_loss(embeddings["prediction"], target, mask, masked)
        # Masks of unequal size would be mistaken for others; not finite, such a loss ends the run.
        even = (mask.sum(dim=1) == mask.shape[1] - (self._kept or 0)).all()
        return {"loss": torch.where(even, loss, torch.nan)}

    def _mask(self, batch: Batch) -> Tensor:
        mask, patches = batch.masks[0], self.grid[0] * self.grid[1]
        if mask is None or mask.shape[1] != patches:
            found = "no mask" if mask is None else f"a mask over {mask.shape[1]} patches"
            raise ConfigError(
                f"mae's encoder cuts its view into {patches} patches of {self.patch} pixels, and "
                f"the augmentation has {found}: its patch_pixels must be {self.patch}"
            )
        return mask


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Mae:
    """Raises ConfigError for a backbone without patch tokens, or views that do not fit it."""
    try:
        encoder = make_encoder(**BACKBONE_OPTIONS, weight_init="jax")
    except ConfigError as error:
        raise ConfigError(f"mae needs a timm VisionTransformer (vit_*): {error}") from error
    if not isinstance(encoder, VisionTransformer) or encoder.pos_embed is None:
        raise ConfigError(
            f"mae needs a timm VisionTransformer (vit_*) with absolute positions, not "
            f"{type(encoder).__name__}"
        )
    size = encoder.patch_embed.img_size
    if size != (facts.view_pixels[0],) * 2 or len(facts.view_pixels) != 1:
        raise ConfigError(
            f"mae takes one view of the encoder's {size} pixels, and the augmentation's views "
            f"have {list(facts.view_pixels)}"
        )
    return Mae(objective, encoder)


PRESETS = {
    "imagenet": Recipe(
        backbone="vit_base_patch16_224",
        augmentation=recipes.mae(),
        test=recipes.center(),
        optim=Optim(
            name="adamw",
            learning_rate=1.5e-4,
            warmup_epochs=40,
            weight_decay=0.05,
            betas=(0.9, 0.95),
        ),
        batch_size=4096,
        epochs=800,
        objective=Objective(),
        notes="Paper, 1600 epochs: fine-tuned top-1 83.6, linear 68.0.",
    ),
    "cifar": Recipe(
        backbone="vit_tiny_patch16_224",
        backbone_options={"img_size": 32, "patch_size": 4},
        augmentation=recipes.mae(32, patch_pixels=4),
        test=recipes.center(32, 32),
        optim=Optim(
            name="adamw",
            learning_rate=1.5e-4,
            warmup_epochs=2,
            weight_decay=0.05,
            betas=(0.9, 0.95),
        ),
        batch_size=512,
        epochs=20,
        objective=Objective(decoder_dim=128, decoder_depth=2, decoder_heads=4),
        notes="Not from the paper: patches of 4 pixels, sized for two CPU cores.",
    ),
}
