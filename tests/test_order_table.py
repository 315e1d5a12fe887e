"""Epochs in an order that a method asks for: exact for every world, cut and resume."""

import json
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from headrace.pipelines import open_loader
from headrace.pipelines.batch import Batch
from headrace.pipelines.counters import OCCURRENCE_LIMIT
from headrace.pipelines.draw import draw
from headrace.pipelines.loader import Loader, LoaderError
from headrace.pipelines.ops import Flip, RandomResizedCrop
from headrace.pipelines.order import Order, OrderError, Part
from headrace.pipelines.recipe import Augmentation, Draw, Integers, View
from headrace.pipelines.table import make_table

SAMPLES, BATCH = 30, 8
LENGTH = SAMPLES // BATCH * BATCH
# What a sample's augmentation depends on is all in one number.
RECIPE = Augmentation(
    "numbered",
    (View("view", (RandomResizedCrop(8, (0.5, 1.0)), Flip(0.5))),),
    draws=(Draw("number", Integers(1 << 30)),),
)


class PlainStore:
    """Samples without pixels, for the synthetic engine."""

    uri, fingerprint, classes = "plain", "0123", ()

    def __init__(self, samples: int = SAMPLES) -> None:
        self.shard_starts = np.array([0, samples], np.int64)
        self.read_ids: list[int] = []

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def sizes(self, ids: ArrayLike) -> NDArray[np.int32]:
        return np.full((len(np.asarray(ids)), 2), 20, np.int32)

    def labels(self, ids: ArrayLike) -> NDArray[np.int64]:
        return np.full(len(np.asarray(ids)), -1, np.int64)

    def names(self, ids: ArrayLike) -> list[str]:
        return [str(i) for i in np.asarray(ids)]

    def read(self, ids: ArrayLike) -> list[NDArray[np.uint8]]:
        self.read_ids += np.asarray(ids).tolist()
        return [np.zeros(1, np.uint8) for _ in np.asarray(ids)]


def opened(store: PlainStore | None = None, **options: Any) -> Loader:
    defaults: dict[str, Any] = {"batch_size": BATCH, "seed": 5, "engine": "synthetic"}
    return open_loader(store or PlainStore(), RECIPE, **defaults | options)


def table_of(seed: int, length: int = SAMPLES, samples: int = SAMPLES) -> NDArray[np.int64]:
    """Ids of which some come many times and some never."""
    random = np.random.default_rng(seed)
    return random.choice(samples, length, p=random.dirichlet(np.full(samples, 0.3)))


def rows(batches: list[Batch]) -> list[tuple[int, int]]:
    """(id, what its augmentation drew) of each sample delivered."""
    return [
        row
        for batch in batches
        for row in zip(batch.ids.tolist(), batch.draws["number"].tolist(), strict=True)
    ]


def expected_rows(ids: NDArray[np.int64], epoch: int, seed: int = 5) -> list[tuple[int, int]]:
    """Sample by sample: the number that its place among the same id's earlier ones draws."""
    seen: Counter[int] = Counter()
    expected = []
    for sample in ids.tolist():
        plan = draw(
            RECIPE,
            seed=seed,
            epoch=epoch,
            position=0,
            ids=np.array([sample], np.int64),
            occurrences=np.array([seen[sample]], np.int32),
            sizes=np.full((1, 2), 20, np.int32),
        )
        expected.append((sample, int(plan.draws["number"][0])))
        seen[sample] += 1
    return expected


def whole_epoch(loader: Loader, table: NDArray[np.int64] | None = None) -> list[Batch]:
    loader.use_table(table)
    return list(loader)


@given(st.lists(st.integers(0, SAMPLES - 1), min_size=LENGTH, max_size=2 * LENGTH))
@settings(max_examples=30)
def test_an_epoch_has_the_ids_of_its_table_and_counts_their_appearances(ids: list[int]) -> None:
    table = np.array(ids, np.int64)
    with opened() as loader:
        batches = whole_epoch(loader, table)
    assert rows(batches) == expected_rows(table[:LENGTH], epoch=0)
    assert [(batch.epoch, batch.position) for batch in batches] == [(0, 0), (0, 8), (0, 16)]


def test_a_table_is_for_one_epoch() -> None:
    tables = [table_of(seed) for seed in range(3)]
    with opened() as loader, opened() as plain:
        ordinary = [list(plain) for _ in range(4)]
        epochs = [whole_epoch(loader, table) for table in tables[:2]]
        epochs += [list(loader), whole_epoch(loader, tables[2])]
        assert len(loader) == loader.steps_per_epoch == 3
    assert [rows(epoch) for epoch in epochs] == [
        expected_rows(tables[0][:LENGTH], 0),
        expected_rows(tables[1][:LENGTH], 1),
        rows(ordinary[2]),
        expected_rows(tables[2][:LENGTH], 3),
    ]


def test_prefetched_batches_in_another_order_are_thrown_away() -> None:
    store, table = PlainStore(), table_of(0)
    with opened(store, prefetch=8) as loader:
        list(loader)
        until = time.monotonic() + 20
        while len(store.read_ids) < 2 * LENGTH and time.monotonic() < until:
            time.sleep(0.01)
        assert len(store.read_ids) >= 2 * LENGTH, "the next epoch's first batches are made"
        assert rows(whole_epoch(loader, table)) == expected_rows(table[:LENGTH], 1)


def test_what_was_prefetched_is_kept_where_nothing_changes() -> None:
    with opened(prefetch=8) as loader, opened() as plain:
        list(loader)
        worker = loader._worker
        loader.use_table(None)
        assert loader._worker is worker
        loader.use_table(table_of(0))
        assert loader._worker is None
        list(plain)
        # Before the first batch one may think again.
        assert rows(whole_epoch(loader, None)) == rows(list(plain))


@given(
    seed=st.integers(0, 100),
    spread=st.sampled_from([(2, 1), (4, 1), (1, 4), (2, 2), (8, 1)]),
    before=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    steps=st.integers(0, 5),
)
@settings(max_examples=25)
def test_ranks_cuts_and_resumes_change_nothing(
    seed: int, spread: tuple[int, int], before: tuple[int, int], steps: int
) -> None:
    """Two epochs, left after some steps by one world and continued by another one."""
    tables = [table_of(seed), table_of(seed + 1)]
    expected = [row for epoch in range(2) for row in expected_rows(tables[epoch][:LENGTH], epoch)]
    epoch, step = divmod(steps, 3)

    with opened(world_size=before[0], accumulate=before[1], rank=before[0] - 1) as loader:
        for earlier in range(epoch):
            whole_epoch(loader, tables[earlier])
        if step > 0:
            loader.use_table(tables[epoch])
            batches = iter(loader)
            for _ in range(step * before[1]):
                next(batches)
        state = json.loads(json.dumps(loader.state_dict()))
    assert (state["table"] is None) == (step == 0)

    world_size, accumulate = spread
    shares: list[list[Batch]] = []
    for rank in range(world_size):
        with opened(world_size=world_size, rank=rank, accumulate=accumulate) as loader:
            # In the middle of an epoch its table comes first, as a resumed run has it.
            if step > 0:
                loader.use_table(tables[epoch])
            loader.load_state_dict(state)
            assert loader.state_dict() == state
            if step == 0:
                loader.use_table(tables[epoch])
            got = list(loader)
            for later in range(epoch + 1, 2):
                got += whole_epoch(loader, tables[later])
            shares.append(got)
    resumed: list[Batch] = []
    for place in range(0, len(shares[0]), accumulate):
        resumed += [batch for share in shares for batch in share[place : place + accumulate]]
    assert rows(resumed) == expected[steps * BATCH :]


@pytest.mark.parametrize(("holdout", "part"), [(0.0, "train"), (0.4, "train"), (0.4, "holdout")])
@pytest.mark.parametrize("subset", [None, np.arange(1, 60, 3)])
def test_a_table_stays_within_its_part(
    part: Part, subset: NDArray[np.int64] | None, holdout: float
) -> None:
    order = Order(60, 4, subset=subset, holdout=holdout, part=part)
    inside = {int(sample) for epoch in range(9) for sample in _ids(order, epoch)}
    for sample in range(-2, 62):
        table = np.full(order.epoch_length, next(iter(inside)))
        table[-1] = sample
        if sample in inside:
            assert make_table(order, 3, table).ids.tolist() == table.tolist()
        else:
            with pytest.raises(OrderError, match=rf"the id {sample}, which is not among .*{part}"):
                make_table(order, 3, table)


def _ids(order: Order, epoch: int) -> NDArray[np.int64]:
    return np.concatenate([order.global_batch(epoch, s)[0] for s in range(order.steps_per_epoch)])


def test_appearances_beyond_the_counters_begin_again() -> None:
    order = Order(3000, 100)
    table = make_table(order, 0, np.full(3000, 7))
    assert table.occurrences.tolist() == [i % OCCURRENCE_LIMIT for i in range(3000)]
    # The plan, which refuses what its counters have no room for, takes them.
    draw(
        RECIPE,
        seed=0,
        epoch=0,
        position=0,
        ids=table.ids[1000:1100],
        occurrences=table.occurrences[1000:1100],
        sizes=np.full((100, 2), 20, np.int32),
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(LENGTH - 1, np.int64), r"plain: a table has 23 ids, and an epoch 24 positions"),
        (np.zeros((LENGTH, 1), np.int64), r"a table is int64 \[24, 1\]; it is a list of ids"),
        (np.zeros(LENGTH), "a table is float64"),
        (np.full(LENGTH, SAMPLES), "the id 30, which is not among the 'train' samples"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(ids: Any, message: str) -> None:
    with opened() as loader:
        with pytest.raises(LoaderError, match=message):
            loader.use_table(ids)
        assert loader.state_dict()["table"] is None


def test_a_table_comes_before_its_epoch() -> None:
    with opened() as loader:
        next(iter(loader))
        with pytest.raises(LoaderError, match="1 steps of epoch 0 were delivered in another one"):
            loader.use_table(table_of(0))


def test_a_resume_with_another_table_is_refused() -> None:
    with opened() as loader:
        loader.use_table(table_of(0))
        next(iter(loader))
        state = loader.state_dict()
    for table, named in ((None, "has no table"), (table_of(1), "has the table ")):
        with opened() as loader:
            loader.use_table(table)
            with pytest.raises(LoaderError, match=named) as caught:
                loader.load_state_dict(state)
            assert f"ordered by the table {state['table'][:12]}" in str(caught.value)
            assert loader.state_dict()["position"] == 0
    with opened() as loader:
        next(iter(loader))
        state = loader.state_dict()
    with opened() as loader:
        loader.use_table(table_of(1))
        with pytest.raises(LoaderError, match="ordered by no table, and this loader has the table"):
            loader.load_state_dict(state)


def test_a_state_without_the_word_is_one_without_a_table() -> None:
    with opened() as loader:
        next(iter(loader))
        state = loader.state_dict()
        rest = rows(list(loader))
    del state["table"]
    with opened() as loader:
        loader.load_state_dict(state)
        assert rows(list(loader)) == rest


def test_the_table_is_no_part_of_the_fingerprint() -> None:
    with opened() as loader:
        before = loader.fingerprint
        loader.use_table(table_of(0))
        assert loader.fingerprint == before == opened().fingerprint
