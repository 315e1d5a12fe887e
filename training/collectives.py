"""What the ranks say to each other. Without a process group there is one rank, and each function is
the identity.

A name that ends in _ works in place, as torch's own do, and returns its argument; the others leave
it as it is.

Losses follow one convention. Every rank returns its share of the loss; the *mean over ranks* of
shares and of their gradients is the global batch's loss and gradient. DDP takes that mean of the
parameters' gradients. A tensor that several ranks' losses look at must therefore hand back the
*sum* of what those losses ask of it: with L = mean_r L_r, rank s adds sum_r dL_r/dz_s * dz_s/dw to
the mean over s. `gather_with_gradient` does so; nothing else here has a gradient.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Value = TypeVar("Value")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


# --------------------------------------------------------------------------------- sums and means


@torch.no_grad()
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over ranks, any shape, without gradient. The argument stays as it is."""
    if world_size() == 1:
        return tensor.detach()
    return sum_over_ranks_(tensor.detach().clone())


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over ranks, any shape, without gradient. The argument stays as it is."""
    return sum_over_ranks(tensor) / world_size()


def sum_over_ranks_(tensor: Tensor) -> Tensor:
    """The sum over ranks, any shape, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks_(tensor: Tensor) -> Tensor:
    """The mean over ranks of a floating-point tensor of any shape, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def largest_over_ranks_(tensor: Tensor) -> Tensor:
    """The elementwise maximum over ranks, any shape, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


# ----------------------------------------------------------------------------------- whole tensors


def broadcast_(tensor: Tensor, source: int) -> Tensor:
    """Rank `source`'s tensor on every rank, in place; all have its shape and dtype."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def gather_to(tensor: Tensor, destination: int) -> list[Tensor]:
    """Every rank's tensor on rank `destination`, in the order of the ranks; elsewhere nothing.

    Shapes and dtypes must be the same everywhere.
    """
    if world_size() == 1:
        return [tensor]
    here = rank() == destination
    received = [torch.empty_like(tensor) for _ in range(world_size())] if here else None
    dist.gather(tensor.contiguous(), received, destination)
    return received or []


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


# ----------------------------------------------------------------------------------------- objects


def from_main(compute: Callable[[], Value]) -> Value:
    """What `compute` returns on rank 0, on every rank; an error of rank 0 is raised on every rank.

    The value and the error travel as pickles.
    """
    if world_size() == 1:
        return compute()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = compute()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather_objects(value: Value) -> list[Value]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered
