"""Judge a run's encoder: how well do its frozen features tell classes apart?

    python training/evaluate.py RUN --protocol knn linear --data.train DIR --data.val DIR --json F
    torchrun --standalone --nproc-per-node 8 training/evaluate.py RUN

Images go once through the run's own engine and the test view of its recipe, a fixed view without
augmentation, and every protocol takes these features. `--untrained` judges the same network with
the weights that the run began with: what it had before it learnt anything. `--pixels` judges the
view itself.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from torch import nn

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.engines import choose
from headrace.shards.atomic import atomic_file
from headrace.shards.cores import threads_per_rank, usable_cores
from headrace.shards.store import Store, dataset_splits, find_dataset
from headrace.training.build import trained_encoder, untrained_encoder
from headrace.training.config import parse_approximations
from headrace.training.ending import run_and_exit
from headrace.training.features import Features, extract
from headrace.training.inputs import open_train, open_val
from headrace.training.invocation import as_typed
from headrace.training.preset import ConfigError
from headrace.training.protocols.knn import (
    NEIGHBOURS,
    TEMPERATURE,
    KnnError,
    KnnResult,
    knn_accuracy,
)
from headrace.training.protocols.linear import LinearError, LinearResult, Sweep, linear_accuracy
from headrace.training.run.directory import versions
from headrace.training.run.record import Record, read_record
from headrace.training.world import World, join


@dataclass(frozen=True)
class Results:
    """By protocol, None for what was not asked for. seconds: of each part."""

    knn: KnnResult | None
    linear: LinearResult | None
    seconds: Mapping[str, float]


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    started = time.perf_counter()
    record = read_record(options.run)
    train, val = _open_data(record, options)
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"--json {options.json}: there is no directory {options.json.parent}")
    # Built where there are no other ranks, which judging has its own number of.
    encoder = _encoder(record, train, options)
    with join(options.device) as world:
        approximate = _approximate(record, options)
        engine = choose(options.engine or record.engine, record.test, world.device, approximate)
        encoder = encoder.to(world.device)
        if world.is_main:
            print(f"{_what(record, options)}; {engine} engine, {world.size} x {world.device.type}")
        results = _judge(encoder, record, train, val, engine, options, world)
        if not world.is_main:
            return 0
        if results.knn is not None:
            print(_shown_knn(results.knn))
        if results.linear is not None:
            print(_shown_linear(results.linear))
        print(f"{time.perf_counter() - started:.0f} s")
        if options.json is not None:
            facts = _facts(record, train, val, engine, results, options, world)
            with atomic_file(options.json) as file:
                file.write((json.dumps(facts, indent=2) + "\n").encode())
            print(f"wrote {options.json}")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    sweep = Sweep()
    parser = argparse.ArgumentParser(
        prog=as_typed("training/evaluate.py"),
        description="Judge a run's encoder by its frozen features of the recipe's test view, a "
        "fixed view without augmentation: by the classes of an image's nearest neighbours, or by a "
        "linear classifier.",
        epilog=as_typed("""examples:
  python training/evaluate.py runs/dino
  python training/evaluate.py runs/dino --untrained --k 20 --json untrained.json
  python training/evaluate.py runs/mae --protocol knn linear --linear.learning-rates 0.01 0.1 1
  torchrun --standalone --nproc-per-node 8 training/evaluate.py runs/dino --data.val data/imagenet
"""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    parser.add_argument(
        "--protocol",
        choices=["knn", "linear"],
        nargs="+",
        default=["knn"],
        help="knn: weighted kNN as in DINO. linear: logistic regression on standardised features, "
        "a sweep of learning rates in one pass, the rate chosen on a tenth of the training set, "
        "the accuracy that of the whole of it. Both share the features. Default: knn",
    )
    parser.add_argument(
        "--data.train",
        dest="train",
        type=Path,
        metavar="DIR",
        help="what the classes are learnt from; of a root with splits, train. Default: the run's",
    )
    parser.add_argument(
        "--data.val",
        dest="val",
        type=Path,
        metavar="DIR",
        help="these are judged; of a root with splits, val, else test. Default: the run's",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    judged = parser.add_mutually_exclusive_group()
    judged.add_argument(
        "--untrained", action="store_true", help="judge the weights that the run began with"
    )
    judged.add_argument(
        "--pixels", action="store_true", help="judge the pixels of the test view, without a network"
    )
    parser.add_argument(
        "--k",
        type=_positive,
        nargs="+",
        default=list(NEIGHBOURS),
        help="knn: numbers of neighbours; default: %(default)s",
    )
    for option, kind, default, what in (
        ("learning-rates", _positive_number, sweep.learning_rates, "peaks, not scaled"),
        ("weight-decays", _number, sweep.weight_decays, "each with every learning rate"),
    ):
        parser.add_argument(
            f"--linear.{option}",
            dest=option.replace("-", "_"),
            type=kind,
            nargs="+",
            default=list(default),
            metavar="NUMBER",
            help=f"linear: {what}; default: {' '.join(map(str, default))}",
        )
    for option, default, what in (
        ("epochs", sweep.epochs, "passes over the features"),
        ("batch-size", sweep.batch_size, "samples per step over all processes"),
    ):
        parser.add_argument(
            f"--linear.{option}",
            dest=f"linear_{option.replace('-', '_')}",
            type=_positive,
            default=default,
            metavar="NUMBER",
            help=f"linear: {what}; default: {default}",
        )
    parser.add_argument(
        "--batch-size", type=_positive, default=256, help="images per process and step"
    )
    parser.add_argument("--engine", help="auto, or an engine by name; default: the run's")
    parser.add_argument(
        "--data.approximate",
        dest="approximate",
        metavar="NAMES",
        help="what the engine may do differently, separated by commas; default: the run's",
    )
    parser.add_argument("--threads", type=_positive, help="of the engine, per process")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--run.device", dest="device", choices=["auto", "cpu", "cuda"], default="auto"
    )
    return parser.parse_args(arguments)


def _approximate(record: Record, options: argparse.Namespace) -> tuple[Approximation, ...]:
    """Raises ConfigError for what names no approximation."""
    if options.approximate is None:
        return record.approximate
    return parse_approximations([options.approximate])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 upwards")
    return value


def _positive_number(text: str) -> float:
    if (value := _number(text)) == 0:
        raise argparse.ArgumentTypeError("0 would change nothing")
    return value


def _open_data(record: Record, options: argparse.Namespace) -> tuple[Store, Store]:
    """(train, val), both labelled alike. Raises ConfigError or ShardError."""
    train = open_train(options.train or record.train)
    val = open_val(options.val or record.val or _beside(options.train or record.train))
    for option, store in (("--data.train", train), ("--data.val", val)):
        missing = int((store.labels(np.arange(len(store))) < 0).sum())
        if missing:
            raise ConfigError(
                f"{option}: {missing:,} of the {len(store):,} images of {store.uri} have no label, "
                f"and judging needs the class of each (one folder per class, for instance)"
            )
    if train.classes and val.classes and train.classes != val.classes:
        raise ConfigError(
            f"{train.uri} and {val.uri} have different classes ({len(train.classes)} and "
            f"{len(val.classes)}, or other names or another order): their labels cannot be compared"
        )
    return train, val


def _beside(train: Path | None) -> Path:
    """The root with a val or test split that a training set belongs to."""
    train = find_dataset() if train is None else train
    for root in (train, train.absolute().parent):
        if {"val", "test"}.intersection(dataset_splits(root)):
            return root
    raise ConfigError(f"--data.val is missing: {train} has no val or test split")


def _encoder(record: Record, train: Store, options: argparse.Namespace) -> nn.Module:
    """[B, 3, H, W] -> [B, D]."""
    if options.pixels:
        return nn.Flatten()
    return (untrained_encoder if options.untrained else trained_encoder)(record, train)


def _judge(
    encoder: nn.Module,
    record: Record,
    train: Store,
    val: Store,
    engine: str,
    options: argparse.Namespace,
    world: World,
) -> Results:
    def features_of(store: Store, name: str) -> Features:
        return extract(
            encoder,
            store,
            record.test,
            batch_size=options.batch_size,
            engine=engine,
            world=world,
            threads=options.threads or threads_per_rank(usable_cores(), world.local_size),
            precision=options.precision,
            progress=name,
            approximate=_approximate(record, options),
        )

    names, ticks = [], [time.perf_counter()]

    def done(name: str) -> None:
        names.append(name)
        ticks.append(time.perf_counter())

    train_features = features_of(train, "features of train")
    done("train_features")
    val_features = features_of(val, "features of val")
    done("val_features")
    knn = linear = None
    try:
        if "knn" in options.protocol:
            knn = knn_accuracy(train_features, val_features, world, ks=options.k, progress=True)
            done("knn")
        if "linear" in options.protocol:
            sweep = Sweep(
                tuple(options.learning_rates),
                tuple(options.weight_decays),
                options.linear_epochs,
                options.linear_batch_size,
            )
            linear = linear_accuracy(
                train_features, val_features, world, sweep=sweep, progress=True
            )
            done("linear")
    except (KnnError, LinearError) as error:
        raise ConfigError(f"{error} (train: {train.uri}, val: {val.uri})") from error
    seconds = [round(after - before, 2) for before, after in pairwise(ticks)]
    return Results(knn, linear, dict(zip(names, seconds, strict=True)))


def _what(record: Record, options: argparse.Namespace) -> str:
    named = f"{record.directory}: {record.method}, {record.backbone}"
    if options.pixels:
        return f"{record.directory}: the pixels of {record.method}'s test view"
    if options.untrained:
        return f"{named}, untrained"
    return named if record.step is None else f"{named}, after {record.step:,} steps"


def _shown_knn(result: KnnResult) -> str:
    lines = [
        f"kNN of {result.test_samples:,} images among {result.train_samples:,} in "
        f"{result.classes} classes",
        "      k    top-1    top-5",
    ]
    for k, accuracy in result.accuracies.items():
        lines.append(f"  {k:>5}  {accuracy.top1:5.2f} %  {accuracy.top5:5.2f} %")
    lines += [
        f"  k = {k} is left out: there are only {result.train_samples} training images"
        for k in result.skipped
    ]
    return "\n".join(lines)


def _shown_linear(result: LinearResult) -> str:
    chosen = result.chosen
    lines = [
        f"linear probe of {result.test_samples:,} images, trained on {result.train_samples:,} in "
        f"{result.classes} classes: top-1 {result.accuracy.top1:.2f} %, top-5 "
        f"{result.accuracy.top5:.2f} %",
        f"  learning rate  weight decay  top-1 of {result.held_out_samples:,} held-out images",
    ]
    for one in result.tried:
        mark = "  chosen" if one == chosen else ""
        lines.append(
            f"  {one.learning_rate:>13g}  {one.weight_decay:>12g}  {one.held_out_top1:5.2f} %{mark}"
        )
    if result.at_edge is not None:
        lines.append(
            f"  the {result.at_edge} learning rate was the best: there may be better ones beyond, "
            f"see --linear.learning-rates"
        )
    return "\n".join(lines)


def _facts(
    record: Record,
    train: Store,
    val: Store,
    engine: str,
    results: Results,
    options: argparse.Namespace,
    world: World,
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "protocols": sorted(set(options.protocol)),
        "run": str(record.directory),
        "method": record.method,
        "preset": record.preset,
        "backbone": record.backbone,
        "untrained": options.untrained,
        "pixels": options.pixels,
        "step": 0 if options.untrained or options.pixels else record.step,
    }
    if (knn := results.knn) is not None:
        facts |= {
            "results": {str(k): asdict(accuracy) for k, accuracy in knn.accuracies.items()},
            "skipped_k": list(knn.skipped),
            "temperature": TEMPERATURE,
        }
    if results.linear is not None:
        facts["linear"] = asdict(results.linear)
    return facts | {
        "classes": len(train.classes),
        "train": {"uri": train.uri, "samples": len(train), "fingerprint": train.fingerprint},
        "val": {"uri": val.uri, "samples": len(val), "fingerprint": val.fingerprint},
        "test_view": record.test.declaration(),
        "engine": engine,
        "precision": options.precision,
        "world_size": world.size,
        "seconds": dict(results.seconds),
        "versions": versions(engine),
    }


def command() -> NoReturn:
    run_and_exit(main)


if __name__ == "__main__":
    command()
