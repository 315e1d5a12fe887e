"""The quickstart's first and last words: how long it takes here, and what came of it.

python -m headrace.tools.bench.quickstart estimate
python -m headrace.tools.bench.quickstart result RUN --pixels F.json --json ROW.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

from headrace.shards.atomic import atomic_file
from headrace.shards.cores import usable_cores
from headrace.shards.local import local
from headrace.tools.bench.machine import machine
from headrace.training import encoders  # noqa: F401  (registers them with timm)
from headrace.training.methods.simclr import PRESETS
from headrace.training.preset import ConfigError
from headrace.training.run.directory import versions
from headrace.training.run.record import read_metrics, read_record

NEIGHBOURS = "20"
BEGUN = "begun"
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000
BESIDE_THE_NETWORK = 1.3
"""Seconds of training per second of the network's own passes: views, head, loss, optimiser."""
DATA_SECONDS = 40


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        match options.command:
            case "estimate":
                print(estimate(options.epochs))
            case _:
                row = result(options.run, options.pixels)
                print(shown(row))
                if options.json is not None:
                    with atomic_file(options.json) as file:
                        file.write((json.dumps(row) + "\n").encode())
    except (ConfigError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m headrace.tools.bench.quickstart")
    commands = parser.add_subparsers(dest="command", required=True)
    before = commands.add_parser("estimate", help="how long training and judging take here")
    before.add_argument("--epochs", type=float, default=PRESETS["demo"].epochs)
    after = commands.add_parser("result", help="what a run's files say of it")
    after.add_argument("run", type=local, metavar="RUN")
    after.add_argument("--pixels", type=local, required=True, help="kNN of raw pixels, as JSON")
    after.add_argument("--json", type=local, metavar="FILE", help="write the row there")
    return parser.parse_args(arguments)


def estimate(epochs: float) -> str:
    """What will happen and how long it takes on these cores, by a few steps of the network."""
    preset = PRESETS["demo"]
    step_seconds, judged_seconds = measured()
    steps = epochs * (TRAIN_IMAGES // preset.batch_size)
    training = steps * step_seconds * BESIDE_THE_NETWORK
    # Two networks, trained and untrained, and the pixels, which are about as much again.
    judging = 3 * (TRAIN_IMAGES + TEST_IMAGES) * judged_seconds
    lines = [
        f"A small ConvNet learns from CIFAR-10's {TRAIN_IMAGES:,} training images without their "
        f"labels ({epochs:g} epochs of SimCLR);",
        f"then all {TEST_IMAGES:,} test images are classified by their nearest neighbours, beside "
        f"raw pixels and the untrained network.",
        f"A few steps of it, just measured on {_cores()}, say how long: data "
        f"{_minutes(DATA_SECONDS)}, training {_minutes(training)}, judging {_minutes(judging)}.",
    ]
    return "\n".join(lines)


def measured() -> tuple[float, float]:
    """Seconds of a training step of the demo's network, and of one image in judging."""
    preset = PRESETS["demo"]
    options = dict(preset.backbone_options)
    network = timm.create_model(preset.backbone, num_classes=0, **options)
    # nn.Module.to is typed without memory_format alone.
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    view_pixels, test_pixels = (
        recipe.flat_views[0].shape[0] for recipe in (preset.augmentation, preset.test)
    )

    def step() -> None:
        pixels = torch.rand(2 * preset.batch_size, 3, view_pixels, view_pixels)
        network(pixels.contiguous(memory_format=torch.channels_last)).square().mean().backward()

    def judge() -> None:
        with torch.no_grad():
            pixels = torch.rand(preset.batch_size, 3, test_pixels, test_pixels)
            network(pixels.contiguous(memory_format=torch.channels_last))

    return _least(step), _least(judge) / preset.batch_size


def _least(work: Any) -> float:
    """Seconds of the fastest of five times, after one that is not counted."""
    work()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _cores() -> str:
    return "one core" if usable_cores() == 1 else f"{usable_cores()} cores"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def result(run: Path, pixels: Path) -> dict[str, Any]:
    """A row: kNN top-1 in % of pixels, untrained and trained; what training took.

    RUN/training-seconds has a line "user system wall" for each command that trained, after a line
    "begun"; train_cpu_seconds and train_seconds are None where one was interrupted.
    """
    record = read_record(run)
    files = {"pixels": pixels, "untrained": run / "knn-untrained.json", "trained": run / "knn.json"}
    judged = {name: json.loads(path.read_text()) for name, path in files.items()}
    logged = read_metrics(run)
    cpu_seconds, seconds = train_seconds(run / "training-seconds")
    assert record.epoch_steps is not None, "written by this version"
    return {
        "seed": record.seed,
        "method": record.method,
        "preset": record.preset,
        "backbone": record.backbone,
        "epochs": record.total_steps / record.epoch_steps,
        "samples": record.total_steps * record.batch_size,
        "knn": {name: one["results"][NEIGHBOURS]["top1"] for name, one in judged.items()},
        "train_cpu_seconds": cpu_seconds,
        "train_seconds": seconds,
        "images_per_second": statistics.median(line["images_per_second"] for line in logged),
        "judge_seconds": {name: sum(one["seconds"].values()) for name, one in judged.items()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(record.engine),
    }


def train_seconds(path: Path) -> tuple[float | None, float | None]:
    """(CPU seconds, wall seconds) of all commands that trained; None where one did not end."""
    lines = path.read_text().split("\n") if path.is_file() else []
    ended = [
        [float(number) for number in line.split()] for line in lines if line not in ("", BEGUN)
    ]
    if not ended or len(ended) != lines.count(BEGUN):
        return None, None
    return (
        round(sum(user + system for user, system, _ in ended), 1),
        round(sum(wall for *_, wall in ended), 1),
    )


def shown(row: dict[str, Any]) -> str:
    """For people."""
    knn = row["knn"]
    took = (
        f"{row['samples']:,} samples"
        if row["train_cpu_seconds"] is None
        else f"{row['samples']:,} samples, {row['train_cpu_seconds']:.0f} CPU seconds"
    )
    return (
        f"kNN (k = {NEIGHBOURS}) of {TEST_IMAGES:,} test images:\n"
        f"  {knn['pixels']:5.1f} %  raw pixels\n"
        f"  {knn['untrained']:5.1f} %  the network before training\n"
        f"  {knn['trained']:5.1f} %  after it: {took}, no label"
    )


if __name__ == "__main__":
    sys.exit(main())
