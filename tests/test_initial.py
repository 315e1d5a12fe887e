"""Weights that a run starts from: of runs, of timm, of anybody's training; refused where they do
not fit, and said how they were made to."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from headrace.training.backbones import EncoderFactory
from headrace.training.command_line import parse_command_line
from headrace.training.initial import fit_weights, read_initial_weights
from headrace.training.preset import ConfigError
from tests.handmade_runs import make_run

VIT: dict[str, Any] = {"patch_size": 4, "depth": 1}


def network(name: str = "test_resnet", **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return timm.create_model(name, **options)


def loaded(weights: Mapping[str, Tensor]) -> tuple[nn.Module, list[str]]:
    said: list[str] = []
    return EncoderFactory("test_resnet", {}, initial=weights, say=said.extend)(), said


@pytest.mark.parametrize(
    ("ending", "wrapped"),
    [
        (".safetensors", lambda state: state),
        (".pth", lambda state: state),
        (".pt", lambda state: {"state_dict": state, "epoch": 3}),
        (".bin", lambda state: {"model": {f"module.{key}": item for key, item in state.items()}}),
        (
            ".pth",  # as DINO's checkpoints: two networks with heads beside, the teacher is judged
            lambda state: {
                "student": {key: item * 0 for key, item in state.items()},
                "teacher": {f"module.backbone.{key}": item for key, item in state.items()}
                | {"module.head.weight": torch.ones(3)},
            },
        ),
    ],
)
def test_a_classifiers_file_in_any_wrapping_is_an_encoder(
    ending: str, wrapped: Callable[[dict[str, Tensor]], dict[str, Any]], tmp_path: Path
) -> None:
    state = network(num_classes=5).state_dict()
    path = tmp_path / f"weights{ending}"
    saved = wrapped(state)
    if ending == ".safetensors":
        safetensors.torch.save_file(saved, path)
    else:
        torch.save(saved, path)
    encoder, said = loaded(read_initial_weights(path))
    for key, item in encoder.state_dict().items():
        assert torch.equal(item, state[key]), key
    assert said[0] == f"{len(state) - 2} tensors of test_resnet are from there"
    assert "fc.weight" in said[1]


def test_a_file_with_code_or_without_weights_is_refused_unread(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "whole.pth")
    with pytest.raises(ConfigError, match="cannot be read as weights alone"):
        read_initial_weights(tmp_path / "whole.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="holds no state dict of tensors"):
        read_initial_weights(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(ConfigError, match="cannot be read as weights alone"):
        read_initial_weights(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("weights")
    with pytest.raises(ConfigError, match="is no safetensors file"):
        read_initial_weights(tmp_path / "text.safetensors")


def test_other_weights_are_refused_by_the_first_differences() -> None:
    state = network(num_classes=0).state_dict()
    state["conv1.weight"] = torch.zeros(2, 2)
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(ConfigError, match=re.escape("extra.weight is unknown")):
        loaded(state)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
def test_positions_are_resampled_as_timm_does(name: str) -> None:
    small = network(name, img_size=32, num_classes=3, **VIT)
    large: Any = timm.create_model(name, img_size=64, num_classes=0, **VIT)
    weights, said = fit_weights(large, small.state_dict(), name)
    large.load_state_dict(weights)
    assert said[-1] == "positions are resampled from 8 x 8 to 16 x 16 patches"
    # timm's own way of loading a checkpoint of another size
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(small.state_dict(), large)
    assert torch.allclose(weights["pos_embed"], filtered["pos_embed"], atol=1e-6)


def test_the_backbone_and_its_options_are_those_of_the_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "mae"
    options = {"patch_size": 4, "depth": 1, "global_pool": "avg", "fc_norm": False, "img_size": 32}
    make_run(run, data, "mae", "test_vit", options)

    def parsed(line: str) -> tuple[str, dict[str, object]]:
        config = parse_command_line(line.split(), lambda path: 32)
        return config.backbone, dict(config.backbone_options)

    same = {key: value for key, value in options.items() if key != "img_size"}
    line = f"--method supervised --preset cifar --init {run}"
    assert parsed(line) == ("test_vit", same)
    assert parsed(f"{line} --backbone test_vit") == ("test_vit", same)
    assert parsed(f"{line} --backbone-options depth=2") == ("test_vit", {**same, "depth": 2})
    assert parsed(f"{line} --backbone resnet18") == ("resnet18", {})
    # What a method cannot do without goes over what another one had.
    line = f"--method ibot --preset cifar --init {run}"
    assert parsed(line)[1]["global_pool"] == "token"
