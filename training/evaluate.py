"""Judge a run's encoder: how well do its frozen features tell classes apart?

    python training/evaluate.py RUN --protocol knn linear --data.train DIR --data.val DIR --json F
    python training/evaluate.py RUN --gpus 8

Images go once through the run's own engine and its test view, a fixed view without augmentation
(`--test.*` changes it), and every protocol takes these features. `--untrained` judges the same
network with the weights that the run began with: what it had before it learnt anything. `--pixels`
judges the view itself. A protocol is a file of training/protocols, or any module by its dotted
name.
"""

if __name__ == "__main__":
    # Help and mistakes need none of what follows; then this file is imported, and `main` called.
    from headrace.training import launch

    launch.evaluate()

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.compiling import told_of_compiling
from headrace.pipelines.engines import choose
from headrace.pipelines.recipe import Augmentation
from headrace.shards.atomic import atomic_file
from headrace.shards.cores import threads_per_rank, usable_cores
from headrace.shards.progress import say
from headrace.shards.store import Store
from headrace.training.backbones import resolve_options
from headrace.training.build import trained_encoder, untrained_encoder
from headrace.training.config import parse_approximations
from headrace.training.data_sets import census_of
from headrace.training.evaluate_options import parse_evaluate
from headrace.training.features import FeaturePass
from headrace.training.inputs import open_labelled
from headrace.training.judged_view import changed, judged_pixels, side_pixels
from headrace.training.preset import ConfigError
from headrace.training.protocol import ProtocolError, Result, Subject, find_protocol
from headrace.training.run.directory import versions
from headrace.training.run.record import Record, read_record
from headrace.training.world import World, join


def main(arguments: Sequence[str]) -> int:
    protocols, options = parse_evaluate(arguments, find_protocol)
    started = time.perf_counter()
    record = read_record(options.run)
    train, val = open_labelled(options.train or record.train, options.val or record.val)
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"--json {options.json}: there is no directory {options.json.parent}")
    test = changed(record.test, options.test)
    try:
        for _, settings in protocols:
            settings.check(train, val)
        # Built where there are no other ranks, which judging has its own number of.
        encoder = build_encoder(record, train, test, options)
        with (
            join(options.device) as world,
            told_of_compiling(lambda text: say(text) if world.is_main else None),
        ):
            train_pass = test_view_pass(record, train, test, options, world)
            val_pass = replace(train_pass, store=val)
            subject = Subject(
                encoder.to(world.device), {"train": train_pass, "val": val_pass}, world
            )
            if world.is_main:
                print(*census_of(train, val), sep="\n", flush=True)
                what, engine = title(record, options), train_pass.engine
                print(
                    f"{what}; judged at {judged_pixels(test)} pixels; {engine} engine, "
                    f"{world.size} x {world.device.type}"
                )
            results: list[Result] = []
            for protocol, settings in protocols:
                with subject.timed(protocol.name):
                    results.append(protocol.judge(subject, settings))
            if world.is_main:
                for result in results:
                    print(result.shown())
                print(f"{time.perf_counter() - started:.0f} s")
                if options.json is not None:
                    names = [protocol.name for protocol, _ in protocols]
                    facts = collect_facts(record, subject, names, results, options)
                    with atomic_file(options.json) as file:
                        file.write((json.dumps(facts, indent=2) + "\n").encode())
                    print(f"wrote {options.json}")
    except ProtocolError as error:
        raise ProtocolError(f"{error} (train: {train.uri}, val: {val.uri})") from error
    return 0


def build_encoder(
    record: Record, train: Store, test: Augmentation, options: argparse.Namespace
) -> nn.Module:
    """[B, 3, H, W] -> [B, D], on the CPU. Raises ConfigError where it cannot take the test view."""
    if options.pixels:
        return nn.Flatten()
    if judged_pixels(test) != judged_pixels(record.test):
        trained_pixels = tuple(map(side_pixels, record.augmentation.flat_views))
        backbone_options = resolve_options(
            record.backbone, record.backbone_options, trained_pixels, judged_pixels(test)
        )
        record = replace(record, backbone_options=backbone_options)
    return (untrained_encoder if options.untrained else trained_encoder)(record, train)


def test_view_pass(
    record: Record, store: Store, test: Augmentation, options: argparse.Namespace, world: World
) -> FeaturePass:
    """Over a store in the test view, by the run's engine if nothing else is asked.

    Raises ConfigError for what names no approximation, Unsupported for what no engine can do.
    """
    approximate = chosen_approximations(record, options)
    return FeaturePass(
        store=store,
        views={"test": test},
        batch_size=options.batch_size,
        engine=choose(options.engine or record.engine, test, world.device, approximate),
        world=world,
        threads=options.threads or threads_per_rank(usable_cores(), world.local_size),
        precision=options.precision,
        approximate=approximate,
    )


def chosen_approximations(record: Record, options: argparse.Namespace) -> tuple[Approximation, ...]:
    """The command line's, else the run's. Raises ConfigError for what is no name of one."""
    if options.approximate is None:
        return record.approximate
    return parse_approximations([options.approximate])


def title(record: Record, options: argparse.Namespace) -> str:
    """What is judged, in words."""
    named = f"{record.directory}: {record.method}, {record.backbone}"
    if options.pixels:
        return f"{record.directory}: the pixels of {record.method}'s test view"
    if options.untrained:
        return f"{named}, untrained"
    return named if record.step is None else f"{named}, after {record.step:,} steps"


def collect_facts(
    record: Record,
    subject: Subject,
    protocols: Sequence[str],
    results: Sequence[Result],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """JSON-ready: what was judged, what every protocol found, and how."""
    train, val = subject.passes["train"], subject.passes["val"]
    facts: dict[str, Any] = {
        "protocols": list(protocols),
        "run": str(record.directory),
        "method": record.method,
        "preset": record.preset,
        "backbone": record.backbone,
        "untrained": options.untrained,
        "pixels": options.pixels,
        "step": 0 if options.untrained or options.pixels else record.step,
    }
    for result in results:
        facts |= result.stored()
    return facts | {
        "classes": len(train.store.classes),
        "train": _data(train.store),
        "val": _data(val.store),
        "test_view": train.views["test"].declaration(),
        "engine": train.engine,
        "precision": train.precision,
        "world_size": subject.world.size,
        "seconds": {name: round(seconds, 2) for name, seconds in subject.seconds.items()},
        "versions": versions(train.engine),
    }


def _data(store: Store) -> dict[str, Any]:
    return {"uri": store.uri, "samples": len(store), "fingerprint": store.fingerprint}
