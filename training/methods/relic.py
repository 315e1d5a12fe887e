"""RELIC: contrast two views, and make what each says about the batch the same under either style.

Mitrovic et al. 2021, "Representation Learning via Invariant Causal Mechanisms" (arXiv 2010.07922).
No training code was published (filipbasara0/relic, unofficial, compares rows with columns of one
matrix and learns its temperature). InfoNCE picks a picture's target out of the batch; a divergence
between the two distributions over the batch that a picture's two views give keeps the pick from
depending on the style. Costs: BYOL's, two passes forward and back and two forward, and a batch of
thousands.

From the paper: eq. 3; appendix E: BYOL's networks and average, LARS, schedule and batch. Not in the
paper, and chosen here: the temperature (SimCLR's), the weight of the penalty, the factor 1 of each
direction, and that the distribution that the other one is compared with is taken as constant (in
its successor's text it is).
Deviations: the batch is the global one; convolutions start as timm's do (normal by fan-out; BYOL's
as truncated normal by fan-in, with other padding: byol.py); logits are float32 under autocast;
appendix E.1 names SimCLR's augmentations "as used in BYOL", with solarization: BYOL's views. Only
the variant with a target network is here, not the plain ResNet-50 (70.3).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.cosine import spread
from headrace.training.blocks.heads import Mlp, feature_dim
from headrace.training.blocks.teacher import follow
from headrace.training.collectives import gather_rows, rank
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset
from headrace.training.schedules import cosine


@dataclass(frozen=True)
class Objective:
    """RELIC's hyper-parameters."""

    temperature: float = 0.1
    invariance_weight: float = 1.0
    """Alpha: weight of the divergence between two views' distributions."""
    hidden_dim: int = 4096
    """Width of the hidden layer, of the projection and of the prediction."""
    projection_dim: int = 256
    """Width in which predictions are compared with targets."""
    teacher_momentum: float = 0.996
    """At the start; reaches 1 on a cosine. Smaller for short runs."""


def relic_loss(
    predictions: Tensor,
    targets: Tensor,
    first_row: int,
    *,
    temperature: float,
    invariance_weight: float,
) -> dict[str, Tensor]:
    """{"loss", "contrast", "invariance", "partner_found"}: float32 scalars, losses in nats.

    predictions: [n, 2, D] of this rank's samples; targets: [B, 2, D] of the whole batch, in which
    these begin at `first_row`, taken as constant. Rows need not be normalised. View v of sample i
    gives a distribution p_v over the B samples by its cosines with their targets of view 1 - v.
    contrast: -log p_v(i); invariance: KL(p_v || p_(1 - v)), the latter constant; each added over
    both v, its mean over the n samples. loss = contrast + invariance_weight * invariance: eq. 3,
    divided by N.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        queries = F.normalize(predictions.float(), dim=-1)
        keys = F.normalize(targets.detach().float(), dim=-1).flip(1)
        log_p = (torch.einsum("nvd,bvd->nvb", queries, keys) / temperature).log_softmax(dim=-1)
    own_rows = first_row + torch.arange(len(log_p), device=log_p.device)
    contrast = -log_p.gather(2, own_rows[:, None, None].expand(-1, 2, 1)).sum(dim=(1, 2)).mean()
    invariance = divergence(log_p, log_p.flip(1)).sum(dim=1).mean()
    partner_found = log_p.argmax(dim=-1) == own_rows[:, None]
    return {
        "loss": contrast + invariance_weight * invariance,
        "contrast": contrast.detach(),
        "invariance": invariance.detach(),
        "partner_found": partner_found.float().mean(),
    }


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last axis of log-probabilities [..., K] -> [...]; q constant."""
    return (log_p.exp() * (log_p - log_q.detach())).sum(dim=-1)


class Relic(Method):
    """`teacher` and `teacher_projection` follow `encoder` and `projection`, which are trained."""

    least_samples = 2

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
        targets = embeddings["target"]
        outputs = relic_loss(
            embeddings["prediction"],
            gather_rows(targets),
            rank() * len(batch),
            temperature=self.options.temperature,
            invariance_weight=self.options.invariance_weight,
        )
        return {**outputs, "spread": spread(targets)}

    @override
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """Appendix E.3: with the momentum 1 - (1 - m) (cos(pi k / K) + 1) / 2 of this step."""
        momentum = cosine(progress.fraction, self.options.teacher_momentum, 1.0)
        follow(self.teacher.parameters(), self.encoder.parameters(), momentum)
        follow(self.teacher_projection.parameters(), self.projection.parameters(), momentum)


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Relic:
    """Raises ConfigError where the augmentation has not two views."""
    if len(facts.view_pixels) != 2:
        raise ConfigError(
            f"relic needs two views, and the augmentation has {len(facts.view_pixels)}"
        )
    return Relic(objective, make_encoder)


PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        augmentation=recipes.byol(),
        test=recipes.center(),
        optim=Optim(name="lars", learning_rate=0.2, warmup_epochs=10, weight_decay=1.5e-6),
        batch_size=4096,
        epochs=1000,
        objective=Objective(),
        notes="Linear 74.8 in the paper (table 1), 0.5 above BYOL; it does not name the "
        "temperature and the weight of the penalty that this took.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.byol(32, blur=False),
        test=recipes.center(32, 32),
        optim=Optim(learning_rate=4e-3, warmup_epochs=0.5, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(
            temperature=0.2, hidden_dim=512, projection_dim=128, teacher_momentum=0.99
        ),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
