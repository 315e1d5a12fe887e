"""A finished or running run, read back from its directory.

RUN/config.json is plain JSON, written once and readable without this project. What is needed of it
later (the views, the backbone, the seed) becomes the frozen dataclasses again that it was made of.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from pipelines.recipe import Augmentation, Mask, Op, RandomMask, RecipeError, View
from shards.store import Store
from training.backbones import EncoderFactory, read_initial
from training.checkpoint import CHECKPOINT_FILE
from training.config import ConfigError, find_method
from training.method import Facts

CONFIG_FILE = "config.json"

_OPS: dict[str, type[Op]] = {kind.__name__: kind for kind in get_args(Op)}
_MASKS: dict[str, type[Mask]] = {RandomMask.__name__: RandomMask}


@dataclass(frozen=True)
class Record:
    """What is done with a run later on needs these.

    train, val: as the run was given them. engine: the one that fed it. step: of the exported
    encoder, None if no checkpoint says so. total_steps: of the whole run.
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


def augmentation_from(declaration: Mapping[str, Any]) -> Augmentation:
    """The inverse of `Augmentation.declaration`, but for the deviations' prose.

    Raises KeyError, TypeError or RecipeError for what no declaration of this version says.
    """
    fields = _tuples(declaration)
    views = tuple(
        View(
            **{
                **view,
                "ops": tuple(_made(_OPS, op) for op in view["ops"]),
                "mask": None if view["mask"] is None else _made(_MASKS, view["mask"]),
            }
        )
        for view in fields["views"]
    )
    return Augmentation(**{**fields, "views": views})


def _made(kinds: Mapping[str, type], declared: Mapping[str, Any]) -> Any:
    fields = dict(declared)
    return kinds[fields.pop("op")](**fields)


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


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    match value:
        case dict():
            return {key: _tuples(item) for key, item in value.items()}
        case list():
            return tuple(_tuples(item) for item in value)
        case _:
            return value


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
