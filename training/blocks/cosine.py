"""Directions of embeddings: what BYOL and SimSiam compare, and whether they have collapsed."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine_to_other_view(predictions: Tensor, targets: Tensor) -> Tensor:
    """The cosine between a view's prediction and the *other* view's target, a constant.

    predictions, targets: [n, 2, D], not normalised, any float dtype. Returns float32 [n, 2]: entry
    v compares predictions[:, v] with targets[:, 1 - v]. No gradient flows into the targets.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        predictions = F.normalize(predictions.float(), dim=-1)
        targets = F.normalize(targets.detach().float(), dim=-1)
        return (predictions * targets.flip(1)).sum(dim=-1)


@torch.no_grad()
def spread(embeddings: Tensor) -> Tensor:
    """How far the directions of different samples lie apart, from 0 (collapsed) to 1 (everywhere).

    embeddings: [n, ..., D]. The standard deviation of each channel of the normalised embeddings
    over this rank's samples, averaged over everything else and multiplied by sqrt(D): SimSiam (Chen
    & He 2020), section 4.1. A float32 scalar; the mean over ranks is not quite the whole batch's.
    """
    directions = F.normalize(embeddings.float(), dim=-1)
    return directions.std(dim=0, correction=0).mean() * embeddings.shape[-1] ** 0.5
