"""k-means over the samples of all ranks, and the whitening that DeepCluster puts before it.

Lloyd's algorithm as faiss runs it (`Clustering.cpp`): centroids start at random samples, every
iteration moves them to their members' mean, and a centroid without members takes half of another
one's. Each rank keeps its own samples; what travels is [k, D] sums per iteration. Sums are float64,
so that the number of ranks does not show but in rows that two centroids are equally near to.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from headrace.training.collectives import (
    broadcast_,
    gather_rows,
    rank,
    sum_over_ranks,
    world_size,
)
from headrace.training.preset import ConfigError

_CHUNK_NUMBERS = 1 << 25  # numbers that a table of distances may have at a time
_ROUNDING = 1e-6  # of a network's features, relative to their length
_SPLIT = 1 / 1024  # how far, relative to its length, a split centroid's halves move apart


@torch.no_grad()
def kmeans(
    features: Tensor,
    clusters: int,
    *,
    iterations: int,
    generator: torch.Generator,
    spherical: bool = False,
    restarts: int = 1,
    empty: Literal["split", "keep"] = "split",
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(centroids float32 [k, D], assignments int64 [n]) of this rank's rows of the global set.

    features: float32 [n, D]; n may differ by rank, D may not. generator: in the same state on all
    ranks; it draws the samples at which centroids start and those that are split. iterations: of
    assignment and update; a last assignment follows, so that each row is with its nearest centroid.
    spherical: centroids are brought to length 1 after each update and rows belong to the largest
    inner product; rows should have length 1 too. restarts: as many runs, of which that with the
    smallest sum of squared distances (largest of inner products) counts.
    empty: a centroid without members takes over half of another one's, drawn with a probability
    that grows with its size, as in faiss ("split"), or stays where it is, as in SwAV's
    `main_deepclusterv2.py` ("keep"); after the last assignment some may be empty again.
    ids: int64 [n], distinct over all ranks: the result then depends on no order of the rows, for
    starts are drawn among the ascending ids; without them, among the rows in the ranks' order.
    Raises ConfigError where there are fewer rows than clusters.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        numbers, total = _global_numbers(len(features), ids, features.device)
        if not 0 < clusters <= total:
            raise ConfigError(
                f"k-means cannot make {clusters} clusters of {total} images: it takes at least one "
                f"of each; ask for other clusters (--objective) or more images"
            )
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for _ in range(restarts):
            centroids = _start(features, numbers, total, clusters, generator)
            if spherical:
                centroids = F.normalize(centroids, dim=1)
            for _ in range(iterations):
                assignments, _ = _assign(features, centroids, spherical)
                centroids = _update(features, assignments, centroids, generator, empty)
                if spherical:
                    centroids = F.normalize(centroids, dim=1)
            assignments, cost = _assign(features, centroids, spherical)
            if best is None or bool(cost < best[2]):
                best = centroids, assignments, cost
        assert best is not None, "restarts is at least 1"
        return best[0], best[1]


def whole_share(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What `Context.features` yields in one piece: ids int64 [n], features float32 [n, D]."""
    ids, features = zip(*batches, strict=True)
    return torch.cat(ids), torch.cat(features)


def cluster_sums(values: Tensor, assignments: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Over all ranks: (sums float64 [k, *row] of values [n, *row] by cluster, counts int64 [k])."""
    sums = values.new_zeros(clusters, *values.shape[1:], dtype=torch.float64)
    # Not all rows at once: the copies in float64 are twice as large as what they are made of.
    for rows in _chunks(len(values), max(1, values[:1].numel())):
        sums.index_add_(0, assignments[rows], values[rows].double())
    return sum_over_ranks(sums), sum_over_ranks(assignments.bincount(minlength=clusters))


def table_by_id(ids: Tensor, values: Tensor, samples: int) -> Tensor:
    """Each rank's whole numbers [n] at its ids, together on all ranks: int64 [samples], else -1."""
    table = torch.zeros(samples, dtype=torch.int64, device=values.device)
    table[ids] = values + 1
    return sum_over_ranks(table) - 1


@torch.no_grad()
def whiten(features: Tensor, dims: int = 256) -> Tensor:
    """PCA to `dims` (or D, if that is less), each with variance 1, then rows of length 1.

    float32 [n, D] of this rank -> [n, dims]; mean and covariance are those of all ranks' rows, in
    float64. Directions in which nothing varies but by float32's rounding become 0. deepcluster
    `clustering.py`, `preprocess_features` (faiss `PCAMatrix` with eigen_power=-0.5).
    """
    width = features.shape[1]
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        total = features.new_zeros(width + 1, dtype=torch.float64)
        for rows in _chunks(len(features), width):
            total[:width] += features[rows].double().sum(0)
        total[width] = len(features)
        total = sum_over_ranks(total)
        mean = total[:width] / total[width]
        covariance = features.new_zeros(width, width, dtype=torch.float64)
        for rows in _chunks(len(features), width):
            centered = features[rows].double() - mean
            covariance += centered.T @ centered
        variances, directions = torch.linalg.eigh(sum_over_ranks(covariance) / total[width])
        rounding = _ROUNDING**2 * (mean.square().sum() + variances.sum())
        # They ascend, and each direction has a sign of its own.
        variances, directions = variances.flip(0)[:dims], directions.flip(1)[:, :dims]
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        scales = torch.where(variances > rounding, variances.rsqrt(), 0)
        projection = directions * largest.sign() * scales
        if world_size() > 1:
            projection = broadcast_(projection.contiguous(), 0)
        whitened = features.new_empty(len(features), projection.shape[1])
        for rows in _chunks(len(features), width):
            whitened[rows] = ((features[rows].double() - mean) @ projection).float()
        return F.normalize(whitened, dim=1)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Pieces of `rows` whose tables of `width` columns stay below the limit."""
    size = max(1, _CHUNK_NUMBERS // width)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _global_numbers(rows: int, ids: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
    """(numbers int64 [rows] of this rank's rows in the global set, its size)."""
    if ids is None:
        lengths = gather_rows(torch.tensor([rows], device=device)).tolist()
        first = sum(lengths[: rank()])
        return torch.arange(first, first + rows, device=device), sum(lengths)
    largest = gather_rows(ids.max().view(1) if rows else ids.new_full((1,), -1)).max()
    present = ids.new_zeros(int(largest) + 1)
    present[ids] = 1
    numbers = sum_over_ranks(present).cumsum(0)
    return numbers[ids] - 1, int(numbers[-1]) if len(numbers) else 0


def _start(
    features: Tensor, numbers: Tensor, total: int, clusters: int, generator: torch.Generator
) -> Tensor:
    """Distinct random samples, [k, D]: every rank puts in those that it has."""
    chosen = torch.randperm(total, generator=generator, device=generator.device)[:clusters]
    cluster_of = torch.full((total,), -1, device=features.device)
    cluster_of[chosen.to(features.device)] = torch.arange(clusters, device=features.device)
    started = cluster_of[numbers]  # by each of this rank's rows, -1 for most
    starts = features.new_zeros(clusters, features.shape[1])
    starts[started[started >= 0]] = features[started >= 0]
    return sum_over_ranks(starts)


def _assign(features: Tensor, centroids: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    """(nearest centroid int64 [n], cost float64 scalar over all ranks: the smaller the better)."""
    half_squares = centroids.square().sum(1) / 2
    assignments = torch.empty(len(features), dtype=torch.int64, device=features.device)
    cost = torch.zeros((), dtype=torch.float64, device=features.device)
    for rows in _chunks(len(features), len(centroids)):
        # |x - c|^2 / 2 without |x|^2 / 2, which is the same for every centroid.
        scores = features[rows] @ centroids.T
        if not spherical:
            scores -= half_squares
        value, assignments[rows] = scores.max(dim=1)
        cost -= value.double().sum()
    return assignments, sum_over_ranks(cost)


def _update(
    features: Tensor,
    assignments: Tensor,
    centroids: Tensor,
    generator: torch.Generator,
    empty: Literal["split", "keep"],
) -> Tensor:
    sums, counts = cluster_sums(features, assignments, len(centroids))
    filled = counts > 0
    means = torch.where(filled[:, None], (sums / counts[:, None]).float(), centroids)
    if empty == "keep" or bool(filled.all()):
        return means
    return _split(means, counts.cpu(), generator)


def _split(centroids: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each empty centroid beside one that has at least two members, as faiss does.

    In rounds, each of which splits a cluster once at most; there are at least as many rows as
    centroids, so that there is always one to split.
    """
    signs = torch.ones(centroids.shape[1], device=centroids.device)
    signs[1::2] = -1
    while len(empty := (counts == 0).nonzero()[:, 0]):
        weights = (counts - 1).clamp(min=0).double().to(generator.device)
        number = min(len(empty), int((weights > 0).sum()))
        donors = torch.multinomial(weights, number, generator=generator).cpu()
        empty = empty[:number]
        centroids[empty] = centroids[donors] * (1 + _SPLIT * signs)
        centroids[donors] *= 1 - _SPLIT * signs
        counts[empty] = counts[donors] // 2
        counts[donors] -= counts[empty]
    return centroids
