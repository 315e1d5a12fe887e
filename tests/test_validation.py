"""What a run says of images that it does not train on, and that it says so without a trace."""

import json
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import training
from headrace.shards.store import open_store
from headrace.training.class_numbers import numbered_alike
from headrace.training.collapse import collapse_in_words
from headrace.training.command_line import parse_command_line
from headrace.training.inputs import feature_pass
from headrace.training.method import Method
from headrace.training.preset import ConfigError
from headrace.training.run.directory import CheckpointError
from headrace.training.validation import Validation, prepare_validation
from headrace.training.world import World
from tests.handmade_runs import make_images
from tests.tiny_methods import ENCODERS, NAMES, build, progress_at, refusal, small_preset

TRAIN = Path(training.__file__).parent / "train.py"
Train = Callable[[str], int]


@pytest.fixture(scope="module")
def train() -> Train:
    main = runpy.run_path(str(TRAIN), run_name="train_under_test")["main"]

    def call(options: str) -> int:
        with torch.random.fork_rng(devices=[]):
            return main(options.split())

    return call


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def small_run(data: Path, out: Path, method: str = "simclr") -> str:
    return (
        f"--method {method} --preset cifar --backbone test_resnet --data.train {data} "
        f"--run.out {out} --data.batch-size 16 --run.steps 6 --run.log-every 1 "
        f"--data.engine reference "
    )


def test_loss_and_neighbours_are_told_and_training_does_not_notice(
    data: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same run with and without: equal losses, and a loss and kNN of val besides."""
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert train(small_run(data, plain)) == 0
    capsys.readouterr()
    assert train(small_run(data, watched) + f"--data.val {data}") == 0
    shown = capsys.readouterr().out
    assert "judged at 32 pixels" in shown
    assert "val: 21 images for val_loss (of 16 in batches of 16), val_knn_top1 (k = 20)" in shown
    assert [line["loss"] for line in metrics(watched)] == [line["loss"] for line in metrics(plain)]
    told = [line for line in metrics(watched) if "val_loss" in line]
    assert [line["step"] for line in told] == [3, 6]
    assert all(line["val_loss"] > 0 and 0 <= line["val_knn_top1"] <= 1 for line in told)
    judge = runpy.run_path(str(TRAIN.parent / "evaluate.py"), run_name="judged")["main"]
    line = [str(watched), "--k", "20", "--data.val", str(data), "--json", str(tmp_path / "k.json")]
    assert judge([*line, "--batch-size", "16"]) == 0
    top1 = json.loads((tmp_path / "k.json").read_text())["results"]["20"]["top1"]
    assert told[-1]["val_knn_top1"] == pytest.approx(top1 / 100)


def test_a_holdout_without_labels_has_a_loss(
    data: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted((data / "train").rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(image.read_bytes())
    assert train(small_run(flat, tmp_path / "run") + "--data.holdout 0.3") == 0
    shown = capsys.readouterr().out
    assert "no kNN, as 18 of them and 42 training images have no label" in shown
    assert metrics(tmp_path / "run")[-1]["holdout_loss"] > 0
    with pytest.raises(ConfigError, match="npid has nothing to say of these images"):
        train(small_run(flat, tmp_path / "npid", "npid") + "--data.holdout 0.3")


def test_a_set_that_is_not_there_is_found_before_the_first_step(
    data: Path, tmp_path: Path, train: Train
) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        train(small_run(data, tmp_path / "run") + f"--data.val {tmp_path}/nowhere")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ------------------------------------------------------------------------------------ every method


def prepared(name: str, data: Path) -> tuple[Method, Validation]:
    """A tiny method and what --data.val makes of it."""
    encoder = next(encoder for encoder in ENCODERS if not refusal(name, encoder))
    method = build(name, encoder)
    preset = small_preset(name)
    line = f"--method {name} --preset cifar --data.val {data} --data.batch-size 16"
    config = replace(
        parse_command_line(line.split(), lambda path: 32), augmentation=preset.augmentation
    )
    store = open_store(data, "train")
    images = feature_pass(config, store, None, World(), "reference", bf16=False)
    return method, prepare_validation(config, method, images)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "relic_v2"])
def test_no_state_changes_and_the_same_is_said_again(name: str, data: Path) -> None:
    method, validation = prepared(name, data)
    method.train()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    first = validation.measure(method, progress_at(1))
    assert validation.measure(method, progress_at(1)) == first
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in method.parameters())
    assert {"val_loss", "val_knn_top1", "val_top1"}.intersection(first)
    assert ("val_loss" in first) is not method.knows_training_images_only
    assert all(np.isfinite(value) for value in first.values())


# -------------------------------------------------------------------------------- names of classes


@pytest.fixture
def two_of_three(data: Path, tmp_path: Path) -> Path:
    """A val whose first class is the second one of train."""
    make_images(tmp_path / "val", 4, seed=2)
    for image in (tmp_path / "val" / "blue").iterdir():
        image.unlink()
    (tmp_path / "val" / "blue").rmdir()
    return tmp_path / "val"


def test_a_set_that_lacks_a_class_is_numbered_by_the_training_sets_names(
    data: Path, two_of_three: Path
) -> None:
    train, val = open_store(data, "train"), open_store(two_of_three)
    alike = numbered_alike(train, val)
    ids = np.arange(len(val))
    assert val.labels(ids).tolist() == [0] * 4 + [1] * 4
    assert alike.labels(ids).tolist() == [1] * 4 + [2] * 4
    assert alike.classes == train.classes == ("blue", "green", "red")
    assert (alike.uri, len(alike), alike.names(ids)) == (val.uri, 8, val.names(ids))
    assert numbered_alike(train, train) is train


def test_training_and_judging_number_it_alike(
    data: Path, two_of_three: Path, tmp_path: Path, train: Train
) -> None:
    """Trained on three colours that are easily told apart: green and red are not blue and green."""
    options = f"--data.val {two_of_three} --run.steps 40 --run.log-every 40 --optim.warmup-epochs 0"
    line = small_run(data, tmp_path / "run", "supervised").replace("--run.steps 6", "")
    assert train(line.replace("--run.log-every 1 ", "") + options) == 0
    assert metrics(tmp_path / "run")[-1]["val_top1"] > 0.7


def test_other_classes_are_refused_by_name(data: Path, tmp_path: Path, train: Train) -> None:
    make_images(tmp_path / "val", 2, seed=2)
    (tmp_path / "val" / "blue").rename(tmp_path / "val" / "violet")
    for method in ("supervised", "simclr"):
        with pytest.raises(ConfigError, match=re.escape("1 of the second, such as 'violet'")):
            train(small_run(data, tmp_path / method, method) + f"--data.val {tmp_path / 'val'}")


def test_a_classifier_is_not_judged_by_images_without_labels(
    data: Path, tmp_path: Path, train: Train
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted((data / "test").rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(image.read_bytes())
    with pytest.raises(ConfigError, match=r"none of the 21 images of .* has a label"):
        train(small_run(data, tmp_path / "run", "supervised") + f"--data.val {flat}")


# --------------------------------------------------------------------------- what is kept, and said


def test_encoders_are_kept_and_judged_like_runs(
    data: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = f"--data.val {data} --run.keep-every 2 --run.keep-best val_loss "
    assert train(small_run(data, out) + options + "--run.evaluate-every 0.3") == 0
    assert {path.name for path in (out / "kept").iterdir()} == {
        "step-2",
        "step-4",
        "step-6",
        "best",
    }
    losses = {line["step"]: line["val_loss"] for line in metrics(out) if "val_loss" in line}
    best = json.loads((out / "kept" / "best" / "config.json").read_text())["derived"]
    assert losses[best["kept_step"]] == min(losses.values()) == best["best"]["value"]
    last = (out / "encoder.safetensors").read_bytes()
    assert (out / "kept" / "step-6" / "encoder.safetensors").read_bytes() == last
    assert (out / "kept" / "step-2" / "encoder.safetensors").read_bytes() != last
    judge = runpy.run_path(str(TRAIN.parent / "evaluate.py"), run_name="judged")["main"]
    capsys.readouterr()
    assert judge([str(out / "kept" / "step-4"), "--k", "5", "--data.val", str(data)]) == 0
    assert "after 4 steps" in capsys.readouterr().out


def test_what_is_never_measured_is_never_best(data: Path, tmp_path: Path, train: Train) -> None:
    with pytest.raises(ConfigError, match=r"measures nothing; give it --data.val"):
        train(small_run(data, tmp_path / "a") + "--run.keep-best val_loss")
    with pytest.raises(ConfigError, match="this run measures val_loss, val_knn_top1"):
        train(small_run(data, tmp_path / "b") + f"--run.keep-best val_top1 --data.val {data}")


def test_a_collapse_is_said_in_words() -> None:
    objective = small_preset("dino", out_dim=64).objective
    assert "all 64 prototypes alike" in collapse_in_words({"teacher_entropy": 4.1588}, objective)
    assert "one prototype for every image" in collapse_in_words({"teacher_entropy": 0}, objective)
    assert collapse_in_words({"teacher_entropy": 2.0, "loss": 1.0}, objective) == ""
    assert "one direction" in collapse_in_words({"spread": 0.001}, small_preset("byol").objective)
    assert collapse_in_words({"spread": 0.5}, small_preset("byol").objective) == ""


def test_a_run_that_collapses_says_so(
    data: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--objective.teacher-temperature 1 --objective.warmup-teacher-temperature 1"
    assert train(small_run(data, tmp_path / "run", "dino") + options) == 0
    assert "prototypes alike, whatever the image" in capsys.readouterr().out


def test_a_longer_run_names_a_way_and_micro_batches_of_mae_may_change(
    data: Path, tmp_path: Path, train: Train
) -> None:
    line = small_run(data, tmp_path / "run", "mae").replace("--backbone test_resnet", "")
    assert train(line) == 0
    with pytest.raises(CheckpointError, match=r"--init .*run and another --run\.out"):
        train(line.replace("--run.steps 6", "--run.steps 9"))
    assert train(line + "--run.accumulate 2") == 0
    other = small_run(data, tmp_path / "other")
    assert train(other) == 0
    with pytest.raises(CheckpointError, match="accumulate was 1 and is 2"):
        train(other + "--run.accumulate 2")
