"""What cannot mean anything is refused in one sentence, before anything runs."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headrace import training
from headrace.training.backbones import EncoderFactory, resolve_options
from headrace.training.build import with_backbone
from headrace.training.catalogue import find_method, method_names
from headrace.training.command_line import parse_command_line
from headrace.training.first_words import highest_rate
from headrace.training.optim import Schedule
from headrace.training.preset import ConfigError, Optim

TRAIN = Path(training.__file__).parent / "train.py"
Train = Callable[[str], int]


@pytest.fixture(scope="module")
def train(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train("options") on the three colours, a few steps of the reference engine."""
    main = runpy.run_path(str(TRAIN), run_name="train_under_test")["main"]
    runs = tmp_path_factory.mktemp("runs")

    def call(options: str) -> int:
        line = f"--data.train {data} --preset cifar --data.engine reference --run.steps 1 {options}"
        if "--run.out" not in line:
            line += f" --run.out {runs / str(abs(hash(options)))}"
        with torch.random.fork_rng(devices=[]):
            return main(line.split())

    return call


# ------------------------------------------------------------------------------------- backbones


def backbone_refusal(options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        with_backbone(parse_command_line(options.split(), lambda path: 32))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--method simclr --backbone resnet999", "has no model 'resnet999'"),
        ("--method simclr --backbone-options in_chans=1", "pictures have three channels"),
        ("--method dino --backbone convnext_atto", "cannot take views of 16 pixels"),
        ("--method moco_v3 --backbone vit_tiny_patch16_224 --backbone-options patch_size=64",
         "no multiple of its patches of 64 pixels"),
        ("--method moco_v3 --backbone vit_small_patch14_dinov2",
         "views of 32 pixels, which are no multiple of its patches of 14 pixels: the rest would "
         "never be seen; take views of 28"),
        ("--method moco_v3 --backbone test_vit --backbone-options patch_size=5", "views of 30"),
        ("--method simclr --backbone resnet18 --backbone-options global_pool=",
         "not one vector per image"),
        ("--method simclr --backbone resnet18 --backbone-options features_only=True",
         "not one vector per image"),
        ("--method mae --backbone resnet18", "mae needs a plain ViT"),
        ("--method ijepa --backbone swin_tiny_patch4_window7_224", "ijepa needs a plain ViT"),
        ("--method dino --backbone swin_tiny_patch4_window7_224 --test.size 30", "30 pixels"),
    ],
)  # fmt: skip
def test_a_backbone_that_cannot_do_it_is_refused_before_anything_is_opened(
    options: str, sentence: str
) -> None:
    assert sentence in backbone_refusal(options)


def test_every_presets_backbone_takes_its_views() -> None:
    """The large ones too: nothing of them is in memory."""
    for name in method_names():
        method = find_method(name)
        for preset in method.presets:
            config = parse_command_line(["--method", name, "--preset", preset], lambda path: 32)
            assert with_backbone(config).backbone_options is not None


def test_a_network_whose_kernel_is_broken_for_channels_last_trains() -> None:
    """FastViT's first layer, without which torch writes beside its memory on CPUs."""
    encoder = EncoderFactory("fastvit_t8", resolve_options("fastvit_t8", {}, (112,), 112))()
    views = torch.randn(4, 3, 112, 112).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        encoder(views).sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_stochastic_depth_of_the_backbone_has_its_own_option() -> None:
    for name in ("dino", "ibot", "dinov2", "deit", "supervised", "spark"):
        with pytest.raises(ConfigError, match=r"say --objective\.drop-path 0\.2"):
            parse_command_line(
                ["--method", name, "--backbone-options", "drop_path_rate=0.2"], lambda path: 32
            )


@pytest.mark.parametrize("method", ["byol", "moco_v3", "dino", "relic"])
def test_dropout_never_reaches_a_network_that_is_not_trained(method: str, train: Train) -> None:
    with pytest.raises(ConfigError, match=rf"drop_rate=0.1: {method} has a network"):
        train(f"--method {method} --data.batch-size 8 --backbone-options drop_rate=0.1")


def test_dropout_of_networks_that_are_all_trained_is_fine(train: Train) -> None:
    options = "--backbone test_resnet --backbone-options drop_rate=0.1"
    assert train(f"--method simclr --data.batch-size 8 {options}") == 0


def test_patches_are_no_class_tokens(train: Train) -> None:
    options = "--backbone-options class_token=False global_pool=avg"
    with pytest.raises(ConfigError, match="ibot compares class tokens"):
        train(f"--method ibot --data.batch-size 8 {options}")


# ----------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--method simclr --data.batch-size 8 --run.accumulate 8", "needs 2 at once"),
        ("--method simclr --data.batch-size 1", "needs 2 at once"),
        ("--method vicreg --data.batch-size 1", "needs 2 at once"),
        ("--method barlow_twins --data.batch-size 2 --run.accumulate 2", "needs 2 at once"),
        ("--method byol --data.batch-size 1", "batch norm needs at least 2 images at once"),
        ("--method simclr --data.batch-size 100", "more than the 60 images that there are to "
         "train on: at most 60"),
    ],
)  # fmt: skip
def test_too_few_images_at_once_are_refused(options: str, sentence: str, train: Train) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        train(f"{options} --backbone test_resnet")


def test_a_presets_batch_gives_way_to_a_small_set_and_says_so(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(f"--method simclr --backbone test_resnet --run.out {tmp_path / 'run'}") == 0
    said = capsys.readouterr().out
    assert re.search(r"batches of 32, not the preset's \d+, as there are 60 images", said)
    assert "the learning rate goes with it (--data.batch-size)" in said
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["config"]["data"]["batch_size"] == 32
    rate = recorded["config"]["optim"]["learning_rate"]
    assert recorded["derived"]["learning_rate"] == pytest.approx(rate * 32 / 256)


def test_a_wrong_teacher_is_found_before_the_first_step(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="regnety"):
        train(f"--method deit --objective.teacher timm:regnety_999 --run.out {out}")
    assert not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text()


# ------------------------------------------------------------------------------------ its length


def test_what_lasts_longer_than_the_run_is_said_with_the_rate_that_is_reached(
    train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = (
        "--method dino --backbone test_resnet --data.batch-size 16 --optim.warmup-epochs 10 "
        f"--objective.freeze-last-layer-epochs 5 --run.log-every 1 --run.out {tmp_path / 'run'}"
    )
    assert train(f"{options} --run.steps 3") == 0
    said = capsys.readouterr().out
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    highest = max(json.loads(line)["learning_rate"] for line in metrics)
    assert f"peak learning rate {highest:.3g}" in said
    assert "--optim.warmup-epochs 10 is no shorter than the run of 1 epoch(s)" in said
    assert f"reaches {highest:.3g}, not" in said
    assert "--objective.freeze-last-layer-epochs 5 is no shorter than" in said
    assert "warmup-teacher" not in said


def test_the_peak_that_is_said_is_the_highest_rate_of_all_steps() -> None:
    for changes, steps in (({}, 97), ({"warmup_epochs": 3.0}, 10), ({"warmup_epochs": 0.0}, 5)):
        for name in ("cosine", "constant"):
            declared = Optim(schedule=name, warmup_from=1e-3, **changes)  # pyright: ignore[reportArgumentType]
            schedule = Schedule(declared, 64, steps / 7)
            every = [schedule.learning_rate_at(step / steps) for step in range(steps)]
            assert highest_rate(schedule, steps) == max(every)
