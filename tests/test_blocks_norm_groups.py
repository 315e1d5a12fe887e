"""Batch norm in groups: torch's own batch norm on each group's rows."""

import copy
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from headrace.training.blocks.norm import convert
from headrace.training.blocks.norm_groups import GroupedBatchNorm, group_norms
from headrace.training.preset import ConfigError
from headrace.training.world import World


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
