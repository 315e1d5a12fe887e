"""One optimiser step: its phases in their order, each from the batches to the moved parameters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn, optim

from headrace.pipelines.batch import Batch
from headrace.training.gradients import Pass, average, backward, gradient_of
from headrace.training.guard import Guard
from headrace.training.meters import Meters
from headrace.training.method import MAIN_PHASE, Method, Progress
from headrace.training.optim import clip_gradients, gradient_norm
from headrace.training.world import World, distributed


@dataclass(frozen=True)
class Step:
    """What all steps of a run share. Every rank takes each step.

    micro_batches: per step. clip_norm: as `Optim.clip_norm`. bf16: autocast the forward passes.
    cached: with a gradient cache, as `gradients.backward`.
    """

    method: Method
    model: nn.Module
    optimizer: optim.Optimizer
    guard: Guard
    meters: Meters
    world: World
    micro_batches: int
    clip_norm: float | None
    bf16: bool
    cached: bool

    def take(self, batches: Iterator[Batch], progress: Progress) -> list[Batch]:
        """From `before_step` to `after_step`; gives the micro-batches that it took."""
        self.method.before_step(progress)
        done, norms = Pass(), {}
        for phase, trained in self.method.phases().items():
            at = replace(progress, phase=phase)
            parts = iter(done.batches) if done.batches else self._waited(batches)
            with gradient_of(self.method, trained):
                done = backward(
                    self.model, parts, self.micro_batches, at, bf16=self.bf16, cached=self.cached
                )
            if self.model is self.method:
                average(trained, self.world)
            norm = gradient_norm(trained)
            self.guard.check([*done.losses, norm])
            if self.clip_norm is not None:
                clip_gradients(trained, norm, self.clip_norm)
            self.method.after_backward(at)
            self.optimizer.step()
            self.optimizer.zero_grad()
            for outputs in done.outputs:
                self.meters.add(_named(outputs, phase))
            norms |= _named({"gradient_norm": norm}, phase)
        self.method.after_step(done.embeddings, done.batches, progress)
        self.meters.step(norms)
        return done.batches

    def _waited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same; the meters see how long each took to come."""
        while True:
            with self.meters.waiting():
                batch = next(batches)
            yield batch


def model_for(method: Method, world: World, *, cached: bool) -> nn.Module:
    """What a step calls: DDP averages gradients during the one backward pass that it knows of; with
    several, the method by itself, whose gradients `Step` averages afterwards."""
    return method if cached or len(method.phases()) > 1 else distributed(method, world)


def early_parameters(method: Method) -> list[nn.Parameter]:
    """What phases before the last one train."""
    *early, _ = method.phases().values()
    return [parameter for phase in early for parameter in phase]


def _named(scalars: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
    """As they are logged: an adversary's under its own name."""
    prefix = "" if phase == MAIN_PHASE else f"{phase}_"
    return {f"{prefix}{name}": value for name, value in scalars.items()}
