"""Codes that use all prototypes equally often: the Sinkhorn-Knopp iteration over all ranks."""

import torch
from torch import Tensor

from headrace.training.collectives import gather_rows


@torch.no_grad()
def sinkhorn(
    logits: Tensor, *, epsilon: float, iterations: int, counted: Tensor | None = None
) -> Tensor:
    """Soft assignments of the samples of all ranks, balanced over the prototypes.

    logits: [n, K], similarities of this rank's n samples (any number, which may differ by rank) to
    K prototypes. Returns float32 [n, K], each row summing to 1, without gradient. Starting from
    exp(logits / epsilon) each iteration divides a prototype's column by its sum over the samples of
    all ranks, then a sample's row by its sum: with many iterations a prototype's column sums to
    (samples of all ranks) / K. counted: bool [n]; where it is False the row is padding, which no
    column's sum sees.

    Caron et al. 2020, eq. 3 to 5 (arXiv 2006.09882); swav `main_swav.py`, `distributed_sinkhorn`,
    and dinov2 `dino_clstoken_loss.py`, `sinkhorn_knopp_teacher`, whose further constant factors
    cancel in the last division. Computed on logarithms, so that no logits overflow or leave a
    prototype or a sample with a sum of zero.
    """
    with torch.autocast(logits.device.type, enabled=False):
        codes = logits.float() / epsilon
        for _ in range(iterations):
            rows = codes
            if counted is not None:
                rows = codes.masked_fill(~counted[:, None], float("-inf"))
            columns = gather_rows(rows.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)
            # Where no row of any rank is counted, there is nothing to balance.
            columns = columns.masked_fill(columns.isneginf(), 0.0)
            codes = (codes - columns).log_softmax(dim=1)
        return codes.softmax(dim=1)
