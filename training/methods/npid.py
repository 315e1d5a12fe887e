"""NPID: each image is a class of its own, whose weights are a remembered feature of it.

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
(arXiv 1805.01978); code: zhirongw/lemniscate.pytorch. An image is told from 4096 random others by a
bank of all images' features; noise-contrastive estimation saves the sum over all of them. One view
and one pass per image, the cheapest of the contrastive methods; the bank takes 656 MB for ImageNet
and every row of it is an epoch old.

As in the code: Z is estimated once, from the first batch; noise may hold the image itself; the bank
moves by `bank_momentum` instead of the paper's proximal term, which the code does not have; weight
decay on everything.
Deviations: probabilities are logarithms in float32; Z is the mean over the *global* first batch
(with accumulation each micro-batch of the first step uses its own); batch norm spans all ranks. An
image that a batch holds several times moves its row once, by its first feature.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.recipe import Augmentation
from headrace.training.blocks.heads import feature_dim
from headrace.training.blocks.nce import FeatureBank, own_and_noise, unit
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset


@dataclass(frozen=True)
class Objective:
    """NPID's hyper-parameters."""

    loss: Literal["nce", "softmax"] = "nce"
    """softmax: over the own row and the noise's, as in the code's later model and CMC's code."""
    negatives: int = 4096
    """Noise rows per image; softmax with 0: all rows of the bank, as --nce-k 0 of the code."""
    temperature: float = 0.07
    """0.1 on CIFAR."""
    projection_dim: int = 128
    bank_momentum: float = 0.5
    """Share that a row of the bank keeps of itself."""
    proximal_weight: float = 0.0
    """Of the paper's proximal term: the squared distance between an image's feature and its row
    (eq. 9)."""


def proximal_term(features: Tensor, rows: Tensor) -> Tensor:
    """Squared distance [n, D] to [n, D], mean over n: eq. 9 of the paper without its weight."""
    return (features - rows).square().sum(dim=1).mean()


class Npid(Method):
    """The encoder, one linear layer and the bank."""

    depends_on_length = False

    def __init__(self, options: Objective, make_encoder: MakeEncoder, samples: int) -> None:
        super().__init__()
        self.options = options
        self.encoder = make_encoder()
        self.projection = nn.Linear(feature_dim(self.encoder), options.projection_dim)
        self.bank = FeatureBank(samples, options.projection_dim)

    @property
    @override
    def knows_training_images_only(self) -> bool:
        return True

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Embeddings: "projection" [B, D], not normalised."""
        return {"projection": self.projection(self.encoder(batch.views[0]))}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        options, features = self.options, unit(embeddings["projection"])
        if options.negatives > 0:
            logits = self._logits(features, batch.ids, progress)
            loss = self.bank.loss(logits, options.loss, progress)
            own_found = logits.argmax(dim=1) == 0
        else:
            with torch.autocast(features.device.type, enabled=False):
                logits = features @ self.bank.memory.rows.T / options.temperature
            loss = F.cross_entropy(logits, batch.ids)
            own_found = logits.argmax(dim=1) == batch.ids
        if options.proximal_weight > 0:
            rows = self.bank.memory(batch.ids)
            loss = loss + options.proximal_weight * proximal_term(features, rows)
        return {"loss": loss, "own_found": own_found.float().mean()}

    def _logits(self, features: Tensor, ids: Tensor, progress: Progress) -> Tensor:
        numbers = own_and_noise(ids, self.options.negatives, len(self.bank.memory), progress)
        return self.bank.compare(features, numbers, self.options.temperature)

    @override
    @torch.no_grad()
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """Z of the first batch is kept; rows follow the features that the loss has seen."""
        features = unit(torch.cat([entry["projection"] for entry in embeddings]))
        ids = torch.cat([batch.ids for batch in batches])
        if self.options.loss == "nce" and progress.step == 0:
            self.bank.settle(self._logits(features, ids, progress))
        self.bank.follow(ids, features, self.options.bank_momentum)

    @override
    def param_groups(self) -> list[dict[str, object]]:
        return [{"params": list(self.parameters()), "decay": True}]


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Npid:
    """Raises ConfigError for several views, or NCE without noise."""
    if len(facts.view_pixels) != 1:
        raise ConfigError(f"npid takes one view, not the {len(facts.view_pixels)} given")
    least = 1 if objective.loss == "nce" else 0
    if objective.negatives < least:
        raise ConfigError(
            f"--objective.negatives is {objective.negatives}; npid's {objective.loss} loss needs "
            f"at least {least}"
        )
    return Npid(objective, make_encoder, facts.train_samples)


def augmentation(pixels: int = 224) -> Augmentation:
    """One of MoCo v1's views; lemniscate `main.py`."""
    moco = recipes.moco_v1(pixels)
    return replace(moco, name="npid", views=(replace(moco.views[0], count=1),))


_OPTIM = Optim(
    name="sgd",
    learning_rate=0.03,
    warmup_epochs=0,
    schedule="steps",
    milestones=(120 / 200, 160 / 200),
    weight_decay=1e-4,
)

PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        backbone_options={"zero_init_last": False},
        augmentation=augmentation(),
        test=recipes.center(interpolation="bilinear"),
        optim=_OPTIM,
        batch_size=256,
        epochs=200,
        objective=Objective(),
        notes="kNN of the projection 46.8 (the code's README; k 200); linear 54.99 of its weights "
        "(VISSL), 56.5 by CMC's code.",
    ),
    "imagenet_softmax": Preset(
        backbone="resnet50",
        backbone_options={"zero_init_last": False},
        augmentation=augmentation(),
        test=recipes.center(interpolation="bilinear"),
        optim=_OPTIM,
        batch_size=256,
        epochs=200,
        objective=Objective(loss="softmax", negatives=65536),
        notes="Linear 58.5 (the code's README, its updated model); CMC's code has the same with "
        "16384. A rank with 32 images reads 1.1 GB of the bank in a step.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=augmentation(32),
        test=recipes.center(32, 32),
        optim=Optim(name="adamw", learning_rate=2e-3, warmup_epochs=1, weight_decay=1e-4),
        batch_size=128,
        epochs=10,
        objective=Objective(negatives=1024, temperature=0.1, projection_dim=64),
        notes="The code's temperature for CIFAR-10; the rest is sized for two CPU cores.",
    ),
}
