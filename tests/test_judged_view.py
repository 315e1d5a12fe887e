"""What images are judged in: it follows what they are trained in, and does as it is told."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from headrace import training
from headrace.pipelines.ops import CenterCrop, Resize
from headrace.shards.store import open_store
from headrace.training.backbones import EncoderFactory
from headrace.training.catalogue import find_method, method_names
from headrace.training.command_line import parse_command_line
from headrace.training.config import Config
from headrace.training.inputs import feature_pass
from headrace.training.judged_view import following
from headrace.training.preset import ConfigError
from headrace.training.run.export import export
from headrace.training.world import World
from tests.handmade_runs import make_run

EVALUATE = Path(training.__file__).parent / "evaluate.py"


def parse(line: str) -> Config:
    return parse_command_line(line.split(), lambda path: 32)


def sizes(config: Config) -> tuple[int, int]:
    """Pixels of the test view: of the shorter side before the cut, of the square."""
    resize, crop = config.test.views[0].ops
    assert isinstance(resize, Resize)
    assert isinstance(crop, CenterCrop)
    assert isinstance(crop.size, int)
    return resize.size, crop.size


def test_every_presets_own_test_view_stays_as_it_is_declared() -> None:
    for name in method_names():
        for preset in find_method(name).presets.values():
            assert following(preset, preset.augmentation) == preset.test


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--method simclr --preset imagenet", (256, 224)),
        (
            "--method simclr --preset imagenet --augmentation.view.random-resized-crop.size 64",
            (73, 64),
        ),
        (
            "--method dino --preset imagenet --augmentation.global-1.random-resized-crop.size 112 "
            "--augmentation.global-2.random-resized-crop.size 112",
            (128, 112),
        ),
        ("--method simclr --preset cifar --test.size 48", (48, 48)),
        ("--method simclr --preset imagenet --test.size 112 --test.resize 224", (224, 112)),
        (
            "--method simclr --preset imagenet --augmentation.view.random-resized-crop.size 64 "
            "--test.size 96",
            (110, 96),
        ),
    ],
)
def test_it_follows_the_largest_training_view_unless_it_is_told_otherwise(
    line: str, expected: tuple[int, int]
) -> None:
    assert sizes(parse(line)) == expected


def test_it_is_normalised_as_the_training_views_are() -> None:
    config = parse("--method dino --augmentation.mean 0.1 0.2 0.3 --augmentation.std 1 1 1")
    assert (config.augmentation.mean, config.augmentation.std) == ((0.1, 0.2, 0.3), (1, 1, 1))
    assert (config.test.mean, config.test.std) == ((0.1, 0.2, 0.3), (1, 1, 1))
    config = parse("--method dino --test.mean 0 0 0 --test.std 0.5 0.5 0.5")
    assert config.augmentation == find_method("dino").presets["cifar"].augmentation
    assert (config.test.mean, config.test.std) == ((0, 0, 0), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--test.size 0", "--test.size is 0; it must be at least 1"),
        ("--test.resize 24", "--test.resize is 24; it must be at least the side of the square"),
        ("--test.mean 124 116 104", "--test.mean has 124; each must be in [0, 1]"),
        ("--augmentation.std 0 1 1", "--augmentation.std has 0; each must be above 0"),
        ("--augmentation.mean nan 0 0", "--augmentation.mean has nan"),
    ],
)
def test_what_no_view_can_be_is_refused(options: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse(f"--method dino {options}")


def test_the_pass_over_images_has_the_view_and_a_resume_with_another_is_told_apart(
    data: Path,
) -> None:
    config = parse("--method deepcluster --augmentation.view.random-resized-crop.size 16")
    context = feature_pass(
        config, open_store(data, "train"), None, World(), "reference", bf16=False
    )
    _, shapes = next(context.features(Shape()))
    assert shapes[0].tolist() == [3, 16, 16]

    def fingerprint(line: str) -> dict[str, object]:
        return parse(line).fingerprint({}, total_steps=1, precision="fp32", world_size=1)

    assert fingerprint("--method dino") == fingerprint("--method dino --test.size 32")
    assert fingerprint("--method dino") != fingerprint("--method dino --test.size 40")


class Shape:
    """The height and width of what an encoder would be shown, as its features."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        shape = torch.tensor([pixels.shape[1], *pixels.shape[2:]])
        return shape.expand(len(pixels), -1).float()


@pytest.mark.parametrize(
    ("backbone", "options"), [("test_resnet", {}), ("test_vit", {"img_size": 32})]
)
def test_a_run_is_judged_at_another_size(
    data: Path,
    tmp_path: Path,
    backbone: str,
    options: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A ViT resamples its positions; what was judged stands in the line and in the file."""
    make_run(tmp_path / "run", data, "simclr", backbone, options)
    torch.manual_seed(0)
    encoder = EncoderFactory(backbone, options)()
    export(encoder.state_dict(), tmp_path / "run" / "encoder.safetensors")
    judge = runpy.run_path(str(EVALUATE), run_name="judged")["main"]
    line = [str(tmp_path / "run"), "--k", "5", "--engine", "reference"]
    assert judge([*line, "--test.size", "48", "--json", str(tmp_path / "knn.json")]) == 0
    assert "judged at 48 pixels" in capsys.readouterr().out
    result = json.loads((tmp_path / "knn.json").read_text())
    assert [op["size"] for op in result["test_view"]["views"][0]["ops"]] == [48, 48]
    assert judge(line) == 0
    assert "judged at 32 pixels" in capsys.readouterr().out
