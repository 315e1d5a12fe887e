"""Every random number of a batch, drawn before anything runs.

`draw` turns a recipe into a `Plan`, a structure of arrays that engines execute, tests compare and
a file can hold. A plan costs a few microseconds per image and a few hundred bytes; in return no
engine owns a generator, and the pictures of a run depend on nothing but the run's seed, the epoch,
the sample and what `counters` says of a draw's place.

What is stable: a draw depends on its op's kind and on how many ops of that kind precede it in the
view, not on the op's other neighbours. Inserting, removing or moving an op therefore changes the
draws of later ops of the same kind only; changing a probability or a range never moves another
draw. Views are numbered, so appending one keeps the draws of all before it. Nothing depends on the
batch: `draw(ids)` cut into rows is `draw` of those ids.

All arithmetic is exact or IEEE double and hence equal everywhere, but for `exp` and `log` in a
crop's aspect ratio: where another CPU's libm rounds them differently, a box may be off by a pixel.
"""

import itertools
import json
import math
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
_FILE_FORMAT = 1


@dataclass(frozen=True, eq=False)
class ViewPlan:
    """The draws of one picture per sample.

    ops: one mapping per op of the View, from column to array with first axis B, as the op's
    docstring lists them; empty for an op without draws.
    mask: bool [B, N] (True = removed), or None.
    """

    ops: tuple[Mapping[str, NDArray[Any]], ...]
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """All that happens to the B samples of a batch, or of a slice of one.

    position: place in the epoch of the *global* batch's first sample. ids: int64 [B].
    occurrences: int32 [B]. sizes: int32 [B, 2] = height, width of the stored pictures in pixels.
    views: in the order of `Augmentation.flat_views`.
    """

    seed: int
    epoch: int
    position: int
    ids: NDArray[np.int64]
    occurrences: NDArray[np.int32]
    sizes: NDArray[np.int32]
    views: tuple[ViewPlan, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array by a name such as `ids`, `view.1.op.0.box` or `view.0.mask`."""
        named: dict[str, NDArray[Any]] = {
            "ids": self.ids,
            "occurrences": self.occurrences,
            "sizes": self.sizes,
        }
        for view_index, view in enumerate(self.views):
            for op_index, columns in enumerate(view.ops):
                for name, column in columns.items():
                    named[f"view.{view_index}.op.{op_index}.{name}"] = column
            if view.mask is not None:
                named[f"view.{view_index}.mask"] = view.mask
        return named

    def rows(self, rows: slice) -> "Plan":
        """The plan of some of its samples, sharing memory; `position` stays the global batch's."""
        views = tuple(
            ViewPlan(
                tuple({name: column[rows] for name, column in op.items()} for op in view.ops),
                None if view.mask is None else view.mask[rows],
            )
            for view in self.views
        )
        return Plan(
            self.seed,
            self.epoch,
            self.position,
            self.ids[rows],
            self.occurrences[rows],
            self.sizes[rows],
            views,
        )

    def equal(self, other: "Plan") -> bool:
        """Whether both hold the same columns with the same types and, bit for bit, values."""
        mine, theirs = self.arrays(), other.arrays()
        return (
            (self.seed, self.epoch, self.position) == (other.seed, other.epoch, other.position)
            and [len(view.ops) for view in self.views] == [len(view.ops) for view in other.views]
            and mine.keys() == theirs.keys()
            and all(
                array.dtype == theirs[name].dtype and np.array_equal(array, theirs[name])
                for name, array in mine.items()
            )
        )

    def save(self, path: str | Path) -> None:
        """Write an .npz that `load` gives back exactly, or leave nothing behind."""
        path = Path(path)
        header = {
            "format": _FILE_FORMAT,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "views": [
                {"ops": [list(op) for op in view.ops], "mask": view.mask is not None}
                for view in self.views
            ],
        }
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        arrays = {"header": np.array(json.dumps(header)), **self.arrays()}
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote. Raises PlanError where that is not what the file holds."""
        try:
            # Opened here, because np.load leaves a file that is no zip open.
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                if header["format"] != _FILE_FORMAT:
                    raise PlanError(
                        f"{path}: plan format {header['format']}; this version reads {_FILE_FORMAT}"
                    )
                views = tuple(
                    ViewPlan(
                        tuple(
                            {name: file[f"view.{view_index}.op.{op_index}.{name}"] for name in op}
                            for op_index, op in enumerate(view["ops"])
                        ),
                        file[f"view.{view_index}.mask"] if view["mask"] else None,
                    )
                    for view_index, view in enumerate(header["views"])
                )
                return cls(
                    header["seed"],
                    header["epoch"],
                    header["position"],
                    file["ids"],
                    file["occurrences"],
                    file["sizes"],
                    views,
                )
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise PlanError(f"{path} is not a saved plan: {error}") from error

    def __str__(self) -> str:
        shown = self.rows(slice(3))
        lines = [
            f"plan of {len(self)} samples: seed {self.seed}, epoch {self.epoch}, "
            f"position {self.position}; the first {len(shown)}:"
        ]
        for name, array in shown.arrays().items():
            if name.endswith(".mask"):
                values = [f"{int(row.sum())} of {row.size} removed" for row in array]
            else:
                values = [
                    np.array2string(row, separator=" ", precision=3, suppress_small=True)
                    for row in array
                ]
            lines.append(f"  {name:<22} " + "  ".join(values))
        return "\n".join(lines)


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
