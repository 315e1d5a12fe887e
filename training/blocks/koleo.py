"""KoLeo: a batch that is spread out, because everyone keeps away from the nearest neighbour."""

import torch
from torch import Tensor
from torch.nn import functional as F

_EPSILON = 1e-8


def koleo_loss(local: Tensor, everyone: Tensor, first_row: int) -> Tensor:
    """Kozachenko-Leonenko estimate of minus the entropy, but for constants, in nats.

    local: features [n, D], any length, of the rows that begin at `first_row` of `everyone` [B, D];
    B at least 2. Both sides of each pair carry gradient; which one is nearest does not. Returns a
    float32 scalar: the mean over `local` of -log(d + 1e-8), d being the Euclidean distance of the
    L2-normalised feature to its nearest other (the least cosine distance). Sablayrolles et al.
    2019, eq. 2 (arXiv 1806.03198); dinov2 `koleo_loss.py`, over one GPU's batch.
    """
    with torch.autocast(local.device.type, enabled=False):
        queries = F.normalize(local.float(), dim=-1, eps=_EPSILON)
        keys = F.normalize(everyone.float(), dim=-1, eps=_EPSILON)
        with torch.no_grad():
            own_rows = torch.arange(first_row, first_row + len(local), device=local.device)
            cosines = (queries @ keys.T).scatter(1, own_rows[:, None], -2.0)
            nearest = cosines.argmax(dim=1)
        distances = F.pairwise_distance(queries, keys[nearest], eps=_EPSILON)
        return -(distances + _EPSILON).log().mean()
