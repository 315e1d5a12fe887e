"""The loader: what its batches are made of, that they come in time, and that it goes on exactly."""

import gc
import io
import json
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from headrace.pipelines import engines, open_loader, recipes
from headrace.pipelines.batch import Batch
from headrace.pipelines.differences import differences
from headrace.pipelines.engines import choice
from headrace.pipelines.engines.device_stage import normalize
from headrace.pipelines.loader import Loader, LoaderError
from headrace.pipelines.plan import Plan
from headrace.pipelines.recipe import Augmentation
from headrace.pipelines.stream import Place
from headrace.shards.store import open_store

RECIPE = recipes.dino(16, 8, 1)
PIXELS = recipes.mae(16, patch_pixels=4)
SAMPLES = 37
WORKER = "headrace-loader"


class MemoryStore:
    """Samples in memory: small PNG, JPEG and PNM pictures of different shapes."""

    uri = "memory"
    fingerprint = "0123"
    classes = ("even", "odd")

    def __init__(self, samples: int = SAMPLES) -> None:
        self.shard_starts = np.array([0, *range(5, samples, 5), samples], dtype=np.int64)
        self._shapes = [(18 + i % 7, 17 + i % 5) for i in range(samples)]
        self.files = [_file(i, shape) for i, shape in enumerate(self._shapes)]
        self.before_read: Callable[[NDArray[np.int64]], None] = lambda ids: None

    def __len__(self) -> int:
        return len(self.files)

    def sizes(self, ids: ArrayLike) -> NDArray[np.int32]:
        shapes = [self._shapes[i] for i in np.asarray(ids)]
        return np.array(shapes, dtype=np.int32).reshape(-1, 2)

    def labels(self, ids: ArrayLike) -> NDArray[np.int64]:
        return np.asarray(ids, dtype=np.int64) % 2

    def names(self, ids: ArrayLike) -> list[str]:
        return [f"picture-{i}.jpg" for i in np.asarray(ids)]

    def read(self, ids: ArrayLike) -> list[NDArray[np.uint8]]:
        self.before_read(np.asarray(ids))
        return [self.files[i] for i in np.asarray(ids)]


def _file(index: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
    random = np.random.default_rng(index)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.save(file, ("PNG", "JPEG", "PPM")[index % 3])
    return np.frombuffer(file.getvalue(), np.uint8)


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Whatever a test does to a loader, its threads are gone afterwards."""
    before = set(threading.enumerate())
    yield
    assert not {thread.name for thread in set(threading.enumerate()) - before}


def opened(store: Any, recipe: Augmentation = PIXELS, **options: Any) -> Loader:
    defaults: dict[str, Any] = {"batch_size": 8, "threads": 2, "seed": 5}
    return open_loader(store, recipe, **defaults | options)


def epochs(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return [batch for _ in range(count) for batch in loader]


def assert_same(one: Batch, other: Batch) -> None:
    __tracebackhide__ = True
    assert (one.epoch, one.position) == (other.epoch, other.position)
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.labels, other.labels)
    for mine, theirs in zip((*one.views, *one.masks), (*other.views, *other.masks), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


def joined(batches: list[Batch]) -> Batch:
    """One batch of the shares of a step."""
    first = batches[0]
    assert {(batch.epoch, batch.position) for batch in batches} == {(first.epoch, first.position)}
    masks = [
        None if mask is None else torch.cat([batch.masks[index] for batch in batches])  # type: ignore[misc]
        for index, mask in enumerate(first.masks)
    ]
    return replace(
        first,
        views=tuple(
            torch.cat([batch.views[index] for batch in batches])
            for index in range(len(first.views))
        ),
        labels=torch.cat([batch.labels for batch in batches]),
        ids=torch.cat([batch.ids for batch in batches]),
        masks=tuple(masks),
    )


def test_an_epoch_is_every_sample_once_but_the_dropped(store: MemoryStore) -> None:
    loader = opened(store, RECIPE)
    batches = epochs(loader, 3)
    assert loader.steps_per_epoch == len(loader) == 4
    assert len(batches) == 12
    per_epoch = [
        [i for batch in batches if batch.epoch == epoch for i in batch.ids.tolist()]
        for epoch in range(3)
    ]
    for ids in per_epoch:
        assert len(ids) == len(set(ids)) == 32
    assert per_epoch[0] != per_epoch[1]
    for index, batch in enumerate(batches):
        assert (batch.epoch, batch.position) == (index // 4, index % 4 * 8)
        assert batch.labels.tolist() == [i % 2 for i in batch.ids.tolist()]
        assert [tuple(view.shape) for view in batch.views] == [
            (8, 3, 16, 16), (8, 3, 16, 16), (8, 3, 8, 8),
        ]  # fmt: skip
        for view in batch.views:
            assert view.dtype == torch.float32
            assert view.is_contiguous(memory_format=torch.channels_last)


def test_staged_views_are_the_normalised_uint8_views(store: MemoryStore) -> None:
    raw = epochs(opened(store, stage=False), 1)
    for dtype in (torch.float32, torch.bfloat16):
        for batch, staged in zip(raw, epochs(opened(store, dtype=dtype), 1), strict=True):
            (view,) = batch.views
            assert view.dtype == torch.uint8
            expected = normalize(view, PIXELS.mean, PIXELS.std, dtype)
            assert_same(staged, replace(batch, views=(expected,)))


def test_threads_and_prefetch_change_nothing(store: MemoryStore) -> None:
    expected = epochs(opened(store, RECIPE, threads=1, prefetch=1), 2)
    for batch, other in zip(expected, epochs(opened(store, RECIPE, prefetch=5), 2), strict=True):
        assert_same(batch, other)


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (4, 1), (1, 4), (2, 2), (1, 8)])
def test_ranks_and_micro_batches_share_the_same_global_batches(
    store: MemoryStore, world_size: int, accumulate: int
) -> None:
    whole = epochs(opened(store, RECIPE), 2)
    options = {"world_size": world_size, "accumulate": accumulate}
    ranks = [epochs(opened(store, RECIPE, rank=rank, **options), 2) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(whole) * accumulate}
    for step, expected in enumerate(whole):
        parts = slice(step * accumulate, (step + 1) * accumulate)
        assert_same(joined([batch for batches in ranks for batch in batches[parts]]), expected)


def test_ranks_share_the_same_plans(store: MemoryStore) -> None:
    whole = opened(store, RECIPE)
    place = Place(epoch=1, step=2, part=0)
    plan = whole._stream.work(place, {}).plan
    for world_size in (2, 4):
        share = 8 // world_size
        for rank in range(world_size):
            loader = opened(store, RECIPE, rank=rank, world_size=world_size)
            own: Plan = loader._stream.work(place, {}).plan
            assert own.equal(plan.rows(slice(rank * share, (rank + 1) * share)))


@given(
    samples=st.integers(1, 30),
    per_rank=st.integers(1, 5),
    world_size=st.integers(1, 4),
)
@settings(max_examples=25)
def test_evaluation_sees_every_sample_once_for_any_world(
    samples: int, per_rank: int, world_size: int
) -> None:
    store = MemoryStore(samples)
    seen: list[int] = []
    for rank in range(world_size):
        loader = opened(
            store, engine="synthetic", batch_size=per_rank * world_size, shuffle="none",
            drop_last=False, rank=rank, world_size=world_size, passes=2,
        )  # fmt: skip
        with loader:
            batches: list[Batch] = []
            for _ in range(2):
                batches = list(loader)
                assert len(batches) == len(loader)
                assert loader.steps_per_epoch - len(batches) in (0, 1)
                assert all(len(batch) > 0 for batch in batches)
            seen += [i for batch in batches for i in batch.ids.tolist()]
            assert loader.state_dict()["epoch"] == 2
    assert sorted(seen) == list(range(samples))


def test_evaluation_keeps_the_stored_order(store: MemoryStore) -> None:
    batches = epochs(opened(store, shuffle="none", drop_last=False), 1)
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 5]
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(SAMPLES))


def test_save_at_every_step_and_resume(store: MemoryStore) -> None:
    """Every state continues with the same pictures, and with the same number of them."""
    whole = opened(store, RECIPE)
    batches, states = [], [whole.state_dict()]
    with whole:
        for _ in range(3):
            for batch in whole:
                batches.append(batch)
                states.append(whole.state_dict())
    assert states[4]["epoch"] == 1
    assert states[4]["position"] == 0
    resumed = opened(store, RECIPE, threads=1)
    with resumed:
        for done, state in enumerate(states[:-1]):
            resumed.load_state_dict(json.loads(json.dumps(state)))
            assert resumed.state_dict() == state
            rest = list(resumed)
            left = [batch for batch in batches[done:] if batch.epoch == batches[done].epoch]
            for batch, expected in zip(rest, left, strict=True):
                assert_same(batch, expected)


def test_a_state_of_one_world_is_continued_by_another(store: MemoryStore) -> None:
    expected = epochs(opened(store), 1)
    with opened(store, rank=1, world_size=2) as two:
        next(iter(two))
        state = two.state_dict()
    ranks = [opened(store, rank=rank, world_size=4, accumulate=2) for rank in range(4)]
    for loader in ranks:
        loader.load_state_dict(state)
    parts = [epochs(loader, 1) for loader in ranks]
    assert [len(batches) for batches in parts] == [6, 6, 6, 6]
    for step in range(3):
        shares = [batch for batches in parts for batch in batches[2 * step : 2 * step + 2]]
        assert_same(joined(shares), expected[step + 1])


def test_prefetched_batches_are_not_delivered(store: MemoryStore) -> None:
    with opened(store, prefetch=4) as loader:
        iterator = iter(loader)
        next(iterator)
        time.sleep(0.2)
        assert loader.state_dict()["position"] == 8


def test_a_state_between_micro_batches_is_refused(store: MemoryStore) -> None:
    with opened(store, accumulate=2) as loader:
        iterator = iter(loader)
        next(iterator)
        with pytest.raises(LoaderError, match=r"micro-batch 1 of 2 of step 0 .* between steps"):
            loader.state_dict()
        next(iterator)
        assert loader.state_dict()["position"] == 8


def test_another_stream_is_refused_by_name(store: MemoryStore) -> None:
    state = opened(store, RECIPE).state_dict()
    views = (replace(RECIPE.views[0], count=2), *RECIPE.views[1:])
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"seed": 6}, "order.seed was 5 and is 6"),
        ({"batch_size": 4}, "order.batch_size was 8 and is 4"),
        ({"engine": "synthetic"}, 'engine.name was "fused" and is "synthetic"'),
        ({"recipe": replace(RECIPE, views=views)}, "augmentation.views.0.count was 1 and is 2"),
    )
    for options, named in cases:
        with opened(store, **({"recipe": RECIPE} | options)) as loader:
            before = loader.state_dict()
            with pytest.raises(LoaderError, match="another stream") as caught:
                loader.load_state_dict(state)
            assert named in str(caught.value)
            assert loader.state_dict() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"position": 12}, "epoch 0, position 12 is no start of a step"),
        ({"position": 32}, "position 32 is no start of a step"),
        ({"position": -8}, "position -8"),
        ({"epoch": -1}, "epoch -1"),
        ({"epoch": "first"}, "no state of a loader"),
        ({"fingerprint": None}, "another stream"),
    ],
)
def test_a_state_that_cannot_be_is_refused(
    store: MemoryStore, changed: dict[str, Any], message: str
) -> None:
    with opened(store) as loader:
        with pytest.raises(LoaderError, match=message):
            loader.load_state_dict(loader.state_dict() | changed)
        with pytest.raises(LoaderError, match="no state of a loader"):
            loader.load_state_dict({"epoch": 0})


def test_differences_are_named_by_dotted_key() -> None:
    old = {"a": {"b": [1, 2], "c": None}, "only": True, "same": "x"}
    new = {"a": {"b": [1, 3, 4], "c": {}}, "same": "x"}
    assert differences(old, new) == [
        "a.b.1 was 2 and is 3",
        "a.b.2 was (absent) and is 4",
        "a.c was null and is {}",
        "only was true and is (absent)",
    ]
    assert differences(old, old) == []


def test_the_fingerprint_is_json_and_ignores_how_a_run_is_spread(store: MemoryStore) -> None:
    one = opened(store)
    other = opened(store, world_size=2, rank=1, accumulate=2, threads=1, prefetch=7, passes=3)
    assert one.fingerprint == other.fingerprint == json.loads(json.dumps(one.fingerprint))
    assert one.fingerprint["store"] == "0123"
    state = one.state_dict()
    state["fingerprint"]["store"] = "changed"
    assert one.fingerprint["store"] == "0123"


def test_all_batches_may_be_held_and_changed(store: MemoryStore) -> None:
    with opened(store, stage=False) as loader:
        held = [batch for _ in range(2) for batch in loader]
    expected = epochs(opened(store, stage=False), 2)
    for index, batch in enumerate(held):
        assert_same(batch, expected[index])
        for tensor in (*batch.views, batch.labels, batch.ids, *batch.masks):
            assert tensor is not None
            tensor.zero_()
        for later, untouched in zip(held[index + 1 :], expected[index + 1 :], strict=True):
            assert_same(later, untouched)


def test_leaving_early_keeps_the_place(store: MemoryStore) -> None:
    expected = epochs(opened(store), 2)
    with opened(store) as loader:
        got = []
        for batch in loader:
            got.append(batch)
            if len(got) == 3:
                break
        got += list(loader)
        for batch in loader:
            got.append(batch)
            if len(got) == 8:  # the epoch's last: nothing is left of it
                break
        assert [batch.epoch for batch in loader] == [2] * 4
    for batch, other in zip(got, expected, strict=True):
        assert_same(batch, other)


def test_closing_ends_the_threads(store: MemoryStore) -> None:
    before = set(threading.enumerate())

    def ours() -> set[threading.Thread]:
        return set(threading.enumerate()) - before

    for delivered in (0, 1, 4, 5):
        loader = opened(store)
        batches = (batch for _ in range(2) for batch in loader)
        for _ in range(delivered):
            next(batches)
        assert bool(ours()) == (delivered > 0)
        loader.close()
        assert not ours()
        loader.close()
        state = loader.state_dict()
        assert state["position"] == delivered % 4 * 8
        with pytest.raises(LoaderError, match="closed"):
            next(iter(loader))


def test_dropping_the_last_reference_ends_the_threads(store: MemoryStore) -> None:
    loader = opened(store)
    for _ in loader:
        break
    (worker,) = [thread for thread in threading.enumerate() if thread.name == WORKER]
    del loader
    gc.collect()
    worker.join(timeout=60)
    assert not worker.is_alive()


def test_closing_while_the_worker_waits_for_room_or_works(store: MemoryStore) -> None:
    for wait_seconds in (0.0, 0.2):
        loader = opened(store, prefetch=1)
        next(iter(loader))
        time.sleep(wait_seconds)
        started = time.perf_counter()
        loader.close()
        assert time.perf_counter() - started < 60


def test_two_loaders_over_one_store_at_once(store: MemoryStore) -> None:
    expected = epochs(opened(store, seed=1), 1), epochs(opened(store, seed=2), 1)
    with opened(store, seed=1) as one, opened(store, seed=2) as two:
        for mine, theirs, first, second in zip(one, two, *expected, strict=True):
            assert_same(mine, first)
            assert_same(theirs, second)


def test_the_next_epoch_is_made_before_it_is_asked_for(store: MemoryStore) -> None:
    asked: list[int] = []
    watched = MemoryStore()
    watched.before_read = lambda ids: asked.append(len(ids))
    with opened(watched, prefetch=3) as loader:
        assert len(list(loader)) == 4
        deadline = time.perf_counter() + 60
        while len(asked) < 8 and time.perf_counter() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(asked) == 4 + 3 + 1  # delivered, ready, and one more on its way


@pytest.mark.parametrize("prefetch", [1, 2, 3])
@pytest.mark.parametrize(
    "engine", ["fused", pytest.param("dali", marks=pytest.mark.dali), "reference", "synthetic"]
)
def test_memory_is_bounded_and_nothing_deadlocks(engine: str, prefetch: int) -> None:
    started = 0
    watched = MemoryStore()

    def count(ids: NDArray[np.int64]) -> None:
        nonlocal started
        started += 1

    watched.before_read = count
    with opened(watched, engine=engine, prefetch=prefetch) as loader:
        taken = 0
        for _ in range(3):
            for _ in loader:
                taken += 1
                if taken in (1, 6, 7, 12):  # slow here, as fast as it can in between
                    deadline = time.perf_counter() + 60
                    while started < taken + prefetch + 1 and time.perf_counter() < deadline:
                        time.sleep(0.01)
                    time.sleep(0.05)
                    assert started == taken + prefetch + 1
                assert started <= taken + prefetch + 1
        assert taken == 12


def test_the_worker_does_not_hold_what_was_taken() -> None:
    slow, going_on = MemoryStore(), threading.Event()
    going_on.set()

    def wait(ids: NDArray[np.int64]) -> None:
        going_on.wait(5)

    slow.before_read = wait
    with opened(slow, prefetch=1, engine="synthetic") as loader:
        iterator = iter(loader)
        next(iterator)
        going_on.clear()  # at most one batch is ready or in the engine, and no other comes
        last = weakref.ref(next(iterator))
        deadline = time.monotonic() + 60  # the worker may be just about to drop it
        while last() is not None and time.monotonic() < deadline:
            gc.collect()
        kept = last()
        going_on.set()
        assert kept is None


def test_nothing_is_made_beyond_the_last_pass(store: MemoryStore) -> None:
    asked: list[int] = []
    watched = MemoryStore()
    watched.before_read = lambda ids: asked.extend(ids.tolist())
    expected = epochs(opened(store, shuffle="none", drop_last=False), 2)
    with opened(watched, shuffle="none", drop_last=False, passes=2) as loader:
        got = [*loader, *loader]
        for worker in [thread for thread in threading.enumerate() if thread.name == WORKER]:
            worker.join(timeout=60)  # it ends by itself
            assert not worker.is_alive()
        assert asked == [*range(SAMPLES), *range(SAMPLES)]
        assert loader.state_dict()["epoch"] == 2
        for _ in range(2):
            with pytest.raises(LoaderError, match="opened with passes=2, and they are over"):
                next(iter(loader))
    for batch, other in zip(got, expected, strict=True):
        assert_same(batch, other)


def test_passes_count_from_the_first_epoch_also_after_a_resume(store: MemoryStore) -> None:
    with opened(store) as endless:
        states = [endless.state_dict()]
        for _ in range(2):
            states += [endless.state_dict() for _ in endless]
    with opened(store, passes=2, accumulate=2) as loader:
        for done in (8, 7, 4, 0):  # also backwards: the worker has ended, and begins again
            loader.load_state_dict(states[done])
            assert loader.state_dict() == states[done]
            epoch = states[done]["epoch"]
            while epoch < 2:
                assert {batch.epoch for batch in loader} == {epoch}
                epoch += 1
            assert loader.state_dict() == states[8]
            with pytest.raises(LoaderError, match="they are over"):
                next(iter(loader))


@pytest.mark.parametrize("engine", ["fused", "reference", "synthetic"])
def test_closing_in_every_state_of_the_worker(engine: str) -> None:
    """Reading, failed, with the last pass made but not taken, and with everything taken."""
    reading = threading.Event()
    slow = MemoryStore()

    def read(ids: NDArray[np.int64]) -> None:
        reading.set()
        time.sleep(0.1)

    slow.before_read = read
    loader = opened(slow, engine=engine)
    next(iter(loader))
    reading.clear()
    reading.wait(5)
    loader.close()

    failing = MemoryStore()

    def fail(ids: NDArray[np.int64]) -> None:
        raise OSError("the disk is gone")

    failing.before_read = fail
    loader = opened(failing, engine=engine)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(loader))
    loader.close()

    for delivered in (1, 4):
        loader = opened(MemoryStore(), engine=engine, passes=1, prefetch=8)
        batches = iter(loader)
        for _ in range(delivered):
            next(batches)
        time.sleep(0.1)
        started = time.perf_counter()
        loader.close()
        assert time.perf_counter() - started < 60


def test_waiting_is_measured(store: MemoryStore) -> None:
    """What was blocked is counted, and what passes while a batch lies ready is not."""
    reads: list[int] = []

    def read(ids: NDArray[np.int64]) -> None:
        time.sleep(0.05)
        reads.append(len(ids))

    slow = MemoryStore()
    slow.before_read = read
    with opened(slow, engine="synthetic") as loader:
        assert loader.wait_seconds == 0
        list(loader)
        assert loader.wait_seconds >= 0.15
        deadline = time.monotonic() + 60
        while len(reads) < 4 + 2 and time.monotonic() < deadline:  # the fifth batch is ready
            time.sleep(0.01)
        waited = loader.wait_seconds
        time.sleep(0.6)
        next(iter(loader))
        assert loader.wait_seconds - waited < 0.3


def test_a_damaged_sample_is_named_where_it_comes(store: MemoryStore) -> None:
    damaged = MemoryStore()
    damaged.files[20] = damaged.files[20][:30]
    expected = epochs(opened(store, shuffle="none"), 1)
    with opened(damaged, shuffle="none") as loader:
        iterator = iter(loader)
        for step in range(2):
            assert_same(next(iterator), expected[step])
        for _ in range(2):  # it stays where it was, and says the same again
            with pytest.raises(LoaderError, match=r"sample 20 \('picture-20.jpg'\) of memory"):
                next(iter(loader))
            assert loader.state_dict()["position"] == 16


def test_what_the_store_raises_arrives_unchanged_after_the_batches_before_it() -> None:
    class Gone(OSError):
        pass

    error = Gone("the disk is gone")
    failing = MemoryStore()

    def fail(ids: NDArray[np.int64]) -> None:
        if 20 in ids:
            raise error

    failing.before_read = fail
    with opened(failing, shuffle="none") as loader:
        iterator = iter(loader)
        assert [next(iterator).position for _ in range(2)] == [0, 8]
        with pytest.raises(Gone) as caught:
            next(iterator)
        assert caught.value is error
        failing.before_read = lambda ids: None
        assert [batch.position for batch in loader] == [16, 24]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8, "world_size": 3}, "batch_size 8 is no multiple of .* 3 x 1"),
        ({"batch_size": 8, "accumulate": 3}, "batch_size 8 is no multiple of .* 1 x 3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 64}, "memory: batch_size 64 is larger than an epoch of 37"),
        ({"rank": 2, "world_size": 2}, r"rank is 2; it must be in \[0, 2\)"),
        ({"threads": 0}, "threads is 0"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"passes": 0}, "passes is 0"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"shuffle": "some"}, "shuffle is 'some'"),
        ({"holdout": 1.5}, "holdout is 1.5"),
        ({"drop_last": False, "accumulate": 2}, "accumulate needs drop_last"),
        ({"subset": np.array([1, 99])}, "subset holds the id .*99"),
        ({"recipe": replace(RECIPE, group=3)}, "holds no whole groups of 3"),
        ({"recipe": replace(RECIPE, group=4), "world_size": 4}, "holds no whole groups of 4"),
    ],
)
def test_refused_when_built(store: MemoryStore, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoaderError, match=message):
        opened(store, **options)


def test_refused_when_built_without_samples_device_or_engine(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LoaderError, match="memory has no samples"):
        opened(MemoryStore(0))
    if not torch.cuda.is_available():
        with pytest.raises(LoaderError, match="torch finds no CUDA device"):
            opened(store, device="cuda")
    with pytest.raises(engines.Unsupported, match="no engine has this name"):
        opened(store, engine="fast")
    monkeypatch.setattr(choice, "unsupported", lambda *_: ["GaussianBlur: not here"])
    with pytest.raises(engines.Unsupported, match="GaussianBlur: not here"):
        opened(store)


def test_parts_subsets_windows_and_occurrences(store: MemoryStore) -> None:
    def ids(**options: Any) -> list[int]:
        loader = opened(store, engine="synthetic", batch_size=4, **options)
        return [i for batch in epochs(loader, 1) for i in batch.ids.tolist()]

    kept = ids(holdout=0.25, drop_last=False)
    held_out = ids(holdout=0.25, part="holdout", drop_last=False)
    assert sorted(kept + held_out) == list(range(SAMPLES))
    assert set(ids(subset=np.array([3, 1, 4, 15, 9]), drop_last=False)) == {1, 3, 4, 9, 15}
    assert sorted(ids(shuffle="window", window_shards=2, drop_last=False)) == list(range(SAMPLES))
    twice = ids(occurrences=2)
    assert len(twice) == 72
    batches = np.array(twice).reshape(-1, 2, 2)  # of four: two samples, then both again
    assert (batches[:, 0] == batches[:, 1]).all()


def test_occurrences_of_a_sample_look_different(store: MemoryStore) -> None:
    (batch,) = [batch for batch in epochs(opened(store, occurrences=2), 1) if batch.position == 0]
    assert batch.ids[0] == batch.ids[4]
    assert not torch.equal(batch.views[0][0], batch.views[0][4])


def test_a_folder_of_images_feeds_a_loader(store: MemoryStore, tmp_path: Path) -> None:
    """The same pictures, in memory and on disk, give the same batches."""
    kinds = ("png", "jpg", "ppm")
    for index, file in enumerate(store.files):
        (tmp_path / f"{index:03d}.{kinds[index % 3]}").write_bytes(file.tobytes())
    folder = open_store(tmp_path)
    order = [int(Path(name).stem) for name in folder.names(range(len(folder)))]
    assert order == list(range(SAMPLES))
    for batch, expected in zip(
        epochs(opened(pickle.loads(pickle.dumps(folder))), 1),
        epochs(opened(store), 1),
        strict=True,
    ):
        assert_same(batch, replace(expected, labels=torch.full_like(expected.labels, -1)))
