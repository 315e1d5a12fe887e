"""SparK: its loss against a float64 transcription on whole pictures, its encoder, its decoder."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.pipelines.masks import BlockMask, RandomMask
from headrace.training.backbones import EncoderFactory
from headrace.training.blocks.patches import (
    normalize_patches,
    patchify,
    reconstruction_loss,
)
from headrace.training.blocks.sparse import VisibleCells
from headrace.training.method import Facts
from headrace.training.preset import ConfigError
from tests.masked_checks import (
    assert_asks_for_hidden_pixels,
    assert_shows_a_perfect_prediction,
    hidden_pixels_oracle,
)
from tests.objective_checks import assert_same, differs
from tests.sparse_checks import cells_of, hidden_pictures, resnet, seen_by_hand
from tests.tiny_methods import ENCODERS, batch_of, build, module_of, progress_at, small_preset


@pytest.mark.parametrize(("batch", "side", "cell"), [(2, 2, 2), (1, 3, 4), (3, 4, 2)])
def test_spark_loss(batch: int, side: int, cell: int) -> None:
    random = np.random.default_rng(side)
    shape = batch, 3, side * cell, side * cell
    pictures = random.normal(size=shape).astype(np.float32).astype(np.float64)
    at = random.normal(size=shape).astype(np.float32).astype(np.float64)
    cells = side**2
    mask = random.permuted(np.tile(np.arange(cells) < round(0.6 * cells), (batch, 1)), axis=1)
    target = normalize_patches(patchify(torch.tensor(pictures), cell))

    def ours(x: Tensor) -> Tensor:
        return reconstruction_loss(patchify(x, cell), target, torch.tensor(mask))

    assert_same(ours, lambda x: hidden_pixels_oracle(x, pictures, mask, cell), at)
    value = hidden_pixels_oracle(at, pictures, mask, cell)
    assert differs(value, hidden_pixels_oracle(at, pictures, mask, cell, ddof=0))
    assert differs(value, hidden_pixels_oracle(at, pictures, mask, cell, by_channel=True))
    assert differs(value, hidden_pixels_oracle(at, pictures, mask, cell, normalized=False))
    assert differs(value, hidden_pixels_oracle(at, pictures, mask, cell, everywhere=True))
    assert differs(value, hidden_pixels_oracle(at, pictures, ~mask, cell))


def test_it_asks_for_hidden_pixels() -> None:
    assert_asks_for_hidden_pixels("spark", "test_resnet", normalize=True)


def test_a_perfect_prediction_is_shown_as_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_shows_a_perfect_prediction("spark", "test_resnet", monkeypatch)


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
    decoder: Any = module_of("spark").Decoder({0: 5, 1: 4, 2: 3, 3: 2}, width=32, doublings=5)
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
    preset = spark.PRESETS["imagenet"]
    (mask,) = (view.mask for view in preset.augmentation.flat_views)
    facts = Facts(1000, 10**6, (224,), 4096, 312, 499200, masks=(mask,))
    with torch.device("meta"):
        method = spark.build(preset.objective, EncoderFactory("resnet50", {}), facts)
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
    spark, preset = module_of("spark"), small_preset("spark")
    mask = RandomMask(32, 0.5)
    facts = Facts(0, 64, (64,), 16, 4, 20, masks=(mask,))

    def refused(text: str, backbone: str = "test_resnet", **changes: Any) -> None:
        objective = replace(preset.objective, decoder_dim=changes.pop("decoder_dim", 64))
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
