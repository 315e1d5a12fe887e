"""Judge a run's encoder: how well do its features tell classes apart, without any training?

    python training/evaluate.py RUN --protocol knn --data.train DIR --data.val DIR --json FILE
    torchrun --standalone --nproc-per-node 8 training/evaluate.py RUN

Images go through the run's own engine and the test view of its recipe. `--untrained` judges the
same network with the weights that the run began with: what it had before it learnt anything.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pipelines.engines import Approximation, choose
from pipelines.loader import threads_per_rank, usable_cores
from shards.atomic import atomic_file
from shards.store import Store, dataset_splits, find_dataset
from training.backbones import ENCODER_FILE, EncoderFactory, read_initial
from training.checkpoint import versions
from training.config import ConfigError, approximations
from training.ending import run_and_exit
from training.evaluation.features import Features, extract
from training.evaluation.knn import NEIGHBOURS, TEMPERATURE, KnnError, KnnResult, knn_accuracy
from training.evaluation.record import Record, read_record, untrained_encoder
from training.samples import open_train, open_val
from training.world import World, join


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    started = time.perf_counter()
    record = read_record(options.run)
    train, val = _open_data(record, options)
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"--json {options.json}: there is no directory {options.json.parent}")
    with join(options.device) as world:
        approximate = _approximate(record, options)
        engine = choose(options.engine or record.engine, record.test, world.device, approximate)
        encoder = _encoder(record, train, untrained=options.untrained).to(world.device)
        if world.is_main:
            print(f"{_what(record, options)}; {engine} engine, {world.size} x {world.device.type}")
        result, seconds = _judge(encoder, record, train, val, engine, options, world)
        if not world.is_main:
            return 0
        _say(result, time.perf_counter() - started)
        if options.json is not None:
            facts = _facts(record, train, val, engine, result, seconds, options, world)
            with atomic_file(options.json) as file:
                file.write((json.dumps(facts, indent=2) + "\n").encode())
            print(f"wrote {options.json}")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training/evaluate.py",
        description="Judge a run's encoder by the classes of its images' nearest neighbours.",
        epilog="""examples:
  python training/evaluate.py runs/dino
  python training/evaluate.py runs/dino --untrained --k 20 --json untrained.json
  torchrun --standalone --nproc-per-node 8 training/evaluate.py runs/dino --data.val data/imagenet
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    parser.add_argument(
        "--protocol", choices=["knn"], default="knn", help="knn: weighted kNN as in DINO"
    )
    parser.add_argument(
        "--data.train",
        dest="train",
        type=Path,
        metavar="DIR",
        help="the neighbours come from here; of a root with splits, train. Default: the run's",
    )
    parser.add_argument(
        "--data.val",
        dest="val",
        type=Path,
        metavar="DIR",
        help="these are judged; of a root with splits, val, else test. Default: the run's",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--untrained", action="store_true", help="judge the weights that the run began with"
    )
    parser.add_argument(
        "--k", type=_positive, nargs="+", default=list(NEIGHBOURS), help="numbers of neighbours"
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
    return (
        record.approximate if options.approximate is None else approximations([options.approximate])
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _open_data(record: Record, options: argparse.Namespace) -> tuple[Store, Store]:
    """(train, val), both labelled alike. Raises ConfigError or ShardError."""
    train = open_train(options.train or record.train)
    val = open_val(options.val or record.val or _beside(options.train or record.train))
    for option, store in (("--data.train", train), ("--data.val", val)):
        missing = int((store.labels(np.arange(len(store))) < 0).sum())
        if missing:
            raise ConfigError(
                f"{option}: {missing:,} of the {len(store):,} images of {store.uri} have no label, "
                f"and kNN needs the class of each (one folder per class, for instance)"
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


def _encoder(record: Record, train: Store, *, untrained: bool) -> nn.Module:
    if untrained:
        return untrained_encoder(record, train)
    if not (record.directory / ENCODER_FILE).is_file():
        raise ConfigError(
            f"{record.directory} holds no {ENCODER_FILE}: the run writes it with its first "
            f"checkpoint; --untrained judges the weights that it begins with"
        )
    weights = read_initial(record.directory)
    return EncoderFactory(record.backbone, record.backbone_options, initial=weights)()


def _judge(
    encoder: nn.Module,
    record: Record,
    train: Store,
    val: Store,
    engine: str,
    options: argparse.Namespace,
    world: World,
) -> tuple[KnnResult, dict[str, float]]:
    """(accuracies, seconds of each part)."""

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

    ticks = [time.perf_counter()]
    train_features = features_of(train, "features of train")
    ticks.append(time.perf_counter())
    val_features = features_of(val, "features of val")
    ticks.append(time.perf_counter())
    try:
        result = knn_accuracy(train_features, val_features, world, ks=options.k, progress=True)
    except KnnError as error:
        raise ConfigError(f"{error} (train: {train.uri}, val: {val.uri})") from error
    ticks.append(time.perf_counter())
    names = ("train_features", "val_features", "knn")
    seconds = [round(after - before, 2) for before, after in pairwise(ticks)]
    return result, dict(zip(names, seconds, strict=True))


def _what(record: Record, options: argparse.Namespace) -> str:
    named = f"{record.directory}: {record.method}, {record.backbone}"
    if options.untrained:
        return f"{named}, untrained"
    return named if record.step is None else f"{named}, after {record.step:,} steps"


def _say(result: KnnResult, seconds: float) -> None:
    print(
        f"kNN of {result.test_samples:,} images among {result.train_samples:,} in "
        f"{result.classes} classes, {seconds:.0f} s"
    )
    print("      k    top-1    top-5")
    for k, accuracy in result.accuracies.items():
        print(f"  {k:>5}  {accuracy.top1:5.2f} %  {accuracy.top5:5.2f} %")
    for k in result.skipped:
        print(f"  k = {k} is left out: there are only {result.train_samples} training images")


def _facts(
    record: Record,
    train: Store,
    val: Store,
    engine: str,
    result: KnnResult,
    seconds: dict[str, float],
    options: argparse.Namespace,
    world: World,
) -> dict[str, Any]:
    return {
        "protocol": options.protocol,
        "run": str(record.directory),
        "method": record.method,
        "preset": record.preset,
        "backbone": record.backbone,
        "untrained": options.untrained,
        "step": 0 if options.untrained else record.step,
        "results": {str(k): asdict(accuracy) for k, accuracy in result.accuracies.items()},
        "skipped_k": list(result.skipped),
        "temperature": TEMPERATURE,
        "classes": result.classes,
        "train": {
            "uri": train.uri,
            "samples": result.train_samples,
            "fingerprint": train.fingerprint,
        },
        "val": {"uri": val.uri, "samples": result.test_samples, "fingerprint": val.fingerprint},
        "test_view": record.test.declaration(),
        "engine": engine,
        "precision": options.precision,
        "world_size": world.size,
        "seconds": seconds,
        "versions": versions(engine),
    }


if __name__ == "__main__":
    run_and_exit(main)
