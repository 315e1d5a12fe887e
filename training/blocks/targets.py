"""What a classifier is to predict where samples were mixed."""

import torch
from torch import Tensor

from pipelines.batch import Mixed


def has_label(labels: Tensor, mixed: Mixed | None) -> Tensor:
    """bool [B]: whether every label that has a part in a sample is known, that is not -1."""
    if mixed is None:
        return labels >= 0
    own = (labels >= 0) | (mixed.weights == 0)
    return own & ((mixed.labels >= 0) | (mixed.weights == 1))


def soft_targets(
    labels: Tensor, mixed: Mixed | None, num_classes: int, smoothing: float = 0.0
) -> Tensor:
    """float32 [B, num_classes]: the share that each class has of a sample. labels: int64 [B].

    A sample's own class has its weight, its partner's the rest; of that a part `smoothing` is
    spread over all classes (timm 1.0.31 `data/mixup.py`, `mixup_target`). Without `mixed` every
    sample is all its own. Rows are 0, and have no part in a cross-entropy, where not `has_label`.
    """
    if mixed is None:
        shares = _one_hot(labels, num_classes)
    else:
        weights = mixed.weights[:, None]
        shares = weights * _one_hot(labels, num_classes)
        shares += (1 - weights) * _one_hot(mixed.labels, num_classes)
    smoothed = (1 - smoothing) * shares + smoothing / num_classes
    return smoothed * has_label(labels, mixed)[:, None]


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """float32 [B, num_classes], of -1 that of class 0. torch's own waits for the device."""
    zeros = torch.zeros(len(labels), num_classes, device=labels.device)
    return zeros.scatter_(1, labels.clamp(min=0)[:, None], 1)
