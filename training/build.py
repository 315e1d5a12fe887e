"""From names and numbers to a method with its weights: to train it, or to judge its encoder."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from headrace.training.backbones import EncoderFactory, read_initial
from headrace.training.method import Facts, Method
from headrace.training.preset import find_method


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
    module = find_method(name)
    starts = not getattr(module, "INIT_IS_TEACHER", False)
    initial = read_initial(facts.init) if starts and facts.init and not resumed else None
    make_encoder = EncoderFactory(
        backbone,
        backbone_options,
        initial=initial,
        compiled=compiled,
        images=None if resumed else images,
    )
    return module.build(objective, make_encoder, facts)
