"""Colour spaces of pictures in [0, 1], as tensors on any device; float32 under autocast too."""

import torch
from torch import Tensor

# IEC 61966-2-1: linear sRGB to XYZ, and XYZ of white (D65, observer of 2 degrees).
SRGB_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
WHITE = (0.95047, 1.0, 1.08883)

# ITU-R BT.601 for 8 bits, of R, G, B in [0, 1].
_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB [B, 3, H, W] -> CIE Lab float32 [B, 3, H, W]: L in [0, 100], a and b about +-100.

    The constants are scikit-image's (`color/colorconv.py`, `rgb2lab`).
    """
    rgb = rgb.float()
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    channels = linear.unbind(dim=1)
    x, y, z = (
        _response(_sum(row, channels) / white)
        for row, white in zip(SRGB_TO_XYZ, WHITE, strict=True)
    )
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """[B, 3, H, W] -> YCbCr float32: Y in [16, 235], Cb and Cr in [16, 240]."""
    channels = rgb.float().unbind(dim=1)
    offsets = (16, 128, 128)
    return torch.stack(
        [_sum(row, channels) + offset for row, offset in zip(_YCBCR, offsets, strict=True)], dim=1
    )


def _sum(weights: tuple[float, ...], channels: tuple[Tensor, ...]) -> Tensor:
    # Plain numbers: a matrix would have to travel to the device, and be multiplied in bfloat16.
    red, green, blue = channels
    return weights[0] * red + weights[1] * green + weights[2] * blue


def _response(share: Tensor) -> Tensor:
    """Cube root, straight near black."""
    return torch.where(share > 0.008856, share.clamp(min=0) ** (1 / 3), 7.787 * share + 16 / 116)
