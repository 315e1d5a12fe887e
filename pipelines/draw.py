"""Draws a `Plan`: all randomness of a batch, before anything runs.

No engine owns a generator; the pictures of a run depend on nothing but its seed, the epoch, the
sample and what `counters` says of a draw's place. It costs a few microseconds per image.

What is stable: a draw depends on its op's kind and on how many ops of that kind precede it in the
view, not on the op's other neighbours. Inserting, removing or moving an op therefore changes the
draws of later ops of the same kind only; changing a probability or a range never moves another
draw. Views are numbered, so appending one keeps the draws of all before it. Nothing depends on the
batch: `draw(ids)` cut into rows is `draw` of those ids.

All arithmetic is exact or IEEE double and hence equal everywhere, but for `exp` and `log` in a
crop's aspect ratio: where another CPU's libm rounds them differently, a box may be off by a pixel.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, assert_never

import numba
import numpy as np
from numpy.typing import NDArray

from pipelines.counters import (
    EPOCH_LIMIT,
    ID_LIMIT,
    OCCURRENCE_LIMIT,
    SEED_LIMIT,
    Kind,
    PlanError,
    Scope,
    counters,
)
from pipelines.philox import uniforms, words
from pipelines.plan import Plan, ViewPlan
from pipelines.recipe import (
    Augmentation,
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Op,
    RandomMask,
    RandomResizedCrop,
    Resize,
    Solarize,
)

PLAN_VERSION = 1  # moves when equal inputs would give other draws

_CROP_ATTEMPTS = 10
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


@dataclass(frozen=True)
class _Source:
    """The random words of one view."""

    seed: int
    epoch: int
    view: int
    ids: NDArray[np.int64]
    occurrences: NDArray[np.int32]

    def words(self, kind: Kind, ordinal: int, blocks: int) -> NDArray[np.uint32]:
        """uint32 [B, 4 * blocks]."""
        chosen = counters(
            Scope.SAMPLE,
            kind,
            self.ids,
            epoch=self.epoch,
            occurrence=self.occurrences,
            view=self.view,
            ordinal=ordinal,
            blocks=blocks,
        )
        return words(self.seed, chosen).reshape(len(self.ids), 4 * blocks)

    def gate(self, kind: Kind, ordinal: int, probability: float) -> NDArray[np.bool_]:
        """bool [B]; never where the probability is 0, always where it is 1."""
        return uniforms(self.words(kind, ordinal, blocks=1)[:, 0]) < probability


def _between(
    low: float | NDArray[np.float64],
    high: float | NDArray[np.float64],
    uniform: NDArray[np.float64],
) -> NDArray[np.float32]:
    return (low + uniform * (np.subtract(high, low))).astype(np.float32)


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
        case Resize() | CenterCrop():
            return None
        case _:
            assert_never(op)


def _columns(
    op: Op, kind: Kind, ordinal: int, source: _Source, sizes: NDArray[np.int32]
) -> dict[str, NDArray[Any]]:
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
            orders = (drawn[:, 5].astype(np.uint64) * len(_JITTER_ORDERS)) >> np.uint64(32)
            return {
                "apply": uniforms(drawn[:, 4]) < op.probability,
                "factors": _between(low, high, uniforms(drawn[:, :4])),
                "order": _JITTER_ORDERS[orders],
            }
        case GaussianBlur():
            drawn = uniforms(source.words(kind, ordinal, blocks=1)[:, :2])
            sigma = _between(*op.sigma, drawn[:, 1])
            return {"sigma": np.where(drawn[:, 0] < op.probability, sigma, np.float32(0))}
        case Flip() | Grayscale() | Solarize():
            return {"apply": source.gate(kind, ordinal, op.probability)}
        case Resize() | CenterCrop():
            return {}
        case _:
            assert_never(op)


def _removed(mask: RandomMask, size: int, source: _Source) -> NDArray[np.bool_]:
    """bool [B, N]: all but the int(N * (1 - ratio)) patches of the smallest noise."""
    patches = (size // mask.patch_pixels) ** 2
    kept = int(patches * (1 - mask.ratio))
    noise = source.words(Kind.MASK, 0, blocks=-(-patches // 4))[:, :patches]
    # The index in the low half breaks ties, so that exactly `kept` keys lie below the kept-th.
    keys = (noise.astype(np.uint64) << np.uint64(32)) | np.arange(patches, dtype=np.uint64)
    if kept == 0:
        return np.ones(keys.shape, np.bool_)
    return keys > np.partition(keys, kept - 1, axis=1)[:, kept - 1, None]


def draw(
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    position: int,
    ids: NDArray[np.int64],
    occurrences: NDArray[np.int32],
    sizes: NDArray[np.int32],
) -> Plan:
    """The plan of a batch.

    seed: in [0, 2^64). epoch: in [0, 2^32). position: see `Plan`; it enters no draw.
    ids: int64 [B] in [0, 2^40). occurrences: int32 [B] in [0, 2^10). sizes: int32 [B, 2] = height,
    width in pixels. Raises PlanError for values, shapes or dtypes outside of that.
    """
    _check(seed, epoch, ids, occurrences, sizes)
    sizes = np.array(sizes, order="C")  # read-only memory would be another type to numba
    views: list[ViewPlan] = []
    for view_index, view in enumerate(augmentation.flat_views):
        source = _Source(seed, epoch, view_index, ids, occurrences)
        seen: Counter[Kind] = Counter()
        ops: list[dict[str, NDArray[Any]]] = []
        for op in view.ops:
            kind = _kind(op)
            if kind is None:
                ops.append({})
            else:
                ops.append(_columns(op, kind, seen[kind], source, sizes))
                seen[kind] += 1
        mask = None if view.mask is None else _removed(view.mask, view.size, source)
        views.append(ViewPlan(tuple(ops), mask))
    return Plan(seed, epoch, position, ids, occurrences, sizes, tuple(views))


def _check(
    seed: int,
    epoch: int,
    ids: NDArray[np.int64],
    occurrences: NDArray[np.int32],
    sizes: NDArray[np.int32],
) -> None:
    for name, value, limit in (("seed", seed, SEED_LIMIT), ("epoch", epoch, EPOCH_LIMIT)):
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
