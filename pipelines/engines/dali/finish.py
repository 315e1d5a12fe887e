"""Finished views in DALI's graph: what `device_stage` defines, before a batch leaves DALI.

    normalise   one node, uint8 [pictures, H, W, 3] to float32
    erase       one node for boxes of one colour, one for each box that has its own
    mix         partner + share * (x - partner), where the difference is nothing inside CutMix's box

Noise for every pixel is made by torch from keys of the Plan, so a view that erases with it leaves
the graph in 8 bits, and `device_stage` does the rest.
"""

from typing import Any

from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

from headrace.pipelines.engines.dali.columns import erase_prefix
from headrace.pipelines.engines.dali.nodes import FLOAT, Inputs, cast, single_node
from headrace.pipelines.recipe import Augmentation, Mix, RandomErasing


def finished_view(
    inputs: Inputs,
    augmentation: Augmentation,
    view_index: int,
    pictures: DataNode,
    dtype: DALIDataType,
) -> DataNode:
    """[pictures, H, W, 3] of `dtype` (float32 or float16) from uint8."""
    erase, mix = augmentation.views[view_index].erase, augmentation.mix
    steps = FLOAT if erase is not None or mix is not None else dtype
    finished = single_node(
        fn.crop_mirror_normalize(
            pictures,
            mean=[255 * mean for mean in augmentation.mean],
            std=[255 * std for std in augmentation.std],
            dtype=steps,
            output_layout="FHWC",
        )
    )
    if erase is not None:
        count = augmentation.views[view_index].count
        finished = _erased(inputs, erase, finished, view_index, count)
    if mix is not None:
        finished = _mixed(inputs, mix, finished)
    return finished if steps == dtype else cast(finished, dtype)


def _erased(
    inputs: Inputs, erase: RandomErasing, pictures: DataNode, view_index: int, count: int
) -> DataNode:
    def boxes(pictures: DataNode, prefix: str, color: Any) -> DataNode:
        start, shape = inputs.argument(prefix + "start"), inputs.argument(prefix + "shape")
        return single_node(
            fn.erase(pictures, anchor=start, shape=shape, axis_names="FHW", fill_value=color)
        )

    if erase.fill == "const":
        return boxes(pictures, erase_prefix(view_index), 0)
    # One after the other, so that later boxes lie over earlier ones.
    for region in range(count * erase.count[1]):
        prefix = erase_prefix(view_index, region)
        pictures = boxes(pictures, prefix, inputs.argument(prefix + "color"))
    return pictures


def _mixed(inputs: Inputs, mix: Mix, pictures: DataNode) -> DataNode:
    partners = single_node(fn.permute_batch(pictures, indices=inputs.argument("mix.partner")))
    difference: Any = pictures - partners
    if mix.cutmix_alpha > 0:
        start, shape = inputs.argument("mix.start"), inputs.argument("mix.shape")
        difference = fn.erase(difference, anchor=start, shape=shape, axis_names="HW", fill_value=0)
    return single_node(partners + difference * inputs.operand("mix.share"))
