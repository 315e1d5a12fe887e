"""What stands on the encoder during training and is thrown away afterwards."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def feature_dim(encoder: nn.Module) -> int:
    """Width of what a timm model without classifier returns."""
    width = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    assert isinstance(width, int)
    return width


class ProjectionHead(nn.Sequential):
    """SimCLR's head (Chen et al. 2020; simclr `model_util.py`, `projection_head`, v1: two layers).

    [B, in] -> [B, out]: linear, batch norm, ReLU per hidden layer; then linear and a batch norm
    without shift. No linear layer has a bias.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, layers: int = 2) -> None:
        parts: list[nn.Module] = []
        for _ in range(layers - 1):
            parts += [nn.Linear(in_dim, hidden_dim, bias=False)]
            parts += [nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
            in_dim = hidden_dim
        last = nn.BatchNorm1d(out_dim)
        last.bias.requires_grad_(False)
        super().__init__(*parts, nn.Linear(in_dim, out_dim, bias=False), last)


class DinoHead(nn.Module):
    """DINO's head (Caron et al. 2021, appendix C; dino `vision_transformer.py`, `DINOHead`).

    [B, in] -> float32 [B, out]: a three-layer MLP with GELU to a bottleneck, L2 normalisation, then
    the cosine with each of `out_dim` prototypes: a weight-normalised layer whose length g is fixed
    at 1. The cosines are float32 under autocast too, for they are divided by small temperatures.
    """

    def __init__(self, in_dim: int, hidden_dim: int, bottleneck_dim: int, out_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(bottleneck_dim, out_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        bottleneck = self.mlp(features)
        with torch.autocast(features.device.type, enabled=False):
            directions = F.normalize(self.prototypes.weight.float(), dim=1)
            return F.linear(F.normalize(bottleneck.float(), dim=1), directions)
