"""The gradients of one optimiser step: micro-batches, phases, and the gradient cache.

`backward` leaves the gradient of the step in the parameters' `.grad`. Micro-batches that are simply
accumulated make losses which look across the batch see one of them at a time. The gradient cache
(Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup") gives
such a loss all of them: the embeddings of every micro-batch are computed without a graph, the loss
and its gradient with respect to them on the whole, and each micro-batch once more with a graph, for
the price of one more forward pass. The memory of a graph is that of one micro-batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from headrace.pipelines.batch import Batch, concatenate
from headrace.training.collectives import mean_over_ranks_
from headrace.training.method import Method, Progress
from headrace.training.world import World


@dataclass
class Pass:
    """What a phase of a step saw, one entry per micro-batch, and with a gradient cache one entry
    of `outputs` for all. Everything is detached."""

    batches: list[Batch] = field(default_factory=list)
    embeddings: list[dict[str, Tensor]] = field(default_factory=list)
    outputs: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def losses(self) -> list[Tensor]:
        return [outputs["loss"] for outputs in self.outputs]


def backward(
    model: nn.Module,
    batches: Iterable[Batch],
    count: int,
    progress: Progress,
    *,
    bf16: bool = False,
    cached: bool = False,
) -> Pass:
    """Adds the gradient of the mean loss of `count` micro-batches (cached: of their whole).

    model: a Method, or one that DDP wraps, whose gradients are then averaged over the ranks.
    """
    return (_cached if cached else _accumulated)(model, iter(batches), count, progress, bf16)


def _accumulated(
    model: nn.Module, batches: Iterator[Batch], count: int, progress: Progress, bf16: bool
) -> Pass:
    seen = Pass()
    for part in range(count):
        batch = next(batches)
        more = part + 1 < count
        ddp = model if isinstance(model, DistributedDataParallel) else None
        with ddp.no_sync() if ddp is not None and more else nullcontext():
            with _autocast(batch, bf16):
                outputs, embeddings = model(batch, progress)
            (outputs["loss"] / count).backward()
        seen.batches.append(batch)
        seen.embeddings.append(_detached(embeddings))
        seen.outputs.append(_detached(outputs))
    return seen


def _cached(
    method: nn.Module, batches: Iterator[Batch], count: int, progress: Progress, bf16: bool
) -> Pass:
    assert isinstance(method, Method), "a gradient cache averages gradients itself, without DDP"
    seen, states = Pass(), []
    for _ in range(count):
        batch = next(batches)
        states.append(_generator_states(batch.labels.device))
        with torch.no_grad(), _still_statistics(method), _autocast(batch, bf16):
            embeddings = method.embed(batch, progress)
        seen.batches.append(batch)
        seen.embeddings.append(_detached(embeddings))
    whole = concatenate(seen.batches)
    leaves = {
        name: torch.cat([entry[name] for entry in seen.embeddings]) for name in seen.embeddings[0]
    }
    for leaf in leaves.values():
        leaf.requires_grad_(leaf.is_floating_point())
    with _autocast(whole, bf16):
        outputs = method.objective(leaves, whole, progress)
    outputs["loss"].backward()
    seen.outputs.append(_detached(outputs))
    first = 0
    for batch, state in zip(seen.batches, states, strict=True):
        rows = slice(first, first + len(batch))
        first += len(batch)
        _set_generator_states(batch.labels.device, state)
        with _autocast(batch, bf16):
            embeddings = method.embed(batch, progress)
        wanted = [
            (embedding, gradient[rows])
            for name, embedding in embeddings.items()
            if embedding.requires_grad and (gradient := leaves[name].grad) is not None
        ]
        torch.autograd.backward(
            [embedding for embedding, _ in wanted], [gradient for _, gradient in wanted]
        )
    return seen


def average(parameters: Sequence[Tensor], world: World) -> None:
    """What DDP does for a single phase without gradient cache: gradients' mean over the ranks."""
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_ranks_(torch.cat([gradient.flatten() for gradient in gradients]))
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


@contextmanager
def gradient_of(method: nn.Module, trained: Sequence[Tensor]) -> Iterator[None]:
    """Inside, no other parameter takes a gradient: an adversary is not trained against itself."""
    chosen = set(trained)
    others = [p for p in method.parameters() if p.requires_grad and p not in chosen]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def cache_sentences(method: nn.Module, cached: bool) -> list[str]:
    """What a user of a gradient cache may not expect of this network."""
    if not cached or not has_batch_norm(method):
        return []
    return [
        "gradient cache: this network's batch norm normalises each micro-batch by itself, so that "
        "gradients are not those of the whole batch"
    ]


def has_batch_norm(method: nn.Module) -> bool:
    """Whether micro-batches are more than slices of the batch to a network of this method."""
    return any(isinstance(module, _BatchNorm) for module in method.modules())


@contextmanager
def _still_statistics(method: nn.Module) -> Iterator[None]:
    """Inside, batch norm's running statistics stay: each micro-batch counts once."""
    norms = [module for module in method.modules() if isinstance(module, _BatchNorm)]
    tracked = [module.track_running_stats for module in norms]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module, value in zip(norms, tracked, strict=True):
            module.track_running_stats = value


def _autocast(batch: Batch, bf16: bool) -> torch.autocast:
    return torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=bf16)


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _generator_states(device: torch.device) -> list[Tensor]:
    """Of the global generators, for layers that insist on them (dropout)."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_generator_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
