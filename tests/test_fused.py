"""The fused engine: every op and recipe against the reference engine, and its own behaviour."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional

from headrace.pipelines import engines, open_loader, recipes
from headrace.pipelines.draw import draw
from headrace.pipelines.engines import SampleError, Work
from headrace.pipelines.engines.device_stage import device_stage, normalize
from headrace.pipelines.engines.fused.color import turn_hue
from headrace.pipelines.engines.fused.engine import BATCHES_IN_FLIGHT, FusedEngine
from headrace.pipelines.engines.fused.program import Layout, lower
from headrace.pipelines.ops import (
    CenterCrop,
    ColorJitter,
    Flip,
    GaussianBlur,
    Grayscale,
    Interpolation,
    Op,
    RandomResizedCrop,
    Resize,
    Solarize,
    centered_offset,
    resized_shape,
)
from headrace.pipelines.recipe import Augmentation, View
from headrace.shards.store import open_store
from tests.fused_cases import (
    RESAMPLED_LEVELS,
    SAME_ORDER,
    Pixels,
    differences,
    encoded,
    noise,
    one_view,
    pieces,
    run,
    whole_photograph,
    work_for,
)

F: Any = functional  # takes Pillow pictures too; its annotations say Tensor


@pytest.fixture(scope="module")
def photograph() -> Pixels:
    return whole_photograph()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not {thread.name for thread in set(threading.enumerate()) - before}


SIZES = [1, 2, 16, 33, 96]
COLOURS = {
    "brightness": ColorJitter(0.8, 0, 0, 0),
    "contrast": ColorJitter(0, 0.8, 0, 0),
    "saturation": ColorJitter(0, 0, 0.8, 0),
    "hue": ColorJitter(0, 0, 0, 0.5),
    "jitter": ColorJitter(0.4, 0.4, 0.2, 0.1),
    "jitter that is often left out": ColorJitter(0.8, 0.8, 0.8, 0.2, probability=0.3),
    "grayscale": Grayscale(0.7),
    "solarize": Solarize(0.7),
    "solarize everything": Solarize(1.0, threshold=0),
    "solarize nothing": Solarize(1.0, threshold=256),
    "flip": Flip(0.5),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_the_references_to_the_bit(photograph: Pixels, name: str, size: int) -> None:
    augmentation = one_view(CenterCrop(size), COLOURS[name])
    files = [encoded(picture) for picture in pieces(photograph, size, size)]
    for epoch in range(3):
        (difference,) = differences(augmentation, work_for(augmentation, files, epoch))
        assert difference.max() == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel_size", [None, 1, 3, 23])
def test_blur_is_the_references_but_for_ties(
    photograph: Pixels, kernel_size: int | None, size: int
) -> None:
    augmentation = one_view(CenterCrop(size), GaussianBlur(0.8, (0.1, 2.0), kernel_size))
    files = [encoded(picture) for picture in pieces(photograph, size, size)]
    for epoch in range(3):
        (difference,) = differences(augmentation, work_for(augmentation, files, epoch))
        assert difference.max() <= 1
        assert difference.mean() <= 2e-3


SHAPES = [(1, 1), (1, 40), (37, 1), (16, 16), (33, 31), (90, 240), (301, 199)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 7, 32, 33, 96])
def test_crops_are_the_references(
    photograph: Pixels, size: int, shape: tuple[int, int], interpolation: Interpolation
) -> None:
    augmentation = one_view(
        RandomResizedCrop(size, (0.02, 1.0), (0.4, 2.5), interpolation), Flip(0.5)
    )
    files = [encoded(picture) for picture in pieces(photograph, *shape)]
    difference = np.stack(
        [differences(augmentation, work_for(augmentation, files, epoch))[0] for epoch in range(3)]
    )
    assert difference.mean() <= RESAMPLED_LEVELS
    if SAME_ORDER:
        assert difference.max() <= 2


@pytest.mark.parametrize("shape", [(1, 9), (20, 30), (33, 32), (120, 75), (75, 300)])
@pytest.mark.parametrize("ops", [(Resize(32), CenterCrop(32)), (Resize(40), CenterCrop(33)),
    (Resize(20, "bilinear"), CenterCrop(31)), (CenterCrop(25),), (CenterCrop(80),)])  # fmt: skip
def test_centre_crops_are_the_references(
    photograph: Pixels, ops: tuple[Op, ...], shape: tuple[int, int]
) -> None:
    """Also where the picture is smaller than the crop and padded with black."""
    augmentation = one_view(*ops, ColorJitter(0, 0.9, 0, 0))
    files = [encoded(picture) for picture in pieces(photograph, *shape)]
    (difference,) = differences(augmentation, work_for(augmentation, files))
    assert difference.mean() <= 2 * RESAMPLED_LEVELS  # contrast amplifies


@settings(max_examples=200)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600), st.integers(1, 600))
def test_geometry_is_the_recipes(height: int, width: int, shorter: int, crop: int) -> None:
    augmentation = one_view(Resize(shorter), CenterCrop(crop))
    plan = draw(
        augmentation,
        seed=0,
        epoch=0,
        position=0,
        ids=np.zeros(1, np.int64),
        occurrences=np.zeros(1, np.int32),
        sizes=np.array([[height, width]], np.int32),
    )
    found = lower(Layout.of(augmentation), plan).geometries[0, 0].tolist()
    high, wide = resized_shape(height, width, shorter)
    assert found[:4] == [0, height, high, centered_offset(high, crop)]
    assert found[4:] == [0, width, wide, centered_offset(wide, crop)]


def assert_hue_turns_as_in_pillow(channels: tuple[NDArray[np.int64], ...], shift: float) -> None:
    colours = np.stack([channel.ravel() for channel in channels], axis=-1).astype(np.uint8)
    picture = Image.fromarray(colours.reshape(-1, 1, 3))
    turned = np.ascontiguousarray(colours.T)
    red, green, blue = turned
    turn_hue(red, green, blue, int(np.int32(shift * 255)) % 256)
    np.testing.assert_array_equal(turned.T, np.asarray(F.adjust_hue(picture, shift))[:, 0])


@pytest.mark.parametrize("shift", [-0.5, -0.07, 0.0, 0.1, 0.5])
def test_hue_of_many_colours(shift: float) -> None:
    coarse = np.r_[0:256:5, 1, 254]
    assert_hue_turns_as_in_pillow(np.meshgrid(coarse, coarse, coarse), shift)


@pytest.mark.slow
def test_hue_of_all_colours() -> None:
    for red in np.split(np.arange(256), 8):
        assert_hue_turns_as_in_pillow(np.meshgrid(red, np.arange(256), np.arange(256)), 0.1)


RECIPES = {
    "dino": recipes.dino(96, 48, 3),
    "simclr": recipes.simclr(96),
    "simclr for small pictures": recipes.simclr(32, strength=0.5, blur=False),
    "mae": recipes.mae(96),
    "supervised": recipes.supervised(96),
    "center": recipes.center(96, 110),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(375, 500), (32, 32)])
def test_recipes_are_the_references(photograph: Pixels, name: str, shape: tuple[int, int]) -> None:
    files = [encoded(piece, "PNG") for piece in pieces(photograph, *shape)]
    for difference in differences(RECIPES[name], work_for(RECIPES[name], files)):
        assert difference.mean() <= 3 * RESAMPLED_LEVELS
        if SAME_ORDER:
            assert np.quantile(difference, 0.99) <= 1


FILES = {
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg 4:4:4": ("JPEG", "RGB", {"subsampling": 0}),
    "progressive jpeg": ("JPEG", "RGB", {"progressive": True}),
    "grey jpeg": ("JPEG", "L", {}),
    "cmyk jpeg": ("JPEG", "CMYK", {}),
    "png": ("PNG", "RGB", {}),
    "png with alpha": ("PNG", "RGBA", {}),
    "png with a palette": ("PNG", "P", {}),
    "pnm": ("PPM", "RGB", {}),
    "grey pnm": ("PPM", "L", {}),
    "webp": ("WEBP", "RGB", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_decoded_as_pillow_does(photograph: Pixels, name: str) -> None:
    kind, mode, options = FILES[name]
    files = [encoded(piece, kind, mode, **options) for piece in pieces(photograph, 47, 47)]
    augmentation = one_view(CenterCrop(47))
    (difference,) = differences(augmentation, work_for(augmentation, files))
    assert difference.max() == 0


def test_damage_that_pillow_overlooks_is_overlooked(photograph: Pixels) -> None:
    whole = encoded(photograph[:80, :80], "JPEG").tobytes()
    padded = whole[:-2] + b"\x00\x17" + whole[-2:]  # libjpeg warns: extraneous bytes
    file = np.frombuffer(padded, np.uint8)
    augmentation = one_view(CenterCrop(80))
    (difference,) = differences(augmentation, work_for(augmentation, [file]))
    assert difference.max() == 0


MIXED = Augmentation(
    "mixed",
    (
        View(
            "large",
            (
                RandomResizedCrop(40),
                Flip(),
                ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
                Grayscale(),
                GaussianBlur(0.5),
                Solarize(),
            ),
        ),
        View("small", (RandomResizedCrop(17, interpolation="bilinear"), Flip()), count=3),
    ),
)


def mixed_works(photograph: Pixels, batches: int, samples: int = 5) -> list[Work]:
    """Pictures of many sizes, growing from batch to batch."""
    works = []
    for epoch in range(batches):
        shapes = [(20 + 13 * epoch + 5 * i, 30 + 11 * i) for i in range(samples)]
        files = [
            encoded(photograph[: shape[0], : shape[1]], ("PPM", "JPEG", "PNG")[i % 3])
            for i, shape in enumerate(shapes)
        ]
        works.append(work_for(MIXED, files, epoch))
    return works


def test_threads_and_batches_change_no_pixel(photograph: Pixels) -> None:
    works = mixed_works(photograph, 4)
    one = run("fused", MIXED, *works, threads=1)
    three = run("fused", MIXED, *works, threads=3)
    split = [
        Work(work.plan.rows(rows), work.encoded[rows], work.labels[rows])
        for work in works
        for rows in (slice(0, 2), slice(2, 5))
    ]
    parts = run("fused", MIXED, *split)
    for index, (batch, other) in enumerate(zip(one, three, strict=True)):
        first, second = parts[2 * index : 2 * index + 2]
        assert batch.ids.tolist() == other.ids.tolist() == [*first.ids, *second.ids]
        for view in range(4):
            assert torch.equal(batch.views[view], other.views[view])
            halves = torch.cat([first.views[view], second.views[view]])
            assert torch.equal(batch.views[view], halves)


def test_batches_look_as_the_contract_says(photograph: Pixels) -> None:
    (work,) = mixed_works(photograph, 1)
    (batch,) = run("fused", MIXED, work)
    assert [tuple(view.shape) for view in batch.views] == [(5, 3, 40, 40)] + 3 * [(5, 3, 17, 17)]
    for view in batch.views:
        assert view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.tolist() == work.labels.tolist()
    assert batch.ids.tolist() == work.plan.ids.tolist()
    (masked,) = run("fused", RECIPES["mae"], work_for(RECIPES["mae"], work.encoded))
    assert masked.masks[0] is not None
    assert masked.masks[0].shape == (5, 36)


@pytest.mark.parametrize("finished", [False, True])
def test_no_batch_aliases_another_while_it_is_held(photograph: Pixels, finished: bool) -> None:
    works = mixed_works(photograph, 8)
    engine = FusedEngine(MIXED, 2, finished)
    held, copies = [], []
    for batch in engine.run(iter(works)):
        held.append(batch.views[-1][1:])  # any part of a batch keeps all of its memory
        copies.append(held[-1].clone())
    engine.close()
    assert len({view.data_ptr() for view in held}) == len(works)
    for view, copy in zip(held, copies, strict=True):
        assert torch.equal(view, copy)


def test_memory_of_dropped_batches_is_used_again(photograph: Pixels) -> None:
    (work,) = mixed_works(photograph, 1)
    engine = FusedEngine(MIXED, 2)
    places = []
    for batch in engine.run(iter([work] * 12)):
        places.append(batch.views[0].data_ptr())
        del batch
    engine.close()
    assert len(set(places)) <= BATCHES_IN_FLIGHT + 1


def test_finished_views_are_device_stages_to_the_bit(photograph: Pixels) -> None:
    (work,) = mixed_works(photograph, 1)
    (batch,) = run("fused", MIXED, work)
    staged = device_stage(batch, MIXED.mean, MIXED.std, device=torch.device("cpu"))
    engine = engines.open_engine("fused", MIXED, finished=torch.float32)
    (finished,) = engine.run(iter([work]))
    engine.close()
    for one, other in zip(staged.views, finished.views, strict=True):
        assert torch.equal(one, other)
        assert other.is_contiguous(memory_format=torch.channels_last)


def test_what_it_does_not_finish_is_refused() -> None:
    for name, dtype in (("reference", torch.float32), ("fused", torch.bfloat16)):
        with pytest.raises(engines.Unsupported, match=f"the {name} engine cannot .* finishing"):
            engines.open_engine(name, MIXED, finished=dtype)


def broken(photograph: Pixels) -> dict[str, Pixels]:
    jpeg = encoded(photograph[:60, :60], "JPEG")
    png = encoded(photograph[:60, :60], "PNG")
    ppm = encoded(photograph[:60, :60], "PPM")
    return {
        "cut jpeg": jpeg[: len(jpeg) // 2],
        "jpeg without its end": jpeg[:-2],
        "cut png": png[: len(png) // 2],
        "cut pnm": ppm[:-5],
        "text": np.frombuffer(b"this is no picture", np.uint8),
        "nothing": np.zeros(0, np.uint8),
        "start of a jpeg": jpeg[:3],
        "another size": encoded(photograph[:60, :59], "JPEG"),
        "another size, pnm": encoded(photograph[:59, :60], "PPM"),
    }


@pytest.mark.parametrize("name", broken(noise(60, 60)))
def test_a_broken_sample_is_named_after_the_batches_before_it(
    photograph: Pixels, name: str
) -> None:
    good = work_for(MIXED, [encoded(photograph[:60, :60], "JPEG")] * 4)
    files = [*good.encoded]
    files[2] = broken(photograph)[name]
    bad = Work(good.plan, files, good.labels)
    engine = FusedEngine(MIXED, 2)
    batches = engine.run(iter([good, good, bad, good]))
    next(batches)
    next(batches)
    expected = "it is 5. x 6. pixels|it is 60 x 59" if "another size" in name else "cannot be"
    with pytest.raises(SampleError, match=expected) as raised:
        next(batches)
    assert raised.value.sample_id == good.plan.ids[2]
    engine.close()
    engine.close()


def test_what_the_work_raises_comes_through(photograph: Pixels) -> None:
    (work,) = mixed_works(photograph, 1)

    def works() -> Iterator[Work]:
        yield work
        raise OSError("the disk is gone")

    engine = FusedEngine(MIXED, 2)
    with pytest.raises(OSError, match="the disk is gone"):
        list(engine.run(works()))
    engine.close()


def test_closing_in_the_middle_ends_the_threads(photograph: Pixels) -> None:
    (work,) = mixed_works(photograph, 1)
    taken = 0

    def works() -> Iterator[Work]:
        nonlocal taken
        while True:
            taken += 1
            yield work

    engine = FusedEngine(MIXED, 2)
    batches = engine.run(works())
    next(batches)
    assert taken == BATCHES_IN_FLIGHT
    batches.close()
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loader_gives_the_same_whoever_normalizes(
    photograph: Pixels, tmp_path: Path, dtype: torch.dtype
) -> None:
    (tmp_path / "class").mkdir()
    for index in range(6):
        piece = Image.fromarray(photograph[10 * index :, : 90 + index])
        piece.save(tmp_path / "class" / f"{index}.jpg")
    store = open_store(tmp_path)
    with open_loader(store, MIXED, batch_size=3, threads=2, dtype=dtype) as loader:
        assert loader.engine_name == "fused"
        finished = list(loader)
    with open_loader(store, MIXED, batch_size=3, threads=2, stage=False) as loader:
        raw = list(loader)
    for one, other in zip(finished, raw, strict=True):
        assert {view.dtype for view in other.views} == {torch.uint8}
        for view, pixels in zip(one.views, other.views, strict=True):
            assert torch.equal(view, normalize(pixels, MIXED.mean, MIXED.std, dtype))
