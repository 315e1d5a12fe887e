"""What MoCo, MoCo v3 and SimCLR promise beyond the contract that test_methods.py holds."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from headrace.pipelines.batch import Batch
from headrace.training.backbones import EncoderFactory
from headrace.training.blocks.memory import Queue, RowMemory
from headrace.training.blocks.norm import convert
from headrace.training.blocks.norm_groups import GroupedBatchNorm, group_norms
from headrace.training.blocks.positions import sine_cosine
from headrace.training.method import Facts
from headrace.training.methods import moco, moco_v3, simclr
from headrace.training.preset import ConfigError, Preset
from headrace.training.world import World
from tests.test_ranks import (  # noqa: F401  the fixture
    Call,
    assert_agrees,
    on_two_ranks,
    smooth,
    train,
    uneven,
)
from tests.tiny_methods import (
    ENCODERS,
    batch_of,
    build,
    make_batch,
    progress_at,
    sgd,
    share,
    small_preset,
    train_step,
)

# ---- groups of batch norm


def norms_of(norm: nn.Module, size: int, *, interleaved: bool) -> nn.Module:
    holder = nn.Sequential(copy.deepcopy(norm))
    assert group_norms(holder, size, interleaved=interleaved) == 1
    return holder


def random_norm(kind: type[nn.Module], channels: int, **options: Any) -> Any:
    norm: Any = kind(channels, **options)
    if norm.affine:
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    return norm


NORMS = [
    (nn.BatchNorm1d, (12, 3), {}),
    (nn.BatchNorm2d, (12, 3, 4, 4), {"momentum": 0.3}),
    (nn.BatchNorm2d, (12, 3, 4, 4), {"affine": False}),
    (BatchNormAct2d, (12, 3, 4, 4), {}),
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("kind", "shape", "options"), NORMS)
def test_each_group_is_normalised_alone(
    kind: type[nn.Module], shape: tuple[int, ...], options: dict[str, Any], interleaved: bool
) -> None:
    """As torch's own batch norm on each group's rows; running statistics are the groups' mean."""
    torch.manual_seed(0)
    x = 3 + torch.randn(shape)
    norm = random_norm(kind, shape[1], **options)
    groups = [slice(g, None, 3) if interleaved else slice(4 * g, 4 * g + 4) for g in range(3)]
    expected, means, variances = torch.empty_like(x), [], []
    for rows in groups:
        alone = copy.deepcopy(norm)
        with torch.no_grad():
            expected[rows] = alone(x[rows])
        means.append(alone.running_mean)
        variances.append(alone.running_var)
    ours: Any = norms_of(norm, 4, interleaved=interleaved)
    with torch.set_grad_enabled(not interleaved):
        output = ours(x)
    torch.testing.assert_close(output.detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[0].running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(ours[0].running_var, torch.stack(variances).mean(0))
    assert ours[0].num_batches_tracked == 1

    alone = copy.deepcopy(norm)
    alone.load_state_dict(ours[0].state_dict())
    torch.testing.assert_close(ours.eval()(x), alone.eval()(x))


def test_groups_pass_torchs_gradient() -> None:
    torch.manual_seed(0)
    norm = random_norm(nn.BatchNorm2d, 3)
    x, cotangent = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    ours: Any = norms_of(norm, 4, interleaved=False)
    one, other = (x.clone().requires_grad_() for _ in range(2))
    ours(one).backward(cotangent)
    torch.cat([norm(part) for part in other.split(4)]).backward(cotangent)
    for mine, theirs in ((one, other), (ours[0].weight, norm.weight), (ours[0].bias, norm.bias)):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("interleaved", [False, True])
def test_groups_keep_bfloat16(interleaved: bool) -> None:
    x = 2 + torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = norms_of(nn.BatchNorm2d(3), 4, interleaved=interleaved)
    with torch.no_grad():
        output, exact = ours(x.bfloat16()), copy.deepcopy(ours)(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.05)


def test_groups_refuse_what_they_cannot_divide() -> None:
    ours = norms_of(nn.BatchNorm2d(3), 4, interleaved=False)
    with pytest.raises(ConfigError, match="groups of 4 samples cannot divide the 6"):
        ours(torch.randn(6, 3, 2, 2))
    assert ours.eval()(torch.randn(6, 3, 2, 2)).shape == (6, 3, 2, 2)


def test_keys_of_one_group_are_refused_for_they_would_share_their_queries_statistics() -> None:
    x = torch.randn(4, 3, 2, 2)
    keys = norms_of(nn.BatchNorm2d(3), 4, interleaved=True)
    with torch.no_grad(), pytest.raises(ConfigError, match="one group for the 4 of a micro-batch"):
        keys(x)
    assert norms_of(nn.BatchNorm2d(3), 4, interleaved=False)(x).shape == x.shape


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_ranks_leave_groups_as_they_are(device: str) -> None:
    """While every other batch norm comes to span the ranks."""
    network: Any = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), nn.BatchNorm1d(3))
    group_norms(network[0], 4, interleaved=False)
    convert(network, World(rank=0, size=2, device=torch.device(device)))
    assert type(network[0][0]) is GroupedBatchNorm
    assert type(network[1]) is not nn.BatchNorm1d


# ---- MoCo


def moco_of(encoder: str = "test_vit", **changes: Any) -> moco.Moco:
    method = build("moco", encoder, **changes)
    assert isinstance(method, moco.Moco)
    return method


def test_moco_moves_its_key_encoder_before_the_keys_are_made() -> None:
    """Parameters by the momentum, buffers by their own batches."""
    method, batch = moco_of("test_resnet", teacher_momentum=0.9), batch_of("moco")
    train_step(method, sgd(method, 0.1), [batch], progress_at(0))
    before, student = (
        {name: p.detach().clone() for name, p in part.named_parameters()}
        for part in (method.key_encoder, method.encoder)
    )
    buffers = {name: b.clone() for name, b in method.key_encoder.named_buffers()}
    method.before_step(progress_at(1))
    for name, parameter in method.key_encoder.named_parameters():
        expected = 0.9 * before[name] + 0.1 * student[name]
        torch.testing.assert_close(parameter, expected)
    assert any(not torch.equal(before[name], student[name]) for name in before)
    for name, buffer in method.key_encoder.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    # The rest of the step leaves it alone, and it makes the keys.
    moved = copy.deepcopy(method.key_encoder), copy.deepcopy(method.key_projection)
    _, embeddings = method(batch, progress_at(1))
    with torch.no_grad():
        assert torch.equal(embeddings["key"], moved[1](moved[0](batch.views[1])))


def test_moco_queue_takes_all_keys_after_the_step_oldest_out_first() -> None:
    method, batches = moco_of(), [batch_of("moco", seed=seed) for seed in range(3)]
    queue = method.memory
    assert isinstance(queue, Queue)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(32))
    start, keys, optimizer = queue.rows.clone(), [], sgd(method)
    for step, batch in enumerate(batches):
        method.before_step(progress_at(step))
        halves = [share(batch, slice(0, 8)), share(batch, slice(8, 16))]
        with torch.no_grad():
            made = method.embed(batch, progress_at(step))["key"]
        keys.append(nn.functional.normalize(made, dim=1))
        method.before_step = lambda progress: None  # has been
        train_step(method, optimizer, halves, progress_at(step))
        del method.before_step
        if step == 0:
            torch.testing.assert_close(queue.rows, torch.cat([keys[0], start[16:]]))
    torch.testing.assert_close(queue.rows, torch.cat([keys[2], keys[1]]))
    assert queue.cursor == 16


def statistics_of_one_sample(method: moco.Moco, batch: Batch, changed: int) -> tuple[bool, bool]:
    """Whether sample 0's query and key change with both pictures of another sample."""
    views = tuple(view.clone() for view in batch.views)
    for view in views:
        view[changed] = view[changed].flip(-1) + 1
    with torch.no_grad():
        one, other = (
            copy.deepcopy(method).embed(each, progress_at(0))
            for each in (batch, replace(batch, views=views))
        )
    return tuple(
        not torch.allclose(one[name][0], other[name][0], rtol=1e-3, atol=1e-4)
        for name in ("query", "key")
    )  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("changed", "expected"), [(1, (True, False)), (4, (False, True)), (5, (False, False))]
)
def test_moco_query_and_key_have_their_statistics_from_different_samples(
    changed: int, expected: tuple[bool, bool]
) -> None:
    """Groups of 4 in 16: the query's is 0 to 3, the key's 0, 4, 8 and 12."""
    method = moco_of("test_resnet", batch_norm_group=4)
    assert statistics_of_one_sample(method, batch_of("moco"), changed) == expected


def test_moco_without_groups_has_the_statistics_of_the_batch() -> None:
    method = moco_of("test_resnet", batch_norm_group=0)
    assert statistics_of_one_sample(method, batch_of("moco"), 5) == (True, True)


def single(augmentation: Any) -> Any:
    return replace(augmentation, views=(replace(augmentation.views[0], count=1),))


def bank_of(momentum: float = 0.5) -> tuple[moco.Moco, Preset]:
    recipe = small_preset("moco", dictionary="bank", bank_momentum=momentum)
    recipe = replace(recipe, augmentation=single(recipe.augmentation))
    factory = EncoderFactory("test_vit", {**ENCODERS["test_vit"], "img_size": 32})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = moco.build(recipe.objective, factory, Facts(0, 64, (32,), 16, 4, 20))
    return method, recipe


def test_moco_bank_moves_the_rows_of_the_batch_alone() -> None:
    method, recipe = bank_of(momentum=0.25)
    batch = make_batch(recipe.augmentation)
    bank = method.memory
    assert isinstance(bank, RowMemory)
    assert len(bank) == 64
    before, optimizer = bank.rows.clone(), sgd(method)
    with torch.no_grad():
        query = method.embed(batch, progress_at(0))["query"]
    halves = [share(batch, slice(0, 8)), share(batch, slice(8, 16))]
    train_step(method, optimizer, halves, progress_at(0))
    expected = before.clone()
    moved = 0.25 * before[batch.ids] + 0.75 * nn.functional.normalize(query, dim=1)
    expected[batch.ids] = nn.functional.normalize(moved, dim=1)
    torch.testing.assert_close(bank.rows, expected)
    assert "key_encoder" not in dict(method.named_children())


def test_moco_bank_draws_negatives_of_the_step() -> None:
    method, recipe = bank_of()
    batch = make_batch(recipe.augmentation)
    with torch.no_grad():
        losses = [method(batch, progress_at(step))[0]["loss"] for step in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_moco_end_to_end_trains_through_its_keys() -> None:
    method, batch = moco_of(dictionary="batch"), batch_of("moco")
    _, embeddings = method(batch, progress_at(0))
    leaves = {name: value.detach().requires_grad_() for name, value in embeddings.items()}
    method.objective(leaves, batch, progress_at(0))["loss"].backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves.values())
    # The queue's keys take none.
    method = moco_of()
    _, embeddings = method(batch, progress_at(0))
    leaves = {name: value.detach().requires_grad_() for name, value in embeddings.items()}
    method.objective(leaves, batch, progress_at(0))["loss"].backward()
    assert leaves["query"].grad is not None
    assert leaves["key"].grad is None


@pytest.mark.dist
@pytest.mark.parametrize("dictionary", ["batch", "bank"])
def test_moco_other_dictionaries_on_two_ranks(
    dictionary: str,
    on_two_ranks: Call,  # noqa: F811
) -> None:
    if dictionary == "bank":
        method, recipe = bank_of()
    else:
        method, recipe = moco_of(dictionary=dictionary), small_preset("moco")
    method = smooth(method)
    batches = [uneven(make_batch(recipe.augmentation, 16, seed)) for seed in range(3)]
    one = train(method, recipe, batches, 0, 1e-2, World())
    two = on_two_ranks(train, method, recipe, batches, 0, 1e-2)
    assert two[0]["digest"] == two[1]["digest"]
    for seen in two:
        assert_agrees(seen, one)


@pytest.mark.parametrize(
    ("changes", "pixels", "batch", "message"),
    [
        ({"queue_size": 40}, (32, 32), 16, "no multiple of the batch of 16"),
        ({"queue_size": 8}, (32, 32), 16, "no multiple of the batch of 16"),
        ({}, (32, 32, 16), 16, r"needs 2 view\(s\) of one size"),
        ({"dictionary": "bank"}, (32, 32), 16, r"needs 1 view\(s\) of one size"),
        ({"batch_norm_group": 16}, (32, 32), 16, "two or more groups of 16 samples"),
        ({"batch_norm_group": 6}, (32, 32), 16, "whole ones on each of 1 rank"),
        ({"projection_layers": 0}, (32, 32), 16, "one layer or more"),
    ],
)
def test_moco_refuses(
    changes: dict[str, Any], pixels: tuple[int, ...], batch: int, message: str
) -> None:
    objective = small_preset("moco", **changes).objective
    with pytest.raises(ConfigError, match=message):
        moco.build(objective, EncoderFactory("test_resnet", {}), Facts(0, 64, pixels, batch, 4, 20))


def test_moco_on_a_vision_transformer_needs_no_groups() -> None:
    assert moco_of("test_vit", batch_norm_group=16)


# ---- MoCo v3


def moco_v3_of(encoder: str, **changes: Any) -> moco_v3.MocoV3:
    method = build("moco_v3", encoder, **changes)
    assert isinstance(method, moco_v3.MocoV3)
    return method


def test_moco_v3_never_trains_the_patch_projection_and_the_positions() -> None:
    """moco-v3 vits.py: uniform by Xavier over the flattened patch; fixed sine-cosine positions."""
    method, batch = moco_v3_of("test_vit"), batch_of("moco_v3")
    encoder = method.encoder
    assert isinstance(encoder, VisionTransformer)
    projection: Any = encoder.patch_embed.proj
    bound = math.sqrt(6 / (3 * 4 * 4 + encoder.embed_dim))
    assert 0.95 * bound < projection.weight.abs().max() <= bound
    assert not projection.bias.any()
    assert encoder.pos_embed is not None
    table = sine_cosine(encoder.embed_dim, 8, 8, prefix_tokens=encoder.num_prefix_tokens)
    assert torch.equal(encoder.pos_embed[0], table)
    teacher: Any = method.teacher
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, teacher.get_parameter(name))
    fixed = projection.weight.clone()
    for step in range(2):
        train_step(method, sgd(method, 0.1), [batch], progress_at(step))
    assert torch.equal(encoder.pos_embed[0], table)
    assert torch.equal(projection.weight, fixed)
    assert torch.equal(teacher.patch_embed.proj.weight, fixed)

    encoder = moco_v3_of("test_vit", freeze_patch_projection=False).encoder
    assert isinstance(encoder, VisionTransformer)
    assert encoder.patch_embed.proj.weight.requires_grad


def test_moco_v3_keeps_what_init_brought(tmp_path: Any) -> None:
    options = {**ENCODERS["test_vit"], "img_size": 32}
    start = EncoderFactory("test_vit", options)().state_dict()
    factory = EncoderFactory("test_vit", options, initial=start)
    facts = Facts(0, 64, (32, 32), 16, 4, 20, init=tmp_path)
    method = moco_v3.build(small_preset("moco_v3").objective, factory, facts)
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(value, start[name]), name
    encoder: Any = method.encoder
    assert not encoder.patch_embed.proj.weight.requires_grad
    assert not encoder.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("encoder", "projection_layers", "last_prediction"),
    [("test_vit", 3, nn.BatchNorm1d), ("test_resnet", 2, nn.Linear)],
)
def test_moco_v3_heads(
    encoder: str, projection_layers: int, last_prediction: type[nn.Module]
) -> None:
    """moco-v3 builder.py, MoCo_ViT and MoCo_ResNet, `_build_projector_and_predictor_mlps`."""
    method = moco_v3_of(encoder)
    linear = [layer for layer in method.projection if isinstance(layer, nn.Linear)]
    assert len(linear) == projection_layers
    last: Any = method.projection[-1]
    assert isinstance(last, nn.BatchNorm1d)
    assert not last.affine
    assert sum(isinstance(layer, nn.Linear) for layer in method.prediction) == 2
    assert type(method.prediction[-1]) is last_prediction
    layers = [*method.projection, *method.prediction]
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("step", [0, 7, 19])
def test_moco_v3_momentum_reaches_one_on_a_cosine(step: int) -> None:
    """moco-v3 main_moco.py, `adjust_moco_momentum`; before the targets are made."""
    method = moco_v3_of("test_vit", teacher_momentum=0.9)
    with torch.no_grad():
        for parameter in [*method.encoder.parameters(), *method.projection.parameters()]:
            parameter.add_(torch.randn(parameter.shape))
    pairs = [
        *zip(method.teacher.parameters(), method.encoder.parameters(), strict=True),
        *zip(method.teacher_projection.parameters(), method.projection.parameters(), strict=True),
    ]
    momentum = 1 - 0.5 * (1 + math.cos(math.pi * step / 20)) * (1 - 0.9)
    expected = [momentum * t.detach() + (1 - momentum) * s.detach() for t, s in pairs]
    method.before_step(progress_at(step))
    for (teacher, _), value in zip(pairs, expected, strict=True):
        torch.testing.assert_close(teacher.detach(), value, rtol=1e-5, atol=1e-6)


def test_moco_v3_passes_each_view_alone() -> None:
    """Batch norm sees one view at a time, and targets take no gradient."""
    method, batch = moco_v3_of("test_resnet"), batch_of("moco_v3")
    other = replace(batch, views=(batch.views[0], batch.views[1] + torch.randn(16, 3, 1, 1)))
    one, two = (copy.deepcopy(method).embed(each, progress_at(0)) for each in (batch, other))
    for name in ("prediction", "target"):
        assert torch.equal(one[name][:, 0], two[name][:, 0])
        assert not torch.equal(one[name][:, 1], two[name][:, 1])
    assert one["prediction"].requires_grad
    assert not one["target"].requires_grad


def test_moco_v3_small_vision_transformer_has_the_codes_heads() -> None:
    recipe = moco_v3.PRESETS["vit_s16_imagenet"]
    with torch.device("meta"):
        encoder: Any = timm.create_model(recipe.backbone, **recipe.backbone_options)
    assert [block.attn.num_heads for block in encoder.blocks] == [12] * 12


@pytest.mark.parametrize("name", ["moco", "moco_v3"])
def test_everything_decays(name: str) -> None:
    assert [group["decay"] for group in build(name, "test_resnet").param_groups()] == [True]


# ---- SimCLR


def test_simclr_v2_head() -> None:
    """simclr model_util.py, `projection_head`: three layers, the last scaled and not shifted."""
    objective = replace(simclr.PRESETS["v2_imagenet"].objective, projection_dim=24)
    factory = EncoderFactory("test_resnet", {})
    method = simclr.build(objective, factory, Facts(0, 64, (32, 32), 16, 4, 20))
    linear = [layer for layer in method.projection if isinstance(layer, nn.Linear)]
    width = linear[0].in_features
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (width, width),
        (width, width),
        (width, 24),
    ]
    norms = [layer for layer in method.projection if isinstance(layer, nn.BatchNorm1d)]
    assert [norm.bias.requires_grad for norm in norms] == [True, True, False]
    assert all(norm.weight.requires_grad for norm in norms)
    assert isinstance(method.projection[-1], nn.BatchNorm1d)
    output: Tensor = method(batch_of("simclr"), progress_at(0))[0]["loss"]
    assert output.isfinite()
