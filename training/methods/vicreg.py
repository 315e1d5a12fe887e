"""VICReg: pull two views together; keep every channel's variance up and channels uncorrelated.

Bardes et al. 2022, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
Learning" (arXiv 2105.04906); code: facebookresearch/vicreg. Each view is regularised by itself, so
the collapse is ruled out by the loss and not by the architecture, and the two branches need have
nothing in common. Gains from very wide embeddings. Costs: two passes per image, and 2 D^2 numbers
that the ranks add up in each step.

As in the code, not in the equations: the invariance is a mean over channels too; the variance term
is the mean of the two views', not their sum; hidden linear layers have a bias, the last one none;
the two views are two batches to batch norm.
Deviations: covariances are summed over the ranks instead of gathering embeddings, with the same
result (blocks/correlation.py); the loss is float32 under autocast. With accumulation they are those
of a micro-batch, unless gradients are cached.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.correlation import centered, off_diagonal, sum_for_all
from headrace.training.blocks.cosine import spread
from headrace.training.blocks.heads import Mlp, feature_dim
from headrace.training.collectives import world_size
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset

_EPSILON = 1e-4
"""Keeps the gradient of the standard deviation finite (eq. 2)."""


@dataclass(frozen=True)
class Objective:
    """VICReg's hyper-parameters."""

    hidden_dim: int = 8192
    projection_dim: int = 8192
    projection_layers: int = 3
    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0


def invariance(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference of two views' embeddings [n, D], float32 scalar.

    Eq. 5 divided by D; vicreg `main_vicreg.py`, `VICReg.forward` (`repr_loss`).
    """
    return F.mse_loss(first.float(), second.float())


def variance_and_covariance(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """What is asked of one view's embeddings [n, D] over all ranks' rows; two float32 scalars.

    Variance, eq. 1 and 2: the mean over channels of max(0, 1 - sqrt(var + 1e-4)). Covariance, eq. 3
    and 4: the sum of squares of C beside its diagonal, divided by D. Both var and C are unbiased.
    vicreg `main_vicreg.py`, `VICReg.forward` (`std_loss`, `cov_loss`).
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = centered(embeddings)
        samples = len(embeddings) * world_size()
        covariance = sum_for_all(embeddings.T @ embeddings) / (samples - 1)
        deviations = (covariance.diagonal() + _EPSILON).sqrt()
        channels = embeddings.shape[1]
        return F.relu(1 - deviations).mean(), off_diagonal(covariance).square().sum() / channels


def vicreg_loss(first: Tensor, second: Tensor, weights: Objective) -> dict[str, Tensor]:
    """Eq. 6 over [n, D] and [n, D], row by row the views of a sample: "loss" and its three terms.

    The terms have no weights yet; "variance" is the mean of the two views', "covariance" their sum.
    """
    terms = [variance_and_covariance(view) for view in (first, second)]
    agreement = invariance(first, second)
    variance = (terms[0][0] + terms[1][0]) / 2
    covariance = terms[0][1] + terms[1][1]
    loss = (
        weights.invariance_weight * agreement
        + weights.variance_weight * variance
        + weights.covariance_weight * covariance
    )
    return {
        "loss": loss,
        "invariance": agreement.detach(),
        "variance": variance.detach(),
        "covariance": covariance.detach(),
    }


class VicReg(Method):
    """The encoder and an expander; no state besides batch norm's."""

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
            hidden_bias=True,
        )

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "projection" [B, 2, D], not normalised."""
        projections = [self.projection(self.encoder(x)) for x in batch.views]
        return {"projection": torch.stack(projections, dim=1)}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        projection = embeddings["projection"]
        terms = vicreg_loss(projection[:, 0], projection[:, 1], self.options)
        return {**terms, "spread": spread(projection)}


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> VicReg:
    """Raises ConfigError where the augmentation has not two views."""
    if len(facts.view_pixels) != 2:
        raise ConfigError(
            f"vicreg needs two views, and the augmentation has {len(facts.view_pixels)}"
        )
    return VicReg(objective, make_encoder)


def _imagenet(epochs: int, batch_size: int, learning_rate: float, notes: str) -> Preset:
    return Preset(
        backbone="resnet50",
        # BYOL's views by torchvision, in DINO's order of operations.
        augmentation=replace(recipes.dino(local_count=0, global_scale=(0.08, 1.0)), name="vicreg"),
        test=recipes.center(interpolation="bilinear"),
        optim=Optim(
            name="lars",
            learning_rate=learning_rate,
            final_learning_rate=learning_rate / 1000,
            warmup_epochs=10,
            weight_decay=1e-6,
        ),
        batch_size=batch_size,
        epochs=epochs,
        objective=Objective(),
        notes=notes,
    )


PRESETS = {
    "imagenet": _imagenet(1000, 2048, 0.2, "Linear 73.2 (the code's README); 32 V100."),
    "imagenet_100": _imagenet(100, 512, 0.3, "The code's command for 100 epochs on 8 GPUs."),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=replace(
            recipes.dino(32, local_count=0, global_scale=(0.2, 1.0), blur=False), name="vicreg"
        ),
        test=recipes.center(32, 32),
        optim=Optim(learning_rate=4e-3, warmup_epochs=0.5, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(hidden_dim=512, projection_dim=512, projection_layers=2),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
