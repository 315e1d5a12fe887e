"""What stands on the encoder during training and is thrown away afterwards."""

from typing import Literal

from torch import nn


def feature_dim(encoder: nn.Module) -> int:
    """Width of what a timm model without classifier returns."""
    width = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    assert isinstance(width, int)
    return width


class Mlp(nn.Sequential):
    """The projectors and predictors of two-view methods: [B, in] -> [B, out].

    Linear, batch norm and ReLU per hidden layer, `layers` - 1 of them; then linear and, unless
    `last_norm` is "none", a batch norm: "affine" with scale and shift, "no_shift" (SimCLR) with
    scale alone, "plain" (MoCo v3, SimSiam) with neither. hidden_bias, last_bias: of the linear
    layers.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        layers: int = 2,
        *,
        last_norm: Literal["none", "affine", "no_shift", "plain"] = "none",
        hidden_bias: bool = False,
        last_bias: bool = False,
    ) -> None:
        parts: list[nn.Module] = []
        for _ in range(layers - 1):
            parts += [nn.Linear(in_dim, hidden_dim, bias=hidden_bias)]
            parts += [nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
            in_dim = hidden_dim
        parts += [nn.Linear(in_dim, out_dim, bias=last_bias)]
        if last_norm != "none":
            norm = nn.BatchNorm1d(out_dim, affine=last_norm != "plain")
            if last_norm == "no_shift":
                norm.bias.requires_grad_(False)
            parts += [norm]
        super().__init__(*parts)
