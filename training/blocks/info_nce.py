"""InfoNCE (van den Oord et al. 2018): pick a query's own key out of many.

In one direction; a symmetric loss is the sum of two calls. Similarities are cosines, computed in
float32 under autocast too, for they are divided by small temperatures.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def queue_info_nce(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Each query has its own key and shares the negatives: MoCo (He et al. 2019), eq. 1.

    queries, keys: [n, D], row i with row i; negatives: [K, D]. Rows need not be normalised, and a
    gradient flows into whichever carries one. Returns the float32 scalar mean over the n queries of
    -log(exp(q k+ / t) / (exp(q k+ / t) + sum over K of exp(q k- / t))), in nats, and bool [n]:
    whether no negative is as near as the key. As in the code (moco `builder.py`, `forward`).
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(queries.float(), dim=-1)
        key_cosines = (queries * F.normalize(keys.float(), dim=-1)).sum(dim=1, keepdim=True)
        negative_cosines = queries @ F.normalize(negatives.float(), dim=-1).T
        logits = torch.cat([key_cosines, negative_cosines], dim=1) / temperature
        first = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        return F.cross_entropy(logits, first), (key_cosines > negative_cosines).all(dim=1)


def batch_info_nce(
    queries: Tensor, keys: Tensor, first_row: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Each query's negatives are the other samples' keys: MoCo v3 (Chen et al. 2021), eq. 1.

    queries: [n, D] of this rank's samples; keys: [B, D] of the whole batch, in which these begin at
    `first_row`. Rows need not be normalised, and a gradient flows into whichever carries one.
    Returns the float32 scalar mean over the n queries of the cross-entropy of q k / t over all B
    keys, in nats, and bool [n]: whether the own key is the nearest. As in the code (moco-v3
    `builder.py`, `contrastive_loss`), but without its factor 2 t.
    """
    with torch.autocast(queries.device.type, enabled=False):
        keys = F.normalize(keys.float(), dim=-1)
        logits = F.normalize(queries.float(), dim=-1) @ keys.T / temperature
        own_rows = first_row + torch.arange(len(queries), device=queries.device)
        return F.cross_entropy(logits, own_rows), logits.argmax(dim=1) == own_rows
