"""Visible cells of pictures, cell by cell, for tests of sparse convolution."""

from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor

from headrace.training.blocks.sparse import VisibleCells

GRID = (3, 2)


def cells_of(samples: int, count: int = 3, grid: tuple[int, int] = GRID) -> VisibleCells:
    generator = torch.Generator().manual_seed(samples)
    order = torch.rand(samples, grid[0] * grid[1], generator=generator).argsort(dim=1)
    return VisibleCells(order[:, :count].sort(dim=1).values, grid)


def seen_by_hand(cells: VisibleCells, height: int, width: int) -> Tensor:
    """bool [B, height, width], cell by cell."""
    rows, columns = cells.grid
    seen = torch.zeros(len(cells.kept), height, width, dtype=torch.bool)
    for sample, kept in enumerate(cells.kept.tolist()):
        for cell in kept:
            top, left = cell // columns * (height // rows), cell % columns * (width // columns)
            seen[sample, top : top + height // rows, left : left + width // columns] = True
    return seen


def hidden_pictures(
    cells: VisibleCells, channels: int, height: int, width: int, *, layout: Any = None
) -> Tensor:
    """float64 pictures that are 0 where nothing is seen."""
    generator = torch.Generator().manual_seed(1)
    shape = len(cells.kept), channels, height, width
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * seen_by_hand(cells, height, width)[:, None]
    return x.contiguous(memory_format=layout or torch.contiguous_format)


def resnet() -> ResNet:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=0, zero_init_last=False).double()  # pyright: ignore[reportReturnType]
