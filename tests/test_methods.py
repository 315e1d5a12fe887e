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

from pipelines.batch import Batch
from pipelines.recipe import Augmentation
from tests.tiny_methods import (
    CASES,
    CLASSES,
    ENCODERS,
    NAMES,
    build,
    make_batch,
    masks_tokens,
    module_of,
    progress_at,
    small_recipe,
)
from training.backbones import EncoderFactory, export, resolve_options
from training.config import ConfigError, Recipe
from training.method import Facts, Method, Progress

each_case = pytest.mark.parametrize(("name", "encoder"), CASES)


def batch_of(name: str, samples: int = 16, seed: int = 0) -> Batch:
    return make_batch(small_recipe(name).augmentation, samples, seed)


def train_step(
    method: Method, optimizer: torch.optim.Optimizer, parts: list[Batch], progress: Progress
) -> Tensor:
    """As in train.py; the mean loss over the micro-batches."""
    method.before_step(progress)
    optimizer.zero_grad()
    losses, embeddings = [], []
    for part in parts:
        outputs, embedded = method(part, progress)
        (outputs["loss"] / len(parts)).backward()
        losses.append(outputs["loss"].detach())
        embeddings.append({name: value.detach() for name, value in embedded.items()})
    method.after_backward(progress)
    optimizer.step()
    method.after_step(embeddings, parts, progress)
    return torch.stack(losses).mean()


def sgd(method: Method, rate: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=rate)


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
    method, batch = build(name, encoder), batch_of(name)
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
    recipe = small_recipe(name)
    path = tmp_path / "encoder.safetensors"
    export(method.encoder, path)
    options: dict[str, Any] = {**ENCODERS[encoder], **recipe.backbone_options}
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
        assert isinstance(recipe.objective, module.Objective)
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


# ---- what single methods promise beyond the contract


def test_dino_moves_its_center_once_per_step_from_all_micro_batches() -> None:
    whole = batch_of("dino")
    halves = [
        replace(
            whole,
            views=tuple(view[rows] for view in whole.views),
            labels=whole.labels[rows],
            ids=whole.ids[rows],
        )
        for rows in (slice(0, 8), slice(8, 16))
    ]
    one, two = (build("dino", "test_vit", drop_path=0.2) for _ in range(2))
    optimizers = [sgd(method) for method in (one, two)]
    for step in range(3):
        losses = [
            train_step(one, optimizers[0], [whole], progress_at(step)),
            train_step(two, optimizers[1], halves, progress_at(step)),
        ]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert one.get_buffer("center").any()
    torch.testing.assert_close(one.get_buffer("center"), two.get_buffer("center"))
    expected = 0.1 * build("dino", "test_vit").embed(whole, progress_at(0))["teacher"].mean((0, 1))
    fresh = build("dino", "test_vit")
    train_step(fresh, sgd(fresh), [whole], progress_at(0))
    torch.testing.assert_close(fresh.get_buffer("center"), expected)


def test_dino_clips_each_parameter_and_holds_the_prototypes() -> None:
    method = build("dino", "test_vit", freeze_last_layer_epochs=1, clip=0.01)
    prototypes = method.get_parameter("student_head.prototypes.weight")
    for step, held in [(0, True), (3, True), (4, False)]:
        method.zero_grad()
        method(batch_of("dino"), progress_at(step))[0]["loss"].backward()
        unclipped = {k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None}
        method.after_backward(progress_at(step))
        assert (prototypes.grad is None) == held
        for key, parameter in method.named_parameters():
            if parameter.grad is not None:
                factor = min(1.0, 0.01 / (float(unclipped[key].norm()) + 1e-6))
                torch.testing.assert_close(parameter.grad, unclipped[key] * factor)
    assert any(gradient.norm() > 0.01 for gradient in unclipped.values())


def test_dino_teacher_starts_as_the_student_and_ends_still() -> None:
    method = build("dino", "test_resnet")
    student = dict(method.named_parameters())
    for key, value in method.encoder.named_parameters():
        assert torch.equal(value, student[f"student.{key}"])
    before = {key: value.clone() for key, value in method.encoder.named_parameters()}
    # The momentum is 1 at the end of the run.
    last = Progress(step=10**6 - 1, total_steps=10**6, steps_per_epoch=10, seed=0)
    train_step(method, sgd(method, 0.1), [batch_of("dino")], last)
    for key, value in method.encoder.named_parameters():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-8)


def test_dino_wants_its_global_views_first() -> None:
    recipe = small_recipe("dino")
    for pixels in [(32,), (32, 16, 32), (16, 16, 32)]:
        with pytest.raises(ConfigError, match="two global views of one size"):
            module_of("dino").build(
                recipe.objective,
                EncoderFactory("test_resnet", {}),
                Facts(0, 64, pixels, 16, 4, 20),
            )


def test_mae_encoder_sees_the_kept_patches_alone() -> None:
    method, batch = build("mae", "test_vit"), batch_of("mae", samples=2)
    mask = batch.masks[0]
    assert mask is not None
    prediction = method.embed(batch, progress_at(0))["prediction"]
    painted = batch.views[0].clone()
    hidden = mask.view(2, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    painted.masked_fill_(hidden[:, None], 100.0)
    changed = replace(batch, views=(painted,))
    torch.testing.assert_close(method.embed(changed, progress_at(0))["prediction"], prediction)
    painted = batch.views[0].masked_fill(~hidden[:, None], 100.0)
    changed = replace(batch, views=(painted,))
    assert not torch.allclose(method.embed(changed, progress_at(0))["prediction"], prediction)


def test_mae_puts_tokens_back_where_they_were() -> None:
    """With nothing masked the encoder's tokens are timm's own, in order."""
    method = build("mae", "test_vit").eval()
    x = batch_of("mae", samples=2).views[0]
    kept = torch.arange(64).expand(2, -1)
    encode: Any = method.encode
    features: Any = method.encoder.forward_features
    torch.testing.assert_close(encode(x, kept), features(x))


def test_mae_does_not_take_another_mask_for_its_own() -> None:
    method, batch = build("mae", "test_vit"), batch_of("mae")
    assert method(batch, progress_at(0))[0]["loss"].isfinite()
    mask = batch.masks[0]
    assert mask is not None
    fewer = mask.clone()
    fewer[0, int(mask[0].byte().argmax())] = False
    assert method(replace(batch, masks=(fewer,)), progress_at(1))[0]["loss"].isnan()
    for masks, text in [((None,), "no mask"), ((mask[:, :16],), "a mask over 16 patches")]:
        with pytest.raises(ConfigError, match=text):
            method(replace(batch, masks=masks), progress_at(1))


def test_supervised_ignores_samples_without_label() -> None:
    method, batch = build("supervised", "test_vit").eval(), batch_of("supervised")
    labels = batch.labels.clone()
    labels[10:] = -1
    partly = method(replace(batch, labels=labels), progress_at(0))[0]["loss"]
    first = replace(batch, views=(batch.views[0][:10],), labels=labels[:10], ids=batch.ids[:10])
    torch.testing.assert_close(partly, method(first, progress_at(0))[0]["loss"])
    nothing = method(replace(batch, labels=labels.fill_(-1)), progress_at(0))[0]["loss"]
    assert nothing == 0


def test_supervised_evaluates_the_labelled_samples() -> None:
    method, batch = build("supervised", "test_resnet").eval(), batch_of("supervised")
    with torch.no_grad():
        order = method.embed(batch, progress_at(0))["logits"].argsort(dim=1, descending=True)
    labels = torch.stack([order[row, row % CLASSES] for row in range(16)])
    labels[3] = -1
    results = method.evaluate(replace(batch, labels=labels))
    ranks = [row for row in range(16) if row != 3]
    assert results["top1"].tolist() == [rank == 0 for rank in ranks]
    assert results["top5"].tolist() == [rank < 5 for rank in ranks]


def test_supervised_says_what_it_needs() -> None:
    module, objective = module_of("supervised"), small_recipe("supervised").objective
    factory = EncoderFactory("test_resnet", {})
    with pytest.raises(ConfigError, match="needs labels"):
        module.build(objective, factory, Facts(0, 64, (32,), 16, 4, 20))
    with pytest.raises(ConfigError, match="one view"):
        module.build(objective, factory, Facts(9, 64, (32, 32), 16, 4, 20))


def test_supervised_decays_everything_where_asked() -> None:
    method = build("supervised", "test_resnet", decay_everything=True)
    assert [group["decay"] for group in method.param_groups()] == [True]
    method = build("supervised", "test_resnet", decay_everything=False)
    assert [group["decay"] for group in method.param_groups()] == [True, False]


def test_simclr_wants_two_views() -> None:
    with pytest.raises(ConfigError, match="two views of one size"):
        module_of("simclr").build(
            small_recipe("simclr").objective,
            EncoderFactory("test_resnet", {}),
            Facts(0, 64, (32, 32, 16), 16, 4, 20),
        )
