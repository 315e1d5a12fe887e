"""A data set of three colours and a run of it, made by hand; used by several test files.

conftest.py has them as the fixtures `data` and `run`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from headrace.training.backbones import EncoderFactory
from headrace.training.catalogue import find_method
from headrace.training.config import Config, Data, Run
from headrace.training.run.export import export

COLOURS = {"blue": (40, 60, 180), "green": (40, 160, 60), "red": (190, 50, 40)}


def make_images(folder: Path, per_class: int, seed: int) -> None:
    """Noise around a colour per class: what any encoder can tell apart."""
    generator = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.normal(colour, 40, size=(32, 32, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03d}.png")


def make_run(
    directory: Path,
    data: Path,
    method: str,
    backbone: str,
    options: dict[str, Any],
    samples: int = 60,
) -> None:
    """The config.json of a run with a method's CIFAR preset, but for the backbone. A teacher is
    named where one is needed; judging does not open it."""
    directory.mkdir()
    declared = find_method(method)
    preset = declared.presets["cifar"]
    objective = preset.objective
    if getattr(objective, "teacher", None) == "":
        objective = replace(objective, teacher="runs/teacher")
    config = Config(
        method=method,
        preset="cifar",
        backbone=backbone,
        backbone_options=options,
        init=Path("runs/teacher") if declared.init_is_teacher else None,
        data=Data(train=data, batch_size=preset.batch_size),
        optim=preset.optim,
        run=Run(out=directory, steps=30, seed=5),
        objective=objective,
        augmentation=preset.augmentation,
        test=preset.test,
    )
    described = {
        "config": config.declaration(),
        "derived": {"steps": 30},
        "fingerprint": {"stream": {"engine": {"name": "reference"}, "order": {"samples": samples}}},
    }
    (directory / "config.json").write_text(json.dumps(described))


def make_finished_run(directory: Path, data: Path) -> None:
    """A run of dino with a small encoder, as training leaves it, but for what is not read here."""
    make_run(directory, data, "dino", "test_resnet", {})
    torch.manual_seed(0)
    export(EncoderFactory("test_resnet", {})().state_dict(), directory / "encoder.safetensors")
    torch.save({"format": 1, "step": 30}, directory / "checkpoint.pt")
    lines = [
        {
            "step": step,
            "epoch": step / 3,
            "loss": 8 - step / 10 if step != 20 else None,
            "images_per_second": 100.0 + step,
            "wait_share": 0.25,
        }
        for step in range(5, 31, 5)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
