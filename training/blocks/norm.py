"""Batch norm over the batch of all ranks, so that the world size does not change the numbers.

torch's SyncBatchNorm does this on CUDA and refuses CPU tensors; `GlobalBatchNorm` does it anywhere,
with one all-reduce forward (count, sum, sum of squares) and one backward. Local moments are taken
around the local mean and added up in double precision, so that no digits cancel. It costs about
twice torch's own CPU kernels, which is why one rank alone keeps those.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from headrace.training.collectives import sum_over_ranks
from headrace.training.world import World


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, with the moments of all ranks' x.

    Also gives mean, biased variance (both in x's accuracy, at least float32) and the float64 count.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        channels = x.shape[1]
        wide = x if x.dtype == torch.float64 else x.float()
        local_mean = wide.mean(axes, keepdim=True)
        local_squares = (wide - local_mean).square_().sum(axes).double()
        local_mean = local_mean.flatten().double()
        local_count = x.numel() // channels
        moments = torch.cat(
            [
                local_mean * local_count,
                local_squares + local_mean.square() * local_count,
                local_mean.new_full((1,), local_count),
            ]
        )
        sums, squares, count = sum_over_ranks(moments).split([channels, channels, 1])
        mean = sums / count
        variance = (squares / count - mean.square()).clamp_(min=0)
        mean, variance = mean.to(wide.dtype), variance.to(wide.dtype)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, variance, count)
        return (
            F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps),
            mean,
            variance,
            count,
        )

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        gradient = gradients[0].to(mean.dtype)
        normalized = (x - mean.view(shape)) * inverse_std.view(shape)
        bias_gradient = gradient.sum(axes)
        weight_gradient = (gradient * normalized).sum(axes)
        # dx = w / std * (dy - mean(dy) - x^ * mean(dy * x^)), the means being those of all ranks.
        # Those of the parameters stay local: DDP averages them like all others.
        sums = sum_over_ranks(torch.cat([bias_gradient, weight_gradient]).double()) / count
        first, second = sums.to(mean.dtype).chunk(2)
        scale = inverse_std if weight is None else inverse_std * weight
        gradient = gradient - first.view(shape) - normalized.mul_(second.view(shape))
        gradient = gradient.mul_(scale.view(shape)).to(x.dtype)
        if weight is None:
            return gradient, None, None, None
        return gradient, weight_gradient, bias_gradient, None


class GlobalBatchNorm(_BatchNorm):
    """Takes over a BatchNorm1d, 2d or timm BatchNormAct2d: its parameters, buffers and their names.

    [B, C] or [B, C, ...] -> the same shape. In training every rank must call it equally often; the
    number of rows may differ. Running statistics move as torch's do (unbiased variance), and are
    equal on all ranks.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False)
        self.affine = norm.affine
        self.track_running_stats = norm.track_running_stats
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.ndim < 2:
            raise ValueError(f"batch norm needs [B, C, ...], got the shape {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            x = F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        else:
            x, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self.eps)
            if self.training:
                self._track(mean, variance * (count / (count - 1)))
        return self.act(self.drop(x))

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # A momentum of None asks for the average over all batches so far.
        rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean += rate * (mean - self.running_mean)
        self.running_var += (rate * (unbiased_variance - self.running_var)).to(mean.dtype)


def convert(module: nn.Module, world: World) -> nn.Module:
    """Makes every batch norm in `module` span all ranks; returns the module, or what replaces it.

    The state dict keeps its keys. With one rank nothing changes; on CUDA torch's SyncBatchNorm.
    """
    if world.size == 1:
        return module
    on_cuda = world.device.type == "cuda"
    return _replace(module, convert_sync_batchnorm if on_cuda else GlobalBatchNorm)


def _replace(module: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    if isinstance(module, GlobalBatchNorm):
        return module  # one that knows of the ranks already
    if isinstance(module, _BatchNorm):
        return make(module)
    for name, child in module.named_children():
        setattr(module, name, _replace(child, make))
    return module
