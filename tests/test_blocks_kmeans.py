"""k-means and whitening: against plain loops in float64, and the same for any number of ranks.

The two processes are this file, run as a script.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from headrace.training.blocks import kmeans as module
from headrace.training.blocks.kmeans import cluster_sums, kmeans, table_by_id, whiten
from headrace.training.preset import ConfigError

Array = NDArray[np.float64]


def blobs(samples: int, width: int, seed: int = 0, *, centres: int = 9) -> Tensor:
    """Overlapping heaps of unequal size."""
    random = np.random.default_rng(seed)
    where = random.normal(size=(centres, width))
    heap = random.choice(centres, samples, p=random.dirichlet(np.ones(centres)))
    return torch.tensor(where[heap] + 0.4 * random.normal(size=(samples, width))).float()


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lloyd(rows: Array, starts: list[int], iterations: int, *, spherical: bool) -> tuple[Any, Any]:
    """Sample by sample, as Lloyd 1982 and (spherical) Dhillon & Modha 2001, algorithm 1, have it;
    a centroid without members stays."""
    centroids = rows[starts].copy()

    def nearest(row: Array) -> int:
        if spherical:
            return int(np.argmax([row @ centroid for centroid in centroids]))
        return int(np.argmin([np.square(row - centroid).sum() for centroid in centroids]))

    for _ in range(iterations):
        members: list[list[Array]] = [[] for _ in centroids]
        for row in rows:
            members[nearest(row)].append(row)
        for cluster, own in enumerate(members):
            if own:
                mean = np.mean(own, axis=0)
                centroids[cluster] = mean / np.linalg.norm(mean) if spherical else mean
    return centroids, [nearest(row) for row in rows]


def inertia(rows: Tensor, centroids: Tensor, assignments: Tensor) -> float:
    return float((rows - centroids[assignments]).double().square().sum())


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(
    ("samples", "width", "clusters", "iterations"), [(80, 3, 7, 3), (150, 16, 12, 3), (40, 2, 1, 2)]
)
@pytest.mark.parametrize("empty", ["keep", "split"])
def test_lloyd_iterations_are_those_of_plain_loops(
    samples: int,
    width: int,
    clusters: int,
    iterations: int,
    spherical: bool,
    empty: Literal["keep", "split"],
) -> None:
    rows = blobs(samples, width)
    rows = unit(rows) if spherical else rows
    # The starts are a random sample without repetition: the head of the generator's permutation.
    starts = torch.randperm(samples, generator=generator())[:clusters].tolist()
    expected, nearest = lloyd(rows.double().numpy(), starts, iterations, spherical=spherical)
    assert len(set(nearest)) == clusters, "no cluster is to run empty here"
    centroids, assignments = kmeans(
        rows,
        clusters,
        iterations=iterations,
        generator=generator(),
        spherical=spherical,
        empty=empty,
    )
    np.testing.assert_allclose(centroids.numpy(), expected, rtol=0, atol=1e-6)
    assert assignments.tolist() == nearest
    assert assignments.dtype == torch.int64
    if clusters > 1:
        short, _ = lloyd(rows.double().numpy(), starts, iterations - 1, spherical=spherical)
        assert np.abs(short - expected).max() > 1e-3, "one iteration less would be noticed"


def test_spherical_clusters_point_the_way_and_not_at_the_mean() -> None:
    rows = unit(blobs(200, 4))
    flat, _ = kmeans(rows, 5, iterations=4, generator=generator())
    round_, _ = kmeans(rows, 5, iterations=4, generator=generator(), spherical=True)
    assert (flat.norm(dim=1) < 0.999).all()
    torch.testing.assert_close(round_.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("seed", range(4))
def test_a_centroid_without_members_takes_half_of_another(seed: int) -> None:
    """Half of the rows are one point, on which several centroids start and only one stays."""
    rows = torch.cat([torch.ones(60, 2), blobs(60, 2, seed)])
    kept, left = kmeans(rows, 20, iterations=15, generator=generator(seed), empty="keep")
    split, taken = kmeans(rows, 20, iterations=15, generator=generator(seed))
    assert len(left.unique()) < 20
    assert len(taken.unique()) > len(left.unique())
    assert inertia(rows, split, taken) < inertia(rows, kept, left)


def test_as_many_clusters_as_samples_and_as_different_ones() -> None:
    rows = blobs(30, 5)
    centroids, assignments = kmeans(rows, 30, iterations=3, generator=generator())
    assert torch.equal(centroids[assignments], rows)
    # More centroids than there are different rows: the split ones share them.
    twins = rows[:4].repeat(5, 1)
    centroids, assignments = kmeans(twins, 12, iterations=5, generator=generator())
    assert centroids.isfinite().all()
    torch.testing.assert_close(centroids[assignments], twins, rtol=5e-3, atol=0)


def test_the_best_of_several_runs_counts() -> None:
    rows, several = blobs(120, 2), generator(3)
    runs = [kmeans(rows, 9, iterations=2, generator=several) for _ in range(6)]
    costs = [inertia(rows, *run) for run in runs]
    best, assignments = kmeans(rows, 9, iterations=2, generator=generator(3), restarts=6)
    assert inertia(rows, best, assignments) == min(costs) < costs[0]
    few, _ = kmeans(rows, 9, iterations=2, generator=generator(3))
    assert torch.equal(few, runs[0][0])


def test_ids_make_the_order_of_the_rows_irrelevant() -> None:
    rows, ids = blobs(70, 3), torch.arange(70) * 3 + 5
    mixed = torch.randperm(70, generator=generator(1))
    centroids, assignments = kmeans(rows, 6, iterations=5, generator=generator(), ids=ids)
    ours, moved = kmeans(rows[mixed], 6, iterations=5, generator=generator(), ids=ids[mixed])
    torch.testing.assert_close(ours, centroids)
    assert torch.equal(moved, assignments[mixed])
    plain, _ = kmeans(rows, 6, iterations=5, generator=generator())
    torch.testing.assert_close(plain, centroids)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = blobs(101, 6)
    whole = kmeans(rows, 8, iterations=4, generator=generator())
    white = whiten(rows, 4)
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", 57)
    pieces = kmeans(rows, 8, iterations=4, generator=generator())
    torch.testing.assert_close(pieces[0], whole[0])
    assert torch.equal(pieces[1], whole[1])
    torch.testing.assert_close(whiten(rows, 4), white, rtol=1e-5, atol=1e-6)


def test_no_table_of_all_distances_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that an assignment makes is a piece's."""
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", 1000)
    sizes: list[int] = []
    whole = Tensor.__matmul__

    def noting(self: Tensor, other: Tensor) -> Tensor:
        sizes.append((product := whole(self, other)).numel())
        return product

    monkeypatch.setattr(Tensor, "__matmul__", noting)
    kmeans(blobs(500, 4), 50, iterations=2, generator=generator())
    assert max(sizes) == 1000
    assert sum(sizes) == 3 * 500 * 50


@pytest.mark.parametrize("clusters", [0, 11])
def test_there_are_at_least_as_many_samples_as_clusters(clusters: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot make {clusters} clusters of 10 images"):
        kmeans(blobs(10, 2), clusters, iterations=1, generator=generator())


# ---- whitening


def test_whitening_is_the_principal_axes_over_their_deviations() -> None:
    """By numpy's singular values of the centred rows; up to a sign per axis, so by inner products.

    faiss `VectorTransform.cpp`, `PCAMatrix`, eigen_power -0.5; deepcluster `clustering.py`, rows
    76 to 97.
    """
    random = np.random.default_rng(0)
    skew = random.normal(size=(7, 7)) * np.geomspace(5, 0.1, 7)
    rows = random.normal(size=(300, 7)) @ skew + 3
    centred = rows - rows.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:4].T / (sizes[:4] / np.sqrt(300))
    np.testing.assert_allclose(expected.T @ expected / 300, np.eye(4), atol=1e-10)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    ours = whiten(torch.tensor(rows).float(), 4).double().numpy()
    assert ours.shape == (300, 4)
    np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, atol=1e-5)
    unwhitened = centred @ axes[:4].T
    unwhitened /= np.linalg.norm(unwhitened, axis=1, keepdims=True)
    assert np.abs(unwhitened @ unwhitened.T - expected @ expected.T).max() > 0.1


def test_whitening_of_what_does_not_vary_stays_finite() -> None:
    """Dead units, and fewer samples than dimensions."""
    rows = blobs(20, 40)
    rows[:, 7:] = 2.5
    white = whiten(rows, 16)
    assert white.shape == (20, 16)
    assert white.isfinite().all()
    torch.testing.assert_close(white.norm(dim=1), torch.ones(20))
    assert (white[:, 7:] == 0).all()
    assert whiten(blobs(9, 40), 256).shape == (9, 40)


def test_sums_and_tables() -> None:
    values, assignments = blobs(50, 3), torch.arange(50) % 4
    sums, counts = cluster_sums(values, assignments, 6)
    assert counts.tolist() == [13, 13, 12, 12, 0, 0]
    assert sums.dtype == torch.float64
    for cluster in range(4):
        torch.testing.assert_close(sums[cluster], values[cluster::4].double().sum(0))
    table = table_by_id(torch.tensor([4, 0, 2]), torch.tensor([0, 8, 5]), 6)
    assert table.tolist() == [8, -1, 5, -1, 0, -1]


# ---- two processes


def everything(rows: Tensor, ids: Tensor) -> dict[str, Any]:
    """What each rank gets of its own rows."""
    heaped = torch.where(ids[:, None] % 2 == 0, 0.5, rows)  # many equal rows: centroids split
    found: dict[str, Any] = {"white": whiten(rows, 3)}
    for name, options in {
        "plain": {},
        "spherical": {"spherical": True},
        "restarts": {"restarts": 3},
    }.items():
        found[name] = kmeans(rows, 9, iterations=5, generator=generator(), ids=ids, **options)
    found["split"] = kmeans(heaped, 20, iterations=4, generator=generator(2), ids=ids)
    found["in order"] = kmeans(rows, 9, iterations=5, generator=generator())
    found["table"] = table_by_id(ids, found["plain"][1], 300)
    return found


def work(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory / 'rendezvous'}", rank=rank, world_size=2
    )
    results = [everything(rows, ids) for rows, ids in torch.load(directory / f"rows-{rank}")]
    torch.save(results, directory / f"results-{rank}")
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_are_one(tmp_path: Path) -> None:
    """However the rows are divided: in halves, in turns, unequally, all to one."""
    rows, ids = blobs(200, 5), torch.arange(200) + 40
    divisions = [
        [slice(0, 100), slice(100, None)],
        [slice(0, None, 2), slice(1, None, 2)],
        [slice(0, 13), slice(13, None)],
        [slice(0, None), slice(200, None)],
    ]
    for rank in range(2):
        shares = [(rows[own[rank]], ids[own[rank]]) for own in divisions]
        torch.save(shares, tmp_path / f"rows-{rank}")
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)
    ]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    first, second = (torch.load(tmp_path / f"results-{rank}") for rank in range(2))
    expected = everything(rows, ids)
    for own, mine, theirs in zip(divisions, first, second, strict=True):
        in_turns = own[0].step is not None
        for name in ("plain", "spherical", "restarts", "split", "in order"):
            assert torch.equal(mine[name][0], theirs[name][0]), "centroids are equal on all ranks"
            if in_turns and name == "in order":
                continue  # there the order of the ranks is another one
            torch.testing.assert_close(mine[name][0], expected[name][0])
            for rank, found in enumerate((mine, theirs)):
                assert torch.equal(found[name][1], expected[name][1][own[rank]])
        assert torch.equal(mine["table"], theirs["table"])
        assert torch.equal(mine["table"], expected["table"])
        for rank, found in enumerate((mine, theirs)):
            ours, whole = found["white"], expected["white"][own[rank]]
            torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
