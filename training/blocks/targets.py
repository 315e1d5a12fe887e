"""What a classifier is to predict, also of mixed samples and without a label, and its loss."""

import torch
from torch import Tensor
from torch.nn import functional as F

from headrace.pipelines.batch import Mixed


def has_label(labels: Tensor, mixed: Mixed | None) -> Tensor:
    """bool [B]: whether every label that has a part in a sample is known, that is not -1."""
    if mixed is None:
        return labels >= 0
    first_is_known = (labels >= 0) | (mixed.weights == 0)
    partner_is_known = (mixed.labels >= 0) | (mixed.weights == 1)
    return first_is_known & partner_is_known


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


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    mixed: Mixed | None = None,
    *,
    smoothing: float = 0.0,
    labelled: Tensor | None = None,
) -> Tensor:
    """Sum of -log softmax(logits)[label] over the samples that have a label, over `labelled`.

    logits: [B, C]; labels: int64 [B]; `labelled` (scalar) is the number of such samples, by default
    those here. Across ranks it is their mean number per rank, so that the mean over ranks is the
    global mean. 0 where there is no label at all. With smoothing s the target is
    (1 - s) * onehot + s / C; that of mixed samples is `soft_targets`'.
    """
    logits = logits.float()
    if mixed is None:
        total = F.cross_entropy(
            logits, labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing
        )
    else:
        targets = soft_targets(labels, mixed, logits.shape[1], smoothing)
        total = F.cross_entropy(logits, targets, reduction="sum")
    if labelled is None:
        labelled = has_label(labels, mixed).sum()
    # Fewer than one on average per rank is possible, none at all has a sum of 0.
    return total / torch.where(labelled > 0, labelled, 1)


def agreement(logits: Tensor, labels: Tensor, mixed: Mixed | None = None) -> Tensor:
    """Sum over the samples that have a label of the share that the predicted class has in them.

    The number of hits; of a mixed sample the weight of the label that was predicted (Zhang et al.
    2017; mixup-cifar10 `train.py`). Smoothing takes no part.
    """
    predicted = logits.argmax(dim=1)
    shares = (predicted == labels).float()
    if mixed is not None:
        shares = torch.lerp((predicted == mixed.labels).float(), shares, mixed.weights)
    return (shares * has_label(labels, mixed)).sum()


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """float32 [B, num_classes], of -1 that of class 0. torch's own waits for the device."""
    zeros = torch.zeros(len(labels), num_classes, device=labels.device)
    return zeros.scatter_(1, labels.clamp(min=0)[:, None], 1)
