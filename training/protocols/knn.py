"""Weighted k-nearest-neighbour accuracy as DINO defines it (Caron et al. 2021; dino `eval_knn.py`).

Features are L2-normalised; each of a test image's k most similar training images votes for its
class with exp(cosine / 0.07); the class with the most votes is the prediction.

Training features stay where their rank extracted them. Test features are sent round in chunks,
every rank finds its own nearest candidates, and the owner of the chunk merges them. The result does
not depend on the number of ranks, on chunk sizes or on the order of rows, to the last bit:
normalised features are rounded to multiples of 2^-24 (the resolution of float32 below 1), so that a
dot product is a multiple of 2^-48 that is at most about 1, which float64 sums without any rounding,
whatever the order; votes are summed as integers; equal similarities go by the sample's id, equal
votes by the class number. A product in float32, whose error has a bound, leaves a few candidates
for the one in float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from headrace.shards.progress import progress_bar
from headrace.shards.store import Store
from headrace.training.collectives import (
    broadcast_,
    gather_objects,
    gather_to,
)
from headrace.training.features import Features
from headrace.training.protocol import (
    Accuracy,
    ProtocolError,
    Subject,
    problem_of,
    totals,
    with_class_numbers,
)
from headrace.training.protocol_options import option
from headrace.training.world import World

TEMPERATURE = 0.07

_FEATURE_STEPS = 2.0**24
_VOTE_STEPS = 2.0**44  # exp(-2 / 0.07), the least weight there is, is seven steps
_NO_SAMPLE = torch.iinfo(torch.int64).max
_SPARE = 44
"""Candidates beyond the neighbours that are asked for."""
_GATHERED_VALUES = 2**20
"""Of candidates' features at once: about what fits into a core's cache in float64."""


@dataclass(frozen=True)
class Options:
    k: tuple[int, ...] = option((10, 20, 100, 200), "numbers of neighbours", also="--k")

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ProtocolError(f"--knn.k is {' '.join(map(str, self.k))}; each must be at least 1")

    def check(self, train: Store, val: Store) -> None:
        """Raises ProtocolError where no k fits, or nothing is to be judged."""
        _fitting(self.k, len(train))
        if len(val) == 0:
            raise ProtocolError("kNN cannot judge these features: there are no test samples")


@dataclass(frozen=True)
class Neighbours:
    """The K most similar training samples of n queries, by similarity downwards, then id upwards.

    similarities: float64 [n, K], -inf where there are fewer than K. ids, labels: int64 [n, K].
    """

    similarities: Tensor
    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class KnnResult:
    """accuracies by k; skipped: every k that is larger than the number of training samples."""

    accuracies: dict[int, Accuracy]
    skipped: tuple[int, ...]
    train_samples: int
    test_samples: int
    classes: int

    def shown(self) -> str:
        """A line per k."""
        lines = [
            f"kNN of {self.test_samples:,} images among {self.train_samples:,} in "
            f"{self.classes} classes",
            "      k    top-1    top-5",
        ]
        for k, accuracy in self.accuracies.items():
            lines.append(f"  {k:>5}  {accuracy.top1:5.2f} %  {accuracy.top5:5.2f} %")
        lines += [
            f"  k = {k} is left out: there are only {self.train_samples} training images"
            for k in self.skipped
        ]
        return "\n".join(lines)

    def stored(self) -> dict[str, Any]:
        """Under "results" the accuracies by k."""
        return {
            "results": {str(k): asdict(accuracy) for k, accuracy in self.accuracies.items()},
            "skipped_k": list(self.skipped),
            "temperature": TEMPERATURE,
        }


def judge(subject: Subject, options: Options) -> KnnResult:
    """kNN of the val features among the train features."""
    return knn_accuracy(
        subject.features("train"),
        subject.features("val"),
        subject.world,
        ks=options.k,
        progress=True,
    )


def normalise(features: Tensor) -> Tensor:
    """[n, D] -> float32 [n, D] of length 1, rounded to multiples of 2^-24; zero rows stay zero."""
    precise = features.double()
    length = torch.linalg.vector_norm(precise, dim=1, keepdim=True).clamp_min(1e-12)
    return ((precise / length * _FEATURE_STEPS).round() / _FEATURE_STEPS).float()


def nearest(train: Features, queries: Tensor, count: int, tile_rows: int = 16384) -> Neighbours:
    """The `count` nearest of `train` for each query.

    train: its features [N, D] and the queries [n, D] are as `normalise` gives them, its rows sorted
    by id. A product in float32 says who can be among them at all, one in float64 of those few who
    is. Needs about 2 * n * tile_rows * 8 bytes.
    """
    if len(train.ids) <= count + _SPARE or torch.get_float32_matmul_precision() != "highest":
        return _nearest_of_all(train, queries, count, tile_rows)
    rough, columns = _likeliest(train.features, queries, count + _SPARE, tile_rows)
    # Any order of summation errs by at most D * 2^-24 of |x| |y| = 1 (Higham 2002, section 3.1).
    # Whoever is further below the last one than both may err is no neighbour.
    error = queries.shape[1] * 2.0**-24 * 1.01
    doubtful = (rough[:, -1] >= rough[:, count - 1] - 2 * error).nonzero().squeeze(1)
    similarities = _products(train.features, columns, queries)
    candidates = Neighbours(similarities, train.ids[columns], train.labels[columns])
    best = merge([candidates], count)
    if len(doubtful):
        exact = _nearest_of_all(train, queries[doubtful], count, tile_rows)
        best.similarities[doubtful] = exact.similarities
        best.ids[doubtful], best.labels[doubtful] = exact.ids, exact.labels
    return best


def _likeliest(
    features: Tensor, queries: Tensor, count: int, tile_rows: int
) -> tuple[Tensor, Tensor]:
    """Similarities float32 [n, count], downwards, and their rows of `features`, int64 alike."""
    values = queries.new_full((len(queries), 0), 0.0)
    rows = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(features), tile_rows):
        # Autocast would make a product of bfloat16, whose error is beyond the bound.
        with torch.autocast(queries.device.type, enabled=False):
            similarities = queries @ features[start : start + tile_rows].T
        top = similarities.topk(min(count, similarities.shape[1]), dim=1)
        values, rows = torch.cat([values, top.values], 1), torch.cat([rows, top.indices + start], 1)
        values, kept = values.topk(min(count, values.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return values, rows


def _products(features: Tensor, rows: Tensor, queries: Tensor) -> Tensor:
    """float64 [n, m]: each query [n, D] by its own `rows` [n, m] of the features, without error."""
    block = max(1, _GATHERED_VALUES // (rows.shape[1] * queries.shape[1]))
    blocks = zip(rows.split(block), queries.double()[:, :, None].split(block), strict=True)
    return torch.cat([(features[part].double() @ vectors).squeeze(2) for part, vectors in blocks])


def _nearest_of_all(train: Features, queries: Tensor, count: int, tile_rows: int) -> Neighbours:
    """`nearest` in float64 throughout, one tile of training rows at a time."""
    precise = queries.double()
    best = _nobody(len(queries), count, queries.device)
    for start in range(0, len(train.ids), tile_rows):
        tile = slice(start, start + tile_rows)
        similarities = precise @ train.features[tile].double().T
        columns = _largest_columns(similarities, count)
        in_tile = Neighbours(
            similarities.gather(1, columns), train.ids[tile][columns], train.labels[tile][columns]
        )
        best = merge([best, in_tile], count)
    return best


def merge(parts: Sequence[Neighbours], count: int) -> Neighbours:
    """The `count` nearest among candidates for the same queries from disjoint training sets."""
    similarities = torch.cat([part.similarities for part in parts], dim=1)
    ids = torch.cat([part.ids for part in parts], dim=1)
    labels = torch.cat([part.labels for part in parts], dim=1)
    by_id = ids.argsort(dim=1)
    by_similarity = similarities.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    order = by_id.gather(1, by_similarity[:, :count])
    return Neighbours(similarities.gather(1, order), ids.gather(1, order), labels.gather(1, order))


def votes(neighbours: Neighbours, k: int, classes: int, temperature: float = TEMPERATURE) -> Tensor:
    """int64 [n, classes]: weights of the first k neighbours per class; the nearest counts 2^44.

    DINO's exp(s / t) divided by that of the nearest: the same ranking, without overflow.
    """
    similarities = neighbours.similarities[:, :k]
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    steps = (weights * _VOTE_STEPS).round().long()
    empty = steps.new_zeros(len(steps), classes)
    return empty.scatter_add_(1, neighbours.labels[:, :k], steps)


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int,
    classes: int,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Classes by votes, the most first: int64 [n, classes]; equal votes go by class number.

    train_features [N, D] and test_features [n, D] need not be normalised; train_labels int64 [N].
    The order of training rows decides between equally similar ones. N must be at least k.
    """
    if not 0 < k <= len(train_labels):
        raise ProtocolError(f"k is {k}; it must be 1 to {len(train_labels)}, the training samples")
    ids = torch.arange(len(train_labels), device=train_labels.device)
    train = Features(ids, normalise(train_features), train_labels)
    neighbours = nearest(train, normalise(test_features), k)
    return votes(neighbours, k, classes, temperature).argsort(dim=1, descending=True, stable=True)


def knn_accuracy(
    train: Features,
    test: Features,
    world: World,
    *,
    ks: Sequence[int] = Options.k,
    temperature: float = TEMPERATURE,
    chunk_rows: int = 512,
    progress: bool = False,
) -> KnnResult:
    """Top-1 and top-5 of the whole test set; every rank passes its share and gets the result.

    train, test: this rank's share, in any order; over all ranks each sample exactly once.
    Top-5 counts the first min(5, k) classes, as DINO does.
    Raises ProtocolError on every rank: labels are missing, features are not finite, no k fits.
    """
    train_samples, test_samples = totals([len(train.ids), len(test.ids)], world)
    for share, name, samples in ((train, "training", train_samples), (test, "test", test_samples)):
        if problem := problem_of(share, name, samples, world):
            raise ProtocolError(f"kNN cannot judge these features: {problem}")
    fitting = _fitting(ks, train_samples)
    skipped = tuple(sorted({k for k in ks if k > train_samples}))
    train, test, classes = with_class_numbers(train, test)

    by_id = train.ids.argsort()
    bank = Features(train.ids[by_id], normalise(train.features[by_id]), train.labels[by_id])
    queries = normalise(test.features)
    correct = torch.zeros(len(fitting), 2, dtype=torch.int64, device=queries.device)
    with progress_bar("kNN", test_samples, shown=progress and world.is_main) as bar:
        for rows, neighbours in _neighbours(bank, queries, max(fitting), world, chunk_rows, bar):
            labels = test.labels[rows]
            for row, k in enumerate(fitting):
                place = _place_of_label(votes(neighbours, k, classes, temperature), labels)
                correct[row, 0] += (place < 1).sum()
                correct[row, 1] += (place < min(5, k)).sum()
    summed = totals(correct.flatten().tolist(), world)
    return KnnResult(
        accuracies={
            k: Accuracy(100 * top1 / test_samples, 100 * top5 / test_samples)
            for k, top1, top5 in zip(fitting, summed[0::2], summed[1::2], strict=True)
        },
        skipped=skipped,
        train_samples=train_samples,
        test_samples=test_samples,
        classes=classes,
    )


def _fitting(ks: Sequence[int], train_samples: int) -> list[int]:
    """Those that there are enough training samples for, ascending."""
    fitting = sorted({k for k in ks if 0 < k <= train_samples})
    if not fitting:
        raise ProtocolError(
            f"kNN with k = {', '.join(map(str, ks))} needs at least {max(1, min(ks))} training "
            f"samples; there are {train_samples:,}"
        )
    return fitting


def _neighbours(
    bank: Features, queries: Tensor, count: int, world: World, chunk_rows: int, bar: tqdm
) -> Iterator[tuple[slice, Neighbours]]:
    """(rows, their neighbours in the whole training set) for this rank's queries, in order.

    Collective: every rank must run it to its end.
    """
    if world.size == 1:
        for start in range(0, len(queries), chunk_rows):
            rows = slice(start, min(start + chunk_rows, len(queries)))
            yield rows, nearest(bank, queries[rows], count)
            bar.update(rows.stop - rows.start)
        return
    for owner, length in enumerate(gather_objects(len(queries))):
        for start in range(0, length, chunk_rows):
            rows = slice(start, min(start + chunk_rows, length))
            chunk = queries.new_empty(rows.stop - rows.start, queries.shape[1])
            if owner == world.rank:
                chunk.copy_(queries[rows])
            broadcast_(chunk, owner)
            gathered = _gather(nearest(bank, chunk, count), owner)
            if gathered:
                yield rows, merge(gathered, count)
            bar.update(rows.stop - rows.start)


def _gather(candidates: Neighbours, owner: int) -> list[Neighbours]:
    """Every rank's candidates, on the owner; an empty list elsewhere."""
    columns = [
        gather_to(column, owner)
        for column in (candidates.similarities, candidates.ids, candidates.labels)
    ]
    return [Neighbours(*parts) for parts in zip(*columns, strict=True)]


def _nobody(rows: int, count: int, device: torch.device) -> Neighbours:
    return Neighbours(
        torch.full((rows, count), -torch.inf, dtype=torch.float64, device=device),
        torch.full((rows, count), _NO_SAMPLE, dtype=torch.int64, device=device),
        torch.zeros(rows, count, dtype=torch.int64, device=device),
    )


def _largest_columns(values: Tensor, count: int) -> Tensor:
    """[n, N] -> int64 [n, min(count, N)]: columns of the largest; of equal ones the lower column.

    `topk` takes any of the equal ones. That matters only where the last one inside equals the first
    one outside, and only those rows are sorted.
    """
    if count >= values.shape[1]:
        return torch.arange(values.shape[1], device=values.device).expand(values.shape)
    top = values.topk(count + 1, dim=1)
    columns = top.indices[:, :count]
    crowded = (top.values[:, count - 1] == top.values[:, count]).nonzero().squeeze(1)
    if len(crowded):
        columns[crowded] = values[crowded].argsort(dim=1, descending=True, stable=True)[:, :count]
    return columns


def _place_of_label(class_votes: Tensor, labels: Tensor) -> Tensor:
    """int64 [n]: how many classes come before the true one, by votes and then class number."""
    of_label = class_votes.gather(1, labels[:, None])
    lower = torch.arange(class_votes.shape[1], device=labels.device) < labels[:, None]
    return ((class_votes > of_label) | ((class_votes == of_label) & lower)).sum(dim=1)
