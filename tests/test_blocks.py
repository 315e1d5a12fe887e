"""The parts that methods are made of, each against its definition; one process."""

import copy
from itertools import chain

import numpy as np
import pytest
import timm
import torch
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from headrace.training.blocks.drop_path import KeyedDropPath, key_drop_paths, set_keys
from headrace.training.blocks.heads import Mlp, feature_dim
from headrace.training.blocks.norm import GlobalBatchNorm, convert
from headrace.training.blocks.positions import sine_cosine
from headrace.training.blocks.teacher import follow, start_equal
from headrace.training.collectives import gather_with_gradient, mean_over_ranks, rank, world_size
from headrace.training.method import Progress
from headrace.training.world import World

TWO_RANKS = World(size=2)


def progress_at(step: int, seed: int = 0) -> Progress:
    return Progress(step=step, total_steps=10, steps_per_epoch=2, seed=seed)


# ---- gather


def test_one_process_is_one_rank() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert gather_with_gradient(x) is x
    mean = mean_over_ranks(x)
    assert torch.equal(mean, x)
    assert not mean.requires_grad


# ---- norm

NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(5), (12, 5)),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(5, momentum=None), (6, 5, 7)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(5, momentum=0.3), (4, 5, 6, 3)),
    "BatchNorm2d without affine": (lambda: nn.BatchNorm2d(5, affine=False), (4, 5, 6, 3)),
    "BatchNorm2d without statistics": (
        lambda: nn.BatchNorm2d(5, track_running_stats=False),
        (4, 5, 6, 3),
    ),
    "BatchNormAct2d": (lambda: BatchNormAct2d(5, act_layer=nn.GELU), (4, 5, 6, 3)),
}


@pytest.fixture(params=NORMS)
def norm_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = NORMS[request.param]
    generator = torch.Generator().manual_seed(1)
    norm = make()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0, generator=generator)
    return norm, 3.0 + 2.0 * torch.randn(shape, generator=generator)


def test_global_batch_norm_is_torchs(norm_and_input: tuple[nn.Module, Tensor]) -> None:
    norm, x = norm_and_input
    ours = convert(copy.deepcopy(norm), TWO_RANKS)
    assert isinstance(ours, GlobalBatchNorm)
    assert list(ours.state_dict()) == list(norm.state_dict())
    for step in range(2):
        inputs = [(x * (1 + step)).clone().requires_grad_() for _ in range(2)]
        outputs = [module(each) for module, each in zip((norm, ours), inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
        for output in outputs:
            output.square().sin().sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
        for theirs, own in zip(norm.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    norm.eval()
    ours.eval()
    torch.testing.assert_close(ours(x), norm(x), rtol=1e-5, atol=1e-5)


def test_global_batch_norm_gradient_is_its_derivative() -> None:
    norm = convert(nn.BatchNorm2d(3), TWO_RANKS).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)


def test_global_batch_norm_keeps_digits_far_from_zero() -> None:
    """A sum of squares in float32 would have no correct digit of this variance."""
    x = 3000 + torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    norm = convert(nn.BatchNorm1d(2), TWO_RANKS)
    expected = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    torch.testing.assert_close(norm(x), expected.float(), rtol=0, atol=2e-3)


def test_global_batch_norm_under_autocast_keeps_the_dtype() -> None:
    x = torch.randn(8, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    norm = convert(nn.BatchNorm2d(3), TWO_RANKS)
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(x)
    output.float().square().sum().backward()
    weight = norm.get_parameter("weight")
    assert x.grad is not None
    assert weight.grad is not None
    assert (output.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert weight.grad.dtype == torch.float32
    assert x.grad.isfinite().all()


def test_convert_reaches_every_norm_and_keeps_the_state() -> None:
    encoder = timm.create_model("test_resnet", num_classes=0)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    frozen = next(module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.bias.requires_grad_(False)
    assert convert(encoder, World()) is encoder
    assert not any(isinstance(module, GlobalBatchNorm) for module in encoder.modules())
    convert(encoder, TWO_RANKS)
    ours = [module for module in encoder.modules() if isinstance(module, GlobalBatchNorm)]
    assert len(ours) == count > 0
    assert not ours[0].bias.requires_grad
    after = encoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_converted_encoder_trains_as_before() -> None:
    """In a whole network, where an in-place ReLU follows each norm."""
    encoder = timm.create_model("test_resnet", num_classes=0, zero_init_last=False)
    ours = convert(copy.deepcopy(encoder), TWO_RANKS)
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outputs = [module(x) for module in (encoder, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)
    for output in outputs:
        output.square().sum().backward()
    expected, found = (
        torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        for module in (encoder, ours)
    )
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_global_batch_norm_refuses_a_vector() -> None:
    with pytest.raises(ValueError, match=r"\[B, C, \.\.\.\], got the shape \[3\]"):
        convert(nn.BatchNorm1d(3), TWO_RANKS)(torch.zeros(3))


# ---- teacher


def test_teacher_follows_parameters_and_keeps_its_buffers() -> None:
    student, teacher = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    start_equal(teacher, student)
    assert all(
        torch.equal(a, b)
        for a, b in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True)
    )
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = [parameter.clone() for parameter in teacher.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    student(torch.randn(8, 3))
    follow(teacher.parameters(), student.parameters(), 0.9)
    for old, new, target in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * target)
    norm = teacher[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked == 0
    follow(teacher.parameters(), student.parameters(), 1.0)
    for old, new, target in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * target)


# ---- positions


def test_positions_are_the_codes() -> None:
    """mae util/pos_embed.py, get_2d_sincos_pos_embed: for a grid that is no square."""
    dim, height, width = 8, 2, 3
    table = sine_cosine(dim, height, width, prefix_tokens=1)
    assert (table.shape, table.dtype) == ((1 + height * width, dim), torch.float32)
    assert not table[0].any()
    for row in range(height):
        for column in range(width):
            for half, place in enumerate((column, row)):
                for index in range(dim // 4):
                    angle = place / 10000 ** (index / (dim / 4))
                    entry = table[1 + row * width + column]
                    offset = half * dim // 2 + index
                    assert float(entry[offset]) == pytest.approx(np.sin(angle), abs=1e-7)
                    assert float(entry[offset + dim // 4]) == pytest.approx(np.cos(angle), abs=1e-7)


def test_positions_refuse_an_odd_dim() -> None:
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        sine_cosine(6, 2, 2)


# ---- heads


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projection_head_ends_in_a_norm_without_shift(layers: int) -> None:
    head = Mlp(6, 8, 4, layers, last_norm="no_shift")
    output = head(torch.randn(16, 6))
    torch.testing.assert_close(output.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.var(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)
    assert sum(isinstance(module, nn.Linear) for module in head) == layers
    trained = [name for name, p in head.named_parameters() if p.requires_grad]
    assert f"{len(head) - 1}.bias" not in trained
    assert len(trained) == 3 * layers - 1


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_feature_dim_is_the_width_of_the_features(name: str) -> None:
    encoder = timm.create_model(name, num_classes=0).eval()
    assert encoder(torch.zeros(1, 3, 160, 160)).shape == (1, feature_dim(encoder))


# ---- drop path


def dropped(ids: Tensor, views: list[int], progress: Progress, layer: int = 0) -> list[bool]:
    module = KeyedDropPath(0.5, layer)
    set_keys(module, ids, views, progress)
    return (module(torch.ones(len(ids) * len(views), 3)) == 0).all(dim=1).tolist()


def test_drop_path_is_decided_per_sample_whoever_holds_it() -> None:
    ids = torch.arange(100, 400)
    whole = dropped(ids, [0], progress_at(3))
    parts = [dropped(part, [0], progress_at(3)) for part in ids.split(70)]
    assert list(chain(*parts)) == whole
    # Any other step, seed, view or layer is another draw.
    others = [
        dropped(ids, [0], progress_at(4)),
        dropped(ids, [0], progress_at(3, seed=1)),
        dropped(ids, [1], progress_at(3)),
        dropped(ids, [0], progress_at(3), layer=1),
    ]
    for other in others:
        assert 100 < np.sum(np.array(other) != whole) < 200
    assert dropped(ids, [0, 1], progress_at(3)) == whole + others[2]


def test_drop_path_drops_its_share_and_keeps_the_mean() -> None:
    module = KeyedDropPath(0.3, 2)
    set_keys(module, torch.arange(20000), [0], progress_at(0))
    output = module(torch.ones(20000, 1, 1))
    assert float((output == 0).float().mean()) == pytest.approx(0.3, abs=0.015)
    assert float(output.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(module.eval()(output), output)


def test_drop_paths_of_a_timm_model_are_all_keyed() -> None:
    encoder = timm.create_model("test_vit", num_classes=0, drop_path_rate=0.2)
    rates = [module.drop_prob for module in encoder.modules() if isinstance(module, DropPath)]
    keys = list(encoder.state_dict())
    key_drop_paths(encoder)
    ours = [module for module in encoder.modules() if isinstance(module, KeyedDropPath)]
    assert [module.probability for module in ours] == rates != []
    assert len({module.layer for module in ours}) == len(ours)
    assert list(encoder.state_dict()) == keys
    with pytest.raises(RuntimeError, match="set_keys before forward"):
        encoder(torch.zeros(2, 3, 160, 160))
    state = torch.get_rng_state()
    set_keys(encoder, torch.arange(2), [0], progress_at(0))
    encoder(torch.zeros(2, 3, 160, 160))
    assert torch.equal(torch.get_rng_state(), state)
