"""Fixed two-dimensional sine-cosine positions (Chen et al. 2021, MoCo v3; He et al. 2021, MAE)."""

import torch
from torch import Tensor


def sine_cosine(dim: int, height: int, width: int, prefix_tokens: int = 0) -> Tensor:
    """float32 [prefix_tokens + height * width, dim], patches row by row, prefix tokens zero.

    The first half of the channels tells the column, the second half the row; each half is sines,
    then cosines, of dim / 4 frequencies from 1 down to nearly 1 / 10000 (as mae `pos_embed.py`).
    Raises ValueError where dim is no multiple of 4.
    """
    if dim % 4 != 0:
        raise ValueError(f"sine-cosine positions need a dim that is a multiple of 4, not {dim}")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(prefix_tokens, dim), table]).float()
