"""A finished or running run, read back from its directory.

RUN/config.json is plain JSON, written once and readable without this project. What is needed of it
later (the views, the backbone, the seed) becomes the frozen dataclasses again that it was made of.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.declaration import augmentation_from
from pipelines.engines import Approximation
from pipelines.recipe import Augmentation, RecipeError
from shards.store import Store
from training.backbones import EncoderFactory, read_initial
from training.checkpoint import CHECKPOINT_FILE
from training.config import ConfigError, approximations, find_method
from training.method import Facts

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Record:
    """What is done with a run later on needs these.

    train, val: as the run was given them. engine: the one that fed it. approximate: what that one
    might do differently. step: of the exported encoder, None if no checkpoint says so. total_steps:
    of the whole run.
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
        config = recorded["config"]
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
            engine=recorded["fingerprint"]["stream"]["engine"]["name"],
            approximate=approximations(config["data"].get("approximate", ())),
            init=_path(config["init"]),
            batch_size=config["data"]["batch_size"],
            step=_saved_step(run / CHECKPOINT_FILE),
            total_steps=int(recorded["derived"]["steps"]),
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
    torch.manual_seed(record.seed)
    view_pixels = tuple(view.size for view in record.augmentation.flat_views)
    initial = None if record.init is None else read_initial(record.init)
    module = find_method(record.method)
    facts = Facts(
        num_classes=len(train.classes),
        train_samples=len(train),
        view_pixels=view_pixels,
        batch_size=record.batch_size,
        steps_per_epoch=max(1, len(train) // record.batch_size),
        total_steps=record.total_steps,
    )
    make_encoder = EncoderFactory(record.backbone, record.backbone_options, initial=initial)
    objective = module.Objective(**record.objective)
    return module.build(objective, make_encoder, facts).encoder


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
