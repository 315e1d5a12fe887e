"""Supervised classification: the labels' cross-entropy on a linear layer.

He et al. 2015 (arXiv 1512.03385) for ResNets, Dosovitskiy et al. 2020 (arXiv 2010.11929) for ViTs;
code: PyTorch's examples `imagenet/main.py`. The yardstick for everything that learns without
labels. Samples without a label (-1) take no part in the loss, whichever rank holds them. Where the
recipe mixes samples the targets are mixed with the same weights, as timm has it.
Deviations: batch norm spans the global batch (the classic recipe: each GPU's 32 images); preset
`deit_s16_imagenet` keeps no average of weights, and its rates come an epoch earlier (see deit.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.classifier import (
    classifier_export,
    held_out_hits,
    labelled_per_rank,
    top1_share,
)
from headrace.training.blocks.drop_path import key_drop_paths, set_keys
from headrace.training.blocks.heads import feature_dim
from headrace.training.blocks.targets import cross_entropy
from headrace.training.blocks.weight_decay import token_free_groups
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset


@dataclass(frozen=True)
class Objective:
    """Hyper-parameters of supervised training."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes (Szegedy et al. 2015, section 7)."""
    drop_path: float = 0.0
    """Largest rate of stochastic depth, reached in the last block."""
    decay_everything: bool = False
    """Weight decay on biases and norms too, as ResNets were first trained."""


class Supervised(Method):
    """The encoder and one linear layer."""

    depends_on_length = False

    def __init__(self, options: Objective, make_encoder: MakeEncoder, num_classes: int) -> None:
        super().__init__()
        self.options = options
        drop_path = {"drop_path_rate": options.drop_path} if options.drop_path else {}
        self.encoder = key_drop_paths(make_encoder(**drop_path))
        self.classifier = nn.Linear(feature_dim(self.encoder), num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Scores "logits" [B, C]."""
        set_keys(self.encoder, batch.ids, [0], progress)
        return {"logits": self.classifier(self.encoder(batch.views[0]))}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        logits, labelled = embeddings["logits"], labelled_per_rank(batch)
        loss = cross_entropy(
            logits,
            batch.labels,
            batch.mixed,
            smoothing=self.options.label_smoothing,
            labelled=labelled,
        )
        return {"loss": loss, "train_top1": top1_share(logits, batch, labelled)}

    @override
    def param_groups(self) -> list[dict[str, object]]:
        if self.options.decay_everything:
            return [{"params": list(self.parameters()), "decay": True}]
        return token_free_groups(self, self.encoder)

    @override
    def exports(self) -> dict[str, dict[str, Tensor]]:
        return {**super().exports(), **classifier_export(self.encoder, self.classifier)}

    @override
    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Hits "top1", "top5": bool [L], for the L samples of the batch that have a label."""
        return held_out_hits(self.classifier(self.encoder(batch.views[0])), batch.labels)


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Supervised:
    """Raises ConfigError where the data set has no classes or the batch several views."""
    if facts.num_classes < 1:
        raise ConfigError("supervised needs labels, and the training set has none")
    if len(facts.view_pixels) != 1:
        raise ConfigError(f"supervised takes one view, not the {len(facts.view_pixels)} given")
    return Supervised(objective, make_encoder, facts.num_classes)


PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        backbone_options={"zero_init_last": False},
        augmentation=recipes.supervised(),
        test=recipes.center(interpolation="bilinear"),
        optim=Optim(
            name="sgd",
            learning_rate=0.1,
            warmup_epochs=0,
            schedule="steps",
            milestones=(30 / 90, 60 / 90),
            weight_decay=1e-4,
        ),
        batch_size=256,
        epochs=90,
        objective=Objective(decay_everything=True),
        notes="The classic recipe: top-1 76.1 (torchvision's first weights).",
    ),
    "vit_b16_imagenet": Preset(
        backbone="vit_base_patch16_224",
        augmentation=recipes.supervised(),
        test=recipes.center(),
        optim=Optim(
            name="adamw",
            learning_rate=1e-3,
            scale_with_batch=False,
            warmup_epochs=0,
            weight_decay=0.01,
        ),
        batch_size=64,
        epochs=30,
        objective=Objective(decay_everything=True),
        holdout=0.1,
        notes="A plain loop: AdamW over all parameters at a learning rate that does not depend on "
        "the batch, no warm-up, a tenth of the training set held out for top-1 and top-5.",
    ),
    "deit_s16_imagenet": Preset(
        backbone="vit_small_patch16_224",
        augmentation=recipes.deit(),
        test=recipes.center(),
        optim=Optim(
            name="adamw",
            learning_rate=2.5e-4,
            final_learning_rate=2.5e-6,
            warmup_epochs=5,
            schedule="whole_cosine",
            per_epoch=True,
            warmup_from=2.5e-7,
            weight_decay=0.05,
        ),
        batch_size=1024,
        epochs=300,
        objective=Objective(label_smoothing=0.1, drop_path=0.1),
        repeated_augmentation=3,
        notes="DeiT-S without distillation: top-1 79.8 (Touvron et al. 2021, table 5).",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.supervised(32, scale=(0.25, 1.0)),
        test=recipes.center(32, 32),
        optim=Optim(name="sgd", learning_rate=0.1, warmup_epochs=1, weight_decay=5e-4),
        batch_size=256,
        epochs=10,
        objective=Objective(),
        holdout=0.1,
        notes="Not from a paper: sized for two CPU cores.",
    ),
    "deit_cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.deit(32, group=32),
        test=recipes.center(32, 32),
        optim=Optim(name="adamw", learning_rate=1e-3, warmup_epochs=1, weight_decay=0.05),
        batch_size=256,
        epochs=10,
        objective=Objective(label_smoothing=0.1),
        holdout=0.1,
        notes="Not from a paper: DeiT's augmentation on pictures of 32 pixels.",
    ),
}
