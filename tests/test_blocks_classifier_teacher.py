"""A teacher that looks in its own way, and where it comes from."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from headrace.training.blocks.classifier_teacher import ClassifierTeacher, open_teacher
from headrace.training.method import Facts
from headrace.training.preset import ConfigError
from tests.tiny_methods import CLASSES, batch_of, tiny_teacher

FACTS = Facts(CLASSES, 64, (32,), 16, 4, 20)


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
