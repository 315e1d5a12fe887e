"""iBOT: DINO, whose student also says what the teacher sees at the patches that are masked for it.

Zhou et al. 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer" (arXiv 2111.07832); code:
bytedance/ibot. The teacher is the tokenizer of masked image modelling, learnt on the way: class
tokens agree between views, patch tokens within a view. Dense features become much better than
DINO's, for the same number of passes.

As in the code: both centres move after the loss, that of patches over all patches, masked or not;
temperatures move per epoch; each parameter is clipped alone; frozen prototypes, having no gradient,
see no weight decay either. Deviations: where the head is shared, both networks share it (the code's
default lets the teacher alone do so); logits are computed where a mask may be, not everywhere, and
in float32 under autocast; drop path is keyed by sample; timm resizes positions with antialiasing
for small views; a block's area is drawn up to a whole number of patches, the code's up to a
fraction of one; the warm-up reaches its peak a step later than the code's (`np.linspace`). ViTs
alone, no Swin.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks import masked_views
from headrace.training.blocks import self_distillation as losses
from headrace.training.blocks.dino_head import DinoHead, Prototypes
from headrace.training.blocks.drop_path import key_drop_paths
from headrace.training.blocks.teacher import follow, start_equal
from headrace.training.blocks.tokens import take, vision_transformer
from headrace.training.blocks.views import require_global_views
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import Optim, Preset
from headrace.training.schedules import cosine

BACKBONE_OPTIONS = {"global_pool": "token", "fc_norm": False}


@dataclass(frozen=True)
class Objective:
    """iBOT's hyper-parameters; the masks belong to the augmentation."""

    out_dim: int = 8192
    """Prototypes that class tokens are compared with."""
    shared_head: bool = True
    """Patch tokens are compared with the same prototypes; if not, with `patch_out_dim` others."""
    patch_out_dim: int = 8192
    hidden_dim: int = 2048
    """Width of the head's two hidden layers."""
    bottleneck_dim: int = 256
    """Width in which prototypes are compared."""
    normalize_prototypes: bool = True
    """Prototypes have length 1; if not, their lengths are learnt too: better for small ViTs and
    less stable."""
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    """Of class tokens, after its warm-up."""
    warmup_teacher_temperature: float = 0.04
    teacher_patch_temperature: float = 0.07
    """Of patch tokens, after its warm-up."""
    warmup_teacher_patch_temperature: float = 0.04
    warmup_teacher_temperature_epochs: int = 30
    """Epochs of both temperatures' linear warm-up; 0: none."""
    class_weight: float = 1.0
    patch_weight: float = 1.0
    center_momentum: float = 0.9
    """Of both centres."""
    teacher_momentum: float = 0.996
    """At the start; reaches 1 on a cosine. Smaller for short runs."""
    clip: float = 3.0
    """Largest gradient norm of each single parameter; 0: any."""
    freeze_last_layer_epochs: int = 1
    """Epochs in which the prototypes stay as they are."""
    drop_path: float = 0.1
    """Student only."""


def teacher_temperatures(objective: Objective, epoch: int) -> tuple[float, float]:
    """Of class tokens and of patch tokens, each linear over the warm-up, then constant."""
    warmup_epochs = objective.warmup_teacher_temperature_epochs
    class_temperature = losses.warmed_up(
        epoch,
        warmup_epochs,
        objective.warmup_teacher_temperature,
        objective.teacher_temperature,
    )
    patch_temperature = losses.warmed_up(
        epoch,
        warmup_epochs,
        objective.warmup_teacher_patch_temperature,
        objective.teacher_patch_temperature,
    )
    return class_temperature, patch_temperature


class IbotHead(nn.Module):
    """A `DinoHead`, and prototypes for patch tokens: the same ones or others of the same MLP."""

    def __init__(self, options: Objective, in_dim: int) -> None:
        super().__init__()
        learn_lengths = not options.normalize_prototypes
        self.classes = DinoHead(
            in_dim,
            hidden_dim=options.hidden_dim,
            bottleneck_dim=options.bottleneck_dim,
            out_dim=options.out_dim,
            learn_lengths=learn_lengths,
        )
        self.patch_prototypes = self.classes.prototypes
        if not options.shared_head:
            self.patch_prototypes = Prototypes(
                options.bottleneck_dim, options.patch_out_dim, learn_lengths=learn_lengths
            )


class Ibot(Method):
    """`encoder` and `teacher_head` follow `student` and `student_head`, which are trained."""

    center: Tensor
    patch_center: Tensor

    def __init__(self, options: Objective, make_encoder: MakeEncoder, facts: Facts) -> None:
        super().__init__()
        self.options = options
        self.student = vision_transformer(
            "ibot", make_encoder, fc_norm=False, drop_path_rate=options.drop_path
        )
        self.encoder = vision_transformer("ibot", make_encoder, fc_norm=False)
        self.places = masked_views.masked_places("ibot", facts.masks, self.student)
        key_drop_paths(self.student)
        width = self.student.embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.student_head = IbotHead(options, width)
        self.teacher_head = IbotHead(options, width)
        start_equal(self.encoder, self.student)
        start_equal(self.teacher_head, self.student_head)
        self.register_buffer("center", torch.zeros(options.out_dim))
        patch_out_dim = self.teacher_head.patch_prototypes.out_features
        self.register_buffer("patch_center", torch.zeros(patch_out_dim))

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Logits of class tokens, "student" [B, V, K] of all views and "teacher" [B, 2, K]; of
        patches, "student_patch" and "teacher_patch" [B, 2, n, K] at n places of the global views,
        and "teacher_patch_mean" [B, 2, K] over all of a view's patches."""
        assert isinstance(self.encoder, VisionTransformer)
        masked, _ = masked_views.places(batch, self.places)
        with torch.no_grad():
            classes, patches = masked_views.teacher_tokens(self.encoder, batch)
            head = self.teacher_head
            directions = head.classes.directions(patches)
            logits = {
                "teacher": head.classes(classes),
                "teacher_patch": head.patch_prototypes(take(directions, masked)),
                "teacher_patch_mean": head.patch_prototypes(directions.mean(dim=1)),
            }
        classes, patches = masked_views.student_tokens(
            self.student, self.mask_token, batch, progress
        )
        head = self.student_head
        directions = head.classes.directions(take(patches, masked))
        logits["student"] = head.classes(classes)
        logits["student_patch"] = head.patch_prototypes(directions)
        return {name: masked_views.by_sample(rows, batch) for name, rows in logits.items()}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        options = self.options
        temperature, patch_temperature = teacher_temperatures(options, progress.epoch)
        targets = losses.teacher_probabilities(embeddings["teacher"], self.center, temperature)
        class_loss = losses.cross_view_entropy(
            embeddings["student"], targets, options.student_temperature
        )
        patch_targets = losses.teacher_probabilities(
            embeddings["teacher_patch"], self.patch_center, patch_temperature
        )
        patch_loss = losses.patch_loss(
            embeddings["student_patch"],
            patch_targets,
            masked_views.counted(batch, self.places),
            options.student_temperature,
        )
        return {
            "loss": options.class_weight * class_loss + options.patch_weight * patch_loss,
            "class_loss": class_loss,
            "patch_loss": patch_loss,
            # A collapse shows as 0 (one prototype for all) or as log K (all prototypes alike).
            "teacher_entropy": torch.special.entr(targets).sum(-1).mean(),
        }

    @override
    def after_backward(self, progress: Progress) -> None:
        """Clips each parameter's gradient by itself; drops those of frozen prototypes."""
        losses.clip_each((p for p in self.parameters() if p.requires_grad), self.options.clip)
        if progress.epoch < self.options.freeze_last_layer_epochs:
            self.student_head.classes.prototypes.drop_gradients()
            self.student_head.patch_prototypes.drop_gradients()

    @override
    @torch.no_grad()
    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """Centres follow the mean teacher logits of all ranks and micro-batches."""
        momentum = cosine(progress.fraction, self.options.teacher_momentum, 1.0)
        follow(self.encoder.parameters(), self.student.parameters(), momentum)
        follow(self.teacher_head.parameters(), self.student_head.parameters(), momentum)
        rate = 1 - self.options.center_momentum
        class_mean = losses.mean_logits(entry["teacher"] for entry in embeddings)
        self.center.lerp_(class_mean, rate)
        patch_mean = losses.mean_logits(entry["teacher_patch_mean"] for entry in embeddings)
        self.patch_center.lerp_(patch_mean, rate)


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Ibot:
    """Raises ConfigError for a backbone without patch tokens, or views without masks over them."""
    require_global_views("ibot", facts.view_pixels)
    return Ibot(objective, make_encoder, facts)


_SMALL_VIT = {"img_size": 32, "patch_size": 4, "depth": 3, "embed_dim": 64, "num_heads": 2}

PRESETS = {
    "imagenet": Preset(
        backbone="vit_small_patch16_224",
        augmentation=recipes.ibot(),
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
        epochs=800,
        objective=Objective(normalize_prototypes=False, teacher_temperature=0.07),
        notes="ViT-S/16 of the code's README: kNN 75.2, linear 77.9, fine-tuned 82.3.",
    ),
    "cifar": Preset(
        backbone="vit_tiny_patch16_224",
        backbone_options=_SMALL_VIT,
        augmentation=recipes.ibot(32, 16, 2, local_scale=(0.1, 0.4), patch_pixels=4, blur=False),
        test=recipes.center(32, 32),
        optim=Optim(
            learning_rate=4e-3, final_learning_rate=4e-5, warmup_epochs=1, weight_decay=0.04
        ),
        batch_size=64,
        epochs=10,
        objective=Objective(
            out_dim=512,
            hidden_dim=128,
            bottleneck_dim=32,
            teacher_patch_temperature=0.04,
            teacher_momentum=0.98,
            freeze_last_layer_epochs=0,
            drop_path=0.0,
        ),
        notes="Not from the paper: patches of 4 pixels, two local views, sized for two CPU cores.",
    ),
}
