"""A linear probe: multinomial logistic regression on frozen features, a whole sweep in one pass.

Features are those of the test view, without augmentation, extracted once; a probe on augmented
views (the papers' 90 epochs of crops) reaches one or two points more and costs a pass over the
images per epoch. They are standardised with the mean and deviation of the training set (MAE's
batch norm without scale and shift in front of the classifier; He et al. 2021, A.1), so that one
range of learning rates serves every encoder. SGD with momentum and a cosine to 0; every pair of
learning rate and weight decay is a head of its own, and all heads take the same mini-batches in one
matrix product.

A tenth of the *training* set chooses among them, by top-1 and then by cross-entropy; the chosen
head is then trained anew on the whole of it and judged once. Test labels choose nothing.

Features stay where their rank extracted them: the order of an epoch is the project's permutation,
evaluated for the rank's own ids, each rank adds its part of a mini-batch's gradient, and the sum is
all-reduced. The number of ranks changes how float32 sums are rounded and nothing else. Heads start
from zero, and nothing else is random.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from headrace.pipelines.counters import Kind
from headrace.pipelines.permutation import permute
from headrace.shards.progress import progress_bar
from headrace.shards.store import Store
from headrace.training.collectives import sum_over_ranks_
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
from headrace.training.schedules import cosine
from headrace.training.world import World

HELD_OUT_SHARE = 10  # one in so many training samples chooses the learning rate
MOMENTUM = 0.9
_VARIANCE_SHARE = 1e-6  # of the features' mean variance, added to each: for those that are constant
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Options:
    """What is tried, every learning rate with every weight decay.

    learning_rates: peaks, for mini-batches of `batch_size` samples over all ranks, not scaled.
    """

    learning_rates: tuple[float, ...] = option(
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), "peaks, not scaled"
    )
    weight_decays: tuple[float, ...] = option((0.0,), "each with every learning rate")
    epochs: int = option(100, "passes over the features")
    batch_size: int = option(1024, "samples per step over all processes")

    def __post_init__(self) -> None:
        rates, decays = self.learning_rates, self.weight_decays
        if not rates or not all(0 < rate < math.inf for rate in rates):
            raise ProtocolError(f"--linear.learning-rates are {list(rates)}; each must be above 0")
        if not decays or not all(0 <= decay < math.inf for decay in decays):
            raise ProtocolError(f"--linear.weight-decays are {list(decays)}; none may be negative")
        if self.epochs < 1 or self.batch_size < 1:
            raise ProtocolError(
                f"--linear.epochs is {self.epochs} and --linear.batch-size is {self.batch_size}; "
                f"both must be at least 1"
            )

    def check(self, train: Store, val: Store) -> None:
        """Raises ProtocolError where nothing can choose a head, or nothing is to be judged."""
        _held_out(len(train))
        if len(val) == 0:
            raise ProtocolError("a linear probe needs test samples, and there are none")


@dataclass(frozen=True)
class Tried:
    """A head of the sweep, judged by the held-out tenth of the training set, in percent and nats.

    cross_entropy is None where it is not finite.
    """

    learning_rate: float
    weight_decay: float
    held_out_top1: float
    held_out_cross_entropy: float | None


@dataclass(frozen=True)
class LinearResult:
    """accuracy: of the test set, by the chosen head, trained on the whole training set.

    at_edge: which end of the swept learning rates was the best, None where it lies inside or others
    are as good.
    """

    accuracy: Accuracy
    chosen: Tried
    tried: tuple[Tried, ...]
    at_edge: Literal["lowest", "highest"] | None
    sweep: Options
    width: int
    train_samples: int
    held_out_samples: int
    test_samples: int
    classes: int

    def shown(self) -> str:
        """A line per head of the sweep."""
        lines = [
            f"linear probe of {self.test_samples:,} images, trained on {self.train_samples:,} in "
            f"{self.classes} classes: top-1 {self.accuracy.top1:.2f} %, top-5 "
            f"{self.accuracy.top5:.2f} %",
            f"  learning rate  weight decay  top-1 of {self.held_out_samples:,} held-out images",
        ]
        for tried in self.tried:
            mark = "  chosen" if tried == self.chosen else ""
            lines.append(
                f"  {tried.learning_rate:>13g}  {tried.weight_decay:>12g}  "
                f"{tried.held_out_top1:5.2f} %{mark}"
            )
        if self.at_edge is not None:
            lines.append(
                f"  the {self.at_edge} learning rate was the best: there may be better ones "
                f"beyond, see --linear.learning-rates"
            )
        return "\n".join(lines)

    def stored(self) -> dict[str, Any]:
        """Everything, under "linear"."""
        return {"linear": asdict(self)}


def judge(subject: Subject, options: Options) -> LinearResult:
    """A probe of the val features, trained on the train features."""
    return linear_accuracy(
        subject.features("train"),
        subject.features("val"),
        subject.world,
        sweep=options,
        progress=True,
    )


class Heads(NamedTuple):
    """H linear classifiers side by side: weight [D, H, C], bias [H, C]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """[n, D] -> logits [n, H, C]."""
        width, heads, classes = self.weight.shape
        flat = torch.addmm(self.bias.reshape(-1), inputs, self.weight.reshape(width, -1))
        return flat.view(len(inputs), heads, classes)


class _Standard(NamedTuple):
    """x * scale + shift: mean 0 and variance 1 over the training set."""

    scale: Tensor
    shift: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return torch.addcmul(self.shift, features, self.scale)


class _Judged(NamedTuple):
    """By head, over all ranks: correct and cross-entropy summed over samples."""

    top1: list[int]
    top5: list[int]
    cross_entropy: list[float]


def linear_accuracy(
    train: Features,
    test: Features,
    world: World,
    *,
    sweep: Options | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LinearResult:
    """Top-1 and top-5 of the whole test set; every rank passes its share and gets the result.

    train, test: this rank's share, in any order; over all ranks each sample exactly once, with the
    ids 0 to N - 1 for training.
    Raises ProtocolError on every rank: labels are missing, features are not finite, samples too
    few.
    """
    sweep = sweep or Options()
    samples, test_samples = totals([len(train.ids), len(test.ids)], world)
    for share, name, number in ((train, "training", samples), (test, "test", test_samples)):
        if problem := problem_of(share, name, number, world):
            raise ProtocolError(f"a linear probe needs other features or labels: {problem}")
    held_out = _held_out(samples)
    train, test, classes = with_class_numbers(train, test)
    standard = _standard(train.features, samples)
    # A place in a permutation that the ids have for ever: the first ones are held out.
    places = permute(train.ids.cpu().numpy(), samples, seed=seed, kind=Kind.HOLDOUT, epoch=0)
    task = _Task(train, standard, places, samples, classes, seed, world, progress)

    pairs = [(rate, decay) for rate in sweep.learning_rates for decay in sweep.weight_decays]
    heads = _fit(task, pairs, sweep, leave=held_out, called="linear, sweep")
    held_out_rows = torch.from_numpy(places < held_out).to(train.features.device)
    judged = _judge(heads, standard, train.features[held_out_rows], train.labels[held_out_rows])
    tried = tuple(
        Tried(
            *pair,
            100 * top1 / held_out,
            cross_entropy / held_out if math.isfinite(cross_entropy) else None,
        )
        for pair, top1, cross_entropy in zip(pairs, judged.top1, judged.cross_entropy, strict=True)
    )
    chosen = max(
        tried, key=lambda head: (head.held_out_top1, -(head.held_out_cross_entropy or 1e30))
    )

    pair = (chosen.learning_rate, chosen.weight_decay)
    final = _fit(task, [pair], sweep, leave=0, called="linear, chosen")
    of_test = _judge(final, standard, test.features, test.labels)
    return LinearResult(
        accuracy=Accuracy(
            100 * of_test.top1[0] / test_samples, 100 * of_test.top5[0] / test_samples
        ),
        chosen=chosen,
        tried=tried,
        at_edge=_edge(chosen, tried, held_out),
        sweep=sweep,
        width=train.features.shape[1],
        train_samples=samples,
        held_out_samples=held_out,
        test_samples=test_samples,
        classes=classes,
    )


def _held_out(samples: int) -> int:
    """How many of the training samples choose the head."""
    if samples < HELD_OUT_SHARE:
        raise ProtocolError(
            f"a linear probe needs at least {HELD_OUT_SHARE} training samples, of which one "
            f"chooses the learning rate; there are {samples}"
        )
    return samples // HELD_OUT_SHARE


class _Task(NamedTuple):
    """Both fits have this in common. places: int64 [n] of this rank's rows, in [0, samples)."""

    train: Features
    standard: _Standard
    places: NDArray[np.int64]
    samples: int
    classes: int
    seed: int
    world: World
    progress: bool


def _fit(
    task: _Task,
    pairs: Sequence[tuple[float, float]],
    sweep: Options,
    *,
    leave: int,
    called: str,
) -> Heads:
    """One head per (learning rate, weight decay), trained on all but the first `leave` places."""
    features, world = task.train.features, task.world
    heads = _zeros(features.shape[1], len(pairs), task.classes, features.device)
    momenta = _zeros(features.shape[1], len(pairs), task.classes, features.device)
    rates, decays = torch.tensor(pairs, device=features.device).T[..., None]
    samples = task.samples - leave
    steps = -(-samples // sweep.batch_size)
    step, total = 0, steps * sweep.epochs
    trained_rows = np.flatnonzero(task.places >= leave)
    trained = task.places[trained_rows] - leave
    shown = task.progress and world.is_main
    with progress_bar(called, sweep.epochs, unit="epochs", shown=shown) as bar:
        for epoch in range(sweep.epochs):
            places = permute(trained, samples, seed=task.seed, kind=Kind.FULL, epoch=epoch)
            order = places.argsort()
            for rows, batch in _mini_batches(trained_rows[order], places[order], samples, steps):
                rows = torch.from_numpy(rows).to(features.device)
                inputs = task.standard(features.index_select(0, rows))
                errors = heads(inputs).softmax(dim=2)
                errors -= F.one_hot(task.train.labels[rows], task.classes)[:, None]
                errors /= batch
                flat = inputs.T @ errors.flatten(1)
                gradient = torch.cat([flat, errors.sum(dim=0).reshape(1, -1)])
                sum_over_ranks_(gradient)
                now = rates * cosine(step / total, 1.0, 0.0)
                momenta.weight.mul_(MOMENTUM).add_(gradient[:-1].view_as(heads.weight))
                momenta.weight.add_(heads.weight * decays)
                momenta.bias.mul_(MOMENTUM).add_(gradient[-1].view_as(heads.bias))
                heads.weight.sub_(now * momenta.weight)
                heads.bias.sub_(now * momenta.bias)
                step += 1
            bar.update()
    return heads


def _mini_batches(
    rows: NDArray[np.int64], places: NDArray[np.int64], samples: int, steps: int
) -> Iterator[tuple[NDArray[np.int64], int]]:
    """(this rank's rows, samples over all ranks) of each step; sizes differ by at most one.

    rows: in the order of their places in the epoch, which go up to `samples`.
    """
    bounds = [samples * step // steps for step in range(steps + 1)]
    cuts = np.searchsorted(places, bounds)
    for (first, last), (start, stop) in zip(pairwise(bounds), pairwise(cuts), strict=True):
        yield rows[start:stop], last - first


def _zeros(width: int, heads: int, classes: int, device: torch.device) -> Heads:
    return Heads(
        torch.zeros(width, heads, classes, device=device),
        torch.zeros(heads, classes, device=device),
    )


def _standard(features: Tensor, samples: int) -> _Standard:
    mean = sum_over_ranks_(features.sum(dim=0, dtype=torch.float64)) / samples
    squares = torch.zeros_like(mean)
    for part in features.split(_ROWS_AT_ONCE):
        squares += (part - mean).square().sum(dim=0)
    variance = sum_over_ranks_(squares) / samples
    scale = (variance + _VARIANCE_SHARE * variance.mean()).rsqrt()
    scale = scale.where(scale.isfinite(), 0.0)  # where no feature ever changes
    return _Standard(scale.float(), (-mean * scale).float())


def _judge(heads: Heads, standard: _Standard, features: Tensor, labels: Tensor) -> _Judged:
    """Equal logits go by class number; a head whose logits are not finite is never right."""
    number, classes = heads.bias.shape
    hits = torch.zeros(2, number, dtype=torch.int64, device=features.device)
    loss = torch.zeros(number, dtype=torch.float64, device=features.device)
    lower = torch.arange(classes, device=features.device)
    for rows, classes_of in zip(
        features.split(_ROWS_AT_ONCE), labels.split(_ROWS_AT_ONCE), strict=True
    ):
        logits = heads(standard(rows))
        label = classes_of[:, None, None].expand(-1, number, 1)
        of_label = logits.gather(2, label)
        before = (logits > of_label) | ((logits == of_label) & (lower < label))
        place = before.sum(dim=2).masked_fill(~logits.isfinite().all(dim=2), classes)
        hits += torch.stack([(place < 1).sum(dim=0), (place < min(5, classes)).sum(dim=0)])
        loss += (logits.logsumexp(dim=2) - of_label.squeeze(2)).sum(dim=0, dtype=torch.float64)
    top1, top5 = sum_over_ranks_(hits).tolist()
    return _Judged(top1, top5, sum_over_ranks_(loss).tolist())


def _edge(
    chosen: Tried, tried: Sequence[Tried], held_out: int
) -> Literal["lowest", "highest"] | None:
    """Where no other learning rate comes within a standard error of one at the end."""
    rates = [head.learning_rate for head in tried]
    others = [head.held_out_top1 for head in tried if head.learning_rate != chosen.learning_rate]
    share = chosen.held_out_top1 / 100
    error = 100 * math.sqrt(share * (1 - share) / held_out)
    if not others or max(others) >= chosen.held_out_top1 - error:
        return None
    if chosen.learning_rate == min(rates):
        return "lowest"
    return "highest" if chosen.learning_rate == max(rates) else None
