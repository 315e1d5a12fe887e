"""What DINO, iBOT and DINOv2 share: losses between a student's and a teacher's distributions."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from headrace.training.collectives import mean_over_ranks, sum_over_ranks
from headrace.training.schedules import linear


def cross_view_entropy(student: Tensor, targets: Tensor, student_temperature: float) -> Tensor:
    """Cross-entropy H(P_t, P_s), mean over samples and over all pairs of two different views.

    student: logits [B, V, K]; targets: distributions [B, T, K] of the first T of these views, as
    constants. Returns a float32 scalar in nats: the sum over the T * (V - 1) pairs of their mean
    over samples, divided by the number of pairs. Eq. 3 and algorithm 1 of Caron et al. 2021; the
    form that dino `main_dino.py`, `DINOLoss.forward`, dinov2 `ssl_meta_arch.py` and swav
    `main_swav.py`, `train`, share, each with its own targets.
    """
    # Networks give one view after the other: with the views outermost nothing is copied.
    views = student.transpose(0, 1)
    log_predictions = (views.float() / student_temperature).log_softmax(dim=-1)
    total = student.new_zeros((), dtype=torch.float32)
    for view, log_prediction in enumerate(log_predictions):
        others = [target for index, target in enumerate(targets.unbind(1)) if index != view]
        if others:
            total = total - (torch.stack(others).sum(0) * log_prediction).sum(-1).mean()
    return total / (targets.shape[1] * (student.shape[1] - 1))


def patch_loss(
    student: Tensor, targets: Tensor, masked: Tensor, student_temperature: float
) -> Tensor:
    """iBOT's loss: at masked patches, what the teacher says of the unmasked view at that place.

    student: logits [..., n, K] at n places of each masked view; targets: distributions of the same
    shape; masked: bool [..., n], the places that count. Returns a float32 scalar in nats: the mean
    over a view's masked patches, then over all views, one with nothing masked adding 0. Eq. 2 of
    Zhou et al. 2022; ibot `main_ibot.py`, `iBOTLoss.forward` (v == q); dinov2
    `ibot_patch_loss.py`, `forward_masked`.
    """
    log_predictions = (student.float() / student_temperature).log_softmax(dim=-1)
    entropies = -(targets * log_predictions).sum(dim=-1) * masked
    return (entropies.sum(dim=-1) / masked.sum(dim=-1).clamp(min=1)).mean()


@torch.no_grad()
def teacher_probabilities(teacher: Tensor, center: Tensor, temperature: float) -> Tensor:
    """softmax((teacher - center) / temperature) over the last axis, float32, without gradient.

    The centred and sharpened teacher, DINO's target: eq. 1 of Caron et al. 2021, with the centre of
    section 3.1.
    """
    return ((teacher.float() - center) / temperature).softmax(dim=-1)


@torch.no_grad()
def mean_logits(parts: Iterable[Tensor]) -> Tensor:
    """[B, T, K] of each micro-batch -> [K]: the mean over all of these and all ranks."""
    means = [part.transpose(0, 1).flatten(0, 1).mean(0) for part in parts]
    return mean_over_ranks(torch.stack(means).mean(0))


@torch.no_grad()
def mean_masked_logits(parts: Iterable[tuple[Tensor, Tensor]], otherwise: Tensor) -> Tensor:
    """(logits [..., K], masked bool [...]) of each micro-batch -> [K]: the mean where masked is
    True, over all of these and all ranks; `otherwise` where it is True nowhere."""
    flat = [(masked.flatten().float(), logits.flatten(0, -2)) for logits, masked in parts]
    logit_sums = torch.stack([masked @ logits for masked, logits in flat]).sum(0)
    masked_count = torch.stack([masked.sum() for masked, _ in flat]).sum()
    totals = sum_over_ranks(torch.cat([logit_sums, masked_count[None]]))
    return torch.where(totals[-1] > 0, totals[:-1] / totals[-1], otherwise)


def warmed_up(time: int, warmup: int, start: float, end: float) -> float:
    """A teacher's temperature: linear from the first to the last epoch of its warm-up, then `end`.

    np.linspace(start, end, warmup)[time], in epochs as dino and ibot have it, in dinov2's steps.
    """
    last = warmup - 1
    return linear(time / last if last > 0 else float(time > last), start, end)


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scales each gradient by itself to a norm of at most `limit`; 0: leaves them.

    dino `utils.py`, `clip_gradients`.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if limit > 0 and gradients:
        norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
        factors = (limit / (norms + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, list(factors.unbind()))  # pyright: ignore[reportPrivateImportUsage]
