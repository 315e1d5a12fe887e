"""What the draws of a Plan become as numbers for DALI's graph, one row per sample.

DALI's graph is the same for every sample: no branches, no generators. So whatever differs between
samples is a column here, and an op that does not apply to a sample is one with parameters that
change nothing. Plain numpy: `graph` declares its inputs from the names, types and shapes of
these columns, the engine feeds their values, and the arithmetic can be tested without DALI.
"""

from collections.abc import Iterator, Mapping
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.geometry import centered_offsets
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
    resized_shape,
)
from headrace.pipelines.plan import Plan, ViewPlan
from headrace.pipelines.recipe import Augmentation, View

Columns = dict[str, NDArray[Any]]

LUMA = np.array([19595, 38470, 7471], np.float32) / 65536  # ITU-R 601-2 as Pillow rounds it

# A jitter that is drawn quantises hue and saturation to 1/255 as Pillow's HSV pictures do. One that
# is not drawn uses steps so small that every pixel comes back as it was.
PILLOW_STEPS = 1.0
FINE_STEPS = 4096.0

# The operations of RandAugment that share a step of its graph (`policy`).
AFFINE: frozenset[RandAugmentOperation] = frozenset(
    ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
)
LINEAR: frozenset[RandAugmentOperation] = frozenset(("Color", "Contrast", "Brightness"))
INVERTING: frozenset[RandAugmentOperation] = frozenset(("Invert", "Solarize"))


def linear_slots(op: ColorJitter) -> tuple[int, int]:
    """How many linear steps a jitter has before and after its hue shift; (n, 0) without one.

    Brightness, contrast and saturation are all clamp(scale * x + gray * luma(x) + mean *
    mean(luma(x)) + shift). In which of the orders they come differs between samples, so there is
    room for all of them on either side of the hue shift, and what a sample does not need does
    nothing.
    """
    linear = sum(strength > 0 for strength in (op.brightness, op.contrast, op.saturation))
    return (linear, linear) if op.hue > 0 else (linear, 0)


def _jitter(op: ColorJitter, draws: Mapping[str, NDArray[Any]]) -> Columns:
    apply: NDArray[np.bool_] = draws["apply"]
    factors: NDArray[np.float32] = draws["factors"]
    position = np.argsort(draws["order"], axis=1)  # [B, 4]: when each op is applied
    strengths = (op.brightness, op.contrast, op.saturation)
    linear = [index for index, strength in enumerate(strengths) if strength > 0]
    before, after = linear_slots(op)
    late = position > position[:, 3:] if op.hue > 0 else np.zeros(position.shape, bool)

    names = ("scale", "mean", "gray", "shift")
    numbers = {name: np.zeros((before + after, len(apply)), np.float32) for name in names}
    numbers["scale"][:] = 1
    rows = np.flatnonzero(apply)
    for index in linear:
        slot = np.where(late[:, index], before, 0)
        for other in linear:
            slot += (position[:, other] < position[:, index]) & (late[:, other] == late[:, index])
        place = slot[rows], rows
        factor = factors[rows, index]
        if index == 0 and op.additive_brightness:
            numbers["shift"][place] = np.rint(255 * factor.astype(np.float64))
            continue
        numbers["scale"][place] = factor
        if index == 1:
            numbers["mean"][place] = 1 - factor
        elif index == 2:
            numbers["gray"][place] = 1 - factor

    used = {
        "scale": len(linear) > 0,
        "mean": op.contrast > 0,
        "gray": op.saturation > 0,
        "shift": op.brightness > 0 and op.additive_brightness,
    }
    columns: Columns = {
        f"{slot}.{name}": numbers[name][slot]
        for slot in range(before + after)
        for name in names
        if used[name]
    }
    if op.hue > 0:
        # torchvision adds int(hue * 255) to an 8-bit hue, which wraps at 256.
        shift = np.trunc(factors[:, 3].astype(np.float64) * 255).astype(np.int64) % 256
        columns["hue.shift"] = np.where(apply, shift, 0).astype(np.float32)
        columns["hue.steps"] = np.where(apply, PILLOW_STEPS, FINE_STEPS).astype(np.float32)
    return columns


def _blur(op: GaussianBlur, sigma: NDArray[np.float32], side_pixels: int) -> Columns:
    """A kernel of one pixel where sigma is 0: that is the picture itself."""
    if op.kernel_size is None:
        window = 2 * np.ceil(3 * sigma.astype(np.float64)).astype(np.int32) + 1
    else:
        window = np.full(len(sigma), op.kernel_size, np.int32)
    window = np.minimum(window, 2 * side_pixels - 1)
    return {
        "sigma": np.where(sigma > 0, sigma, 1).astype(np.float32),
        "window": np.where(sigma > 0, window, 1).astype(np.int32),
    }


def layer_prefix(layer: int) -> str:
    """Names of the columns of one of the `num_ops` layers begin so, after the op's own prefix."""
    return f"layer.{layer}."


def policy_columns(op: RandAugment, draws: Mapping[str, NDArray[Any]], side_pixels: int) -> Columns:
    """RandAugment's columns: of every layer those that its `operations` need.

    A layer of the policy applies one of up to fifteen operations to a sample. The graph has no
    branches, so it runs all of those that the recipe may draw, as few steps that several of them
    share (`policy`), and whatever is not a sample's own operation gets numbers that change nothing.
    side_pixels: of the view.
    """
    named: Columns = {}
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
) -> Columns:
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

    columns: Columns = {}
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


def op_columns(
    op: Op, draws: Mapping[str, NDArray[Any]], sizes: NDArray[np.int32], side_pixels: int
) -> Columns:
    """The numbers of one op. sizes: int32 [B, 2], height and width of what comes in.

    side_pixels: the shorter side of the finished view, which ops after the geometry get.
    """
    match op:
        case RandomResizedCrop():
            box: NDArray[np.int32] = draws["box"]
            return {"start": box[:, :2], "shape": box[:, 2:]}
        case Resize():
            return {"size": resized_sizes(op, sizes).astype(np.float32)}
        case CenterCrop():
            return {"start": centered_offsets(sizes, op.size)}
        case RandomCrop():
            return {"start": draws["start"]}
        case Flip():
            return {"horizontal": draws["apply"].astype(np.int32)}
        case ColorJitter():
            return _jitter(op, draws)
        case Grayscale():
            to_gray, unchanged = np.tile(LUMA, (3, 1)), np.eye(3, dtype=np.float32)
            return {"matrix": np.where(draws["apply"][:, None, None], to_gray, unchanged)}
        case GaussianBlur():
            return _blur(op, draws["sigma"], side_pixels)
        case Solarize():
            # 8-bit values never reach 256.
            return {"threshold": np.where(draws["apply"], op.threshold, 256).astype(np.int32)}
        case RandAugment():
            return policy_columns(op, draws, side_pixels)
        case _:
            assert_never(op)


def resized_sizes(op: Resize, sizes: NDArray[np.int32]) -> NDArray[np.int32]:
    """int32 [B, 2]: height and width after `op`."""
    shapes = [resized_shape(int(height), int(width), op.size) for height, width in sizes]
    return np.array(shapes, np.int32).reshape(-1, 2)


def on_single_pictures(op: Op) -> bool:
    """Whether the graph runs `op` before it stacks the `count` pictures of a view.

    Mirroring is among them wherever it stands: it commutes with every op on values and with a blur,
    and no recipe has it after RandAugment.
    """
    match op:
        case RandomResizedCrop() | Resize() | CenterCrop() | RandomCrop() | Flip():
            return True
        case ColorJitter() | Grayscale() | GaussianBlur() | Solarize() | RandAugment():
            return False
        case _:
            assert_never(op)


def picture_prefix(view_index: int, picture: int, op_index: int) -> str:
    """Names of the columns of an op on single pictures begin so."""
    return f"view.{view_index}.picture.{picture}.op.{op_index}."


def stack_prefix(view_index: int, op_index: int) -> str:
    """Names of the columns of an op on all pictures of a view begin so."""
    return f"view.{view_index}.op.{op_index}."


def _view_columns(
    view: View, view_index: int, drawn: tuple[ViewPlan, ...], sizes: NDArray[np.int32]
) -> Iterator[tuple[str, NDArray[Any]]]:
    for op_index, op in enumerate(view.executed):
        pictures = [op_columns(op, plan.ops[op_index], sizes, min(view.shape)) for plan in drawn]
        if on_single_pictures(op):
            for picture, columns in enumerate(pictures):
                for name, column in columns.items():
                    yield picture_prefix(view_index, picture, op_index) + name, column
        else:
            for name in pictures[0]:
                column = np.stack([columns[name] for columns in pictures], axis=1)
                # Numbers, and not matrices or what DALI reads itself, are operands of arithmetic.
                if column.ndim == 2 and not isinstance(op, GaussianBlur):
                    column = column.reshape(*column.shape, 1, 1, 1)
                yield stack_prefix(view_index, op_index) + name, column
        if isinstance(op, Resize):
            sizes = resized_sizes(op, sizes)


def plan_columns(augmentation: Augmentation, plan: Plan) -> Columns:
    """Every number that the ops of the graph need for `plan`, by name; the first axis is the batch.

    A column of an op on single pictures is [B, ...], one of the others [B, pictures, ...], where
    an operand of arithmetic with pixels has three more axes of length 1.
    """
    named: Columns = {}
    first = 0
    for view_index, view in enumerate(augmentation.views):
        drawn = plan.views[first : first + view.count]
        named.update(_view_columns(view, view_index, drawn, plan.sizes))
        first += view.count
    return {name: np.ascontiguousarray(column) for name, column in named.items()}


def decodes_region(augmentation: Augmentation) -> bool:
    """Whether no more than one box of the stored picture is ever looked at: only that is decoded.

    Several boxes of one picture cost more than the whole picture: the bytes before a box have to be
    read each time.
    """
    views = augmentation.flat_views
    return len(views) == 1 and isinstance(views[0].executed[0], RandomResizedCrop)


def region_columns(columns: Columns, plan: Plan, whole: NDArray[np.bool_]) -> Columns:
    """`columns` of a recipe that `decodes_region`, with what is decoded.

    `region.start`, `region.shape`, int32 [B, 2]: the crop's box; the whole picture where `whole`,
    bool [B], is set. The crop's own start then counts from there.
    """
    crop = picture_prefix(0, 0, 0)
    start, shape = columns[crop + "start"], columns[crop + "shape"]
    start_of_region = np.where(whole[:, None], 0, start).astype(np.int32)
    shape_of_region = np.where(whole[:, None], plan.sizes, shape).astype(np.int32)
    return {
        "region.start": start_of_region,
        "region.shape": shape_of_region,
        **columns,
        crop + "start": start - start_of_region,
    }


def mask_columns(plan: Plan) -> Columns:
    """The masks of the pictures that have one, by `mask.<picture>`: bool [B, ...]."""
    return {
        f"mask.{index}": np.ascontiguousarray(view.mask)
        for index, view in enumerate(plan.views)
        if view.mask is not None
    }


def erase_prefix(view_index: int, region: int | None = None) -> str:
    """Names of the columns of a view's erasing begin so: all of it, or one box of one picture."""
    return f"view.{view_index}.erase." + ("" if region is None else f"{region}.")


def finish_columns(augmentation: Augmentation, plan: Plan) -> Columns:
    """The numbers for erasing and mixing finished views.

    Erasing in a view: `start`, `shape` float32 [B, regions, 3] over (picture, row, column), where
    regions = pictures * most boxes, picture by picture; of no extent where nothing is erased. Those
    of "rand" are one column per region, [B, 3], with their `color`. Mixing: `mix.partner` int32
    [B], a row; `mix.share` float32 [B, 1, 1, 1, 1], of the sample's own pixels outside of the box;
    with CutMix `mix.start`, `mix.shape` float32 [B, 2].
    """
    named: Columns = {}
    first = 0
    for view_index, view in enumerate(augmentation.views):
        drawn = plan.views[first : first + view.count]
        first += view.count
        if view.erase is not None:
            named |= _erase(drawn, view_index)
    if augmentation.mix is not None:
        rows = np.arange(len(plan), dtype=np.int32)
        box = plan.mix["box"].astype(np.float32)
        cut = (box[:, 2:] > 0).all(axis=1)
        named["mix.partner"] = rows + plan.mix["partner"].astype(np.int32)
        share = np.where(cut, np.float32(1), plan.mix["weight"])
        named["mix.share"] = share.reshape(-1, 1, 1, 1, 1)
        if augmentation.mix.cutmix_alpha > 0:
            named |= {"mix.start": box[:, :2], "mix.shape": box[:, 2:]}
    return {name: np.ascontiguousarray(column) for name, column in named.items()}


def _erase(drawn: tuple[ViewPlan, ...], view_index: int) -> Columns:
    starts: list[NDArray[np.float32]] = []
    shapes: list[NDArray[np.float32]] = []
    for picture, plan in enumerate(drawn):
        box = plan.erase["box"].astype(np.float32)  # [B, boxes, 4]
        extent = (box[..., 2:] > 0).all(axis=2, keepdims=True).astype(np.float32)
        starts.append(np.concatenate([np.full_like(extent, picture), box[..., :2]], axis=2))
        shapes.append(np.concatenate([extent, box[..., 2:]], axis=2))
    columns = {"start": np.concatenate(starts, axis=1), "shape": np.concatenate(shapes, axis=1)}
    if "color" not in drawn[0].erase:
        return {erase_prefix(view_index) + name: column for name, column in columns.items()}
    columns["color"] = np.concatenate([plan.erase["color"] for plan in drawn], axis=1)
    return {
        erase_prefix(view_index, region) + name: column[:, region]
        for region in range(columns["start"].shape[1])
        for name, column in columns.items()
    }
