"""What a run exports is whole: timm alone reads RUN/encoder and sees the pictures as we do."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn

from headrace.pipelines import recipes
from headrace.pipelines.loader import open_loader
from headrace.pipelines.ops import CenterCrop, Flip, Resize
from headrace.pipelines.recipe import Augmentation, View
from headrace.shards.store import open_store
from headrace.training.backbones import EncoderFactory, resolve_options
from headrace.training.catalogue import find_method
from headrace.training.judged_view import judged_pixels
from headrace.training.run.export import export, export_all, timm_config
from headrace.training.run.what_now import what_now

CLASSES = ("cat", "dog")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs and PNGs of odd sizes, larger and smaller than the views."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate([(90, 121), (301, 40), (37, 33), (256, 384)]):
        small = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
    return folder


def ours(photos: Path, view: Augmentation, encoder: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels, features) of the pictures in the order of their names, as evaluate.py takes them."""
    store = open_store(photos)
    with open_loader(
        store, view, batch_size=4, engine="reference", seed=0, drop_last=False, passes=1
    ) as loader:
        batch = next(iter(loader))
    pixels = batch.views[0][torch.as_tensor(batch.ids).argsort()]
    with torch.no_grad():
        return pixels, encoder(pixels)


def strangers(photos: Path, network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by somebody who has timm and Pillow."""
    transform: Any = create_transform(**resolve_model_data_config(network), is_training=False)
    pictures = [Image.open(path).convert("RGB") for path in sorted(photos.iterdir())]
    pixels = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad():
        return pixels, network(pixels)


@pytest.mark.parametrize(
    ("method", "preset", "backbone"),
    [
        ("simclr", "cifar", "test_resnet"),
        ("simclr", "cifar", "test_vit"),
        ("simclr", "imagenet", "test_resnet"),
        ("simclr", "imagenet", "test_convnext"),
        ("dino", "imagenet", "test_vit"),
        ("moco", "imagenet", "test_resnet"),
        ("moco", "imagenet", "test_vit"),
        ("swav", "cifar", "test_convnext"),
        ("cpc", "imagenet", "test_resnet"),
    ],
)
def test_a_stranger_sees_the_same(
    method: str, preset: str, backbone: str, photos: Path, tmp_path: Path
) -> None:
    view = find_method(method).presets[preset].test
    pixels = judged_pixels(view)
    torch.manual_seed(0)
    options = resolve_options(backbone, {"drop_path_rate": 0.1}, (32,), pixels)
    encoder = EncoderFactory(backbone, options)().eval()
    export_all({"encoder": encoder.state_dict()}, tmp_path, timm_config(encoder, view, ()))
    network: Any = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    assert network.num_classes == 0
    assert network.pretrained_cfg["input_size"] == (3, pixels, pixels)
    their_pixels, their_features = strangers(photos, network)
    our_pixels, our_features = ours(photos, view, encoder)
    # The same resampled bytes; what differs is the rounding of (x / 255 - mean) / std.
    assert (our_pixels - their_pixels).abs().max() < 2e-6
    torch.testing.assert_close(our_features, their_features, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # a normalisation that is a little off is another feature
        assert (network(their_pixels + 0.1) - our_features).abs().max() > 1e-3


def test_any_resize_and_crop_has_a_share() -> None:
    """timm keeps the crop's share of the resized side, a float; ours is a number of pixels."""
    encoder = EncoderFactory("test_resnet", {})()
    for pixels in range(1, 300, 7):
        for resized in range(pixels, pixels + 40, 9):
            content = timm_config(encoder, recipes.center(pixels, resized), ()).content
            assert content is not None
            share = content["pretrained_cfg"]["crop_pct"]
            transform: Any = create_transform((3, pixels, pixels), crop_pct=share)
            assert transform.transforms[0].size == resized


def test_a_classifier_names_its_classes(tmp_path: Path) -> None:
    encoder = EncoderFactory("test_resnet", {})()
    whole = timm.create_model("test_resnet", num_classes=2)
    exports = {"encoder": encoder.state_dict(), "classifier": whole.state_dict()}
    export_all(exports, tmp_path, timm_config(encoder, recipes.center(), CLASSES))
    network: Any = timm.create_model(f"local-dir:{tmp_path / 'classifier'}", pretrained=True)
    assert network.pretrained_cfg["label_names"] == list(CLASSES)
    for name, value in whole.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    with safetensors.safe_open(tmp_path / "classifier.safetensors", "pt") as file:
        assert json.loads(file.metadata()["label_names"]) == list(CLASSES)


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    weights = EncoderFactory("test_resnet", {})().state_dict()
    for number in range(8):
        export(weights, tmp_path / str(number), ("déjà", "猫"))
    assert len({(tmp_path / str(number)).read_bytes() for number in range(8)}) == 1
    read = load_file(tmp_path / "0")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) for name, value in weights.items())


@pytest.mark.parametrize("links", [True, False])
def test_weights_lie_on_the_disk_once_where_that_can_be(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    encoder = EncoderFactory("test_resnet", {})()
    network = timm_config(encoder, recipes.center(), ())
    for _ in range(2):  # a second checkpoint replaces the first
        torch.nn.init.normal_(next(encoder.parameters()))
        export_all({"encoder": encoder.state_dict()}, tmp_path, network)
        first, second = tmp_path / "encoder.safetensors", tmp_path / "encoder/model.safetensors"
        assert first.read_bytes() == second.read_bytes()
        assert first.samefile(second) == links
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "encoder.safetensors"]


class Two(nn.Module):
    pass


@pytest.mark.parametrize(
    ("make", "view", "said"),
    [
        (Two, recipes.center(), "a Two is no timm model by itself"),
        (
            EncoderFactory("test_resnet", {}),
            Augmentation("flipped", (View("view", (*recipes.center().views[0].ops, Flip(0.5))),)),
            "its test view is no square cut",
        ),
        (
            EncoderFactory("test_resnet", {}),
            Augmentation("oblong", (View("view", (Resize(64), CenterCrop((32, 48)))),)),
            "its test view is no square cut",
        ),
    ],
)
def test_what_timm_cannot_read_is_said(
    make: Callable[[], nn.Module], view: Augmentation, said: str, tmp_path: Path
) -> None:
    encoder = make()
    network = timm_config(encoder, view, ())
    export_all({"encoder": encoder.state_dict()}, tmp_path, network)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]
    assert f"timm alone cannot read its encoder ({said}" in what_now(tmp_path, network, "knn")


def test_our_own_network_is_read_after_an_import(tmp_path: Path) -> None:
    encoder = EncoderFactory("small_convnet", {})()
    network = timm_config(encoder, recipes.center(32, 32), ())
    export_all({"encoder": encoder.state_dict()}, tmp_path, network)
    said = what_now(tmp_path, network, "linear")
    assert f"python training/evaluate.py {tmp_path} --protocol linear" in said
    code = said.partition("use its encoder with ")[2]
    found: dict[str, Any] = {"timm": timm}
    exec(code.replace("timm.create", "read = timm.create"), found)
    for name, value in encoder.state_dict().items():
        assert torch.equal(found["read"].state_dict()[name], value), name
