"""MoCo v3: predict a slowly moving copy's embedding of the other view among those of the batch.

Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers" (arXiv
2104.02057); code: facebookresearch/moco-v3. MoCo's loss without its queue, both ways, with BYOL's
predictor; a vision transformer keeps its patch projection as it was drawn, which spares training
its spikes. Wants large batches, for they are its negatives; costs 2 trained and 2 more forward
passes per image. The trained encoder is judged.

As in the code: the momentum encoder moves before its forward pass, parameters alone, and trains
batch norm on its own batches; each view passes alone, with its own batch statistics; targets carry
no gradient; everything decays (but for LARS, which leaves out what has one dimension). Deviations:
positions give their first half of channels to columns, the code to rows; logits are float32 under
autocast; with plain accumulation the negatives are those of a micro-batch
(`--run.gradient-cache`: of the batch).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.heads import Mlp, feature_dim
from headrace.training.blocks.info_nce import batch_info_nce
from headrace.training.blocks.positions import sine_cosine
from headrace.training.blocks.teacher import follow, start_equal
from headrace.training.collectives import gather_rows, rank
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset
from headrace.training.schedules import cosine


@dataclass(frozen=True)
class Objective:
    """MoCo v3's hyper-parameters."""

    temperature: float = 0.2
    """1.0 for ResNets."""
    projection_dim: int = 256
    hidden_dim: int = 4096
    """Width of the hidden layers of projection and prediction."""
    teacher_momentum: float = 0.99
    """Of the momentum encoder at the start; reaches 1 on a cosine."""
    freeze_patch_projection: bool = True
    """Vision transformers: never train the layer that reads the patches."""


def moco_v3_loss(
    predictions: Tensor, targets: Tensor, first_row: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """2 t times the sum over both directions of InfoNCE, eq. 1 and algorithm 1.

    predictions: [n, 2, D] of this rank's samples; targets: [B, 2, D] of the whole batch, in which
    these begin at `first_row`, taken as constant. View v predicts the other. Rows need not be
    normalised. Returns the float32 scalar mean over n, and bool [2 n]: whether the own target was
    the nearest. As in the code (moco-v3 `builder.py`, `forward` and `contrastive_loss`).
    """
    targets = targets.detach()
    first_loss, first_hits = batch_info_nce(
        predictions[:, 0], targets[:, 1], first_row, temperature
    )
    second_loss, second_hits = batch_info_nce(
        predictions[:, 1], targets[:, 0], first_row, temperature
    )
    return 2 * temperature * (first_loss + second_loss), torch.cat([first_hits, second_hits])


class MocoV3(Method):
    """`teacher` and `teacher_projection` follow `encoder` and `projection`."""

    least_samples = 2

    def __init__(self, options: Objective, encoder: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.options = options
        self.encoder, self.teacher = encoder, teacher
        self.projection = self._projection()
        self.teacher_projection = self._projection()
        self.prediction = Mlp(
            options.projection_dim,
            options.hidden_dim,
            options.projection_dim,
            last_norm="plain" if isinstance(encoder, VisionTransformer) else "none",
        )
        start_equal(self.teacher, self.encoder)
        start_equal(self.teacher_projection, self.projection)

    def _projection(self) -> Mlp:
        """Three layers on a vision transformer, two on others."""
        layers = 3 if isinstance(self.encoder, VisionTransformer) else 2
        return Mlp(
            feature_dim(self.encoder),
            self.options.hidden_dim,
            self.options.projection_dim,
            layers,
            last_norm="plain",
        )

    @override
    def param_groups(self) -> list[dict[str, object]]:
        """Everything decays, biases and norms too."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "decay": True}]

    @override
    def before_step(self, progress: Progress) -> None:
        """Before this step's targets are made."""
        momentum = cosine(progress.fraction, self.options.teacher_momentum, 1.0)
        follow(self.teacher.parameters(), self.encoder.parameters(), momentum)
        follow(self.teacher_projection.parameters(), self.projection.parameters(), momentum)

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "prediction" and "target" [B, 2, D] by view, not normalised."""
        predictions = [self.prediction(self.projection(self.encoder(x))) for x in batch.views]
        with torch.no_grad():
            targets = [self.teacher_projection(self.teacher(x)) for x in batch.views]
        return {"prediction": torch.stack(predictions, 1), "target": torch.stack(targets, 1)}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        loss, target_found = moco_v3_loss(
            embeddings["prediction"],
            gather_rows(embeddings["target"]),
            rank() * len(batch),
            self.options.temperature,
        )
        return {"loss": loss, "target_found": target_found.float().mean()}


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> MocoV3:
    """Raises ConfigError where the augmentation has not two views of one size."""
    if len(facts.view_pixels) != 2 or len(set(facts.view_pixels)) != 1:
        raise ConfigError(
            f"moco_v3 needs two views of one size, and the augmentation's views have "
            f"{list(facts.view_pixels)} pixels"
        )
    try:
        # timm's name for Xavier on linear layers, on q, k and v each by itself.
        encoder = make_encoder(weight_init="moco")
    except ConfigError:
        encoder = make_encoder()
    if isinstance(encoder, VisionTransformer):
        prepare(encoder, objective, from_scratch=facts.init is None)
    return MocoV3(objective, encoder, make_encoder())


@torch.no_grad()
def prepare(encoder: VisionTransformer, objective: Objective, *, from_scratch: bool) -> None:
    """Fixed sine-cosine positions, and a patch projection that is drawn as the code draws it.

    Uniform by Xavier's rule for the flattened patch (moco-v3 `vits.py`, `VisionTransformerMoCo`).
    What --init brought stays.
    """
    # timm types both as any module.
    projection, positions = encoder.patch_embed.proj, encoder.pos_embed
    if isinstance(positions, nn.Parameter):
        positions.requires_grad_(False)
        if from_scratch:
            prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
            grid: tuple[int, int] = encoder.patch_embed.grid_size
            positions.copy_(sine_cosine(encoder.embed_dim, *grid, prefix_tokens=prefix))
    if isinstance(projection, nn.Conv2d):
        if from_scratch:
            bound = math.sqrt(6 / (projection.weight[0].numel() + encoder.embed_dim))
            nn.init.uniform_(projection.weight, -bound, bound)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        projection.requires_grad_(not objective.freeze_patch_projection)


_VIT = Optim(name="adamw", learning_rate=1.5e-4, warmup_epochs=40, weight_decay=0.1)

PRESETS = {
    "imagenet": Preset(
        backbone="vit_base_patch16_224",
        augmentation=recipes.moco_v3(),
        test=recipes.center(interpolation="bilinear"),
        optim=_VIT,
        batch_size=4096,
        epochs=300,
        objective=Objective(),
        notes="Linear 76.7, fine-tuned 83.2 (the code's README).",
    ),
    "vit_s16_imagenet": Preset(
        backbone="vit_small_patch16_224",
        backbone_options={"num_heads": 12},  # timm has 6
        augmentation=recipes.moco_v3(),
        test=recipes.center(interpolation="bilinear"),
        optim=_VIT,
        batch_size=4096,
        epochs=300,
        objective=Objective(),
        notes="Linear 73.2, fine-tuned 81.4 (the code's README).",
    ),
    "resnet50_imagenet": Preset(
        backbone="resnet50",
        augmentation=recipes.moco_v3(crop_min=0.2),
        test=recipes.center(interpolation="bilinear"),
        optim=Optim(name="lars", learning_rate=0.6, warmup_epochs=10, weight_decay=1e-6),
        batch_size=4096,
        epochs=100,
        objective=Objective(temperature=1.0),
        notes="Linear 68.9 (the code's README). 72.8 after 300 epochs and 74.6 after 1000, both "
        "with a learning rate of 0.3; 1000 with weight decay 1.5e-6 and teacher momentum 0.996.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.moco_v3(32, crop_min=0.2, blur=False),
        test=recipes.center(32, 32),
        optim=Optim(name="adamw", learning_rate=2e-3, warmup_epochs=0.5, weight_decay=1e-4),
        batch_size=256,
        epochs=10,
        objective=Objective(projection_dim=128, hidden_dim=512, teacher_momentum=0.97),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
