"""Ops on values, as DALI's graph: all pictures of a view at once, uint8 [pictures, H, W, 3].

DALI's own colour operators have a fixed order, contrast about mid-grey and another hue than
torchvision's. Here they are built from arithmetic, so that they mean what the reference engine
means, rounding included.
"""

from typing import Any

from nvidia.dali import fn, math
from nvidia.dali.data_node import DataNode

from headrace.pipelines.engines.dali.columns import LUMA, linear_slots
from headrace.pipelines.engines.dali.nodes import (
    FLOAT,
    TRUNCATE,
    UINT8,
    Inputs,
    cast,
    level,
    single_node,
)
from headrace.pipelines.ops import ColorJitter


def luma(pictures: DataNode) -> DataNode:
    """The grey picture, uint8 [pictures, H, W, 1]."""
    return single_node(fn.coord_transform(pictures, M=LUMA.tolist(), dtype=UINT8))


def mean_level(gray: DataNode) -> Any:
    """The mean of each grey picture as contrast takes it: rounded, [pictures, 1, 1, 1]."""
    return math.floor(fn.reductions.mean(gray, axes=[1, 2], keep_dims=True) + 0.5)


def grayscale(inputs: Inputs, pictures: DataNode, name: str) -> DataNode:
    matrix = fn.per_frame(inputs.argument(name + "matrix"))
    return single_node(fn.coord_transform(pictures, M=matrix, dtype=UINT8))


def gaussian_blur(inputs: Inputs, pictures: DataNode, name: str) -> DataNode:
    sigma = fn.per_frame(inputs.argument(name + "sigma"))
    window = fn.per_frame(inputs.argument(name + "window"))
    return single_node(fn.gaussian_blur(pictures, sigma=sigma, window_size=window))


def solarize(inputs: Inputs, pictures: DataNode, name: str) -> DataNode:
    """Invert what is at or above `threshold`."""
    inverted = pictures >= inputs.operand(name + "threshold")
    return single_node(pictures ^ (inverted * level(255)))


def color_jitter(inputs: Inputs, op: ColorJitter, pictures: DataNode, name: str) -> DataNode:
    before, after = linear_slots(op)
    for slot in range(before):
        pictures = _linear(inputs, op, pictures, f"{name}{slot}.")
    if op.hue > 0:
        pictures = _hue(inputs, pictures, f"{name}hue.")
    for slot in range(before, before + after):
        pictures = _linear(inputs, op, pictures, f"{name}{slot}.")
    return pictures


def _linear(inputs: Inputs, op: ColorJitter, pictures: DataNode, slot: str) -> DataNode:
    """One linear step: truncate(clamp(scale * x + gray * luma + mean * mean(luma) + shift))."""
    scaled = pictures * inputs.operand(slot + "scale")
    added: Any = -TRUNCATE
    if op.brightness > 0 and op.additive_brightness:
        added = inputs.operand(slot + "shift") + added
    if op.saturation > 0 or op.contrast > 0:
        gray = luma(pictures)
        if op.contrast > 0:
            added = mean_level(gray) * inputs.operand(slot + "mean") + added
        if op.saturation > 0:
            added = gray * inputs.operand(slot + "gray") + added
    return cast(scaled + added, UINT8)


def _hue(inputs: Inputs, pictures: DataNode, name: str) -> DataNode:
    """Rotate the hue as Pillow's HSV does, with hue and saturation in 8 bits.

    With V and m the largest and smallest channel and C = V - m, the hue in [0, 6) is
    3 -+ (2 - (G + B - R - m) / C), minus where G >= B. Back from hue h, each channel is
    V - C * clamp(s * |h - c| + o, 0, 1).
    """
    steps = inputs.operand(name + "steps")
    pixels = cast(pictures, FLOAT)
    red, green, blue = (pixels[:, :, :, channel : channel + 1] for channel in range(3))
    value = math.max(math.max(red, green), blue)
    least = math.min(math.min(red, green), blue)
    chroma = value - least

    toward = (green + blue - red - least) / math.max(chroma, 1.0)
    side = (green >= blue) * -2.0 + 1.0
    hue = (toward * -42.5 + 85.0) * side + 127.5  # 255 is the whole circle
    hue = math.floor(hue * steps) / steps + inputs.operand(name + "shift")
    hue = hue - (hue >= 256.0) * 256.0
    saturation = math.floor(chroma / math.max(value, 1.0) * 255.0 * steps) / steps
    chroma = saturation * value * (1 / 255)

    distance = math.abs(hue * (6 / 255) - inputs.per_channel(3, 2, 4))
    share = distance * inputs.per_channel(-1, 1, 1) + inputs.per_channel(2, -1, -1)
    share = math.max(math.min(share, 1.0), 0.0)
    return cast(value - chroma * share, UINT8)
