"""The rows of `bench_methods.py`: JSON lines, one per (method, seed, samples), and their table."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from filelock import FileLock

from headrace.shards.errors import UserError

Row = Mapping[str, Any]
PIXELS = "raw pixels"
PROTOCOLS = ("knn", "linear")
LEAST_GAIN_POINTS = 1.0
LEAST_GAIN_DEVIATIONS = 2.0


class RowsError(UserError):
    """A file that holds no rows of `bench_methods.py`: which, and why."""


def key(row: Row) -> tuple[str, int | None, int]:
    """What a row is about."""
    return row["name"], row["seed"], row["samples"]


def is_pixels(row: Row) -> bool:
    """Whether it is the baseline without a network."""
    return row["seed"] is None


def read_rows(path: Path) -> list[Row]:
    """Nothing where there is no file. Half a last line, of an end in the middle, is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            key(row)
        except (ValueError, KeyError, TypeError) as error:
            raise RowsError(f"{path}, line {number} is no row of bench_methods.py") from error
        rows.append(row)
    return rows


def append_row(path: Path, row: Row) -> None:
    """At the end of the file, as a whole, also where several processes append to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not of the file itself, which on Windows its holder could not write through another handle.
    with FileLock(path.with_name(f".{path.name}.lock")), path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # half a line of one that was killed
        file.write((json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row about each thing, in the order in which the things first came."""
    return list({key(row): row for row in rows}.values())


@dataclass(frozen=True)
class Spread:
    """Of one number over seeds; the deviation (n - 1) is None with one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return (
            f"{self.mean:.1f}"
            if self.deviation is None
            else f"{self.mean:.1f} ± {self.deviation:.1f}"
        )


@dataclass(frozen=True)
class Verdict:
    """A method under one setting. The metrics are top-1 in percent over the whole test set.

    images_per_second: of the fastest seed, the one that other work disturbed least.
    """

    name: str
    judged_by: str
    seeds: tuple[int, ...]
    untrained: Mapping[str, Spread]
    trained: Mapping[str, Spread]
    images_per_second: float
    peak_memory_bytes: float | None

    @property
    def gain(self) -> float:
        return self.trained[self.judged_by].mean - self.untrained[self.judged_by].mean

    @property
    def pooled(self) -> float | None:
        """Deviation over seeds, of untrained and trained encoders together."""
        before, after = (side[self.judged_by].deviation for side in (self.untrained, self.trained))
        if before is None or after is None:
            return None
        return math.sqrt((before**2 + after**2) / 2)

    @property
    def learns(self) -> bool | None:
        """None where one seed cannot tell."""
        if self.pooled is None:
            return None
        return self.gain > max(LEAST_GAIN_POINTS, LEAST_GAIN_DEVIATIONS * self.pooled)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """One per method and number of samples, over the seeds that were run as its last row was."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in latest(rows):
        if row["status"] == "done" and not is_pixels(row):
            groups.setdefault((row["name"], row["samples"]), []).append(row)
    by_method = []
    for (name, _), group in groups.items():
        newest = max(group, key=lambda row: row["date"])
        same = [row for row in group if row["setting"] == newest["setting"]]
        memory = [row["peak_memory_bytes"] for row in same if row["peak_memory_bytes"]]
        by_method.append(
            Verdict(
                name,
                newest["judged_by"],
                tuple(sorted(row["seed"] for row in same)),
                {p: Spread.of([row["untrained"][p] for row in same]) for p in PROTOCOLS},
                {p: Spread.of([row["trained"][p] for row in same]) for p in PROTOCOLS},
                max(row["images_per_second"] for row in same),
                max(memory) if memory else None,
            )
        )
    return by_method


HEAD = ("method", "judged by", "seeds", "untrained", "trained", "gain", "pooled deviation",
        "verdict", "kNN", "linear", "images/s", "MB")  # fmt: skip


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells, the head first: baselines, then methods by name, then what did not come to an end."""
    cells: list[list[str]] = [list(HEAD)]
    for row in latest(rows):
        if is_pixels(row) and row["status"] == "done":
            metrics = [f"{row['trained'][protocol]:.1f}" for protocol in PROTOCOLS]
            cells.append([row["name"], *[""] * 7, *metrics, "", ""])
    for verdict in sorted(verdicts(rows), key=lambda verdict: verdict.name):
        memory = verdict.peak_memory_bytes
        judged = "linear" if verdict.judged_by == "linear" else "kNN"
        words = {True: "learns", False: "does not learn", None: "one seed cannot tell"}
        cells.append(
            [
                verdict.name,
                judged,
                str(len(verdict.seeds)),
                str(verdict.untrained[verdict.judged_by]),
                str(verdict.trained[verdict.judged_by]),
                f"{verdict.gain:+.1f}",
                "" if verdict.pooled is None else f"{verdict.pooled:.2f}",
                words[verdict.learns],
                *(f"{verdict.trained[protocol].mean:.1f}" for protocol in PROTOCOLS),
                f"{verdict.images_per_second:,.0f}",
                "" if memory is None else f"{memory / 1e6:,.0f}",
            ]
        )
    for row in latest(rows):
        if row["status"] != "done":
            name = row["name"] if row["seed"] is None else f"{row['name']}, seed {row['seed']}"
            cells.append([name, *[""] * 6, f"{row['status']}: {row['error']}", *[""] * 4])
    return cells


def plain(cells: Sequence[Sequence[str]]) -> str:
    """For a terminal: aligned columns; a row that says why it has no numbers is a line of text."""
    place = HEAD.index("verdict")
    rows = [row for row in cells if any(row[place + 1 :])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = []
    for row in cells:
        if not any(row[place + 1 :]):
            lines.append(f"{row[0]}: {row[place]}")
            continue
        padded = (
            cell.ljust(width) if i in (0, 1, place) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
