"""What happens to the samples of a batch, number by number.

A `Plan` is a structure of arrays that `draw` fills, engines execute, tests compare and a file can
hold: a few hundred bytes per image, in exchange for which no engine needs a generator.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.pipelines.counters import PlanError

_FILE_FORMAT = 1

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class ViewPlan:
    """The draws of one picture per sample.

    ops: one mapping per op of the View, from column to array with first axis B, as the op's
    docstring lists them; empty for an op without draws. In the order of `View.executed`.
    mask: bool [B, N] (True = removed; as its dataclass says), or None.
    erase: the columns of RandomErasing; empty where the view has none.
    """

    ops: tuple[Columns, ...]
    mask: NDArray[np.bool_] | None = None
    erase: Columns = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Plan:
    """All that happens to the B samples of a batch, or of a slice of one.

    position: place in the epoch of the *global* batch's first sample. ids: int64 [B].
    occurrences: int32 [B]. sizes: int32 [B, 2] = height, width of the stored pictures in pixels.
    views: in the order of `Augmentation.flat_views`. mix: the columns of Mix; empty without one.
    draws: the values of each Draw.
    """

    seed: int
    epoch: int
    position: int
    ids: NDArray[np.int64]
    occurrences: NDArray[np.int32]
    sizes: NDArray[np.int32]
    views: tuple[ViewPlan, ...]
    mix: Columns = field(default_factory=dict)
    draws: Columns = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array by a name such as `ids`, `view.1.op.0.box`, `view.0.mask`, `mix.weight`."""
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
            for name, column in view.erase.items():
                named[f"view.{view_index}.erase.{name}"] = column
        for group, columns in (("mix", self.mix), ("draw", self.draws)):
            for name, column in columns.items():
                named[f"{group}.{name}"] = column
        return named

    def rows(self, rows: slice) -> "Plan":
        """The plan of some of its samples, sharing memory; `position` stays the global batch's.

        `rows` must hold whole groups where samples are mixed.
        """

        def cut(columns: Columns) -> Columns:
            return {name: column[rows] for name, column in columns.items()}

        views = tuple(
            ViewPlan(
                tuple(cut(op) for op in view.ops),
                None if view.mask is None else view.mask[rows],
                cut(view.erase),
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
            cut(self.mix),
            cut(self.draws),
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
                {
                    "ops": [list(op) for op in view.ops],
                    "mask": view.mask is not None,
                    "erase": list(view.erase),
                }
                for view in self.views
            ],
            "mix": list(self.mix),
            "draws": list(self.draws),
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
                        {
                            name: file[f"view.{view_index}.erase.{name}"]
                            for name in view.get("erase", ())
                        },
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
                    {name: file[f"mix.{name}"] for name in header.get("mix", ())},
                    {name: file[f"draw.{name}"] for name in header.get("draws", ())},
                )
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise PlanError(f"{path} is not a saved plan: {error}") from error

    def __str__(self) -> str:
        first = self.rows(slice(3))
        lines = [
            f"plan of {len(self)} samples: seed {self.seed}, epoch {self.epoch}, "
            f"position {self.position}; the first {len(first)}:"
        ]
        for name, array in first.arrays().items():
            is_mask = name.startswith("view.") and name.endswith(".mask")
            values = _mask_shown if is_mask else _shown
            lines.append(f"  {name:<22} " + "  ".join(values(row) for row in array))
        return "\n".join(lines)


def _shown(row: NDArray[Any]) -> str:
    """On one line; the middle of what is long is left out."""
    text = np.array2string(
        row, max_line_width=1000, precision=3, suppress_small=True, threshold=16, edgeitems=3
    )
    return " ".join(text.split())


def _mask_shown(mask: NDArray[np.bool_]) -> str:
    if mask.ndim == 1:
        return f"{mask.sum()} of {mask.size} removed"
    targets = " + ".join(str(count) for count in mask[1:].sum(axis=1))
    return f"{mask[0].sum()} of {mask[0].size} removed, targets of {targets}"
