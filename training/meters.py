"""What a run reports: means over the logged interval, its speed, and how long it waited for data.

`Meters` measures on every rank and asks the device for nothing until `take`.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headrace.pipelines.batch import Batch
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
        # Apple's GPUs have no float64.
        self._dtype = torch.float32 if world.device.type == "mps" else torch.float64
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        if state is not None:
            self._counts = dict(state["counts"])
            self._sums = {name: self._scalar(value) for name, value in state["sums"].items()}
        self._seconds_before = 0.0 if state is None else state["seconds"]
        self._started = self._interval_started = time.perf_counter()
        self._restart()

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=self._dtype, device=self._world.device)

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
            addend = value.detach().to(self._dtype)
            self._sums[name] = self._sums[name] + addend if name in self._sums else addend
            self._counts[name] = self._counts.get(name, 0) + 1
        self._steps += 1

    def forget(self, steps: int) -> None:
        """Of the steps that were counted, the last `steps` are to be taken again: the interval's
        means begin anew where there are any."""
        if steps > 0:
            self._sums, self._counts = {}, {}

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
        shares = torch.tensor([self._wait_seconds / wall, idle / wall], dtype=self._dtype)
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
