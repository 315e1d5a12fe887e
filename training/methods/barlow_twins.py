"""Barlow Twins: make the cross-correlation of two views' embeddings the identity matrix.

Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (arXiv
2103.03230); code: facebookresearch/barlowtwins. Ones on the diagonal make a channel say the same of
both views, zeros beside it make channels say different things; neither negatives nor a predictor,
nor a teacher. Gains from very wide embeddings. Costs: two passes per image, and D^2 numbers that
the ranks add up in each step.

As in the code: channels are standardised as batch norm does (biased variance plus 1e-5); biases and
norms have a learning rate of their own; the two views are two batches to batch norm.
Deviations: the loss is float32 under autocast. The code's all-reduce hands each rank its own share
of the gradient alone (blocks/correlation.py), so that on R ranks it trains on 1/R of its loss's
gradient. LARS takes that out of the weights' step, but not out of those of biases and norms, nor
out of weight decay's part: `loss_scale` = 1/32 stands for the paper's 32 GPUs. With
accumulation the correlations are those of a micro-batch, unless gradients are cached.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.correlation import centered, off_diagonal, sum_for_all
from headrace.training.blocks.cosine import spread
from headrace.training.blocks.heads import Mlp, feature_dim
from headrace.training.collectives import world_size
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset

_EPSILON = 1e-5
"""Of the code's batch norm."""


@dataclass(frozen=True)
class Objective:
    """Barlow Twins' hyper-parameters."""

    hidden_dim: int = 8192
    projection_dim: int = 8192
    projection_layers: int = 3
    off_diagonal_weight: float = 0.0051
    """Lambda: of the redundancy against the invariance."""
    loss_scale: float = 1.0
    """Multiplies the loss; for optimisers to which that makes a difference."""
    bias_learning_rate_scale: float = 1.0
    """Learning rate of biases and norms, as a multiple of that of the weights."""


def cross_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Eq. 2: c_ij = sum_b z1_bi z2_bj / (sqrt(sum_b z1_bi^2) sqrt(sum_b z2_bj^2)), over all ranks.

    first, second: [n, D], this rank's rows; z are they minus their mean over all ranks' rows.
    Returns float32 [D, D], the same on every rank. A variance counts for 1e-5 more than it is, as
    in barlowtwins `main.py`, `BarlowTwins.forward` (`self.bn`).
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = centered(first), centered(second)
        samples = len(first) * world_size()
        squares = torch.stack([first.square().sum(dim=0), second.square().sum(dim=0)])
        scales = (sum_for_all(squares) / samples + _EPSILON).rsqrt()
        covariance = sum_for_all(first.T @ second) / samples
        return scales[0][:, None] * covariance * scales[1]


def barlow_twins_loss(correlation: Tensor, off_diagonal_weight: float) -> Tensor:
    """Eq. 1: sum_i (1 - c_ii)^2 + lambda sum_i sum_{j != i} c_ij^2, of c [D, D]; a scalar."""
    invariance = (1 - correlation.diagonal()).square().sum()
    return invariance + off_diagonal_weight * off_diagonal(correlation).square().sum()


class BarlowTwins(Method):
    """The encoder and a projection head; no state besides batch norm's."""

    depends_on_length = False
    least_samples = 2

    def __init__(self, options: Objective, make_encoder: MakeEncoder) -> None:
        super().__init__()
        self.options = options
        self.encoder = make_encoder()
        self.projection = Mlp(
            feature_dim(self.encoder),
            options.hidden_dim,
            options.projection_dim,
            options.projection_layers,
        )

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "projection" [B, 2, D], not standardised."""
        projections = [self.projection(self.encoder(x)) for x in batch.views]
        return {"projection": torch.stack(projections, dim=1)}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        projection = embeddings["projection"]
        correlation = cross_correlation(projection[:, 0], projection[:, 1])
        loss = barlow_twins_loss(correlation, self.options.off_diagonal_weight)
        return {
            "loss": self.options.loss_scale * loss,
            "correlation": correlation.detach().diagonal().mean(),
            "spread": spread(projection),
        }

    @override
    def param_groups(self) -> list[dict[str, object]]:
        weights, others = super().param_groups()
        return [weights, {**others, "learning_rate_scale": self.options.bias_learning_rate_scale}]


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> BarlowTwins:
    """Raises ConfigError where the augmentation has not two views."""
    if len(facts.view_pixels) != 2:
        raise ConfigError(
            f"barlow_twins needs two views, and the augmentation has {len(facts.view_pixels)}"
        )
    return BarlowTwins(objective, make_encoder)


PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        # BYOL's views by torchvision, in DINO's order of operations.
        augmentation=replace(
            recipes.dino(local_count=0, global_scale=(0.08, 1.0)), name="barlow_twins"
        ),
        test=recipes.center(interpolation="bilinear"),
        optim=Optim(
            name="lars",
            learning_rate=0.2,
            final_learning_rate=2e-4,
            warmup_epochs=10,
            weight_decay=1e-6,
        ),
        batch_size=2048,
        epochs=1000,
        objective=Objective(loss_scale=1 / 32, bias_learning_rate_scale=0.0048 / 0.2),
        notes="Linear 73.5 (the code's README; 73.2 in the paper); 124 hours on 32 V100.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=replace(
            recipes.dino(32, local_count=0, global_scale=(0.2, 1.0), blur=False),
            name="barlow_twins",
        ),
        test=recipes.center(32, 32),
        optim=Optim(learning_rate=4e-3, warmup_epochs=0.5, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(hidden_dim=512, projection_dim=512, projection_layers=2),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
