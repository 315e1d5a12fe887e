"""One optimiser step: its phases in their order, each from the batches to the moved parameters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headrace.pipelines.batch import Batch
from headrace.training.gradients import Pass, average, backward, gradient_of
from headrace.training.guard import Guard
from headrace.training.method import MAIN_PHASE, Method, Progress
from headrace.training.optim import clip_gradients, gradient_norm
from headrace.training.world import World


@dataclass(frozen=True)
class StepReport:
    """What a step took and what it has to say. Tensors stay on the device.

    batches: the micro-batches. losses: of the last phase, one per micro-batch, with a gradient
    cache one. scalars: what is logged, an entry per phase and loss, with the phase's gradient norm
    in its first one. Those of an adversary bear its phase's name.
    """

    batches: list[Batch]
    losses: list[Tensor]
    scalars: list[dict[str, Tensor]]


def optimiser_step(
    method: Method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    progress: Progress,
    *,
    world: World,
    micro_batches: int = 1,
    clip_norm: float | None = None,
    bf16: bool = False,
    cached: bool = False,
    guard: Guard | None = None,
) -> StepReport:
    """From `Method.before_step` to `Method.after_step`, on every rank.

    model: `parallel.model_for` the method. micro_batches: how many of `batches` are taken.
    clip_norm: as `Optim.clip_norm`. bf16: autocast the forward passes. cached: with a gradient
    cache, as `gradients.backward`. guard: blocks the update where a loss or gradient is not finite.
    The gradients are left in place, for whoever wants to look at them.
    """
    method.before_step(progress)
    last = Pass()
    scalars: list[dict[str, Tensor]] = []
    for phase, trained in method.phases().items():
        in_phase = replace(progress, phase=phase)
        # The first phase takes the batches; the others see the same ones.
        parts = iter(last.batches) if last.batches else batches
        optimizer.zero_grad()
        with gradient_of(method, trained):
            last = backward(model, parts, micro_batches, in_phase, bf16=bf16, cached=cached)
        if model is method:
            average(trained, world)
        norm = gradient_norm(trained)
        if guard is not None:
            guard.check([*last.losses, norm], last.batches)
        if clip_norm is not None:
            clip_gradients(trained, norm, clip_norm)
        method.after_backward(in_phase)
        optimizer.step()
        first, *others = last.outputs
        logged = [{**first, "gradient_norm": norm}, *others]
        scalars += [_named(outputs, phase) for outputs in logged]
    method.after_step(last.embeddings, last.batches, progress)
    return StepReport(last.batches, last.losses, scalars)


def early_parameters(method: Method) -> list[nn.Parameter]:
    """What phases before the last one train."""
    *early, _ = method.phases().values()
    return [parameter for phase in early for parameter in phase]


def _named(scalars: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
    """As they are logged: an adversary's under its own name."""
    prefix = "" if phase == MAIN_PHASE else f"{phase}_"
    return {f"{prefix}{name}": value for name, value in scalars.items()}
