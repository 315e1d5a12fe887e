"""One row of `bench_methods.py`: a run of training/train.py, judged by training/evaluate.py.

Each stage leaves a file in the run's directory, and a stage whose file is there is not repeated. So
an interrupted row continues: within training at the last checkpoint, after it where it stopped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from headrace import training
from headrace.shards.atomic import atomic_file
from headrace.tools.bench.machine import machine
from headrace.tools.bench.methods.process import Command, Job
from headrace.tools.bench.methods.rows import PIXELS, Row
from headrace.training.build import untrained_encoder
from headrace.training.catalogue import MethodModule, find_method
from headrace.training.command_line import parse_command_line
from headrace.training.config import Config
from headrace.training.data_sets import largest_side_pixels, open_train
from headrace.training.judged_view import judged_pixels
from headrace.training.preset import ConfigError
from headrace.training.run.directory import CONFIG_FILE, ENCODER_FILE
from headrace.training.run.record import read_metrics, read_record

SCRIPTS = Path(training.__file__).parent
TRAINED_FILE = "bench-trained.json"
NEIGHBOURS = 20
SAVE_EVERY_STEPS = 50
TEACHER = "supervised"


@dataclass(frozen=True)
class Bench:
    """What all rows of a session share. arguments: added to every run's command line."""

    data: Path
    subset: Path
    subset_samples: int
    samples: int
    preset: str
    runs: Path
    threads: int
    jobs: int
    arguments: tuple[str, ...] = ()


class JobError(Exception):
    """A stage that did not come to its end: its last words."""


@dataclass(frozen=True)
class Run:
    """A method with a seed. name: of the method, and of its preset where that is another one."""

    bench: Bench
    name: str
    seed: int
    method: MethodModule = field(repr=False)
    config: Config = field(repr=False)

    @property
    def called(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def setting(self) -> str:
        """Of everything that a preset says, and of the images: rows of different ones differ in
        more than their seed."""
        declared = self.config.declaration()
        settings = {
            part: declared[part]
            for part in (
                "backbone",
                "backbone_options",
                "optim",
                "objective",
                "augmentation",
                "test",
            )
        }
        settings["batch_size"] = self.config.data.batch_size
        settings["epochs"] = self.config.run.epochs
        settings["precision"] = self.config.run.precision
        settings["train"] = open_train(self.bench.data).fingerprint
        settings["subset"] = sha256(self.bench.subset.read_bytes()).hexdigest()
        return _hash(settings)

    @property
    def directory(self) -> Path:
        name = self.name.replace(":", "-")
        return self.bench.runs / f"{name}-{self.bench.samples}-{self.setting}-seed{self.seed}"

    @property
    def test_view(self) -> str:
        return _hash(self.config.declaration()["test"])

    @property
    def pixels(self) -> str | None:
        """What the pixels of the test view are called as a baseline; the last digit of a mean or a
        deviation changes nothing. None for a view that enlarges the images."""
        test = self.config.test
        size = judged_pixels(test)
        if size > largest_side_pixels(open_train(self.bench.data)):
            return None
        as_stored = test.mean == (0, 0, 0) and test.std == (1, 1, 1)
        return f"{PIXELS}, {size} px" + (" in [0, 1]" if as_stored else "")

    @property
    def judged_by(self) -> str:
        return self.method.judged_by

    @property
    def teacher_option(self) -> str | None:
        """Where a method learns from a trained classifier and is given none."""
        if self.method.init_is_teacher:
            return "--init" if self.config.init is None else None
        return (
            "--objective.teacher" if getattr(self.config.objective, "teacher", None) == "" else None
        )


def make_run(bench: Bench, name: str, seed: int) -> Run:
    """Raises ConfigError for a method or preset that does not exist, or bad arguments."""
    config = parse_command_line(
        _arguments(bench, name, seed, Path("unnamed")),
        lambda path: largest_side_pixels(open_train(path)),
    )
    return Run(bench, name, seed, find_method(config.method), config)


def _arguments(bench: Bench, name: str, seed: int, out: Path) -> list[str]:
    method, _, preset = name.partition(":")
    options = {
        "method": method,
        "preset": preset or bench.preset,
        "data.train": bench.data,
        "data.subset": bench.subset,
        "data.holdout": 0,  # so that every method sees the same images
        "data.threads": bench.threads,
        "run.epochs": bench.samples / bench.subset_samples,
        "run.seed": seed,
        "run.out": out,
        "run.save-every": SAVE_EVERY_STEPS,
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + [
        *bench.arguments
    ]


def measure(run: Run) -> Job[Row]:
    """Train, judge, judge the untrained encoder; the row, whatever came of it."""
    row: dict[str, Any] = {
        "name": run.name,
        "seed": run.seed,
        "samples": run.bench.samples,
        "status": "done",
        "judged_by": run.judged_by,
        "setting": run.setting,
    }
    try:
        training = yield from _trained(run)
        judged = yield from _judged(run, "trained", [])
        before = yield from _judged(run, "untrained", ["--untrained"], _untrained_file(run))
        metrics = _metrics(read_metrics(run.directory), run.config.data.batch_size)
    except (JobError, ConfigError) as error:
        return {**row, "status": "failed", "error": str(error), **_context(run.bench)}
    except Exception as error:  # whatever a method's code raises, its neighbours go on
        what = f"{type(error).__name__}: {error}"
        return {**row, "status": "failed", "error": what, **_context(run.bench)}
    return {
        **row,
        "untrained": before["top1"],
        "trained": judged["top1"],
        "linear": {"untrained": before["linear"], "trained": judged["linear"]},
        **metrics,
        "peak_memory_bytes": training["peak_memory_bytes"],
        "seconds": {
            "train": metrics["train_seconds"],
            "judge": judged["seconds"],
            "judge_untrained": before["seconds"],
        },
        "method": run.config.method,
        "preset": run.config.preset,
        "backbone": run.config.backbone,
        "batch_size": run.config.data.batch_size,
        "subset_samples": run.bench.subset_samples,
        "arguments": list(run.bench.arguments),
        **_context(run.bench),
        "versions": judged["versions"],
    }


def measure_pixels(bench: Bench, runs: Sequence[Run]) -> Job[Row]:
    """The baseline without a network, in the test view of any of these runs."""
    row = {
        "name": runs[0].pixels,
        "seed": None,
        "samples": 0,
        "status": "done",
        "setting": pixels_setting(bench),
    }
    able = [run for run in runs if (run.directory / CONFIG_FILE).is_file()]
    try:
        if not able:
            raise JobError("it takes the test view of a run, and none has begun")
        judged = yield from _judged(able[0], "pixels", ["--pixels"])
    except JobError as error:
        return {**row, "status": "failed", "error": str(error), **_context(bench)}
    return {
        **row,
        "trained": judged["top1"],
        "linear": judged["linear"],
        "seconds": {"judge": judged["seconds"]},
        **_context(bench),
        "versions": judged["versions"],
    }


def pixels_setting(bench: Bench) -> str:
    """Of a baseline row: the images."""
    return _hash({"train": open_train(bench.data).fingerprint})


def _trained(run: Run) -> Job[dict[str, Any]]:
    """What was noted of the training process once it had finished."""
    noted = run.directory / TRAINED_FILE
    if noted.is_file():
        return json.loads(noted.read_text())
    arguments = _arguments(run.bench, run.name, run.seed, run.directory)
    if run.teacher_option is not None:
        teacher = make_run(replace(run.bench, arguments=()), TEACHER, run.seed)
        try:
            yield from _trained(teacher)
        except JobError as error:
            raise JobError(f"its teacher, {teacher.called}: {error}") from error
        arguments += [run.teacher_option, str(teacher.directory)]
    log = run.directory / "train.log"
    ended = yield Command(
        f"{run.called}: training", SCRIPTS / "train.py", arguments, log, run.bench.threads
    )
    if ended.code != 0 or not (run.directory / ENCODER_FILE).is_file():
        raise JobError(f"training ended with {ended.code}: {ended.said} ({log})")
    process = {"peak_memory_bytes": ended.peak_memory_bytes, "process_seconds": ended.seconds}
    with atomic_file(noted) as file:
        file.write((json.dumps(process) + "\n").encode())
    return process


def _judged(
    run: Run, what: str, options: list[str], out: Path | None = None
) -> Job[dict[str, Any]]:
    """top1 by protocol, all that the linear probe tells, seconds, versions.

    out: where evaluate.py leaves its results, or has left them.
    """
    out, log = out or run.directory / f"judged-{what}.json", run.directory / f"judged-{what}.log"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        arguments = [
            str(run.directory), *options, "--protocol", "knn", "linear", "--k", str(NEIGHBOURS),
            "--threads", str(run.bench.threads), "--json", str(out),
        ]  # fmt: skip
        ended = yield Command(
            f"judging {what}", SCRIPTS / "evaluate.py", arguments, log, run.bench.threads
        )
        if ended.code != 0:
            raise JobError(f"judging the {what} encoder ended with {ended.code}: {ended.said}")
    facts = json.loads(out.read_text())
    linear = facts["linear"]
    return {
        "top1": {
            "knn": facts["results"][str(NEIGHBOURS)]["top1"],
            "linear": linear["accuracy"]["top1"],
        },
        "linear": {
            "top5": linear["accuracy"]["top5"],
            "learning_rate": linear["chosen"]["learning_rate"],
            "at_edge": linear["at_edge"],
        },
        "seconds": round(sum(facts["seconds"].values()), 2),
        "versions": facts["versions"],
    }


def _untrained_file(run: Run) -> Path:
    """Where the results of the untrained encoder are, by what it is: many methods begin with the
    same network and the same weights, and then its results are theirs too.

    Weights alone do not tell two networks apart; what they make of some noise does.
    """
    record, train = read_record(run.directory), open_train(run.bench.data)
    encoder = untrained_encoder(record, train).eval()
    size = judged_pixels(record.test)
    noise = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = [*encoder.state_dict().values(), encoder(noise)]
    digest = sha256(run.test_view.encode() + train.fingerprint.encode())
    for value in values:
        digest.update(value.contiguous().numpy().tobytes())
    return run.bench.runs / "untrained" / f"{digest.hexdigest()[:16]}.json"


def _metrics(logged: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    """Rate and wait share over the steps that were logged, without those of the first line, in
    which kernels are compiled and the first batch is waited for, unless there are no others."""
    lines = [line for line in logged if "images_per_second" in line]
    steps = waited = passed = 0.0
    for before, line in pairwise(lines if len(lines) > 1 else [{"step": 0}, *lines]):
        taken = line["step"] - before["step"]
        seconds = taken * batch_size / line["images_per_second"]
        steps, passed = steps + taken, passed + seconds
        waited += seconds * line["wait_share"]
    return {
        "images_per_second": round(steps * batch_size / passed, 1),
        "wait_share": round(waited / passed, 4),
        "steps": lines[-1]["step"],
        "samples_seen": lines[-1]["step"] * batch_size,
        "loss": lines[-1]["loss"],
        "train_seconds": lines[-1]["seconds"],
    }


def _context(bench: Bench) -> dict[str, Any]:
    return {
        "jobs": bench.jobs,
        "threads": bench.threads,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _hash(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:10]
