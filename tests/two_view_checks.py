"""What BYOL, SimSiam, Barlow Twins and VICReg promise alike, beyond the contract of all methods."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from headrace.pipelines import recipes
from headrace.training.method import Facts
from headrace.training.preset import ConfigError, Preset
from tests.tiny_methods import batch_of, build, module_of, progress_at


def assert_each_view_has_batch_norm_of_its_own(name: str) -> None:
    method, batch = build(name, "test_resnet"), batch_of(name)
    other = replace(batch, views=(batch.views[0], batch.views[1].flip(0)))
    first, second = (method.embed(each, progress_at(0)) for each in (batch, other))
    for key, value in first.items():
        assert torch.equal(value[:, 0], second[key][:, 0]), key
        assert not torch.equal(value[:, 1], second[key][:, 1]), key


def assert_takes_two_views(name: str) -> None:
    def no_encoder(**options: object) -> Any:
        raise AssertionError(f"nothing is built of {options}")

    module = module_of(name)
    with pytest.raises(ConfigError, match=f"{name} needs two views, and the augmentation has 3"):
        module.build(module.Objective(), no_encoder, Facts(10, 64, (32, 32, 16), 16, 4, 20))


def assert_a_collapse_is_logged(name: str) -> None:
    """Heads that forget their input: the loss may not tell, the spread does."""
    method, batch = build(name, "test_resnet"), batch_of(name)
    healthy = method(batch, progress_at(0))[0]["spread"]
    for key, parameter in method.named_parameters():
        if key.startswith(("projection", "teacher_projection")):
            # Nothing is left of the input but the last batch norm's rounding error.
            parameter.detach().zero_()
    collapsed = method(batch, progress_at(0))[0]["spread"]
    assert healthy > 0.3
    assert collapsed < 0.01


def assert_residual_blocks_start_as_identities(name: str) -> None:
    """`zero_init_residual` of all their codes is what timm does unless told otherwise."""
    preset: Preset = module_of(name).PRESETS["imagenet"]
    assert (preset.backbone, dict(preset.backbone_options)) == ("resnet50", {})
    last = timm.create_model("resnet50", num_classes=0).get_submodule("layer1.0.bn3").weight
    assert isinstance(last, Tensor)
    assert not last.any()


def assert_views_are_those_of_barlow_twins(name: str) -> None:
    """barlowtwins main.py and vicreg augmentations.py, the same in both."""
    preset: Preset = module_of(name).PRESETS["imagenet"]
    kinds = [[type(op).__name__ for op in view.ops] for view in preset.augmentation.views]
    shared = ["RandomResizedCrop", "Flip", "ColorJitter", "Grayscale", "GaussianBlur"]
    assert kinds == [shared, [*shared, "Solarize"]]
    crop = preset.augmentation.views[0].ops[0]
    assert crop == replace(recipes.byol().views[0].ops[0])
    assert preset.augmentation.name == name
