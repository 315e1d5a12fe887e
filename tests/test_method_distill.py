"""Distillation as SimCLR v2 has it: its loss against a float64 transcription."""

import numpy as np
import pytest
import torch

from headrace.training.methods.distill import imitation_loss
from tests.objective_checks import Array, assert_same, differs, log_softmax


@pytest.mark.parametrize(("batch", "classes", "temperature"), [(3, 5, 1.0), (2, 4, 0.1), (1, 9, 4)])
def test_imitation(batch: int, classes: int, temperature: float) -> None:
    random = np.random.default_rng(classes)
    student = random.uniform(-0.5, 0.5, (batch, classes))
    teacher = random.uniform(-0.5, 0.5, (batch, classes)).astype(np.float32).astype(np.float64)

    def oracle(x: Array, teacher_temperature: float = temperature) -> float:
        """Eq. 2 of arXiv 2006.10029: L = -sum_x sum_y P_T(y|x; t) log P_S(y|x; t)."""
        total = 0.0
        for student_row, teacher_row in zip(x, teacher, strict=True):
            p = np.exp(log_softmax(teacher_row / teacher_temperature))
            total -= float((p * log_softmax(student_row / temperature)).sum())
        return total / batch

    teacher_logits = torch.tensor(teacher, dtype=torch.float32)
    assert_same(lambda x: imitation_loss(x, teacher_logits, temperature), oracle, student)
    if temperature != 1:
        assert differs(oracle(student), oracle(student, 1.0))


def test_the_teacher_takes_no_gradient() -> None:
    teacher = torch.randn(3, 4, requires_grad=True)
    student = torch.randn(3, 4, requires_grad=True)
    imitation_loss(student, teacher, 2.0).backward()
    assert teacher.grad is None
    assert student.grad is not None
