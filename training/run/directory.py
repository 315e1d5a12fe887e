"""A run's directory: what stands in it.

config.json            resolved configuration, versions, fingerprint of the stream, command line
metrics.jsonl          a line per logged step
skipped.jsonl          a line per image that could not be used and was replaced
checkpoint.pt          everything needed to continue, replaced as a whole
encoder/               the encoder of the same step for timm, with the pictures that it expects:
                       timm.create_model("local-dir:RUN/encoder", pretrained=True)
encoder.safetensors    its weights alone: the same file under a second name
classifier/ .safetensors  the same with its last layer, of methods that train one
kept/                  encoders of --run.keep-every and --run.keep-best, each as a run of its own
tensorboard/           the metrics again
lock                   held by the process that writes here, whose id is in lock-holder
failed-step-N.pt       the state before step N, whose loss was not finite
"""

import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from headrace.shards.atomic import atomic_file
from headrace.shards.errors import UserError

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"
ENCODER_FILE = "encoder.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
TENSORBOARD_FOLDER = "tensorboard"
LOCK_FILE = "lock"


class CheckpointError(UserError):
    """A run's directory that cannot be used: what is in the way, and what to do."""


def begin(
    directory: Path,
    start: int,
    config: Mapping[str, Any],
    derived: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
) -> None:
    """Write config.json, and drop from the lines of steps what is later than step `start`."""
    description = {
        "config": config,
        "derived": derived,
        "fingerprint": fingerprint,
        "versions": versions(fingerprint["stream"]["engine"]["name"]),
        "command": sys.argv,
    }
    write_json(directory / CONFIG_FILE, description)
    cut_back(directory / METRICS_FILE, start)
    if (directory / SKIPPED_FILE).exists():
        cut_back(directory / SKIPPED_FILE, start)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As a whole, sorted, readable."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def cut_back(path: Path, step: int) -> None:
    """Drop from JSON lines those of steps after `step`, and what is no whole line."""
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue  # half a line, from the moment in which the run was killed
    with atomic_file(path) as file:
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
