"""From names and numbers to a method with its weights: to train it, or to judge its encoder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.pipelines.recipe import Augmentation
from headrace.training.backbones import EncoderFactory, read_initial
from headrace.training.catalogue import find_method
from headrace.training.method import Facts, Method


def facts_of(
    augmentation: Augmentation,
    *,
    num_classes: int,
    train_samples: int,
    batch_size: int,
    steps_per_epoch: int,
    total_steps: int,
    init: Path | None,
) -> Facts:
    """What a run with these numbers tells its method: in training, and again when it is judged."""
    views = augmentation.flat_views
    return Facts(
        num_classes=num_classes,
        train_samples=train_samples,
        view_pixels=tuple(view.size for view in views),
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        init=init,
        mean=augmentation.mean,
        std=augmentation.std,
        masks=tuple(view.mask for view in views),
    )


def build_method(
    name: str,
    objective: Any,
    backbone: str,
    backbone_options: Mapping[str, Any],
    facts: Facts,
    seed: int,
    *,
    resumed: bool = False,
    compiled: bool = False,
    images: Callable[[], Tensor] | None = None,
) -> Method:
    """The method `name` as a run begins with it, on the CPU: its weights are the seed's.

    backbone_options: resolved (`backbones.resolve_options`). facts.init: a run whose encoder's
    weights every encoder starts from, unless the method's INIT_IS_TEACHER says otherwise. resumed:
    a checkpoint's weights will replace these, so that neither a file of --init nor images are
    needed. images: for encoders that are fitted to some, as `EncoderFactory` takes them.
    Seeds torch's global generator.
    """
    torch.manual_seed(seed)  # the weights' randomness, equal on every rank
    method = find_method(name)
    initial = None
    if facts.init and not method.init_is_teacher and not resumed:
        initial = read_initial(facts.init)
    make_encoder = EncoderFactory(
        backbone,
        backbone_options,
        initial=initial,
        compiled=compiled,
        images=None if resumed else images,
    )
    return method.build(objective, make_encoder, facts)
