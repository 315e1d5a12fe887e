"""A run's weights as timm reads them: written with each checkpoint, and read where a run begins."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from headrace.shards.atomic import atomic_file
from headrace.training.preset import ConfigError
from headrace.training.run.directory import ENCODER_FILE


def export(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a timm model's state dict, atomically, so that timm reads it:

        timm.create_model(NAME, num_classes=0, checkpoint_path="RUN/encoder.safetensors",
                          **backbone_options)

    with the `backbone_options` that RUN/config.json records.
    """
    kept = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    with atomic_file(path) as file:
        file.write(safetensors.torch.save(kept, metadata={"format": "pt"}))


def with_classifier(encoder: nn.Module, *classifiers: nn.Linear) -> dict[str, Tensor]:
    """The state dict of the same timm model with `classifiers` as its last layers.

    {} where the encoder does not say what it calls them.
    """
    config = getattr(encoder, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    if len(names) != len(classifiers):
        return {}
    state = dict(encoder.state_dict())
    for name, classifier in zip(names, classifiers, strict=True):
        state |= {f"{name}.{key}": value for key, value in classifier.state_dict().items()}
    return state


def read_initial(run: Path) -> dict[str, Tensor]:
    """The encoder's weights out of a run's directory (or of one .safetensors file)."""
    path = run / ENCODER_FILE if run.is_dir() else run
    if not path.is_file():
        raise ConfigError(f"--init {run} holds no {ENCODER_FILE}")
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is no safetensors file: {error}") from error
