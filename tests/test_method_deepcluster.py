"""DeepCluster: its loss and sampler against float64 loops, its epochs, and a run with tables."""

import json
import math
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from headrace import training
from headrace.training.methods.deepcluster import (
    DeepCluster,
    normalized_mutual_information,
    uniform_over_clusters,
)
from headrace.training.optim import Schedule, build_optimizer
from headrace.training.preset import ConfigError, Optim
from tests.objective_checks import Array, assert_same, differs, log_softmax
from tests.tiny_methods import (
    SAMPLES,
    TinyContext,
    batch_of,
    build,
    progress_at,
    small_preset,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Array:
    """Such as float32 holds."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


def tiny_deepcluster(**changes: Any) -> DeepCluster:
    method = build("deepcluster", "test_resnet", **changes)
    assert isinstance(method, DeepCluster)
    return method


def test_deepcluster_is_the_cross_entropy_with_each_images_own_cluster() -> None:
    """Eq. 2 of the paper: by the image's id, not by its place in the batch."""
    method, batch = tiny_deepcluster(), batch_of("deepcluster")
    labels = [int(method.assignments.rows[sample]) for sample in batch.ids]

    def loss(logits: Tensor) -> Tensor:
        return method.objective({"logits": logits}, batch, progress_at(1))["loss"]

    def oracle(logits: Array, labels: list[int] = labels) -> float:
        terms = [-log_softmax(row)[label] for row, label in zip(logits, labels, strict=True)]
        return float(np.mean(terms))

    logits = 3 * normal(16, 8)
    assert_same(loss, oracle, logits)
    by_place = method.assignments.rows[:16].tolist()
    assert differs(oracle(logits), oracle(logits, by_place))
    assert differs(oracle(logits), 16 * oracle(logits))


@given(
    clusters=st.lists(st.integers(-1, 9), min_size=1, max_size=120),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_every_cluster_is_as_frequent_as_any_other(clusters: list[int], seed: int) -> None:
    """deepcluster `util.py`, `UnifLabelSampler.generate_indexes_epoch`."""
    clusters[0] = max(clusters[0], 0)
    sizes = Counter(cluster for cluster in clusters if cluster >= 0)
    samples = sum(sizes.values())
    share = samples // len(sizes) + 1
    drawn = uniform_over_clusters(torch.tensor(clusters), generator(seed)).tolist()
    assert len(drawn) == samples
    shown = Counter(clusters[sample] for sample in drawn)
    assert shown.keys() <= sizes.keys()
    assert max(shown.values()) <= share
    # What is missing of equal shares was dropped at random, after shuffling.
    assert sum(share - shown[cluster] for cluster in sizes) == share * len(sizes) - samples
    times = Counter(drawn)
    for sample, count in times.items():
        if sizes[clusters[sample]] > share:
            assert count == 1, "a large cluster's images are distinct"


def test_which_images_stand_for_a_cluster_is_random() -> None:
    clusters = torch.tensor([0] * 90 + [1] * 2)
    first, second = (uniform_over_clusters(clusters, generator(seed)) for seed in (1, 2))
    large = [set(drawn[drawn < 90].tolist()) for drawn in (first, second)]
    assert large[0] != large[1]
    assert first[:20].ge(90).any(), "and they are mixed"
    # Of few images each comes about equally often.
    counts = torch.stack([(first == sample).sum() for sample in (90, 91)])
    assert (counts > 10).all()
    seen: Counter[int] = Counter()
    for seed in range(300):
        seen.update(uniform_over_clusters(clusters[60:], generator(seed))[:16].tolist())
    large_counts = np.array([seen[sample] for sample in range(30)])
    assert large_counts.std() < 0.2 * large_counts.mean(), "none is preferred"


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=60),
)
@settings(deadline=None)
def test_normalized_mutual_information(pairs: list[tuple[int, int]]) -> None:
    """Section 4.1 of the paper: I(A; B) / sqrt(H(A) H(B)), by the definition of both."""
    n = len(pairs)
    joint = Counter(pairs)
    a, b = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    information = sum(
        count / n * math.log(count * n / (a[i] * b[j])) for (i, j), count in joint.items()
    )
    entropies = [
        -sum(count / n * math.log(count / n) for count in side.values()) for side in (a, b)
    ]
    scale = math.sqrt(math.prod(entropies))
    first, second = torch.tensor(pairs).unbind(dim=1)
    found = float(normalized_mutual_information(first, second))
    assert found == pytest.approx(information / scale if scale > 0 else 0.0, abs=1e-6)
    renamed = torch.tensor([3, 0, 4, 1, 2])[first]
    if len(a) > 1:
        assert float(normalized_mutual_information(first, renamed)) == pytest.approx(1)


def test_deepcluster_takes_pictures_and_sees_edges() -> None:
    method, batch = tiny_deepcluster(), batch_of("deepcluster")
    method.eval()
    pictures = batch.views[0]
    shifted = pictures + torch.tensor([0.5, -0.25, -0.25]).view(3, 1, 1)
    torch.testing.assert_close(method.encoder(shifted), method.encoder(pictures))
    colours = tiny_deepcluster(sobel=False).eval()
    assert not torch.allclose(colours.encoder(shifted), colours.encoder(pictures), atol=1e-3)


def test_each_epoch_begins_with_a_new_top_layer_and_new_clusters() -> None:
    context = TinyContext(small_preset("deepcluster"))
    method, other = tiny_deepcluster(), tiny_deepcluster(seed=0)
    assert float(method.nmi) == 0, "there were no clusters before"
    first = method.top_layer.weight.clone()
    assert float(first.detach().std()) == pytest.approx(0.01, rel=0.2)
    old = method.assignments.rows.clone()
    with torch.no_grad():
        method.top_layer.bias.fill_(3.0)
        method.top_layer.weight.mul_(100)
        for parameter in method.encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator()))
    method.before_epoch(context, progress_at(4))
    assert not method.top_layer.bias.any()
    assert float(method.top_layer.weight.detach().std()) == pytest.approx(0.01, rel=0.2)
    assert not torch.equal(method.top_layer.weight, first)
    assert (method.assignments.rows >= 0).all()
    expected = normalized_mutual_information(old, method.assignments.rows)
    assert torch.equal(method.nmi, expected)
    assert 0 < float(expected) < 1
    # The same epoch of another run with this seed begins with the same top layer.
    other.before_epoch(context, progress_at(4))
    assert torch.equal(other.top_layer.weight, method.top_layer.weight)


def test_the_table_is_a_function_of_state_and_epoch() -> None:
    method = tiny_deepcluster()
    table = method.order_table(progress_at(4))
    assert torch.equal(table, method.order_table(progress_at(6).epoch_start))
    assert torch.equal(table, method.order_table(progress_at(6)))
    assert not torch.equal(table, method.order_table(progress_at(8)))
    assert len(table) == SAMPLES
    method.assignments.rows[:30] = -1  # as a subset or a hold-out has them
    table = method.order_table(progress_at(4))
    assert len(table) == SAMPLES - 30
    assert table.min() >= 30


def test_the_top_layer_has_no_momentum() -> None:
    """deepcluster `main.py`, `train`: an optimiser of its own, new every epoch, without any."""
    method, batch = tiny_deepcluster(), batch_of("deepcluster")
    optim = Optim("sgd", 0.1, warmup_epochs=0, schedule="constant", weight_decay=0.0)
    schedule = Schedule(optim, 256, 5.0)
    optimizer = build_optimizer(method.param_groups(), schedule)
    moves: list[tuple[Tensor, Tensor]] = []
    for step in range(3):
        schedule.apply(optimizer, step / 20)
        weight = method.top_layer.weight
        before = weight.detach().clone()
        method.zero_grad()
        method(batch, progress_at(step))[0]["loss"].backward()
        assert weight.grad is not None
        gradient = weight.grad.clone()
        optimizer.step()
        moves.append((weight.detach() - before, -0.1 * gradient))
    for moved, expected in moves:
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)
    kernel = next(method.encoder.parameters())
    assert optimizer.state[kernel]["momentum_buffer"].any()


def test_deepcluster_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"clusters is 65; .* no more than 64 images"):
        tiny_deepcluster(clusters=65)


# ---- a run with tables, stopped and continued


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for sample in range(48):
        folder = tmp_path / "data" / f"class_{sample % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{sample}.png")
    return tmp_path / "data"


def test_a_run_follows_its_tables_and_goes_on_with_them(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 steps in an epoch; stopped after step 8, in the middle of one."""
    script = Path(training.__file__).parent / "train.py"
    main = runpy.run_path(str(script), run_name="train_under_test")["main"]
    state = torch.random.get_rng_state()
    seen: dict[int, list[int]] = {}
    tables: dict[int, Tensor] = {}
    embed, before_step = DeepCluster.embed, DeepCluster.before_step

    def noting(self: DeepCluster, batch: Any, progress: Any) -> dict[str, Tensor]:
        seen.setdefault(progress.epoch, []).extend(batch.ids.tolist())
        tables[progress.epoch] = self.order_table(progress)
        return embed(self, batch, progress)

    def stopping(self: DeepCluster, progress: Any) -> None:
        if progress.step == 8:
            raise KeyError("stopped")
        before_step(self, progress)

    def run(name: str) -> list[dict[str, Any]]:
        seen.clear()
        line = (
            f"--method deepcluster --preset cifar --data.train {pictures} --data.batch-size 8 "
            f"--objective.clusters 5 --run.steps 14 --run.log-every 1 --run.save-every 4 "
            f"--run.out {tmp_path / name}"
        )
        assert main(line.split()) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    monkeypatch.setattr(DeepCluster, "embed", noting)
    try:
        whole = run("whole")
        for epoch, ids in seen.items():
            assert ids == tables[epoch][: len(ids)].tolist()
        assert [len(ids) for ids in seen.values()] == [48, 48, 16]
        assert seen[0] != seen[1]
        with monkeypatch.context() as patch:
            patch.setattr(DeepCluster, "before_step", stopping)
            with pytest.raises(KeyError, match="stopped"):
                run("stopped")
        resumed = run("stopped")
    finally:
        torch.random.set_rng_state(state)
    assert len(seen[1]) == 32, "it went on after step 8"
    keys = ("step", "loss", "cluster_found", "gradient_norm", "nmi")
    assert [[line[k] for k in keys] for line in resumed] == [
        [line[k] for k in keys] for line in whole
    ]
