"""Draws a `Plan`: all randomness of a batch, before anything runs.

No engine owns a generator; the pictures of a run depend on nothing but its seed, the epoch, the
sample and what `counters` says of a draw's place. It costs a few microseconds per image.

What is stable: a draw depends on its op's kind and on how many ops of that kind precede it in the
view, not on the op's other neighbours. Inserting, removing or moving an op therefore changes the
draws of later ops of the same kind only; changing a probability or a range never moves another
draw. Views are numbered, so appending one keeps the draws of all before it. Nothing depends on the
batch: `draw(ids)` cut into whole groups is `draw` of those ids.

All arithmetic is exact or IEEE double and hence equal everywhere, but for `exp` and `log` in aspect
ratios and in a Beta variable: where another CPU rounds them differently, a box may be off by a
pixel, a patch of a block mask may be another one, and a mixing weight differ in its last digit.
"""

import itertools
import math
from collections import Counter
from typing import Any, assert_never

import numba
import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.counters import (
    EPOCH_LIMIT,
    ID_LIMIT,
    OCCURRENCE_LIMIT,
    SEED_LIMIT,
    Kind,
    PlanError,
)
from headrace.pipelines.draw_masks import mask
from headrace.pipelines.draw_mix import declared_draw, erase, mix
from headrace.pipelines.geometry import resized_sizes
from headrace.pipelines.noise import normals
from headrace.pipelines.ops import (
    RAND_AUGMENT_OPERATIONS,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    OneOf,
    Op,
    RandAugment,
    RandAugmentOperation,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Solarize,
    height_and_width,
)
from headrace.pipelines.philox import uniforms
from headrace.pipelines.plan import Plan, ViewPlan
from headrace.pipelines.recipe import Augmentation, View
from headrace.pipelines.source import Source, below, between

PLAN_VERSION = 1  # moves when equal inputs would give other draws

_CROP_ATTEMPTS = 10
_BENDING = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")  # they sample pixels anew
_JITTER_ORDERS = np.array(list(itertools.permutations(range(4))), np.int8)


# Lazily compiled and cached, as in `philox`. It takes words instead of calling Philox because
# numba's cache does not notice a change in another file.
@numba.njit(cache=True, nogil=True)
def _crop_boxes(
    random_words: NDArray[np.uint32],
    sizes: NDArray[np.int32],
    scale_low: float,
    scale_high: float,
    ratio_low: float,
    ratio_high: float,
    boxes: NDArray[np.int32],
) -> None:
    log_low = math.log(ratio_low)
    log_span = math.log(ratio_high) - log_low
    unit = 2.0**-32
    for row in range(sizes.shape[0]):
        height = np.int64(sizes[row, 0])
        width = np.int64(sizes[row, 1])
        area = float(height * width)
        for attempt in range(random_words.shape[1]):
            draws = random_words[row, attempt]
            target_area = area * (scale_low + draws[0] * unit * (scale_high - scale_low))
            ratio = math.exp(log_low + draws[1] * unit * log_span)
            box_width = np.int64(np.rint(math.sqrt(target_area * ratio)))
            box_height = np.int64(np.rint(math.sqrt(target_area / ratio)))
            if 0 < box_width <= width and 0 < box_height <= height:
                top = (np.int64(draws[2]) * (height - box_height + 1)) >> 32
                left = (np.int64(draws[3]) * (width - box_width + 1)) >> 32
                break
        else:
            box_height, box_width = height, width
            if width / height < ratio_low:
                box_height = max(np.int64(np.rint(width / ratio_low)), 1)
            elif width / height > ratio_high:
                box_width = max(np.int64(np.rint(height * ratio_high)), 1)
            top = (height - box_height) // 2
            left = (width - box_width) // 2
        boxes[row, 0] = top
        boxes[row, 1] = left
        boxes[row, 2] = box_height
        boxes[row, 3] = box_width


def _kind(op: Op) -> Kind | None:
    match op:
        case RandomResizedCrop():
            return Kind.CROP
        case Flip():
            return Kind.FLIP
        case ColorJitter():
            return Kind.JITTER
        case Grayscale():
            return Kind.GRAYSCALE
        case GaussianBlur():
            return Kind.BLUR
        case Solarize():
            return Kind.SOLARIZE
        case RandAugment():
            return Kind.RAND_AUGMENT
        case RandomCrop():
            return Kind.RANDOM_CROP
        case Resize() | CenterCrop():
            return None
        case _:
            assert_never(op)


def _columns(
    op: Op, kind: Kind, ordinal: int, source: Source, sizes: NDArray[np.int32]
) -> dict[str, NDArray[Any]]:
    """sizes: int32 [B, 2], height and width of what the op gets."""
    match op:
        case RandomResizedCrop():
            drawn = source.words(kind, ordinal, blocks=_CROP_ATTEMPTS)
            boxes = np.empty((len(sizes), 4), np.int32)
            _crop_boxes(
                drawn.reshape(-1, _CROP_ATTEMPTS, 4),
                sizes,
                float(op.scale[0]),
                float(op.scale[1]),
                float(op.ratio[0]),
                float(op.ratio[1]),
                boxes,
            )
            return {"box": boxes}
        case ColorJitter():
            drawn = source.words(kind, ordinal, blocks=2)
            strengths = np.array([op.brightness, op.contrast, op.saturation])
            low = np.append(np.maximum(0.0, 1.0 - strengths), -op.hue)
            high = np.append(1.0 + strengths, op.hue)
            if op.additive_brightness:
                low[0], high[0] = -op.brightness, op.brightness
            return {
                "apply": uniforms(drawn[:, 4]) < op.probability,
                "factors": between(low, high, uniforms(drawn[:, :4])),
                "order": _JITTER_ORDERS[below(drawn[:, 5], len(_JITTER_ORDERS))],
            }
        case GaussianBlur():
            of_sample = source.words(kind, ordinal, blocks=1)
            shared = of_sample if op.scope == "sample" else source.words(kind, ordinal, 1, op.scope)
            sigma = between(*op.sigma, uniforms(shared[:, 1]))
            apply = uniforms(of_sample[:, 0]) < op.probability
            return {"sigma": np.where(apply, sigma, np.float32(0))}
        case RandAugment():
            return _rand_augment(op, source.words(kind, ordinal, blocks=op.num_ops))
        case RandomCrop():
            drawn = source.words(kind, ordinal, blocks=1)[:, :2]
            cut = np.array(height_and_width(op.size), np.int32)
            missing = np.maximum(cut - (sizes + 2 * op.padding_pixels), 0)
            border = op.padding_pixels + missing  # on each side
            start = below(drawn, sizes + 2 * border - cut + 1) - border
            return {"start": start.astype(np.int32)}
        case Flip() | Grayscale() | Solarize():
            return {"apply": source.gate(kind, ordinal, op.probability)}
        case Resize() | CenterCrop():
            return {}
        case _:
            assert_never(op)


def _rand_augment(op: RandAugment, drawn: NDArray[np.uint32]) -> dict[str, NDArray[Any]]:
    """drawn: uint32 [B, 4 * num_ops]; of four words which, whether, how strongly, how sampled."""
    which, whether, strength, sampling = drawn.reshape(len(drawn), op.num_ops, 4).transpose(2, 0, 1)
    places = np.array([RAND_AUGMENT_OPERATIONS.index(name) for name in op.operations], np.int8)
    operation = places[below(which, len(places))]
    operation = np.where(uniforms(whether) < op.probability, operation, np.int8(-1))
    noise = normals(strength & 0xFFFF).astype(np.float64)
    level = np.clip(op.magnitude + op.magnitude_std * noise, 0.0, 10.0) / 10.0
    signed = np.where(strength >> 31, -level, level)
    argument = np.zeros(level.shape, np.float64)
    bends = np.zeros(level.shape, np.bool_)
    for place in np.unique(operation).tolist():
        if place >= 0:
            name = RAND_AUGMENT_OPERATIONS[place]
            here = operation == place
            argument[here] = _argument(name, op, level, signed)[here]
            bends |= here & (name in _BENDING)
    match op.interpolation:
        case "random":
            bicubic = bends & (sampling >> 31 == 1)
        case _:
            bicubic = bends & (op.interpolation == "bicubic")
    return {"operation": operation, "argument": argument.astype(np.float32), "bicubic": bicubic}


def _argument(
    name: RandAugmentOperation,
    op: RandAugment,
    level: NDArray[np.float64],
    signed: NDArray[np.float64],
) -> NDArray[np.float64]:
    """What an operation is called with at a level in [0, 1]: timm's `LEVEL_TO_ARG`."""
    match name:
        case "AutoContrast" | "Equalize" | "Invert":
            return np.zeros_like(level)
        case "Rotate":
            return signed * 30.0
        case "ShearX" | "ShearY":
            return signed * 0.3
        case "TranslateX" | "TranslateY":
            return signed * op.translate_fraction
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return np.maximum(0.1, 1.0 + signed * 0.9)
        case "Posterize":
            return 4 - np.trunc(level * 4)
        case "Solarize":
            return 256 - np.trunc(level * 256)
        case "SolarizeAdd":
            return np.trunc(level * 110)
        case _:
            assert_never(name)


def _one_of(
    declared: OneOf, inner: list[dict[str, NDArray[Any]]], drawn: NDArray[np.uint32]
) -> list[dict[str, NDArray[Any]]]:
    """The columns of its ops, of which those that were not chosen do not apply."""
    chosen = below(drawn[:, 0], len(declared.ops))
    return [
        {
            name: np.where(chosen == place, column, column.dtype.type(0))
            for name, column in op.items()
        }
        for place, op in enumerate(inner)
    ]


def _view(
    view: View, source: Source, sizes: NDArray[np.int32]
) -> tuple[dict[str, NDArray[Any]], ...]:
    """The columns of `view.executed`, one mapping per op."""
    seen: Counter[Kind] = Counter()
    columns: list[dict[str, NDArray[Any]]] = []

    def drawn(op: Op) -> dict[str, NDArray[Any]]:
        kind = _kind(op)
        if kind is None:
            return {}
        seen[kind] += 1
        return _columns(op, kind, seen[kind] - 1, source, sizes)

    for op in view.ops:
        if isinstance(op, OneOf):
            words_ = source.words(Kind.ONE_OF, seen[Kind.ONE_OF], blocks=1)
            seen[Kind.ONE_OF] += 1
            columns += _one_of(op, [drawn(inner) for inner in op.ops], words_)
        else:
            columns.append(drawn(op))
        if isinstance(op, Resize):
            sizes = resized_sizes(sizes, op.size)
    return tuple(columns)


def draw(
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    position: int,
    ids: NDArray[np.int64],
    occurrences: NDArray[np.int32],
    sizes: NDArray[np.int32],
    first: int = 0,
) -> Plan:
    """The plan of a batch, or of `first` and the following samples of one.

    seed: in [0, 2^64). epoch: in [0, 2^32). position: see `Plan`; position + first says in which
    groups the samples are, in [0, 2^40). ids: int64 [B] in [0, 2^40). occurrences: int32 [B] in
    [0, 2^10). sizes: int32 [B, 2] = height, width in pixels.
    Raises PlanError for values, shapes or dtypes outside of that, or samples that are no whole
    groups of the recipe.
    """
    start, group = position + first, augmentation.group
    _check(seed, epoch, start, ids, occurrences, sizes)
    if group > 1 and (start % group or len(ids) % group):
        raise PlanError(
            f"{len(ids)} samples from position {start} on are no whole groups of {group}, which "
            f"the recipe {augmentation.name!r} draws for"
        )
    groups = np.arange(start, start + len(ids), dtype=np.int64) // group
    sizes = np.array(sizes, order="C")  # read-only memory would be another type to numba
    sources = [
        Source(seed, epoch, index, ids, occurrences, groups, group)
        for index in range(len(augmentation.flat_views))
    ]
    views = tuple(
        ViewPlan(
            _view(view, source, sizes),
            None if view.mask is None else mask(view.mask, view.shape, source),
            {} if view.erase is None else erase(view.erase, view.shape, source),
        )
        for view, source in zip(augmentation.flat_views, sources, strict=True)
    )
    mixed = augmentation.mix
    return Plan(
        seed,
        epoch,
        position,
        ids,
        occurrences,
        sizes,
        views,
        {} if mixed is None else mix(mixed, augmentation.flat_views[0].shape, sources[0]),
        {
            declared.name: declared_draw(declared, ordinal, sources[0])
            for ordinal, declared in enumerate(augmentation.draws)
        },
    )


def _check(
    seed: int,
    epoch: int,
    start: int,
    ids: NDArray[np.int64],
    occurrences: NDArray[np.int32],
    sizes: NDArray[np.int32],
) -> None:
    for name, value, limit in (
        ("seed", seed, SEED_LIMIT),
        ("epoch", epoch, EPOCH_LIMIT),
        ("position", start, ID_LIMIT - len(ids)),
    ):
        if not 0 <= value < limit:
            raise PlanError(f"{name} is {value}; it must be in [0, {limit})")
    batch = len(ids)
    for name, array, dtype, shape in (
        ("ids", ids, np.int64, (batch,)),
        ("occurrences", occurrences, np.int32, (batch,)),
        ("sizes", sizes, np.int32, (batch, 2)),
    ):
        if array.dtype != dtype or array.shape != shape:
            raise PlanError(
                f"{name} is {array.dtype} {list(array.shape)}; "
                f"it must be {np.dtype(dtype)} {list(shape)}"
            )
    for name, array, least, limit in (
        ("ids", ids, 0, ID_LIMIT),
        ("occurrences", occurrences, 0, OCCURRENCE_LIMIT),
        ("sizes", sizes, 1, 1 << 31),
    ):
        wrong = (array < least) | (array >= limit)
        if wrong.any():
            raise PlanError(
                f"{name} holds {array[wrong][0]}; every value must be in [{least}, {limit})"
            )
