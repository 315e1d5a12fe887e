"""What a run is made of, as frozen dataclasses; methods and presets by name.

A method's presets are `Recipe`s: the published numbers, complete. `command_line.py` starts from one
of them and replaces single values; what comes out is a `Config`, which nothing changes afterwards.
Derived values (steps, the scaled learning rate) are computed where they are used and recorded in
RUN/config.json, never written back.
"""

import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from headrace.pipelines.engines import APPROXIMATIONS, Approximation
from headrace.pipelines.recipe import Augmentation

SMALL_PIXELS = 64  # the largest image of a data set that --preset auto calls CIFAR-sized


class ConfigError(ValueError):
    """A command line or configuration that cannot be run: what, where, and what to do instead."""


@dataclass(frozen=True)
class Optim:
    """The optimiser and its schedules. Schedules are functions of the run's progress in [0, 1]."""

    name: Literal["adamw", "sgd", "lars", "larc", "lamb"] = "adamw"
    learning_rate: float = 5e-4
    """Peak, for a batch of 256: multiplied by batch / 256 unless scale-with-batch is off."""
    final_learning_rate: float = 0.0
    """At the end of the run, under the same rule of scaling."""
    scale_with_batch: bool = True
    """Scale all learning rates linearly with the global batch."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up."""
    warmup_from: float = 0.0
    """Learning rate at the first step, under the same rule of scaling."""
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    """What follows the warm-up."""
    milestones: tuple[float, ...] = ()
    """steps: fractions of the run at which the learning rate is multiplied by step-factor."""
    step_factor: float = 0.1
    weight_decay: float = 0.04
    """AdamW: decoupled; SGD, LARS and LARC: added to the gradient; LAMB: to the step, before it is
    rescaled."""
    final_weight_decay: float | None = None
    """Weight decay at the end of the run, reached on a cosine; None keeps it constant."""
    momentum: float = 0.9
    """SGD, LARS and LARC."""
    nesterov: bool = False
    """SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW and LAMB."""
    epsilon: float = 1e-8
    """AdamW; LAMB, where 1e-6 is usual."""
    trust_coefficient: float = 1e-3
    """LARS and LARC."""
    clip_norm: float | None = None
    """Clip the global gradient norm to this."""


@dataclass(frozen=True)
class Data:
    """Which images, and how they reach the device."""

    train: Path | None = None
    """Data set to train on; a root with splits gives its train split. Default: the only one
    under ./data."""
    val: Path | None = None
    """Data set for the evaluation during training (methods that have one)."""
    engine: str = "auto"
    """auto, dali, fused, reference, synthetic."""
    approximate: tuple[str, ...] = ()
    """What an engine may do differently where it lacks the exact operator, separated by commas:
    affine-bilinear, equalize-opencv."""
    batch_size: int = 256
    """Samples per optimiser step, over all ranks and micro-batches."""
    holdout: float = 0.0
    """Fraction of the training set that is held out and evaluated."""
    subset: Path | None = None
    """Train on these samples only: a text file, one id or original file name per line."""
    shuffle: Literal["full", "window"] = "full"
    """full: any sample anywhere; window: within some shards, for remote storage."""
    window_shards: int = 16
    """window: number of shards that are mixed."""
    repeated_augmentation: int = 1
    """Show a sample so many times per step, each time augmented anew; an epoch keeps its length
    and shows that much fewer samples (DeiT: 3)."""
    threads: int | None = None
    """Threads of the engine per rank; None takes this rank's share of the cores."""
    prefetch: int = 2
    """Batches that are prepared ahead."""


@dataclass(frozen=True)
class Run:
    """Where the run goes, how long it is, how it is saved and continued."""

    out: Path | None = None
    """Directory of the run. Default: runs/<method>-<data set>."""
    epochs: float | None = None
    """Length in epochs. Default: the preset's."""
    steps: int | None = None
    """Length in optimiser steps, instead of epochs."""
    seed: int = 0
    """Of the stream, of the initial weights and of all randomness of the model."""
    save_every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_every: float = 1.0
    """Epochs between evaluations on the hold-out or --data.val; always at the end; 0: at the
    end only."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue where the checkpoint in the run's directory stands."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    gradient_cache: bool = False
    """Let the loss see all micro-batches of a step at once, for one more forward pass: the batch
    of contrastive methods is then not bound by memory."""
    batch_norm: Literal["global", "local"] = "global"
    """global: statistics over all ranks, so that the world size does not change the numbers."""
    compile: bool = False
    """torch.compile the encoder."""


@dataclass(frozen=True)
class Recipe:
    """What a method's PRESETS hold: a paper's whole experiment on one page.

    augmentation: the training views. test: one view named "test", for evaluation.
    objective: an instance of the method's own `Objective`. notes: the paper's numbers and hours.
    """

    backbone: str
    augmentation: Augmentation
    test: Augmentation
    optim: Optim
    batch_size: int
    epochs: float
    objective: Any
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    holdout: float = 0.0
    notes: str = ""


@dataclass(frozen=True)
class Config:
    """A run, resolved: every default filled in, every name found."""

    method: str
    preset: str
    backbone: str
    backbone_options: Mapping[str, Any]
    init: Path | None
    data: Data
    optim: Optim
    run: Run
    objective: Any
    augmentation: Augmentation
    test: Augmentation

    def declaration(self) -> dict[str, Any]:
        """JSON-ready and complete: what RUN/config.json holds under "config"."""
        declared = _plain(asdict(self))
        declared["augmentation"] = _plain(self.augmentation.declaration())
        declared["test"] = _plain(self.test.declaration())
        return declared

    def fingerprint(
        self, stream: Mapping[str, Any], *, total_steps: int, precision: str, world_size: int
    ) -> dict[str, Any]:
        """What determines the numbers of a run: a resume must agree on all of it.

        stream: the loader's fingerprint. The world size belongs to it where batch norm is local.
        """
        local = self.run.batch_norm == "local"
        return _plain(
            {
                "method": self.method,
                "backbone": self.backbone,
                "backbone_options": dict(self.backbone_options),
                "objective": asdict(self.objective),
                "optim": asdict(self.optim),
                "stream": stream,
                "seed": self.run.seed,
                "total_steps": total_steps,
                "precision": precision,
                "accumulate": self.run.accumulate,
                "gradient_cache": self.run.gradient_cache,
                "batch_norm": self.run.batch_norm,
                "world_size": world_size if local else "any",
            }
        )


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples, strings for paths and everything unknown."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return str(value)


def total_steps(run: Run, steps_per_epoch: int) -> int:
    """The run's length in optimiser steps."""
    if run.steps is not None:
        return run.steps
    assert run.epochs is not None, "a resolved configuration has a length"
    return steps_between(run.epochs, steps_per_epoch)


def steps_between(epochs: float, steps_per_epoch: int) -> int:
    """The nearest whole number of steps, at least one; 0 for 0 epochs."""
    return max(1, round(epochs * steps_per_epoch)) if epochs > 0 else 0


def check(config: Config) -> None:
    """Raises ConfigError, naming the option, for a value that cannot mean anything."""
    data, optim, run = config.data, config.optim, config.run
    at_least_one = {
        "--data.batch-size": data.batch_size,
        "--data.prefetch": data.prefetch,
        "--data.repeated-augmentation": data.repeated_augmentation,
        "--data.threads": 1 if data.threads is None else data.threads,
        "--run.steps": 1 if run.steps is None else run.steps,
        "--run.save-every": run.save_every,
        "--run.log-every": run.log_every,
        "--run.accumulate": run.accumulate,
    }
    for option, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{option} is {value}; it must be at least 1")
    above_zero = {
        "--run.epochs": 1 if run.epochs is None else run.epochs,
        "--optim.clip-norm": 1 if optim.clip_norm is None else optim.clip_norm,
    }
    for option, value in above_zero.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{option} is {value}; it must be above 0")
    not_negative = {
        "--run.seed": run.seed,
        "--run.evaluate-every": run.evaluate_every,
        "--optim.learning-rate": optim.learning_rate,
        "--optim.final-learning-rate": optim.final_learning_rate,
        "--optim.warmup-epochs": optim.warmup_epochs,
        "--optim.warmup-from": optim.warmup_from,
        "--optim.weight-decay": optim.weight_decay,
    }
    for option, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{option} is {value}; it must not be negative")
    if not 0 <= data.holdout < 1:
        raise ConfigError(f"--data.holdout is {data.holdout}; it is a fraction in [0, 1)")
    if run.gradient_cache and run.accumulate == 1:
        raise ConfigError(
            "--run.gradient-cache needs micro-batches: give --run.accumulate, their number per step"
        )
    approximations(data.approximate)


def approximations(names: Iterable[str]) -> tuple[Approximation, ...]:
    """What --data.approximate names, as engines take it: each once, in their order.

    names: of approximations; one string may hold several, separated by commas.
    Raises ConfigError for what is no name of one.
    """
    given = [part for name in names for part in name.replace(",", " ").split()]
    for name in given:
        if name not in APPROXIMATIONS:
            raise ConfigError(
                f"--data.approximate {name} is unknown{nearest(name, APPROXIMATIONS)}; there are "
                f"{', '.join(APPROXIMATIONS)}"
            )
    return tuple(known for known in APPROXIMATIONS if known in given)


# ---------------------------------------------------------------------------------------- methods


def find_method(name: str) -> ModuleType:
    """The module of a method: training/methods/<name>.py, or any importable module by dotted name.

    Raises ConfigError, listing what exists, for an unknown name, and for a module that is no
    method.
    """
    module_name = name if "." in name else f"headrace.training.methods.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the method was found; something that it imports was not
        if "." in name:
            raise ConfigError(
                f"--method {name}: there is no module {error.name!r} in the current directory or "
                f"on the Python path"
            ) from error
        raise ConfigError(
            f"--method {name} is unknown{nearest(name, method_names())}; there are "
            f"{', '.join(method_names())} in training/methods, and any module by its dotted name"
        ) from error
    missing = [part for part in ("Objective", "PRESETS", "build") if not hasattr(module, part)]
    if missing:
        raise ConfigError(f"--method {name}: {module.__file__} has no {' and no '.join(missing)}")
    return module


def method_names() -> list[str]:
    """The methods that are files of training/methods."""
    files = (Path(__file__).parent / "methods").glob("*.py")
    return sorted(file.stem for file in files if file.stem != "__init__")


def find_preset(
    module: ModuleType, name: str, largest_side_pixels: Callable[[], int]
) -> tuple[str, Recipe]:
    """A method's preset by name. "auto" is "cifar" where no image is larger than 64 pixels, else
    "imagenet"."""
    presets: Mapping[str, Recipe] = module.PRESETS
    if name == "auto":
        name = "cifar" if largest_side_pixels() <= SMALL_PIXELS else "imagenet"
        if name not in presets:
            raise ConfigError(
                f"{module.__name__} has no preset {name!r}, which --preset auto asks for with "
                f"these images; choose among {', '.join(presets)}"
            )
    if name not in presets:
        raise ConfigError(
            f"--preset {name} is unknown{nearest(name, presets)}; {module.__name__} has auto, "
            f"{', '.join(presets)}"
        )
    return name, presets[name]


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: ": did you mean ...?", or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else ""
