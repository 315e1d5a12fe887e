"""DINO: a student predicts, from any view, what a slowly moving teacher says about a global view.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294);
code: facebookresearch/dino. The teacher is an average of past students; centring, which spreads its
outputs, and a small temperature, which sharpens them, keep the trivial solution away. Costs: 2 + L
student and 2 teacher passes per image.

As in the code: the centre moves after the loss, the teacher's temperature per epoch, each parameter
is clipped alone, a teacher with batch norm trains on its own batches (blocks/teacher.py), and
frozen prototypes, having no gradient, see no weight decay either. Deviations: logits are float32
under autocast; drop path is keyed by sample; a ViT is timm's, whose class token starts near 0 and
whose positions are resized with antialiasing for small views. The warm-up reaches its peak a step
later than the code's (`np.linspace`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.dino_head import DinoHead
from headrace.training.blocks.drop_path import key_drop_paths, set_keys
from headrace.training.blocks.heads import feature_dim
from headrace.training.blocks.self_distillation import (
    clip_each,
    cross_view_entropy,
    mean_logits,
    teacher_probabilities,
    warmed_up,
)
from headrace.training.blocks.teacher import follow, start_equal
from headrace.training.blocks.views import GLOBAL_VIEWS, by_size, require_global_views
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import Optim, Preset
from headrace.training.schedules import cosine


@dataclass(frozen=True)
class Objective:
    """DINO's hyper-parameters."""

    out_dim: int = 65536
    """Prototypes: the length of the distributions that are compared."""
    hidden_dim: int = 2048
    """Width of the head's two hidden layers."""
    bottleneck_dim: int = 256
    """Width in which prototypes are compared."""
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    """After its warm-up; 0.07 for long runs."""
    warmup_teacher_temperature: float = 0.04
    warmup_teacher_temperature_epochs: int = 0
    """Epochs of its linear warm-up; 0: none."""
    center_momentum: float = 0.9
    teacher_momentum: float = 0.996
    """At the start; reaches 1 on a cosine. Smaller for short runs."""
    clip: float = 3.0
    """Largest gradient norm of each single parameter; 0: any."""
    freeze_last_layer_epochs: int = 1
    """Epochs in which the prototypes stay as they are."""
    normalize_prototypes: bool = True
    """Prototypes have length 1; if not, their lengths are learnt too: better for small ViTs and
    less stable."""
    drop_path: float = 0.1
    """Student only; 0 for ResNets."""


def teacher_temperature(objective: Objective, epoch: int) -> float:
    """Linear from the first epoch to the last one of the warm-up, then constant."""
    return warmed_up(
        epoch,
        objective.warmup_teacher_temperature_epochs,
        objective.warmup_teacher_temperature,
        objective.teacher_temperature,
    )


class Dino(Method):
    """`encoder` and `teacher_head` follow `student` and `student_head`, which are trained."""

    center: Tensor

    def __init__(self, options: Objective, make_encoder: MakeEncoder) -> None:
        super().__init__()
        self.options = options
        drop_path = {"drop_path_rate": options.drop_path} if options.drop_path else {}
        self.student = key_drop_paths(make_encoder(**drop_path))
        self.encoder = make_encoder()
        self.student_head = self._head(feature_dim(self.student))
        self.teacher_head = self._head(feature_dim(self.encoder))
        start_equal(self.encoder, self.student)
        start_equal(self.teacher_head, self.student_head)
        self.register_buffer("center", torch.zeros(options.out_dim))

    def _head(self, in_dim: int) -> DinoHead:
        return DinoHead(
            in_dim,
            hidden_dim=self.options.hidden_dim,
            bottleneck_dim=self.options.bottleneck_dim,
            out_dim=self.options.out_dim,
            learn_lengths=not self.options.normalize_prototypes,
        )

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Logits "student" [B, V, K] of all views and "teacher" [B, 2, K] of the global ones."""
        with torch.no_grad():
            features = [
                self.encoder(pictures) for _, pictures in by_size(batch.views[:GLOBAL_VIEWS])
            ]
            teacher = self.teacher_head(torch.cat(features))
        features = []
        for views, pictures in by_size(batch.views):
            set_keys(self.student, batch.ids, views, progress)
            features.append(self.student(pictures))
        student = self.student_head(torch.cat(features))
        return {
            "student": student.unflatten(0, (-1, len(batch))).transpose(0, 1),
            "teacher": teacher.unflatten(0, (-1, len(batch))).transpose(0, 1),
        }

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        temperature = teacher_temperature(self.options, progress.epoch)
        targets = teacher_probabilities(embeddings["teacher"], self.center, temperature)
        student_temperature = self.options.student_temperature
        return {
            "loss": cross_view_entropy(embeddings["student"], targets, student_temperature),
            # A collapse shows as 0 (one prototype for all) or as log K (all prototypes alike).
            "teacher_entropy": torch.special.entr(targets).sum(-1).mean(),
        }

    @override
    def after_backward(self, progress: Progress) -> None:
        """Clips each parameter's gradient by itself; drops those of frozen prototypes."""
        clip_each([*self.student.parameters(), *self.student_head.parameters()], self.options.clip)
        if progress.epoch < self.options.freeze_last_layer_epochs:
            self.student_head.prototypes.drop_gradients()

    @override
    @torch.no_grad()
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """Eq. 4: the centre follows the mean teacher logits of all ranks and micro-batches."""
        momentum = cosine(progress.fraction, self.options.teacher_momentum, 1.0)
        follow(self.encoder.parameters(), self.student.parameters(), momentum)
        follow(self.teacher_head.parameters(), self.student_head.parameters(), momentum)
        mean = mean_logits(entry["teacher"] for entry in embeddings)
        self.center.lerp_(mean, 1 - self.options.center_momentum)


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Dino:
    """Raises ConfigError where the augmentation has not the two global views first."""
    require_global_views("dino", facts.view_pixels)
    return Dino(objective, make_encoder)


PRESETS = {
    "imagenet": Preset(
        backbone="vit_small_patch16_224",
        augmentation=recipes.dino(),
        test=recipes.center(),
        optim=Optim(
            name="adamw",
            learning_rate=5e-4,
            final_learning_rate=5e-7,  # 1e-6 at this batch size
            warmup_epochs=10,
            weight_decay=0.04,
            final_weight_decay=0.4,
        ),
        batch_size=512,
        epochs=100,
        objective=Objective(),
        notes="The code's defaults: kNN 69.3 and linear 74.0 after 100 epochs, 42 hours on 8 V100.",
    ),
    "imagenet_300": Preset(
        backbone="vit_small_patch16_224",
        augmentation=recipes.dino(),
        test=recipes.center(),
        optim=Optim(
            name="adamw",
            learning_rate=5e-4,
            final_learning_rate=2.5e-7,  # 1e-6 at this batch size
            warmup_epochs=10,
            weight_decay=0.04,
            final_weight_decay=0.4,
        ),
        batch_size=1024,
        epochs=300,
        objective=Objective(
            teacher_temperature=0.07,
            warmup_teacher_temperature_epochs=30,
            normalize_prototypes=False,
        ),
        notes="The boosted run of the code's README: kNN 73.3 and linear 76.0, 62 hours on 16 V100."
        " Its best ViT-S/16, 800 epochs with other crop scales, has 74.5 and 77.0.",
    ),
    "imagenet_resnet50": Preset(
        backbone="resnet50",
        backbone_options={"zero_init_last": False},
        augmentation=recipes.dino(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14)),
        test=recipes.center(),
        optim=Optim(
            name="sgd",
            learning_rate=0.03,
            final_learning_rate=5e-7,  # 1e-6 at this batch size
            warmup_epochs=10,
            weight_decay=1e-4,
        ),
        batch_size=512,
        epochs=100,
        objective=Objective(drop_path=0.0),
        notes="The command of the code's README for 8 GPUs, without results there. Its released "
        "ResNet-50 (kNN 67.5, linear 75.3) had other options, and a batch of 4080.",
    ),
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.dino(32, 16, 4, local_scale=(0.1, 0.4), blur=False),
        test=recipes.center(32, 32),
        optim=Optim(
            learning_rate=4e-3, final_learning_rate=4e-5, warmup_epochs=0.4, weight_decay=0.04
        ),
        batch_size=128,
        epochs=20,
        objective=Objective(
            out_dim=2048,
            hidden_dim=512,
            teacher_momentum=0.99,
            freeze_last_layer_epochs=0,
            drop_path=0.0,
        ),
        notes="Not from the paper: for two CPU cores; timm's smallest ResNet.",
    ),
}
