"""A recipe as DALI's graph: the same lines build it for a GPU and for the CPU.

The two differ in where nodes are placed and in the decoder's arguments, nothing else. The graph has
no random operator and no branch: encoded bytes and the Plan's numbers are fed to it
(`dali_columns`), and what an op must not touch passes through parameters that change nothing.

DALI's own colour operators have a fixed order, contrast about mid-grey and another hue than
torchvision's. Here they are built from arithmetic, so that they mean what the reference engine
means, rounding included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from pipelines.draw import draw
from pipelines.engines.dali_columns import (
    LUMA,
    Columns,
    linear_slots,
    on_single_pictures,
    picture_prefix,
    plan_columns,
    stack_prefix,
)
from pipelines.recipe import (
    Augmentation,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Interpolation,
    Op,
    RandomResizedCrop,
    Resize,
    Solarize,
    View,
)

Placement = Literal["cpu", "gpu"]

_INTERPOLATION: dict[Interpolation, DALIInterpType] = {
    "bilinear": DALIInterpType.INTERP_LINEAR,
    "bicubic": DALIInterpType.INTERP_CUBIC,
}
_DALI_TYPE = {
    np.dtype(np.float32): DALIDataType.FLOAT,
    np.dtype(np.int32): DALIDataType.INT32,
}

# Pillow's blends cut off the fraction; DALI rounds to the nearest when it casts to 8 bits, halves
# away from zero on the CPU and to even on a GPU. Just under a half makes one the other, and a
# whole number stays itself either way.
_TRUNCATE = 0.5 - 2.0**-10


@dataclass(frozen=True)
class _Graph:
    """Makes the nodes of one pipeline, on `placement`, with the columns' types in `columns`."""

    placement: Placement
    columns: Columns

    def decoded(self, encoded: DataNode) -> DataNode:
        """RGB pictures uint8 [H, W, 3] from files; as stored, whatever EXIF says."""
        if self.placement == "gpu":
            # Without `jpeg_fancy_upsampling` a GPU's chroma differs from libjpeg's and Pillow's.
            return _one(
                fn.decoders.image(
                    encoded,
                    device="mixed",
                    output_type=DALIImageType.RGB,
                    adjust_orientation=False,
                    jpeg_fancy_upsampling=True,
                )
            )
        return _one(
            fn.decoders.image(
                encoded, device="cpu", output_type=DALIImageType.RGB, adjust_orientation=False
            )
        )

    def argument(self, name: str) -> DataNode:
        """A column as an operator's argument, which DALI reads on the host."""
        column = self.columns[name]
        dtype = _DALI_TYPE[column.dtype]
        return _one(fn.external_source(name=name, dtype=dtype, ndim=column.ndim - 1))

    def operand(self, name: str) -> DataNode:
        """A column as an operand of arithmetic with pictures, hence where those are."""
        column = self.argument(name)
        return column.gpu() if self.placement == "gpu" else column

    def per_channel(self, red: float, green: float, blue: float) -> Any:
        """A constant [1, 1, 1, 3], one number for each channel."""
        values = np.array([red, green, blue], np.float32).reshape(1, 1, 1, 3)
        return types.Constant(values, device=self.placement)


def _one(node: Any) -> DataNode:
    """DALI's operators are typed as returning a node, several or none; ours return one."""
    if not isinstance(node, DataNode):
        raise TypeError(f"expected one DALI node, got {node!r}")
    return node


def _cast(node: DataNode, dtype: DALIDataType) -> DataNode:
    """To 8 bits it clamps and rounds."""
    return _one(fn.cast(node, dtype=dtype))


def _single(graph: _Graph, op: Op, image: DataNode, name: str) -> DataNode:
    """What an op on single pictures makes of uint8 [H, W, 3]."""
    match op:
        case RandomResizedCrop():
            # Cutting first keeps the filter inside the box, as torchvision does; `resize` with a
            # region of interest would read beyond its edges.
            start, shape = graph.argument(name + "start"), graph.argument(name + "shape")
            cut = _one(fn.slice(image, start=start, shape=shape, axes=[0, 1]))
            return _resized(cut, [op.size, op.size], op.interpolation)
        case Resize():
            return _resized(image, graph.argument(name + "size"), op.interpolation)
        case CenterCrop():
            return _one(
                fn.slice(
                    image,
                    start=graph.argument(name + "start"),
                    shape=[op.size, op.size],
                    axes=[0, 1],
                    out_of_bounds_policy="pad",
                    fill_values=0,
                )
            )
        case Flip():
            horizontal = graph.argument(name + "horizontal")
            return _one(fn.flip(image, horizontal=horizontal, vertical=0))
        case ColorJitter() | Grayscale() | GaussianBlur() | Solarize():
            raise TypeError(f"{type(op).__name__} runs on stacked pictures")
        case _:
            assert_never(op)


def _resized(image: DataNode, size: DataNode | list[int], interpolation: Interpolation) -> DataNode:
    kind = _INTERPOLATION[interpolation]
    return _one(fn.resize(image, size=size, interp_type=kind, antialias=True))


def _stacked(graph: _Graph, op: Op, pictures: DataNode, name: str) -> DataNode:
    """What an op makes of all pictures of a view, uint8 [pictures, H, W, 3]."""
    match op:
        case ColorJitter():
            return _jitter(graph, op, pictures, name)
        case Grayscale():
            matrix = fn.per_frame(graph.argument(name + "matrix"))
            return _one(fn.coord_transform(pictures, M=matrix, dtype=DALIDataType.UINT8))
        case GaussianBlur():
            sigma = fn.per_frame(graph.argument(name + "sigma"))
            window = fn.per_frame(graph.argument(name + "window"))
            return _one(fn.gaussian_blur(pictures, sigma=sigma, window_size=window))
        case Solarize():
            inverted = pictures >= graph.operand(name + "threshold")
            return pictures ^ (inverted * types.Constant(255, dtype=DALIDataType.UINT8))
        case RandomResizedCrop() | Resize() | CenterCrop() | Flip():
            raise TypeError(f"{type(op).__name__} runs on single pictures")
        case _:
            assert_never(op)


def _jitter(graph: _Graph, op: ColorJitter, pictures: DataNode, name: str) -> DataNode:
    before, after = linear_slots(op)
    for slot in range(before):
        pictures = _linear(graph, op, pictures, f"{name}{slot}.")
    if op.hue > 0:
        pictures = _hue(graph, pictures, f"{name}hue.")
    for slot in range(before, before + after):
        pictures = _linear(graph, op, pictures, f"{name}{slot}.")
    return pictures


def _linear(graph: _Graph, op: ColorJitter, pictures: DataNode, slot: str) -> DataNode:
    """One linear step: truncate(clamp(scale * x + gray * luma(x) + mean * mean(luma(x))))."""
    scaled = pictures * graph.operand(slot + "scale")
    added: Any = -_TRUNCATE
    if op.saturation > 0 or op.contrast > 0:
        luma = _one(fn.coord_transform(pictures, M=LUMA.tolist(), dtype=DALIDataType.UINT8))
        if op.contrast > 0:
            mean = math.floor(fn.reductions.mean(luma, axes=[1, 2], keep_dims=True) + 0.5)
            added = mean * graph.operand(slot + "mean") + added
        if op.saturation > 0:
            added = luma * graph.operand(slot + "gray") + added
    return _cast(scaled + added, DALIDataType.UINT8)


def _hue(graph: _Graph, pictures: DataNode, name: str) -> DataNode:
    """Rotate the hue as Pillow's HSV does, with hue and saturation in 8 bits.

    With V and m the largest and smallest channel and C = V - m, the hue in [0, 6) is
    3 -+ (2 - (G + B - R - m) / C), minus where G >= B. Back from hue h, each channel is
    V - C * clamp(s * |h - c| + o, 0, 1).
    """
    steps = graph.operand(name + "steps")
    pixels = _cast(pictures, DALIDataType.FLOAT)
    red, green, blue = (pixels[:, :, :, channel : channel + 1] for channel in range(3))
    value = math.max(math.max(red, green), blue)
    least = math.min(math.min(red, green), blue)
    chroma = value - least

    toward = (green + blue - red - least) / math.max(chroma, 1.0)
    side = (green >= blue) * -2.0 + 1.0
    hue = (toward * -42.5 + 85.0) * side + 127.5  # 255 is the whole circle
    hue = math.floor(hue * steps) / steps + graph.operand(name + "shift")
    hue = hue - (hue >= 256.0) * 256.0
    saturation = math.floor(chroma / math.max(value, 1.0) * 255.0 * steps) / steps
    chroma = saturation * value * (1 / 255)

    distance = math.abs(hue * (6 / 255) - graph.per_channel(3, 2, 4))
    share = distance * graph.per_channel(-1, 1, 1) + graph.per_channel(2, -1, -1)
    share = math.max(math.min(share, 1.0), 0.0)
    return _cast(value - chroma * share, DALIDataType.UINT8)


def _view(graph: _Graph, view: View, view_index: int, decoded: DataNode) -> DataNode:
    """All pictures of a view, uint8 [count, size, size, 3].

    Cut one by one, then stacked: DINO's eight local views cost the nodes and inputs of one.
    """
    pictures: list[DataNode] = []
    for picture in range(view.count):
        image = decoded
        for op_index, op in enumerate(view.ops):
            if on_single_pictures(op):
                image = _single(graph, op, image, picture_prefix(view_index, picture, op_index))
        pictures.append(image)
    stack = _one(fn.stack(*pictures, axis=0, axis_name="F"))
    for op_index, op in enumerate(view.ops):
        if not on_single_pictures(op):
            stack = _stacked(graph, op, stack, stack_prefix(view_index, op_index))
    return stack


class FedPipeline(Pipeline):
    """A pipeline that asks `feed` for every iteration's inputs; StopIteration there ends it."""

    feed: "Callable[[FedPipeline], None] | None" = None

    def iter_setup(self) -> None:
        if self.feed is not None:
            self.feed(self)


def build_pipeline(
    augmentation: Augmentation,
    placement: Placement,
    *,
    device_id: int | None = None,
    threads: int = 1,
    samples: int = 1,
    in_flight: int = 1,
) -> FedPipeline:
    """The recipe as an unbuilt DALI pipeline for batches of at most `samples`.

    Inputs: `encoded` (files, uint8 [bytes]) and the columns of `plan_columns`, by their names.
    Outputs: uint8 [count, size, size, 3] for each of `views`, then int64 [3], the decoded shape.
    A GPU graph without `device_id` can be looked at and serialised, not run.
    """
    nobody = np.empty(0, np.int64)
    plan = draw(
        augmentation,
        seed=0,
        epoch=0,
        position=0,
        ids=nobody,
        occurrences=nobody.astype(np.int32),
        sizes=np.empty((0, 2), np.int32),
    )
    graph = _Graph(placement, plan_columns(augmentation, plan))
    pipeline = FedPipeline(
        batch_size=samples,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=in_flight,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
        decoded = graph.decoded(encoded)
        views = [
            _view(graph, view, index, decoded) for index, view in enumerate(augmentation.views)
        ]
        pipeline.set_outputs(*views, decoded.shape())
    return pipeline


def decoding_pipeline(placement: Placement, *, device_id: int | None = None) -> FedPipeline:
    """Decodes one `encoded` file as `build_pipeline` does and gives its shape, int64 [3]."""
    pipeline = FedPipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
        pipeline.set_outputs(_Graph(placement, {}).decoded(_one(encoded)).shape())
    return pipeline


@dataclass(frozen=True)
class Node:
    """One operator of a graph, for looking at: what it is, where it runs, what it reads.

    operator: DALI's name, such as `fn.resize` or `math.mul`. placement: cpu, gpu or mixed.
    inputs: (name of the node, where its result is read). draws_random_numbers: as DALI says.
    """

    name: str
    operator: str
    placement: str
    inputs: tuple[tuple[str, str], ...]
    arguments: tuple[tuple[str, str], ...]
    draws_random_numbers: bool


def draws_random_numbers(schema: Any) -> bool:
    """Whether an operator with this DALI schema has a generator of its own."""
    return schema.HasRandomSeedArg() or schema.HasRandomStateArg()


def graph_nodes(augmentation: Augmentation, placement: Placement) -> list[Node]:
    """The recipe's graph, inputs before what reads them. Needs no GPU, for a GPU's graph too."""
    pipeline = build_pipeline(augmentation, placement)
    pipeline._build_graph()
    nodes: list[Node] = []
    for instance in pipeline._ops or ():
        arguments = dict(instance._op._init_args)
        module = arguments.pop("_module").removeprefix("nvidia.dali.")
        nodes.append(
            Node(
                name=instance.name,
                operator=f"{module}.{arguments.pop('_display_name')}",
                placement=instance._op.device,
                inputs=tuple((edge.name, edge.device) for edge in instance.inputs),
                arguments=tuple((name, str(value)) for name, value in sorted(arguments.items())),
                draws_random_numbers=draws_random_numbers(instance._op.schema),
            )
        )
    return nodes
