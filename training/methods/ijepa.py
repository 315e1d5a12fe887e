"""I-JEPA: from part of a picture, predict what a teacher's features of its other blocks will be.

Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive
Architecture" (arXiv 2301.08243); code: facebookresearch/ijepa. No views and no pixels: the targets
are features of a slowly moving encoder of the whole picture, so that what cannot be predicted, such
as texture, may be left out. Cheap: one view, of which the trained encoder sees a third; its
features want a linear probe rather than neighbours.

As in the code: fixed sine-cosine positions, a smooth L1 loss on layer-normalised targets, a
momentum that rises linearly. The encoder is a plain timm VisionTransformer without class token; its
features are the mean of the patch tokens (BACKBONE_OPTIONS). Deviations: sizes of masks belong to
groups of samples, those of the code to a GPU's batch, so shorter ones are padded, hidden from
attention and from the loss, in which each sample has the same weight; a context longer than
`context_share` is cut to it, as the code cuts a batch's contexts to the shortest; the loss is
float32 under autocast; all schedules stand a step behind the code's, which moves them before the
first step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.masks import MultiBlockMask, block_size
from headrace.training.blocks.positions import fix_positions, sine_cosine
from headrace.training.blocks.teacher import follow, start_equal
from headrace.training.blocks.tokens import (
    embed_patches,
    encode_tokens,
    masked_patches,
    require_patches,
    run_blocks,
    take,
    vision_transformer,
)
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset
from headrace.training.schedules import linear

BACKBONE_OPTIONS = {"class_token": False, "global_pool": "avg", "fc_norm": False}
JUDGED_BY = "linear"


@dataclass(frozen=True)
class Objective:
    """I-JEPA's hyper-parameters; the blocks belong to the augmentation."""

    predictor_dim: int = 384
    predictor_depth: int = 12
    predictor_heads: int = 16
    """The code takes as many as the encoder has."""
    teacher_momentum: float = 0.996
    """At the start; reaches 1 on a straight line. Smaller for short runs."""
    context_share: float = 0.4
    """The largest share of all patches that a context has; longer ones, which groups of 64 samples
    hardly ever have, are cut in row-major order. More costs time for every batch."""


def feature_loss(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Smooth L1 distance (Huber, beta 1) to the features of the target patches.

    prediction, target: [B, n, D]; counted: bool [B, n], the places of a sample's target blocks, of
    which each sample has at least one. Returns a float32 scalar: the mean over a sample's places
    and all channels, then over samples. Section 3 of the paper, which squares; ijepa `train.py`,
    `loss_fn`, whose batches have blocks of one size.
    """
    errors = F.smooth_l1_loss(prediction.float(), target.float(), reduction="none").mean(dim=-1)
    return ((errors * counted).sum(dim=1) / counted.sum(dim=1)).mean()


class Predictor(nn.Module):
    """From the context's tokens and a block's places to the block's features: a narrow ViT."""

    positions: Tensor

    def __init__(self, options: Objective, in_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        width = options.predictor_dim
        self.embed = nn.Linear(in_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("positions", sine_cosine(width, *grid), persistent=False)
        self.blocks = nn.Sequential(
            *(
                Block(width, options.predictor_heads, qkv_bias=True, norm_layer=LayerNorm)
                for _ in range(options.predictor_depth)
            )
        )
        self.norm = LayerNorm(width)
        self.out = nn.Linear(width, in_dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        shrink_branches(self.blocks)

    def forward(self, context: Tensor, places: Tensor, blocks: Tensor, counted: Tensor) -> Tensor:
        """context: tokens [B, c, in_dim] at `places` int64 [B, c]; blocks: places [B * t, n] of t
        blocks of each sample, one sample after the other; counted: bool [B * t, c + n], what is no
        padding. -> [B * t, n, in_dim]; each block is predicted by itself."""
        context = self.embed(context) + self.positions[places]
        context = context.repeat_interleave(len(blocks) // len(context), dim=0)
        hidden = (self.mask_token + self.positions[blocks]).to(context.dtype)
        tokens = run_blocks(self.blocks, torch.cat([context, hidden], dim=1), counted)
        return self.out(self.norm(tokens[:, context.shape[1] :]))


def start_as_published(encoder: VisionTransformer) -> None:
    """Weights as `vision_transformer.py` of the code begins with them, where timm's differ."""
    projection = encoder.patch_embed.proj
    nn.init.trunc_normal_(projection.weight, std=0.02)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    shrink_branches(encoder.blocks)


@torch.no_grad()
def shrink_branches(blocks: nn.Sequential) -> None:
    """The last layer of both branches of block l = 1, 2, ... divided by sqrt(2 l)
    (`fix_init_weight`)."""
    for number, block in enumerate(blocks, start=1):
        for name in ("attn.proj", "mlp.fc2"):
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            layer.weight.div_(math.sqrt(2 * number))


class Ijepa(Method):
    """`encoder` follows `context_encoder`, which is trained with the predictor."""

    couples_samples = False

    def __init__(self, options: Objective, make_encoder: MakeEncoder, mask: MultiBlockMask) -> None:
        super().__init__()
        self.options = options
        self.context_encoder = vision_transformer("ijepa", make_encoder, **BACKBONE_OPTIONS)
        self.encoder = vision_transformer("ijepa", make_encoder, **BACKBONE_OPTIONS)
        require_patches("ijepa", mask, self.context_encoder)
        fix_positions(self.context_encoder)
        start_as_published(self.context_encoder)
        start_equal(self.encoder, self.context_encoder)
        grid = self.context_encoder.patch_embed.grid_size
        self.predictor = Predictor(options, self.context_encoder.embed_dim, grid)
        self.context_places = max(1, int(options.context_share * math.prod(grid)))
        self.target_places = largest_target(mask, grid[0])

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Features "prediction" and "target" [B, n, D] of all blocks' places, padding included."""
        assert isinstance(self.encoder, VisionTransformer)
        pictures = batch.views[0]
        (context, context_counted), (blocks, blocks_counted) = self.places(batch)
        with torch.no_grad():
            tokens = encode_tokens(self.encoder, embed_patches(self.encoder, pictures))
            features = F.layer_norm(tokens, tokens.shape[-1:])
            prefix = self.encoder.num_prefix_tokens
            target = take(features[:, prefix:], blocks.reshape(len(batch), -1))
        blocks_per_sample = len(blocks) // len(batch)
        context_of_blocks = context_counted.repeat_interleave(blocks_per_sample, dim=0)
        prediction = self.predictor(
            self.encode(pictures, context, context_counted),
            context,
            blocks,
            torch.cat([context_of_blocks, blocks_counted], dim=1),
        )
        return {"prediction": prediction.reshape(target.shape), "target": target}

    def encode(self, pictures: Tensor, places: Tensor, counted: Tensor) -> Tensor:
        """[B, 3, H, W] -> tokens [B, c, D] of the context at int64 places [B, c], which alone the
        encoder sees. counted: bool [B, c], what is no padding."""
        encoder = self.context_encoder
        prefix = encoder.num_prefix_tokens
        tokens = embed_patches(encoder, pictures)
        tokens = torch.cat([tokens[:, :prefix], take(tokens[:, prefix:], places)], dim=1)
        return encode_tokens(encoder, tokens, F.pad(counted, (prefix, 0), value=True))[:, prefix:]

    def places(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`masked_patches` of the contexts, [B, c], and of the t blocks of each, [B * t, n]."""
        mask = batch.masks[0]
        assert mask is not None
        context = masked_patches(~mask[:, 0], self.context_places)
        return context, masked_patches(mask[:, 1:].flatten(0, 1), self.target_places)

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        target = embeddings["target"]
        _, (_, counted) = self.places(batch)
        counted = counted.reshape(target.shape[:2])
        return {
            "loss": feature_loss(embeddings["prediction"], target, counted),
            # A collapse shows as 0: the same features everywhere.
            "target_deviation": target.float().flatten(0, 1).std(dim=0).mean(),
        }

    @override
    @torch.no_grad()
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        momentum = linear(progress.fraction, self.options.teacher_momentum, 1.0)
        follow(self.encoder.parameters(), self.context_encoder.parameters(), momentum)


def largest_target(mask: MultiBlockMask, side: int) -> int:
    """The most patches that a target block has, of side x side patches."""
    draws = (number / 4096 for number in range(4097))
    sizes = (block_size(mask.target_scale, mask.target_aspect, side, draw) for draw in draws)
    return max(height * width for height, width in sizes)


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Ijepa:
    """Raises ConfigError for a backbone without patch tokens, or a view without such blocks."""
    if len(facts.masks) != 1 or not isinstance(facts.masks[0], MultiBlockMask):
        raise ConfigError(
            "ijepa needs one view with a MultiBlockMask, and the augmentation's masks are "
            f"{[type(mask).__name__ for mask in facts.masks]}"
        )
    width, heads = objective.predictor_dim, objective.predictor_heads
    if width % 4 or width % heads:
        raise ConfigError(
            f"ijepa needs a predictor_dim that is a multiple of 4 and of predictor_heads, "
            f"{heads}, not {width}"
        )
    return Ijepa(objective, make_encoder, facts.masks[0])


_SMALL_VIT = {"img_size": 32, "patch_size": 4, "depth": 4, "embed_dim": 64, "num_heads": 2}

PRESETS = {
    "imagenet": Preset(
        backbone="vit_huge_patch14_224",
        augmentation=recipes.ijepa(),
        test=recipes.center(),
        optim=Optim(
            name="adamw",
            learning_rate=1e-3,
            warmup_from=2e-4,
            final_learning_rate=1e-6,
            scale_with_batch=False,
            warmup_epochs=40,
            weight_decay=0.04,
            final_weight_decay=0.4,
        ),
        batch_size=2048,
        epochs=300,
        objective=Objective(),
        notes="ViT-H/14 of the code's in1k_vith14_ep300: linear 79.3, under 72 hours on 16 A100.",
    ),
    "cifar": Preset(
        backbone="vit_tiny_patch16_224",
        backbone_options=_SMALL_VIT,
        augmentation=recipes.ijepa(32, patch_pixels=4, group=1),
        test=recipes.center(32, 32),
        optim=Optim(
            learning_rate=2e-3, final_learning_rate=2e-5, warmup_epochs=1, weight_decay=0.04
        ),
        batch_size=64,
        epochs=10,
        objective=Objective(
            predictor_dim=32,
            predictor_depth=2,
            predictor_heads=2,
            teacher_momentum=0.998,
            context_share=0.6,
        ),
        notes="Not from the paper: patches of 4 pixels, sized for two CPU cores.",
    ),
}
