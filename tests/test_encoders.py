"""This project's own backbones: what timm asks of a model, and a first layer that whitens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.pipelines.order import Order
from headrace.pipelines.recipes import center
from headrace.shards.store import open_store
from headrace.training.backbones import (
    EncoderFactory,
    FitsImages,
    resolve_options,
)
from headrace.training.build import untrained_encoder
from headrace.training.catalogue import find_method
from headrace.training.encoders.small_convnet import (
    LEAST_VARIANCE,
    SmallConvNet,
    Whitening,
    small_convnet,
)
from headrace.training.inputs import sample_images
from headrace.training.run.export import export, with_classifier
from headrace.training.run.record import read_record
from headrace.training.train import main as train_main

WHITENED = {"whiten": True, "widths": (8, 8, 16)}


def pictures(seed: int = 0, count: int = 64, pixels: int = 16) -> Tensor:
    """Smooth ones with a colour cast: neighbouring pixels and channels are alike."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, pixels + 4, pixels + 4, generator=generator)
    smooth = F.avg_pool2d(noise + noise.mean(dim=1, keepdim=True), 5, stride=1)
    return smooth + torch.tensor([0.5, 0.2, -0.3])[:, None, None]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("pixels", [24, 32])
def test_shapes(whiten: bool, pixels: int) -> None:
    network = small_convnet(num_classes=0, whiten=whiten)
    batch = torch.randn(2, 3, pixels, pixels)
    assert network(batch).shape == (2, 192)
    assert network.num_features == 192
    assert network.forward_features(batch).shape == (2, 192, pixels // 8, pixels // 8)
    classifier = timm.create_model("small_convnet", num_classes=7, whiten=whiten)
    assert isinstance(classifier, SmallConvNet)
    assert classifier(batch).shape == (2, 7)
    assert classifier.get_classifier() is classifier.head
    assert with_classifier(classifier, nn.Linear(192, 7)).keys() == classifier.state_dict().keys()
    trained = {name for name, _ in network.named_parameters()}
    assert any(name.startswith("stem") for name in trained) != whiten


def test_whitened_patches_are_uncorrelated_and_equally_large() -> None:
    """The covariance over the data is the identity but for what LEAST_VARIANCE keeps down."""
    images = pictures()
    layer = Whitening(3)
    layer.fit(images)
    whitened = F.conv2d(images.double(), layer.weight.double(), layer.bias.double())
    values = whitened.transpose(0, 1).flatten(1)
    patches = F.unfold(images.double(), 3).transpose(1, 2).flatten(0, 1)
    variances = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0)).flip(0)
    expected = variances / (variances + LEAST_VARIANCE * variances[0])
    assert expected[0] > 0.99
    torch.testing.assert_close(
        torch.cov(values, correction=0), torch.diag(expected), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(values.mean(dim=1), torch.zeros(27).double(), rtol=0, atol=1e-4)
    # Both signs of it, at every second place.
    signs = layer(images)
    positive, negative = signs.chunk(2, dim=1)
    assert (signs >= 0).all()
    assert signs.shape == (64, 54, 8, 8)
    inner = whitened[:, :, 1::2, 1::2].float()
    torch.testing.assert_close((positive - negative)[:, :, 1:, 1:], inner, rtol=0, atol=1e-4)


def test_the_layer_is_a_function_of_the_images() -> None:
    layers = []
    for seed in (0, 0, 1):
        layer = Whitening(3)
        layer.fit(pictures(seed))
        layers.append(layer.weight)
    assert torch.equal(layers[0], layers[1])
    assert not torch.equal(layers[0], layers[2])


def test_an_encoder_is_fitted_when_it_is_made() -> None:
    """To the same images each time it is made, asking for them once, and drawing nothing more."""
    asked = []

    def images() -> Tensor:
        asked.append(1)
        return pictures()

    factory = EncoderFactory("small_convnet", WHITENED, images=images)
    torch.manual_seed(0)
    first, second = factory(), factory()
    assert isinstance(first, SmallConvNet)
    assert isinstance(second, SmallConvNet)
    assert isinstance(first, FitsImages)
    assert len(asked) == 1
    expected = Whitening(3)
    expected.fit(pictures())
    for encoder in (first, second):
        assert isinstance(encoder.stem, Whitening)
        assert torch.equal(encoder.stem.weight, expected.weight)
    torch.manual_seed(0)
    unfitted = EncoderFactory("small_convnet", WHITENED)()
    assert isinstance(unfitted, SmallConvNet)
    assert torch.equal(unfitted.stages[0][0].weight, first.stages[0][0].weight)  # pyright: ignore
    torch.manual_seed(0)
    EncoderFactory("test_resnet", {}, images=images)()
    assert len(asked) == 1


def test_weights_travel_through_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = EncoderFactory("small_convnet", WHITENED, images=pictures)().eval()
    export(encoder.state_dict(), tmp_path / "encoder.safetensors")
    read = timm.create_model(
        "small_convnet",
        num_classes=0,
        checkpoint_path=str(tmp_path / "encoder.safetensors"),
        **WHITENED,
    ).eval()
    batch = pictures(seed=3, count=4, pixels=24)
    for name, value in encoder.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
    with torch.no_grad():
        torch.testing.assert_close(read(batch), encoder(batch), rtol=1e-4, atol=1e-5)


def test_options_are_resolved_without_images() -> None:
    assert resolve_options("small_convnet", WHITENED, (24, 24), 32) == WHITENED


def test_images_are_the_orders_first(data: Path) -> None:
    """By the seed; neither what is held out nor what a subset leaves out."""
    store, view = open_store(data, "train"), center(32, 32)
    images = sample_images(store, view, seed=3)
    assert images.shape == (60, 3, 32, 32)
    assert torch.equal(images, sample_images(store, view, seed=3))
    assert not torch.equal(images, sample_images(store, view, seed=4))
    whole = sorted(image.sum().item() for image in images)
    subset = np.array([1, 5, 8, 9], dtype=np.int64)
    some = sample_images(store, view, seed=3, subset=subset)
    assert len(some) == 4
    assert {image.sum().item() for image in some} < set(whole)
    kept = sample_images(store, view, seed=3, holdout=0.25)
    order = Order(60, batch_size=45, seed=3, holdout=0.25)
    assert len(kept) == order.epoch_length == 45


@pytest.fixture
def demo_run(data: Path, tmp_path: Path) -> Callable[..., Path]:
    def begin(*options: str) -> Path:
        out = tmp_path / "run"
        arguments = "--method simclr --preset demo --data.batch-size 16 --data.engine reference"
        paths = ["--data.train", str(data), "--run.out", str(out)]
        sizes = ["--run.seed", "3", "--backbone-options", "whiten=True", "widths=(8,8,16)"]
        assert train_main([*arguments.split(), *paths, *sizes, *options]) == 0
        return out

    return begin


def test_a_run_begins_with_what_untrained_judges(
    demo_run: Callable[..., Path],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The frozen layer is in the exported encoder; a resumed run asks for no images."""
    run = demo_run("--run.steps", "2", "--optim.learning-rate", "0")
    store = open_store(data, "train")
    begun = untrained_encoder(read_record(run), store)
    exported = timm.create_model(
        "small_convnet",
        num_classes=0,
        checkpoint_path=str(run / "encoder.safetensors"),
        **WHITENED,
    )
    expected = Whitening(3)
    expected.fit(sample_images(store, read_record(run).test, seed=3))
    assert torch.equal(exported.get_buffer("stem.weight"), expected.weight)
    for name, value in exported.named_parameters():
        assert torch.equal(value, begun.get_parameter(name)), name
    assert torch.equal(begun.get_buffer("stem.weight"), expected.weight)

    def refuse(*arguments: object, **options: object) -> Tensor:
        raise AssertionError("a resumed run has its weights")

    monkeypatch.setattr("headrace.training.build.initial_images", refuse)
    demo_run("--run.steps", "2", "--optim.learning-rate", "0")


def test_another_data_set_has_no_untrained_encoder(
    demo_run: Callable[..., Path],
    data: Path,
) -> None:
    run = demo_run("--run.steps", "1")
    with pytest.raises(ValueError, match=r"is another data set: name that one with --data\.train"):
        untrained_encoder(read_record(run), open_store(data, "test"))


def test_the_demo_is_a_preset_as_others_are() -> None:
    preset = find_method("simclr").presets["demo"]
    assert preset.backbone == "small_convnet"
    assert preset.backbone_options == {"whiten": True}
    assert {view.size for view in preset.augmentation.flat_views} == {24}
    assert preset.test.flat_views[0].size == 32
