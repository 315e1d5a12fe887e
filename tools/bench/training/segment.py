"""Starts of `training/train.py` for `bench_training.py`: some seconds of a run, and its numbers.

The process itself is watched from outside: metrics.jsonl says how fast it trains and how long it
waits, /proc how busy its cores are and how much it has to fetch from storage.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from headrace import training
from headrace.shards.cores import usable_cores
from headrace.shards.errors import UserError
from headrace.shards.lifetime import end_with_parent
from headrace.training.config import Config
from headrace.training.run.directory import METRICS_FILE

TRAIN = Path(training.__file__).parent / "train.py"
POLL_SECONDS = 0.3
BUSY = 0.85  # share of the cores' time from which on they leave none over


class BenchError(UserError):
    """A measurement that cannot be made: what went wrong, and what to do."""


class Segment(NamedTuple):
    """One start of the run, without its first steps. Shares of time are in [0, 1].

    wait_share, idle_share: as in metrics.jsonl, the latter on CUDA. busy_share: of the time of the
    usable cores, whoever used them. fetched_bytes: from storage, not from the page cache. None
    where the system does not count.
    """

    images: int
    seconds: float
    wait_share: float
    idle_share: float | None
    busy_share: float | None
    fetched_bytes: int | None

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    @property
    def input_share(self) -> float:
        """Of the time, what was lost for want of a batch: on CUDA the device's time counts."""
        return self.wait_share if self.idle_share is None else self.idle_share

    @property
    def is_busy(self) -> bool:
        """Whether the cores had no time over; assumed where nobody counts."""
        return self.busy_share is None or self.busy_share >= BUSY

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"images_per_second": self.rate, **self._asdict()}


def settling_steps(config: Config) -> int:
    """The first steps, which are not measured: they compile, and find batches that are ready."""
    return config.data.prefetch + 3


def run_segment(
    arguments: Sequence[str], config: Config, engine: str, out: Path, seconds: float
) -> Segment:
    """Train in a process of its own until enough steps are measured, then end it."""
    # On a CPU a line of metrics.jsonl for every step costs nothing; a GPU's host would wait for it.
    log_every = config.run.log_every if device_of(config).type == "cuda" else 1
    options = {"run.out": out, "data.engine": engine, "run.log-every": log_every}
    options |= {"run.evaluate-every": 0, "run.save-every": 10**9}
    added = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    with out.with_suffix(".log").open("w+", encoding="utf-8") as log:
        child = subprocess.Popen(
            [sys.executable, str(TRAIN), *arguments, *added],
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,
        )
        try:
            segment = _watch(child, config, out / METRICS_FILE, seconds)
        finally:
            child.kill()
            child.wait()
        if segment is None:
            log.seek(0)
            text = ["it said nothing", *filter(str.strip, log)]
            reason = text[-1].strip().removeprefix("error: ")
            raise BenchError(f"the run with {engine} data ended before it was measured: {reason}")
    return segment


def _watch(
    child: "subprocess.Popen[bytes]", config: Config, metrics: Path, seconds: float
) -> Segment | None:
    """None if the process ended before it had made enough steps."""
    settling = settling_steps(config)
    images = read = step = 0
    passed = waited = idled = 0.0
    begin: _Usage | None = None
    while True:
        ended = child.poll() is not None  # before reading: what it said last counts
        text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
        lines = text[read : text.rfind("\n") + 1]
        read += len(lines)
        for line in map(json.loads, lines.splitlines()):
            before, step = step, line["step"]
            if before >= settling:
                images += (step - before) * config.data.batch_size
                took = (step - before) * config.data.batch_size / line["images_per_second"]
                passed += took
                waited += took * line["wait_share"]
                idled += took * line.get("device_idle_share", 0.0)
        if begin is None and step >= settling:
            begin = _usage(child.pid)
        enough = images >= settling * config.data.batch_size and (passed >= seconds or ended)
        if begin is not None and enough:
            idle = idled / passed if device_of(config).type == "cuda" else None
            return Segment(images, passed, waited / passed, idle, *_usage(child.pid).since(begin))
        if ended:
            return None
        time.sleep(POLL_SECONDS)


class _Usage(NamedTuple):
    """Up to now, of the usable cores and of a process; None where the system does not count."""

    now: float
    idle_seconds: float | None
    fetched_bytes: int | None

    def since(self, begin: "_Usage") -> tuple[float | None, int | None]:
        """(busy_share, fetched_bytes) of a Segment since `begin`."""
        busy = fetched = None
        if self.idle_seconds is not None and begin.idle_seconds is not None:
            idle = self.idle_seconds - begin.idle_seconds
            busy = 1 - idle / (self.now - begin.now) / usable_cores()
        if self.fetched_bytes is not None and begin.fetched_bytes is not None:
            fetched = self.fetched_bytes - begin.fetched_bytes
        return busy, fetched


def _usage(process: int) -> _Usage:
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return _Usage(time.perf_counter(), None, None)
    times = [line.split() for line in lines if line.partition(" ")[0] in ours]
    ticks = sum(int(core[4]) + int(core[5]) for core in times)  # idle, and idle while it reads
    seconds = ticks / os.sysconf("SC_CLK_TCK")
    return _Usage(time.perf_counter(), seconds, fetched_bytes(process))


def fetched_bytes(process: int | Literal["self"]) -> int | None:
    """Bytes that a process got from storage and not from the page cache; None if nobody counts."""
    try:
        text = Path(f"/proc/{process}/io").read_text()
    except OSError:
        return None
    return int(text.partition("\nread_bytes: ")[2].partition("\n")[0])


def device_of(config: Config) -> torch.device:
    """What the run trains on."""
    cuda = config.run.device == "cuda" or torch.cuda.is_available()
    return torch.device("cuda", 0) if cuda and config.run.device != "cpu" else torch.device("cpu")
