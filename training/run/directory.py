"""A run's directory: who may write there, and what stands in it.

config.json            resolved configuration, versions, fingerprint of the stream, command line
metrics.jsonl          a line per logged step
checkpoint.pt          everything needed to continue, replaced as a whole
encoder/               the encoder of the same step for timm, with the pictures that it expects:
                       timm.create_model("local-dir:RUN/encoder", pretrained=True)
encoder.safetensors    its weights alone: the same file under a second name
classifier/ .safetensors  the same with its last layer, of methods that train one
tensorboard/           the metrics again
lock                   held by the process that writes here; contains its id
failed-step-N.pt       the state before step N, whose loss was not finite
"""

import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from headrace.shards.atomic import PARTIAL_SUFFIX, atomic_file
from headrace.shards.errors import UserError
from headrace.training.collectives import from_main

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"
ENCODER_FILE = "encoder.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
TENSORBOARD_FOLDER = "tensorboard"
_LOCK_FILE = "lock"


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
        descriptor = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
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
    write_json(directory / CONFIG_FILE, description)
    cut_back_metrics(directory, start)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As a whole, sorted, readable."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


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
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed as a package"
    if engine == "dali":  # one package per CUDA version
        installed |= {
            distribution.name: distribution.version
            for distribution in metadata.distributions()
            if distribution.name.startswith("nvidia-dali")
        }
    return installed
