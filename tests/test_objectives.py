"""Losses against float64 transcriptions of their equations, in value and in gradient.

Each oracle is numpy alone and written from the paper or its code, entry by entry rather than as the
implementation has it; its gradient is taken by central differences. Beside each loss stand the
mistakes that are easily made, to show that the comparison would notice them.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from headrace.training.blocks.targets import cross_entropy
from headrace.training.blocks.tokens import kept_patches
from headrace.training.methods.dino import Objective, dino_loss, teacher_temperature
from headrace.training.methods.mae import normalize_patches, patchify, reconstruction_loss
from headrace.training.methods.simclr import nt_xent
from tests.objective_checks import Array, assert_same, differs, log_softmax, value_and_gradient

# ---- DINO: eq. 1 to 3 and algorithm 1; dino main_dino.py, DINOLoss.forward


def dino_oracle(
    student: Array,
    teacher: Array,
    center: Array,
    student_temperature: float,
    teacher_temperature: float,
    *,
    same_view: bool = False,
    centered: bool = True,
) -> float:
    terms = []
    for t in range(len(teacher)):
        for v in range(len(student)):
            if v == t and not same_view:
                continue
            per_sample = []
            for b in range(student.shape[1]):
                logits = teacher[t, b] - center if centered else teacher[t, b]
                target = np.exp(log_softmax(logits / teacher_temperature))
                per_sample.append(
                    -(target * log_softmax(student[v, b] / student_temperature)).sum()
                )
            terms.append(np.mean(per_sample))
    return float(np.mean(terms))


@pytest.mark.parametrize(
    ("views", "batch", "prototypes", "student_temperature", "teacher_temperature"),
    [(2, 3, 5, 0.1, 0.04), (6, 2, 4, 0.1, 0.07), (3, 1, 7, 0.5, 1.0)],
)
def test_dino_loss(
    views: int,
    batch: int,
    prototypes: int,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    random = np.random.default_rng(views)
    student = random.uniform(-1, 1, (views, batch, prototypes))
    teacher = random.uniform(-1, 1, (2, batch, prototypes)).astype(np.float32).astype(np.float64)
    center = random.uniform(-0.5, 0.5, prototypes).astype(np.float32).astype(np.float64)
    temperatures = student_temperature, teacher_temperature
    as_float = [torch.tensor(each, dtype=torch.float32) for each in (teacher, center)]

    def ours(x: Tensor) -> Tensor:
        return dino_loss(
            x,
            *as_float,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )

    def oracle(x: Array) -> float:
        return dino_oracle(x, teacher, center, *temperatures)

    # Values that float32 holds, or the inputs themselves would differ.
    student = student.astype(np.float32).astype(np.float64)
    assert_same(ours, oracle, student)
    value = oracle(student)
    softer = student_temperature, 1.5 * teacher_temperature
    assert differs(value, dino_oracle(student, teacher, center, *temperatures, same_view=True))
    assert differs(value, dino_oracle(student, teacher, center, *temperatures, centered=False))
    assert differs(value, dino_oracle(student, teacher, center, *softer))


def test_dino_takes_the_teacher_as_constant() -> None:
    student, teacher = torch.randn(4, 2, 5), torch.randn(2, 2, 5)
    student.requires_grad_()
    teacher.requires_grad_()
    dino_loss(
        student, teacher, torch.zeros(5), student_temperature=0.1, teacher_temperature=0.04
    ).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("warmup", [0, 1, 2, 5, 30])
def test_dino_teacher_temperature(warmup: int) -> None:
    """dino main_dino.py, DINOLoss.__init__: np.linspace over the warm-up, then constant."""
    objective = Objective(
        warmup_teacher_temperature=0.04,
        teacher_temperature=0.07,
        warmup_teacher_temperature_epochs=warmup,
    )
    schedule = np.concatenate([np.linspace(0.04, 0.07, warmup), np.full(40 - warmup, 0.07)])
    ours = [teacher_temperature(objective, epoch) for epoch in range(40)]
    np.testing.assert_allclose(ours, schedule, rtol=1e-12)


# ---- SimCLR: eq. 1 and algorithm 1


def nt_xent_oracle(
    embeddings: Array, temperature: float, *, own: bool = False, other_view_only: bool = False
) -> float:
    """embeddings [B, 2, D]. Algorithm 1: the mean of l(i, j) over all 2B ordered positive pairs."""
    samples = len(embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    everyone = [(sample, view) for sample in range(samples) for view in range(2)]
    losses = []
    for sample, view in everyone:
        others = [
            other
            for other in everyone
            if (own or other != (sample, view)) and not (other_view_only and other[1] == view)
        ]
        logits = np.array([unit[sample, view] @ unit[other] / temperature for other in others])
        losses.append(-log_softmax(logits)[others.index((sample, 1 - view))])
    return float(np.mean(losses))


@pytest.mark.parametrize(
    ("samples", "dim", "temperature"), [(2, 3, 0.1), (5, 4, 0.5), (3, 8, 1.0), (1, 4, 0.5)]
)
def test_nt_xent(samples: int, dim: int, temperature: float) -> None:
    random = np.random.default_rng(samples)
    at = random.normal(size=(samples, 2, dim)).astype(np.float32).astype(np.float64)

    def ours(x: Tensor) -> Tensor:
        return nt_xent(x, x, 0, temperature)[0]

    if samples == 1:
        # The partner is the only other view.
        assert float(ours(torch.tensor(at))) == 0
        return
    assert_same(ours, lambda x: nt_xent_oracle(x, temperature), at)
    value = nt_xent_oracle(at, temperature)
    assert differs(value, nt_xent_oracle(at, temperature, own=True))
    assert differs(value, nt_xent_oracle(at, temperature, other_view_only=True))
    assert differs(value, nt_xent_oracle(at, temperature * 1.5))


def test_nt_xent_moves_keys_and_queries() -> None:
    """A stop-gradient on the gathered keys changes the gradient and not the value."""
    x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))
    at = x.double().numpy()
    value, gradient = value_and_gradient(lambda x: nt_xent(x, x, 0, 0.5)[0], at)
    stopped, one_sided = value_and_gradient(lambda x: nt_xent(x, x.detach(), 0, 0.5)[0], at)
    assert value == stopped
    assert np.linalg.norm(gradient - one_sided) > 0.1 * np.linalg.norm(gradient)


def test_nt_xent_of_parts_is_that_of_the_whole() -> None:
    x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(1))
    whole, found = nt_xent(x, x, 0, 0.3)
    parts = [nt_xent(x[start : start + 2], x, start, 0.3) for start in (0, 2, 4)]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).mean(), whole)
    assert sum(int(part[1].sum()) for part in parts) == int(found.sum())


def test_nt_xent_recognises_partners() -> None:
    pairs = F.one_hot(torch.arange(4), 8).float()[:, None].expand(4, 2, 8)
    assert nt_xent(pairs, pairs, 0, 0.1)[1].all()
    # Views in a circle, each nearest to its neighbour's: nobody finds the partner.
    wrong = torch.stack([pairs[:, 0], pairs[:, 0].roll(1, dims=0)], dim=1)
    assert not nt_xent(wrong, wrong, 0, 0.1)[1].any()


# ---- MAE: section 3, "Reconstruction target"; mae models_mae.py, patchify and forward_loss


def patches_oracle(pictures: Array, patch: int) -> Array:
    batch, _, height, width = pictures.shape
    rows = [
        pictures[b, :, top : top + patch, left : left + patch].transpose(1, 2, 0).ravel()
        for b in range(batch)
        for top in range(0, height, patch)
        for left in range(0, width, patch)
    ]
    return np.array(rows).reshape(batch, -1, patch * patch * 3)


def mae_oracle(
    prediction: Array,
    pictures: Array,
    mask: NDArray[np.bool_],
    patch: int,
    *,
    ddof: int = 1,
    per_sample: bool = False,
    everywhere: bool = False,
) -> float:
    target = patches_oracle(pictures, patch)
    mean = target.mean(-1, keepdims=True)
    target = (target - mean) / np.sqrt(target.var(-1, ddof=ddof, keepdims=True) + 1e-6)
    error = ((prediction - target) ** 2).mean(-1)
    if everywhere:
        return float(error.mean())
    if per_sample:
        return float(np.mean([error[b][mask[b]].mean() for b in range(len(mask))]))
    return float(error[mask].mean())


@pytest.mark.parametrize(("batch", "side", "patch"), [(2, 4, 2), (1, 6, 3), (3, 6, 2)])
def test_reconstruction_loss(batch: int, side: int, patch: int) -> None:
    random = np.random.default_rng(side)
    pictures = random.normal(size=(batch, 3, side, side)).astype(np.float32).astype(np.float64)
    patches = (side // patch) ** 2
    mask = random.permuted(np.tile(np.arange(patches) % 4 != 0, (batch, 1)), axis=1)
    at = random.normal(size=(batch, patches, patch * patch * 3))
    at = at.astype(np.float32).astype(np.float64)
    target = normalize_patches(patchify(torch.tensor(pictures), patch))

    def ours(x: Tensor) -> Tensor:
        return reconstruction_loss(x, target, torch.tensor(mask))

    assert_same(ours, lambda x: mae_oracle(x, pictures, mask, patch), at)
    value = mae_oracle(at, pictures, mask, patch)
    assert differs(value, mae_oracle(at, pictures, mask, patch, ddof=0))
    assert differs(value, mae_oracle(at, pictures, mask, patch, everywhere=True))


def test_reconstruction_loss_weighs_patches_and_not_samples_alike() -> None:
    """Only a mask of unequal counts tells sum(loss * mask) / sum(mask) from a mean of means."""
    random = np.random.default_rng(3)
    pictures, at = random.normal(size=(2, 3, 4, 4)), random.normal(size=(2, 4, 12))
    mask = np.array([[True, False, False, False], [True, True, True, False]])
    target = normalize_patches(patchify(torch.tensor(pictures), 2))
    value = float(reconstruction_loss(torch.tensor(at), target, torch.tensor(mask)))
    assert value == pytest.approx(mae_oracle(at, pictures, mask, 2), rel=1e-5)
    assert differs(value, mae_oracle(at, pictures, mask, 2, per_sample=True))


def test_normalize_patches_adds_to_the_variance_and_not_to_the_deviation() -> None:
    """Only nearly flat patches tell: here the variance is about the 1e-6 that is added."""
    pictures = 1e-3 * np.random.default_rng(4).normal(size=(1, 3, 4, 4))
    patches = patches_oracle(pictures, 2)
    centered = patches - patches.mean(-1, keepdims=True)
    variance = patches.var(-1, ddof=1, keepdims=True)
    ours = normalize_patches(patchify(torch.tensor(pictures), 2)).numpy()
    np.testing.assert_allclose(ours, centered / np.sqrt(variance + 1e-6), rtol=1e-9)
    assert not np.allclose(ours, centered / (np.sqrt(variance) + 1e-6), rtol=0.1)


def test_normalize_patches_stands_flat_patches() -> None:
    flat = torch.full((1, 2, 12), 0.7)
    torch.testing.assert_close(normalize_patches(flat), torch.zeros(1, 2, 12), atol=1e-3, rtol=0)


def test_kept_patches_are_where_the_mask_is_not() -> None:
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert kept_patches(mask, 2).tolist() == [[1, 3], [0, 1]]


# ---- supervised: cross-entropy with smoothed targets (Szegedy et al. 2015, section 7)


def cross_entropy_oracle(
    logits: Array, labels: NDArray[np.int64], smoothing: float, *, over_all: bool = False
) -> float:
    losses = []
    for row, label in zip(logits, labels, strict=True):
        if label >= 0:
            target = np.full(len(row), smoothing / len(row))
            target[label] += 1 - smoothing
            losses.append(-(target * log_softmax(row)).sum())
    return float(np.sum(losses) / (len(labels) if over_all else len(losses)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("labels", [[0, 2, 1], [3, -1, 0, -1, 2]])
def test_cross_entropy(labels: list[int], smoothing: float) -> None:
    random = np.random.default_rng(len(labels))
    at = random.normal(size=(len(labels), 4)).astype(np.float32).astype(np.float64)
    as_array = np.array(labels)

    def ours(x: Tensor) -> Tensor:
        return cross_entropy(x, torch.tensor(labels), smoothing=smoothing)

    assert_same(ours, lambda x: cross_entropy_oracle(x, as_array, smoothing), at)
    value = cross_entropy_oracle(at, as_array, smoothing)
    assert differs(value, cross_entropy_oracle(at, as_array, smoothing + 0.2))
    if -1 in labels:
        assert differs(value, cross_entropy_oracle(at, as_array, smoothing, over_all=True))


def test_cross_entropy_without_any_label_is_zero() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), -1))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()
