"""Weights that encoders start from, `--init`: whose they are, and how they are made to fit.

A file may come from a run, from timm or from anybody's training: the encoder's weights are found in
it under whatever prefix they have, a classifier's are left out, and a ViT's positions are resampled
to the size of the run's views. What was done is said.
"""

import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from headrace.training.preset import ConfigError, require
from headrace.training.run.directory import ENCODER_FILE

_TORCH_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_NESTED = ("state_dict", "model_state_dict", "teacher", "model", "encoder", "student")
"""Under which names training scripts keep a network's weights, the one that is judged first."""
_NAMES_SHOWN = 3


def read_initial_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a run's encoder, a .safetensors file or torch's own (.pth, .pt, .bin).

    Runs no code from a file. Raises ConfigError for what holds no weights.
    """
    if path.is_dir():
        path = path / ENCODER_FILE
    if not path.is_file():
        raise ConfigError(
            f"--init: there is no {path}; name a run, a .safetensors file, or one of torch's (.pth)"
        )
    if path.suffix in _TORCH_ENDINGS:
        return _read_torch(path)
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"--init: {path} is no safetensors file: {error}") from error


def require_same_init(given: Path | None, recorded: Path | None, directory: Path) -> None:
    """Raises ConfigError for an --init with which the run in `directory` did not begin."""
    same = given is not None and recorded is not None and given.resolve() == recorded.resolve()
    began = "weights of its own" if recorded is None else f"--init {recorded}"
    require(
        given is None or same,
        f"--init {given}: {directory} began with {began} and goes on from its checkpoint; leave "
        f"the option out, or choose another --run.out",
    )


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        read: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--init: {path} cannot be read as weights alone ({reason}): save a state dict, "
            f"torch.save(model.state_dict(), ...), which holds nothing but tensors"
        ) from error
    while isinstance(read, Mapping) and not any(isinstance(item, Tensor) for item in read.values()):
        inner = next((read[name] for name in _NESTED if isinstance(read.get(name), Mapping)), None)
        if inner is None:
            break
        read = inner
    tensors = {
        str(name): item
        for name, item in (read.items() if isinstance(read, Mapping) else ())
        if isinstance(item, Tensor)
    }
    if not tensors:
        raise ConfigError(f"--init: {path} holds no state dict of tensors")
    return tensors


def fit_weights(
    encoder: nn.Module, weights: Mapping[str, Tensor], name: str
) -> tuple[dict[str, Tensor], list[str]]:
    """(a state dict of the encoder, sentences on what had to be done for it).

    name: the backbone's. Raises ConfigError, naming the first differences, for other weights.
    """
    expected = encoder.state_dict()
    said: list[str] = []
    prefix = _prefix(expected, weights)
    fitted = {key[len(prefix) :]: item for key, item in weights.items() if key.startswith(prefix)}
    beside = [key for key in weights if not key.startswith(prefix)]
    classifiers = tuple(f"{entry}." for entry in _classifiers(encoder))
    heads = [key for key in fitted if key.startswith(classifiers) and key not in expected]
    for key in heads:
        del fitted[key]
    if left := [*beside, *(prefix + key for key in heads)]:
        more = ", ..." if len(left) > _NAMES_SHOWN else ""
        said.append(f"{len(left)} tensors are left out: {', '.join(left[:_NAMES_SHOWN])}{more}")
    said += _resample_positions(encoder, expected, fitted)
    differences = list(_differences(expected, fitted))
    if differences:
        raise ConfigError(
            f"the weights of --init do not fit backbone {name!r} with these options: "
            f"{'; '.join(differences[:6])} ({len(differences)} differences)"
        )
    return fitted, [f"{len(fitted)} tensors of {name} are from there", *said]


def _prefix(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """What most of the encoder's names stand behind in a file: "module.backbone.", say."""
    counts = Counter(
        key[: -len(name)] if name else key
        for key in weights
        for name in _endings(key)
        if name in expected
    )
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def _endings(key: str) -> Iterator[str]:
    """ "a.b.c", "b.c", "c"."""
    parts = key.split(".")
    for first in range(len(parts)):
        yield ".".join(parts[first:])


def _classifiers(encoder: nn.Module) -> tuple[str, ...]:
    """Names that timm gives the last layers of this network."""
    config: Any = getattr(encoder, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _resample_positions(
    encoder: Any, expected: Mapping[str, Tensor], fitted: dict[str, Tensor]
) -> list[str]:
    """Positions of another number of patches, by timm's function; in place."""
    ours, theirs = expected.get("pos_embed"), fitted.get("pos_embed")
    grid = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    if ours is None or theirs is None or grid is None or ours.ndim != 3 or theirs.ndim != 3:
        return []
    if ours.shape == theirs.shape or ours.shape[2] != theirs.shape[2]:
        return []
    prefix = 0 if getattr(encoder, "no_embed_class", False) else encoder.num_prefix_tokens
    side = round((theirs.shape[1] - prefix) ** 0.5)
    if side * side + prefix != theirs.shape[1]:
        return []
    fitted["pos_embed"] = resample_abs_pos_embed(
        theirs, new_size=list(grid), old_size=[side, side], num_prefix_tokens=prefix
    )
    return [f"positions are resampled from {side} x {side} to {grid[0]} x {grid[1]} patches"]


def _differences(expected: Mapping[str, Tensor], fitted: Mapping[str, Tensor]) -> Iterator[str]:
    """In words, one by one."""
    for key in sorted(expected.keys() - fitted.keys()):
        yield f"{key} is missing"
    for key in sorted(fitted.keys() - expected.keys()):
        yield f"{key} is unknown"
    for key, item in expected.items():
        if key in fitted and fitted[key].shape != item.shape:
            yield f"{key} is {tuple(fitted[key].shape)}, not {tuple(item.shape)}"
