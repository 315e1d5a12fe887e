"""What a run reports: means over the logged interval, its speed, and how long it waited for data.

`Meters` measures on every rank and asks the device for nothing until `take`. `Journal` shows and
stores, on rank 0: JSON lines, TensorBoard, a bar on a terminal or plain lines elsewhere.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from headrace.pipelines.batch import Batch
from headrace.shards.progress import on_terminal, progress_bar
from headrace.training.collectives import mean_over_ranks
from headrace.training.world import World

_SIGNIFICANT_DIGITS = 9
"""Of logged means: a float32's. Sums are float64, so that a resume in the middle of an interval
gives the same digits."""


class Meters:
    """Means of the method's scalars since the last `take`, images/s and wait share of that time.

    wait_share: host time blocked for batches / wall time, the mean over ranks. device_idle_share,
    on CUDA alone: time in which the device had finished its work and no batch was there.
    """

    def __init__(self, world: World, batch_size: int, state: Mapping[str, Any] | None) -> None:
        self._world, self._batch_size = world, batch_size
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        if state is not None:
            self._counts = dict(state["counts"])
            self._sums = {name: self._scalar(value) for name, value in state["sums"].items()}
        self._seconds_before = 0.0 if state is None else state["seconds"]
        self._started = self._interval_started = time.perf_counter()
        self._restart()

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self._world.device)

    def _restart(self) -> None:
        self._interval_started = time.perf_counter()
        self._steps, self._wait_seconds, self._paused_seconds = 0, 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long each took to come counts as waiting."""
        while True:
            before = self._event()
            started = time.perf_counter()
            batch = next(batches)
            self._wait_seconds += time.perf_counter() - started
            after = self._event()
            if before is not None and after is not None:
                self._events.append((before, after))
            yield batch

    def _event(self) -> torch.cuda.Event | None:
        # Its time is that at which the device has finished what was queued before it. The second
        # one lies behind the loader's copy too, so their distance is what the device idled.
        if self._world.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training (saving, evaluation): not part of speed and wait share."""
        started = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - started

    @torch.no_grad()
    def step(self, entries: Iterable[Mapping[str, Tensor]]) -> None:
        """An optimiser step is done. entries: its scalars, each counted as often as it is there;
        the same names on every rank."""
        for name, value in (item for scalars in entries for item in scalars.items()):
            addend = value.detach().double()
            self._sums[name] = self._sums[name] + addend if name in self._sums else addend
            self._counts[name] = self._counts.get(name, 0) + 1
        self._steps += 1

    @property
    def seconds(self) -> float:
        """Since the run began, all its parts together."""
        return self._seconds_before + time.perf_counter() - self._started

    def _settle(self) -> dict[str, float]:
        """Make the sums those of the mean over ranks, and read them. Synchronises."""
        if not self._sums:
            return {}
        names = sorted(self._sums, key=lambda name: (name != "loss", name))
        means = mean_over_ranks(torch.stack([self._sums[name] for name in names]))
        self._sums = dict(zip(names, means.unbind(), strict=True))
        return dict(zip(names, means.tolist(), strict=True))

    def take(self) -> dict[str, float]:
        """The means and speeds since the last `take`. Synchronises; call it on every rank."""
        sums = self._settle()
        record = {
            name: float(f"{total / self._counts[name]:.{_SIGNIFICANT_DIGITS}g}")
            for name, total in sums.items()
        }
        wall = time.perf_counter() - self._interval_started - self._paused_seconds
        idle = sum(before.elapsed_time(after) for before, after in self._events) / 1000
        shares = torch.tensor([self._wait_seconds / wall, idle / wall], dtype=torch.float64)
        waited, idled = mean_over_ranks(shares.to(self._world.device)).tolist()
        record["images_per_second"] = round(self._steps * self._batch_size / wall, 2)
        record["wait_share"] = round(waited, 4)
        if self._world.device.type == "cuda":
            record["device_idle_share"] = round(idled, 4)
        record["seconds"] = round(self.seconds, 3)
        self._sums, self._counts = {}, {}
        self._restart()
        return record

    def state_dict(self) -> dict[str, Any]:
        """The interval so far, to continue it exactly. Synchronises; call it on every rank."""
        sums = self._settle()
        return {"sums": sums, "counts": dict(self._counts), "seconds": self.seconds}


class Journal:
    """Rank 0's reports of one run: a context manager. On other ranks every call does nothing."""

    def __init__(self, directory: Path, world: World, *, start: int, total_steps: int) -> None:
        self._start, self._total_steps = start, total_steps
        self._began = time.perf_counter()
        self._writes = world.is_main
        self._bar: tqdm[Any] | None = None
        if not self._writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._lines = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(directory / "tensorboard", purge_step=start + 1)
        if on_terminal(sys.stderr):
            self._bar = progress_bar(None, total_steps, done=start, unit="steps")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            if self._bar is not None:
                self._bar.close()
            self._board.close()
            self._lines.close()

    def say(self, text: str) -> None:
        """A line for people."""
        if self._writes:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def record(self, training: Mapping[str, float], evaluated: Mapping[str, float]) -> None:
        """A line of metrics.jsonl: "step", "epoch", "loss" and the rest, and what was evaluated."""
        if not self._writes:
            return
        values = {**training, **evaluated}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps(finite) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if name not in ("step", "seconds"):
                self._board.add_scalar(name, value, int(values["step"]))
        speed, waited = values["images_per_second"], values["wait_share"]
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.4f}, {speed:.0f} images/s, waiting {waited:.0%}"
            )
        else:
            self.say(
                f"step {values['step']}/{self._total_steps}  epoch {values['epoch']:.2f}  "
                f"loss {values['loss']:.4f}  {speed:.1f} images/s  waiting {waited:.1%}  "
                f"{self._left(int(values['step']))} left"
            )

        if evaluated:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in evaluated.items())
            self.say(f"step {values['step']}: {shown}")

    def _left(self, step: int) -> str:
        per_step = (time.perf_counter() - self._began) / max(1, step - self._start)
        return str(timedelta(seconds=round(per_step * (self._total_steps - step))))

    def flush(self) -> None:
        """Make the lines durable: before a checkpoint that comes after them."""
        if self._writes:
            os.fsync(self._lines.fileno())
            self._board.flush()
