"""The contract of a method, held by every file in training/methods, over a ResNet and a ViT."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.recipe import Augmentation
from tests.tiny_methods import (
    CASES,
    ENCODERS,
    NAMES,
    batch_of,
    build,
    masks_tokens,
    module_of,
    progress_at,
    sgd,
    small_recipe,
    train_step,
)
from training.backbones import EncoderFactory, export, resolve_options
from training.config import ConfigError, Recipe
from training.method import Facts

each_case = pytest.mark.parametrize(("name", "encoder"), CASES)


@each_case
def test_loss_is_a_finite_scalar_with_a_gradient_for_everything(name: str, encoder: str) -> None:
    method = build(name, encoder)
    outputs, embeddings = method(batch_of(name), progress_at(0))
    assert all(value.shape == () and value.isfinite() for value in outputs.values())
    assert embeddings
    outputs["loss"].backward()
    for parameter_name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            # Adding the same to all keys of a softmax changes nothing.
            if not parameter_name.endswith("qkv.bias"):
                assert parameter.grad.any(), parameter_name
        else:
            assert parameter.grad is None, parameter_name


@each_case
def test_optimizer_groups_hold_each_trained_parameter_once(name: str, encoder: str) -> None:
    method = build(name, encoder)
    grouped: list[Any] = []
    for group in method.param_groups():
        assert isinstance(group["params"], list)
        grouped += group["params"]
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert len(grouped) == len(trained)
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in trained}


@each_case
def test_state_dict_brings_back_the_same_loss(name: str, encoder: str) -> None:
    method, batches = build(name, encoder), [batch_of(name, seed=seed) for seed in range(3)]
    optimizer = sgd(method)
    for step in range(2):
        train_step(method, optimizer, [batches[step]], progress_at(step))
    saved = copy.deepcopy(method.state_dict())
    other = build(name, encoder, seed=9)
    expected, _ = method(batches[2], progress_at(2))
    assert not torch.equal(other(batches[2], progress_at(2))[0]["loss"], expected["loss"])
    other.load_state_dict(saved)
    assert torch.equal(other(batches[2], progress_at(2))[0]["loss"], expected["loss"])


@each_case
def test_state_changes_between_steps_alone(name: str, encoder: str) -> None:
    """embed and objective move nothing but batch norm's statistics, so micro-batches may repeat."""
    method = build(name, encoder)
    running = {
        f"{prefix}.{key}"
        for prefix, module in method.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for key in dict(module.named_buffers())
    }
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method(batch_of(name), progress_at(0))
    for key, value in method.state_dict().items():
        if key not in running:
            assert torch.equal(value, before[key]), key


@each_case
def test_what_is_frozen_moves_only_where_it_follows(name: str, encoder: str) -> None:
    """A teacher follows its student; fixed positions and shifts stay."""
    method, batch = build(name, encoder), batch_of(name)
    frozen = {key: p.clone() for key, p in method.named_parameters() if not p.requires_grad}
    train_step(method, sgd(method, 0.1), [batch], progress_at(0))
    now = dict(method.named_parameters())
    moved = {key for key, value in frozen.items() if not torch.equal(now[key], value)}
    teacher = {key for key in frozen if key.startswith(("encoder.", "teacher_head."))}
    if all(not parameter.requires_grad for parameter in method.encoder.parameters()):
        # The judged encoder is not trained, so it has to follow.
        assert len(moved) > 0.9 * len(teacher)
        assert moved <= teacher
    else:
        assert not moved


@each_case
def test_one_batch_can_be_learnt_by_heart(name: str, encoder: str) -> None:
    """Better than any output that is the same for all samples: the loss of a model of zeros."""
    method, batch = build(name, encoder), batch_of(name, samples=8)
    constant = copy.deepcopy(method)
    for parameter in constant.parameters():
        parameter.detach().zero_()
    bound = constant(batch, progress_at(0))[0]["loss"].detach()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    losses = [train_step(method, optimizer, [batch], progress_at(0))]
    aim = torch.minimum(0.7 * bound, 0.9 * losses[0])
    while losses[-1] >= aim and len(losses) < 200:
        losses.append(train_step(method, optimizer, [batch], progress_at(min(len(losses), 19))))
    assert losses[-1] < aim, f"from {losses[0]:.3f} to {losses[-1]:.3f}, aiming at {aim:.3f}"


@each_case
def test_bfloat16_autocast_stays_finite_and_near(name: str, encoder: str) -> None:
    method, batch = build(name, encoder), batch_of(name, samples=8)
    if encoder == "test_resnet":
        # torch 2.14 on CPUs leaves part of a bfloat16 weight gradient uninitialised where a 3 x 3
        # convolution meets a 1 x 1 picture, which the last stage sees of 16 pixels.
        larger = tuple(F.interpolate(view, scale_factor=4) for view in batch.views)
        batch = replace(batch, views=larger)
    exact = copy.deepcopy(method)(batch, progress_at(0))[0]["loss"].detach()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, embeddings = method(batch, progress_at(0))
    outputs["loss"].backward()
    method.after_backward(progress_at(0))
    method.after_step([{k: v.detach() for k, v in embeddings.items()}], [batch], progress_at(0))
    assert outputs["loss"].dtype == torch.float32
    assert abs(outputs["loss"].detach() - exact) < 0.1 * exact
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    assert all(v.isfinite().all() for v in method.state_dict().values())


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Whatever would wait for a CUDA device raises: numbers, truth values, copies to the host."""
    names = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "numpy", "cpu")

    def refuse(name: str) -> Any:
        def raising(*_: object, **__: object) -> None:
            raise AssertionError(f"Tensor.{name} waits for the device")

        return raising

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(Tensor, name, refuse(name), raising=False)
        yield


@each_case
def test_nothing_waits_for_the_device(name: str, encoder: str) -> None:
    method, batch = build(name, encoder), batch_of(name)
    # What a method learns once from the first batch of a run is allowed.
    method(batch, progress_at(0))
    with no_host_reads():
        outputs, embeddings = method(batch, progress_at(1))
        outputs["loss"].backward()
        method.after_backward(progress_at(1))
        kept = {key: value.detach() for key, value in embeddings.items()}
        method.after_step([kept], [batch], progress_at(1))


@each_case
def test_exported_encoder_is_a_plain_timm_model(name: str, encoder: str, tmp_path: Any) -> None:
    method = build(name, encoder).eval()
    path = tmp_path / "encoder.safetensors"
    export(method.encoder, path)
    options: dict[str, Any] = {
        **ENCODERS[encoder],
        **small_recipe(name).backbone_options,
        **getattr(module_of(name), "BACKBONE_OPTIONS", {}),
    }
    if encoder == "test_vit":
        options["img_size"] = 32
    plain = timm.create_model(encoder, num_classes=0, checkpoint_path=str(path), **options).eval()
    x = batch_of(name).views[0]
    with torch.no_grad():
        torch.testing.assert_close(plain(x), method.encoder(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if masks_tokens(name)])
def test_methods_that_mask_tokens_refuse_a_resnet(name: str) -> None:
    with pytest.raises(ConfigError, match="needs a timm VisionTransformer"):
        build(name, "test_resnet")


# ---- presets


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_whole(name: str) -> None:
    module = module_of(name)
    presets: dict[str, Recipe] = module.PRESETS
    assert {"imagenet", "cifar"} <= presets.keys()
    assert is_dataclass(module.Objective)
    for recipe in presets.values():
        assert type(recipe.objective) is module.Objective
        assert isinstance(recipe.augmentation, Augmentation)
        assert len(recipe.test.flat_views) == 1
        assert (recipe.test.mean, recipe.test.std) == (
            recipe.augmentation.mean,
            recipe.augmentation.std,
        )
        assert recipe.optim.warmup_epochs < recipe.epochs
        assert 0 <= recipe.holdout < 1
        assert recipe.notes


@pytest.mark.parametrize(
    ("name", "preset"), [(name, preset) for name in NAMES for preset in module_of(name).PRESETS]
)
def test_presets_build_as_published(name: str, preset: str) -> None:
    """On the meta device, where the largest network costs nothing."""
    recipe: Recipe = module_of(name).PRESETS[preset]
    pixels = tuple(view.size for view in recipe.augmentation.flat_views)
    test_pixels = recipe.test.flat_views[0].size
    options = resolve_options(recipe.backbone, recipe.backbone_options, pixels, test_pixels)
    facts = Facts(1000, 10**6, pixels, recipe.batch_size, 100, 1000)
    with torch.device("meta"):
        method = module_of(name).build(
            recipe.objective, EncoderFactory(recipe.backbone, options), facts
        )
    assert all(parameter.is_meta for parameter in method.parameters())


def test_the_vit_preset_is_the_promised_one() -> None:
    recipe: Recipe = module_of("supervised").PRESETS["vit_b16_imagenet"]
    optim = recipe.optim
    assert recipe.backbone == "vit_base_patch16_224"
    assert (recipe.batch_size, recipe.epochs, recipe.holdout) == (64, 30, 0.1)
    assert (optim.name, optim.learning_rate, optim.weight_decay) == ("adamw", 1e-3, 0.01)
    assert (optim.schedule, optim.warmup_epochs, optim.scale_with_batch) == ("cosine", 0, False)
    assert recipe.augmentation.flat_views[0].size == 224
    assert recipe.objective.label_smoothing == 0
