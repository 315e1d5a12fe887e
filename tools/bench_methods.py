"""Does every method learn? Each trained from scratch under one equal, small budget, and judged.

    python tools/bench_methods.py --jobs 2
    python tools/bench_methods.py --methods simclr,dino --seeds 0
    python tools/bench_methods.py --table

Every method of training/methods trains with its CIFAR preset on the same images for the same number
of samples seen, from several seeds, and its encoder is judged by kNN and by a linear probe on the
whole data set, beside the encoder as it was before training and beside raw pixels. Which of the two
metrics decides is fixed in the method's file (JUDGED_BY). Rows are appended to a JSON-lines file,
and those that are there are not measured again: a table is made in pieces.
"""

if __name__ == "__main__":
    from headrace.tools import front

    front.answer(__file__)  # help and mistakes need none of what follows


import argparse
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from headrace.shards.atomic import atomic_file
from headrace.shards.cores import usable_cores
from headrace.shards.errors import UserError
from headrace.shards.local import local
from headrace.shards.store import split_names
from headrace.tools.arguments import positive, several, whole
from headrace.tools.bench.methods.job import (
    TEACHER,
    Bench,
    make_run,
    measure,
    measure_pixels,
    pixels_setting,
)
from headrace.tools.bench.methods.process import Command, Job, run_jobs
from headrace.tools.bench.methods.rows import (
    Row,
    RowsError,
    append_row,
    key,
    latest,
    plain,
    read_rows,
    table,
)
from headrace.training.catalogue import method_names
from headrace.training.data_sets import open_train
from headrace.training.preset import ConfigError

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "tools/benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        if options.table:
            rows = read_rows(options.json)
            if not rows:
                raise RowsError(f"{options.json} holds no rows yet")
            print(plain(table(rows)))
            return 0
        return _measure_all(options, options.added)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """added: what follows --, the options that every run gets."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    place = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [-- options of training/train.py]",
        description="Train every method on a part of CIFAR-10 under one equal budget and judge its "
        "encoder beside the untrained one. Rows that were measured are skipped; what was "
        "interrupted continues.",
        epilog="""What follows -- is given to every run: to try other hyper-parameters.

examples:
  python tools/bench_methods.py --jobs 2
  python tools/bench_methods.py --methods simclr,moco,supervised:deit_cifar --seeds 0
  python tools/bench_methods.py --methods dino --seeds 0 --json x.jsonl -- --optim.learning-rate 1
  python tools/bench_methods.py --table""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods",
        type=several(str),
        metavar="A,B",
        help="names, or name:preset; default: every file of training/methods",
    )
    parser.add_argument("--seeds", type=several(whole(0)), default=[0, 1, 2], metavar="N,N")
    parser.add_argument(
        "--samples", type=positive, default=50_000, help="seen in training; default: 50000"
    )
    parser.add_argument(
        "--subset",
        type=positive,
        default=10_000,
        help="images to train on, evenly spaced; default: 10000",
    )
    parser.add_argument("--preset", default="cifar", help="of every method; default: cifar")
    parser.add_argument(
        "--data", type=local, default=ROOT / "data/cifar10", help="default: data/cifar10"
    )
    parser.add_argument(
        "--runs", type=local, default=ROOT / "runs/methods", help="default: runs/methods"
    )
    parser.add_argument(
        "--json",
        type=local,
        default=_default_file(),
        metavar="FILE",
        help="rows; default: the newest tools/benchmarks/*-methods.jsonl, else one of today",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        help="runs side by side, each with its share of the cores; images/s are then those of one "
        "of them; default: 1",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        help="of each run; default: the usable cores divided by --jobs. More than there are free "
        "cores slow each other down",
    )
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    options = parser.parse_args(given[:place])
    options.added = tuple(given[place + 1 :])
    return options


def _default_file() -> Path:
    today = BENCHMARKS / f"{datetime.now(UTC):%Y-%m-%d}-methods.jsonl"
    return max(BENCHMARKS.glob("*-methods.jsonl"), default=today)


def _measure_all(options: argparse.Namespace, added: tuple[str, ...]) -> int:
    bench = _bench(options, added)
    rows = read_rows(options.json)
    runs = [
        make_run(bench, name, seed)
        for seed in options.seeds
        for name in options.methods or method_names()
    ]
    done = {(key(row), row["setting"]) for row in latest(rows) if row["status"] == "done"}

    jobs: dict[str, Callable[[], Job[Row]]] = {}
    waits: dict[str, list[str]] = {}
    for run in runs:
        here = (run.name, run.seed, bench.samples)
        if options.again:
            shutil.rmtree(run.directory, ignore_errors=True)
        elif (here, run.setting) in done:
            continue
        jobs[run.called] = partial(measure, run)
        if run.teacher_option is not None:
            # Whoever comes first trains the teacher, if its own row has not.
            pupils = [
                pupil.called for pupil in runs if pupil.teacher_option and pupil.seed == run.seed
            ]
            before = pupils[: pupils.index(run.called)]
            waits[run.called] = [f"{TEACHER}, seed {run.seed}", *before]
    for pixels in dict.fromkeys(run.pixels for run in runs if run.pixels is not None):
        if options.again or ((pixels, None, 0), pixels_setting(bench)) not in done:
            same = [run for run in runs if run.pixels == pixels]
            jobs[pixels] = partial(measure_pixels, bench, same)
            waits[pixels] = [run.called for run in same]
    print(f"{len(jobs)} rows to measure, {len(runs)} asked for; {options.json}", flush=True)

    report = _Report(len(jobs), bench.jobs, options.json)
    run_jobs(jobs, waits, bench.jobs, report.begun, report.finished)
    print(plain(table(read_rows(options.json))))
    return 1 if report.failures else 0


def _bench(options: argparse.Namespace, added: tuple[str, ...]) -> Bench:
    data = options.data.expanduser().absolute()
    if not {"train", "test"} <= set(split_names(data)):
        raise ConfigError(
            f"--data {options.data} has no train and test split. CIFAR-10 comes with `bash "
            f"tools/quickstart.sh`, or with `python tools/sample_data.py cifar10 --out "
            f"samples/cifar10` and `python tools/make_shards.py samples/cifar10 --out "
            f"data/cifar10`"
        )
    images = len(open_train(data))
    if options.subset > images:
        raise ConfigError(f"--subset {options.subset}: {data} has only {images} training images")
    runs = options.runs.expanduser().absolute()
    runs.mkdir(parents=True, exist_ok=True)
    ids = np.arange(options.subset) * (images // options.subset)
    subset = runs / f"subset-{options.subset}-of-{images}.txt"
    with atomic_file(subset) as file:
        file.write("".join(f"{number}\n" for number in ids).encode())
    return Bench(
        data=data,
        subset=subset,
        subset_samples=options.subset,
        samples=options.samples,
        preset=options.preset,
        runs=runs,
        threads=options.threads or max(1, usable_cores() // options.jobs),
        jobs=options.jobs,
        arguments=added,
    )


class _Report:
    """Says what is done, appends finished rows, and guesses how long the rest may take."""

    def __init__(self, total: int, jobs: int, path: Path) -> None:
        self._total, self._jobs, self._path = total, jobs, path
        self._done, self._began = 0, time.perf_counter()
        self.failures = 0

    def begun(self, name: str, command: Command) -> None:
        print(f"    {name}: {command.called.removeprefix(f'{name}: ')}", flush=True)

    def finished(self, name: str, row: Row) -> None:
        append_row(self._path, row)
        self._done += 1
        self.failures += row["status"] == "failed"
        passed = time.perf_counter() - self._began
        left = timedelta(seconds=round(passed / self._done * (self._total - self._done)))
        print(f"[{self._done}/{self._total}] {name}: {_said(row)}; about {left} left", flush=True)


def _said(row: Row) -> str:
    if row["status"] != "done":
        return f"{row['status']}: {row['error']}"
    before, after = row.get("untrained"), row["trained"]
    if before is None:
        return f"kNN {after['knn']:.1f}, linear {after['linear']:.1f}"
    memory = row["peak_memory_bytes"]
    return (
        f"kNN {before['knn']:.1f} -> {after['knn']:.1f}, linear {before['linear']:.1f} -> "
        f"{after['linear']:.1f}; {row['images_per_second']:,.0f} images/s, "
        f"{row['seconds']['train']:.0f} s of training"
        + ("" if memory is None else f", {memory / 1e6:,.0f} MB")
    )


def _end(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    sys.exit(main())
