"""kNN against DINO's definition written again in numpy, and one process against several."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.training.features import Features
from headrace.training.protocol import Accuracy, ProtocolError
from headrace.training.protocols.knn import (
    KnnResult,
    Neighbours,
    knn_accuracy,
    knn_predict,
    merge,
    nearest,
    normalise,
    votes,
)
from headrace.training.world import World

ALONE = World()


def shares(
    features: NDArray[np.float32], labels: NDArray[np.int64], ids: NDArray[np.int64] | None = None
) -> Features:
    ids = np.arange(len(labels)) if ids is None else ids
    return Features(torch.tensor(ids), torch.tensor(features), torch.tensor(labels))


def clustered(
    seed: int, samples: int, classes: int = 7, width: int = 24
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Classes that overlap, so that votes are split and accuracies lie between 0 and 100."""
    centres = np.random.default_rng(1).normal(size=(classes, width))
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=samples)
    features = centres[labels] + 2 * generator.normal(size=(samples, width))
    return features.astype(np.float32), labels


def brute_force_votes(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    query: NDArray[np.float32],
    k: int,
    classes: int,
    temperature: float = 0.07,
) -> tuple[NDArray[np.float64], float]:
    """(weight of each class for one query, gap of similarity at the border of the k nearest)."""
    train64, query64 = train.astype(np.float64), query.astype(np.float64)
    similarity = np.array(
        [row @ query64 / (np.linalg.norm(row) * np.linalg.norm(query64)) for row in train64]
    )
    order = sorted(range(len(train)), key=lambda row: (-similarity[row], row))
    weights = np.zeros(classes)
    for row in order[:k]:
        weights[train_labels[row]] += np.exp(similarity[row] / temperature)
    border = similarity[order[k - 1]] - similarity[order[k]] if k < len(order) else np.inf
    return weights, border


@given(seed=st.integers(0, 10**6), k=st.integers(1, 60), samples=st.integers(60, 90))
@settings(max_examples=25, deadline=None)
def test_votes_are_those_of_brute_force(seed: int, k: int, samples: int) -> None:
    train, train_labels = clustered(seed, samples)
    queries, _ = clustered(seed + 1, 5)
    bank = Features(
        torch.arange(samples), normalise(torch.tensor(train)), torch.tensor(train_labels)
    )
    found = nearest(bank, normalise(torch.tensor(queries)), k, tile_rows=17)
    ours = votes(found, k, classes=7).double().numpy()
    for row, query in enumerate(queries):
        expected, border = brute_force_votes(train, train_labels, query, k, classes=7)
        if border < 1e-6:
            continue  # which of two equally near samples votes is not what is tested here
        np.testing.assert_allclose(
            ours[row] / ours[row].sum(), expected / expected.sum(), atol=1e-5
        )


@given(seed=st.integers(0, 10**6), k=st.sampled_from([1, 3, 10]))
@settings(max_examples=25, deadline=None)
def test_predictions_follow_the_votes(seed: int, k: int) -> None:
    train, train_labels = clustered(seed, 80)
    queries, _ = clustered(seed + 1, 8)
    predicted = knn_predict(
        torch.tensor(train), torch.tensor(train_labels), torch.tensor(queries), k=k, classes=7
    )
    assert predicted.shape == (8, 7)
    for row, query in enumerate(queries):
        weights, border = brute_force_votes(train, train_labels, query, k, classes=7)
        best, second = np.sort(weights)[[-1, -2]]
        if border > 1e-6 and (best - second) / best > 1e-4:
            assert predicted[row, 0] == weights.argmax()
        assert sorted(predicted[row].tolist()) == list(range(7))


@given(
    axes=st.lists(st.integers(0, 3), min_size=12, max_size=40),
    queries=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    k=st.integers(1, 12),
    tile_rows=st.integers(1, 41),
)
@settings(deadline=None)
def test_equally_similar_samples_go_by_id(
    axes: list[int], queries: list[int], k: int, tile_rows: int
) -> None:
    """Features on four axes: every similarity is 0 or 1, so that nearly everything is a tie."""
    axis_features = torch.eye(4)
    ids = 5 + 3 * torch.arange(len(axes))
    bank = Features(ids, axis_features[axes], torch.arange(len(axes)))
    found = nearest(bank, axis_features[queries], k, tile_rows)
    for row, query in enumerate(queries):
        order = sorted(range(len(axes)), key=lambda column: (axes[column] != query, column))
        assert found.labels[row].tolist() == order[:k]
        assert found.ids[row].tolist() == ids[order[:k]].tolist()
        assert found.similarities[row].tolist() == [float(axes[c] == query) for c in order[:k]]


@given(seed=st.integers(0, 10**6), tiles=st.tuples(st.integers(1, 70), st.integers(1, 70)))
@settings(max_examples=20, deadline=None)
def test_neighbours_do_not_depend_on_how_the_work_is_cut(seed: int, tiles: tuple[int, int]) -> None:
    """To the last bit: shapes of the matrix products, order of the rows, and sharding."""
    train, labels = clustered(seed, 64, width=96)
    train[40:50] = train[3]  # copies of one image
    queries = normalise(torch.tensor(clustered(seed + 1, 9, width=96)[0]))
    bank = Features(torch.arange(64), normalise(torch.tensor(train)), torch.tensor(labels))
    whole = nearest(bank, queries, 12, tiles[0])

    odd, even = (Features(*(column[part::2] for column in bank)) for part in (1, 0))
    sharded = merge([nearest(odd, queries, 12, tiles[1]), nearest(even, queries, 12)], 12)
    row_by_row = [nearest(bank, queries[row : row + 1], 12) for row in range(9)]
    for name in ("similarities", "ids", "labels"):
        expected = getattr(whole, name)
        assert torch.equal(getattr(sharded, name), expected)
        assert torch.equal(torch.cat([getattr(part, name) for part in row_by_row]), expected)


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    spread=st.sampled_from([1.0, 1e-3, 1e-6, 0.0]),
    tile_rows=st.sampled_from([16, 100, 1000]),
)
@settings(max_examples=40, deadline=None)
def test_neighbours_found_in_float32_are_those_of_float64(
    seed: int, count: int, spread: float, tile_rows: int
) -> None:
    """More samples than candidates; the smaller the spread, the more of them only float64 tells
    apart, down to copies of one image."""
    random = np.random.default_rng(seed)
    rows = normalise(torch.tensor(random.normal(size=32) + spread * random.normal(size=(300, 32))))
    bank, queries = Features(torch.arange(300) * 3, rows, torch.arange(300)), rows[::37]
    found = nearest(bank, queries, count, tile_rows)
    similarities = queries.double() @ rows.double().T
    order = similarities.argsort(dim=1, descending=True, stable=True)[:, :count]
    assert torch.equal(found.labels, order)
    assert torch.equal(found.ids, order * 3)
    assert torch.equal(found.similarities, similarities.gather(1, order))


def test_neighbours_are_the_same_under_autocast() -> None:
    """A method may ask for them where products of float32 are made in bfloat16."""
    random = np.random.default_rng(0)
    rows = normalise(torch.tensor(random.normal(size=32) + 0.05 * random.normal(size=(400, 32))))
    bank, queries = Features(torch.arange(400), rows, torch.arange(400)), rows[::7]
    expected = nearest(bank, queries, 10)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest(bank, queries, 10)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.similarities, expected.similarities)


@given(st.integers(0, 10**6), st.sampled_from([2, 384, 2048]))
@settings(max_examples=10, deadline=None)
def test_similarities_are_exact(seed: int, width: int) -> None:
    """What the whole module rests on: float64 sums the products without rounding."""
    rows = normalise(torch.tensor(np.random.default_rng(seed).normal(size=(3, width))))
    bank = Features(torch.arange(3), rows, torch.zeros(3, dtype=torch.int64))
    found = nearest(bank, rows, 3)
    whole = [[int(step) for step in row] for row in (rows.double() * 2.0**24).tolist()]
    for row in range(3):
        for column in range(3):
            exact = sum(a * b for a, b in zip(whole[row], whole[column], strict=True))
            place = found.ids[row].tolist().index(column)
            assert found.similarities[row, place].item() * 2**48 == exact


def test_fewer_candidates_than_asked_for_are_filled_up() -> None:
    bank = Features(torch.arange(2), torch.eye(2), torch.tensor([4, 5]))
    found = nearest(bank, torch.eye(2), 5)
    assert found.similarities[0].tolist() == [1.0, 0.0, *[-torch.inf] * 3]
    assert found.labels[:, :2].tolist() == [[4, 5], [5, 4]]


def test_a_higher_weight_wins_over_more_votes() -> None:
    """One neighbour at cosine 1 against two at 0.9: exp(0.1 / 0.07) = 4.2 votes."""
    angle = np.sqrt(1 - 0.9**2)
    train = torch.tensor([[1.0, 0.0], [0.9, angle], [0.9, -angle]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[7.0, 0.0]])
    assert knn_predict(train, labels, query, k=3, classes=2)[0, 0] == 0
    assert knn_predict(train, labels, query, k=3, classes=2, temperature=10.0)[0, 0] == 1


def test_accuracy_counts_first_and_first_five_classes() -> None:
    """Six classes on six axes; the query leans on them in turn, its true class at place p."""
    lengths = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    train = shares(np.eye(6, dtype=np.float32), np.arange(6))
    test = shares(lengths.expand(6, 6).numpy().copy(), np.arange(6))
    result = knn_accuracy(train, test, ALONE, ks=(6, 3))
    assert result.accuracies[6] == Accuracy(top1=100 / 6, top5=500 / 6)
    assert result.accuracies[3] == Accuracy(top1=100 / 6, top5=300 / 6)  # min(5, k) classes
    assert (result.train_samples, result.test_samples, result.classes) == (6, 6, 6)


@pytest.mark.parametrize("test_samples", [1, 7, 99, 130])
def test_any_number_of_test_samples(test_samples: int) -> None:
    train = shares(*clustered(0, 150))
    queries, labels = clustered(1, test_samples)
    result = knn_accuracy(train, shares(queries, labels), ALONE, chunk_rows=40)
    assert result.test_samples == test_samples
    assert list(result.accuracies) == [10, 20, 100]
    assert result.skipped == (200,)
    predicted = knn_predict(
        train.features, train.labels, torch.tensor(queries), k=20, classes=result.classes
    )
    hits = (predicted[:, 0].numpy() == labels).sum()
    assert result.accuracies[20].top1 == 100 * hits / test_samples


def test_informative_features_are_judged_better_than_noise() -> None:
    train, test = shares(*clustered(0, 400)), shares(*clustered(1, 200))
    mixed = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    noise = train._replace(labels=train.labels[mixed])
    good = knn_accuracy(train, test, ALONE, ks=(20,)).accuracies[20].top1
    bad = knn_accuracy(noise, test, ALONE, ks=(20,)).accuracies[20].top1
    assert good > 60 > 35 > bad


def test_the_order_of_rows_does_not_matter() -> None:
    train, test = shares(*clustered(0, 120)), shares(*clustered(1, 50))
    train.features[60:80] = train.features[7]
    mixed = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    again = Features(*(column[mixed] for column in train))
    assert knn_accuracy(train, test, ALONE) == knn_accuracy(again, test, ALONE)


def test_missing_labels_are_named() -> None:
    features, labels = clustered(0, 30)
    train = shares(features, labels)
    unlabelled = train._replace(labels=torch.full_like(train.labels, -1))
    with pytest.raises(ProtocolError, match="30 of the 30 test images have none"):
        knn_accuracy(train, unlabelled, ALONE)
    train.labels[:2] = -1
    with pytest.raises(ProtocolError, match="2 of the 30 training images have none"):
        knn_accuracy(train, train, ALONE)


def test_what_cannot_be_judged_ends_in_a_sentence() -> None:
    train = shares(*clustered(0, 30))
    with pytest.raises(ProtocolError, match="at least 100 training samples; there are 30"):
        knn_accuracy(train, train, ALONE, ks=(100, 200))
    nothing = Features(*(column[:0] for column in train))
    with pytest.raises(ProtocolError, match="no test samples"):
        knn_accuracy(train, nothing, ALONE)
    broken = train._replace(features=train.features.clone())
    broken.features[4, 1] = torch.nan
    with pytest.raises(ProtocolError, match="1 of the 30 training images are not finite"):
        knn_accuracy(broken, train, ALONE)
    with pytest.raises(ProtocolError, match="k is 31"):
        knn_predict(train.features, train.labels, train.features, k=31, classes=7)


def own_rows(part: Features, rank: int, size: int) -> Features:
    """Shares of different lengths whose ids interleave."""
    rows = torch.arange(len(part.ids)) % 3 % size == rank
    return Features(*(column[rows] for column in part))


def judge_as_one_of_two(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    world = World(rank=rank, size=2, local_rank=rank)
    train, test = shares(*clustered(0, 230)), shares(*clustered(1, 77))
    train.features[60:160] = train.features[7]
    own_train, own_test = own_rows(train, rank, 2), own_rows(test, rank, 2)
    nothing = Features(*(column[:0] for column in test))
    results = [
        knn_accuracy(own_train, own_test, world, chunk_rows=13),
        knn_accuracy(own_train, test if rank == 1 else nothing, world),
        knn_accuracy(train if rank == 1 else nothing, own_test, world),
    ]
    unlabelled = own_test._replace(labels=own_test.labels - (rank == 0) * 100)
    with pytest.raises(ProtocolError, match="51 of the 77 test images have none"):
        knn_accuracy(own_train, unlabelled, world)
    torch.save(results, Path(directory) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_get_what_one_gets(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
        judge_as_one_of_two, (port, str(tmp_path)), nprocs=2
    )
    train, test = shares(*clustered(0, 230)), shares(*clustered(1, 77))
    train.features[60:160] = train.features[7]
    expected = knn_accuracy(train, test, ALONE)
    assert expected.accuracies.keys() == {10, 20, 100, 200}
    with torch.serialization.safe_globals([KnnResult, Accuracy]):
        results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert results == [[expected] * 3] * 2


def test_candidates_of_no_rank_change_nothing() -> None:
    some = Neighbours(torch.tensor([[0.5]]).double(), torch.tensor([[3]]), torch.tensor([[1]]))
    none = nearest(
        Features(torch.zeros(0).long(), torch.zeros(0, 2), torch.zeros(0).long()), torch.eye(2), 1
    )
    first = Neighbours(*(getattr(none, n)[:1] for n in ("similarities", "ids", "labels")))
    merged = merge([first, some], 1)
    assert (merged.ids.item(), merged.labels.item()) == (3, 1)
