"""A run's directory: who may write there, and from what it continues.

config.json            resolved configuration, versions, fingerprint of the stream, command line
metrics.jsonl          a line per logged step
checkpoint.pt          everything needed to continue, replaced as a whole
encoder.safetensors    the encoder as timm reads it, of the same step
classifier.safetensors the same with its last layer, of methods that train one
tensorboard/           the metrics again
lock                   held by the process that writes here; contains its id
failed-step-N.pt       the state before step N, whose loss was not finite
"""

import fcntl
import json
import os
import pickle
import platform
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from headrace.pipelines.differences import differences
from headrace.shards.atomic import PARTIAL_SUFFIX, atomic_file
from headrace.shards.errors import UserError
from headrace.training.backbones import export
from headrace.training.collectives import from_main
from headrace.training.world import World

CHECKPOINT_FILE = "checkpoint.pt"
METRICS_FILE = "metrics.jsonl"
FORMAT = 2
_DIFFERENCES_SHOWN = 5
_IDS_SHOWN = 64


class CheckpointError(UserError):
    """A run's directory that cannot be used: what is in the way, and what to do."""


@contextmanager
def locked(directory: Path) -> Iterator[Path]:
    """Make and hold a run's directory; the lock ends with this process, however that ends.

    Raises CheckpointError on every rank where another process holds it.
    """
    held: list[int] = []
    from_main(lambda: held.append(_lock(directory)))
    try:
        yield directory
    finally:
        for descriptor in held:
            os.close(descriptor)


def _lock(directory: Path) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"--run.out {directory} cannot be written: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise CheckpointError(
            f"{directory} is being written by process {holder}: end it, or choose another --run.out"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    # Nobody else writes here now, so these are what a killed run was in the middle of.
    for leftover in directory.glob(f".*{PARTIAL_SUFFIX}"):
        leftover.unlink()
    return descriptor


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


def require_same(directory: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises CheckpointError, naming what differs, where a run would continue as another one."""
    if found := differences(old, new):
        more = len(found) - _DIFFERENCES_SHOWN
        raise CheckpointError(
            f"{directory} holds another run: {'; '.join(found[:_DIFFERENCES_SHOWN])}"
            + (f"; and {more} more" if more > 0 else "")
            + ". Start it as it was, or choose another --run.out"
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As a whole, sorted, readable."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def begin(
    directory: Path,
    start: int,
    config: Mapping[str, Any],
    derived: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
) -> None:
    """Write config.json, and drop from metrics.jsonl what is later than step `start`."""
    description = {
        "config": config,
        "derived": derived,
        "fingerprint": fingerprint,
        "versions": versions(fingerprint["stream"]["engine"]["name"]),
        "command": sys.argv,
    }
    write_json(directory / "config.json", description)
    cut_back_metrics(directory, start)


def save_step(
    directory: Path,
    state: Mapping[str, Any],
    exports: Mapping[str, Mapping[str, torch.Tensor]],
    world: World,
) -> None:
    """Everything needed to continue, and `Method.exports`. Taken on every rank, rank 0 writes."""
    if world.is_main:
        for name, weights in exports.items():
            export(weights, directory / f"{name}.safetensors")
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


def cut_back_metrics(directory: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and what is no whole line."""
    metrics = directory / METRICS_FILE
    kept = []
    for line in metrics.read_bytes().splitlines() if metrics.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue  # half a line, from the moment in which the run was killed
    with atomic_file(metrics) as file:
        file.writelines(kept)


def versions(engine: str) -> dict[str, str]:
    """Of everything that takes part in the numbers."""
    packages = ["headrace", "torch", "torchvision", "timm", "numpy", "pillow"]
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    if engine == "dali":  # one package per CUDA version
        found |= {
            distribution.name: distribution.version
            for distribution in metadata.distributions()
            if distribution.name.startswith("nvidia-dali")
        }
    return found
