"""Every method through train.py, stopped and continued over the end of an epoch, then judged."""

import json
import runpy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from headrace.training.build import trained_encoder
from headrace.training.catalogue import find_method
from headrace.training.data_sets import open_train
from headrace.training.run import checkpoint
from headrace.training.run.record import read_record
from tests.tiny_methods import CLASSES, NAMES, module_of, small_preset, tiny_teacher

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5  # three in an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures of 32 pixels in 16 classes, and 16 more to judge by."""
    root = tmp_path_factory.mktemp("every")
    random = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 16)):
        images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        names = np.array([f"class {label}" for label in range(CLASSES)])
        labels = np.arange(count) % CLASSES
        np.savez(root / f"{split}.npz", images=images, labels=labels, classes=names)
    shards = root.with_name(f"{root.name}-shards")
    convert = runpy.run_path(str(ROOT / "tools/make_shards.py"), run_name="tool")["main"]
    assert convert([str(root), "--out", str(shards), "--workers", "1"]) == 0
    return shards


@pytest.fixture(scope="module")
def train() -> Callable[..., int]:
    return runpy.run_path(str(ROOT / "training/train.py"), run_name="train_under_test")["main"]


def small_options(name: str) -> list[str]:
    """The hyper-parameters of tiny_methods, as the command line takes them."""
    recipe, preset = small_preset(name), module_of(name).PRESETS["cifar"]
    options: list[str] = []
    for field in fields(recipe.objective):
        value: Any = getattr(recipe.objective, field.name)
        if (name, field.name) == ("moco", "negatives"):
            continue  # of its memory bank, which the preset has not
        if value != getattr(preset.objective, field.name):
            values = value if isinstance(value, tuple) else (value,)
            options += [f"--objective.{field.name.replace('_', '-')}", *map(str, values)]
    if preset.augmentation.group > 1:
        options += ["--augmentation.group", str(recipe.augmentation.group)]
    if find_method(name).init_is_teacher:
        options += ["--init", str(tiny_teacher())]
    return options


class StoppedError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_where_it_stopped_and_its_encoder_is_judged(
    name: str, data: Path, train: Callable[..., int], tmp_path: Path
) -> None:
    line = ["--method", name, "--preset", "cifar", "--data.train", str(data), "--data.holdout", "0"]
    line += ["--data.batch-size", "16", "--run.log-every", "1", *small_options(name)]
    line += ["--data.engine", "reference", "--run.save-every", "1", "--run.steps", str(STEPS)]

    def save_and_stop(*arguments: Any) -> None:
        save_step(*arguments)
        if arguments[1]["step"] == 2:
            raise StoppedError

    save_step = checkpoint.save_step
    with torch.random.fork_rng(devices=[]):
        assert train([*line, "--run.out", str(tmp_path / "whole")]) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save_step", save_and_stop)
            with pytest.raises(StoppedError):
                train([*line, "--run.out", str(tmp_path / "stopped")])
        assert train([*line, "--run.out", str(tmp_path / "stopped")]) == 0
        losses = {
            run: [json.loads(entry)["loss"] for entry in metrics.read_text().splitlines()]
            for run in ("whole", "stopped")
            for metrics in [tmp_path / run / "metrics.jsonl"]
        }
        assert len(losses["whole"]) == STEPS
        assert all(loss is not None for loss in losses["whole"])
        assert losses["stopped"] == losses["whole"]
        judge = runpy.run_path(str(ROOT / "training/evaluate.py"), run_name="judged")["main"]
        judged = [str(tmp_path / "stopped"), "--k", "5", "--json", str(tmp_path / "knn.json")]
        assert judge(judged) == 0
    result = json.loads((tmp_path / "knn.json").read_text())
    assert result["step"] == STEPS
    own_networks = {"cmc", "cpc", "deepcluster"}  # of several timm models, or in front of one
    assert (tmp_path / "whole" / "encoder").is_dir() == (name not in own_networks)
    if name not in own_networks:
        encoder = trained_encoder(read_record(tmp_path / "whole"), open_train(data)).eval()
        network = timm.create_model(f"local-dir:{tmp_path / 'whole/encoder'}", pretrained=True)
        pictures = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(pictures), encoder(pictures))
