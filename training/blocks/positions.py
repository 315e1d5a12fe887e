"""Fixed two-dimensional sine-cosine positions (Chen et al. 2021, MoCo v3; He et al. 2021, MAE)."""

import torch
from timm.models.vision_transformer import VisionTransformer
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


@torch.no_grad()
def fix_positions(encoder: VisionTransformer) -> None:
    """Sine-cosine positions in the place of learnt ones, from now on without gradient."""
    assert encoder.pos_embed is not None
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    grid = encoder.patch_embed.grid_size
    encoder.pos_embed.copy_(sine_cosine(encoder.embed_dim, *grid, prefix_tokens=prefix))
    encoder.pos_embed.requires_grad_(False)
