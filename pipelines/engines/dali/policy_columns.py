"""The numbers of RandAugment for DALI's graph: one row per sample, every operation at once.

A layer of the policy applies one of up to fifteen operations to a sample. The graph has no
branches, so it runs all of those that the recipe may draw, as few steps that several of them share
(`policy`), and whatever is not a sample's own operation gets numbers that change nothing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.recipe import RAND_AUGMENT_OPERATIONS, RandAugment, RandAugmentOperation

AFFINE: frozenset[RandAugmentOperation] = frozenset(
    ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
)
LINEAR: frozenset[RandAugmentOperation] = frozenset(("Color", "Contrast", "Brightness"))
INVERTING: frozenset[RandAugmentOperation] = frozenset(("Invert", "Solarize"))


def layer_prefix(layer: int) -> str:
    """Names of the columns of one of the `num_ops` layers begin so, after the op's own prefix."""
    return f"layer.{layer}."


def policy_columns(
    op: RandAugment, draws: Mapping[str, NDArray[Any]], side_pixels: int
) -> dict[str, NDArray[Any]]:
    """The columns of every layer, those that its `operations` need. side_pixels: of the view."""
    named: dict[str, NDArray[Any]] = {}
    for layer in range(op.num_ops):
        operation, argument = draws["operation"][:, layer], draws["argument"][:, layer]
        columns = _layer(frozenset(op.operations), operation, argument, side_pixels)
        named |= {layer_prefix(layer) + name: column for name, column in columns.items()}
    return named


def _layer(
    declared: frozenset[RandAugmentOperation],
    operation: NDArray[np.int8],
    argument: NDArray[np.float32],
    side_pixels: int,
) -> dict[str, NDArray[Any]]:
    """One layer's columns: numbers [B], but for `matrix`.

    matrix: float32 [B, 2, 3], from output to input pixels. scale, gray, mean: scale * x + gray *
    luma + mean * mean(luma). stretch: 1 where contrast is stretched. sharpness: how often what
    smoothing takes away is added. threshold: inverted from there on. kept: the bits that are.
    addend: at most 128, added to what is below 128. equalize: all bits set where that is drawn.
    """

    def where(name: RandAugmentOperation) -> NDArray[np.bool_]:
        return operation == RAND_AUGMENT_OPERATIONS.index(name)

    def chosen(values: NDArray[Any], otherwise: float, *names: RandAugmentOperation) -> Any:
        drawn = np.logical_or.reduce([where(name) for name in names])
        return np.where(drawn, values, np.asarray(otherwise, values.dtype))

    columns: dict[str, NDArray[Any]] = {}
    if declared & AFFINE:
        columns["matrix"] = _matrices(operation, argument, side_pixels)
    if declared & LINEAR:
        columns["scale"] = chosen(argument, 1, "Color", "Contrast", "Brightness")
    if "Color" in declared:
        columns["gray"] = chosen(1 - argument, 0, "Color")
    if "Contrast" in declared:
        columns["mean"] = chosen(1 - argument, 0, "Contrast")
    if "AutoContrast" in declared:
        columns["stretch"] = where("AutoContrast").astype(np.float32)
    if "Sharpness" in declared:
        columns["sharpness"] = chosen(argument - 1, 0, "Sharpness")
    whole = argument.astype(np.int32)
    if declared & INVERTING:
        threshold = np.where(where("Invert"), 0, chosen(whole, 256, "Solarize"))  # 256: no value is
        columns["threshold"] = threshold.astype(np.int32)
    if "Posterize" in declared:
        dropped = (1 << (8 - chosen(whole, 8, "Posterize"))) - 1
        columns["kept"] = (255 - dropped).astype(np.uint8)
    if "SolarizeAdd" in declared:
        columns["addend"] = chosen(whole, 0, "SolarizeAdd").astype(np.uint8)
    if "Equalize" in declared:
        columns["equalize"] = np.where(where("Equalize"), 255, 0).astype(np.uint8)
    return columns


def _matrices(
    operation: NDArray[np.int8], argument: NDArray[np.float32], side_pixels: int
) -> NDArray[np.float32]:
    def value(name: RandAugmentOperation) -> NDArray[np.float64]:
        return np.where(operation == RAND_AUGMENT_OPERATIONS.index(name), argument, np.float64(0))

    angle = np.radians(value("Rotate"))
    cosine, sine = np.cos(angle), np.sin(angle)
    matrices = np.empty((len(operation), 2, 3))
    matrices[:, 0, 0] = matrices[:, 1, 1] = cosine
    matrices[:, 0, 1] = value("ShearX") - sine
    matrices[:, 1, 0] = value("ShearY") + sine
    # A rotation leaves the middle of the picture where it is.
    middle = side_pixels / 2
    matrices[:, 0, 2] = value("TranslateX") * side_pixels + middle * (1 - cosine + sine)
    matrices[:, 1, 2] = value("TranslateY") * side_pixels + middle * (1 - cosine - sine)
    return matrices.astype(np.float32)
