"""Distillation: its losses against transcriptions, and a teacher that looks in its own way."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from headrace.training.blocks.classifier_teacher import ClassifierTeacher, open_teacher
from headrace.training.method import Facts
from headrace.training.methods.deit import distillation_loss
from headrace.training.methods.distill import imitation_loss
from headrace.training.preset import ConfigError
from tests.objective_checks import Array, assert_same, differs, log_softmax, value_and_gradient
from tests.tiny_methods import CLASSES, batch_of, build, progress_at, sgd, tiny_teacher, train_step

FACTS = Facts(CLASSES, 64, (32,), 16, 4, 20)

# ---- DeiT: eq. 2 and 3; deit `losses.py`, DistillationLoss.forward: for 'soft' the kl_div of
# log_softmax(kd / T) and log_softmax(teacher / T), reduction='sum', times T * T, divided by
# outputs_kd.numel(); for 'hard' the cross_entropy of kd and teacher.argmax(1)


def soft_oracle(student: Array, teacher: Array, temperature: float, divisor: float) -> float:
    total = 0.0
    for own, theirs in zip(student, teacher, strict=True):
        own, theirs = log_softmax(own / temperature), log_softmax(theirs / temperature)
        for q, p in zip(own, theirs, strict=True):
            total += np.exp(p) * (p - q) * temperature * temperature
    return total / divisor


@pytest.mark.parametrize(("batch", "classes", "temperature"), [(3, 5, 1.0), (1, 7, 3.0), (4, 2, 2)])
def test_soft_distillation(batch: int, classes: int, temperature: float) -> None:
    random = np.random.default_rng(batch)
    student = random.uniform(-2, 2, (batch, classes))
    teacher = random.uniform(-2, 2, (batch, classes)).astype(np.float32).astype(np.float64)
    told = torch.tensor(teacher, dtype=torch.float32)

    def code(x: Tensor) -> Tensor:
        return distillation_loss(x, told, "soft", temperature)

    def paper(x: Tensor) -> Tensor:
        return distillation_loss(x, told, "soft", temperature, "batch")

    assert_same(code, lambda x: soft_oracle(x, teacher, temperature, batch * classes), student)
    assert_same(paper, lambda x: soft_oracle(x, teacher, temperature, batch), student)
    value, _ = value_and_gradient(code, student)
    # The easy mistakes: the other direction, no T^2, the paper's scale.
    assert differs(value, soft_oracle(teacher, student, temperature, batch * classes))
    if temperature != 1:
        assert differs(value, value / temperature**2)
    assert differs(value, soft_oracle(student, teacher, temperature, batch))


def test_hard_distillation() -> None:
    random = np.random.default_rng(0)
    student, teacher = random.uniform(-2, 2, (2, 4, 6))
    told = torch.tensor(teacher, dtype=torch.float32)

    def oracle(x: Array) -> float:
        pairs = zip(x, teacher, strict=True)
        return -float(np.mean([log_softmax(own)[theirs.argmax()] for own, theirs in pairs]))

    assert_same(lambda x: distillation_loss(x, told, "hard"), oracle, student)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_teacher_takes_no_gradient(kind: str) -> None:
    told = torch.randn(3, 4, requires_grad=True)
    student = torch.randn(3, 4, requires_grad=True)
    for loss in (distillation_loss(student, told, kind), imitation_loss(student, told, 2.0)):  # pyright: ignore[reportArgumentType]
        loss.backward()
    assert told.grad is None


# ---- SimCLR v2: eq. 2 of arXiv 2006.10029, L = -sum_x sum_y P_T(y|x; t) log P_S(y|x; t)


@pytest.mark.parametrize(("batch", "classes", "temperature"), [(3, 5, 1.0), (2, 4, 0.1), (1, 9, 4)])
def test_imitation(batch: int, classes: int, temperature: float) -> None:
    random = np.random.default_rng(classes)
    student = random.uniform(-0.5, 0.5, (batch, classes))
    teacher = random.uniform(-0.5, 0.5, (batch, classes)).astype(np.float32).astype(np.float64)

    def oracle(x: Array, teacher_temperature: float = temperature) -> float:
        total = 0.0
        for own, theirs in zip(x, teacher, strict=True):
            p = np.exp(log_softmax(theirs / teacher_temperature))
            total -= float((p * log_softmax(own / temperature)).sum())
        return total / batch

    told = torch.tensor(teacher, dtype=torch.float32)
    assert_same(lambda x: imitation_loss(x, told, temperature), oracle, student)
    if temperature != 1:
        assert differs(oracle(student), oracle(student, 1.0))


# ---- what the teacher sees


def test_a_teacher_sees_pictures_in_its_own_units() -> None:
    network = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    teacher = ClassifierTeacher(
        network,
        mean=(0.5, 0.4, 0.3),
        std=(0.5, 0.25, 0.2),
        pixels=32,
        student_mean=(0.1, 0.2, 0.3),
        student_std=(0.3, 0.2, 0.1),
    ).train()
    assert not network.training
    pictures = torch.rand(2, 3, 32, 32)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pictures - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    seen = teacher(normalised((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)))
    expected = network(normalised((0.5, 0.4, 0.3), (0.5, 0.25, 0.2)))
    torch.testing.assert_close(seen, expected.detach(), rtol=1e-4, atol=1e-5)
    assert not seen.requires_grad


def test_a_timm_teacher_has_its_own_mean_std_and_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=CLASSES)
    weights = tmp_path / "teacher.pth"
    # The same tensors under the names of another port of the network.
    renamed = {f"part.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": renamed}, weights)
    teacher = open_teacher("tf_efficientnet_lite0", weights, FACTS, "--objective.teacher")
    assert teacher.pixels == 224
    mean, std = torch.tensor(FACTS.mean), torch.tensor(FACTS.std)
    scale, shift = (buffer.flatten() for buffer in (teacher.scale, teacher.shift))
    torch.testing.assert_close(scale, std / 0.5)
    torch.testing.assert_close(shift, (mean - 0.5) / 0.5)
    for key, value in network.state_dict().items():
        assert torch.equal(teacher.network.state_dict()[key], value)


def test_a_run_is_a_teacher() -> None:
    teacher = open_teacher(str(tiny_teacher()), None, FACTS, "--init")
    batch = batch_of("distill")
    hits = teacher(batch.views[0]).argmax(1) == batch.labels
    assert hits.float().mean() > 0.6


@pytest.mark.parametrize(
    ("teacher", "weights", "facts", "message"),
    [
        ("runs/none", None, FACTS, "no such run"),
        ("resnet500", None, FACTS, "has no model 'resnet500'"),
        ("run", None, Facts(3, 64, (32,), 16, 4, 20), "knows 16 classes, and the data set has 3"),
        ("empty", None, FACTS, "holds no classifier.safetensors"),
        ("test_resnet", "nothing.pth", FACTS, "cannot be read as weights"),
        ("test_resnet", "wrong.safetensors", FACTS, "does not fit the teacher"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_words(
    teacher: str, weights: str | None, facts: Facts, message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    safetensors.torch.save_file({"fc.bias": torch.zeros(16)}, tmp_path / "wrong.safetensors")
    known = {"run": str(tiny_teacher()), "empty": str(tmp_path / "empty")}
    with pytest.raises(ConfigError, match=message):
        open_teacher(
            known.get(teacher, teacher), tmp_path / weights if weights else None, facts, "--init"
        )


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
