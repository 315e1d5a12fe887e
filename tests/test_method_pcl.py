"""PCL: its loss and concentrations against float64 loops, and what it does around an epoch."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.training.methods import pcl
from headrace.training.methods.pcl import Pcl, compared, concentrations, proto_nce
from headrace.training.optim import Schedule
from headrace.training.preset import ConfigError
from tests.objective_checks import Array, assert_same, differs, log_softmax
from tests.tiny_methods import (
    SAMPLES,
    TinyContext,
    batch_of,
    build,
    progress_at,
    small_preset,
)

Ints = NDArray[np.int64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Array:
    """Such as float32 holds."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def proto_oracle(
    queries: Array, own: list[int], negatives: list[int], centroids: Array, phi: Array
) -> float:
    """Eq. 11, second term, for one clustering: each query against the set of the batch's and the
    negative prototypes. pcl `builder.py`, rows 168 to 196, and `main_pcl.py`, rows 364 to 373."""
    among = sorted({*own, *negatives})
    total = 0.0
    for query, cluster in zip(unit(queries), own, strict=True):
        logits = np.array([query @ centroids[c] / phi[c] for c in among])
        total -= log_softmax(logits)[among.index(cluster)]
    return total / len(queries)


def ours(
    queries: Tensor, own: list[int], negatives: list[int], centroids: Array, phi: Array
) -> Tensor:
    """With `random` such that these negatives are the ones that are drawn."""
    random = torch.full((len(centroids),), 0.25)
    random[negatives] = 0.75
    numbers, first, place_of = compared(torch.tensor(own), len(negatives), random)
    scaled = torch.tensor(centroids / phi[:, None]).float()
    loss, hits = proto_nce(queries, scaled[numbers], first, place_of[torch.tensor(own)])
    assert hits.shape == (len(queries),)
    return loss


PROTO_CASES = [
    # clusters, of the batch's samples, negatives
    (9, [4, 0, 7], [1, 2, 8]),
    (9, [4, 4, 7, 4], [1, 2, 8]),  # shared by three
    (5, [0, 1, 2, 3, 4], []),
    (6, [5], [0, 1, 2, 3, 4]),
]


@pytest.mark.parametrize(("clusters", "own", "negatives"), PROTO_CASES)
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_proto_nce(clusters: int, own: list[int], negatives: list[int], temperature: float) -> None:
    centroids = unit(normal(clusters, 6, seed=1))
    phi = temperature * np.random.default_rng(2).uniform(0.5, 1.5, clusters)
    assert_same(
        lambda x: ours(x, own, negatives, centroids, phi),
        lambda x: proto_oracle(x, own, negatives, centroids, phi),
        normal(len(own), 6),
    )


def test_easy_mistakes_of_proto_nce_would_be_noticed() -> None:
    queries, own, negatives = normal(4, 6), [4, 4, 7, 0], [1, 2, 8]
    centroids = unit(normal(9, 6, seed=1))
    phi = 0.2 * np.random.default_rng(2).uniform(0.5, 1.5, 9)
    value = proto_oracle(queries, own, negatives, centroids, phi)
    found = float(ours(torch.tensor(queries), own, negatives, centroids, phi))
    assert math.isclose(found, value, rel_tol=1e-5)

    def mutated(kind: str) -> float:
        rows = queries if kind == "queries not normalised" else unit(queries)
        total = 0.0
        for place, cluster in enumerate(own):
            among = [*own, *negatives]  # the code: with the shared prototype once per sample
            if kind != "shared prototypes repeated":
                among = sorted(set(among))
            if kind == "other samples' prototypes left out":
                among = [cluster, *negatives]
            scale = {c: phi[c] for c in among}
            if kind == "one temperature":
                scale = dict.fromkeys(among, 0.2)
            if kind == "the temperature of the own prototype for all":
                scale = dict.fromkeys(among, phi[cluster])
            logits = np.array([rows[place] @ centroids[c] / scale[c] for c in among])
            total -= log_softmax(logits)[among.index(cluster)]
        return total if kind == "sum" else total / len(own)

    assert math.isclose(mutated("none"), value)
    for kind in (
        "queries not normalised",
        "shared prototypes repeated",
        "other samples' prototypes left out",
        "one temperature",
        "the temperature of the own prototype for all",
        "sum",
    ):
        assert differs(value, mutated(kind)), kind


@given(
    clusters=st.integers(1, 40),
    batch=st.integers(1, 12),
    negatives=st.integers(1, 50),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_compared_prototypes_are_the_batchs_and_others(
    clusters: int, batch: int, negatives: int, seed: int
) -> None:
    own = torch.randint(clusters, (batch,), generator=generator(seed))
    random = torch.rand(clusters, generator=generator(seed + 1))
    numbers, first, place_of = compared(own, negatives, random)
    assert len(numbers) == len(first) == batch + min(negatives, clusters)
    used = numbers[first].tolist()
    assert len(used) == len(set(used)), "each once"
    mine = set(own.tolist())
    assert mine <= set(used)
    # As many others as are wanted, those with the largest numbers; all, if there are fewer.
    others = sorted(set(range(clusters)) - mine, key=lambda c: -float(random[c]))
    assert set(used) == mine | set(others[:negatives])
    assert torch.equal(numbers[place_of[own]], own)
    assert first[place_of[own]].all()


# ---- concentrations


def concentration_oracle(distances: Array, own: Ints, clusters: int, temperature: float) -> Array:
    """pcl `main_pcl.py`, `run_kmeans`, rows 437 to 460; eq. 12 with alpha = 10."""
    members: list[list[float]] = [[] for _ in range(clusters)]
    for distance, cluster in zip(distances, own, strict=True):
        members[cluster].append(float(distance))
    phi = np.zeros(clusters)
    for cluster, values in enumerate(members):
        if len(values) > 1:
            phi[cluster] = np.mean(values) / math.log(len(values) + 10)
    for cluster, values in enumerate(members):
        if len(values) <= 1:
            phi[cluster] = phi.max()
    phi = np.clip(phi, np.percentile(phi, 10), np.percentile(phi, 90))
    return temperature * phi / phi.mean()


@pytest.mark.parametrize(("samples", "clusters"), [(200, 20), (60, 30), (40, 3)])
@pytest.mark.parametrize("temperature", [0.1, 0.2])
def test_concentrations(samples: int, clusters: int, temperature: float) -> None:
    random = np.random.default_rng(samples)
    own = random.choice(clusters, samples, p=random.dirichlet(np.ones(clusters)))
    # Distances that differ by cluster, and clusters of one or none among them.
    own[own == 1] = 0
    own[0] = 1
    distances = random.uniform(0.5, 1, samples) * np.linspace(0.2, 2, clusters)[own]
    expected = concentration_oracle(distances, own, clusters, temperature)

    def found(values: Array) -> Array:
        given = torch.tensor(values).float(), torch.tensor(own)
        return concentrations(*given, clusters, temperature).double().numpy()

    np.testing.assert_allclose(found(distances), expected, rtol=1e-5)
    assert found(distances).mean() == pytest.approx(temperature)
    # faiss gives squared distances, of which the code takes the root.
    assert np.abs(found(distances**2) / expected - 1).max() > 0.01
    if clusters == 20:
        counts = np.bincount(own, minlength=clusters)
        means = np.bincount(own, distances, minlength=clusters) / np.maximum(counts, 1)
        plain = means / np.log(counts + 10)
        plain[counts <= 1] = plain.max()
        assert np.abs(temperature * plain / plain.mean() / expected - 1).max() > 0.01, "clipped"


def test_concentrations_of_collapsed_clusters_stay_positive() -> None:
    own = torch.arange(40) % 8
    assert torch.equal(concentrations(torch.zeros(40), own, 8, 0.2), torch.full((8,), 0.2))
    distances = (own == 3).float()
    phi = concentrations(distances, own, 8, 0.2)
    assert phi.isfinite().all()
    assert (phi >= 0.2 * 0.01).all()


# ---- around a step and an epoch


def tiny_pcl(**changes: Any) -> Pcl:
    method = build("pcl", "test_resnet", **changes)
    assert isinstance(method, Pcl)
    return method


def test_pcl_is_info_nce_and_the_mean_over_clusterings() -> None:
    method, batch, progress = tiny_pcl(negatives=3), batch_of("pcl"), progress_at(1)
    with torch.no_grad():
        outputs, embeddings = method(batch, progress)
    queries = F.normalize(embeddings["query"], dim=1).double().numpy()
    keys = F.normalize(embeddings["key"], dim=1).double().numpy()
    queue = method.queue.rows.double().numpy()
    instance = 0.0
    for query, key in zip(queries, keys, strict=True):
        logits = np.array([query @ key, *(query @ row for row in queue)])
        instance -= log_softmax(logits / method.options.temperature)[0] / len(queries)
    terms, sizes = [], (6, 10)
    for number, scaled in enumerate(np.split(method.prototypes.rows.double().numpy(), sizes[:1])):
        own = method.assignments(batch.ids)[:, number].tolist()
        phi = 1 / np.linalg.norm(scaled, axis=1)
        random = torch.rand(
            sizes[number], generator=progress.generator(f"negatives {number}")
        ).tolist()
        others = sorted(set(range(sizes[number])) - set(own), key=lambda c: -random[c])[:3]
        terms.append(proto_oracle(queries, own, others, scaled * phi[:, None], phi))
    assert float(outputs["proto_nce"]) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(outputs["loss"]) == pytest.approx(instance + np.mean(terms), rel=1e-5)
    assert differs(instance + sum(terms) / 2, instance + sum(terms))


def test_pcl_warms_up_without_prototypes() -> None:
    method = tiny_pcl(warmup_epochs=1)
    assert (method.assignments.rows == -1).all()
    assert not method.prototypes.rows.any()
    batch = batch_of("pcl")
    assert method(batch, progress_at(3))[0].keys() == {"loss", "key_found"}
    context = TinyContext(small_preset("pcl"))
    method.before_epoch(context, progress_at(4))
    assert (method.assignments.rows >= 0).all()
    assert "proto_nce" in method(batch, progress_at(4))[0]


def test_pcl_clusters_what_the_key_encoder_says_of_the_test_view() -> None:
    method = tiny_pcl()
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.normal_(generator=generator())
    context = TinyContext(small_preset("pcl"))
    seen: list[tuple[nn.Module, str]] = []
    whole = TinyContext.features

    class Noting(TinyContext):
        def features(
            self, module: Callable[[Tensor], Tensor], view: str = "test"
        ) -> Iterator[tuple[Tensor, Tensor]]:
            assert isinstance(module, nn.Module)
            seen.append((module, view))
            return whole(self, module, view)

    method.before_epoch(Noting(context.preset), progress_at(4))
    ((module, view),) = seen
    assert view == "test"
    mine = {*method.key_encoder.parameters(), *method.key_projection.parameters()}
    assert set(module.parameters()) == mine
    # Each image is with the centroid that is nearest before centroids are normalised; so the
    # centroid, as the mean of its members, points where they do.
    features = torch.cat([rows for _, rows in context.features(module)])
    features = F.normalize(features, dim=1)
    assert method.assignments.rows.shape == (SAMPLES, 2)
    for number, scaled in enumerate(method.prototypes.rows.split([6, 10])):
        own = method.assignments.rows[:, number]
        means = torch.stack([features[own == c].mean(0) for c in own.unique()])
        found = F.normalize(scaled[own.unique()], dim=1)
        torch.testing.assert_close(found, F.normalize(means, dim=1), rtol=1e-3, atol=1e-4)
        phi = 1 / scaled.norm(dim=1)
        assert float(phi.mean()) == pytest.approx(method.options.temperature, rel=1e-5)


def test_pcl_keys_come_after_the_average_and_enter_the_queue_after_the_loss() -> None:
    method, batch = tiny_pcl(teacher_momentum=0.5), batch_of("pcl")
    online, follower = (
        next(projection.parameters()) for projection in (method.projection, method.key_projection)
    )
    with torch.no_grad():
        online.add_(1.0)
    before, queue = follower.clone(), method.queue.rows.clone()
    method.before_step(progress_at(0))
    torch.testing.assert_close(follower, (before + online.detach()) / 2)
    outputs, embeddings = method(batch, progress_at(0))
    assert torch.equal(method.queue.rows, queue)
    assert not embeddings["key"].requires_grad
    method.after_step([{"key": embeddings["key"]}], [batch], progress_at(0))
    torch.testing.assert_close(method.queue.rows[:16], F.normalize(embeddings["key"], dim=1))
    assert torch.equal(method.queue.rows[16:], queue[16:])
    assert outputs["loss"].requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": (6, 65)}, "pcl needs clusterings into 1 to 64 clusters"),
        ({"clusters": ()}, "pcl needs clusterings into 1 to 64"),
        ({"queue_size": 24}, "pcl needs a queue of 16 keys or a multiple"),
        ({"queue_size": 0}, "pcl needs a queue"),
        ({"batch_norm_group": 16}, "pcl needs two or more groups of 16 samples"),
    ],
)
def test_pcl_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_pcl(**changes)


def test_pcl_is_the_codes_in_both_versions() -> None:
    assert pcl.PRESETS["imagenet"].objective.clusters == (25000, 50000, 100000)
    v1 = pcl.PRESETS["v1_imagenet"]
    schedule = Schedule(v1.optim, v1.batch_size, v1.epochs)
    rates = [schedule.learning_rate_at(epoch / 200) for epoch in (0, 119, 120, 159, 160, 199)]
    np.testing.assert_allclose(rates, [0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
