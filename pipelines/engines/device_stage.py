"""From uint8 views to what a network reads: the one definition of normalisation, on any device.

    out = (x / 255 - mean) / std, computed as x * scale + bias in float32, then cast to `dtype`

Views stay uint8 up to here, so a quarter of the bytes crosses to the device.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipelines.batch import Batch


def normalize(
    view: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 [B, 3, H, W] to `dtype` [B, 3, H, W] with channels-last strides, on the same device.

    mean, std: per channel, for pixels in [0, 1]. The result is new memory.
    """
    batch, channels, height, width = view.shape
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32)
    bias = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    # Whole rows of pixels instead of three channels as the innermost axis: a broadcast along an
    # axis of three keeps the CPU kernel from vectorising (2.3 times slower).
    row_scale = scale.repeat(width).to(view.device, non_blocking=True)
    row_bias = bias.repeat(width).to(view.device, non_blocking=True)
    pixels = view.permute(0, 2, 3, 1).reshape(batch * height, width * channels).float()
    torch.addcmul(row_bias, pixels, row_scale, out=pixels)
    normalized = pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return normalized.to(dtype)


def device_stage(
    batch: Batch,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """The batch on `device` with normalised views; the bytes move before they become floats."""
    moved = batch.to(device)
    return replace(moved, views=tuple(normalize(view, mean, std, dtype) for view in moved.views))
