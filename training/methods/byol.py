"""BYOL: predict, from one view, a slowly moving copy's embedding of another view; no negatives.

Grill et al. 2020, "Bootstrap Your Own Latent" (arXiv 2006.07733); code:
google-deepmind/deepmind-research, `byol/`. An online network with a predictor on top runs after a
target, its own moving average, which has none; that asymmetry, the average and batch norm keep the
constant solution away. Less sensitive to batch size and colours than contrast. Costs: two passes
forward and back, and two forward, per image.

As in the code: the target starts from weights of its own, not as a copy; it follows parameters
alone, step by step, after the optimiser, and its batch norms train on its own batches; the two
views are two batches to batch norm; hidden linear layers have a bias, last ones none.
Deviations: no classifier on the side; layers start as timm's and torch's do (convolutions normal by
fan-out, linear ones uniform), not as Haiku's (both truncated normal by fan-in); convolutions with
stride pad both sides alike, where Haiku's "SAME" pads the end more; the loss is float32 under
autocast. Judged is the online encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.cosine import cosine_to_other_view, spread
from headrace.training.blocks.heads import Mlp, feature_dim
from headrace.training.blocks.teacher import follow
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset
from headrace.training.schedules import cosine


@dataclass(frozen=True)
class Objective:
    """BYOL's hyper-parameters."""

    hidden_dim: int = 4096
    """Width of the hidden layer, of the projection and of the prediction."""
    projection_dim: int = 256
    """Width in which predictions are compared with targets."""
    teacher_momentum: float = 0.996
    """At the start; reaches 1 on a cosine. Smaller for short runs."""


def byol_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """|q / |q| - z / |z||^2 = 2 - 2 cos(q, z), both directions added: a float32 scalar in 0..8.

    predictions: [n, 2, D] of the online network; targets: [n, 2, D] of the target network, taken as
    constant. View v's prediction meets view 1 - v's target; the mean is over the n samples. Eq. 2
    of the paper, symmetrised; byol `byol_experiment.py`, `loss_fn`.
    """
    return (2 - 2 * cosine_to_other_view(predictions, targets)).sum(dim=1).mean()


class Byol(Method):
    """`teacher` and `teacher_projection` follow `encoder` and `projection`, which are trained."""

    def __init__(self, options: Objective, make_encoder: MakeEncoder) -> None:
        super().__init__()
        self.options = options
        hidden, out = options.hidden_dim, options.projection_dim
        self.encoder = make_encoder()
        width = feature_dim(self.encoder)
        self.projection = Mlp(width, hidden, out, hidden_bias=True)
        self.prediction = Mlp(out, hidden, out, hidden_bias=True)
        self.teacher = make_encoder().requires_grad_(False)
        self.teacher_projection = Mlp(width, hidden, out, hidden_bias=True).requires_grad_(False)

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "prediction" and "target" [B, 2, D], not normalised."""
        predictions = [self.prediction(self.projection(self.encoder(x))) for x in batch.views]
        with torch.no_grad():
            targets = [self.teacher_projection(self.teacher(x)) for x in batch.views]
        return {"prediction": torch.stack(predictions, 1), "target": torch.stack(targets, 1)}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        loss = byol_loss(embeddings["prediction"], embeddings["target"])
        return {"loss": loss, "spread": spread(embeddings["target"])}

    @override
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """Eq. 1, with the momentum of this step: 1 - (1 - m) (cos(pi k / K) + 1) / 2."""
        momentum = cosine(progress.fraction, self.options.teacher_momentum, 1.0)
        follow(self.teacher.parameters(), self.encoder.parameters(), momentum)
        follow(self.teacher_projection.parameters(), self.projection.parameters(), momentum)


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Byol:
    """Raises ConfigError where the augmentation has not two views."""
    if len(facts.view_pixels) != 2:
        raise ConfigError(
            f"byol needs two views, and the augmentation has {len(facts.view_pixels)}"
        )
    return Byol(objective, make_encoder)


def _imagenet(
    epochs: int, learning_rate: float, weight_decay: float, momentum: float, notes: str
) -> Preset:
    """What the presets of byol `configs/byol.py` share."""
    return Preset(
        backbone="resnet50",
        augmentation=recipes.byol(),
        test=recipes.center(),
        optim=Optim(
            name="lars",
            learning_rate=learning_rate,
            warmup_epochs=10,
            weight_decay=weight_decay,
        ),
        batch_size=4096,
        epochs=epochs,
        objective=Objective(teacher_momentum=momentum),
        notes=notes,
    )


PRESETS = {
    "imagenet": _imagenet(
        1000,
        0.2,
        1.5e-6,
        0.996,
        "Linear 74.3 in the paper, 74.4 with the published weights; 8 hours on 512 TPU v3. timm "
        "starts the last norm of each residual block at 0, as the code does and the paper did not.",
    ),
    "imagenet_300": _imagenet(300, 0.3, 1e-6, 0.99, "The code's preset for 300 epochs."),
    "imagenet_100": _imagenet(100, 0.45, 1e-6, 0.99, "The code's preset for 100 epochs."),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.byol(32, blur=False),
        test=recipes.center(32, 32),
        optim=Optim(learning_rate=4e-3, warmup_epochs=0.5, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(hidden_dim=512, projection_dim=128, teacher_momentum=0.99),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
