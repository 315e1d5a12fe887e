"""A component is cut from its pictures exactly as the views are, by every engine."""

import io
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from headrace.pipelines import recipes
from headrace.pipelines.batch import Batch, concatenate
from headrace.pipelines.components import Cut
from headrace.pipelines.declaration import augmentation_from
from headrace.pipelines.engines import EngineName
from headrace.pipelines.loader import LoaderError, open_loader
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    RecipeError,
    Resize,
)
from headrace.pipelines.recipe import Augmentation, Mix, View
from headrace.shards.beton import read_beton_index
from headrace.shards.component import component_directory, open_component
from headrace.shards.component_writer import begin_component
from headrace.shards.dataset import write_dataset
from headrace.shards.index import Record, ShardError
from headrace.shards.parts import Note, table_path
from headrace.shards.store import Store, open_store
from headrace.shards.verify import verify

SAMPLES = 40
ENGINES = [
    pytest.param("fused", id="fused"),
    pytest.param("reference", id="reference"),
    pytest.param(
        "dali",
        id="dali",
        marks=[
            pytest.mark.dali,
            pytest.mark.skipif(find_spec("nvidia") is None, reason="nvidia-dali is not installed"),
        ],
    ),
]


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures() -> list[NDArray[np.uint8]]:
    """Rough and smooth ones, each of its own size."""
    random = np.random.default_rng(3)
    made = []
    for number in range(SAMPLES):
        height, width = (int(side) for side in random.integers(30, 61, 2))
        coarse = random.integers(0, 256, (5, 6, 3)).astype(np.uint8)
        large = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = random.integers(-40, 41, (height, width, 3)) * (number % 2)
        made.append(np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8))
    return made


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Losslessly encoded, with the component "green": each picture's own green channel."""
    directory = tmp_path_factory.mktemp("data") / "train"
    made = pictures()
    records = [
        Record(number, f"{number}.png", -1, None, png(pixels), "png", *pixels.shape[:2])
        for number, pixels in enumerate(made)
    ]
    write_dataset(directory, "webdataset", records)
    write_component(open_store(directory), "green", lambda number: png(made[number][..., 1]))
    return directory


def write_component(store: Store, name: str, image: Callable[[int], bytes]) -> None:
    writer = begin_component(store, name, {"kind": "test"})
    assert writer is not None
    for part, ids in writer.missing():
        writer.write(part, [image(number) for number in ids])
    writer.finish()


def geometry(interpolation: str = "bicubic") -> Augmentation:
    """Every way to place a crop; what only some views have: colours, blur, the component."""
    green = ("green",)
    cut = RandomResizedCrop(24, (0.2, 1.0), interpolation=interpolation)  # pyright: ignore[reportArgumentType]
    return Augmentation(
        "geometry",
        (
            View("crop", (cut, Flip()), count=2, components=green),
            View("flipped_last", (cut, Grayscale(0), Flip(), ColorJitter(0, 0, 0, 0)), 1, None,
                 None, green),
            View("none", (cut, Flip(), GaussianBlur())),
            View("whole", (Resize(20), CenterCrop(16)), components=green),
            View("padded", (RandomCrop(32, 8), Flip(1.0)), components=green),
        ),
    )  # fmt: skip


def first_batch(
    directory: Path, augmentation: Augmentation, engine: EngineName, **options: object
) -> Batch:
    given: dict = {"batch_size": 20, "engine": engine, "threads": 1, "stage": False, **options}
    with open_loader(open_store(directory), augmentation, **given) as loader:
        return next(iter(loader))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_component_goes_where_its_picture_goes(
    dataset: Path, engine: EngineName, interpolation: str
) -> None:
    augmentation = geometry(interpolation)
    batch = first_batch(dataset, augmentation, engine)
    cuts = batch.components["green"]
    assert [cut is None for cut in cuts] == [False, False, False, True, False, False]
    for view, cut in zip(batch.views, cuts, strict=True):
        if cut is not None:
            assert cut.dtype == torch.uint8
            assert cut.shape == (20, 1, *view.shape[2:])
            assert cut.is_contiguous()
            assert torch.equal(cut, view[:, 1:2])
    assert not torch.equal(batch.views[0], batch.views[1])  # draws of their own, each followed


@pytest.mark.parametrize("engine", ENGINES)
def test_colours_do_not_reach_a_component(dataset: Path, engine: EngineName) -> None:
    """With all of SwAV's colours it is what the crops alone make of it, picture by picture."""
    swav = recipes.swav(32, 16, 2)
    first, *rest = swav.views
    coloured = replace(swav, views=(replace(first, components=("green",)), *rest))
    plain_ops = tuple(op for op in first.ops if isinstance(op, RandomResizedCrop | Flip))
    plain = Augmentation("plain", (replace(first, ops=plain_ops),))
    batch = first_batch(dataset, coloured, engine)
    expected = first_batch(dataset, plain, engine)
    cuts = batch.components["green"]
    assert cuts[2:] == (None, None)
    for view, cut, crop in zip(batch.views, cuts[:2], expected.views, strict=False):
        assert cut is not None
        assert torch.equal(cut, crop[:, 1:2])
        assert not torch.equal(cut, view[:, 1:2])


def test_a_component_is_the_engines_own_pixels_whatever_else_runs(dataset: Path) -> None:
    """Finished views, micro-batches, ranks and epochs: the same component for the same sample."""
    augmentation = geometry()
    whole = open_loader(open_store(dataset), augmentation, batch_size=20, engine="fused", threads=1)
    split = [
        open_loader(
            open_store(dataset), augmentation, batch_size=20, engine="fused", threads=1,
            accumulate=2, rank=rank, world_size=2,
        )
        for rank in range(2)
    ]  # fmt: skip
    with whole, split[0], split[1]:
        for _ in range(2):
            expected = list(whole)
            shares = [list(loader) for loader in split]
            for step, batch in enumerate(expected):
                parts = [share[2 * step + part] for share in shares for part in range(2)]
                merged = concatenate(parts)
                assert torch.equal(merged.ids, batch.ids)
                assert batch.views[0].dtype == torch.float32
                for ours, theirs in zip(
                    merged.components["green"], batch.components["green"], strict=True
                ):
                    assert (ours is None) == (theirs is None)
                    assert ours is None or theirs is None or torch.equal(ours, theirs)


def test_the_last_batch_of_an_evaluation_may_be_shorter(dataset: Path) -> None:
    options = {"batch_size": 16, "shuffle": "none", "drop_last": False, "passes": 1}
    with open_loader(
        open_store(dataset), geometry(), engine="reference", threads=1, **options
    ) as loader:
        lengths = [len(batch.components["green"][0]) for batch in loader]  # pyright: ignore[reportArgumentType]
    assert lengths == [16, 16, 8]


def test_the_fingerprint_names_the_component_and_is_untouched_without(dataset: Path) -> None:
    store, augmentation = open_store(dataset), geometry()
    without = Augmentation(
        "geometry", tuple(replace(view, components=()) for view in augmentation.views)
    )
    prints = []
    for recipe in (augmentation, without):
        with open_loader(store, recipe, batch_size=20, threads=1) as loader:
            prints.append(loader.fingerprint)
    assert prints[0]["components"] == {"green": open_component(store, "green").fingerprint}
    assert prints[0]["augmentation"]["views"][0]["components"] == ["green"]
    assert "components" not in json.dumps(prints[1])
    assert augmentation_from(json.loads(json.dumps(augmentation.declaration()))) == augmentation


def test_a_stored_component_is_small_sound_and_complete(dataset: Path) -> None:
    store = open_store(dataset)
    directory = component_directory(store, "green")
    assert verify(directory, workers=1).problems == ()
    component = open_component(store, "green")
    ids = np.arange(SAMPLES)
    assert component.names(ids) == store.names(ids)
    assert (component.sizes(ids) == store.sizes(ids)).all()
    assert (component.labels(ids) == -1).all()
    assert len(read_beton_index(directory / "data.beton")) == SAMPLES
    assert not (directory / ".parts").exists()
    again = pickle.loads(pickle.dumps(component))
    assert again.fingerprint == component.fingerprint


# ---- what is refused


def copy_of(dataset: Path, directory: Path, brightness: int = 0) -> Path:
    made = [np.clip(pixels + brightness, 0, 255).astype(np.uint8) for pixels in pictures()]
    records = [
        Record(number, f"{number}.png", -1, None, png(pixels), "png", *pixels.shape[:2])
        for number, pixels in enumerate(made)
    ]
    write_dataset(directory, "webdataset", records)
    return directory


def test_a_missing_component_is_asked_for(tmp_path: Path) -> None:
    directory = copy_of(tmp_path, tmp_path / "train")
    expected = f"{directory} has no component 'green'.*make_masks.py.*does without"
    with pytest.raises(ShardError, match=expected):
        first_batch(directory, geometry(), "fused")


def test_a_component_of_another_data_set_is_refused(dataset: Path, tmp_path: Path) -> None:
    directory = copy_of(dataset, tmp_path / "train", brightness=1)
    made = component_directory(open_store(dataset), "green")
    made.rename(component_directory(open_store(directory), "green"))
    try:
        with pytest.raises(ShardError, match=r"was made for the data set .* make it again"):
            first_batch(directory, geometry(), "fused")
    finally:
        component_directory(open_store(directory), "green").rename(made)


def test_a_component_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    store = open_store(copy_of(tmp_path, tmp_path / "train"))
    assert begin_component(store, "green", {}) is not None
    with pytest.raises(ShardError, match="no finished data set"):
        open_component(store, "green")


def test_a_damaged_picture_of_a_component_names_component_and_sample(tmp_path: Path) -> None:
    store = open_store(copy_of(tmp_path, tmp_path / "train"))
    made = pictures()

    def cut_short(number: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(made[number][..., 1]).save(buffer, "JPEG")
        data = buffer.getvalue()
        return data if number != 7 else data[: len(data) // 2]

    write_component(store, "green", cut_short)
    with pytest.raises(LoaderError, match=r"sample 7 \('7.png'\).*component 'green'"):
        first_batch(Path(store.uri), geometry(), "fused", batch_size=SAMPLES)


def test_only_what_make_shards_wrote_has_components(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(png(pictures()[0]))
    with pytest.raises(ShardError, match="no directory that make_shards wrote"):
        first_batch(tmp_path / "photos", geometry(), "fused", batch_size=1)


def test_a_recipe_that_a_component_cannot_follow_is_refused() -> None:
    crop = RandomResizedCrop(24)
    with pytest.raises(RecipeError, match="cannot follow the turns of RandAugment"):
        View("view", (crop, RandAugment()), components=("green",))
    with pytest.raises(RecipeError, match="is no identifier"):
        View("view", (crop,), components=("../green",))
    with pytest.raises(RecipeError, match="Mix cannot mix its components"):
        Augmentation("mixed", (View("view", (crop,), components=("green",)),), group=2, mix=Mix())


# ---- writing


def test_writing_goes_on_where_it_was_stopped(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.shards.component_writer._SAMPLES_PER_PART", 16)
    store = open_store(copy_of(dataset, tmp_path / "train"))
    made = pictures()

    def write(stop_after: int) -> None:
        writer = begin_component(store, "green", {"kind": "test"})
        assert writer is not None
        for part, ids in writer.missing()[:stop_after]:
            notes = [Note(f"{number}", "repaired", "odd") for number in ids if number % 20 == 5]
            writer.write(part, [png(made[number][..., 1]) for number in ids], notes)
        writer.finish()

    with pytest.raises(ShardError, match="1 of 3 parts are not there yet"):
        write(stop_after=2)
    with pytest.raises(ShardError, match=re.escape("(kind is test there)")):
        begin_component(store, "green", {"kind": "other"})
    writer = begin_component(store, "green", {"kind": "test"})
    assert writer is not None
    assert [part for part, _ in writer.missing()] == [2]
    table = table_path(writer.parts_directory, 0)
    before = table.stat()
    writer.write(2, [png(pixels[..., 1]) for pixels in made[32:]])
    assert (table.stat().st_mtime_ns, table.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    manifest = writer.finish()
    assert manifest.repairs == {"odd": 2}  # of samples 5 and 25: notes last, too
    assert begin_component(store, "green", {"kind": "test"}) is None
    with pytest.raises(ShardError, match="made, or begun, otherwise"):
        begin_component(store, "green", {"kind": "other"})
    component = open_component(store, "green")
    theirs = open_component(open_store(dataset), "green")
    pairs = zip(component.read(np.arange(SAMPLES)), theirs.read(np.arange(SAMPLES)), strict=True)
    assert all(np.array_equal(ours, other) for ours, other in pairs)


def test_a_cut_has_the_views_that_ask_for_it_and_what_moves_pixels() -> None:
    cut = Cut.of(geometry(), "green")
    assert cut.places == (0, 1, 2, 4, 5)
    kinds = [[type(op).__name__ for op in view.ops] for view in cut.augmentation.views]
    assert kinds[2] == ["RandomResizedCrop", "Flip"]
    assert kinds[3] == ["Resize", "CenterCrop"]
    assert kinds[4] == ["RandomCrop", "Flip"]
