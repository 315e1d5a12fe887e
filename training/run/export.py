"""A run's weights as timm reads them: written with each checkpoint, and read where a run begins.

    timm.create_model("local-dir:RUN/encoder", pretrained=True)

reads RUN/encoder, which holds the weights and what they expect: the network's options, the size of
the pictures, and how these are resized, cropped and normalised.
"""

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

# Not among timm's documented names; the test that reads what it wrote holds both to each other.
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from headrace.pipelines.ops import CenterCrop, Resize
from headrace.pipelines.recipe import Augmentation
from headrace.shards.atomic import PARTIAL_SUFFIX, atomic_file
from headrace.training.preset import ConfigError
from headrace.training.run.directory import ENCODER_FILE

_WEIGHTS_FILE, _CONFIG_FILE = "model.safetensors", "config.json"  # timm's names


@dataclass(frozen=True)
class TimmConfig:
    """What timm needs besides weights: the content of a config.json, or why there can be none.

    classes: names by label, () for none. needs_import: the module that has to be imported first,
    where timm has no such model by itself.
    """

    content: Mapping[str, Any] | None
    classes: tuple[str, ...] = ()
    refusal: str = ""
    needs_import: str = ""


def timm_config(encoder: nn.Module, test: Augmentation, classes: Sequence[str]) -> TimmConfig:
    """Of an encoder that is judged in the view `test`, trained on images of these classes."""
    names = tuple(classes)
    preprocessing = _preprocessing(test)
    if not hasattr(encoder, "pretrained_cfg"):
        refusal = f"a {type(encoder).__name__} is no timm model by itself"
        return TimmConfig(None, names, refusal)
    if preprocessing is None:
        return TimmConfig(
            None, names, "its test view is no square cut from the centre of a resized picture"
        )
    named = {"label_names": list(names)} if names else {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / _CONFIG_FILE
        try:
            save_config_for_hf(encoder, str(path), named, data_config=preprocessing)
        except ValueError as error:  # an option that JSON cannot hold
            return TimmConfig(None, names, f"timm cannot describe it ({error})")
        content = json.loads(path.read_text(encoding="utf-8"))
    module = type(encoder).__module__
    known = module.startswith("timm.")
    return TimmConfig(content, names, needs_import="" if known else module.rpartition(".")[0])


def _preprocessing(test: Augmentation) -> dict[str, Any] | None:
    """The test view in timm's words; None where it has none for it."""
    view = test.flat_views[0]
    match view.ops, view.shape:
        case (
            (Resize(size=resized, interpolation=interpolation), CenterCrop()),
            (int() as pixels, width),
        ) if pixels == width:  # timm resizes for an oblong in another way
            return {
                "input_size": (len(test.mean), pixels, pixels),
                "interpolation": interpolation,
                "crop_pct": _crop_share(pixels, resized),
                "crop_mode": "center",
                "mean": test.mean,
                "std": test.std,
            }
        case _:
            return None


def _crop_share(pixels: int, resized: int) -> float:
    """The share that timm turns into `resized` again: it resizes to floor(pixels / share)."""
    share = pixels / resized
    return share if math.floor(pixels / share) == resized else math.nextafter(share, 0)


def export(weights: Mapping[str, Tensor], path: Path, classes: Sequence[str] = ()) -> None:
    """Write a timm model's state dict, atomically, with the classes' names in its metadata."""
    kept = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    metadata = {"format": "pt"}
    if classes:
        metadata["label_names"] = json.dumps(list(classes))
    with atomic_file(path) as file:
        file.writelines(_in_order(safetensors.torch.save(kept, metadata=metadata)))


def _in_order(saved: bytes) -> tuple[bytes, bytes, memoryview]:
    """The same file in parts, equal for equal weights: the library shuffles the metadata."""
    start = 8 + int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little"), text, memoryview(saved)[start:]


def export_all(
    exports: Mapping[str, Mapping[str, Tensor]],
    directory: Path,
    network: TimmConfig,
) -> None:
    """Write each of `Method.exports` as NAME.safetensors, and as the directory NAME for timm."""
    for name, weights in exports.items():
        path = directory / f"{name}.safetensors"
        export(weights, path, network.classes)
        if network.content is None:
            continue
        content = dict(network.content)
        if name != ENCODER_FILE.partition(".")[0]:
            content = _with_classes(content, len(network.classes))
        (directory / name).mkdir(exist_ok=True)
        with atomic_file(directory / name / _CONFIG_FILE) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
        _share_file(path, directory / name / _WEIGHTS_FILE)


def _with_classes(content: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """The same network with its last layer."""
    changed = {"num_classes": classes}
    return {
        **content,
        **changed,
        "model_args": {**content.get("model_args", {}), **changed},
        "pretrained_cfg": {**content["pretrained_cfg"], **changed},
    }


def _share_file(path: Path, second: Path) -> None:
    """A second name of the same file, atomically; a copy where the file system has no links."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        os.link(path, partial)
    except OSError:
        with atomic_file(second) as file:
            file.write(path.read_bytes())
    else:
        os.replace(partial, second)


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
