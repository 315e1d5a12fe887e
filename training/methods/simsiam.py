"""SimSiam: one view's prediction meets another view's embedding, and a stop-gradient is enough.

Chen & He 2020, "Exploring Simple Siamese Representation Learning" (arXiv 2011.10566); code:
facebookresearch/simsiam. BYOL without the moving average: one network with a predictor, whose
target is its own embedding, held constant. Works with plain SGD and ordinary batches, and has
nothing but the network to keep; collapses without the stop-gradient. Costs: two passes per image.

As in the code: the learning rate moves per epoch, the predictor's stays at its peak
(`--fix-pred-lr`); weight decay is
on everything; the two views are two batches to batch norm; the last layer of the projection has
no bias (there: one that is frozen, which the batch norm behind it takes out).
Deviations: the loss is float32 under autocast.
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
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset


@dataclass(frozen=True)
class Objective:
    """SimSiam's hyper-parameters."""

    projection_dim: int = 2048
    projection_layers: int = 3
    """2 on CIFAR (appendix D). Hidden ones are as wide as the encoder's features."""
    prediction_dim: int = 512
    """Width of the prediction's hidden layer: a quarter of its ends."""


def simsiam_loss(predictions: Tensor, projections: Tensor) -> Tensor:
    """-(cos(p1, z2) + cos(p2, z1)) / 2, mean over samples: a float32 scalar in -1..1.

    predictions, projections: [n, 2, D]; the projections are taken as constant. Eq. 1 to 4 of the
    paper; simsiam `main_simsiam.py`, `train`.
    """
    return -cosine_to_other_view(predictions, projections).mean()


class SimSiam(Method):
    """The encoder, a projection and a prediction head; no state besides batch norm's."""

    depends_on_length = False

    def __init__(self, options: Objective, make_encoder: MakeEncoder) -> None:
        super().__init__()
        self.encoder = make_encoder()
        width, out = feature_dim(self.encoder), options.projection_dim
        self.projection = Mlp(width, width, out, options.projection_layers, last_norm="plain")
        self.prediction = Mlp(out, options.prediction_dim, out, last_bias=True)

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "prediction" [B, 2, D] and, without gradient, "projection" [B, 2, D], none
        of them normalised."""
        projections = [self.projection(self.encoder(x)) for x in batch.views]
        predictions = [self.prediction(z) for z in projections]
        return {
            "prediction": torch.stack(predictions, dim=1),
            "projection": torch.stack(projections, dim=1).detach(),
        }

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        loss = simsiam_loss(embeddings["prediction"], embeddings["projection"])
        return {"loss": loss, "spread": spread(embeddings["projection"])}

    @override
    def param_groups(self) -> list[dict[str, object]]:
        """Weight decay on everything; the predictor's learning rate is fixed."""
        trained = [*self.encoder.parameters(), *self.projection.parameters()]
        return [
            {"params": [p for p in trained if p.requires_grad], "decay": True},
            {
                "params": list(self.prediction.parameters()),
                "decay": True,
                "fixed_learning_rate": True,
            },
        ]


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> SimSiam:
    """Raises ConfigError where the augmentation has not two views."""
    if len(facts.view_pixels) != 2:
        raise ConfigError(
            f"simsiam needs two views, and the augmentation has {len(facts.view_pixels)}"
        )
    return SimSiam(objective, make_encoder)


def _imagenet(epochs: int, notes: str) -> Preset:
    """timm's ResNets start the last norm of each residual block at 0, as the code's do."""
    return Preset(
        backbone="resnet50",
        augmentation=recipes.moco_v2(),
        test=recipes.center(interpolation="bilinear"),
        optim=Optim(
            name="sgd", learning_rate=0.05, warmup_epochs=0, per_epoch=True, weight_decay=1e-4
        ),
        batch_size=512,
        epochs=epochs,
        objective=Objective(),
        notes=notes,
    )


PRESETS = {
    "imagenet": _imagenet(100, "Linear 68.1 (the code's README); 8 V100."),
    "imagenet_800": _imagenet(800, "Linear 71.3 (table 4, with batches of 256)."),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.moco_v2(32, blur=False),
        test=recipes.center(32, 32),
        optim=Optim(name="sgd", learning_rate=0.06, warmup_epochs=0, weight_decay=5e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(projection_dim=512, projection_layers=2, prediction_dim=128),
        notes="The paper's augmentation, depth of the head and weight decay for CIFAR-10 (appendix "
        "D); the network and the length are sized for two CPU cores.",
    ),
}
