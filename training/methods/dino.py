"""DINO: a student predicts, from any view, what a slowly moving teacher says about a global view.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294);
code: facebookresearch/dino. The teacher is an average of past students; centring, which spreads its
outputs, and a small temperature, which sharpens them, keep the trivial solution away. Costs: 2 + L
student and 2 teacher passes per image.

As in the code: the centre moves after the loss, the teacher's temperature per epoch, each parameter
is clipped alone, a teacher with batch norm trains on its own batches (blocks/teacher.py).
Deviations: logits are float32 under autocast; drop path is keyed by sample; frozen prototypes,
having no gradient, see no weight decay either.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from pipelines import recipes
from pipelines.batch import Batch
from training.blocks.drop_path import key_drop_paths, set_keys
from training.blocks.gather import mean_over_ranks
from training.blocks.heads import DinoHead, feature_dim
from training.blocks.teacher import follow, start_equal
from training.config import ConfigError, Optim, Recipe
from training.method import Facts, MakeEncoder, Method, Progress
from training.schedules import cosine, linear

GLOBAL_VIEWS = 2  # they come first in a batch; the teacher sees these alone


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
    drop_path: float = 0.1
    """Student only; 0 for ResNets."""


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Cross-entropy H(P_t, P_s), mean over samples and over all pairs of two different views.

    student: logits [V, B, K]; teacher: logits [T, B, K] of the first T of these views, taken as
    constant; center: [K]. Returns a scalar in nats. Eq. 3 and algorithm 1 of the paper, divided by
    the T * (V - 1) terms of the sum, as in dino `main_dino.py`, `DINOLoss.forward`.
    """
    targets = teacher_probabilities(teacher, center, teacher_temperature)
    log_predictions = (student.float() / student_temperature).log_softmax(dim=-1)
    total = student.new_zeros((), dtype=torch.float32)
    for view, log_prediction in enumerate(log_predictions):
        others = [target for index, target in enumerate(targets) if index != view]
        if others:
            total = total - (torch.stack(others).sum(0) * log_prediction).sum(-1).mean()
    return total / (len(targets) * (len(student) - 1))


@torch.no_grad()
def teacher_probabilities(teacher: Tensor, center: Tensor, temperature: float) -> Tensor:
    """softmax((teacher - center) / temperature) over the last axis, float32, without gradient."""
    return ((teacher.float() - center) / temperature).softmax(dim=-1)


def teacher_temperature(objective: Objective, epoch: int) -> float:
    """Linear from the first epoch to the last one of the warm-up, then constant."""
    last = objective.warmup_teacher_temperature_epochs - 1
    return linear(
        epoch / last if last > 0 else float(epoch > last),
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
        sizes = options.hidden_dim, options.bottleneck_dim, options.out_dim
        self.student_head = DinoHead(feature_dim(self.student), *sizes)
        self.teacher_head = DinoHead(feature_dim(self.encoder), *sizes)
        start_equal(self.encoder, self.student)
        start_equal(self.teacher_head, self.student_head)
        self.register_buffer("center", torch.zeros(options.out_dim))

    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Logits "student" [V, B, K] of all views and "teacher" [2, B, K] of the global ones."""
        with torch.no_grad():
            features = [self.encoder(x) for _, x in by_size(batch.views[:GLOBAL_VIEWS])]
            teacher = self.teacher_head(torch.cat(features))
        features = []
        for views, x in by_size(batch.views):
            set_keys(self.student, batch.ids, views, progress)
            features.append(self.student(x))
        student = self.student_head(torch.cat(features))
        return {
            "student": student.unflatten(0, (-1, len(batch))),
            "teacher": teacher.unflatten(0, (-1, len(batch))),
        }

    def objective(
        self,
        embeddings: Mapping[str, Tensor],
        batch: Batch,  # noqa: ARG002
        progress: Progress,
    ) -> dict[str, Tensor]:
        temperature = teacher_temperature(self.options, progress.epoch)
        loss = dino_loss(
            embeddings["student"],
            embeddings["teacher"],
            self.center,
            student_temperature=self.options.student_temperature,
            teacher_temperature=temperature,
        )
        # A collapse shows as 0 (one prototype for all) or as log K (all prototypes alike).
        targets = teacher_probabilities(embeddings["teacher"], self.center, temperature)
        return {"loss": loss, "teacher_entropy": torch.special.entr(targets).sum(-1).mean()}

    @torch.no_grad()
    def after_backward(self, progress: Progress) -> None:
        """Clips each parameter's gradient by itself; drops those of frozen prototypes."""
        trained = [*self.student.parameters(), *self.student_head.parameters()]
        gradients = [p.grad for p in trained if p.grad is not None]
        if self.options.clip > 0 and gradients:
            norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
            factors = (self.options.clip / (norms + 1e-6)).clamp(max=1)
            torch._foreach_mul_(gradients, list(factors.unbind()))  # pyright: ignore[reportPrivateImportUsage]
        if progress.epoch < self.options.freeze_last_layer_epochs:
            self.student_head.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(
        self,
        embeddings: list[dict[str, Tensor]],
        batches: list[Batch],  # noqa: ARG002
        progress: Progress,
    ) -> None:
        """Eq. 4: the centre follows the mean teacher logits of all ranks and micro-batches."""
        momentum = cosine(progress.fraction, self.options.teacher_momentum, 1.0)
        follow(self.encoder.parameters(), self.student.parameters(), momentum)
        follow(self.teacher_head.parameters(), self.student_head.parameters(), momentum)
        means = torch.stack([entry["teacher"].flatten(0, 1).mean(0) for entry in embeddings])
        self.center.lerp_(mean_over_ranks(means.mean(0)), 1 - self.options.center_momentum)


def by_size(views: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, [n * B, 3, H, W]) for each run of views of one size: one forward pass each."""
    for _, run in groupby(enumerate(views), key=lambda entry: entry[1].shape):
        indices, same = zip(*run, strict=True)
        yield list(indices), torch.cat(same)


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Dino:
    """Raises ConfigError where the augmentation has not the two global views first."""
    sizes = facts.view_pixels
    if len(sizes) < GLOBAL_VIEWS or sizes[0] != sizes[1] or max(sizes) != sizes[0]:
        raise ConfigError(
            f"dino needs two global views of one size before any smaller ones, and the "
            f"augmentation's views have {list(sizes)} pixels"
        )
    return Dino(objective, make_encoder)


PRESETS = {
    "imagenet": Recipe(
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
        notes="The code's defaults: kNN 69.3 and linear 74.0 after 100 epochs, 42 hours on 8 V100. "
        "800 epochs of 1024, with a teacher temperature of 0.07 after 30 epochs: 74.5 and 77.0.",
    ),
    "imagenet_resnet50": Recipe(
        backbone="resnet50",
        augmentation=recipes.dino(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14)),
        test=recipes.center(),
        optim=Optim(
            name="sgd",
            learning_rate=0.03,
            final_learning_rate=6.25e-8,  # 1e-6 at this batch size
            warmup_epochs=10,
            weight_decay=1e-4,
        ),
        batch_size=4096,
        epochs=800,
        objective=Objective(drop_path=0.0),
        notes="Options of the code's README, which gives kNN 67.5 and linear 75.3.",
    ),
    "cifar": Recipe(
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
