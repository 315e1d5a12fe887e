"""Orders: exact permutations with random access, the same for every world."""

import itertools
import json
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.pipelines import order as order_module
from headrace.pipelines import permutation
from headrace.pipelines.counters import Kind
from headrace.pipelines.order import Order, OrderError, Part, Shuffle, rank_slice
from headrace.pipelines.permutation import permute

SHUFFLES: tuple[Shuffle, ...] = ("full", "window", "none")
PARTS: tuple[Part, ...] = ("train", "holdout")

GOLDEN_FULL = [911, 650, 915, 862, 919, 803, 40, 438]
GOLDEN_WINDOW = [814, 775, 768, 819, 269, 717, 328, 227]


def make(samples: int, batch_size: int = 1, *, shards: int = 7, **options: object) -> Order:
    starts = np.linspace(0, samples, shards + 1).astype(np.int64)
    settings_ = {"shard_starts": starts, "window_shards": 3, "drop_last": False} | options
    return Order(samples, batch_size, **settings_)  # pyright: ignore[reportArgumentType]


def epoch_of(order: Order, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    batches = [order.global_batch(epoch, step) for step in range(order.steps_per_epoch)]
    return (
        np.concatenate([ids for ids, _ in batches]),
        np.concatenate([occurrences for _, occurrences in batches]),
    )


@given(
    samples=st.integers(1, 700),
    batch_size=st.integers(1, 80),
    shuffle=st.sampled_from(SHUFFLES),
    epoch=st.integers(0, 2**32 - 1),
    seed=st.integers(0, 2**64 - 1),
    occurrences=st.integers(1, 3),
    shards=st.integers(1, 20),
    window_shards=st.integers(1, 25),
)
def test_an_epoch_is_an_exact_permutation(
    samples: int,
    batch_size: int,
    shuffle: Shuffle,
    epoch: int,
    seed: int,
    occurrences: int,
    shards: int,
    window_shards: int,
) -> None:
    order = make(
        samples,
        batch_size,
        shards=shards,
        window_shards=window_shards,
        shuffle=shuffle,
        seed=seed,
        occurrences=occurrences,
    )
    ids, copies = epoch_of(order, epoch)
    assert len(ids) == order.epoch_length == samples * occurrences
    assert ids.dtype == np.int64
    assert copies.dtype == np.int32
    assert Counter(zip(ids.tolist(), copies.tolist(), strict=True)) == Counter(
        (sample, copy) for sample in range(samples) for copy in range(occurrences)
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 12, 64])
@pytest.mark.parametrize("samples", [64, 65, 127, 1000])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_worlds_of_every_size_share_the_global_batches(
    samples: int, batch_size: int, world_size: int, shuffle: Shuffle
) -> None:
    order = make(samples, batch_size, shuffle=shuffle, seed=3, drop_last=True)
    assert order.steps_per_epoch == samples // batch_size
    assert order.epoch_length == samples // batch_size * batch_size
    seen = []
    for step in range(order.steps_per_epoch):
        batch, _ = order.global_batch(1, step)
        shares = [batch[rank_slice(batch_size, world_size, rank)] for rank in range(world_size)]
        assert {len(share) for share in shares} == {batch_size // world_size}
        assert np.array_equal(np.concatenate(shares), batch)
        seen.append(batch)
    together = np.concatenate(seen)
    assert len(set(together.tolist())) == len(together) == order.epoch_length
    assert np.array_equal(
        together, epoch_of(make(samples, 1, shuffle=shuffle, seed=3), 1)[0][: len(together)]
    )


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_random_access_equals_sequential(shuffle: Shuffle, holdout: float) -> None:
    order = make(500, 7, shuffle=shuffle, holdout=holdout, occurrences=2)
    ids, copies = epoch_of(order, 4)
    positions = np.random.default_rng(0).permutation(order.epoch_length)
    # Another epoch in between must leave no trace.
    order.global_batch(5, 0)
    got, got_copies = order.at(4, positions)
    assert np.array_equal(got, ids[positions])
    assert np.array_equal(got_copies, copies[positions])
    single, _ = order.at(4, positions[:1])
    assert single.tolist() == [ids[positions[0]]]


@given(
    samples=st.integers(2, 400),
    percent=st.integers(1, 99),
    shuffle=st.sampled_from(SHUFFLES),
    seed=st.integers(0, 2**64 - 1),
)
def test_holdout_and_train_are_disjoint_complete_and_fixed(
    samples: int, percent: int, shuffle: Shuffle, seed: int
) -> None:
    held_out = max(1, samples * percent // 100)
    assume(held_out < samples)
    parts = {
        part: make(samples, shuffle=shuffle, holdout=percent / 100, part=part, seed=seed)
        for part in PARTS
    }
    assert parts["holdout"].epoch_length == held_out
    train, held = (set(epoch_of(parts[part], 0)[0].tolist()) for part in PARTS)
    assert not train & held
    assert train | held == set(range(samples))
    assert set(epoch_of(parts["holdout"], 9)[0].tolist()) == held
    # The same ids are held out however the epoch is shuffled.
    other = make(samples, shuffle="none", holdout=percent / 100, part="holdout", seed=seed)
    assert set(epoch_of(other, 0)[0].tolist()) == held


def test_holdout_depends_on_the_seed_and_is_spread_evenly() -> None:
    held = [
        epoch_of(make(10_000, 500, shuffle="none", holdout=0.1, part="holdout", seed=seed), 0)[0]
        for seed in range(2)
    ]
    assert len(set(held[0]) & set(held[1])) < 200  # 100 by chance, standard deviation 9
    counts = np.bincount(held[0] // 1000, minlength=10)
    assert ((counts - 100) ** 2 / 100).sum() < 30  # chi-square of 9: 0.05 % lie above
    assert np.array_equal(held[0], np.sort(held[0]))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_subset_is_the_index_set(shuffle: Shuffle) -> None:
    subset = np.random.default_rng(1).permutation(1000)[:300]
    order = make(1000, 10, shuffle=shuffle, subset=subset)
    ids, _ = epoch_of(order, 2)
    assert sorted(ids.tolist()) == sorted(subset.tolist())
    again = make(1000, 10, shuffle=shuffle, subset=np.sort(subset).astype(np.int32))
    assert np.array_equal(epoch_of(again, 2)[0], ids)
    assert again.declaration() == order.declaration()
    assert order.declaration() != make(1000, 10, shuffle=shuffle, subset=subset[:-1]).declaration()
    split = [
        make(1000, 10, shuffle=shuffle, subset=subset, holdout=0.1, part=part) for part in PARTS
    ]
    assert [part.epoch_length for part in split] == [270, 30]
    union = np.concatenate([epoch_of(part, 0)[0] for part in split])
    assert sorted(union.tolist()) == sorted(subset.tolist())


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_window_finishes_a_run_of_shards_before_the_next(holdout: float) -> None:
    order = make(1000, 1, shards=10, shuffle="window", window_shards=3, holdout=holdout)
    visits = []
    for epoch in range(2):
        shards = epoch_of(order, epoch)[0] // 100
        places = [np.flatnonzero(shards == shard) for shard in range(10)]
        visit = sorted(range(10), key=lambda shard: places[shard][0])
        runs = [visit[start : start + 3] for start in range(0, 10, 3)]
        for run, following in itertools.pairwise(runs):
            last = max(places[shard][-1] for shard in run)
            assert last < min(places[shard][0] for shard in following)
        for run in runs[:-1]:  # mixed inside: each shard is met before another is finished
            firsts = [places[shard][0] for shard in run]
            assert max(firsts) < min(places[shard][-1] for shard in run)
        visits.append(runs)
    assert visits[0] != visits[1]


def test_window_takes_shards_of_any_size() -> None:
    starts = (0, 5, 5, 40, 41, 100, 100)
    order = Order(100, 3, shuffle="window", window_shards=2, shard_starts=starts, drop_last=False)
    for epoch in range(20):
        assert sorted(epoch_of(order, epoch)[0].tolist()) == list(range(100))


def test_ten_billion_samples_have_random_access() -> None:
    samples = 10**10
    order = Order(samples, 4096, seed=5, holdout=0.01)
    assert order.steps_per_epoch == 9_900_000_000 // 4096
    steps = [0, 1, 12_345, order.steps_per_epoch - 1]
    ids = np.concatenate([order.global_batch(7, step)[0] for step in steps])
    assert len(set(ids.tolist())) == len(ids)
    assert 0 <= ids.min() < 10**7
    assert samples - 10**7 < ids.max() < samples
    positions = np.random.default_rng(2).integers(0, samples, 200_000)
    images = permute(positions, samples, seed=5, kind=Kind.FULL, epoch=7)
    assert len(np.unique(images)) == len(np.unique(positions))
    # Uniform over 100 bins: chi-square of 99 lies below 160 but in 1 case of 10,000.
    counts = np.bincount(images // (samples // 100), minlength=100)
    assert ((counts - 2000) ** 2 / 2000).sum() < 160


@pytest.mark.parametrize("samples", [255, 256, 257, 5_000, 2**16])
def test_a_full_epoch_is_well_shuffled(samples: int) -> None:
    epochs = 40 if samples < 1000 else 8
    order = make(samples, samples, seed=11)
    sequences = np.stack([order.global_batch(epoch, 0)[0] for epoch in range(epochs)])
    places = np.arange(samples)
    bound = 5 / math.sqrt(samples)
    for sequence in sequences:
        assert abs(np.corrcoef(places, sequence)[0, 1]) < bound
        assert abs(np.corrcoef(sequence[:-1], sequence[1:])[0, 1]) < bound
    for first, second in itertools.pairwise(sequences):
        assert abs(np.corrcoef(first, second)[0, 1]) < bound
    # Neighbours in the set that stay neighbours, and samples that stay where they were: Poisson
    # of mean 2 and of mean 1 per epoch.
    adjacent = int((np.abs(np.diff(sequences, axis=1)) == 1).sum())
    assert abs(adjacent - 2 * epochs) < 5 * math.sqrt(2 * epochs)
    fixed = int((sequences == places).sum())
    assert abs(fixed - epochs) < 5 * math.sqrt(epochs)


@pytest.mark.parametrize("samples", [2, 3, 5, 7, 8, 16])
def test_small_permutations_are_equally_likely(samples: int) -> None:
    """Which samples stand at the first three places, over many epochs."""
    epochs = 8000
    order = make(samples, samples, seed=7)
    shown = min(samples, 3)
    counts = Counter(tuple(order.global_batch(epoch, 0)[0][:shown]) for epoch in range(epochs))
    outcomes = math.perm(samples, shown)
    expected = epochs / outcomes
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    chi_square += (outcomes - len(counts)) * expected
    freedom = outcomes - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_every_sample_is_as_likely_at_every_place() -> None:
    samples, epochs = 20, 4000
    order = make(samples, samples, seed=13)
    counts = np.zeros((samples, samples))
    for epoch in range(epochs):
        counts[np.arange(samples), order.global_batch(epoch, 0)[0]] += 1
    expected = epochs / samples
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (samples - 1) ** 2
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_epochs_and_seeds_differ(shuffle: Shuffle) -> None:
    first = epoch_of(make(500, 50, shuffle=shuffle), 0)[0]
    assert not np.array_equal(first, epoch_of(make(500, 50, shuffle=shuffle), 1)[0])
    assert not np.array_equal(first, epoch_of(make(500, 50, shuffle=shuffle, seed=1), 0)[0])
    assert np.array_equal(first, epoch_of(make(500, 50, shuffle=shuffle), 0)[0])


def test_none_is_the_identity_and_evaluation_ends_with_a_short_batch() -> None:
    order = make(10, 4, shuffle="none")
    batches = [order.global_batch(3, step)[0].tolist() for step in range(order.steps_per_epoch)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert make(3, 100).steps_per_epoch == 1


# Occurrences


def test_occurrences_are_dealt_out_in_each_batch() -> None:
    order = make(100, 8, occurrences=3)
    once, _ = epoch_of(make(100, 5), 2)
    first, copies = order.global_batch(2, 0)
    assert copies.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert first.tolist() == once[[0, 1, 2, 0, 1, 2, 0, 1]].tolist()
    second, copies = order.global_batch(2, 1)  # which begins with the last copy of a sample
    assert copies.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert second.tolist() == once[[3, 4, 5, 3, 4, 2, 3, 4]].tolist()


@given(
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 40),
    occurrences=st.integers(2, 6),
    keep_length=st.booleans(),
    shuffle=st.sampled_from(["full", "window"]),
    seed=st.integers(0, 1000),
)
def test_copies_of_a_sample_stand_far_apart(
    samples: int,
    batch_size: int,
    occurrences: int,
    keep_length: bool,
    shuffle: Shuffle,
    seed: int,
) -> None:
    order = make(
        samples,
        batch_size,
        occurrences=occurrences,
        keep_length=keep_length,
        shuffle=shuffle,
        seed=seed,
    )
    once, _ = epoch_of(make(samples, shuffle=shuffle, seed=seed), 3)
    repeated = [(int(sample), copy) for sample in once for copy in range(occurrences)]
    assert order.epoch_length == (samples if keep_length else samples * occurrences)
    for step in range(order.steps_per_epoch):
        ids, copies = order.global_batch(3, step)
        first = step * batch_size
        wanted = repeated[first : min(first + batch_size, order.epoch_length)]
        assert sorted(zip(ids.tolist(), copies.tolist(), strict=True)) == sorted(wanted)
        for sample in set(ids.tolist()):
            places = np.flatnonzero(ids == sample)
            assert (np.diff(places) >= len(ids) // occurrences).all()
        assert np.array_equal(copies, np.sort(copies))


@pytest.mark.parametrize(("occurrences", "world_size"), [(2, 2), (2, 4), (3, 3), (3, 4), (3, 16)])
def test_no_rank_gets_a_picture_twice(occurrences: int, world_size: int) -> None:
    order = make(500, 48, occurrences=occurrences)
    for step in range(order.steps_per_epoch - 1):
        ids, _ = order.global_batch(0, step)
        for rank in range(world_size):
            share = ids[rank_slice(48, world_size, rank)]
            assert len(set(share.tolist())) == len(share)


@pytest.mark.parametrize("world_size", [1, 4, 16])
@pytest.mark.parametrize("samples", [1024, 1200, 1279])
def test_keep_length_is_deits_sampler(samples: int, world_size: int) -> None:
    """facebookresearch/deit `samplers.py`: which places of a permutation each step shows."""
    batch_size = 64
    repeated = [place for place in range(samples) for _ in range(3)]
    total = math.ceil(samples * 3.0 / world_size) * world_size
    repeated += repeated[: total - len(repeated)]
    selected = samples // 256 * 256 // world_size
    ranks = [repeated[rank:total:world_size][:selected] for rank in range(world_size)]
    share = batch_size // world_size
    theirs = [
        sorted(place for own in ranks for place in own[step * share : (step + 1) * share])
        for step in range(selected // share)
    ]
    order = make(samples, batch_size, occurrences=3, keep_length=True, drop_last=True)
    once, _ = epoch_of(make(samples), 1)
    place_of = {int(sample): place for place, sample in enumerate(once)}
    ours = [
        sorted(place_of[sample] for sample in order.global_batch(1, step)[0].tolist())
        for step in range(order.steps_per_epoch)
    ]
    # Ours goes on to the last whole batch, theirs to the last whole 256.
    assert len(theirs) == samples // 256 * 4
    assert len(ours) == samples // 64
    assert ours[: len(theirs)] == theirs


def test_keep_length_shows_other_samples_in_every_epoch() -> None:
    order = make(300, 10, occurrences=3, keep_length=True, drop_last=True)
    assert order.epoch_length == 300
    shown = [set(epoch_of(order, epoch)[0].tolist()) for epoch in range(30)]
    assert {len(ids) for ids in shown} == {100}
    assert len(set.union(*shown)) == 300
    once = make(300, 10, keep_length=True, drop_last=True)
    assert np.array_equal(epoch_of(once, 0)[0], epoch_of(make(300, 10), 0)[0])


def test_order_survives_pickling() -> None:
    order = make(300, 7, shuffle="window", holdout=0.1)
    before = epoch_of(order, 1)[0]
    copy: Order = pickle.loads(pickle.dumps(order))
    assert np.array_equal(epoch_of(copy, 1)[0], before)


def test_declaration_holds_what_determines_the_order() -> None:
    base = make(100, 10).declaration()
    assert json.loads(json.dumps(base)) == base
    changed = [
        make(101, 10),
        make(100, 5),
        make(100, 10, seed=1),
        make(100, 10, shuffle="none"),
        make(100, 10, occurrences=2),
        make(100, 10, occurrences=2, keep_length=True),
        make(100, 10, holdout=0.1),
        make(100, 10, holdout=0.1, part="holdout"),
        make(100, 10, drop_last=True),
        make(100, 10, subset=np.arange(50)),
        make(100, 10, shuffle="window"),
        make(100, 10, shuffle="window", shards=6),
        make(100, 10, shuffle="window", window_shards=2),
    ]
    texts = [json.dumps(order.declaration(), sort_keys=True) for order in changed]
    assert len({json.dumps(base, sort_keys=True), *texts}) == len(changed) + 1
    # What changes nothing is not told: other shards where they are not used,
    assert make(100, 10, shards=6, window_shards=2).declaration() == base
    assert make(100, 10, keep_length=True).declaration() == base  # the length of one occurrence


def test_the_stream_is_what_it_was() -> None:
    """A change here is a change of every run: it moves ORDER_VERSION."""
    assert order_module.ORDER_VERSION == 1
    assert make(1000, 8, seed=42, holdout=0.1).global_batch(3, 2)[0].tolist() == GOLDEN_FULL
    assert make(1000, 8, seed=42, shuffle="window").global_batch(3, 2)[0].tolist() == GOLDEN_WINDOW


def test_permutation_compiles_once() -> None:
    positions = np.arange(10, dtype=np.int64)
    positions.flags.writeable = False
    order = make(10)
    order.at(0, positions)
    order.at(0, positions[::2])
    order.at(0, positions.astype(np.int32))  # pyright: ignore[reportArgumentType]
    assert len(permutation._permuted.signatures) == 1


@given(length=st.integers(0, 200), world_size=st.integers(1, 9), group=st.integers(1, 8))
def test_evaluation_shares_cover_a_batch_once(length: int, world_size: int, group: int) -> None:
    shares = [
        range(length)[rank_slice(length, world_size, rank, group, drop_last=False)]
        for rank in range(world_size)
    ]
    assert [place for share in shares for place in share] == list(range(length))
    assert all(share.start % group == 0 or len(share) == 0 for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) < 2 * group


@given(groups=st.integers(1, 9), world_size=st.integers(1, 9), group=st.integers(1, 8))
def test_training_shares_are_equal_and_hold_whole_groups(
    groups: int, world_size: int, group: int
) -> None:
    length = groups * world_size * group
    shares = [rank_slice(length, world_size, rank, group) for rank in range(world_size)]
    share = groups * group
    assert shares == [slice(rank * share, (rank + 1) * share) for rank in range(world_size)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"samples": 2**40 + 1}, "2\\^40"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 11, "drop_last": True}, "batch_size 11 is larger than an epoch of 10"),
        ({"seed": -1}, "seed is -1"),
        ({"occurrences": 0}, "occurrences is 0"),
        ({"occurrences": 1025}, "occurrences is 1025"),
        ({"occurrences": 2, "keep_length": True, "shuffle": "none"}, "keep_length needs a shuffle"),
        ({"batch_size": 11, "occurrences": 3, "keep_length": True, "drop_last": True}, "of 10 pos"),
        ({"shuffle": "some"}, "'some'"),
        ({"part": "test"}, "'test'"),
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"holdout": math.nan}, "holdout is nan"),
        ({"part": "holdout"}, "holdout is 0"),
        ({"samples": 1, "holdout": 0.1}, "leaves none"),
        ({"subset": np.array([3, 3])}, "3.* more than once"),
        ({"subset": np.array([10])}, "10.* the ids 0 .. 9"),
        ({"subset": np.array([], np.int64)}, "at least one"),
        ({"subset": np.array([0.5])}, "float64"),
        ({"shuffle": "window", "window_shards": 0}, "window_shards is 0"),
        ({"shuffle": "window", "shard_starts": None}, "shard_starts"),
        ({"shuffle": "window", "shard_starts": [0, 9]}, "ascend from 0"),
        ({"shuffle": "window", "shard_starts": [0, 7, 5, 10]}, "ascend from 0"),
    ],
)
def test_order_refuses_what_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(OrderError, match=message):
        make(**({"samples": 10, "batch_size": 2} | options))  # pyright: ignore[reportArgumentType]


def test_order_refuses_places_outside() -> None:
    order = make(10, 4, drop_last=True)
    with pytest.raises(OrderError, match=r"step is 2; .* 0 .. 1"):
        order.global_batch(0, 2)
    with pytest.raises(OrderError, match="position 8 is not in an epoch of 8"):
        order.at(0, np.array([0, 8]))
    with pytest.raises(OrderError, match="epoch is -1"):
        order.global_batch(-1, 0)


def test_rank_slice_refuses_what_cannot_be_cut() -> None:
    with pytest.raises(OrderError, match=r"batch of 10 .* 4 equal shares"):
        rank_slice(10, 4, 0)
    with pytest.raises(OrderError, match="groups of 3; take a multiple of 6"):
        rank_slice(8, 2, 0, group=3)
    with pytest.raises(OrderError, match="rank is 2"):
        rank_slice(8, 2, 2)
    with pytest.raises(OrderError, match="group is 0"):
        rank_slice(8, 2, 0, group=0)
