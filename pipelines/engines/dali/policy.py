"""RandAugment as DALI's graph: a layer of the policy is one chain of nodes for all operations.

Operations that are alike share nodes, and each layer leaves 8 bits:

    Rotate, Shear, Translate          one bilinear warp, and one of a mask for the fill
    Color, Contrast, Brightness,      scale * x + gray * luma + mean * mean(luma) per channel,
      AutoContrast                    where AutoContrast's scale and offset come from reductions
    Sharpness                         + amount * (x - smoothed x), not at the outermost pixels
    Invert, Solarize                  xor with 255 from a threshold on
    Posterize; SolarizeAdd; Equalize  and; a sum; DALI's operator, taken where it was drawn

A sample has one operation in a layer at most, and the numbers of the others change nothing. So they
may stand in any order, and side computations (luma, extremes, the smoothed picture) read the
layer's 8-bit input also where the main path has been warped. The price is that all of it is
computed for every sample: bandwidth on a GPU; on the CPU 3.5 ms of a core per layer and image of
224 pixels, of which the warps take 1.5 and Equalize 0.6.
"""

from typing import Any

import numpy as np
from nvidia.dali import fn, math
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIInterpType

from headrace.pipelines.engines.dali.color import luma, mean_level, solarize
from headrace.pipelines.engines.dali.columns import AFFINE, INVERTING, LINEAR, layer_prefix
from headrace.pipelines.engines.dali.nodes import (
    FLOAT,
    TRUNCATE,
    UINT8,
    Inputs,
    cast,
    level,
    single_node,
)
from headrace.pipelines.ops import RandAugment

# Pillow's ImageFilter.SMOOTH, in thirteenths.
_SMOOTH = [[1 / 13, 1 / 13, 1 / 13], [1 / 13, 5 / 13, 1 / 13], [1 / 13, 1 / 13, 1 / 13]]


def rand_augment(
    inputs: Inputs, op: RandAugment, pictures: DataNode, name: str, side_pixels: int
) -> DataNode:
    """uint8 [pictures, side, side, 3] after all layers of the policy."""
    for layer in range(op.num_ops):
        pictures = _layer(inputs, op, pictures, name + layer_prefix(layer), side_pixels)
    return pictures


def _layer(
    inputs: Inputs, op: RandAugment, pictures: DataNode, name: str, side_pixels: int
) -> DataNode:
    declared = frozenset(op.operations)
    pictures = _blended(inputs, op, pictures, name, side_pixels)
    if declared & INVERTING:
        pictures = solarize(inputs, pictures, name)
    if "Posterize" in declared:
        pictures = single_node(pictures & inputs.operand(name + "kept"))
    if "SolarizeAdd" in declared:
        pictures = single_node(pictures + (pictures < 128) * inputs.operand(name + "addend"))
    if "Equalize" in declared:
        pictures = _equalized(inputs, pictures, name, side_pixels)
    return pictures


def _blended(
    inputs: Inputs, op: RandAugment, pictures: DataNode, name: str, side_pixels: int
) -> DataNode:
    """The operations that compute in floating point; they share the rounding back to 8 bits."""
    declared = frozenset(op.operations)
    matrix: Any = None
    changed: Any = pictures
    if declared & AFFINE:
        matrix = fn.per_frame(inputs.argument(name + "matrix"))
        changed = single_node(fn.warp_affine(pictures, matrix=matrix, dtype=FLOAT))
    elif "Sharpness" in declared:
        changed = cast(pictures, FLOAT)  # differences of 8-bit numbers would wrap
    plain = changed
    added: Any = -TRUNCATE
    scale: Any = inputs.operand(name + "scale") if declared & LINEAR else None
    if "AutoContrast" in declared:
        stretch, offset = _stretched(inputs, pictures, name)
        scale = stretch if scale is None else stretch * scale
        added = offset + added
    if {"Color", "Contrast"} & declared:
        gray = luma(pictures)
        if "Contrast" in declared:
            added = mean_level(gray) * inputs.operand(name + "mean") + added
        if "Color" in declared:
            added = gray * inputs.operand(name + "gray") + added
    if scale is not None:
        changed = changed * scale
    if "Sharpness" in declared:
        detail = _detail(inputs, pictures, plain, side_pixels)
        changed = changed + detail * inputs.operand(name + "sharpness")
    if changed is pictures:
        return pictures
    changed = cast(changed + added, UINT8)
    return changed if matrix is None else _filled(inputs, op, changed, matrix)


def _filled(inputs: Inputs, op: RandAugment, warped: DataNode, matrix: DataNode) -> DataNode:
    """`fill` where the warp read outside of the picture; it repeats the border there.

    DALI blends a fill with the border and has one number for all channels. Pillow does neither:
    which pixels read outside is what the nearest of a white picture's say.
    """
    white = warped | level(255)
    kind = DALIInterpType.INTERP_NN
    inside = single_node(fn.warp_affine(white, matrix=matrix, interp_type=kind, fill_value=0))
    fill = inputs.constant([[[list(op.fill)]]], dtype=np.uint8)
    return single_node(((warped ^ fill) & inside) ^ fill)


def _stretched(inputs: Inputs, pictures: DataNode, name: str) -> tuple[DataNode, DataNode]:
    """(scale, offset), [pictures, 1, 1, 3]: from the darkest and brightest value to 0 and 255.

    1 and 0 where that is not drawn, and for a channel with one value only.
    """
    low = fn.reductions.min(pictures, axes=[1, 2], keep_dims=True)
    high = fn.reductions.max(pictures, axes=[1, 2], keep_dims=True)
    drawn = (high > low) * inputs.operand(name + "stretch")
    span = cast(single_node(high - low), FLOAT)
    scale = (255.0 / math.max(span, 1.0) - 1.0) * drawn + 1.0
    offset = low * scale * drawn * -1.0
    return single_node(scale), single_node(offset)


def _detail(inputs: Inputs, pictures: DataNode, plain: DataNode, side_pixels: int) -> DataNode:
    """What smoothing takes from the pictures, float32: 0 at the outermost pixels, as Pillow does.

    plain: `pictures` as float32, or what they were warped to where no sharpness is drawn.
    """
    smooth = fn.filter(pictures, inputs.constant(_SMOOTH), dtype=UINT8)
    last, side = side_pixels - 1, side_pixels
    return single_node(
        fn.erase(
            plain - smooth,
            anchor=[0, 0, last, 0, 0, 0, 0, last],
            shape=[1, side, 1, side, side, 1, side, 1],
            axis_names="HW",
            fill_value=0,
        )
    )


def _equalized(inputs: Inputs, pictures: DataNode, name: str, side_pixels: int) -> DataNode:
    """Even histograms by OpenCV's formula, brought close to Pillow's.

    Pillow divides the number of darker pixels by a whole step, (pixels - those of the brightest
    value) // 255, and leaves a channel alone whose step is 0. OpenCV counts pixels that are not
    brighter, with a step that is not whole. On the inverted picture its count is Pillow's, and what
    the step's fraction makes is put right afterwards; what is left is one more rounding.
    """
    made_even = single_node(fn.equalize(pictures ^ level(255))) ^ level(255)
    brightest = fn.reductions.max(pictures, axes=[1, 2], keep_dims=True)
    among_them = (pictures == brightest) * level(1)
    counted = single_node(fn.reductions.sum(among_them, axes=[1, 2], keep_dims=True, dtype=FLOAT))
    span = (float(side_pixels**2) - counted) / 255.0
    step = math.floor(span)
    made_even = cast(made_even * (span / math.max(step, 1.0)), UINT8)
    drawn = inputs.operand(name + "equalize") * (step >= 1.0)
    return single_node(pictures ^ ((pictures ^ made_even) & drawn))
