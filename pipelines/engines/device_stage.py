"""From uint8 views to what a network reads: the one definition of finishing, on any device.

    normalise   (x / 255 - mean) / std, computed as x * scale + bias in float32
    erase       the boxes of RandomErasing, in float32, by 0, a colour or noise
    mix         Mixup or CutMix with the partner's normalised and erased, but unmixed pixels, in
                float32: weight * x + (1 - weight) * partner, or the partner's box
    cast        to the consumer's dtype

Views stay uint8 up to here, so a quarter of the bytes crosses to the device. Which samples change
is read on the host, where engines leave `Batch.erased` and `Batch.mixed`; nothing waits for the
device. What only some samples need is done for a few of them at a time, to bound the memory.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from headrace.pipelines.batch import Batch, Erased, Mixed
from headrace.pipelines.engines.device_noise import pixel_noise

# A CPU's caches should hold what is worked on; elsewhere a launch costs more than memory.
_VALUES_AT_ONCE = {"cpu": 1 << 20}
_VALUES_AT_ONCE_ELSEWHERE = 1 << 22


def normalize(
    view: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 [B, 3, H, W] to `dtype` [B, 3, H, W] with channels-last strides, on the same device.

    mean, std: per channel, for pixels in [0, 1]. The result is new memory.
    """
    return _as_view(_normalized(view, mean, std)).to(dtype)


# What follows works on lines of values, float32 [B, H, W * 3]: a broadcast along an innermost axis
# of three channels keeps a CPU kernel from vectorising (normalisation takes 2.3 times as long).


def _as_view(lines: torch.Tensor) -> torch.Tensor:
    """[B, H, W * 3] as [B, 3, H, W] with channels-last strides, sharing memory."""
    return lines.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


def _normalized(view: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    batch, channels, height, width = view.shape
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32)
    bias = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    line_scale = scale.repeat(width).to(view.device, non_blocking=True)
    line_bias = bias.repeat(width).to(view.device, non_blocking=True)
    lines = view.permute(0, 2, 3, 1).reshape(batch, height, width * channels).float()
    return torch.addcmul(line_bias, lines, line_scale, out=lines)


def _inside(boxes: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
    """bool [n, H, W * 3]: which values of n pictures are in int32 [n, 4] boxes, one of each."""
    top, left, height, width = boxes[:, :, None].unbind(1)
    y, value = (torch.arange(length, device=lines.device) for length in lines.shape[1:])
    x = value // 3
    in_rows = (y >= top) & (y < top + height)
    in_columns = (x >= left) & (x < left + width)
    return in_rows[:, :, None] & in_columns[:, None, :]


def _is_box(boxes: torch.Tensor) -> torch.Tensor:
    """bool [...]: whether int32 [..., 4] = top, left, height, width has any pixel."""
    return boxes[..., 2:].amin(dim=-1) > 0


def _pictures_at_once(lines: torch.Tensor) -> int:
    values = _VALUES_AT_ONCE.get(lines.device.type, _VALUES_AT_ONCE_ELSEWHERE)
    return max(1, values // math.prod(lines.shape[1:]))


def _erase(lines: torch.Tensor, erased: Erased, where: torch.Tensor) -> None:
    """Overwrite the boxes in place, later ones over earlier ones.

    erased: on the device of `lines`. where: bool [B], the samples that have a box, on the host.
    """
    fill = torch.zeros((), device=lines.device)
    on_host, at_once = where.nonzero()[:, 0], _pictures_at_once(lines)
    for first in range(0, len(on_host), at_once):
        rows = on_host[first : first + at_once].to(lines.device, non_blocking=True)
        chosen = lines[rows]
        if erased.keys is not None:
            fill = pixel_noise(erased.keys[rows], chosen[0].numel()).view_as(chosen)
        for place in range(erased.boxes.shape[1]):
            if erased.colors is not None:
                fill = erased.colors[rows, place].repeat(1, lines.shape[2] // 3)[:, None]
            chosen = torch.where(_inside(erased.boxes[rows, place], lines), fill, chosen)
        lines[rows] = chosen


def _mix(lines: torch.Tensor, mixed: Mixed, cut: torch.Tensor) -> torch.Tensor:
    """Each sample with its partner, as new memory.

    mixed: on the device of `lines`. cut: bool [B], the samples that have a box, on the host.
    """
    result, at_once = torch.empty_like(lines), _pictures_at_once(lines)
    for first in range(0, len(lines), at_once):
        rows = slice(first, first + at_once)
        partners, boxes = lines[mixed.partners[rows]], mixed.boxes[rows]
        share = torch.where(_is_box(boxes), 1.0, mixed.weights[rows])[:, None, None]
        chosen = lines[rows]
        if cut[rows].any():
            chosen = torch.where(_inside(boxes, lines), partners, chosen)
        # Not addcmul: whether it rounds once or twice depends on the processor.
        torch.mul(share, chosen, out=result[rows]).add_(partners.mul_(1 - share))
    return result


def device_stage(
    batch: Batch,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """The batch on `device` with finished views; the bytes move before they become floats.

    mean, std: see `normalize`. dtype: a floating point type. The views are new memory; `erased` and
    `mixed` stay, to say what was done.
    """
    moved = batch.to(device)
    nothing = (None,) * len(batch.views)
    finished = []
    for view, erased, erased_on_host in zip(
        moved.views, moved.erased or nothing, batch.erased or nothing, strict=True
    ):
        lines = _normalized(view, mean, std)
        if erased is not None and erased_on_host is not None:
            _erase(lines, erased, _is_box(erased_on_host.boxes).any(dim=1).cpu())
        if moved.mixed is not None and batch.mixed is not None:
            lines = _mix(lines, moved.mixed, _is_box(batch.mixed.boxes).cpu())
        finished.append(_as_view(lines).to(dtype))
    return replace(moved, views=tuple(finished))
