"""The head of DINO, iBOT and DINOv2: an MLP to a narrow bottleneck, compared with prototypes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Linear):
    """Unit vectors [..., in] -> float32 [..., out]: the cosine with each of `out` prototypes.

    A weight-normalised layer whose lengths g are 1: fixed, or with `learn_lengths` trained. Float32
    under autocast too, for cosines are divided by small temperatures.
    """

    lengths: Tensor | None

    def __init__(self, in_dim: int, out_dim: int, *, learn_lengths: bool = False) -> None:
        super().__init__(in_dim, out_dim, bias=False)
        lengths = nn.Parameter(torch.ones(out_dim, 1)) if learn_lengths else None
        self.register_parameter("lengths", lengths)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        with torch.autocast(input.device.type, enabled=False):
            directions = F.normalize(self.weight.float(), dim=1)
            if self.lengths is not None:
                directions = directions * self.lengths
            return F.linear(input.float(), directions)

    def drop_gradients(self) -> None:
        """Before an optimiser's step: the prototypes stay as they are."""
        for parameter in self.parameters():
            parameter.grad = None


class DinoHead(nn.Module):
    """DINO's head (Caron et al. 2021, appendix C; dino `vision_transformer.py`, `DINOHead`).

    [..., in] -> float32 [..., out]: a three-layer MLP with GELU to a bottleneck, L2 normalisation,
    then `Prototypes`.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        out_dim: int,
        *,
        learn_lengths: bool = False,
    ) -> None:
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
        self.prototypes = Prototypes(bottleneck_dim, out_dim, learn_lengths=learn_lengths)

    def directions(self, features: Tensor) -> Tensor:
        """[..., in] -> float32 [..., bottleneck] of length 1, to be compared with prototypes."""
        bottleneck = self.mlp(features)
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(bottleneck.float(), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        return self.prototypes(self.directions(features))
