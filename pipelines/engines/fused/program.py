"""From a recipe and a Plan to the plain numbers that the fused engine's kernels read.

What is the same for every batch is fixed once (`Layout`); what a Plan says becomes arrays in a few
numpy operations per view and op, a few microseconds per picture.
"""

from dataclasses import dataclass
from typing import Any, Self, assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.pipelines.counters import PlanError
from headrace.pipelines.engines.fused.render import Program, Step
from headrace.pipelines.engines.fused.simd import TILE
from headrace.pipelines.geometry import centered_offsets, resized_sizes
from headrace.pipelines.noise import half_normal_quantiles
from headrace.pipelines.ops import (
    RAND_AUGMENT_OPERATIONS,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Op,
    RandAugment,
    RandAugmentOperation,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
    height_and_width,
)
from headrace.pipelines.plan import Columns, Plan
from headrace.pipelines.recipe import Augmentation, View

_JITTER_STEPS = np.array([Step.BRIGHTNESS, Step.CONTRAST, Step.SATURATION, Step.HUE], np.uint8)
_RAND_AUGMENT_STEPS: dict[RandAugmentOperation, Step] = {
    "AutoContrast": Step.AUTO_CONTRAST,
    "Equalize": Step.EQUALIZE,
    "Invert": Step.INVERT,
    "Rotate": Step.ROTATE,
    "Posterize": Step.POSTERIZE,
    "Solarize": Step.SOLARIZE,
    "SolarizeAdd": Step.SOLARIZE_ADD,
    "Color": Step.SATURATION,
    "Contrast": Step.CONTRAST,
    "Brightness": Step.BRIGHTNESS,
    "Sharpness": Step.SHARPNESS,
    "ShearX": Step.SHEAR_X,
    "ShearY": Step.SHEAR_Y,
    "TranslateX": Step.TRANSLATE_X,
    "TranslateY": Step.TRANSLATE_Y,
}
# By the place that a Plan names, and at the end for its -1.
_OPERATION_STEPS = np.array(
    [*(_RAND_AUGMENT_STEPS[name] for name in RAND_AUGMENT_OPERATIONS), Step.NONE], np.uint8
)


@dataclass(frozen=True)
class Layout:
    """The views of a recipe in the order of `flat_views`, and where they lie in a batch.

    finished: whether they come out as `device_stage` makes them, and not as uint8.
    shapes: int64 [V, 2], height and width of each view in pixels. reaches: 2 for bicubic, 1 for
    bilinear. steps: room in every view's chain. fills: uint8 [V, steps, 3], what comes in from
    outside where a step turns a view. scale_bias: the normalisation, as `device_stage` has it.
    boxes: most that are erased of a view. noisy: bool [V], where that is by noise. quantiles: of
    the noise, empty where there is none.
    """

    views: tuple[View, ...]
    finished: bool
    shapes: NDArray[np.int64]
    reaches: NDArray[np.int64]
    steps: int
    fills: NDArray[np.uint8]
    scale_bias: NDArray[np.float32]
    boxes: int
    noisy: NDArray[np.bool_]
    quantiles: NDArray[np.float32]

    @classmethod
    def of(cls, augmentation: Augmentation, finished: bool = False) -> Self:
        views = augmentation.flat_views
        scale = [1 / (255 * std) for std in augmentation.std]
        bias = [-m / s for m, s in zip(augmentation.mean, augmentation.std, strict=True)]
        steps = max(1, *(sum(_room(op) for op in view.executed) for view in views))
        fills = np.zeros((len(views), steps, 3), np.uint8)
        for filled, view in zip(fills, views, strict=True):
            step = 0
            for op in view.executed:
                if isinstance(op, RandAugment):
                    filled[step : step + op.num_ops] = op.fill
                step += _room(op)
        erasing = [view.erase if finished else None for view in views]
        noisy = [erase is not None and erase.fill == "pixel" for erase in erasing]
        # Read-only as the table is: to numba an array that can be written is another type.
        quantiles = half_normal_quantiles()[: None if any(noisy) else 0]
        return cls(
            views=views,
            finished=finished,
            shapes=np.array([view.shape for view in views], np.int64),
            reaches=np.array([_reach(view) for view in views], np.int64),
            steps=steps,
            fills=fills,
            scale_bias=np.array([*scale, *bias], np.float32),
            boxes=max(0 if erase is None else erase.count[1] for erase in erasing),
            noisy=np.array(noisy),
            quantiles=quantiles,
        )

    def starts(self, samples: int) -> tuple[NDArray[np.int64], int]:
        """First element of each view's [B, H, W, 3] block, tile by tile, and of what follows."""
        lengths = samples * self.shapes.prod(axis=1) * 3
        ends = np.cumsum(-(-lengths // TILE) * TILE)
        return np.concatenate([[0], ends[:-1]]), int(ends[-1])

    def views_of(self, finished: NDArray[Any], samples: int) -> tuple[torch.Tensor, ...]:
        """The blocks in one flat array as [B, 3, H, W] tensors with channels-last strides."""
        whole = torch.from_numpy(finished)
        return tuple(
            whole[start : start + samples * height * width * 3]
            .view(samples, height, width, 3)
            .permute(0, 3, 1, 2)
            for start, (height, width) in zip(
                self.starts(samples)[0].tolist(), self.shapes.tolist(), strict=True
            )
        )


def _reach(view: View) -> int:
    first = view.ops[0]
    match first:
        case RandomResizedCrop() | Resize():
            return 2 if first.interpolation == "bicubic" else 1
        case _:
            return 1  # a crop alone is no resampling: any filter keeps its pixels


def _room(op: Op) -> int:
    match op:
        case ColorJitter():
            return len(_JITTER_STEPS)
        case Grayscale() | Solarize() | GaussianBlur():
            return 1
        case RandAugment():
            return op.num_ops
        case RandomResizedCrop() | Resize() | CenterCrop() | RandomCrop() | Flip():
            return 0
        case _:
            assert_never(op)


def lower(layout: Layout, plan: Plan) -> Program:
    """The program of a batch. Raises PlanError where its samples are not mixed in pairs."""
    samples, views = len(plan), len(layout.views)
    program = Program(
        shapes=layout.shapes,
        starts=layout.starts(samples)[0],
        reaches=layout.reaches,
        geometries=np.zeros((samples, views, 8), np.int32),
        flips=np.zeros((samples, views), np.bool_),
        codes=np.zeros((samples, views, layout.steps), np.uint8),
        numbers=np.zeros((samples, views, layout.steps), np.float32),
        radii=np.zeros((samples, views, layout.steps), np.int32),
        fills=layout.fills,
        finished=layout.finished,
        scale_bias=layout.scale_bias,
        boxes=np.zeros((samples, views, layout.boxes, 4), np.int32),
        colors=np.zeros((samples, views, layout.boxes, 3), np.float32),
        noisy=layout.noisy,
        keys=np.zeros((samples, views), np.uint64),
        quantiles=layout.quantiles,
        partners=np.full(samples, -1, np.int32),
        weights=np.ones(samples, np.float32),
        cuts=np.zeros((samples, 4), np.int32),
    )
    for index, (view, planned) in enumerate(zip(layout.views, plan.views, strict=True)):
        program.geometries[:, index] = _geometry(view, planned.ops, plan.sizes)
        step = 0
        for op, draws in zip(view.executed, planned.ops, strict=True):
            if isinstance(op, Flip):
                # Mirroring commutes with every step of a chain: it is done where columns are cut.
                # (RandAugment's does not, but View lets no Flip stand behind it.)
                program.flips[:, index] ^= draws["apply"]
            used = slice(step, step + _room(op))
            step = used.stop
            _chain(
                op,
                draws,
                min(view.shape),
                program.codes[:, index, used],
                program.numbers[:, index, used],
                program.radii[:, index, used],
            )
        if layout.finished and planned.erase:
            most = planned.erase["box"].shape[1]
            program.boxes[:, index, :most] = planned.erase["box"]
            if "color" in planned.erase:
                program.colors[:, index, :most] = planned.erase["color"]
            if "key" in planned.erase:
                program.keys[:, index] = planned.erase["key"]
    if layout.finished and plan.mix:
        program.weights[:] = plan.mix["weight"]
        program.cuts[:] = plan.mix["box"]
        program.partners[:] = _partners(plan.mix)
    return program


def _partners(mix: Columns) -> NDArray[np.int64]:
    """int64 [B]: the row that a sample is mixed with, -1 where neither changes."""
    rows = np.arange(len(mix["partner"]))
    partners = rows + mix["partner"]
    inside = (partners >= 0) & (partners < len(rows))
    pairs = inside & (partners[np.where(inside, partners, 0)] == rows)
    if not pairs.all():
        row = int(pairs.argmin())
        raise PlanError(
            f"the plan mixes row {row} with row {partners[row]}, which is not mixed with row {row} "
            f"in turn; a batch must hold whole groups of samples in pairs"
        )
    changed = (mix["weight"] != 1) | (mix["box"][:, 2:].min(axis=1) > 0)
    return np.where((changed | changed[partners]) & (partners != rows), partners, -1)


def _chain(
    op: Op,
    draws: Columns,
    shorter_side: int,
    codes: NDArray[np.uint8],
    numbers: NDArray[np.float32],
    radii: NDArray[np.int32],
) -> None:
    """Fill in one op's steps, [B, steps of the op] each."""
    match op:
        case ColorJitter():
            strengths = np.array([op.brightness, op.contrast, op.saturation, op.hue])
            kinds = np.where(strengths > 0, _JITTER_STEPS, np.uint8(Step.NONE))
            factors = draws["factors"].astype(np.float64)
            if op.additive_brightness and op.brightness > 0:
                kinds[0] = Step.ADD
                factors[:, 0] = np.rint(factors[:, 0] * 255)
            # torchvision's `adjust_hue`: cut to whole steps, which Pillow adds modulo 256.
            factors[:, 3] = (factors[:, 3] * 255).astype(np.int32) & 255
            codes[:] = np.where(draws["apply"][:, None], kinds[draws["order"]], Step.NONE)
            numbers[:] = np.take_along_axis(factors, draws["order"].astype(np.int64), axis=1)
        case Grayscale():
            codes[:, 0] = np.where(draws["apply"], Step.GRAYSCALE, Step.NONE)
        case Solarize():
            codes[:, 0] = np.where(draws["apply"], Step.SOLARIZE, Step.NONE)
            numbers[:, 0] = op.threshold
        case GaussianBlur():
            sigma = draws["sigma"]
            radius = np.ceil(3 * sigma.astype(np.float64))
            if op.kernel_size is not None:
                radius[:] = op.kernel_size // 2
            codes[:, 0] = np.where(sigma > 0, Step.BLUR, Step.NONE)
            numbers[:, 0] = sigma
            radii[:, 0] = np.minimum(radius, shorter_side - 1)
        case RandAugment():
            codes[:] = _OPERATION_STEPS[draws["operation"]]
            numbers[:] = draws["argument"]
            radii[:] = 1 + draws["bicubic"]
        case RandomResizedCrop() | Resize() | CenterCrop() | RandomCrop() | Flip():
            pass
        case _:
            assert_never(op)


def _geometry(
    view: View, draws: tuple[Columns, ...], sizes: NDArray[np.int32]
) -> NDArray[np.int32]:
    """int32 [B, 8]: for rows, then columns, where the source box begins, its length, the length
    that it is resized to, and which of those pixels is the view's first (negative in padding)."""
    start, length, full = np.zeros_like(sizes), sizes, sizes
    offset = start
    for op, drawn in zip(view.executed, draws, strict=True):
        match op:
            case RandomResizedCrop():
                start, length = drawn["box"][:, :2], drawn["box"][:, 2:]
                full = np.full_like(length, height_and_width(op.size))
            case Resize():
                full = resized_sizes(sizes, op.size)
            case CenterCrop():
                offset = centered_offsets(full, op.size)
            case RandomCrop():
                offset = drawn["start"]
            case Flip() | ColorJitter() | Grayscale() | GaussianBlur() | Solarize() | RandAugment():
                break  # a view's geometry stands before all of these
            case _:
                assert_never(op)
    return np.stack([start, length, full, offset], axis=2).reshape(-1, 8)
