"""What the fused engine erases and mixes, against `device_stage`; and from every kind of store."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from headrace.pipelines import open_loader, recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.counters import PlanError
from headrace.pipelines.engines import SampleError, Work
from headrace.pipelines.engines.device_stage import device_stage
from headrace.pipelines.engines.fused.engine import FusedEngine
from headrace.pipelines.engines.fused.render import render
from headrace.pipelines.ops import CenterCrop, Flip, RandomResizedCrop
from headrace.pipelines.plan import Plan
from headrace.pipelines.recipe import Augmentation, Mix, RandomErasing, View
from headrace.shards.dataset import write_dataset
from headrace.shards.index import Record
from headrace.shards.manifest import ClassName, Format
from headrace.shards.store import open_store
from tests.fused_cases import Pixels, encoded, pieces, run, whole_photograph, work_for

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SIZES = [1, 2, 5, 16, 33, 64]
Fill = Literal["const", "rand", "pixel"]
FILLS: tuple[Fill, ...] = ("const", "rand", "pixel")
MIXES = {
    "mixup": Mix(0.8, 0.0),
    "cutmix": Mix(0.0, 1.0),
    "either, by group": Mix(0.8, 1.0),
    "either, by pair": Mix(0.8, 1.0, scope="pair"),
    "either, by sample, sometimes": Mix(0.8, 1.0, probability=0.5, scope="sample"),
}


def recipe(
    size: int, mix: Mix | None = None, erase: RandomErasing | None = None, group: int = 6
) -> Augmentation:
    view = View("view", (CenterCrop(size), Flip()), erase=erase)
    return Augmentation("finish", (view,), group=group if mix else 1, mix=mix)


def files_of(size: int, count: int = 12) -> list[Pixels]:
    return [encoded(picture) for picture in pieces(whole_photograph(), size, size, count - 2)]


def staged(augmentation: Augmentation, work: Work) -> Batch:
    """As `device_stage` finishes the engine's own uint8 views."""
    (raw,) = run("fused", augmentation, work)
    return device_stage(raw, augmentation.mean, augmentation.std, device=CPU)


def assert_finished_alike(augmentation: Augmentation, work: Work, threads: int = 2) -> None:
    (finished,) = run("fused", augmentation, work, threads=threads, finished=torch.float32)
    for one, other in zip(finished.views, staged(augmentation, work).views, strict=True):
        assert one.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fill", FILLS)
def test_erased_views_are_device_stages_to_the_bit(fill: Fill, size: int) -> None:
    erase = RandomErasing(0.7, fill=fill, count=(1, 3))
    augmentation = recipe(size, erase=erase)
    for epoch in range(3):
        assert_finished_alike(augmentation, work_for(augmentation, files_of(size), epoch))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MIXES)
def test_mixed_views_are_device_stages_to_the_bit(name: str, size: int) -> None:
    augmentation = recipe(size, MIXES[name])
    for epoch in range(3):
        assert_finished_alike(augmentation, work_for(augmentation, files_of(size), epoch))


@pytest.mark.parametrize("fill", FILLS)
def test_erased_views_are_mixed(fill: Fill) -> None:
    erase = RandomErasing(0.6, fill=fill, count=(2, 2))
    for name, mix in MIXES.items():
        augmentation = recipe(37, mix, erase)
        for epoch in range(2):
            work = work_for(augmentation, files_of(37), epoch)
            assert (work.plan.mix["weight"] != 1).any() or "sometimes" in name
            assert work.plan.views[0].erase["box"].any()
            assert_finished_alike(augmentation, work)


def test_each_view_is_erased_for_itself() -> None:
    crop = (RandomResizedCrop(24), Flip())
    augmentation = Augmentation(
        "views",
        (
            View("noise", crop, erase=RandomErasing(1)),
            View("whole", crop),
            View("colours", crop, count=2, erase=RandomErasing(1, fill="rand", count=(1, 4))),
            View("small", (CenterCrop(9),), erase=RandomErasing(1, fill="const")),
        ),
    )
    work = work_for(augmentation, files_of(40))
    assert_finished_alike(augmentation, work)
    (finished,) = run("fused", augmentation, work, finished=torch.float32)
    box = torch.tensor(work.plan.views[4].erase["box"][:, 0])
    for view, (top, left, height, width) in zip(finished.views[4], box.tolist(), strict=True):
        assert (view[:, top : top + height, left : left + width] == 0).all()
        assert height * width > 0


def test_bytes_are_neither_erased_nor_mixed() -> None:
    augmentation = recipe(32, MIXES["either, by pair"], RandomErasing(1))
    work = work_for(augmentation, files_of(32))
    (batch,) = run("fused", augmentation, work)
    (plain,) = run("fused", recipe(32), work_for(recipe(32), work.encoded))
    assert torch.equal(batch.views[0], plain.views[0])
    (erased,) = batch.erased
    assert batch.mixed is not None
    assert erased is not None


def test_which_thread_is_second_changes_nothing() -> None:
    augmentation = recipe(48, MIXES["either, by pair"], RandomErasing(0.5), group=24)
    work = work_for(augmentation, files_of(48, 48))
    (expected,) = run("fused", augmentation, work, threads=1, finished=torch.float32)
    for batch in run("fused", augmentation, *[work] * 30, threads=4, finished=torch.float32):
        assert torch.equal(batch.views[0], expected.views[0])


def with_mix(plan: Plan, **columns: np.ndarray) -> Plan:
    return replace(plan, mix={**plan.mix, **columns})


def test_extreme_mixtures() -> None:
    """Weights of 0 and 1, boxes of everything and of nothing, a sample that is its own partner."""
    augmentation = recipe(20, MIXES["either, by group"])
    work = work_for(augmentation, files_of(20))
    plan, count = work.plan, len(work.encoded)
    everything, nothing = np.array([0, 0, 20, 20], np.int32), np.array([3, 4, 0, 9], np.int32)
    for weight in (0.0, 1.0, 0.3):
        for box in (everything, nothing, np.array([0, 0, 1, 20]), np.array([19, 19, 1, 1])):
            boxes = np.zeros((count, 4), np.int32)
            boxes[::3] = box
            weights = np.full(count, weight, np.float32)
            changed = with_mix(plan, weight=weights, box=boxes)
            assert_finished_alike(augmentation, Work(changed, work.encoded, work.labels))
    alone = with_mix(plan, partner=np.zeros(count, np.int32), weight=np.ones(count, np.float32))
    assert_finished_alike(augmentation, Work(alone, work.encoded, work.labels))


@pytest.mark.parametrize("partner", [np.ones(12), np.full(12, -12), np.arange(12)])
def test_samples_that_are_no_pairs_are_refused(partner: np.ndarray) -> None:
    augmentation = recipe(16, MIXES["mixup"])
    work = work_for(augmentation, files_of(16))
    wrong = with_mix(work.plan, partner=partner.astype(np.int32))
    with pytest.raises(PlanError, match="is not mixed with row"):
        run("fused", augmentation, Work(wrong, work.encoded, work.labels), finished=torch.float32)


def test_a_broken_sample_among_mixed_ones_is_named() -> None:
    augmentation = recipe(32, MIXES["mixup"], RandomErasing(1))
    good = work_for(augmentation, files_of(32))
    files = [*good.encoded]
    files[4] = np.frombuffer(b"this is no picture", np.uint8)
    engine = FusedEngine(augmentation, 3, finished=True)
    batches = engine.run(iter([good, Work(good.plan, files, good.labels), good]))
    next(batches)
    with pytest.raises(SampleError) as raised:
        next(batches)
    assert raised.value.sample_id == good.plan.ids[4]
    engine.close()


def test_memory_of_dropped_batches_is_used_again_when_mixing() -> None:
    augmentation = recipe(32, MIXES["mixup"])
    work = work_for(augmentation, files_of(32))
    engine = FusedEngine(augmentation, 2, finished=True)
    places = []
    for batch in engine.run(iter([work] * 12)):
        places.append(batch.views[0].data_ptr())
        del batch
    engine.close()
    assert len(set(places)) <= 3


def records(kind: Literal["JPEG", "PNG"]) -> Iterator[Record]:
    """In the order that a folder of them has."""
    for index in range(12):
        picture = Image.fromarray(whole_photograph()[9 * index :, : 120 + 7 * index])
        picture.thumbnail((90, 90))
        file = io.BytesIO()
        picture.save(file, kind)
        yield Record(
            index,
            f"{index // 6}/{index:02}",
            index // 6,
            None,
            file.getvalue(),
            "jpg" if kind == "JPEG" else "png",
            picture.height,
            picture.width,
        )


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_store_gives_the_same_batches(kind: Literal["JPEG", "PNG"], tmp_path: Path) -> None:
    """A folder, tars, and .beton files, which hold JPEGs as they are and other pictures raw."""
    formats: tuple[Format, ...] = ("webdataset", "beton")
    for name in formats:
        write_dataset(tmp_path / name, name, list(records(kind)), (ClassName("0"), ClassName("1")))
    for record in records(kind):
        path = tmp_path / "folder" / f"{record.name}.{record.extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record.image)
    augmentation = recipes.deit(40, group=4)
    made: list[torch.Tensor] = []
    for name in (*formats, "folder"):
        store = open_store(tmp_path / name)
        raw = [data[:2].tobytes() == b"P6" for data in store.read(np.arange(len(store)))]
        assert raw == [name == "beton" and kind == "PNG"] * 12
        with open_loader(store, augmentation, batch_size=4, threads=2) as loader:
            assert loader.engine_name == "fused"
            made.append(torch.cat([batch.views[0] for batch in loader]))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_the_loader_hands_out_what_device_stage_makes(tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "data", "webdataset", list(records("JPEG")), (ClassName("0"), ClassName("1"))
    )
    augmentation = recipes.deit(32, group=4)
    store = open_store(tmp_path / "data")
    with open_loader(store, augmentation, batch_size=4, threads=2) as loader:
        finished = list(loader)
    with open_loader(store, augmentation, batch_size=4, threads=2, stage=False) as loader:
        raw = list(loader)
    for one, other in zip(finished, raw, strict=True):
        made = device_stage(other, augmentation.mean, augmentation.std, device=CPU)
        assert torch.equal(one.views[0], made.views[0])


def hashes() -> list[str]:
    """Of the views of recipes that go through all of the compiled code."""
    files = [encoded(picture) for picture in pieces(whole_photograph(), 70, 90, 10)]
    return [
        sha256(np.ascontiguousarray(view).tobytes()).hexdigest()
        for recipe in (recipes.deit(37, group=4), recipes.dino(45, 21, 2), recipes.simclr(33))
        for finished in (None, torch.float32)
        for batch in run("fused", recipe, work_for(recipe, files), finished=finished)
        for view in batch.views
    ]


_HASHES = """
import json
from headrace.pipelines.engines.fused.render import render
from tests.test_fused_finish import hashes

print(json.dumps([hashes(), sum(render.stats.cache_misses.values())]))
"""


@pytest.mark.slow
def test_pixels_are_the_same_just_compiled_and_from_the_cache(tmp_path: Path) -> None:
    """What a compiler is free to fuse it may fuse in a kernel, and not in its caller's copy.

    One of two processes compiles: this one, if it had to, else the other in a cache of its own.
    """
    here = hashes()
    compiled_here = sum(render.stats.cache_misses.values()) > 0
    another_cache = {} if compiled_here else {"NUMBA_CACHE_DIR": str(tmp_path)}
    there, compiled_there = json.loads(
        subprocess.run(
            [sys.executable, "-c", _HASHES],
            cwd=ROOT,
            env={**os.environ, **another_cache},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert compiled_here != (compiled_there > 0)
    assert there == here
    assert len(here) == 2 * (1 + (2 + 2) + 2)
