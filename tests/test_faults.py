"""A loader that goes on where a sample cannot be read or decoded: what fills its place."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from headrace.pipelines import open_loader, recipes
from headrace.pipelines.batch import Batch, concatenate
from headrace.pipelines.faults import Fault
from headrace.shards.store import Store, open_store

PIXELS = recipes.mae(16, patch_pixels=4)
SAMPLES = 37
BATCH = 8


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    for sample in range(SAMPLES):
        random = np.random.default_rng(sample)
        noise = Image.fromarray(random.integers(1, 256, (4, 4, 3), dtype=np.uint8))
        smooth = noise.resize((18 + sample % 5, 20), Image.Resampling.BILINEAR)
        smooth.save(folder / f"{sample:02d}.{('png', 'jpg', 'ppm')[sample % 3]}")
    return folder


def broken_store(folder: Path, rubbish: Iterable[int], lost: Iterable[int] = ()) -> Store:
    """Opened while all was well; then some files became rubbish, and some are gone."""
    store = open_store(write_folder(folder))
    for names, change in (
        (store.names([*rubbish]), _overwrite),
        (store.names([*lost]), Path.unlink),
    ):
        for name in names:
            change(folder / name)
    return store


def _overwrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def batches_of(store: Store, passes: int = 1, **options: Any) -> list[Batch]:
    defaults = {"batch_size": BATCH, "threads": 2, "seed": 5, "engine": "reference"}
    with open_loader(store, PIXELS, passes=passes, **defaults | options) as loader:
        return [batch for _ in range(passes) for batch in loader]


def rows_of(batches: list[Batch]) -> list[tuple[int, Tensor]]:
    return [(int(b.ids[row]), b.views[0][row]) for b in batches for row in range(len(b.labels))]


def faults_of(batches: list[Batch]) -> list[Fault]:
    return [fault for batch in batches for fault in batch.faults]


@pytest.mark.parametrize(
    "engine", ["reference", "fused", pytest.param("dali", marks=pytest.mark.dali)]
)
def test_a_place_is_filled_and_all_others_are_as_before(tmp_path: Path, engine: str) -> None:
    bad = {3, 10, 11, 30}
    sound = open_store(write_folder(tmp_path / "sound"))
    broken = broken_store(tmp_path / "broken", bad - {10}, [10])
    whole = rows_of(batches_of(sound, 2, engine=engine))
    batches = batches_of(broken, 2, engine=engine, on_error="replace")
    filled = rows_of(batches)
    length = SAMPLES // BATCH * BATCH
    faults = {fault.epoch * length + fault.position: fault for fault in faults_of(batches)}
    assert {place for place, (sample, _) in enumerate(whole) if sample in bad} == faults.keys()
    assert len(faults) > 4
    for place, ((sample, view), (other, its_view)) in enumerate(zip(whole, filled, strict=True)):
        if sample not in bad:
            assert other == sample
            assert torch.equal(view, its_view)
        else:
            assert (faults[place].sample_id, faults[place].replacement) == (sample, other)
            assert other not in bad


def test_a_place_is_filled_alike_by_every_engine_and_number_of_ranks(tmp_path: Path) -> None:
    store = broken_store(tmp_path / "broken", [3, 10], [20])

    def run(**options: Any) -> list[Batch]:
        return batches_of(store, on_error="replace", **options)

    alone = run()
    ids = [sample for sample, _ in rows_of(alone)]
    assert [sample for sample, _ in rows_of(run(engine="fused"))] == ids
    shares = [run(accumulate=2, rank=rank, world_size=2) for rank in range(2)]
    steps = range(len(alone))
    shared = [batch for s in steps for share in shares for batch in share[2 * s : 2 * s + 2]]
    assert [sample for sample, _ in rows_of(shared)] == ids
    assert faults_of(shared) == faults_of(alone)
    for (_, view), (_, expected) in zip(rows_of(shared), rows_of(alone), strict=True):
        assert torch.equal(view, expected)
    assert concatenate(shared[:4]).faults == alone[0].faults


def test_a_state_goes_on_with_the_same_places_filled(tmp_path: Path) -> None:
    store = broken_store(tmp_path / "broken", [3, 10, 30])
    options: dict[str, Any] = {"batch_size": BATCH, "seed": 5, "engine": "reference", "threads": 1}
    with open_loader(store, PIXELS, on_error="replace", **options) as loader:
        next(iter(loader))
        state = loader.state_dict()
        expected = [batch.ids.tolist() for batch in loader]
    with open_loader(store, PIXELS, on_error="replace", **options) as loader:
        loader.load_state_dict(state)
        assert [batch.ids.tolist() for batch in loader] == expected


def test_an_epoch_of_one_batch_has_others_too(tmp_path: Path) -> None:
    store = broken_store(tmp_path / "broken", [4])
    (batch,) = batches_of(store, batch_size=SAMPLES, on_error="replace")
    (fault,) = batch.faults
    assert fault.sample_id == 4
    assert fault.replacement in set(range(SAMPLES)) - {4}


def test_nothing_is_made_up_where_every_sample_is_bad(tmp_path: Path) -> None:
    store = broken_store(tmp_path / "broken", [], range(SAMPLES))
    batches = batches_of(store, on_error="replace")
    assert {fault.replacement for fault in faults_of(batches)} == {None}
    assert len(faults_of(batches)) == SAMPLES // BATCH * BATCH


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_a_reported_sample_is_black(tmp_path: Path, engine: str) -> None:
    store = broken_store(tmp_path / "broken", [3], [10])
    batches = batches_of(store, engine=engine, on_error="report", stage=False, drop_last=False)
    assert {fault.sample_id: fault.replacement for fault in faults_of(batches)} == {
        3: None,
        10: None,
    }
    for sample, view in rows_of(batches):
        assert (int(view.max()) == 0) == (sample in (3, 10))
