"""Convolutional networks on the visible part of a picture: sparse convolution in dense kernels.

A convolution over a picture with holes fills them from their borders, layer by layer; after a few
layers the mask is gone, and the statistics of batch norm are those of pictures that nobody sees
later. Sparse convolution leaves the holes empty (Tian et al. 2023, "Designing BERT for
Convolutional Networks", section 3.1; SparK `pretrain/encoder.py`): every convolution and pooling is
computed everywhere and emptied again where the picture is hidden, and batch norm sees the visible
positions alone. That costs what the dense network costs, and runs on any device.

The code replaces modules, which read the mask from a global variable. Here the modules stay as they
are, whoever replaced them before (`norm.convert`): for one forward pass, hooks carry the mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers.drop import DropPath
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from headrace.training.blocks.drop_path import KeyedDropPath
from headrace.training.method import MakeEncoder
from headrace.training.preset import ConfigError

MIXES_POSITIONS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
LEAVES_ZEROS = (nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU)
DROPS = (nn.Dropout, nn.Dropout2d, DropPath, KeyedDropPath)


def residual_network(method: str, make_encoder: MakeEncoder, **timm_options: object) -> ResNet:
    """Raises ConfigError for a backbone that `sparse` cannot run."""
    try:
        encoder = make_encoder(**timm_options)
    except ConfigError as error:
        raise ConfigError(f"{method} needs a timm ResNet (resnet*): {error}") from error
    if not isinstance(encoder, ResNet):
        raise ConfigError(f"{method} needs a timm ResNet (resnet*), not {type(encoder).__name__}")
    supported = (*MIXES_POSITIONS, *LEAVES_ZEROS, *DROPS, _BatchNorm)
    for name, module in encoder.named_modules():
        leaf = not list(module.children())
        if (
            leaf
            and not name.startswith(("global_pool", "fc"))
            and not isinstance(module, supported)
        ):
            raise ConfigError(
                f"{method} needs a ResNet of convolutions, batch norm and pooling, which can leave "
                f"out what is hidden, and {name} is {type(module).__name__}"
            )
    return encoder


class VisibleCells:
    """What is seen of each sample, equally many cells of a grid, on maps of any resolution.

    kept: int64 [B, k], cells row by row. grid: (rows, columns) of cells. A map [B, C, H, W] has a
    whole number of positions per cell.
    """

    def __init__(self, kept: Tensor, grid: tuple[int, int]) -> None:
        self.kept = kept
        self.grid = grid
        self._maps: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._runs: dict[tuple[int, int], Tensor] = {}

    def map(self, height: int, width: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """[B, 1, height, width]: True (1) where the position is seen."""
        key = height, width, dtype
        if key not in self._maps:
            rows, columns = self.grid
            down, right = self._cell(height, width)
            cells = self.kept.new_zeros(len(self.kept), rows * columns).scatter_(1, self.kept, 1)
            cells = cells.view(-1, 1, rows, columns).repeat_interleave(down, dim=2)
            self._maps[key] = cells.repeat_interleave(right, dim=3).to(dtype)
        return self._maps[key]

    def take(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, n, 1], what is at the n visible positions of each sample."""
        batch, channels, height, width = x.shape
        right = self._cell(height, width)[1]
        runs = x.permute(0, 2, 3, 1).reshape(-1, right * channels)
        seen = runs.index_select(0, self._places(height, width))
        seen = seen.view(batch, -1, 1, channels).permute(0, 3, 1, 2)
        return seen if x.is_contiguous(memory_format=torch.channels_last) else seen.contiguous()

    def put(self, seen: Tensor, height: int, width: int) -> Tensor:
        """`take` undone: [B, C, n, 1] -> [B, C, height, width], 0 where nothing is seen."""
        batch, channels = seen.shape[:2]
        columns, right = self.grid[1], self._cell(height, width)[1]
        empty = seen.new_zeros(batch * height * columns, right * channels)
        runs = seen.permute(0, 2, 3, 1).reshape(-1, right * channels)
        x = empty.index_copy(0, self._places(height, width), runs)
        x = x.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return x if seen.is_contiguous(memory_format=torch.channels_last) else x.contiguous()

    def _places(self, height: int, width: int) -> Tensor:
        """int64 [B * k * down]: of the visible cells' lines, among [B, height, columns] lines."""
        if (height, width) not in self._runs:
            down, columns = self._cell(height, width)[0], self.grid[1]
            row, column = self.kept // columns, self.kept % columns
            lines = torch.arange(down, device=self.kept.device)
            samples = torch.arange(len(self.kept), device=self.kept.device)[:, None, None]
            places = samples * height + (row * down)[..., None] + lines
            self._runs[height, width] = (places * columns + column[..., None]).flatten()
        return self._runs[height, width]

    def _cell(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a cell in positions of this map."""
        rows, columns = self.grid
        if height % rows or width % columns:
            raise ValueError(f"a map of {height} x {width} has no {rows} x {columns} cells")
        return height // rows, width // columns


@contextmanager
def sparse(network: nn.Module, cells: VisibleCells) -> Iterator[None]:
    """Inside, the network sees visible cells alone; what it is given must be 0 in the others.

    Every output of a convolution, pooling or batch norm is 0 where nothing is seen, and batch norm
    (any kind of it, over one rank or all) takes and gives visible positions as [B, C, n, 1].
    Nothing but the body of the `with` statement may run the network meanwhile.
    """
    sizes: list[tuple[int, int]] = []

    def compact(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        sizes.append((x.shape[2], x.shape[3]))
        return (cells.take(x),)

    def spread(_: nn.Module, __: tuple[Tensor, ...], seen: Tensor) -> Tensor:
        return cells.put(seen, *sizes.pop())

    def empty(_: nn.Module, __: tuple[Tensor, ...], x: Tensor) -> Tensor:
        # No backward pass of these modules looks at their output.
        return x.mul_(cells.map(x.shape[2], x.shape[3], x.dtype))

    handles: list[RemovableHandle] = []
    try:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(compact))
                handles.append(module.register_forward_hook(spread))
            elif isinstance(module, MIXES_POSITIONS):
                handles.append(module.register_forward_hook(empty))
        yield
    finally:
        for handle in handles:
            handle.remove()
