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

from headrace.pipelines import recipes
from headrace.pipelines.approximation import APPROXIMATIONS
from headrace.pipelines.batch import Batch
from headrace.pipelines.engines import unsupported
from headrace.pipelines.recipe import Augmentation
from headrace.training.backbones import EncoderFactory, resolve_options
from headrace.training.blocks.memory import Queue
from headrace.training.catalogue import find_method
from headrace.training.gradients import Pass, backward, gradient_of, has_batch_norm
from headrace.training.method import MAIN_PHASE, Facts, Method, Progress
from headrace.training.preset import Preset
from headrace.training.run.export import export
from tests.precision import in_float64
from tests.tiny_methods import (
    CASES,
    ENCODERS,
    EPOCH_STEPS,
    NAMES,
    TinyContext,
    batch_of,
    build,
    module_of,
    progress_at,
    refusal,
    sgd,
    share,
    small_preset,
    tiny_teacher,
    train_step,
)

each_case = pytest.mark.parametrize(("name", "encoder"), CASES)


def one_pass(method: Method, batch: Batch, step: int, *, bf16: bool = False) -> Pass:
    """A step but for the optimiser; gives the last phase's."""
    done = Pass()
    method.before_step(progress_at(step))
    for progress, trained in phases_of(method, step):
        with gradient_of(method, trained):
            done = backward(method, [batch], 1, progress, bf16=bf16)
        method.after_backward(progress)
    method.after_step(done.embeddings, done.batches, progress_at(step))
    return done


def phases_of(method: Method, step: int = 0) -> list[tuple[Progress, list[nn.Parameter]]]:
    return [(replace(progress_at(step), phase=name), p) for name, p in method.phases().items()]


@each_case
def test_loss_is_a_finite_scalar_with_a_gradient_for_everything(name: str, encoder: str) -> None:
    method, batch = build(name, encoder), batch_of(name)
    names = {parameter: key for key, parameter in method.named_parameters()}
    for progress, trained in phases_of(method):
        with gradient_of(method, trained):
            outputs, embeddings = method(batch, progress)
            assert all(value.shape == () and value.isfinite() for value in outputs.values())
            assert embeddings
            assert all(len(value) == len(batch) for value in embeddings.values())
            outputs["loss"].backward()
    for parameter, key in names.items():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            # Adding the same to all keys of a softmax changes nothing.
            if not key.endswith("qkv.bias"):
                assert parameter.grad.any(), key
        else:
            assert parameter.grad is None, key


@each_case
def test_phases_share_the_trained_parameters_among_them(name: str, encoder: str) -> None:
    method = build(name, encoder)
    phases = method.phases()
    assert MAIN_PHASE in phases
    listed = [id(parameter) for phase in phases.values() for parameter in phase]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in method.parameters() if p.requires_grad}


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
def test_a_resumed_run_repeats_the_uninterrupted_losses(name: str, encoder: str) -> None:
    """To the last bit, from the middle of an epoch over the beginning of the next one."""
    context = TinyContext(small_preset(name))
    batches = [batch_of(name, seed=seed) for seed in range(EPOCH_STEPS + 2)]

    def losses(method: Method, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
        return [
            train_step(method, optimizer, [batches[step]], progress_at(step), context=context)
            for step in steps
        ]

    method = build(name, encoder)
    optimizer = sgd(method)
    losses(method, optimizer, range(2))
    saved = copy.deepcopy((method.state_dict(), optimizer.state_dict()))
    expected = losses(method, optimizer, range(2, len(batches)))
    other = build(name, encoder, seed=9)
    for parameter in other.parameters():
        parameter.detach().mul_(0.5)
    other.load_state_dict(saved[0])
    resumed = sgd(other)
    resumed.load_state_dict(saved[1])
    assert torch.equal(
        torch.stack(losses(other, resumed, range(2, len(batches)))), torch.stack(expected)
    )
    tables = [each.order_table(progress_at(len(batches)).epoch_start) for each in (method, other)]
    assert (tables[0] is None) == (tables[1] is None)
    if tables[0] is not None and tables[1] is not None:
        assert torch.equal(tables[0], tables[1])


@each_case
def test_state_changes_between_steps_alone(name: str, encoder: str) -> None:
    """embed and objective move nothing but batch norm's statistics, so micro-batches may repeat."""
    method = build(name, encoder)
    method.before_step(progress_at(0))
    running = {
        f"{prefix}.{key}"
        for prefix, module in method.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for key in dict(module.named_buffers())
    }
    before = {key: value.clone() for key, value in method.state_dict().items()}
    for progress, _ in phases_of(method):
        method(batch_of(name), progress)
    for key, value in method.state_dict().items():
        if key not in running:
            assert torch.equal(value, before[key]), key


@each_case
def test_what_is_frozen_moves_only_where_it_follows(name: str, encoder: str) -> None:
    """A teacher follows its student as a whole; what is fixed stays as a whole."""
    method, batch = build(name, encoder), batch_of(name)
    frozen = {key: p.clone() for key, p in method.named_parameters() if not p.requires_grad}
    optimizer = sgd(method, 0.1)
    for step in (0, 1):
        train_step(method, optimizer, [batch], progress_at(step))
    now = dict(method.named_parameters())
    moved = {key for key, value in frozen.items() if not torch.equal(now[key], value)}
    for part in {key.split(".")[0] for key in moved}:
        whole = [key for key in frozen if key.split(".")[0] == part]
        assert len(moved.intersection(whole)) > 0.8 * len(whole), part
    if all(not parameter.requires_grad for parameter in method.encoder.parameters()):
        # The judged encoder is not trained, so it has to follow.
        assert any(key.startswith("encoder.") for key in moved)


@each_case
def test_micro_batches_with_a_gradient_cache_are_the_whole_batch(name: str, encoder: str) -> None:
    """Exactly for networks without batch norm, and whatever looks across the batch."""
    with in_float64():
        method, batch = build(name, encoder), batch_of(name)
        compare_micro_batches_with_the_whole(method, batch)


def compare_micro_batches_with_the_whole(method: Method, batch: Batch) -> None:
    if has_batch_norm(method):
        for module in method.modules():
            for key, child in module.named_children():
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    setattr(module, key, getattr(child, "act", nn.Identity()))
    parts = [share(batch, slice(first, first + 4)) for first in range(0, len(batch), 4)]
    whole, cached = method, copy.deepcopy(method)
    gradients: list[dict[str, Tensor]] = []
    for each, micro_batches, cache in ((whole, [batch], False), (cached, parts, True)):
        seen: dict[str, Tensor] = {}
        done = Pass()
        each.before_step(progress_at(0))
        for progress, trained in phases_of(each):
            each.zero_grad()
            with gradient_of(each, trained):
                done = backward(each, micro_batches, len(micro_batches), progress, cached=cache)
            seen |= {k: p.grad.clone() for k, p in each.named_parameters() if p.grad is not None}
            assert len(done.batches) == len(done.embeddings) == len(micro_batches)
        gradients.append(seen | {"loss": done.losses[0]})
        each.after_step(done.embeddings, done.batches, progress_at(0))
    assert gradients[0].keys() == gradients[1].keys()
    flat = [torch.cat([each[key].flatten() for key in sorted(each)]) for each in gradients]
    assert torch.linalg.vector_norm(flat[0] - flat[1]) < 1e-9 * torch.linalg.vector_norm(flat[0])
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[key], value, rtol=1e-9, atol=1e-12)


@each_case
def test_one_batch_can_be_learnt_by_heart(name: str, encoder: str) -> None:
    """Better than any output that is the same for all samples: the loss of a model of zeros, whose
    teacher is as it was."""
    method, batch = build(name, encoder), batch_of(name, samples=8)
    constant = copy.deepcopy(method)
    for parameter in constant.parameters():
        if parameter.requires_grad:
            parameter.detach().zero_()
    bound = constant(batch, progress_at(0))[0]["loss"].detach()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    # A queue begins with noise, which is easily told from any key.
    queues = [len(module) for module in method.modules() if isinstance(module, Queue)]
    for _ in range(max(queues, default=0) // len(batch)):
        train_step(method, optimizer, [batch], progress_at(0))
    losses = [train_step(method, optimizer, [batch], progress_at(0))]
    aim = torch.minimum(bound - 0.3 * bound.abs().clamp(min=0.3), losses[0] - 0.1 * losses[0].abs())
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
    done = one_pass(method, batch, 0, bf16=True)
    assert done.losses[0].dtype == torch.float32
    assert abs(done.losses[0] - exact) < 0.1 * exact.abs().clamp(min=0.1)
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
    train_step(method, sgd(method), [batch], progress_at(0))
    with no_host_reads():
        one_pass(method, batch, 1)


@each_case
def test_exported_encoder_is_a_plain_timm_model(name: str, encoder: str, tmp_path: Any) -> None:
    method = build(name, encoder).eval()
    if not hasattr(method.encoder, "pretrained_cfg"):
        pytest.skip(f"the encoder of {name} is no timm model, but made of several parts")
    path = tmp_path / "encoder.safetensors"
    export(method.exports()["encoder"], path)
    options: dict[str, Any] = {
        **find_method(name).backbone_options,
        **ENCODERS[encoder],
    }
    if encoder == "test_vit":
        options["img_size"] = 32
    plain = timm.create_model(encoder, num_classes=0, checkpoint_path=str(path), **options).eval()
    x = batch_of(name).views[0]
    with torch.no_grad():
        torch.testing.assert_close(plain(x), method.encoder(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_takes_some_encoder_and_says_which(name: str) -> None:
    """A refusal is one sentence that names the method and what it needs."""
    refusals = [reason for encoder in ENCODERS if (reason := refusal(name, encoder)) is not None]
    assert len(refusals) < len(ENCODERS)
    for reason in refusals:
        assert reason.startswith(name)
        assert "needs" in reason


# ---- presets


@pytest.mark.parametrize("name", NAMES)
def test_hooks_are_marked(name: str) -> None:
    """With `@override` the type checker refuses a misspelt hook, which nobody would call."""
    classes = [
        each
        for each in vars(module_of(name)).values()
        if isinstance(each, type) and issubclass(each, Method) and each is not Method
    ]
    assert classes
    for each in classes:
        hooks = {key: value for key, value in vars(each).items() if key in vars(Method)}
        functions = {key: hooks[key] for key in hooks if key != "__init__" and callable(hooks[key])}
        assert {"embed", "objective"} <= functions.keys()
        unmarked = {key for key, hook in functions.items() if not hasattr(hook, "__override__")}
        assert not unmarked


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_whole(name: str) -> None:
    module = module_of(name)
    presets: dict[str, Preset] = module.PRESETS
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
    ("name", "preset"),
    [
        (name, preset)
        for name in sorted({name for name, _ in CASES})
        for preset in module_of(name).PRESETS
    ],
)
def test_presets_build_as_published(name: str, preset: str) -> None:
    """On the meta device, where the largest network costs nothing."""
    recipe: Preset = module_of(name).PRESETS[preset]
    pixels = tuple(view.shape[0] for view in recipe.augmentation.flat_views)
    test_pixels = recipe.test.flat_views[0].shape[0]
    options = resolve_options(recipe.backbone, recipe.backbone_options, pixels, test_pixels)
    masks = tuple(view.mask for view in recipe.augmentation.flat_views)
    facts = Facts(1000, 10**6, pixels, recipe.batch_size, 100, 1000, masks=masks)
    objective = recipe.objective
    if find_method(name).init_is_teacher:
        facts = replace(facts, init=tiny_teacher())
    if getattr(objective, "teacher", None) == "":
        objective = replace(objective, teacher="one that the user names")
    with torch.device("meta"):
        method = module_of(name).build(objective, EncoderFactory(recipe.backbone, options), facts)
    assert all(parameter.is_meta for parameter in method.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_presets_run_on_every_engine(name: str) -> None:
    """All that a method asks for of its pictures; DALI may have to be allowed to approximate."""
    presets: dict[str, Preset] = module_of(name).PRESETS
    for preset, recipe in presets.items():
        for augmentation in (recipe.augmentation, recipe.test):
            for engine in ("reference", "fused", "synthetic"):
                assert unsupported(engine, augmentation) == [], (preset, engine)
            if not unsupported("dali", recipes.center()):  # where it is installed
                lacking = unsupported("dali", augmentation, approximate=APPROXIMATIONS)
                assert lacking == [], (preset, "dali")


def test_the_vit_preset_is_the_promised_one() -> None:
    recipe: Preset = module_of("supervised").PRESETS["vit_b16_imagenet"]
    optim = recipe.optim
    assert recipe.backbone == "vit_base_patch16_224"
    assert (recipe.batch_size, recipe.epochs, recipe.holdout) == (64, 30, 0.1)
    assert (optim.name, optim.learning_rate, optim.weight_decay) == ("adamw", 1e-3, 0.01)
    assert (optim.schedule, optim.warmup_epochs, optim.scale_with_batch) == ("cosine", 0, False)
    assert recipe.augmentation.flat_views[0].size == 224
    assert recipe.objective.label_smoothing == 0
