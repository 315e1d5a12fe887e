"""The contract between the training loop and a method.

A method is one file, `training/methods/<name>.py`, found by its name. It offers

    Objective            frozen dataclass, its hyper-parameters (`--objective.*`)
    PRESETS              dict name -> preset.Preset: the published numbers and CIFAR-sized ones
    build(objective, make_encoder, facts) -> Method
    BACKBONE_OPTIONS     optional: timm options that every backbone of this method gets
    JUDGED_BY            optional: "knn" (default) or "linear", what tells whether it has learnt
    INIT_IS_TEACHER      optional: True where --init names a teacher's run, `Facts.init`, and not
                         the weights that the encoder starts from

and knows no loader, no engine and no optimiser. `train.py` knows no method. A dotted name
(`--method my_package.my_method`) loads a file from outside the repository.

Every rank returns its share: the mean over ranks of loss and gradient is the global batch's loss
and gradient. State that lives across steps (queues, banks, centres, teachers) changes only in
before_epoch, before_step and after_step, once per step and not once per micro-batch.

An adversary is a phase: parameters with their own loss and step. In each step the phases run in
their order, each on the same batch: `forward` with `progress.phase`, a gradient for the phase's
parameters alone, `after_backward`, an optimiser step for them.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from headrace.pipelines.batch import Batch
from headrace.pipelines.masks import Mask
from headrace.pipelines.recipe import IMAGENET_MEAN, IMAGENET_STD


class MakeEncoder(Protocol):
    """Makes the run's backbone anew: a timm model without classifier, [B, 3, H, W] -> features."""

    def __call__(self, **timm_options: object) -> nn.Module: ...


@dataclass(frozen=True)
class Facts:
    """What a method may know of the run it is built for. masks: as declared, one entry per view."""

    num_classes: int
    train_samples: int
    view_pixels: tuple[int, ...]
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    init: Path | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    masks: tuple[Mask | None, ...] = ()


MAIN_PHASE = "main"


@dataclass(frozen=True)
class Progress:
    """Where the run stands. `step` counts finished optimiser steps; schedules use `fraction`."""

    step: int
    total_steps: int
    steps_per_epoch: int
    seed: int
    phase: str = MAIN_PHASE

    @property
    def fraction(self) -> float:
        """In [0, 1): 0 before the first step."""
        return self.step / self.total_steps

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def total_epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch

    @property
    def epoch_start(self) -> "Progress":
        """At the first step of this epoch."""
        return replace(self, step=self.epoch * self.steps_per_epoch)

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Randomness of the model's side, keyed by (seed, step, purpose): equal on every rank.

        Draw for the global batch, then take the rank's slice.
        """
        key = hashlib.blake2b(f"{self.seed}/{self.step}/{purpose}".encode(), digest_size=8)
        generator = torch.Generator(device)
        return generator.manual_seed(int.from_bytes(key.digest(), "little") >> 1)


class Context(Protocol):
    """What `before_epoch` may ask of the run: a pass over the training set by the run's engine."""

    def features(
        self, module: Callable[[Tensor], Tensor], view: str = "test"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (ids int64 [n], features [n, D]) of this rank's share of the whole set."""
        ...


class Method(nn.Module):
    """Composition, not inheritance of behaviour: every hook does nothing unless a method says so.

    `encoder` is what is judged and exported: for a method with a teacher, the teacher. A method
    marks the hooks that it has with `@override` (typing_extensions), so that a misspelt one, which
    nobody would call, is an error of the type checker.
    """

    encoder: nn.Module
    least_samples: int = 1
    """Samples, over all ranks, that `objective` has to see at once to mean anything."""

    couples_samples: bool = True
    """Whether a sample's loss depends on the others of its micro-batch. Where it does not, a run
    may go on with other micro-batches."""
    depends_on_length: bool = True
    """Whether a step depends on how long the run will be (`Progress.fraction`). Where it does not,
    a run may become longer, if its learning rate allows."""
    compiles: bool = True
    """Whether --run.compile has anything to compile: the encoder as a whole or its blocks."""

    def embed(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Networks only: batch -> embeddings, whose first axis is this rank's samples.

        The same again when called again, but for batch norm's running statistics: a gradient cache
        (`--run.gradient-cache`) does so.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method embed")

    def objective(
        self, embeddings: Mapping[str, Tensor], batch: Batch, progress: Progress
    ) -> dict[str, Tensor]:
        """{"loss": scalar, **logged scalars}; looks across ranks where the loss does."""
        raise NotImplementedError(f"{type(self).__name__} has no method objective")

    def forward(
        self, batch: Batch, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(outputs of `objective`, embeddings). One call per micro-batch, what DDP wraps."""
        embeddings = self.embed(batch, progress)
        return self.objective(embeddings, batch, progress), embeddings

    def param_groups(self) -> list[dict[str, object]]:
        """Optimiser groups: "params", "decay" (bool: weight decay applies), and what else
        `optim.build_optimizer` knows.

        Default: everything that is trained; biases and one-dimensional parameters without decay.
        """
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [
            {"params": [p for _, p in trained if p.ndim > 1], "decay": True},
            {"params": [p for _, p in trained if p.ndim <= 1], "decay": False},
        ]

    def phases(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by phase, in the order in which a step runs them; `MAIN_PHASE` is one."""
        return {MAIN_PHASE: [p for p in self.parameters() if p.requires_grad]}

    def before_run(self) -> None:
        """Before anything else of a run, resumed or not: opens what training needs and judging does
        not, so that a wrong name is found at once."""

    def before_epoch(self, context: Context, progress: Progress) -> None: ...

    def order_table(self, progress: Progress) -> Tensor | None:  # noqa: ARG002
        """Ids of this epoch's positions, int64, where the method asks for an order of its own.

        Asked for after before_epoch and again by a resume within the epoch: a function of the
        method's state and of (seed, epoch) alone, equal on every rank. As long as the epoch at
        least; what is beyond is dropped.
        """
        return None

    def before_step(self, progress: Progress) -> None: ...

    def after_backward(self, progress: Progress) -> None:
        """Between backward and the optimiser: gradients are complete and averaged over ranks.

        Once per phase.
        """

    def after_step(
        self, embeddings: list[dict[str, Tensor]], batches: list[Batch], progress: Progress
    ) -> None:
        """After the optimiser: teacher, centre, queue. One entry per micro-batch, detached.

        With several phases the embeddings are those of the last one.
        """

    def exports(self) -> dict[str, dict[str, Tensor]]:
        """State dicts by name, which a run writes as NAME.safetensors with each checkpoint."""
        return {"encoder": self.encoder.state_dict()}

    @property
    def knows_training_images_only(self) -> bool:
        """True where `objective` looks its images up by their ids among those that are trained on,
        in a bank or in clusters: of others it would say nothing."""
        return False

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """Per-sample results on a held-out batch, e.g. {"top1": bool [B]}; {} where none apply."""
        return {}
