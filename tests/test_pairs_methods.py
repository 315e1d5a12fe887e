"""What BYOL, SimSiam, Barlow Twins and VICReg do beyond the contract that all methods share."""

import math
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from headrace.pipelines import recipes
from headrace.training.method import Facts, Method
from headrace.training.methods.byol import Byol
from headrace.training.methods.simsiam import SimSiam
from headrace.training.optim import Schedule, build_optimizer
from headrace.training.preset import ConfigError, Preset
from tests.tiny_methods import batch_of, build, module_of, progress_at, sgd, train_step

NAMES = ["byol", "simsiam", "barlow_twins", "vicreg"]


@pytest.mark.parametrize("name", NAMES)
def test_each_view_is_a_batch_of_its_own_to_batch_norm(name: str) -> None:
    method, batch = build(name, "test_resnet"), batch_of(name)
    other = replace(batch, views=(batch.views[0], batch.views[1].flip(0)))
    first, second = (method.embed(each, progress_at(0)) for each in (batch, other))
    for key, value in first.items():
        assert torch.equal(value[:, 0], second[key][:, 0]), key
        assert not torch.equal(value[:, 1], second[key][:, 1]), key


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_two_views(name: str) -> None:
    def no_encoder(**options: object) -> Any:
        raise AssertionError(f"nothing is built of {options}")

    module = module_of(name)
    with pytest.raises(ConfigError, match=f"{name} needs two views, and the augmentation has 3"):
        module.build(module.Objective(), no_encoder, Facts(10, 64, (32, 32, 16), 16, 4, 20))


@pytest.mark.parametrize("name", NAMES)
def test_a_collapse_is_logged(name: str) -> None:
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


def test_residual_blocks_start_as_identities() -> None:
    """`zero_init_residual` of all four codes is what timm does unless told otherwise."""
    for name in NAMES:
        recipe: Preset = module_of(name).PRESETS["imagenet"]
        assert (recipe.backbone, dict(recipe.backbone_options)) == ("resnet50", {})
    last = timm.create_model("resnet50", num_classes=0).get_submodule("layer1.0.bn3").weight
    assert isinstance(last, Tensor)
    assert not last.any()


# ---- BYOL


def byol() -> Byol:
    method = build("byol", "test_resnet", teacher_momentum=0.9)
    assert isinstance(method, Byol)
    return method


def parameters(*modules: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def test_byol_target_starts_from_weights_of_its_own() -> None:
    method = byol()
    for online, target in [
        (method.encoder, method.teacher),
        (method.projection, method.teacher_projection),
    ]:
        pairs = zip(parameters(online), parameters(target), strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)


@pytest.mark.parametrize("step", [0, 7, 19])
def test_byol_target_follows_the_updated_network(step: int) -> None:
    """byol schedules.py, target_ema, and byol_experiment.py, _update_fn: after the optimiser, with
    this step's momentum."""
    method, batch = byol(), batch_of("byol")
    before = parameters(method.teacher, method.teacher_projection)
    train_step(method, sgd(method, 0.1), [batch], progress_at(step))
    momentum = 1 - (1 - 0.9) * (math.cos(math.pi * step / 20) + 1) / 2
    online = parameters(method.encoder, method.projection)
    after = parameters(method.teacher, method.teacher_projection)
    for old, new, target in zip(before, online, after, strict=True):
        torch.testing.assert_close(target, old + (1 - momentum) * (new - old))


def test_byol_target_keeps_its_own_running_statistics() -> None:
    """They come from its own features, in training mode; a copy would be the online network's."""
    method, batch = byol(), batch_of("byol")
    method.train()
    key = "running_mean"
    start = {name: b.clone() for name, b in method.teacher.named_buffers() if name.endswith(key)}
    train_step(method, sgd(method), [batch], progress_at(0))
    online = dict(method.encoder.named_buffers())
    now = dict(method.teacher.named_buffers())
    assert start
    for name, value in start.items():
        assert not torch.equal(now[name], value), name
        assert not torch.equal(now[name], online[name]), name


def test_byol_gradient_stops_at_the_target() -> None:
    method, batch = byol(), batch_of("byol")
    embeddings = method.embed(batch, progress_at(0))
    assert embeddings["prediction"].requires_grad
    assert not embeddings["target"].requires_grad


# ---- optimiser groups


def rates(method: Method, recipe: Preset, progress: float) -> list[tuple[set[int], float, float]]:
    """(ids of parameters, learning rate, weight decay) per group, as the optimiser takes them."""
    schedule = Schedule(recipe.optim, recipe.batch_size, recipe.epochs)
    optimizer = build_optimizer(method.param_groups(), schedule)
    schedule.apply(optimizer, progress)
    return [
        ({id(p) for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.9])
def test_simsiam_predictor_keeps_its_learning_rate(progress: float) -> None:
    method = build("simsiam", "test_resnet")
    assert isinstance(method, SimSiam)
    recipe: Preset = module_of("simsiam").PRESETS["imagenet"]
    predictor = {id(p) for p in method.prediction.parameters()}
    others = {id(p) for p in method.parameters()} - predictor
    groups = rates(method, recipe, progress)
    assert [group[0] for group in groups] == [others, predictor]
    assert groups[0][1] == pytest.approx(0.1 * (1 + math.cos(math.pi * progress)) / 2)
    assert groups[1][1] == pytest.approx(0.1)
    # Biases and norms too.
    assert [group[2] for group in groups] == [1e-4, 1e-4]


def test_barlow_twins_biases_and_norms_have_a_learning_rate_of_their_own() -> None:
    """barlowtwins main.py: 0.2 and 0.0048, times batch / 256, after ten epochs of warm-up."""
    recipe: Preset = module_of("barlow_twins").PRESETS["imagenet"]
    scale = recipe.objective.bias_learning_rate_scale
    method = build("barlow_twins", "test_resnet", bias_learning_rate_scale=scale)
    weights, others = rates(method, recipe, 10 / 1000)
    assert weights[1:] == (pytest.approx(0.2 * 8), 1e-6)
    assert others[1:] == (pytest.approx(0.0048 * 8), 0.0)
    assert others[0] == {id(p) for p in method.parameters() if p.ndim == 1}
    ends = rates(method, recipe, 1.0)
    assert [group[1] for group in ends] == [pytest.approx(0.0016), pytest.approx(3.84e-5)]


def test_barlow_twins_loss_scale_multiplies_the_loss() -> None:
    batch = batch_of("barlow_twins")
    whole, part = (
        build("barlow_twins", "test_resnet", loss_scale=scale)(batch, progress_at(0))[0]["loss"]
        for scale in (1.0, 1 / 32)
    )
    torch.testing.assert_close(part, whole / 32)


# ---- views


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_views_are_the_code_s(name: str) -> None:
    """barlowtwins main.py and vicreg augmentations.py, the same in both."""
    recipe: Preset = module_of(name).PRESETS["imagenet"]
    kinds = [[type(op).__name__ for op in view.ops] for view in recipe.augmentation.views]
    shared = ["RandomResizedCrop", "Flip", "ColorJitter", "Grayscale", "GaussianBlur"]
    assert kinds == [shared, [*shared, "Solarize"]]
    crop = recipe.augmentation.views[0].ops[0]
    assert crop == replace(recipes.byol().views[0].ops[0])
    assert recipe.augmentation.name == name
