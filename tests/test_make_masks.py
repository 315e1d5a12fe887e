"""make_masks: measures that find an object, a network that learns from their vote, and the tool."""

import io
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from headrace.pipelines.loader import open_loader
from headrace.shards.component import component_directory, open_component
from headrace.shards.dataset import write_dataset
from headrace.shards.index import Record
from headrace.shards.store import Store, open_store
from headrace.training.blocks.color import rgb_to_lab
from headrace.training.methods.relic_v2 import PRESETS
from tests.objective_checks import assert_same

ROOT = Path(__file__).resolve().parent.parent


make_masks: Any = import_module("headrace.tools.make_masks")
saliency: Any = import_module("headrace.tools.masks.measures")
network_of: Any = import_module("headrace.tools.masks.network")
SAMPLES = 48
SMALL = ["--threads", "1", "--steps", "12", "--train-images", "32", "--samples", "3"]


def scene(number: int, height: int = 32, width: int = 32) -> tuple[NDArray, NDArray]:
    """(a disk of one colour before a textured ground of another, where the disk is)."""
    random = np.random.default_rng(number)
    ground = random.integers(40, 216, 3)
    colour = np.where(ground > 127, ground - 110, ground + 110)  # as far as it may be
    radius = 0.22 * min(height, width)
    y, x = (side * random.uniform(0.35, 0.65) for side in (height, width))
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    pixels = np.where(inside[..., None], colour, ground) + random.integers(
        -25, 26, (height, width, 3)
    )
    return np.clip(pixels, 0, 255).astype(np.uint8), inside


def overlap(mask: NDArray, inside: NDArray) -> float:
    """Intersection over union at one half."""
    return float((inside & (mask > 0.5)).sum() / (inside | (mask > 0.5)).sum())


def write_scenes(directory: Path, count: int = SAMPLES, empty: bool = False) -> Store:
    """Photographs of several sizes, as JPEGs."""
    records = []
    for number in range(count):
        height, width = 30 + number % 9, 44 - number % 7
        pixels = scene(number, height, width)[0]
        if empty:
            pixels = np.full_like(pixels, number % 256)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        records.append(
            Record(number, f"{number}.jpg", -1, None, buffer.getvalue(), "jpg", height, width)
        )
    write_dataset(directory, "webdataset", records)
    return open_store(directory)


# ---- measures


@pytest.mark.parametrize("name", saliency.MEASURES)
def test_every_measure_is_higher_in_the_object(name: str) -> None:
    """Of pictures on average; the spectral residual finds outlines and is held to less."""
    gaps = []
    for number in range(12):
        pixels, inside = scene(number)
        found = saliency.measured(pixels)[name]
        assert found.shape == (32, 32)
        assert found.dtype == np.float32
        assert 0 <= found.min() <= found.max() <= 1
        gaps.append(found[inside].mean() - found[~inside].mean())
    assert np.mean(gaps) > (0.1 if name == "spectral residual" else 0.5)


def test_the_vote_is_better_than_a_lone_measure_is_at_its_worst() -> None:
    votes = [saliency.consensus(saliency.measured(scene(n)[0])) for n in range(12)]
    assert all(set(np.unique(np.rint(5 * vote))) <= set(range(6)) for vote in votes)
    assert np.mean([overlap(vote, scene(n)[1]) for n, vote in enumerate(votes)]) > 0.8


@pytest.mark.parametrize("height", [16, 31, 200])
def test_measures_take_any_size_and_a_picture_without_anything(height: int) -> None:
    plain = np.full((height, 24, 3), 130, np.uint8)
    for name, found in saliency.measured(plain).items():
        assert not found.any(), name
    assert not saliency.consensus(saliency.measured(plain)).any()
    assert saliency.consensus(saliency.measured(scene(1, height, 24)[0])).shape == (height, 24)


def test_lab_is_that_of_the_standard() -> None:
    """Bruce Lindbloom's values for sRGB primaries, white and grey under D65."""
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3, [119] * 3]], np.uint8)
    expected = [
        (53.24, 80.09, 67.20), (87.73, -86.18, 83.18), (32.30, 79.19, -107.86), (100, 0, 0),
        (50.03, 0, 0),
    ]  # fmt: skip
    np.testing.assert_allclose(saliency.lab(colours)[0], expected, atol=0.1)


def test_lab_is_that_of_the_methods() -> None:
    """cmc's colours, with the same constants; another rounding is all that may differ."""
    rgb = scene(0)[0]
    pictures = torch.tensor(rgb).permute(2, 0, 1)[None] / 255
    expected = rgb_to_lab(pictures)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(saliency.lab(rgb), expected, atol=1e-3)


def test_minimum_barrier_is_the_least_range_on_a_way_out() -> None:
    """Against all paths of a small picture, by brute force over windows of values: a point reaches
    the border within [low, high] if values of that window connect it."""
    random = np.random.default_rng(0)
    values = random.integers(0, 6, (7, 7)).astype(np.float32)
    found = saliency._barriers(values, 40)
    expected = np.full((7, 7), np.inf)
    for low in range(6):
        for high in range(low, 6):
            allowed = (values >= low) & (values <= high)
            reached = allowed.copy()
            reached[1:-1, 1:-1] = False
            for _ in range(49):
                spread = reached.copy()
                spread[1:] |= reached[:-1]
                spread[:-1] |= reached[1:]
                spread[:, 1:] |= reached[:, :-1]
                spread[:, :-1] |= reached[:, 1:]
                reached = spread & allowed
            expected = np.where(reached, np.minimum(expected, high - low), expected)
    # Raster scans keep one path per point, so they may miss the least range, never beat it.
    assert (found >= expected).all()
    assert (found == expected).mean() > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_otsu_is_the_best_of_all_thresholds(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.concatenate([random.normal(0.3, 0.08, 300), random.normal(0.75, 0.05, 100)])
    values = np.clip(values, 0, 1).astype(np.float32)

    def within(threshold: float) -> float:
        parts = values[values <= threshold], values[values > threshold]
        return sum(len(part) * float(part.var()) if len(part) else 0.0 for part in parts)

    chosen = saliency.otsu(values)
    best = min(within(step / 64) for step in range(12, 60))
    assert within(chosen) < 1.02 * best


# ---- the network


def test_vote_loss() -> None:
    """Against float64, picture by picture and pixel by pixel."""
    random = np.random.default_rng(0)
    shares = random.integers(0, 6, (3, 1, 2, 4)) / 5
    logits = random.normal(size=(3, 1, 2, 4)).astype(np.float32).astype(np.float64)

    def oracle(given: NDArray) -> float:
        entropy, weights, dice = 0.0, 0.0, []
        for picture, votes in zip(given, shares, strict=True):
            both = either = 0.0
            for logit, share in zip(picture.flat, votes.flat, strict=True):
                weight, label, p = abs(2 * share - 1), share > 0.5, 1 / (1 + np.exp(-logit))
                entropy -= weight * np.log(p if label else 1 - p)
                weights += weight
                both += weight * p * label
                either += weight * p + weight * label
            dice.append(1 - (2 * both + 1) / (either + 1))
        return entropy / weights + float(np.mean(dice))

    target = torch.tensor(shares, dtype=torch.float32)
    assert_same(lambda x: network_of.vote_loss(x, target), oracle, logits)


def test_the_network_learns_what_votes_have_in_common() -> None:
    """Labels with a tenth of the pixels wrong, and unseen pictures."""
    random = np.random.default_rng(0)
    pictures, labels = [], []
    for number in range(64):
        pixels, inside = scene(number)
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
        wrong = random.random(inside.shape) < 0.1
        labels.append(torch.from_numpy((inside ^ wrong).astype(np.float32))[None])
    network = network_of.new_network(seed=0)
    losses: list[float] = []
    network_of.train(
        network, torch.stack(pictures), torch.stack(labels), steps=40, seed=0,
        report=losses.append,
    )  # fmt: skip
    assert not network.training
    assert len(losses) == 40
    unseen = [scene(number) for number in range(100, 108)]
    batch = torch.stack([torch.from_numpy(pixels).permute(2, 0, 1) for pixels, _ in unseen])
    found = network_of.predict(network, batch).numpy()
    assert np.mean([overlap(m, inside) for m, (_, inside) in zip(found, unseen, strict=True)]) > 0.8


def test_a_seed_gives_the_network_and_leaves_torch_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (network_of.new_network(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(
        torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )
    assert sum(parameter.numel() for parameter in first.parameters()) < 130_000


# ---- the tool


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A data set with masks after enough steps to be right."""
    directory = tmp_path_factory.mktemp("data") / "train"
    store = write_scenes(directory)
    given = ["--threads", "1", "--steps", "60", "--train-images", "48", "--samples", "3"]
    assert make_masks.main([str(directory.parent), *given]) == 0
    return store, component_directory(store, "saliency")


def masks_of(store: Store) -> list[NDArray]:
    component = open_component(store, "saliency")
    encoded = component.read(np.arange(len(component)))
    pictures = [Image.open(io.BytesIO(data.tobytes())) for data in encoded]
    assert all(picture.mode == "L" for picture in pictures)
    return [np.asarray(picture) / 255 for picture in pictures]


def test_masks_lie_on_the_objects(made: tuple[Store, Path]) -> None:
    store, directory = made
    overlaps = []
    for number, (mask, size) in enumerate(
        zip(masks_of(store), store.sizes(np.arange(len(store))), strict=True)
    ):
        assert mask.shape == tuple(size)
        overlaps.append(overlap(mask, scene(number, *size)[1]))
    assert np.mean(overlaps) > 0.75
    options = json.loads((directory / "manifest.json").read_text())["options"]
    assert options["component_of"] == store.fingerprint
    assert (options["side"], options["steps"], options["seed"]) == (32, 60, 0)
    with Image.open(directory / "sheet.png") as sheet:
        assert sheet.width > 8 * 144
        assert sheet.height > 3 * 144


def test_masks_reach_the_method_through_its_preset(made: tuple[Store, Path]) -> None:
    store, _ = made
    augmentation = PRESETS["cifar_masks"].augmentation
    with open_loader(store, augmentation, batch_size=16, threads=1) as loader:
        batch = next(iter(loader))
    masks = batch.components["saliency"]
    assert [mask is None for mask in masks] == [False, False, True, True]
    assert all(mask.float().std() > 20 for mask in masks if mask is not None)


def test_it_goes_on_where_it_was_stopped_and_ends_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("headrace.shards.component_writer._SAMPLES_PER_PART", 16)
    whole, stopped = (write_scenes(tmp_path / name / "train") for name in ("whole", "stopped"))
    assert make_masks.main([str(tmp_path / "whole"), *SMALL]) == 0

    assert make_masks.main([str(tmp_path / "stopped"), *SMALL, "--preview"]) == 0
    directory = component_directory(stopped, "saliency")
    assert (directory / "sheet.png").exists()
    assert not (directory / "manifest.json").exists()
    assert "no masks yet" in capsys.readouterr().out

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the network is there already")

    written: list[int] = []
    monkeypatch.setattr(make_masks, "train", never)
    with monkeypatch.context() as patch:
        write = make_masks.ComponentWriter.write

        def stopping(self: Any, part: int, *rest: object) -> None:
            if written:
                raise KeyboardInterrupt
            written.append(part)
            write(self, part, *rest)

        patch.setattr(make_masks.ComponentWriter, "write", stopping)
        assert make_masks.main([str(tmp_path / "stopped"), *SMALL]) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert make_masks.main([str(tmp_path / "stopped"), *SMALL, "--seed", "1"]) == 2
    assert "seed is 0 there" in capsys.readouterr().err
    assert make_masks.main([str(tmp_path / "stopped"), *SMALL]) == 0
    prints = [open_component(store, "saliency").fingerprint for store in (whole, stopped)]
    assert prints[0] == prints[1]
    said = capsys.readouterr().out
    assert "48 masks of" in said
    assert make_masks.main([str(tmp_path / "stopped"), *SMALL]) == 0
    assert "was complete already" in capsys.readouterr().out


def test_a_picture_in_which_nothing_is_found_is_kept_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_scenes(tmp_path / "train")
    arguments = [str(tmp_path), *SMALL, "--least-share", "0.25", "--steps", "30"]
    assert make_masks.main(arguments) == 2
    # Disks take about a seventh of a picture.
    assert "nothing salient in" in capsys.readouterr().err
    make_masks._MOST_EMPTY, before = 1.0, make_masks._MOST_EMPTY
    try:
        assert make_masks.main(arguments) == 0
    finally:
        make_masks._MOST_EMPTY = before
    whole = sum(int(mask.min() == 1) for mask in masks_of(store))
    assert whole > SAMPLES / 2
    assert f"{whole} x nothing was found salient" in capsys.readouterr().out
    manifest = component_directory(store, "saliency") / "manifest.json"
    assert json.loads(manifest.read_text())["repairs"] == {make_masks.WHOLE: whole}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{missing}"], "does not exist"),
        (["{few}"], "has 8 images; the network needs 16"),
        (["{plain}"], "agree on nothing salient in 32 of 32 images"),
        (["{folder}"], "no directory that make_shards wrote"),
        (["{data}", "--split", "val"], "has no split 'val'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "few" / "train", count=8)
    write_scenes(tmp_path / "data" / "train", count=16)
    write_scenes(tmp_path / "plain" / "train", empty=True)
    (tmp_path / "folder").mkdir()
    Image.fromarray(scene(0)[0]).save(tmp_path / "folder" / "a.png")
    places = {name: str(tmp_path / name) for name in ("missing", "few", "plain", "folder", "data")}
    assert make_masks.main([text.format(**places) for text in arguments] + SMALL) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--side", "33"),
        ("--side", "8"),
        ("--steps", "0"),
        ("--quality", "101"),
        ("--least-share", "1"),
        ("--least-share", "x"),
        ("--name", "../masks"),
        ("--seed", "-1"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_masks.main(["data", option, value])
    assert f"argument {option}" in capsys.readouterr().err


def test_a_damaged_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_scenes(tmp_path / "train", count=20)
    shard = tmp_path / "train" / "shard-000000.tar"
    start = store._index.rows["offset"][7]  # pyright: ignore[reportAttributeAccessIssue]
    with shard.open("r+b") as file:
        file.seek(int(start))
        file.write(bytes(200))
    assert make_masks.main([str(tmp_path), *SMALL]) == 2
    assert "sample 7 ('7.jpg')" in capsys.readouterr().err
