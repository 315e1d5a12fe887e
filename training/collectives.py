"""What a method needs of the other ranks, under one convention.

Every rank returns its share of the loss; the *mean over ranks* of shares and of their gradients is
the global batch's loss and gradient. DDP takes that mean of the parameters' gradients. A tensor
that several ranks' losses look at must therefore hand back the *sum* of what those losses ask of
it: with L = mean_r L_r, rank s adds sum_r dL_r/dz_s * dz_s/dw to the mean over s. Without a process
group there is one rank, and each function is the identity.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over ranks, any shape, without gradient. The argument stays as it is."""
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over ranks, any shape, without gradient. The argument stays as it is."""
    return sum_over_ranks(tensor) / world_size()


@torch.no_grad()
def gather_rows(tensor: Tensor) -> Tensor:
    """[n, ...] on each of W ranks -> [W * n, ...] on all, in the order of the ranks; any dtype.

    Without gradient; n must be the same everywhere.
    """
    if world_size() == 1:
        return tensor.detach()
    tensor = tensor.detach().contiguous()
    pieces = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(pieces, tensor)
    return torch.cat(pieces)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return gather_rows(tensor)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> Tensor:
        total = sum_over_ranks(gradients[0].contiguous())
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """[n, ...] on each of W ranks -> [W * n, ...] on all of them, in the order of the ranks.

    n must be the same everywhere. The gradient is the sum over ranks, as the module's text derives.
    """
    if world_size() == 1:
        return tensor
    return _Gather.apply(tensor)
