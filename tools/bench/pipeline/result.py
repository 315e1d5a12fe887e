"""What was measured of a row, and what follows from it: a line of the JSON file of
`bench_pipeline.py`.

Ratios are taken round by round, between rows that ran shortly after each other, and their median is
reported: a machine that drifts moves both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

from headrace.tools.bench.machine import machine, package_versions
from headrace.tools.bench.pipeline.task import (
    DALI_READER,
    DECODE,
    OWN_ENGINES,
    PEERS,
    VIEW_SIDES,
    Task,
)
from headrace.tools.bench.proc import Memory

PACKAGES = (
    "headrace", "torch", "torchvision", "timm", "numpy", "numba", "pillow", "simplejpeg",
    "webdataset", "ffcv",
)  # fmt: skip


@dataclass
class Result:
    """One row: filled while it runs. `cannot` or `failed` is a sentence where there is no result.

    rates: images per second, by round. cpu_shares: for each round the share of `threads` cores that
    each part of the row's processes used. idle: before each round, seconds of CPU time
    and of waiting.
    """

    task: Task
    import_seconds: float = 0.0
    first_batch_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu_shares: list[dict[str, float]] = field(default_factory=list)
    idle: list[tuple[float, float]] = field(default_factory=list)
    peak: Memory = field(default_factory=Memory)
    plan_seconds_per_image: float | None = None
    interpreter_share: float | None = None
    anonymous_by_epoch: list[int] = field(default_factory=list)
    cannot: str = ""
    failed: str = ""

    @property
    def measured(self) -> bool:
        return bool(self.rates) and not self.failed

    @property
    def rate(self) -> float:
        return median(self.rates)

    def add_round(self, answer: dict[str, Any]) -> None:
        cores = answer["seconds"] * self.task.threads
        self.rates.append(answer["images"] / answer["seconds"])
        self.cpu_shares.append(
            {part: seconds / cores for part, seconds in answer["cpu_seconds"].items()}
        )

        self.idle.append(answer["idle"])

    @property
    def cpu_share(self) -> float:
        return median(sum(shares.values()) for shares in self.cpu_shares)

    @property
    def idle_cpu_share(self) -> float:
        """Of one core, taken from the rows that were measured meanwhile."""
        used, waited = (sum(seconds) for seconds in zip(*self.idle, strict=True))
        return used / waited

    @property
    def cpu_share_by_part(self) -> dict[str, float]:
        parts = {part for shares in self.cpu_shares for part in shares}
        medians = {
            part: median(shares.get(part, 0.0) for shares in self.cpu_shares) for part in parts
        }
        return {part: share for part, share in sorted(medians.items()) if share >= 0.0005}

    @property
    def plan_share(self) -> float | None:
        """Of the CPU time that the row uses, what drawing plans takes."""
        if self.plan_seconds_per_image is None:
            return None
        used = median(
            sum(shares.values()) * self.task.threads / rate
            for shares, rate in zip(self.cpu_shares, self.rates, strict=True)
        )
        return self.plan_seconds_per_image / used if used else None


def ratio(result: Result, other: Result) -> float:
    """How many times as fast `result` is: the median over rounds."""
    return median(a / b for a, b in zip(result.rates, other.rates, strict=False))


def find(results: Sequence[Result], engine: str, output: str = "float32") -> Result | None:
    """The measured row of a group (one recipe, one number of threads)."""
    for result in results:
        same = result.task.output == output or engine == DECODE  # decoding has one output
        if result.measured and result.task.engine == engine and same:
            return result
    return None


def best_own(results: Sequence[Result], output: str = "float32") -> Result | None:
    """The fastest of our engines in a group."""
    rows = [find(results, engine, output) for engine in OWN_ENGINES]
    return max((row for row in rows if row is not None), key=lambda row: row.rate, default=None)


def reader_cost(results: Sequence[Result]) -> float | None:
    """The share of the dali engine's speed that feeding it our bytes costs; may be below 0."""
    fed, reading = find(results, "dali"), find(results, DALI_READER)
    return None if fed is None or reading is None else 1 - ratio(fed, reading)


def line(
    result: Result, group: Sequence[Result], one_thread: Result | None, context: dict[str, Any]
) -> dict[str, Any]:
    """A row's line. group: all rows of its recipe and threads. one_thread: the same row with one
    thread, if that was measured. context: what all lines of a run share."""
    task = result.task
    decode = find(group, DECODE)
    views = len(VIEW_SIDES[task.recipe])
    facts: dict[str, Any] = {
        "recipe": task.recipe,
        "engine": task.engine,
        "threads": task.threads,
        "output": task.output,
        "images_per_second": _short(result.rate),
        "decode_images_per_second": None if decode is None else _short(decode.rate),
        "peak_memory_bytes": result.peak.anonymous,
        "decode_share": None if decode is None else _short(ratio(result, decode)),
        "images_per_second_least": _short(min(result.rates)),
        "images_per_second_most": _short(max(result.rates)),
        "images_per_second_by_round": [_short(rate) for rate in result.rates],
        "crops_per_second": _short(views * result.rate),
        "images_per_second_per_core": _short(result.rate / task.threads),
        "cpu_share": _short(result.cpu_share),
        "cpu_share_by_part": {k: _short(v) for k, v in result.cpu_share_by_part.items()},
        "idle_cpu_share": _short(result.idle_cpu_share),
        "peak_shared_memory_bytes": result.peak.shared,
        "peak_mapped_bytes": result.peak.mapped,
        "import_seconds": _short(result.import_seconds),
        "first_batch_seconds": _short(result.first_batch_seconds),
        "batch_size": task.batch_size,
        "notes": result.notes,
    }
    if decode is not None:
        facts["decode_images_per_second_by_round"] = [_short(rate) for rate in decode.rates]
    if one_thread is not None:
        facts["times_one_thread"] = _short(result.rate / one_thread.rate)
    other = find(group, task.engine, "uint8")
    if task.output == "float32" and other is not None:
        facts["uint8_images_per_second"] = _short(other.rate)
    if task.engine in OWN_ENGINES:
        peers = {peer: find(group, peer, task.output) for peer in PEERS}
        facts["times_peer"] = {
            name: _short(ratio(result, peer)) for name, peer in peers.items() if peer is not None
        }
    if result.plan_seconds_per_image is not None and result.plan_share is not None:
        facts["plan_seconds_per_image"] = _short(result.plan_seconds_per_image)
        facts["plan_share"] = _short(result.plan_share)
    if result.interpreter_share is not None:
        facts["interpreter_share"] = _short(result.interpreter_share)
    if task.engine == "dali" and task.output == "float32":
        cost = reader_cost(group)
        if cost is not None:
            facts["external_source_share"] = _short(cost)
    if result.anonymous_by_epoch:
        facts["anonymous_bytes_by_epoch"] = result.anonymous_by_epoch
    refusals = {row.task.engine: row.cannot for row in group if row.cannot}
    if refusals:
        facts["cannot_express"] = refusals
    return facts | context


def context_of(data: dict[str, Any], rounds: int, seconds: float) -> dict[str, Any]:
    """What all lines of a run share: when, where, with what, on what."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds": rounds,
        "seconds_per_round": seconds,
        "machine": machine(),
        "versions": package_versions(PACKAGES),
        "data": data,
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")
