"""DINOv2: DINO between views and iBOT within them, with features that keep away from each other.

Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision"
(arXiv 2304.07193); code: facebookresearch/dinov2. What iBOT's two losses need to scale: codes that
Sinkhorn-Knopp or a centre balances, and KoLeo, which spreads the batch. Costs as iBOT.

As in the code: centres move after the loss, that of patches over masked ones alone; backbone and
heads are clipped each as a whole; deeper layers learn slower. Deviations: KoLeo and Sinkhorn-Knopp
look at the batch of all ranks (the code's KoLeo at one GPU's); logits are computed where a mask may
be, and in float32 under autocast; drop path's coins are independent and keyed by sample (the code
drops a fixed share of a batch); frozen prototypes gather no moments; timm resizes positions with
antialiasing for small views; patches are centred by their mean over all ranks, not the mean of the
ranks' means; the warm-up reaches its peak a step later than the code's (`np.linspace`). Epochs are
passes over the data set; the code's are 1250 steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks import masked_views
from headrace.training.blocks import self_distillation as losses
from headrace.training.blocks.dino_head import DinoHead, Prototypes
from headrace.training.blocks.drop_path import set_drop_paths
from headrace.training.blocks.koleo import koleo_loss
from headrace.training.blocks.layer_decay import decayed_groups
from headrace.training.blocks.sinkhorn import sinkhorn
from headrace.training.blocks.teacher import follow, start_equal
from headrace.training.blocks.tokens import take, vision_transformer
from headrace.training.blocks.views import GLOBAL_VIEWS, require_global_views
from headrace.training.collectives import gather_with_gradient, rank
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import Optim, Preset
from headrace.training.schedules import cosine

BACKBONE_OPTIONS = {"global_pool": "token", "fc_norm": False}


@dataclass(frozen=True)
class Objective:
    """DINOv2's hyper-parameters; the masks belong to the augmentation."""

    out_dim: int = 65536
    """Prototypes of each head."""
    separate_heads: bool = False
    """Patch tokens have a head of their own."""
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    centering: Literal["mean", "sinkhorn"] = "sinkhorn"
    """How teacher outputs are spread: by a centre, as in DINO, or by Sinkhorn-Knopp."""
    sinkhorn_iterations: int = 3
    center_momentum: float = 0.9
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    """After its warm-up."""
    warmup_teacher_temperature: float = 0.04
    warmup_teacher_temperature_epochs: float = 60.0
    """Epochs of its linear warm-up, step by step; 0: none."""
    class_weight: float = 1.0
    patch_weight: float = 1.0
    koleo_weight: float = 0.1
    """For each global view."""
    teacher_momentum: float = 0.992
    """At the start; reaches 1 on a cosine."""
    clip: float = 3.0
    """Largest gradient norm of the backbone, and of each head; 0: any."""
    freeze_last_layer_epochs: int = 2
    """Epochs in which the prototypes stay as they are."""
    drop_path: float = 0.3
    """Student only, the same in all blocks."""
    layer_decay: float = 0.9
    """Each block learns that much slower than the one above it."""
    patch_embed_scale: float = 0.2
    """Of the patch embedding's learning rate, beside its layer's."""


class Dinov2(Method):
    """`encoder` and `teacher_heads` follow `student` and `student_heads`, which are trained."""

    least_samples = 2

    center: Tensor
    patch_center: Tensor

    def __init__(self, options: Objective, make_encoder: MakeEncoder, facts: Facts) -> None:
        super().__init__()
        self.options = options
        self.student = vision_transformer("dinov2", make_encoder, fc_norm=False)
        self.encoder = vision_transformer("dinov2", make_encoder, fc_norm=False)
        self.places = masked_views.masked_places("dinov2", facts.masks, self.student)
        set_drop_paths(self.student.blocks, options.drop_path)
        width = self.student.embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.student_heads = self._heads(width)
        self.teacher_heads = self._heads(width)
        start_equal(self.encoder, self.student)
        start_equal(self.teacher_heads, self.student_heads)
        self.register_buffer("center", torch.zeros(options.out_dim))
        self.register_buffer("patch_center", torch.zeros(options.out_dim))

    def _heads(self, in_dim: int) -> nn.ModuleList:
        """Of class tokens, and of patch tokens where they have one of their own."""
        options = self.options
        return nn.ModuleList(
            DinoHead(
                in_dim,
                hidden_dim=options.hidden_dim,
                bottleneck_dim=options.bottleneck_dim,
                out_dim=options.out_dim,
                learn_lengths=True,
            )
            for _ in range(2 if options.separate_heads else 1)
        )

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Logits of class tokens, "student" [B, V, K] of all views and "teacher" [B, 2, K]; of
        patches at n places of the global views, "student_patch" and "teacher_patch" [B, 2, n, K];
        and the student's class tokens there, "features" [B, 2, D]."""
        assert isinstance(self.encoder, VisionTransformer)
        masked, _ = masked_views.places(batch, self.places)
        with torch.no_grad():
            classes, patches = masked_views.teacher_tokens(self.encoder, batch)
            outputs = {
                "teacher": self.teacher_heads[0](classes),
                "teacher_patch": self.teacher_heads[-1](take(patches, masked)),
            }
        classes, patches = masked_views.student_tokens(
            self.student, self.mask_token, batch, progress
        )
        outputs["student"] = self.student_heads[0](classes)
        outputs["student_patch"] = self.student_heads[-1](take(patches, masked))
        outputs["features"] = classes[: GLOBAL_VIEWS * len(batch)]
        return {name: masked_views.by_sample(rows, batch) for name, rows in outputs.items()}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        options = self.options
        temperature = self.teacher_temperature(progress)
        targets = self.targets(embeddings["teacher"], self.center, temperature)
        class_loss = losses.cross_view_entropy(
            embeddings["student"], targets, options.student_temperature
        )
        masked = masked_views.counted(batch, self.places)
        patch_targets = self.targets(
            embeddings["teacher_patch"], self.patch_center, temperature, masked
        )
        patch_loss = losses.patch_loss(
            embeddings["student_patch"], patch_targets, masked, options.student_temperature
        )
        koleo = self.koleo(embeddings["features"])
        loss = options.class_weight * class_loss + options.patch_weight * patch_loss
        return {
            "loss": loss + options.koleo_weight * koleo,
            "class_loss": class_loss,
            "patch_loss": patch_loss,
            "koleo_loss": koleo,
        }

    def teacher_temperature(self, progress: Progress) -> float:
        """Linear from the first step to the last one of the warm-up, then constant."""
        options = self.options
        return losses.warmed_up(
            progress.step,
            round(options.warmup_teacher_temperature_epochs * progress.steps_per_epoch),
            options.warmup_teacher_temperature,
            options.teacher_temperature,
        )

    def targets(
        self, logits: Tensor, center: Tensor, temperature: float, masked: Tensor | None = None
    ) -> Tensor:
        """The teacher's logits [..., K] as distributions. masked: bool [...], those that count."""
        if self.options.centering == "mean":
            return losses.teacher_probabilities(logits, center, temperature)
        codes = sinkhorn(
            logits.flatten(0, -2),
            epsilon=temperature,
            iterations=self.options.sinkhorn_iterations,
            counted=None if masked is None else masked.flatten(),
        )
        return codes.view_as(logits)

    def koleo(self, features: Tensor) -> Tensor:
        """Sum over the global views [B, 2, D], each compared with the batch of all ranks."""
        first_row = rank() * len(features)
        everyone = gather_with_gradient(features)
        terms = [
            koleo_loss(view, view_of_everyone, first_row)
            for view, view_of_everyone in zip(features.unbind(1), everyone.unbind(1), strict=True)
        ]
        return torch.stack(terms).sum()

    @override
    def after_backward(self, progress: Progress) -> None:
        """Clips backbone and heads, each by its own norm; drops gradients of frozen prototypes."""
        backbone = [*self.student.parameters(), self.mask_token]
        for parameters in (backbone, *(head.parameters() for head in self.student_heads)):
            if self.options.clip > 0:
                nn.utils.clip_grad_norm_(parameters, self.options.clip)
        if progress.epoch < self.options.freeze_last_layer_epochs:
            for module in self.student_heads.modules():
                if isinstance(module, Prototypes):
                    module.drop_gradients()

    @override
    @torch.no_grad()
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        options = self.options
        momentum = cosine(progress.fraction, options.teacher_momentum, 1.0)
        follow(self.encoder.parameters(), self.student.parameters(), momentum)
        follow(self.teacher_heads.parameters(), self.student_heads.parameters(), momentum)
        if options.centering == "mean":
            rate = 1 - options.center_momentum
            class_mean = losses.mean_logits(entry["teacher"] for entry in embeddings)
            self.center.lerp_(class_mean, rate)
            patches = (
                (entry["teacher_patch"], masked_views.counted(batch, self.places))
                for entry, batch in zip(embeddings, batches, strict=True)
            )
            patch_mean = losses.mean_masked_logits(patches, otherwise=self.patch_center)
            self.patch_center.lerp_(patch_mean, rate)

    @override
    def param_groups(self) -> list[dict[str, object]]:
        """By layer of the backbone: the deeper below the heads, the slower."""
        return decayed_groups(
            self,
            prefix="student.",
            depth=len(self.student.blocks),
            decay=self.options.layer_decay,
            patch_embed_scale=self.options.patch_embed_scale,
        )


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Dinov2:
    """Raises ConfigError for a backbone without patch tokens, or views without masks over them."""
    require_global_views("dinov2", facts.view_pixels)
    return Dinov2(objective, make_encoder, facts)


_SMALL_VIT = {"img_size": 32, "patch_size": 4, "depth": 3, "embed_dim": 64, "num_heads": 2}

PRESETS = {
    "imagenet": Preset(
        backbone="vit_large_patch16_224",
        backbone_options={"init_values": 1e-5},
        augmentation=recipes.dinov2(),
        test=recipes.center(),
        optim=Optim(
            name="adamw",
            learning_rate=4e-3 * 2**0.5,  # 4e-3 at a batch of 1024, scaled with its square root
            final_learning_rate=1e-6,
            scale_with_batch=False,
            warmup_epochs=20,
            weight_decay=0.04,
            final_weight_decay=0.4,
        ),
        batch_size=2048,
        epochs=200,
        objective=Objective(centering="mean"),
        notes="The code's vitl16_short, 125,000 steps, a day on 32 A100: kNN 81.6, linear 82.9.",
    ),
    "cifar": Preset(
        backbone="vit_tiny_patch16_224",
        backbone_options=_SMALL_VIT,
        augmentation=recipes.dinov2(32, 16, 2, local_scale=(0.1, 0.4), patch_pixels=4, blur=False),
        test=recipes.center(32, 32),
        optim=Optim(
            learning_rate=2e-3, final_learning_rate=2e-5, warmup_epochs=1, weight_decay=0.04
        ),
        batch_size=128,
        epochs=10,
        objective=Objective(
            out_dim=512,
            hidden_dim=128,
            bottleneck_dim=32,
            teacher_temperature=0.04,
            warmup_teacher_temperature_epochs=0,
            teacher_momentum=0.99,
            freeze_last_layer_epochs=0,
            drop_path=0.0,
            layer_decay=1.0,
            patch_embed_scale=1.0,
        ),
        notes="Not from the paper: patches of 4 pixels, two local views, sized for two CPU cores.",
    ),
}
