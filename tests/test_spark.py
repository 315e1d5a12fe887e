"""Sparse convolutional networks against brute force, and what SparK makes of them."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.pipelines.masks import BlockMask, RandomMask
from headrace.training.backbones import EncoderFactory
from headrace.training.blocks.norm import GlobalBatchNorm
from headrace.training.blocks.sparse import VisibleCells, sparse
from headrace.training.method import Facts
from headrace.training.preset import ConfigError
from tests.tiny_methods import ENCODERS, batch_of, build, module_of, progress_at, small_preset

GRID = (3, 2)


def cells_of(samples: int, count: int = 3, grid: tuple[int, int] = GRID) -> VisibleCells:
    generator = torch.Generator().manual_seed(samples)
    order = torch.rand(samples, grid[0] * grid[1], generator=generator).argsort(dim=1)
    return VisibleCells(order[:, :count].sort(dim=1).values, grid)


def seen_by_hand(cells: VisibleCells, height: int, width: int) -> Tensor:
    """bool [B, height, width], cell by cell."""
    rows, columns = cells.grid
    seen = torch.zeros(len(cells.kept), height, width, dtype=torch.bool)
    for sample, kept in enumerate(cells.kept.tolist()):
        for cell in kept:
            top, left = cell // columns * (height // rows), cell % columns * (width // columns)
            seen[sample, top : top + height // rows, left : left + width // columns] = True
    return seen


def hidden_pictures(
    cells: VisibleCells, channels: int, height: int, width: int, *, layout: Any = None
) -> Tensor:
    """float64 pictures that are 0 where nothing is seen."""
    generator = torch.Generator().manual_seed(1)
    shape = len(cells.kept), channels, height, width
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * seen_by_hand(cells, height, width)[:, None]
    return x.contiguous(memory_format=layout or torch.contiguous_format)


# ---- where is what


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


def resnet() -> ResNet:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=0, zero_init_last=False).double()  # pyright: ignore[reportReturnType]


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


# ---- the method


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hidden_pixels_have_no_influence(mode: str) -> None:
    method: Any = build("spark", "test_resnet").train(mode == "train")
    batch = batch_of("spark", samples=6)
    mask = batch.masks[0]
    assert mask is not None
    cells = VisibleCells((~mask).nonzero()[:, 1].view(6, -1), (method.side, method.side))
    seen = cells.map(64, 64)
    outputs = []
    for change in (torch.zeros(()), ~seen * 100.0, seen * 0.1):
        changed = replace(batch, views=(batch.views[0] + change,))
        with torch.no_grad():
            maps = method.encode(changed.views[0], cells)
            prediction = method.embed(changed, progress_at(0))["prediction"]
        outputs.append([*maps.values(), prediction])
    same, hidden, visible = outputs
    assert len(same) == 5
    assert all(torch.equal(a, b) for a, b in zip(same, hidden, strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(same, visible, strict=True))


def test_densify_puts_tokens_where_nothing_is_seen() -> None:
    spark = module_of("spark")
    layer = spark.Densify(4, 4, kernel=1).double()
    assert isinstance(layer.projection, nn.Identity)  # as wide as the decoder
    assert layer.token.abs().max() <= 0.02
    cells = cells_of(3)
    x = hidden_pictures(cells, 4, 6, 4)
    found = layer(x, cells)
    seen = seen_by_hand(cells, 6, 4)
    tokens = found.permute(0, 2, 3, 1)[~seen]
    torch.testing.assert_close(tokens, layer.token.expand_as(tokens))
    values = found.permute(0, 2, 3, 1)[seen]
    torch.testing.assert_close(values.mean(0), torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        values.var(0, unbiased=False), torch.ones(4).double(), rtol=1e-4, atol=0
    )
    projected = spark.Densify(4, 6, kernel=3).double()
    dense = projected(x, cells)
    assert dense.shape == (3, 6, 6, 4)
    assert (dense != 0).all()


def test_the_decoder_adds_maps_on_the_way_up() -> None:
    """decoder.py, LightDecoder.forward, around layers that only double the resolution."""
    decoder: Any = module_of("spark").Decoder({0: 5, 1: 4, 2: 3, 3: 2}, width=32, steps=5)
    cells = cells_of(2, grid=(2, 2), count=2)
    decoder.pixels = nn.Identity()
    for step in range(5):
        decoder.upscale[step] = nn.Upsample(scale_factor=2)
    for scale in range(4):
        decoder.densify[str(scale)].forward = lambda x, _: x
    maps = {scale: torch.randn(2, 1, 2 << scale, 2 << scale) for scale in range(4)}
    expected = sum(F.interpolate(each, size=(64, 64)) for each in maps.values())
    torch.testing.assert_close(decoder(maps, cells), expected)


def test_resnet50_as_published() -> None:
    """spark.py, SparK.__init__, and decoder.py, LightDecoder.__init__, of a ResNet-50."""
    spark = module_of("spark")
    recipe = spark.PRESETS["imagenet"]
    (mask,) = (view.mask for view in recipe.augmentation.flat_views)
    facts = Facts(1000, 10**6, (224,), 4096, 312, 499200, masks=(mask,))
    with torch.device("meta"):
        method = spark.build(recipe.objective, EncoderFactory("resnet50", {}), facts)
    assert (method.side, method.removed) == (7, 29)  # 20 of 49 cells are seen
    densify = method.decoder.densify
    widths = {0: (2048, 768, 1), 1: (1024, 384, 3), 2: (512, 192, 3), 3: (256, 96, 3)}
    for scale, (channels, width, kernel) in widths.items():
        layer = densify[str(scale)].projection
        assert (layer.in_channels, layer.out_channels) == (channels, width)
        assert layer.kernel_size == (kernel, kernel)
    ups = [step.up.in_channels for step in method.decoder.upscale]
    assert ups == [768, 384, 192, 96, 48]
    assert method.decoder.pixels.in_channels == 24
    groups = method.param_groups()
    undecayed = {id(parameter) for parameter in groups[1]["params"]}
    assert all(id(densify[scale].token) in undecayed for scale in densify)


def test_what_cannot_be_sparse_is_refused() -> None:
    spark, recipe = module_of("spark"), small_preset("spark")
    mask = RandomMask(32, 0.5)
    facts = Facts(0, 64, (64,), 16, 4, 20, masks=(mask,))

    def refused(text: str, backbone: str = "test_resnet", **changes: Any) -> None:
        objective = replace(recipe.objective, decoder_dim=changes.pop("decoder_dim", 64))
        options = ENCODERS[backbone] if backbone in ENCODERS else changes.pop("options", {})
        with torch.device("meta"), pytest.raises(ConfigError, match=text):
            spark.build(objective, EncoderFactory(backbone, options), replace(facts, **changes))

    refused("spark needs a timm ResNet.*VisionTransformer", "test_vit")
    refused("spark needs a timm ResNet.*ConvNeXt", "test_convnext")
    refused("spark needs a ResNet of convolutions.*layer1.0.se.gate is Sigmoid", "seresnet18")
    refused("spark needs a ResNet of convolutions.*is BlurPool2d", "resnetblur18")
    refused("last map, of 32 pixels, .* patch_pixels 16", masks=(RandomMask(16, 0.5),))
    refused("needs one view with a RandomMask.*BlockMask", masks=(BlockMask(32),))
    refused("needs one view with a RandomMask", masks=(mask, mask), view_pixels=(64, 64))
    refused("a multiple of 32, not 48", decoder_dim=48)


def test_another_stride_has_other_scales() -> None:
    """A ResNet that keeps its resolution paints smaller cells; the last map of each size counts."""
    spark = module_of("spark")
    network: Any = timm.create_model("test_resnet", num_classes=0, output_stride=8)
    assert spark.stages(network, 8) == {0: 4, 1: 1, 2: 0}
    assert spark.stages(resnet(), 32) == {0: 4, 1: 3, 2: 2, 3: 1}


def test_a_prediction_costs_no_gradient_of_hidden_cells() -> None:
    """Nothing of the encoder is asked for what it does not see: the picture's gradient is 0."""
    method: Any = build("spark", "test_resnet")
    batch = batch_of("spark", samples=4)
    view = batch.views[0].clone().requires_grad_()
    prediction = method.embed(replace(batch, views=(view,)), progress_at(0))["prediction"]
    prediction.square().sum().backward()
    mask = batch.masks[0]
    assert mask is not None
    assert view.grad is not None
    asked = view.grad.abs().sum(dim=1).view(4, 2, 32, 2, 32).sum(dim=(2, 4)).flatten(1)
    np.testing.assert_array_equal((asked > 0).numpy(), ~mask.numpy())
