"""DeiT: a classifier that learns from the labels and from what a trained teacher says of a picture.

Touvron et al. 2020, "Training data-efficient image transformers & distillation through attention"
(arXiv 2012.12877); code: facebookresearch/deit `losses.py`, `main.py`. A second token attends to
the picture beside the class token and answers to the teacher alone; at test time the two answers
are averaged. It costs the teacher's forward pass and gives a ViT what a ConvNet takes for granted.

The teacher is a run of `--method supervised`, or a timm model with or without a file of weights. It
sees the same picture as the student, mixed and erased, in its own mean, std and size. A backbone
without distillation token (a ResNet, a plain ViT), which the code refuses, answers both with one
classifier.

As in the code: the soft loss is divided by the batch and by the number of classes (issues 61, 116,
134 there), C times smaller than the paper's equation 2; `soft_scale="batch"` gives that one. Each
image is shown three times in a batch, and an epoch shows a third of them (RASampler); the cosine
begins with the run, of which the warm-up covers the first epochs, and moves per epoch.
Deviations: the code's rates come an epoch late (its scheduler is asked after each epoch); no
average of weights is kept (the code stores one and reports the model itself); the class and
distillation tokens and positions see no weight decay, as the code's `no_weight_decay` has it; drop
path is keyed by sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.classifier import (
    classifier_export,
    held_out_hits,
    labelled_per_rank,
    top1_share,
)
from headrace.training.blocks.classifier_teacher import LazyTeacher
from headrace.training.blocks.drop_path import key_drop_paths, set_keys
from headrace.training.blocks.heads import feature_dim
from headrace.training.blocks.targets import cross_entropy
from headrace.training.blocks.weight_decay import token_free_groups
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset


@dataclass(frozen=True)
class Objective:
    """DeiT's hyper-parameters."""

    teacher: str = ""
    """A run of --method supervised, or a timm model."""
    teacher_weights: Path | None = None
    """Of a timm teacher: a file of weights; None: timm's own, which timm downloads."""
    distillation: Literal["hard", "soft"] = "hard"
    distillation_weight: float = 0.5
    """Share of the teacher's part in the loss."""
    temperature: float = 1.0
    """Of the soft loss; the paper's is 3."""
    soft_scale: Literal["code", "batch"] = "code"
    """code: the divergence per sample and class; batch: per sample."""
    label_smoothing: float = 0.1
    drop_path: float = 0.1


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    kind: Literal["hard", "soft"],
    temperature: float = 1.0,
    soft_scale: Literal["code", "batch"] = "code",
) -> Tensor:
    """What the student owes the teacher, a mean over samples, in nats.

    student, teacher: logits [B, C]; the teacher's are constants. hard (eq. 3):
    -log softmax(student)[argmax teacher]. soft (eq. 2): T^2 * KL(softmax(teacher / T) ||
    softmax(student / T)), summed over classes and, with soft_scale "code", divided by their number
    (deit `losses.py`, `DistillationLoss`: `reduction='sum'`, `/ outputs_kd.numel()`).
    """
    student, teacher = student.float(), teacher.detach().float()
    match kind:
        case "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        case "soft":
            student_logs = (student / temperature).log_softmax(dim=1)
            teacher_logs = (teacher / temperature).log_softmax(dim=1)
            divergence = F.kl_div(
                student_logs, teacher_logs, reduction="batchmean", log_target=True
            )
            divergence = divergence * temperature**2
            return divergence / student.shape[1] if soft_scale == "code" else divergence
        case _:
            assert_never(kind)


class Deit(Method):
    """The encoder, its classifier, and where it has a distillation token that token's own."""

    depends_on_length = False
    teacher_digest: Tensor

    def __init__(self, options: Objective, make_encoder: MakeEncoder, facts: Facts) -> None:
        super().__init__()
        self.options = options
        drop_path = {"drop_path_rate": options.drop_path} if options.drop_path else {}
        self.encoder = key_drop_paths(make_encoder(**drop_path))
        width = feature_dim(self.encoder)
        self.classifier = nn.Linear(width, facts.num_classes)
        heads = [self.classifier]
        if isinstance(self.encoder, VisionTransformerDistilled):
            self.distillation_classifier = nn.Linear(width, facts.num_classes)
            heads += [self.distillation_classifier]
        for head in heads:
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self._heads = heads
        self._teacher = LazyTeacher(
            options.teacher, options.teacher_weights, facts, "--objective.teacher"
        )
        self.register_buffer("teacher_digest", torch.zeros((), dtype=torch.int64))

    @override
    def before_run(self) -> None:
        self._teacher.on(self.teacher_digest.device)

    @override
    def before_step(self, progress: Progress) -> None:
        self._teacher.check(self.teacher_digest)

    def classify(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> logits [B, C] of the classifier and of what distillation trains."""
        if isinstance(self.encoder, VisionTransformerDistilled):
            tokens = self.encoder.forward_features(pictures)
            return self.classifier(tokens[:, 0]), self.distillation_classifier(tokens[:, 1])
        logits = self.classifier(self.encoder(pictures))
        return logits, logits

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Logits [B, C]: "logits", "distilled" and the "teacher"'s."""
        set_keys(self.encoder, batch.ids, [0], progress)
        logits, distilled = self.classify(batch.views[0])
        teacher = self._teacher.on(logits.device)(batch.views[0])
        return {"logits": logits, "distilled": distilled, "teacher": teacher}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        options, labelled = self.options, labelled_per_rank(batch)
        logits, teacher = embeddings["logits"], embeddings["teacher"]
        label_loss = cross_entropy(
            logits,
            batch.labels,
            batch.mixed,
            smoothing=options.label_smoothing,
            labelled=labelled,
        )
        teacher_loss = distillation_loss(
            embeddings["distilled"],
            teacher,
            options.distillation,
            options.temperature,
            options.soft_scale,
        )
        share = options.distillation_weight
        return {
            "loss": (1 - share) * label_loss + share * teacher_loss,
            "distillation": teacher_loss,
            "train_top1": top1_share(logits, batch, labelled),
            "teacher_top1": top1_share(teacher, batch, labelled),
        }

    @override
    def param_groups(self) -> list[dict[str, object]]:
        return token_free_groups(self, self.encoder)

    @override
    def exports(self) -> dict[str, dict[str, Tensor]]:
        return {**super().exports(), **classifier_export(self.encoder, *self._heads)}

    @override
    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Hits "top1", "top5": bool [L], of the heads' mean, for the L samples with a label."""
        logits = torch.stack(self.classify(batch.views[0])).float().mean(0)
        return held_out_hits(logits, batch.labels)


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Deit:
    """Raises ConfigError without classes, teacher, or with several views."""
    if facts.num_classes < 1:
        raise ConfigError("deit needs labels, and the training set has none")
    if len(facts.view_pixels) != 1:
        raise ConfigError(f"deit needs one view, not the {len(facts.view_pixels)} given")
    if not objective.teacher:
        raise ConfigError(
            "deit needs a teacher: --objective.teacher, a run of --method supervised or a timm "
            "model (DeiT's training without one is --method supervised)"
        )
    return Deit(objective, make_encoder, facts)


_DEIT_OPTIM = Optim(
    name="adamw",
    learning_rate=2.5e-4,
    final_learning_rate=2.5e-6,
    warmup_epochs=5,
    schedule="whole_cosine",
    per_epoch=True,
    warmup_from=2.5e-7,
    weight_decay=0.05,
)

PRESETS = {
    "imagenet": Preset(
        backbone="deit_base_distilled_patch16_224",
        augmentation=recipes.deit(),
        test=recipes.center(),
        optim=_DEIT_OPTIM,
        batch_size=1024,
        epochs=300,
        objective=Objective(teacher="regnety_160.deit_in1k"),
        repeated_augmentation=3,
        notes="Hard distillation from the authors' RegNetY-16GF: top-1 83.4 (the code's README).",
    ),
    "s16_imagenet": Preset(
        backbone="deit_small_distilled_patch16_224",
        augmentation=recipes.deit(),
        test=recipes.center(),
        optim=_DEIT_OPTIM,
        batch_size=1024,
        epochs=300,
        objective=Objective(teacher="regnety_160.deit_in1k"),
        repeated_augmentation=3,
        notes="As imagenet: top-1 81.2.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.deit(32, group=32),
        test=recipes.center(32, 32),
        optim=Optim(name="adamw", learning_rate=1e-3, warmup_epochs=1, weight_decay=0.05),
        batch_size=256,
        epochs=10,
        objective=Objective(distillation="soft", soft_scale="batch", drop_path=0.0),
        holdout=0.1,
        notes="Not from the paper: for two CPU cores; the teacher is yours to name.",
    ),
}
