"""A recipe as DALI's graph: the same lines build it for a GPU and for the CPU.

The two differ in where nodes are placed, in the copies to the GPU that this takes, and in the
decoder's arguments, nothing else. The graph has no random operator and no branch: encoded bytes and
the Plan's numbers (`columns`) come from one external source, and what an op must not touch
passes through parameters that change nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from headrace.pipelines.draw import draw
from headrace.pipelines.engines.dali.color import color_jitter, gaussian_blur, grayscale, solarize
from headrace.pipelines.engines.dali.columns import (
    Columns,
    decodes_region,
    finish_columns,
    mask_columns,
    on_single_pictures,
    picture_prefix,
    plan_columns,
    region_columns,
    stack_prefix,
)
from headrace.pipelines.engines.dali.finish import finished_view
from headrace.pipelines.engines.dali.nodes import Inputs, Placement, single_node
from headrace.pipelines.engines.dali.policy import rand_augment
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Interpolation,
    Op,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
    height_and_width,
)
from headrace.pipelines.plan import Plan
from headrace.pipelines.recipe import Augmentation, View

_INTERPOLATION: dict[Interpolation, DALIInterpType] = {
    "bilinear": DALIInterpType.INTERP_LINEAR,
    "bicubic": DALIInterpType.INTERP_CUBIC,
}
_DALI_TYPE = {
    np.dtype(np.float32): DALIDataType.FLOAT,
    np.dtype(np.int32): DALIDataType.INT32,
    np.dtype(np.uint8): DALIDataType.UINT8,
    np.dtype(np.bool_): DALIDataType.BOOL,
}
FINISHED = {torch.float32: DALIDataType.FLOAT, torch.float16: DALIDataType.FLOAT16}

# Gives what a graph is fed, iteration by iteration.
Source = Callable[[], Sequence[Any]]


def _nothing() -> Sequence[Any]:
    raise StopIteration


def input_columns(
    augmentation: Augmentation, plan: Plan, whole: NDArray[np.bool_], *, finished: bool
) -> Columns:
    """What the graph is fed beside the files. whole, finished: see `region_columns`, `build`."""
    columns = plan_columns(augmentation, plan)
    if decodes_region(augmentation):
        columns = region_columns(columns, plan, whole)
    if finished:
        columns |= finish_columns(augmentation, plan)
    return columns | mask_columns(plan)


def _decoded(inputs: Inputs, encoded: DataNode, *, region: bool) -> DataNode:
    """RGB pictures uint8 [H, W, 3] from files; as stored, whatever EXIF says."""
    arguments: dict[str, Any] = {"output_type": DALIImageType.RGB, "adjust_orientation": False}
    if inputs.placement == "gpu":
        # Without `jpeg_fancy_upsampling` a GPU's chroma differs from libjpeg's and Pillow's.
        arguments |= {"device": "mixed", "jpeg_fancy_upsampling": True}
    else:
        arguments |= {"device": "cpu"}
    if not region:
        return single_node(fn.decoders.image(encoded, **arguments))
    start, shape = inputs.argument("region.start"), inputs.argument("region.shape")
    return single_node(
        fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], **arguments)
    )


def _single(inputs: Inputs, op: Op, image: DataNode, name: str) -> DataNode:
    """What an op on single pictures makes of uint8 [H, W, 3]."""
    match op:
        case RandomResizedCrop():
            # Cutting first keeps the filter inside the box, as torchvision does; `resize` with a
            # region of interest would read beyond its edges.
            start, shape = inputs.argument(name + "start"), inputs.argument(name + "shape")
            cut = single_node(fn.slice(image, start=start, shape=shape, axes=[0, 1]))
            return _resized(cut, list(height_and_width(op.size)), op.interpolation)
        case Resize():
            return _resized(image, inputs.argument(name + "size"), op.interpolation)
        case CenterCrop() | RandomCrop():
            return single_node(
                fn.slice(
                    image,
                    start=inputs.argument(name + "start"),
                    shape=list(height_and_width(op.size)),
                    axes=[0, 1],
                    out_of_bounds_policy="pad",
                    fill_values=0,
                )
            )
        case Flip():
            horizontal = inputs.argument(name + "horizontal")
            return single_node(fn.flip(image, horizontal=horizontal, vertical=0))
        case ColorJitter() | Grayscale() | GaussianBlur() | Solarize() | RandAugment():
            raise TypeError(f"{type(op).__name__} runs on stacked pictures")
        case _:
            assert_never(op)


def _resized(image: DataNode, size: DataNode | list[int], interpolation: Interpolation) -> DataNode:
    kind = _INTERPOLATION[interpolation]
    return single_node(fn.resize(image, size=size, interp_type=kind, antialias=True))


def _stacked(inputs: Inputs, op: Op, pictures: DataNode, name: str, side_pixels: int) -> DataNode:
    """What an op makes of all pictures of a view, uint8 [pictures, H, W, 3]; see `op_columns`."""
    match op:
        case ColorJitter():
            return color_jitter(inputs, op, pictures, name)
        case Grayscale():
            return grayscale(inputs, pictures, name)
        case GaussianBlur():
            return gaussian_blur(inputs, pictures, name)
        case Solarize():
            return solarize(inputs, pictures, name)
        case RandAugment():
            return rand_augment(inputs, op, pictures, name, side_pixels)
        case RandomResizedCrop() | Resize() | CenterCrop() | RandomCrop() | Flip():
            raise TypeError(f"{type(op).__name__} runs on single pictures")
        case _:
            assert_never(op)


def _view(inputs: Inputs, view: View, view_index: int, decoded: DataNode) -> DataNode:
    """All pictures of a view, uint8 [count, H, W, 3].

    Cut one by one, then stacked: DINO's eight local views cost the nodes and inputs of one.
    """
    pictures: list[DataNode] = []
    for picture in range(view.count):
        image = decoded
        for op_index, op in enumerate(view.executed):
            if on_single_pictures(op):
                image = _single(inputs, op, image, picture_prefix(view_index, picture, op_index))
        pictures.append(image)
    stack = single_node(fn.stack(*pictures, axis=0, axis_name="F"))
    for op_index, op in enumerate(view.executed):
        if not on_single_pictures(op):
            stack = _stacked(inputs, op, stack, stack_prefix(view_index, op_index), min(view.shape))
    return stack


def _nobody(augmentation: Augmentation) -> Plan:
    """The plan of no samples: it has the columns of any other."""
    nobody = np.empty(0, np.int64)
    return draw(
        augmentation,
        seed=0,
        epoch=0,
        position=0,
        ids=nobody,
        occurrences=nobody.astype(np.int32),
        sizes=np.empty((0, 2), np.int32),
    )


def build_pipeline(
    augmentation: Augmentation,
    placement: Placement,
    *,
    finished: torch.dtype | None = None,
    source: Source = _nothing,
    device_id: int | None = None,
    threads: int = 1,
    samples: int = 1,
    in_flight: int = 1,
) -> Pipeline:
    """The recipe as an unbuilt DALI pipeline for batches of at most `samples`.

    source: gives each iteration's inputs, files (uint8 [bytes] each) and then the values of
    `input_columns`, in its order; StopIteration there ends the pipeline.
    Outputs: for each of `views` [count, H, W, 3], uint8, or finished and of dtype `finished`;
    then the masks, bool, of the pictures that have one; then int64 [3], the stored picture's shape.
    The views and masks are where the pictures are, the shape is on the host.
    A GPU graph without `device_id` can be looked at and serialised, not run.
    """
    columns = input_columns(
        augmentation, _nobody(augmentation), np.empty(0, np.bool_), finished=finished is not None
    )
    pipeline = Pipeline(
        batch_size=samples,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=in_flight,
    )
    with pipeline:
        encoded, *fed = fn.external_source(
            source=source,
            num_outputs=1 + len(columns),
            dtype=[DALIDataType.UINT8, *(_DALI_TYPE[column.dtype] for column in columns.values())],
            ndim=[1, *(column.ndim - 1 for column in columns.values())],
        )
        inputs = Inputs(placement, dict(zip(columns, fed, strict=True)))
        region = decodes_region(augmentation)
        decoded = _decoded(inputs, encoded, region=region)
        shape = (
            fn.peek_image_shape(encoded, adjust_orientation=False) if region else decoded.shape()
        )
        views = [
            _view(inputs, view, index, decoded) for index, view in enumerate(augmentation.views)
        ]
        if finished is not None:
            dtype = FINISHED[finished]
            views = [
                finished_view(inputs, augmentation, index, view, dtype)
                for index, view in enumerate(views)
            ]
        masks = [inputs.operand(name) for name in columns if name.startswith("mask.")]
        pipeline.set_outputs(*views, *masks, shape)
    return pipeline


def probing_pipeline(encoded: NDArray[np.uint8], placement: Placement, **options: Any) -> Pipeline:
    """Decodes one file as `build_pipeline` does, wholly, and gives its shape, int64 [3]."""
    pipeline = Pipeline(batch_size=1, num_threads=1, prefetch_queue_depth=1, **options)
    with pipeline:
        fed = fn.external_source(source=[[encoded]], dtype=DALIDataType.UINT8, ndim=1)
        decoded = _decoded(Inputs(placement, {}), single_node(fed), region=False)
        pipeline.set_outputs(decoded.shape())
    return pipeline
