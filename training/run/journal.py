"""What a run tells: JSON lines, TensorBoard, a bar on a terminal or plain lines elsewhere."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from typing_extensions import override

from headrace.shards.progress import on_terminal, progress_bar, say
from headrace.training.run.directory import CONFIG_FILE, METRICS_FILE, TENSORBOARD_FOLDER
from headrace.training.world import World

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm


SECONDS_BETWEEN_KEPT_LINES = 300.0


class Journal:
    """The reports of a run. Rank 0 has a `MainJournal`; on other ranks every call does nothing."""

    def say(self, text: str) -> None:
        """A line for people."""

    def advance(self) -> None:
        """One more step is done."""

    def record(self, training: Mapping[str, float], evaluated: Mapping[str, float]) -> None:
        """A line of metrics.jsonl: "step", "epoch", "loss" and the rest, and what was evaluated."""

    def flush(self) -> None:
        """Make the lines durable: before a checkpoint that comes after them."""


class MainJournal(Journal):
    """Shows and stores. bar: on a terminal; without one every record is a line for people."""

    def __init__(
        self,
        lines: IO[str],
        board: "SummaryWriter",
        bar: "tqdm[Any] | None",
        *,
        start: int,
        total_steps: int,
    ) -> None:
        self._lines, self._board, self._bar = lines, board, bar
        self._start, self._total_steps = start, total_steps
        self._began = self._kept_a_line = time.perf_counter()

    @override
    def say(self, text: str) -> None:
        say(text)

    @override
    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    @override
    def record(self, training: Mapping[str, float], evaluated: Mapping[str, float]) -> None:
        values = {**training, **evaluated}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps(finite) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if name not in ("step", "seconds"):
                self._board.add_scalar(name, value, int(values["step"]))
        self._show(values)
        if evaluated:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in evaluated.items())
            self.say(f"step {values['step']}: {shown}")

    def _show(self, values: Mapping[str, float]) -> None:
        """In the bar, where there is one; as a line where there is none, and now and then, so that
        what was can be looked up above the bar."""
        speed, waited = values["images_per_second"], values["wait_share"]
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.4f}, {speed:.0f} images/s, waiting {waited:.0%}"
            )
            if now - self._kept_a_line < SECONDS_BETWEEN_KEPT_LINES:
                return
        self._kept_a_line = now
        self.say(
            f"step {values['step']}/{self._total_steps}  epoch {values['epoch']:.2f}  "
            f"loss {values['loss']:.4f}  {speed:.1f} images/s  waiting {waited:.1%}  "
            f"{self._left(int(values['step']))} left"
        )

    def _left(self, step: int) -> str:
        per_step = (time.perf_counter() - self._began) / max(1, step - self._start)
        return str(timedelta(seconds=round(per_step * (self._total_steps - step))))

    @override
    def flush(self) -> None:
        os.fsync(self._lines.fileno())
        self._board.flush()


@contextmanager
def open_journal(
    directory: Path, world: World, *, start: int, total_steps: int
) -> Iterator[Journal]:
    """The journal of a run that goes on after step `start`; closed with the context."""
    if not world.is_main:
        yield Journal()
        return
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(directory / TENSORBOARD_FOLDER, purge_step=start + 1)
    if (directory / CONFIG_FILE).is_file():
        text = (directory / CONFIG_FILE).read_text(encoding="utf-8")
        board.add_text(CONFIG_FILE, f"```json\n{text}```", start)
    with (directory / METRICS_FILE).open("a", encoding="utf-8") as lines, board:
        bar = None
        if on_terminal(sys.stderr):
            bar = progress_bar(None, total_steps, done=start, unit="steps")
        try:
            yield MainJournal(lines, board, bar, start=start, total_steps=total_steps)
        finally:
            if bar is not None:
                bar.close()
