"""What a run is made of, as frozen dataclasses.

`command_line.py` starts from a method's preset and replaces single values; what comes out is a
`Config`, which nothing changes afterwards.
Derived values (steps, the scaled learning rate) are computed where they are used and recorded in
RUN/config.json, never written back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headrace.pipelines.approximation import APPROXIMATIONS, Approximation
from headrace.pipelines.recipe import Augmentation
from headrace.training.preset import (
    Optim,
    nearest,
    require,
    require_count,
    require_not_negative,
    require_positive,
)


@dataclass(frozen=True)
class Data:
    """Which images, and how they reach the device."""

    train: Path | None = None
    """Data set to train on; a root with splits gives its train split. Default: the only one
    under ./data."""
    val: Path | None = None
    """Data set of which loss and kNN, or what the method has beside them, are shown in training;
    a root with splits gives val, else test."""
    engine: str = "auto"
    """auto, dali, fused, reference, synthetic."""
    approximate: tuple[Approximation, ...] = ()
    """What an engine may do differently where it lacks the exact operator, separated by commas:
    affine-bilinear, equalize-opencv."""
    batch_size: int = 256
    """Samples per optimiser step, over all ranks and micro-batches."""
    holdout: float = 0.0
    """Fraction of the training set that is not trained on and shown likewise."""
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
    on_error: Literal["raise", "skip"] = "raise"
    """An image that cannot be read or decoded: raise saves the run before the step and stops;
    skip puts another image in its place and lists it in RUN/skipped.jsonl."""

    def __post_init__(self) -> None:
        require_count("data", self, "batch_size", "repeated_augmentation", "threads", "prefetch")
        require_count("data", self, "window_shards")
        require(
            self.window_shards == Data.window_shards or self.shuffle == "window",
            "--data.window-shards means nothing to --data.shuffle full; it is for window",
        )
        require(
            0 <= self.holdout < 1,
            f"--data.holdout is {self.holdout}; it is a fraction in [0, 1)",
        )


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
    keep_every: int = 0
    """Steps between encoders that are kept, RUN/kept/step-N; 0: only the last one."""
    keep_best: str | None = None
    """Keep the encoder of the best evaluation, RUN/kept/best, by this metric: val_loss,
    val_knn_top1, holdout_loss, ..."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_every: float = 1.0
    """Epochs between evaluations on the hold-out or --data.val; always at the end; 0: at the
    end only."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue where the checkpoint in the run's directory stands."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on GPUs that compute in bf16 (Ampere and later), fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda where there is one, else cpu. mps: Apple's GPU, one process; what needs float64
    cannot run there. Written without one at hand."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    gradient_cache: bool = False
    """Let the loss see all micro-batches of a step at once, for one more forward pass: the batch
    of contrastive methods is then not bound by memory."""
    batch_norm: Literal["global", "local"] = "global"
    """global: statistics over all ranks, so that the world size does not change the numbers."""
    compile: bool = False
    """torch.compile the encoder, as a whole and block by block, whichever a method runs."""

    def __post_init__(self) -> None:
        require(
            self.epochs is None or self.steps is None,
            "--run.epochs and --run.steps are both given: a run has one length",
        )
        require_count("run", self, "steps", "save_every", "log_every", "accumulate")
        require_positive("run", self, "epochs")
        require_not_negative("run", self, "seed", "evaluate_every", "keep_every")
        require(
            not self.gradient_cache or self.accumulate > 1,
            "--run.gradient-cache needs micro-batches: give --run.accumulate, their number per "
            "step",
        )


@dataclass(frozen=True)
class Config:
    """A run, resolved: every default filled in, every name found.

    batch_size_given: whether it was asked for; a preset's gives way to a small training set.
    """

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
    batch_size_given: bool = True

    def declaration(self) -> dict[str, Any]:
        """JSON-ready and complete: what RUN/config.json holds under "config"."""
        declared = _plain(asdict(self))
        del declared["batch_size_given"]
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
                "test": self.test.declaration(),
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


def parse_approximations(names: Iterable[str]) -> tuple[Approximation, ...]:
    """What was written behind --data.approximate: each once, in the order of APPROXIMATIONS.

    names: of approximations; one string may hold several, separated by commas.
    Raises ConfigError for what is no name of one.
    """
    given = [part for name in names for part in name.replace(",", " ").split()]
    for name in given:
        require(
            name in APPROXIMATIONS,
            f"--data.approximate {name} is unknown{nearest(name, APPROXIMATIONS)}; there are "
            f"{', '.join(APPROXIMATIONS)}",
        )
    return tuple(name for name in APPROXIMATIONS if name in given)
