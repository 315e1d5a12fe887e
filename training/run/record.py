"""A finished or running run, read back from its directory.

RUN/config.json is plain JSON, written once and readable without this project. What is needed of it
later (the views, the backbone, the seed) becomes the frozen dataclasses again that it was made of.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.declaration import augmentation_from
from headrace.pipelines.ops import RecipeError
from headrace.pipelines.recipe import Augmentation
from headrace.training.preset import ConfigError
from headrace.training.run.directory import CHECKPOINT_FILE, CONFIG_FILE, METRICS_FILE


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


@dataclass(frozen=True)
class Network:
    """What the weights that a run exported are of, and what they expect to see.

    backbone: a timm model. test: the view that the run is judged in.
    """

    backbone: str
    backbone_options: Mapping[str, Any]
    test: Augmentation


def read_record(run: Path) -> Record:
    """Raises ConfigError, one sentence, for what is no run or was written by another version."""
    with _recorded(run) as recorded:
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
            step=derived.get("kept_step", _saved_step(run / CHECKPOINT_FILE)),
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


def read_network(run: Path) -> Network:
    """The little that is needed to use a run's weights elsewhere. Raises ConfigError likewise."""
    with _recorded(run) as recorded:
        config = recorded["config"]
        return Network(
            backbone=config["backbone"],
            backbone_options=_tuples(config["backbone_options"]),
            test=augmentation_from(config["test"]),
        )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a step, in order; a last one that is only half written
    is left out. Raises ConfigError where there is none."""
    path = run / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    logged: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ConfigError(f"{path}, line {number} is no JSON: {error}") from error
        if isinstance(values, dict) and "step" in values:
            logged.append(values)
    if not logged:
        raise ConfigError(f"{path} has no logged step yet")
    return logged


@contextmanager
def _recorded(run: Path) -> Iterator[dict[str, Any]]:
    """What config.json says. Inside, whatever it lacks becomes a sentence too."""
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
        yield recorded
    except (KeyError, TypeError, RecipeError) as error:
        raise ConfigError(
            f"{path} is not as this version writes it ({type(error).__name__}: {error}); read it "
            f"with the version that it names"
        ) from error


def _saved_step(checkpoint: Path) -> int | None:
    """The step of the last checkpoint and of the encoder beside it; None where there is none.

    Mapped, not read: a checkpoint may have gigabytes.
    """
    import torch  # the rest of a record needs none

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
