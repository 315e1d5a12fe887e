"""Throughput of our engines and of other libraries, on the same images in the same minutes.

    python tools/bench_pipeline.py --data DIR --recipe dino,mae --json OUT.json --plot OUT.png

Every row (an engine, a recipe, a number of threads, a kind of output) is a process of its own that
stays alive and is told to run in rounds: A B C, C B A, ... So a machine that drifts moves all rows
of a recipe alike, and between its rounds a row uses no CPU. Every row ends at the tensors that a
model consumes: float32 [B, 3, H, W], normalised, on the CPU. The ceiling above all of them is
decoding the same files with as many threads, and nothing else.
"""

if __name__ == "__main__":
    from headrace.tools import front

    front.answer(__file__)  # help and mistakes need none of what follows


import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from headrace.shards.atomic import atomic_file
from headrace.shards.cores import usable_cores
from headrace.shards.errors import UserError
from headrace.shards.local import local
from headrace.shards.store import open_store
from headrace.tools.arguments import decimal, png, positive, several, some_of
from headrace.tools.bench.pipeline.data import describe, make_forms, whole_batches
from headrace.tools.bench.pipeline.measure import Rounds, measure
from headrace.tools.bench.pipeline.plot import draw
from headrace.tools.bench.pipeline.report import table, verdicts
from headrace.tools.bench.pipeline.result import Result, context_of, line
from headrace.tools.bench.pipeline.task import (
    DALI_READER,
    DECODE,
    OWN_ENGINES,
    PEERS,
    RECIPES,
    Output,
    Task,
)
from headrace.tools.bench.proc import PROC
from headrace.tools.bench.steps import say

DESCRIPTION = """\
Measure how many images per second our engines and other libraries turn into a model's input.

engines  fused, dali, reference   ours, on the plans of pipelines/recipes
         torchvision              ImageFolder, DataLoader, each recipe as its authors publish it
         dali_native              DALI with its own reader and random operators
         ffcv, webdataset         their plain loaders, where they can express the recipe
recipes  dino, simclr, mae, deit

Beside every result: decoding the same JPEGs alone, per core, CPU share, peak anonymous memory, time
to the first batch. Who cannot run a recipe says why. For mae the dali engine is also measured on
DALI's own reader, which shows what feeding it our bytes costs.
"""
EXAMPLES = """\
examples:
  python tools/sample_data.py photos --out samples/photos
  python tools/make_shards.py samples/photos --out data/photos
  python tools/bench_pipeline.py --data data/photos --json speed.json --plot speed.png
  python tools/bench_pipeline.py --data data/photos --recipe mae --engine fused,torchvision
  python tools/bench_pipeline.py --data data/photos --threads 1,2 --epochs-memory 50 --json all.json
"""


class _Parser(argparse.ArgumentParser):
    """One that complains in one sentence, like everything else here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


class BenchError(UserError):
    """What was asked for cannot be done: which option, and why."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        return _bench(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; recipes that were finished are in --json", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        "bench_pipeline.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    engines = (*OWN_ENGINES, *PEERS)
    add(
        "--data",
        metavar="DIR",
        type=local,
        required=True,
        help="anything that make_shards wrote (of splits, train), .beton, tars or class folders",
    )
    add("--recipe", metavar="A,B", type=some_of(RECIPES), default=[*RECIPES], help="default: all")
    add(
        "--engine",
        metavar="A,B",
        type=some_of(engines),
        default=[name for name in engines if name != "reference"],
        help="default: all but reference",
    )
    add("--json", metavar="FILE", type=local, help="write results, a JSON line per row")
    add("--append", action="store_true", help="keep the lines that --json has already")
    add("--plot", metavar="FILE", type=png, help="draw results as bars, a PNG")
    add(
        "--threads",
        metavar="N,M",
        type=several(positive),
        default=[usable_cores()],
        help="threads, or worker processes, of each row; default: all cores",
    )
    add(
        "--output",
        choices=("float32", "uint8", "both"),
        default="both",
        help="uint8 is what would be sent to a GPU; default: %(default)s",
    )
    add("--rounds", metavar="N", type=positive, default=3, help="default: %(default)s")
    add(
        "--seconds",
        metavar="S",
        type=decimal("a number of seconds above 0", lambda seconds: 0 < seconds < 3600),
        default=3.0,
        help="of a round after its warm-up, a batch per thread at least; default: %(default)s",
    )
    add("--batch-size", metavar="B", type=positive, default=64, help="even; default: %(default)s")
    add(
        "--samples",
        metavar="N",
        type=positive,
        default=4096,
        help="use the first N images at most; default: %(default)s",
    )
    add(
        "--epochs-memory",
        metavar="E",
        type=positive,
        help="also watch the fused engine's anonymous memory over E small epochs",
    )
    add(
        "--scratch",
        metavar="DIR",
        type=local,
        help="put the peers' copies of the images there; default: the temporary directory",
    )
    options = parser.parse_args(arguments)
    options.threads = sorted(set(options.threads))
    if options.batch_size % 2:
        parser.error(f"argument --batch-size: {options.batch_size} is odd; Mixup needs pairs")
    if options.append and options.json is None:
        parser.error("argument --append: it needs --json, the file to append to")
    return options


def _bench(options: argparse.Namespace) -> int:
    if not PROC.joinpath("self/status").exists():
        raise BenchError("memory and CPU time are read from /proc: run this on Linux")
    earlier = earlier_lines(options)
    for path in (options.json, options.plot):
        if path is not None:
            if path.is_dir():
                raise BenchError(f"{path} is a directory; name a file to write")
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.scratch is not None and not options.scratch.is_dir():
        raise BenchError(f"--scratch {options.scratch} is no directory")
    store = open_store(options.data, "train")
    samples = whole_batches(store, options.samples, options.batch_size)
    rounds = Rounds(options.rounds, options.seconds, options.epochs_memory or 0)
    context = context_of(describe(store, samples), rounds.count, rounds.seconds)
    groups: list[list[Result]] = []
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=options.scratch) as scratch:
        directory = Path(scratch)
        engines = {engine for recipe in options.recipe for engine, _ in _rows(options, recipe)}
        forms = make_forms(store, samples, directory, engines, max(options.threads), say)
        plan = [
            [
                Task(
                    engine=engine,
                    recipe=recipe,
                    threads=threads,
                    output=output,
                    batch_size=options.batch_size,
                    store=store.uri,
                    samples=samples,
                    folder=forms.folder,
                    tars=forms.tars,
                    beton=forms.beton,
                )
                for engine, output in _rows(options, recipe)
            ]
            for recipe in options.recipe
            for threads in options.threads
        ]
        steps = rounds.steps(sum(map(len, plan)))
        for tasks in plan:
            groups.append(measure(tasks, rounds, directory, steps))
            write(options, groups, context, earlier)
            print(f"\n{table(groups[-1])}\n", flush=True)
    largest = [group for group in groups if group[0].task.threads == max(options.threads)]
    print("\n".join(["targets, set for 2 cores and photographs of 500 x 375:", *verdicts(largest)]))
    failures = [result.failed for group in groups for result in group if result.failed]
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _rows(options: argparse.Namespace, recipe: str) -> list[tuple[str, Output]]:
    """Which engine makes which output for a recipe; decoding first."""
    outputs: dict[str, tuple[Output, ...]] = {
        "float32": ("float32",),
        "uint8": ("uint8",),
        "both": ("float32", "uint8"),
    }
    rows: list[tuple[str, Output]] = [(DECODE, "uint8")]
    for output in outputs[options.output]:
        for engine in options.engine:
            rows.append((engine, output))
            if (engine, output, recipe) == ("dali", "float32", "mae"):
                rows.append((DALI_READER, output))
    return rows


def earlier_lines(options: argparse.Namespace) -> list[str]:
    """What is in the file that --append names."""
    if not options.append or not options.json.exists():
        return []
    lines = options.json.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(lines, 1):
        try:
            json.loads(text)
        except ValueError as error:
            raise BenchError(
                f"--append: {options.json}, line {number} is no JSON ({error}); name another file"
            ) from error
    return lines


def write(
    options: argparse.Namespace,
    groups: Sequence[Sequence[Result]],
    context: dict[str, Any],
    earlier: Sequence[str],
) -> None:
    """Both files anew, with what is known by now."""
    if options.json is not None:
        results = [result for group in groups for result in group if result.measured]
        alone = {
            (result.task.engine, result.task.recipe, result.task.output): result
            for result in results
            if result.task.threads == 1
        }
        lines = list(earlier)
        for group in groups:
            for result in group:
                task = result.task
                if result.measured and task.engine != DECODE:
                    with_one_thread = alone.get((task.engine, task.recipe, task.output))
                    lines.append(json.dumps(line(result, group, with_one_thread, context)))
        with atomic_file(options.json) as file:
            file.write("".join(text + "\n" for text in lines).encode())
    if options.plot is not None:
        picture = BytesIO()
        draw(groups, context).savefig(picture, format="png", dpi=120)
        with atomic_file(options.plot) as file:
            file.write(picture.getvalue())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: nothing is left behind
    sys.exit(main())
