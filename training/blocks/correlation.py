"""Second moments of embeddings over the batch of all ranks, for losses that decorrelate channels.

Each of W ranks multiplies its own rows, and the D x D products are added up: a W-th of the work of
gathering the rows and multiplying all of them everywhere.

The gradient. With P = sum_s P_s(z_s), every rank computes the same loss L(P) as its share. The mean
over ranks of the shares' gradients has to be dL/dw = sum_s dL/dP dP_s/dw, so rank s must hand back
W * dL/dP to its P_s: the sum of what all shares ask for, and they all ask for the same. Hence the
factor W instead of a second all-reduce. (An all-reduce that autograd does not see, as in the code
of Barlow Twins, hands back dL/dP, and training sees a gradient that is W times too small.)
"""

from typing import Any

import torch
from torch import Tensor

from headrace.training.collectives import mean_over_ranks, sum_over_ranks, world_size


class _SumForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004
        return sum_over_ranks(tensor)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ARG004
        *gradients: Tensor,
    ) -> Tensor:
        return gradients[0] * world_size()


def sum_for_all(tensor: Tensor) -> Tensor:
    """The sum over ranks, any shape, of which every rank computes the *same* function.

    Where ranks do different things with it, `gather_with_gradient` is the one to use.
    """
    if world_size() == 1:
        return tensor
    return _SumForAll.apply(tensor)


def centered(rows: Tensor) -> Tensor:
    """[n, D] minus the mean row of all ranks, float32.

    The mean is taken as constant, which is right for second moments alone: the derivative of
    sum (x - m)(y - k) with respect to m is -sum (y - k), and that is 0 where k is the mean of y.
    """
    rows = rows.float()
    return rows - mean_over_ranks(rows.mean(dim=0))


def off_diagonal(matrix: Tensor) -> Tensor:
    """[D, D] with zeros on its diagonal."""
    diagonal = torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(diagonal, 0)
