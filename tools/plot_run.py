"""Curves of a run in one picture: loss, accuracy, images per second and the share of waiting.

    python tools/plot_run.py RUN [--out FILE.png] [--knn FILE.json ...]

Reads RUN/metrics.jsonl and what `training/evaluate.py --json` wrote, by default RUN/knn*.json. May
be called while the run is going on.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from headrace.shards.atomic import atomic_file
from headrace.shards.errors import UserError
from headrace.shards.local import local
from headrace.training.preset import ConfigError
from headrace.training.run.record import Record, read_metrics, read_record

BLUE, GREEN, ORANGE, RED = "#2166ac", "#1b7837", "#d6730c", "#b2182b"
SMOOTHED_FROM = 60  # logged steps; with fewer the line itself is readable


@dataclass(frozen=True)
class Judgement:
    """One result of kNN: top-1 in percent by k, of the encoder as it was after `step` steps."""

    step: int
    top1: dict[int, float]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Draw the curves of a run: loss, accuracies, images/s, time spent waiting.",
        epilog="""examples:
  python tools/plot_run.py runs/dino
  python tools/plot_run.py runs/dino --knn early.json late.json --out curves.png""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=local, help="the run's directory")
    parser.add_argument("--out", type=local, help="the PNG file; by default RUN/curves.png")
    parser.add_argument(
        "--knn",
        type=local,
        nargs="*",
        help="evaluate.py's results; by default RUN/knn*.json",
    )
    options = parser.parse_args(arguments)
    out: Path = options.out or options.run / "curves.png"
    try:
        record = read_record(options.run)
        metrics = read_metrics(options.run)
        last_step = int(metrics[-1]["step"])
        files = sorted(options.run.glob("knn*.json")) if options.knn is None else options.knn
        judgements = sorted(
            (read_judgement(file, last_step) for file in files), key=lambda one: one.step
        )
        figure = draw(record, metrics, judgements)
        encoded = BytesIO()
        figure.savefig(encoded, format="png", dpi=120)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as file:
            file.write(encoded.getvalue())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {out} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{out}: {len(metrics)} logged steps, {len(judgements)} kNN results")
    return 0


def read_judgement(path: Path, last_step: int) -> Judgement:
    """One file of evaluate.py; without a step of its own it stands at the run's last one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        step = result.get("step")
        return Judgement(
            step=last_step if step is None else int(step),
            top1={int(k): float(entry["top1"]) for k, entry in result["results"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no result of evaluate.py --protocol knn: {error}") from error


def draw(
    record: Record, metrics: Sequence[dict[str, Any]], judgements: Sequence[Judgement]
) -> Figure:
    """Four panels over the same steps."""
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(12, 7.5), layout=layout)
    panels = figure.subplots(2, 2, sharex=True)
    images = "unknown data" if record.train is None else "/".join(record.train.parts[-2:])
    figure.suptitle(f"{record.method} · {record.backbone} · {images}", fontsize=15)
    (loss, accuracy), (speed, waiting) = panels

    _curve(loss, metrics, "loss", BLUE)
    loss.set_title("loss", loc="left")
    _accuracies(accuracy, metrics, judgements)
    accuracy.set_title("accuracy, top-1 in %", loc="left")
    _curve(speed, metrics, "images_per_second", GREEN)
    speed.set_title("images per second", loc="left")
    speed.set_ylim(0, 1.15 * speed.dataLim.ymax if speed.lines else 1)
    _curve(waiting, metrics, "wait_share", ORANGE, scale=100)
    waiting.set_title("time spent waiting for data, in %", loc="left")
    waiting.set_ylim(0, 100)
    for panel in panels.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    last = metrics[-1]
    epochs = f" ({last['epoch']:.3g} epochs)" if "epoch" in last else ""
    for panel in panels[1]:
        panel.set_xlabel(f"step, up to {int(last['step']):,}{epochs}")
        panel.set_xlim(left=0)
    return figure


def _points(
    metrics: Sequence[dict[str, Any]], name: str, scale: float = 1
) -> tuple[list[int], list[float]]:
    """(steps, values) where the metric is there; nan, a gap, where it was not finite."""
    present = [record for record in metrics if name in record]
    values = [math.nan if r[name] is None else scale * float(r[name]) for r in present]
    return [int(record["step"]) for record in present], values


def _curve(
    panel: Axes, metrics: Sequence[dict[str, Any]], name: str, colour: str, scale: float = 1
) -> None:
    """The metric; long ones are shown faintly behind their running median."""
    steps, values = _points(metrics, name, scale)
    if not steps:
        _say(panel, f"metrics.jsonl has no {name}")
        return
    if len(steps) < SMOOTHED_FROM:
        panel.plot(steps, values, color=colour, marker=".", linewidth=1.6)
        return
    panel.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    panel.plot(steps, _running_median(values), color=colour, linewidth=1.8)


def _running_median(values: Sequence[float]) -> list[float]:
    half = max(2, len(values) // 100)
    medians = []
    for centre in range(len(values)):
        window = values[max(0, centre - half) : centre + half + 1]
        finite = sorted(value for value in window if not math.isnan(value))
        medians.append(finite[len(finite) // 2] if finite else math.nan)
    return medians


def _accuracies(
    panel: Axes, metrics: Sequence[dict[str, Any]], judgements: Sequence[Judgement]
) -> None:
    """kNN by k, and whatever top-1 the method itself measured on held-out images."""
    by_k: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for judgement in judgements:
        for k, top1 in judgement.top1.items():
            by_k[k].append((judgement.step, top1))
    shades = matplotlib.colormaps["viridis"].resampled(len(by_k) + 1)
    for number, (k, points) in enumerate(sorted(by_k.items())):
        steps = [step for step, _ in points]
        values = [top1 for _, top1 in points]
        gained = f"{values[0]:.1f} to " if len(values) > 1 else ""
        panel.plot(
            steps,
            values,
            marker="o",
            linestyle=":",  # between two judgements nobody looked
            linewidth=1.2,
            clip_on=False,
            color=shades(number),
            label=f"kNN, k = {k}: {gained}{values[-1]:.1f}",
        )
    names = {name for record in metrics for name in record if name.endswith("top1")}
    for name, colour in zip(sorted(names), (RED, ORANGE, BLUE), strict=False):
        steps, values = _points(metrics, name, scale=100)
        panel.plot(steps, values, marker=".", color=colour, label=f"{name}: {values[-1]:.1f}")
    if by_k or names:
        panel.legend(frameon=False, fontsize=9)
    else:
        _say(panel, "not judged yet:\ntraining/evaluate.py RUN --json RUN/knn.json")


def _say(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, ha="center", va="center", transform=panel.transAxes, color="#777777")


if __name__ == "__main__":
    sys.exit(main())
