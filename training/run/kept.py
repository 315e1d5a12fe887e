"""Encoders that a run keeps besides its last one: RUN/kept/step-N and RUN/kept/best.

Each is a directory like a run's, with config.json and the weights, that evaluate.py and --init
take; a checkpoint to go on from is kept of the last step alone.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from headrace.training.preset import require
from headrace.training.run.directory import CONFIG_FILE, write_json
from headrace.training.run.export import TimmConfig, export_all
from headrace.training.world import World

KEPT_FOLDER = "kept"

Exports = Mapping[str, Mapping[str, Tensor]]


class Kept:
    """Decides after each step what is kept, and writes it, on rank 0.

    keep_every: steps, 0 for none. keep_best: a metric by its name, or None. A loss is best where it
    is smallest, everything else where it is largest.
    """

    def __init__(
        self, run: Path, world: World, start: int, *, keep_every: int, keep_best: str | None
    ) -> None:
        self._run, self._world = run, world
        self._every, self._metric = keep_every, keep_best
        self._best = _best_before(run, keep_best, start)

    def due(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Names of what is to be kept of this step: the same on every rank."""
        names = [f"step-{step}"] if self._every and step % self._every == 0 else []
        value = metrics.get(self._metric or "")
        if value is not None and (self._best is None or self._is_better(value, self._best)):
            self._best = value
            names.append("best")
        return names

    def write(self, names: Sequence[str], step: int, exports: Exports, network: TimmConfig) -> None:
        """Replaces each as a whole."""
        if not self._world.is_main:
            return
        recorded = json.loads((self._run / CONFIG_FILE).read_text(encoding="utf-8"))
        recorded["derived"]["kept_step"] = step
        for name in names:
            if name == "best":
                recorded["derived"]["best"] = {"metric": self._metric, "value": self._best}
            directory = self._run / KEPT_FOLDER / name
            partial = directory.with_name(f".{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            export_all(exports, partial, network)
            write_json(partial / CONFIG_FILE, recorded)
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)

    def _is_better(self, value: float, than: float) -> bool:
        return value < than if str(self._metric).endswith("loss") else value > than


def require_metric(metric: str | None, names: Sequence[str]) -> None:
    """Raises ConfigError for a --run.keep-best that no evaluation of this run will give."""
    require(
        metric is None or metric in names,
        f"--run.keep-best {metric}: this run measures "
        + (f"{', '.join(names)}" if names else "nothing; give it --data.val or --data.holdout"),
    )


def _best_before(run: Path, metric: str | None, start: int) -> float | None:
    """The value of what was kept as best before step `start`, by the same metric."""
    try:
        recorded: Any = json.loads((run / KEPT_FOLDER / "best" / CONFIG_FILE).read_text("utf-8"))
        best = recorded["derived"]["best"]
        known = best["metric"] == metric and recorded["derived"]["kept_step"] <= start
        return float(best["value"]) if known else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
