"""Sparse convolutional networks against brute force."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.training.blocks.norm import GlobalBatchNorm
from headrace.training.blocks.sparse import VisibleCells, sparse
from tests.sparse_checks import cells_of, hidden_pictures, resnet, seen_by_hand


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("height", "width"), [(3, 2), (6, 8), (12, 4)])
def test_visible_positions_are_taken_and_put_back(height: int, width: int, layout: Any) -> None:
    cells = cells_of(4)
    seen = seen_by_hand(cells, height, width)
    assert torch.equal(cells.map(height, width)[:, 0], seen)
    assert torch.equal(cells.map(height, width, torch.float32)[:, 0], seen.float())
    x = torch.randn(4, 5, height, width).contiguous(memory_format=layout)
    taken = cells.take(x)
    assert taken.is_contiguous(memory_format=layout)
    for sample in range(4):
        mine = taken[sample, :, :, 0].T.tolist()
        assert sorted(mine) == sorted(x[sample][:, seen[sample]].T.tolist())
    back = cells.put(taken, height, width)
    assert torch.equal(back, x * seen[:, None])


def test_a_map_of_uneven_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="7 x 4 has no 3 x 2 cells"):
        cells_of(2).map(7, 4)


# ---- single operations


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (1, 1, 0, 1), (3, 1, 2, 2)],
)
def test_convolution_sums_over_visible_neighbours(
    kernel: int, stride: int, padding: int, dilation: int
) -> None:
    """Position by position in float64: the paper's section 3.1, and 0 where nothing is seen."""
    cells = cells_of(2)
    x = hidden_pictures(cells, 2, 6, 8)
    layer = nn.Conv2d(2, 3, kernel, stride, padding, dilation).double()
    with sparse(layer, cells), torch.no_grad():
        found = layer(x)
    height, width = found.shape[2:]
    seen_in, seen_out = seen_by_hand(cells, 6, 8), seen_by_hand(cells, height, width)
    expected = torch.zeros_like(found)
    assert layer.bias is not None
    for sample, row, column in seen_out.nonzero().tolist():
        total = layer.bias.detach().clone()
        for down in range(kernel):
            for right in range(kernel):
                y = row * stride - padding + down * dilation
                z = column * stride - padding + right * dilation
                if 0 <= y < 6 and 0 <= z < 8 and seen_in[sample, y, z]:
                    total += layer.weight[:, :, down, right].detach() @ x[sample, :, y, z]
        expected[sample, :, row, column] = total
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(layer(x), expected)  # a dense one fills the holes


@pytest.mark.parametrize(
    "layer", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2), nn.MaxPool2d(2, 2)], ids=str
)
def test_pooling_leaves_holes(layer: nn.Module) -> None:
    cells = cells_of(3)
    x = hidden_pictures(cells, 2, 12, 8).abs()
    with sparse(layer, cells):
        found = layer(x)
    seen = seen_by_hand(cells, *found.shape[2:])
    assert torch.equal(found, layer(x) * seen[:, None])


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4, momentum=0.3),
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "with activation": lambda: BatchNormAct2d(4, act_layer=nn.SiLU),
    "over all ranks": lambda: GlobalBatchNorm(nn.BatchNorm2d(4, momentum=0.3)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", NORMS)
def test_batch_norm_sees_visible_positions_alone(kind: str, layout: Any) -> None:
    """encoder.py, sp_bn_forward: statistics of the selected positions, zeros elsewhere."""
    norm: Any = NORMS[kind]().double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 2)
    cells = cells_of(5)
    x = (3 * hidden_pictures(cells, 4, 6, 4, layout=layout) + 1).requires_grad_()
    cotangent = torch.randn(x.shape, dtype=torch.float64)
    with sparse(norm, cells):
        found = norm(x)
    found.backward(cotangent)
    assert x.grad is not None
    gradient, x.grad = x.grad, None

    seen = seen_by_hand(cells, 6, 4)
    values = x.permute(0, 2, 3, 1)[seen]  # [n, C]
    mean, variance = values.mean(0), values.var(0, unbiased=False)
    normal = (values - mean) / (variance + norm.eps).sqrt()
    if norm.weight is not None:
        normal = normal * norm.weight + norm.bias
    if kind == "with activation":
        normal = F.silu(normal)
    expected = torch.zeros(5, 6, 4, 4, dtype=torch.float64)
    expected[seen] = normal
    expected = expected.permute(0, 3, 1, 2)
    expected.backward(cotangent)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, x.grad)
    torch.testing.assert_close(norm.running_mean, norm.momentum * mean.detach())
    unbiased = norm.momentum * values.var(0).detach() + 1 - norm.momentum
    torch.testing.assert_close(norm.running_var, unbiased)
    assert norm.num_batches_tracked == 1

    norm.eval()
    with sparse(norm, cells):
        found = norm(x)
    torch.testing.assert_close(found, norm(x) * seen[:, None])


# ---- whole networks


class MaskedConv(nn.Module):
    """encoder.py, sp_conv_forward, around a convolution or pooling."""

    def __init__(self, inner: nn.Module, cells: VisibleCells) -> None:
        super().__init__()
        self.inner, self.cells = inner, cells

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x * seen_by_hand(self.cells, *x.shape[2:])[:, None]


class MaskedNorm(nn.Module):
    """encoder.py, sp_bn_forward."""

    def __init__(self, inner: nn.BatchNorm2d, cells: VisibleCells) -> None:
        super().__init__()
        self.inner, self.cells = inner, cells

    def forward(self, x: Tensor) -> Tensor:
        seen = seen_by_hand(self.cells, *x.shape[2:])
        inner = self.inner
        values = F.batch_norm(
            x.permute(0, 2, 3, 1)[seen], None, None, inner.weight, inner.bias, training=True
        )
        full = x.new_zeros(x.shape).permute(0, 2, 3, 1).contiguous()
        full[seen] = values
        return full.permute(0, 3, 1, 2)


def converted(module: nn.Module, cells: VisibleCells) -> nn.Module:
    """encoder.py, SparseEncoder.dense_model_to_sparse."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            setattr(module, name, MaskedConv(child, cells))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, MaskedNorm(child, cells))
        else:
            converted(child, cells)
    return module


def test_a_resnet_is_the_one_with_masked_modules() -> None:
    network, cells = resnet(), cells_of(4, grid=(2, 2), count=2)
    reference: Any = converted(copy.deepcopy(network), cells)
    x = hidden_pictures(cells, 3, 64, 64)
    with sparse(network, cells):
        maps: Any = network.forward_intermediates(x, intermediates_only=True)
    expected = reference.forward_intermediates(x, intermediates_only=True)
    assert [each.shape[2] for each in maps] == [32, 16, 8, 4, 2]
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    for each in (maps, expected):
        torch.stack([features.square().sum() for features in each[1:]]).sum().backward()
    gradients = [p.grad for p in network.parameters()]
    for gradient, parameter in zip(gradients, reference.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_afterwards_the_network_is_dense_again() -> None:
    """Also after an error; and two networks, or passes, have each their own cells."""
    network, other = resnet().eval(), resnet().eval()
    x = hidden_pictures(cells_of(4, grid=(2, 2), count=4), 3, 64, 64)
    few, more = cells_of(4, grid=(2, 2), count=1), cells_of(4, grid=(2, 2), count=3)
    dense = network(x)
    with sparse(network, few):
        one = network.forward_features(x * few.map(64, 64))
        with sparse(other, more):
            three = other.forward_features(x * more.map(64, 64))
            again = network.forward_features(x * few.map(64, 64))
    assert torch.equal(one, again)
    assert not torch.allclose(one, three)
    assert [int((each != 0).any(dim=1).sum()) for each in (one, three)] == [4, 12]
    with pytest.raises(RuntimeError, match="in between"), sparse(network, few):
        raise RuntimeError("in between")
    assert torch.equal(network(x), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
