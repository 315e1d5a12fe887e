"""From names and numbers to a method with its weights: to train it, or to judge its encoder."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headrace.pipelines.recipe import Augmentation
from headrace.shards.store import Store
from headrace.training.backbones import EncoderFactory, resolve_options
from headrace.training.catalogue import find_method
from headrace.training.config import Config
from headrace.training.initial import read_initial_weights
from headrace.training.inputs import initial_images, sample_images
from headrace.training.judged_view import judged_pixels, side_pixels
from headrace.training.method import Facts, Method
from headrace.training.preset import ConfigError
from headrace.training.ranges import require_ranges
from headrace.training.run.directory import CONFIG_FILE, ENCODER_FILE
from headrace.training.run.export import read_initial
from headrace.training.run.record import Record
from headrace.training.subset import read_subset


def with_backbone(config: Config) -> Config:
    """The configuration with the options of its backbone resolved, as `resolve_options` does and
    refuses: names are checked before anything is opened."""
    method = find_method(config.method)
    options = resolve_options(
        config.backbone,
        config.backbone_options,
        tuple(map(side_pixels, config.augmentation.flat_views)),
        judged_pixels(config.test),
        needed=method.backbone_options,
        needed_by=config.method,
    )
    return replace(config, backbone_options=options)


def facts_of(
    augmentation: Augmentation,
    *,
    num_classes: int,
    train_samples: int,
    batch_size: int,
    steps_per_epoch: int,
    total_steps: int,
    init: Path | None,
) -> Facts:
    """What a run with these numbers tells its method: in training, and again when it is judged."""
    views = augmentation.flat_views
    return Facts(
        num_classes=num_classes,
        train_samples=train_samples,
        view_pixels=tuple(map(side_pixels, views)),
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        init=init,
        mean=augmentation.mean,
        std=augmentation.std,
        masks=tuple(view.mask for view in views),
    )


def method_of_run(
    config: Config,
    store: Store,
    subset: NDArray[np.int64] | None,
    *,
    epoch_steps: int,
    steps: int,
    resumed: bool,
    say: Callable[[list[str]], None],
) -> Method:
    """The method that a run trains, as `build_method` makes it."""
    run = config.run
    facts = facts_of(
        config.augmentation,
        num_classes=len(store.classes),
        train_samples=len(store),
        batch_size=config.data.batch_size,
        steps_per_epoch=epoch_steps,
        total_steps=steps,
        init=config.init,
    )
    return build_method(
        config.method,
        config.objective,
        config.backbone,
        config.backbone_options,
        facts,
        run.seed,
        resumed=resumed,
        compiled=run.compile,
        images=partial(initial_images, config, store, subset),
        say=say,
    )


def build_method(
    name: str,
    objective: Any,
    backbone: str,
    backbone_options: Mapping[str, Any],
    facts: Facts,
    seed: int,
    *,
    resumed: bool = False,
    compiled: bool = False,
    images: Callable[[], Tensor] | None = None,
    say: Callable[[list[str]], None] | None = None,
) -> Method:
    """The method `name` as a run begins with it, on the CPU: its weights are the seed's.

    backbone_options: resolved (`backbones.resolve_options`). facts.init: a run whose encoder's
    weights every encoder starts from, unless the method's INIT_IS_TEACHER says otherwise. resumed:
    a checkpoint's weights will replace these, so that neither a file of --init nor images are
    needed. images, say: as `EncoderFactory` takes them.
    Seeds torch's global generator.
    """
    require_ranges(objective)
    torch.manual_seed(seed)  # the weights' randomness, equal on every rank
    method = find_method(name)
    initial = None
    if facts.init and not method.init_is_teacher and not resumed:
        initial = read_initial_weights(facts.init)
    make_encoder = EncoderFactory(
        backbone,
        backbone_options,
        initial=initial,
        compiled=compiled,
        images=None if resumed else images,
        say=say,
    )
    return method.build(objective, make_encoder, facts)


def untrained_encoder(record: Record, train: Store) -> nn.Module:
    """The encoder as the run began with it: built in the same way from the same seed."""
    return built_method(record, train, trained=False).encoder


def trained_encoder(record: Record, train: Store) -> nn.Module:
    """The encoder that the run's last checkpoint left.

    The method builds it, because what it judges need not be one timm model: two networks on
    different channels, a fixed filter in front of one. Raises ConfigError where there is none, and
    where the weights are not those of this encoder.
    """
    path = record.directory / ENCODER_FILE
    if not path.is_file():
        raise ConfigError(
            f"{record.directory} holds no {ENCODER_FILE}: the run writes it with its first "
            f"checkpoint; --untrained judges the weights that it begins with"
        )
    weights = read_initial(path)
    encoder = built_method(record, train, trained=True).encoder
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        difference = shorten(str(error).partition("\n")[2], 200, placeholder=" ...")
        raise ConfigError(
            f"{path} does not hold the weights of the encoder that {record.method} builds for "
            f"{record.directory / CONFIG_FILE}: {difference}"
        ) from error
    return encoder


def built_method(record: Record, train: Store, *, trained: bool) -> Method:
    """The method as the run built it, whose weights are the seed's.

    Heads and banks take the memory that they take in training, also where the encoder alone is
    wanted: buffers that no checkpoint holds have their values from being built, so nothing can be
    left out safely. train: its numbers stand in for what an older record does not tell of the
    run's own, and its images for those that an encoder is fitted to. trained: a checkpoint's
    weights will replace these.
    """
    samples = record.train_samples or len(train)
    facts = facts_of(
        record.augmentation,
        num_classes=len(train.classes) if record.classes is None else record.classes,
        train_samples=samples,
        batch_size=record.batch_size,
        steps_per_epoch=record.epoch_steps or max(1, samples // record.batch_size),
        total_steps=record.total_steps,
        init=record.init,
    )
    objective = find_method(record.method).objective_class(**record.objective)
    return build_method(
        record.method,
        objective,
        record.backbone,
        record.backbone_options,
        facts,
        record.seed,
        resumed=trained,
        images=lambda: _sample_images(record, train),
    )


def _sample_images(record: Record, train: Store) -> Tensor:
    """Those that the run's encoder was fitted to. Raises ConfigError if `train` is another set."""
    if record.train_fingerprint not in (None, train.fingerprint):
        raise ConfigError(
            f"the first layer of {record.backbone} was made from images of {record.train}, and "
            f"{train.uri} is another data set: name that one with --data.train"
        )
    subset = read_subset(record.subset, train)
    return sample_images(train, record.test, record.seed, subset=subset, holdout=record.holdout)
