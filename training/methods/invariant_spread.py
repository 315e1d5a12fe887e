"""Invariant & spreading: two views attract each other, and each repels every other image by name.

Ye et al. 2019, "Unsupervised Embedding Learning via Invariant and Spreading Instance Feature"
(arXiv 1904.03436); code: mangye16/Unsupervised_Embedding_Learning. NPID's classes with live
features instead of a bank: the batch classifies itself, an image as itself (invariant) and all
others as not that (spreading). No memory; the batch is its negatives.

As in the code: both views are classified among all views of the batch, which are constants there,
so that the gradient of a view's loss reaches this view alone; weight decay on everything.
Deviations: probabilities are logarithms in float32; the batch is the global one, and so is batch
norm (with accumulation the negatives are those of a micro-batch).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.recipe import Augmentation
from headrace.training.blocks.heads import feature_dim
from headrace.training.collectives import gather_rows, rank
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset

_LARGEST_LOG = -1e-6
"""Keeps log(1 - P) finite where float32 takes P for 1."""


@dataclass(frozen=True)
class Objective:
    """The hyper-parameters of Ye et al."""

    temperature: float = 0.1
    projection_dim: int = 128
    negative_weight: float = 1.0
    """The code's negM (--batch-m): weighs negatives in the denominator and the spreading term."""


def spreading_loss(
    local: Tensor, everyone: Tensor, first_row: int, temperature: float, negative_weight: float = 1
) -> tuple[Tensor, Tensor]:
    """-log P(i'|x_i) - w * sum over negatives j of log(1 - P(j|x_i)), mean over the 2n local views.

    local: embeddings [n, 2, D] of n samples; everyone: [B, 2, D] of the whole batch, constant, in
    which `local` begins at `first_row`. Rows need not be normalised. P(j|x_i) is exp(x_i x_j / t)
    over the sum of the partner's and w times the 2B - 2 negatives'. Also bool [2n]: whether the
    partner was the nearest. Section 3 of the paper; `BatchAverage.py`, `BatchCriterion.forward`.
    """
    samples = len(local)
    with torch.autocast(local.device.type, enabled=False):
        # View-major rows: view v of sample i is row v * B + i.
        queries = F.normalize(local.float(), dim=-1).transpose(0, 1).flatten(0, 1)
        keys = F.normalize(everyone.detach().float(), dim=-1).transpose(0, 1).flatten(0, 1)
        logits = queries @ keys.T / temperature
        sample_rows = torch.arange(first_row, first_row + samples, device=local.device)
        own_rows = torch.cat([sample_rows, sample_rows + len(everyone)])
        partner_rows = own_rows.roll(samples)
        own, partner = own_rows[:, None], partner_rows[:, None]
        # A weight in a sum of exponentials is a shift of its exponent; the own view has none.
        shift = torch.full_like(logits, math.log(negative_weight))
        shift = shift.scatter(1, partner, 0.0).scatter(1, own, float("-inf"))
        log_total = (logits + shift).logsumexp(dim=1, keepdim=True)
        log_p = logits - log_total
        invariant = log_p.gather(1, partner).squeeze(1)
        own_and_partner = torch.cat([own, partner], dim=1)
        log_negatives = log_p.scatter(1, own_and_partner, float("-inf")).clamp(max=_LARGEST_LOG)
        spreading = torch.log1p(-log_negatives.exp()).sum(dim=1)
        partner_found = log_p.scatter(1, own, float("-inf")).argmax(dim=1) == partner_rows
        return -(invariant + negative_weight * spreading).mean(), partner_found


class InvariantSpread(Method):
    """The encoder and one linear layer; no state besides batch norm's."""

    depends_on_length = False
    least_samples = 2

    def __init__(self, options: Objective, make_encoder: MakeEncoder) -> None:
        super().__init__()
        self.options = options
        self.encoder = make_encoder()
        self.projection = nn.Linear(feature_dim(self.encoder), options.projection_dim)

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "projection" [B, 2, D], not normalised."""
        projections = self.projection(self.encoder(torch.cat(batch.views)))
        return {"projection": torch.stack(projections.chunk(2), dim=1)}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        local = embeddings["projection"]
        loss, partner_found = spreading_loss(
            local,
            gather_rows(local),
            rank() * len(batch),
            self.options.temperature,
            self.options.negative_weight,
        )
        return {"loss": loss, "partner_found": partner_found.float().mean()}

    @override
    def param_groups(self) -> list[dict[str, object]]:
        return [{"params": list(self.parameters()), "decay": True}]


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> InvariantSpread:
    """Raises ConfigError where the augmentation has not two views of one size, or for a weight
    that is not above 0."""
    if len(facts.view_pixels) != 2 or len(set(facts.view_pixels)) != 1:
        raise ConfigError(
            f"invariant_spread needs two views of one size, and the augmentation's views have "
            f"{list(facts.view_pixels)} pixels"
        )
    if objective.negative_weight <= 0:
        raise ConfigError(
            f"--objective.negative-weight is {objective.negative_weight}; it must be above 0"
        )
    return InvariantSpread(objective, make_encoder)


def augmentation(pixels: int = 224) -> Augmentation:
    """MoCo v1's views, but jittered before some turn grey; the code's `demo_seen.py`."""
    moco = recipes.moco_v1(pixels)
    (view,) = moco.views
    crop, gray, jitter, flip = view.ops
    view = replace(view, ops=(crop, jitter, gray, flip))
    return replace(moco, name="invariant_spread", views=(view,))


PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        backbone_options={"zero_init_last": False},
        augmentation=augmentation(),
        test=recipes.center(interpolation="bilinear"),
        optim=Optim(
            name="sgd",
            learning_rate=0.03,
            warmup_epochs=0,
            schedule="steps",
            milestones=(120 / 200, 160 / 200),
            weight_decay=1e-4,
        ),
        batch_size=256,
        epochs=200,
        objective=Objective(),
        notes="The paper has no ImageNet run: this is NPID's recipe with the paper's loss, without "
        "a published number.",
    ),
    "cifar_resnet18": Preset(
        backbone="resnet18",
        backbone_options={"zero_init_last": False},
        augmentation=augmentation(32),
        test=recipes.center(32, 32),
        optim=Optim(
            name="sgd",
            learning_rate=0.03,
            scale_with_batch=False,
            warmup_epochs=0,
            schedule="steps",
            milestones=(120 / 200, 160 / 200),
            weight_decay=5e-4,
        ),
        batch_size=128,
        epochs=200,
        objective=Objective(),
        notes="The paper's CIFAR-10 run: kNN of the projection 83.6 (k 200). Its ResNet-18 has a "
        "stem for 32 pixels, timm's one for 224; its second milestone halves the rate.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=augmentation(32),
        test=recipes.center(32, 32),
        optim=Optim(name="adamw", learning_rate=2e-3, warmup_epochs=1, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(projection_dim=64),
        notes="The paper's temperature and batch for CIFAR-10; the rest is for two CPU cores.",
    ),
}
