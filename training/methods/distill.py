"""Distillation: a student learns to say what a fine-tuned classifier says, of pictures alone.

Chen et al. 2020, "Big Self-Supervised Models are Strong Semi-Supervised Learners" (SimCLR v2, arXiv
2006.10029), section 2; Hinton et al. 2015 (arXiv 1503.02531). The third stage of SimCLR v2:
pre-train without labels (`--method simclr --preset v2_imagenet`), fine-tune on a few of them
(`--method supervised --init RUN --data.subset FILE`), then let that classifier label everything
(`--method distill --init RUN`), for a student of its own size or a smaller one. Needs no label;
with `label_weight` those that there are take part (eq. 3).

`--init` names the teacher's run. The student starts from random weights; its backbone need not be
the teacher's. The loss is the paper's equation 2 (google-research/simclr
`colabs/distillation_self_training.ipynb` multiplies it by temperature^2, which is 1 there), the
rest of the recipe is that of its pre-training.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch
from headrace.training.blocks.classifier import classifier_export, labelled_per_rank
from headrace.training.blocks.classifier_teacher import LazyTeacher
from headrace.training.blocks.heads import feature_dim
from headrace.training.blocks.targets import cross_entropy
from headrace.training.method import Facts, MakeEncoder, Method, Progress
from headrace.training.preset import ConfigError, Optim, Preset

INIT_IS_TEACHER = True


@dataclass(frozen=True)
class Objective:
    """Hyper-parameters of distillation."""

    temperature: float = 1.0
    """Of both answers."""
    label_weight: float = 0.0
    """Share of the labels' cross-entropy in the loss (1 - alpha of equation 3)."""


def imitation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the student's answer under the teacher's: eq. 2, a mean over samples.

    student, teacher: logits [B, C], the teacher's as constants. Both are softmax(logits /
    temperature); in nats.
    """
    targets = (teacher.detach().float() / temperature).softmax(dim=1)
    return -(targets * (student.float() / temperature).log_softmax(dim=1)).sum(1).mean()


class Distill(Method):
    """The student's encoder and one linear layer."""

    depends_on_length = False
    teacher_digest: Tensor

    def __init__(self, options: Objective, make_encoder: MakeEncoder, facts: Facts) -> None:
        super().__init__()
        self.options = options
        self.encoder = make_encoder()
        self.classifier = nn.Linear(feature_dim(self.encoder), facts.num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self._teacher = LazyTeacher(str(facts.init), None, facts, "--init")
        self.register_buffer("teacher_digest", torch.zeros((), dtype=torch.int64))

    @override
    def before_run(self) -> None:
        self._teacher.on(self.teacher_digest.device)

    @override
    def before_step(self, progress: Progress) -> None:
        self._teacher.check(self.teacher_digest)

    @override
    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Logits [B, C]: the student's "logits" and the "teacher"'s."""
        logits = self.classifier(self.encoder(batch.views[0]))
        return {"logits": logits, "teacher": self._teacher.on(logits.device)(batch.views[0])}

    @override
    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        logits, teacher = embeddings["logits"], embeddings["teacher"]
        loss = imitation_loss(logits, teacher, self.options.temperature)
        share = self.options.label_weight
        if share > 0:
            labelled = labelled_per_rank(batch)
            label_loss = cross_entropy(logits, batch.labels, batch.mixed, labelled=labelled)
            loss = (1 - share) * loss + share * label_loss
        agreements = logits.argmax(dim=1) == teacher.argmax(dim=1)
        return {"loss": loss, "agrees_with_teacher": agreements.float().mean()}

    @override
    def exports(self) -> dict[str, dict[str, Tensor]]:
        return {**super().exports(), **classifier_export(self.encoder, self.classifier)}

    @override
    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Hits "top1": bool [L], for the L samples of the batch that have a label."""
        logits = self.classifier(self.encoder(batch.views[0]))
        labelled = batch.labels >= 0
        return {"top1": logits.argmax(dim=1)[labelled] == batch.labels[labelled]}


def build(objective: Objective, make_encoder: MakeEncoder, facts: Facts) -> Distill:
    """Raises ConfigError without --init or classes, or with several views."""
    if facts.init is None:
        raise ConfigError("distill needs a teacher: --init, a run of --method supervised")
    if facts.num_classes < 1:
        raise ConfigError("distill needs a data set that names the teacher's classes")
    if len(facts.view_pixels) != 1:
        raise ConfigError(f"distill needs one view, not the {len(facts.view_pixels)} given")
    return Distill(objective, make_encoder, facts)


PRESETS = {
    "imagenet": Preset(
        backbone="resnet50",
        augmentation=recipes.supervised(),
        test=recipes.center(),
        # 0.1 x sqrt(batch) = 6.4 at this batch size
        optim=Optim(name="lars", learning_rate=0.4, warmup_epochs=20, weight_decay=1e-4),
        batch_size=4096,
        epochs=400,
        objective=Objective(),
        notes="Crops and flips alone, as the paper has it for this stage. A ResNet-50 taught by a "
        "larger network that was fine-tuned on 1 % and 10 % of the labels: top-1 73.9 and 77.5 "
        "(abstract).",
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
        notes="Not from the paper: for two CPU cores.",
    ),
}
