"""Batch norm over groups of the batch instead of the whole: what stands in for a GPU's own batch.

MoCo (He et al. 2019, section 3.3, "shuffling BN") must not let a query and its key share their
statistics, for they would know each other by them. Its code normalises on each GPU alone, and
shuffles the keys' pictures over the GPUs. Here a group has a size, not a GPU: queries form groups
of consecutive samples, keys interleaved ones (sample i of B is in group i mod B / size), so that a
query's group and its key's share as few samples as they can. The numbers do not depend on the world
size, no picture travels, and the order being random, nothing is gained by another shuffle.

A rank holds whole groups of queries, whose gradient then needs no other rank. Keys take no
gradient, and need one sum per layer over the ranks, as global batch norm does.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from headrace.training.blocks.norm import GlobalBatchNorm
from headrace.training.collectives import mean_over_ranks, rank, sum_over_ranks, world_size
from headrace.training.preset import ConfigError


class GroupedBatchNorm(GlobalBatchNorm):
    """Takes over a batch norm, as `GlobalBatchNorm` does; `norm.convert` leaves it as it is.

    [n, C] or [n, C, ...] of this rank -> the same shape. Running statistics, for evaluation, follow
    the mean over all groups of their mean and unbiased variance. interleaved: without gradient
    alone. Raises ConfigError where the samples of a micro-batch cannot be divided into groups of
    `size`, or keys would all be in one group, which is then their queries' too.
    """

    def __init__(self, norm: _BatchNorm, size: int, *, interleaved: bool) -> None:
        super().__init__(norm)
        self.size = size
        self.interleaved = interleaved

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        samples = len(input) * (world_size() if self.interleaved else 1)
        holder = "a micro-batch" if self.interleaved else "a rank's part of a micro-batch"
        if samples % self.size:
            raise ConfigError(
                f"batch norm in groups of {self.size} samples cannot divide the {samples} of "
                f"{holder}: choose a group or a batch that fits the ranks and --run.accumulate"
            )
        if self.interleaved and samples < 2 * self.size:
            raise ConfigError(
                f"batch norm in groups of {self.size} samples has one group for the {samples} of "
                f"{holder}, by which a query would know its key: choose a smaller "
                f"--objective.batch-norm-group or --run.accumulate"
            )
        normalize = self._interleaved if self.interleaved else self._consecutive
        x, mean, variance = normalize(input)
        self._track(mean, variance)
        return self.act(self.drop(x))

    def _consecutive(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised; mean and unbiased variance [C], averaged over all ranks' groups."""
        parts = x.split(self.size)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        moments = x.new_zeros(2, len(parts), x.shape[1], dtype=wide)
        # As "running" statistics with a momentum of 1 torch hands out those of the group.
        outputs = [
            F.batch_norm(
                part, mean, variance, self.weight, self.bias, True, momentum=1.0, eps=self.eps
            )
            for part, mean, variance in zip(parts, *moments, strict=True)
        ]
        mean, variance = mean_over_ranks(moments.double().mean(dim=1)).to(wide)
        return torch.cat(outputs), mean, variance

    def _interleaved(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same over interleaved groups, which every rank holds a part of."""
        assert not torch.is_grad_enabled(), "its statistics would hand back no gradient"
        samples = len(x)
        groups = samples * world_size() // self.size
        numbers = torch.arange(groups, device=x.device)
        group_of_sample = (rank() * samples + torch.arange(samples, device=x.device)) % groups
        wide = x if x.dtype == torch.float64 else x.float()
        # Each sample's moments around its own mean, so that no digits cancel (torch's var_mean
        # takes ten times as long).
        mean, variance = wide, torch.zeros_like(wide)
        if x.ndim > 2:
            axes = list(range(2, x.ndim))
            mean = wide.mean(axes, keepdim=True)
            variance = (wide - mean).square_().mean(axes)
        mean = mean.view(samples, -1).double()
        moments = torch.cat([mean, variance.double() + mean.square()], dim=1)
        members = group_of_sample == numbers[:, None]
        sums = sum_over_ranks(members.double() @ moments)
        mean, squares = (sums / self.size).chunk(2, dim=1)
        variance = (squares - mean.square()).clamp(min=0)

        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        shape = [samples, x.shape[1]] + [1] * (x.ndim - 2)
        scale = scale.to(wide.dtype)[group_of_sample].view(shape)
        shift = shift.to(wide.dtype)[group_of_sample].view(shape)
        count = self.size * x[0, 0].numel()
        variance = variance.mean(dim=0) * (count / (count - 1))
        return (
            torch.addcmul(shift, wide, scale).to(x.dtype),
            mean.mean(dim=0).to(wide.dtype),
            variance.to(wide.dtype),
        )


def require_groups(method: str, batch: int, size: int) -> None:
    """Raises ConfigError where a batch is not two or more groups, whole ones on each rank."""
    if batch < 2 * size or batch % (size * world_size()):
        raise ConfigError(
            f"{method} needs two or more groups of {size} samples (--objective.batch-norm-group), "
            f"and whole ones on each of {world_size()} rank(s); the batch is {batch}"
        )


def group_norms(module: nn.Module, size: int, *, interleaved: bool) -> int:
    """Replaces every batch norm inside of `module`; returns how many. State dict keys stay."""
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, GroupedBatchNorm(child, size, interleaved=interleaved))
            replaced += 1
        else:
            replaced += group_norms(child, size, interleaved=interleaved)
    return replaced
