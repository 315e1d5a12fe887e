"""What methods that train a classifier share: counts of labels, hits, and what a run exports."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from headrace.pipelines.batch import Batch
from headrace.training.blocks.targets import agreement, has_label
from headrace.training.collectives import mean_over_ranks
from headrace.training.run.export import with_classifier


def labelled_per_rank(batch: Batch) -> Tensor:
    """Float32 scalar: how many samples of the global batch have a label, over the ranks."""
    return mean_over_ranks(has_label(batch.labels, batch.mixed).sum().float())


def top1_share(logits: Tensor, batch: Batch, labelled: Tensor) -> Tensor:
    """`agreement` of logits [B, C] with the batch's labels, over `labelled_per_rank`; 0 if none."""
    hits = agreement(logits, batch.labels, batch.mixed)
    return hits / torch.where(labelled > 0, labelled, 1)


def held_out_hits(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What `Method.evaluate` gives: "top1", "top5", bool [L], of the L samples that have a label.

    logits: [B, C]; labels: int64 [B], -1 where there is none.
    """
    labelled = labels >= 0
    nearest = logits.topk(min(5, logits.shape[1]), dim=1).indices[labelled]
    hits = nearest == labels[labelled, None]
    return {"top1": hits[:, 0], "top5": hits.any(dim=1)}


def classifier_export(
    encoder: nn.Module, *classifiers: nn.Linear
) -> Mapping[str, dict[str, Tensor]]:
    """What `Method.exports` adds: "classifier", of the encoder's timm model with these last layers.

    {} where the encoder does not say what it calls them.
    """
    weights = with_classifier(encoder, *classifiers)
    return {"classifier": weights} if weights else {}
