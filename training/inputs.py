"""Where a run's images come from: paths, splits, and the loaders over them."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.pipelines.loader import Loader, open_loader
from headrace.pipelines.order import Order
from headrace.pipelines.recipe import Augmentation
from headrace.shards.cores import threads_per_rank, usable_cores
from headrace.shards.local import local_path
from headrace.shards.sources.vocabulary import SPLITS
from headrace.shards.store import Store, find_dataset
from headrace.training.class_numbers import numbered_alike, unlabelled
from headrace.training.config import Config
from headrace.training.data_sets import open_train, open_val, root_with_val
from headrace.training.features import FeaturePass
from headrace.training.preset import ConfigError, require
from headrace.training.world import World

_SAMPLE_BATCHES, _SAMPLE_BATCH = 16, 128


def fitted_batch(
    config: Config, store: Store, subset: NDArray[np.int64] | None, world_size: int
) -> tuple[Config, list[str]]:
    """(the configuration, what became of it in a sentence, if anything): a preset's batch that is
    larger than the training set becomes the largest power of two, times what has to be whole, that
    fits.

    Raises ConfigError for a batch that was asked for, and where not even the smallest one fits.
    """
    data, group = config.data, config.augmentation.group
    samples = Order(len(store), 1, holdout=data.holdout, subset=subset).epoch_length
    unit = group * config.run.accumulate * world_size
    if data.batch_size <= samples:
        return config, []
    most = samples // unit * unit
    require(
        most > 0,
        f"there are {samples:,} images to train on, too few for one batch: it holds whole groups "
        f"of {group} (--augmentation.group) for each of {config.run.accumulate} micro-batch(es) of "
        f"{world_size} process(es)",
    )
    require(
        not config.batch_size_given,
        f"--data.batch-size {data.batch_size} is more than the {samples:,} images that there are "
        f"to train on: at most {most}",
    )
    batch_size = unit << (samples // unit).bit_length() - 1
    follows = "; the learning rate goes with it" if config.optim.scale_with_batch else ""
    said = (
        f"batches of {batch_size}, not the preset's {data.batch_size}, as there are {samples:,} "
        f"images{follows} (--data.batch-size)"
    )
    return replace(config, data=replace(data, batch_size=batch_size)), [said]


def open_training_loader(
    config: Config,
    store: Store,
    subset: NDArray[np.int64] | None,
    world: World,
    engine: str,
    *,
    stops_at_faults: bool = False,
) -> Loader:
    """This rank's share of the training stream.

    stops_at_faults: the caller takes no step with a batch that lacks a picture, so that ranks stay
    in step; others get an error.
    Raises ConfigError where ranks and micro-batches cannot share a batch.
    """
    where_it_raises = "report" if stops_at_faults else "raise"
    batch, parts = config.data.batch_size, config.run.accumulate
    unit = world.size * parts
    require(
        batch % unit == 0,
        f"--data.batch-size {batch} cannot be shared by {world.size} process(es) with "
        f"{parts} micro-batch(es) each (--run.accumulate): take a multiple of {unit}, as "
        f"{max(1, batch // unit) * unit}",
    )
    return open_loader(
        store,
        config.augmentation,
        batch_size=config.data.batch_size,
        seed=config.run.seed,
        engine=engine,
        device=world.device,
        shuffle=config.data.shuffle,
        window_shards=config.data.window_shards,
        holdout=config.data.holdout,
        subset=subset,
        occurrences=config.data.repeated_augmentation,
        keep_length=True,
        rank=world.rank,
        world_size=world.size,
        accumulate=config.run.accumulate,
        threads=_threads(config, world),
        prefetch=config.data.prefetch,
        approximate=config.data.approximate,
        on_error="replace" if config.data.on_error == "skip" else where_it_raises,
    )


def feature_pass(
    config: Config,
    store: Store,
    subset: NDArray[np.int64] | None,
    world: World,
    engine: str,
    *,
    bf16: bool,
) -> FeaturePass:
    """Passes over the same images without training, by the run's engine: what a method's
    `before_epoch` may ask for, in the test view or in one of the training views by its name."""
    views = {
        view.name: replace(config.augmentation, views=(replace(view, count=1),))
        for view in config.augmentation.views
    }
    return FeaturePass(
        store=store,
        views={**views, "test": config.test},
        batch_size=config.data.batch_size // (world.size * config.run.accumulate),
        engine=engine,
        world=world,
        threads=_threads(config, world),
        approximate=config.data.approximate,
        precision="bf16" if bf16 else "fp32",
        seed=config.run.seed,
        holdout=config.data.holdout,
        subset=subset,
        on_error="report",
    )


def initial_images(config: Config, store: Store, subset: NDArray[np.int64] | None) -> Tensor:
    """`sample_images` of a run, for what is fitted to images before it begins."""
    return sample_images(
        store,
        config.test,
        config.run.seed,
        subset=subset,
        holdout=config.data.holdout,
        on_error=config.data.on_error,
    )


def sample_images(
    store: Store,
    view: Augmentation,
    seed: int,
    *,
    subset: NDArray[np.int64] | None = None,
    holdout: float = 0.0,
    on_error: Literal["raise", "skip"] = "raise",
) -> Tensor:
    """float32 [n <= 2048, 3, H, W] on the CPU: training images by the seed, in the test view.

    The first ones of the order of the run's first epoch, through the reference engine: equal on
    every rank, and whichever engine trains or judges. on_error: as `Data.on_error`.
    """
    plain = replace(view, mix=None, group=1)
    with open_loader(
        store,
        plain,
        batch_size=_SAMPLE_BATCH,
        seed=seed,
        engine="reference",
        holdout=holdout,
        subset=subset,
        drop_last=False,
        passes=1,
        on_error="replace" if on_error == "skip" else "raise",
    ) as loader:
        return torch.cat([batch.views[0] for batch in islice(loader, _SAMPLE_BATCHES)])


def held_out_passes(config: Config, training_pass: FeaturePass) -> dict[str, FeaturePass]:
    """The passes over held-out images by name: "holdout" of the training set, and "val", whose
    classes have the training set's numbers."""
    passes = {}
    if training_pass.holdout > 0:
        passes["holdout"] = replace(training_pass, part="holdout")
    if config.data.val is not None:
        val = numbered_alike(training_pass.store, open_val(config.data.val))
        passes["val"] = replace(training_pass, store=val, holdout=0.0, part="train", subset=None)
    return passes


def _threads(config: Config, world: World) -> int:
    """Of a rank's engine: its share of the cores that this machine's ranks have together."""
    return config.data.threads or threads_per_rank(usable_cores(), world.local_size)


def open_labelled(train_path: Path | None, val_path: Path | None) -> tuple[Store, Store]:
    """(train, val), numbered alike by the names of classes; val_path None stands for the split
    beside train.

    Raises ConfigError or ShardError.
    """
    train, val = open_train(train_path), open_val(val_path or _beside(train_path))
    for option, store in (("--data.train", train), ("--data.val", val)):
        missing = unlabelled(store)
        if missing:
            raise ConfigError(
                f"{option}: {missing:,} of the {len(store):,} images of {store.uri} have no label, "
                f"and judging needs the class of each (one folder per class, for instance)"
            )
    return train, numbered_alike(train, val)


def _beside(train: Path | None) -> Path:
    """The root with a val or test split that a training set belongs to."""
    train = find_dataset() if train is None else train
    root = root_with_val(train)
    if root is not None:
        return root
    raise ConfigError(f"--data.val is missing: {train} has no val or test split")


def with_paths(config: Config) -> tuple[Config, Path]:
    """The configuration with the paths of all data absolute, and the run's directory. Left out,
    they are the only data set under ./data, and runs/<method>-<data set>."""
    train = local_path(config.data.train or find_dataset())
    named = train.parent if train.name in SPLITS else train
    name = f"{config.method.rpartition('.')[2]}-{named.name.split('.')[0] or 'data'}"
    val, subset = _absolute(config.data.val), _absolute(config.data.subset)
    out = config.run.out or Path("runs") / name
    local_path(out)  # refuses an address
    resolved = replace(
        config,
        init=_absolute(config.init),
        data=replace(config.data, train=train, val=val, subset=subset),
        run=replace(config.run, out=out),
    )
    return resolved, out


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else local_path(path)
