"""The linear probe against logistic regression solved by LBFGS, and one process against two."""

import socket
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from headrace.pipelines.counters import Kind
from headrace.pipelines.permutation import permute
from headrace.training.features import Features
from headrace.training.protocol import ProtocolError
from headrace.training.protocols.knn import knn_accuracy
from headrace.training.protocols.linear import (
    LinearResult,
    Options,
    Tried,
    _edge,
    _mini_batches,
    linear_accuracy,
)
from headrace.training.world import World

ALONE = World()
QUICK = Options(learning_rates=(0.01, 0.1, 1.0), epochs=30, batch_size=64)


def clustered(seed: int, samples: int, classes: int = 4, width: int = 12) -> Features:
    """Classes that overlap, in features of very different scales."""
    centres = np.random.default_rng(1).normal(size=(classes, width))
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=samples)
    features = centres[labels] + 1.5 * generator.normal(size=(samples, width))
    features = features * np.logspace(-2, 2, width) + 5
    return Features(
        torch.arange(samples), torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
    )


def solved(train: Features, classes: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, bias, mean, deviation) that minimise the cross-entropy on standardised features."""
    features = train.features.double()
    mean, deviation = features.mean(0), features.std(0, unbiased=False)
    inputs = (features - mean) / deviation
    weight = torch.zeros(inputs.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> float:
        solver.zero_grad()
        loss = F.cross_entropy(inputs @ weight + bias, train.labels)
        loss.backward()
        return loss.item()

    solver.step(closure)
    return weight.detach(), bias.detach(), mean, deviation


def taken(share: Features, rows: Tensor) -> Features:
    return Features(*(column[rows] for column in share))


def test_it_finds_what_lbfgs_finds() -> None:
    """On the nine tenths that the rates are compared on, and on everything for the result."""
    train, test = clustered(0, 1500), clustered(1, 800)
    result = linear_accuracy(train, test, ALONE, sweep=replace(QUICK, epochs=100))

    places = permute(train.ids.numpy(), 1500, seed=0, kind=Kind.HOLDOUT, epoch=0)
    held_out = torch.tensor(places < 150)
    assert result.held_out_samples == int(held_out.sum()) == 150
    for fit, judged, ours in (
        (taken(train, ~held_out), taken(train, held_out), result.chosen.held_out_cross_entropy),
        (train, test, None),
    ):
        weight, bias, mean, deviation = solved(fit)
        logits = (judged.features.double() - mean) / deviation @ weight + bias
        top1 = 100 * float((logits.argmax(1) == judged.labels).double().mean())
        if ours is not None:
            assert ours == pytest.approx(float(F.cross_entropy(logits, judged.labels)), rel=0.01)
            assert result.chosen.held_out_top1 == pytest.approx(top1, abs=1.5)
        else:
            assert result.accuracy.top1 == pytest.approx(top1, abs=0.8)
            assert 50 < top1 < 90, "neither luck nor a task that anything solves"
    assert result.accuracy.top5 == 100  # of four classes


def test_top5_counts_five_of_many_classes() -> None:
    train, test = clustered(0, 900, classes=12), clustered(1, 400, classes=12)
    result = linear_accuracy(train, test, ALONE, sweep=QUICK)
    assert (result.classes, result.width) == (12, 12)
    assert result.accuracy.top1 + 10 < result.accuracy.top5 < 100


def test_identifiers_as_labels_are_judged_as_class_numbers() -> None:
    train, test = clustered(0, 300), clustered(1, 100)
    identifiers = torch.tensor([3, 47_219, 1_234_567, 987_654_321])
    named_train, named_test = (
        part._replace(labels=identifiers[part.labels]) for part in (train, test)
    )
    result = linear_accuracy(named_train, named_test, ALONE, sweep=QUICK)
    assert result == linear_accuracy(train, test, ALONE, sweep=QUICK)
    assert result.classes == 4
    of_identifiers = knn_accuracy(named_train, named_test, ALONE, ks=(5,))
    assert of_identifiers == knn_accuracy(train, test, ALONE, ks=(5,))


def test_the_rate_is_chosen_without_the_test_set() -> None:
    train, test = clustered(0, 600), clustered(1, 300)
    result = linear_accuracy(train, test, ALONE, sweep=QUICK)
    mixed = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    other = linear_accuracy(train, test._replace(labels=test.labels[mixed]), ALONE, sweep=QUICK)
    assert (other.chosen, other.tried) == (result.chosen, result.tried)
    assert other.accuracy.top1 < 35 < result.accuracy.top1
    assert result.chosen.held_out_top1 == max(one.held_out_top1 for one in result.tried)
    assert [one.learning_rate for one in result.tried] == [0.01, 0.1, 1.0]


def test_heads_do_not_know_of_each_other() -> None:
    """One that overflows (rate times decay above 2) and one that is alone: the others' numbers."""
    train, test = clustered(0, 400), clustered(1, 200)
    sweep = replace(QUICK, learning_rates=(0.01, 0.1))
    both = linear_accuracy(train, test, ALONE, sweep=replace(sweep, weight_decays=(0.0, 1e4)))
    alone = linear_accuracy(train, test, ALONE, sweep=sweep)
    pairs = [(one.learning_rate, one.weight_decay) for one in both.tried]
    assert pairs == [(0.01, 0.0), (0.01, 1e4), (0.1, 0.0), (0.1, 1e4)]
    for broken in both.tried[1::2]:
        assert (broken.held_out_top1, broken.held_out_cross_entropy) == (0.0, None)
    for one, other in zip(both.tried[0::2], alone.tried, strict=True):
        assert one.held_out_cross_entropy == pytest.approx(other.held_out_cross_entropy, rel=1e-5)
    assert both.chosen.weight_decay == 0


@given(power=st.integers(-20, 20), shift=st.sampled_from([0.0, 3.0]), seed=st.integers(0, 100))
@settings(max_examples=8, deadline=None)
def test_scale_and_shift_of_features_do_not_matter(power: int, shift: float, seed: int) -> None:
    train, test = clustered(seed, 300), clustered(seed + 1, 100)
    sweep = Options(learning_rates=(0.03, 0.3), epochs=10, batch_size=50)
    result = linear_accuracy(train, test, ALONE, sweep=sweep)

    def moved(share: Features) -> Features:
        scale = torch.tensor(2.0**power)
        return share._replace(features=(share.features + shift) * scale)

    same = linear_accuracy(moved(train), moved(test), ALONE, sweep=sweep)
    for one, other in zip(result.tried, same.tried, strict=True):
        assert other.held_out_cross_entropy == pytest.approx(one.held_out_cross_entropy, rel=1e-3)
    assert same.accuracy.top1 == pytest.approx(result.accuracy.top1, abs=1.01)


def test_a_feature_that_never_changes_is_no_feature() -> None:
    train, test = clustered(0, 300), clustered(1, 100)
    result = linear_accuracy(train, test, ALONE, sweep=QUICK)

    def padded(share: Features, value: float) -> Features:
        column = torch.full((len(share.ids), 1), value)
        return share._replace(features=torch.cat([share.features, column], dim=1))

    same = linear_accuracy(padded(train, 7.3), padded(test, 7.3), ALONE, sweep=QUICK)
    assert same.accuracy.top1 == pytest.approx(result.accuracy.top1, abs=1.01)
    blank = train._replace(features=torch.ones(300, 3))
    assert 15 < linear_accuracy(blank, blank, ALONE, sweep=QUICK).accuracy.top1 < 45


def test_the_order_of_rows_does_not_matter() -> None:
    train, test = clustered(0, 300), clustered(1, 100)
    mixed = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    result = linear_accuracy(train, test, ALONE, sweep=QUICK)
    again = linear_accuracy(taken(train, mixed), test, ALONE, sweep=QUICK)
    for one, other in zip(result.tried, again.tried, strict=True):
        assert other.held_out_cross_entropy == pytest.approx(one.held_out_cross_entropy, rel=1e-5)


@given(
    samples=st.integers(1, 300),
    steps=st.integers(1, 20),
    owner=st.lists(st.integers(0, 2), min_size=300, max_size=300),
)
@settings(deadline=None)
def test_mini_batches_are_cut_alike_on_every_rank(
    samples: int, steps: int, owner: list[int]
) -> None:
    """Three ranks own places at random; each step's parts make up the step, each place once."""
    places = np.arange(samples)
    ranks = [places[np.array(owner[:samples]) == rank] for rank in range(3)]
    parts = [list(_mini_batches(rows, rows, samples, steps)) for rows in ranks]
    whole = list(_mini_batches(places, places, samples, steps))
    assert [size for _, size in whole] == [len(rows) for rows, _ in whole]
    assert max(size for _, size in whole) - min(size for _, size in whole) <= 1
    for step, (rows, size) in enumerate(whole):
        assert [part[step][1] for part in parts] == [size] * 3
        together = np.sort(np.concatenate([part[step][0] for part in parts]))
        assert together.tolist() == rows.tolist()
    assert np.concatenate([rows for rows, _ in whole]).tolist() == places.tolist()
    assert all(a[-1] < b[0] for (a, _), (b, _) in pairwise(whole) if len(a) and len(b))


@pytest.mark.parametrize(
    ("top1", "edge"),
    [
        ({0.1: 40.0, 1.0: 50.0, 10.0: 52.0}, "highest"),
        ({0.1: 52.0, 1.0: 50.0, 10.0: 40.0}, "lowest"),
        ({0.1: 40.0, 1.0: 52.0, 10.0: 50.0}, None),
        ({0.1: 40.0, 1.0: 51.4, 10.0: 52.0}, None),  # a standard error of 1000 images is 1.6
        ({0.1: 52.0}, None),
    ],
)
def test_a_best_rate_at_the_edge_is_told(top1: dict[float, float], edge: str | None) -> None:
    tried = [Tried(rate, 0.0, value, 1.0) for rate, value in top1.items()]
    chosen = max(tried, key=lambda one: one.held_out_top1)
    assert _edge(chosen, tried, held_out=1000) == edge


def test_an_edge_is_told_of_a_sweep() -> None:
    """The higher rate overflows, because of the weight decay."""
    train, test = clustered(0, 300), clustered(1, 100)
    sweep = replace(QUICK, learning_rates=(0.1, 1e4), weight_decays=(1e-2,))
    assert linear_accuracy(train, test, ALONE, sweep=sweep).at_edge == "lowest"


def test_what_cannot_be_judged_ends_in_a_sentence() -> None:
    train = clustered(0, 30)
    few = taken(train, torch.arange(9))
    with pytest.raises(ProtocolError, match="there are 9"):
        linear_accuracy(few, train, ALONE)
    unlabelled = train._replace(labels=torch.full_like(train.labels, -1))
    with pytest.raises(ProtocolError, match="30 of the 30 test images have none"):
        linear_accuracy(train, unlabelled, ALONE)
    with pytest.raises(ProtocolError, match="no test samples"):
        linear_accuracy(train, taken(train, torch.arange(0)), ALONE)
    broken = train._replace(features=train.features.clone())
    broken.features[4, 1] = torch.inf
    with pytest.raises(ProtocolError, match="1 of the 30 training images are not finite"):
        linear_accuracy(broken, train, ALONE)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"learning_rates": ()}, "learning-rates are"),
        ({"learning_rates": (0.1, 0.0)}, "learning-rates are"),
        ({"weight_decays": (-1.0,)}, "weight-decays are"),
        ({"epochs": 0}, "must be at least 1"),
    ]
    for values, sentence in refused:
        with pytest.raises(ProtocolError, match=sentence):
            Options(**values)


def own_rows(share: Features, rank: int) -> Features:
    """Of two ranks: shares of different lengths whose ids interleave."""
    return taken(share, torch.arange(len(share.ids)) % 3 % 2 == rank)


def judge_as_one_of_two(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    world = World(rank=rank, size=2, local_rank=rank)
    train, test = clustered(0, 500), clustered(1, 200)
    nothing = taken(test, torch.arange(0))
    results = [
        linear_accuracy(own_rows(train, rank), own_rows(test, rank), world, sweep=QUICK),
        linear_accuracy(own_rows(train, rank), test if rank else nothing, world, sweep=QUICK),
    ]
    torch.save(results, Path(directory) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(judge_as_one_of_two, (port, str(tmp_path)), nprocs=2)  # pyright: ignore
    alone = linear_accuracy(clustered(0, 500), clustered(1, 200), ALONE, sweep=QUICK)
    by_rank: list[list[LinearResult]] = [
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)
    ]
    assert by_rank[0] == by_rank[1]
    for result in by_rank[0]:
        assert result.chosen.learning_rate == alone.chosen.learning_rate
        assert result.accuracy.top1 == pytest.approx(alone.accuracy.top1, abs=0.51)
        for one, other in zip(result.tried, alone.tried, strict=True):
            assert one.held_out_cross_entropy == pytest.approx(
                other.held_out_cross_entropy, rel=1e-4
            )
