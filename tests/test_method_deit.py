"""DeiT: its two distillation losses against float64 transcriptions, and the teacher it keeps."""

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.training.methods.deit import distillation_loss
from headrace.training.preset import ConfigError
from tests.objective_checks import Array, assert_same, differs, log_softmax, value_and_gradient
from tests.tiny_methods import batch_of, build, progress_at, sgd, train_step


def soft_oracle(student: Array, teacher: Array, temperature: float, divisor: float) -> float:
    """Eq. 2; deit `losses.py`, DistillationLoss.forward: the kl_div of log_softmax(kd / T) and
    log_softmax(teacher / T), reduction='sum', times T * T, divided by outputs_kd.numel()."""
    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        student_logs = log_softmax(student_row / temperature)
        teacher_logs = log_softmax(teacher_row / temperature)
        for q, p in zip(student_logs, teacher_logs, strict=True):
            total += np.exp(p) * (p - q) * temperature * temperature
    return total / divisor


@pytest.mark.parametrize(("batch", "classes", "temperature"), [(3, 5, 1.0), (1, 7, 3.0), (4, 2, 2)])
def test_soft_distillation(batch: int, classes: int, temperature: float) -> None:
    random = np.random.default_rng(batch)
    student = random.uniform(-2, 2, (batch, classes))
    teacher = random.uniform(-2, 2, (batch, classes)).astype(np.float32).astype(np.float64)
    teacher_logits = torch.tensor(teacher, dtype=torch.float32)

    def code(x: Tensor) -> Tensor:
        return distillation_loss(x, teacher_logits, "soft", temperature)

    def paper(x: Tensor) -> Tensor:
        return distillation_loss(x, teacher_logits, "soft", temperature, "batch")

    assert_same(code, lambda x: soft_oracle(x, teacher, temperature, batch * classes), student)
    assert_same(paper, lambda x: soft_oracle(x, teacher, temperature, batch), student)
    value, _ = value_and_gradient(code, student)
    # The easy mistakes: the other direction, no T^2, the paper's scale.
    assert differs(value, soft_oracle(teacher, student, temperature, batch * classes))
    if temperature != 1:
        assert differs(value, value / temperature**2)
    assert differs(value, soft_oracle(student, teacher, temperature, batch))


def test_hard_distillation() -> None:
    """Eq. 3; DistillationLoss.forward for 'hard': the cross_entropy of kd and teacher.argmax(1)."""
    random = np.random.default_rng(0)
    student, teacher = random.uniform(-2, 2, (2, 4, 6))
    teacher_logits = torch.tensor(teacher, dtype=torch.float32)

    def oracle(x: Array) -> float:
        pairs = zip(x, teacher, strict=True)
        return -float(np.mean([log_softmax(row)[target.argmax()] for row, target in pairs]))

    assert_same(lambda x: distillation_loss(x, teacher_logits, "hard"), oracle, student)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_teacher_takes_no_gradient(kind: Literal["hard", "soft"]) -> None:
    teacher = torch.randn(3, 4, requires_grad=True)
    student = torch.randn(3, 4, requires_grad=True)
    distillation_loss(student, teacher, kind).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_resumed_run_keeps_its_teacher() -> None:
    method = build("deit", "test_resnet")
    train_step(method, sgd(method), [batch_of("deit")], progress_at(0))
    assert method.get_buffer("teacher_digest") != 0
    other = build("deit", "test_resnet")
    other.load_state_dict(method.state_dict())
    other.before_step(progress_at(1))
    another = build("deit", "test_resnet")
    another.load_state_dict(method.state_dict())
    another.get_buffer("teacher_digest").add_(1)
    with pytest.raises(ConfigError, match="other weights than the teacher that this run began"):
        another.before_step(progress_at(1))
