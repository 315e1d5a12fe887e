"""A finished or running run, read back from its directory.

RUN/config.json is plain JSON, written once and readable without this project. What is needed of it
later (the views, the backbone, the seed) becomes the frozen dataclasses again that it was made of.
"""

import json
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.declaration import augmentation_from
from headrace.pipelines.ops import RecipeError
from headrace.pipelines.recipe import Augmentation
from headrace.shards.store import Store
from headrace.training.backbones import ENCODER_FILE, read_initial
from headrace.training.build import build_method, facts_of
from headrace.training.catalogue import find_method
from headrace.training.inputs import read_subset, sample_images
from headrace.training.method import Method
from headrace.training.preset import ConfigError
from headrace.training.run.checkpoint import CHECKPOINT_FILE

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Record:
    """What is done with a run later on needs these.

    train, val: as the run was given them. engine: the one that fed it. approximate: what that one
    might do differently. step: of the exported encoder, None if no checkpoint says so. total_steps:
    of the whole run. classes, train_samples, epoch_steps, train_fingerprint: of the training set
    that it had, None where config.json does not tell. subset, holdout: what of it was trained on.
    """

    directory: Path
    method: str
    preset: str
    backbone: str
    backbone_options: Mapping[str, Any]
    objective: Mapping[str, Any]
    seed: int
    train: Path | None
    val: Path | None
    engine: str
    approximate: tuple[Approximation, ...]
    init: Path | None
    batch_size: int
    step: int | None
    total_steps: int
    classes: int | None
    train_samples: int | None
    epoch_steps: int | None
    train_fingerprint: str | None
    subset: Path | None
    holdout: float
    augmentation: Augmentation
    test: Augmentation


def read_record(run: Path) -> Record:
    """Raises ConfigError, one sentence, for what is no run or was written by another version."""
    path = run / CONFIG_FILE
    if not run.is_dir():
        raise ConfigError(f"there is no run {run}: name the directory that --run.out named")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{run} is no run: it holds no {CONFIG_FILE}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        config, derived = recorded["config"], recorded["derived"]
        stream = recorded["fingerprint"]["stream"]
        return Record(
            directory=run,
            method=config["method"],
            preset=config["preset"],
            backbone=config["backbone"],
            backbone_options=_tuples(config["backbone_options"]),
            objective=_tuples(config["objective"]),
            seed=int(config["run"]["seed"]),
            train=_path(config["data"]["train"]),
            val=_path(config["data"]["val"]),
            engine=stream["engine"]["name"],
            approximate=tuple(config["data"].get("approximate", ())),
            init=_path(config["init"]),
            batch_size=config["data"]["batch_size"],
            step=_saved_step(run / CHECKPOINT_FILE),
            total_steps=int(derived["steps"]),
            classes=derived.get("classes"),
            train_samples=stream.get("order", {}).get("samples"),
            epoch_steps=derived.get("epoch_steps"),
            train_fingerprint=stream.get("store"),
            subset=_path(config["data"].get("subset")),
            holdout=config["data"].get("holdout", 0.0),
            augmentation=augmentation_from(config["augmentation"]),
            test=augmentation_from(config["test"]),
        )
    except (KeyError, TypeError, RecipeError) as error:
        raise ConfigError(
            f"{path} is not as this version writes it ({type(error).__name__}: {error}); read it "
            f"with the version that it names"
        ) from error


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
    if "." in record.method and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # where training found it
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


def _saved_step(checkpoint: Path) -> int | None:
    """The step of the last checkpoint and of the encoder beside it; None where there is none.

    Mapped, not read: a checkpoint may have gigabytes.
    """
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["step"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        return None


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
