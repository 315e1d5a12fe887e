"""A run's checkpoint: everything needed to continue; and the state before a step that failed."""

import pickle
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from headrace.pipelines.differences import differences
from headrace.shards.atomic import atomic_file
from headrace.training.run.directory import CHECKPOINT_FILE, CheckpointError
from headrace.training.run.export import TimmConfig, export_all
from headrace.training.world import World

FORMAT = 2
_DIFFERENCES_SHOWN = 5
_IDS_SHOWN = 64
_WRITTEN_LATER = ("test",)
"""Parts of a fingerprint that the first version of FORMAT did not have."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Replace the file at `path` as a whole: after any interruption it is the old or the new."""
    with atomic_file(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load(
    directory: Path, device: torch.device, *, resume: Literal["auto", "never"] = "auto"
) -> dict[str, Any] | None:
    """What the run saved, tensors on `device`; None where there is nothing.

    Raises CheckpointError for what is no checkpoint of this format, and for any checkpoint where
    `resume` is "never". Runs no code from the file.
    """
    path = directory / CHECKPOINT_FILE
    if not path.exists():
        return None
    if resume == "never":
        raise CheckpointError(
            f"{directory} holds a checkpoint and --run.resume is never: choose another --run.out"
        )
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of format {FORMAT}: choose another --run.out"
        )
    return state


def require_same(
    directory: Path, old: Mapping[str, Any], new: Mapping[str, Any], *, free: Sequence[str] = ()
) -> None:
    """Raises CheckpointError, naming what differs, where a run would continue as another one.

    What an older version did not write down it could not change either. free: names of what may
    differ.
    """
    later = {key: new[key] for key in _WRITTEN_LATER if key in new and key not in old}
    free_ones = {key: new[key] for key in free}
    if changed := differences({**old, **later, **free_ones}, new):
        longer = old.get("total_steps") != new.get("total_steps")
        instead = (
            f". Its schedules run to its end, so it has one length (--optim.schedule constant, and "
            f"stable_decay before it decays, can become longer in methods without a schedule of "
            f"their own): a new one starts from this one's encoder with --init {directory} and "
            f"another --run.out"
        )
        more = len(changed) - _DIFFERENCES_SHOWN
        raise CheckpointError(
            f"{directory} holds another run: {'; '.join(changed[:_DIFFERENCES_SHOWN])}"
            + (f"; and {more} more" if more > 0 else "")
            + (instead if longer else ". Start it as it was, or choose another --run.out")
        )


def save_step(
    directory: Path,
    state: Mapping[str, Any],
    exports: Mapping[str, Mapping[str, torch.Tensor]],
    network: TimmConfig,
    world: World,
) -> None:
    """Everything needed to continue, and `Method.exports` for timm. Taken on every rank, rank 0
    writes."""
    if world.is_main:
        export_all(exports, directory, network)
        save(directory / CHECKPOINT_FILE, state)


def fail(
    directory: Path,
    step: int,
    ids: Mapping[int, list[int]],
    state: Mapping[str, Any],
    world: World,
) -> int:
    """Report a step whose loss was not finite and keep the state before it; the exit code 1."""
    if world.is_main:
        path = directory / f"failed-step-{step}.pt"
        kept = {name: state[name] for name in ("method", "optimizer", "engine", "fingerprint")}
        save(path, {**kept, "step": step - 1, "ids": dict(ids)})
        shown = ", ".join(map(str, ids[step][:_IDS_SHOWN]))
        more = len(ids[step]) - _IDS_SHOWN
        print(  # noqa: T201
            f"error: the loss or its gradient is not finite at step {step}, which changed nothing; "
            f"its samples: {shown}{f' and {more} more' if more > 0 else ''}; the state before it "
            f"and all sample ids: {path}",
            file=sys.stderr,
            flush=True,
        )
    return 1
