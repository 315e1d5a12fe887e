"""DINO: its loss against a float64 transcription, and what it promises beyond the contract.

The oracle is numpy alone and written from the paper and its code, entry by entry; its gradient is
taken by central differences. Beside it stand the mistakes that the comparison would notice.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.backbones import EncoderFactory
from headrace.training.method import Facts, Progress
from headrace.training.methods.dino import Dino, Objective, teacher_temperature
from headrace.training.preset import ConfigError
from tests.objective_checks import Array, as_float32, assert_same, differs, log_softmax
from tests.tiny_methods import (
    batch_of,
    build,
    module_of,
    progress_at,
    sgd,
    small_preset,
    train_step,
)


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
    """Eq. 1 to 3 and algorithm 1; dino main_dino.py, DINOLoss.forward. student [B, V, K], teacher
    [B, 2, K]."""
    terms = []
    for t in range(teacher.shape[1]):
        for v in range(student.shape[1]):
            if v == t and not same_view:
                continue
            per_sample = []
            for b in range(len(student)):
                logits = teacher[b, t] - center if centered else teacher[b, t]
                target = np.exp(log_softmax(logits / teacher_temperature))
                per_sample.append(
                    -(target * log_softmax(student[b, v] / student_temperature)).sum()
                )
            terms.append(np.mean(per_sample))
    return float(np.mean(terms))


def dino_of(prototypes: int, student_temperature: float, teacher_temperature: float) -> Dino:
    method = build(
        "dino",
        "test_resnet",
        out_dim=prototypes,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    assert isinstance(method, Dino)
    return method


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
    student = as_float32(random.uniform(-1, 1, (batch, views, prototypes)))
    teacher = as_float32(random.uniform(-1, 1, (batch, 2, prototypes)))
    center = as_float32(random.uniform(-0.5, 0.5, prototypes))
    temperatures = student_temperature, teacher_temperature
    method = dino_of(prototypes, *temperatures)
    method.center.copy_(torch.tensor(center))

    def objective(x: Tensor) -> dict[str, Tensor]:
        embeddings = {"student": x, "teacher": torch.tensor(teacher).float()}
        return method.objective(embeddings, batch_of("dino"), progress_at(0))

    def oracle(x: Array) -> float:
        return dino_oracle(x, teacher, center, *temperatures)

    assert_same(lambda x: objective(x)["loss"], oracle, student)
    target_logs = [
        log_softmax(row / teacher_temperature) for row in (teacher - center).reshape(-1, prototypes)
    ]
    entropy = np.mean([-(np.exp(logs) * logs).sum() for logs in target_logs])
    logged = objective(torch.tensor(student).float())["teacher_entropy"]
    assert float(logged) == pytest.approx(entropy, rel=1e-4)
    value = oracle(student)
    softer = student_temperature, 1.5 * teacher_temperature
    assert differs(value, dino_oracle(student, teacher, center, *temperatures, same_view=True))
    assert differs(value, dino_oracle(student, teacher, center, *temperatures, centered=False))
    assert differs(value, dino_oracle(student, teacher, center, *softer))


def test_dino_takes_the_teacher_as_constant() -> None:
    student, teacher = torch.randn(2, 4, 5), torch.randn(2, 2, 5)
    student.requires_grad_()
    teacher.requires_grad_()
    embeddings = {"student": student, "teacher": teacher}
    method = dino_of(5, 0.1, 0.04)
    method.objective(embeddings, batch_of("dino"), progress_at(0))["loss"].backward()
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


def test_dino_moves_its_center_once_per_step_from_all_micro_batches() -> None:
    whole = batch_of("dino")
    halves = [
        replace(
            whole,
            views=tuple(view[rows] for view in whole.views),
            labels=whole.labels[rows],
            ids=whole.ids[rows],
        )
        for rows in (slice(0, 8), slice(8, 16))
    ]
    one, two = (build("dino", "test_vit", drop_path=0.2) for _ in range(2))
    optimizers = [sgd(method) for method in (one, two)]
    for step in range(3):
        losses = [
            train_step(one, optimizers[0], [whole], progress_at(step)),
            train_step(two, optimizers[1], halves, progress_at(step)),
        ]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert one.get_buffer("center").any()
    torch.testing.assert_close(one.get_buffer("center"), two.get_buffer("center"))
    expected = 0.1 * build("dino", "test_vit").embed(whole, progress_at(0))["teacher"].mean((0, 1))
    fresh = build("dino", "test_vit")
    train_step(fresh, sgd(fresh), [whole], progress_at(0))
    torch.testing.assert_close(fresh.get_buffer("center"), expected)


def test_dino_clips_each_parameter_and_holds_the_prototypes() -> None:
    method = build("dino", "test_vit", freeze_last_layer_epochs=1, clip=0.01)
    prototypes = method.get_parameter("student_head.prototypes.weight")
    for step, held in [(0, True), (3, True), (4, False)]:
        method.zero_grad()
        method(batch_of("dino"), progress_at(step))[0]["loss"].backward()
        unclipped = {k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None}
        method.after_backward(progress_at(step))
        assert (prototypes.grad is None) == held
        for key, parameter in method.named_parameters():
            if parameter.grad is not None:
                factor = min(1.0, 0.01 / (float(unclipped[key].norm()) + 1e-6))
                torch.testing.assert_close(parameter.grad, unclipped[key] * factor)
    assert any(gradient.norm() > 0.01 for gradient in unclipped.values())


def test_dino_teacher_starts_as_the_student_and_ends_still() -> None:
    method = build("dino", "test_resnet")
    student = dict(method.named_parameters())
    for key, value in method.encoder.named_parameters():
        assert torch.equal(value, student[f"student.{key}"])
    before = {key: value.clone() for key, value in method.encoder.named_parameters()}
    # The momentum is 1 at the end of the run.
    last = Progress(step=10**6 - 1, total_steps=10**6, steps_per_epoch=10, seed=0)
    train_step(method, sgd(method, 0.1), [batch_of("dino")], last)
    for key, value in method.encoder.named_parameters():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-8)


def test_dino_may_learn_the_lengths_of_prototypes() -> None:
    changes: dict[str, Any] = {"normalize_prototypes": False, "teacher_momentum": 0.5}
    method, batch = build("dino", "test_vit", **changes), batch_of("dino")
    lengths = method.get_parameter("student_head.prototypes.lengths")
    train_step(method, sgd(method, 1.0), [batch], progress_at(0))
    assert (lengths - 1).abs().max() > 1e-3
    followed = method.get_parameter("teacher_head.prototypes.lengths")
    torch.testing.assert_close(followed, (1 + lengths) / 2)
    held = build("dino", "test_vit", freeze_last_layer_epochs=1, **changes)
    train_step(held, sgd(held, 1.0), [batch], progress_at(0))
    assert (held.get_parameter("student_head.prototypes.lengths") == 1).all()


def test_dino_wants_its_global_views_first() -> None:
    preset = small_preset("dino")
    for pixels in [(32,), (32, 16, 32), (16, 16, 32)]:
        with pytest.raises(ConfigError, match="two global views of one size"):
            module_of("dino").build(
                preset.objective,
                EncoderFactory("test_resnet", {}),
                Facts(0, 64, pixels, 16, 4, 20),
            )
