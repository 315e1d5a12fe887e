"""A run that is given again with more steps or other weights: what goes on, what is refused."""

import inspect
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import training
from headrace.training.catalogue import find_method, method_names
from headrace.training.method import Method
from headrace.training.optim import Schedule
from headrace.training.preset import ConfigError, Optim
from headrace.training.run.directory import CheckpointError
from tests.handmade_runs import make_images

PACKAGE = Path(training.__file__).parent
Train = Callable[[str], int]


@pytest.fixture(scope="module")
def train() -> Train:
    main = runpy.run_path(str(PACKAGE / "train.py"), run_name="train_under_test")["main"]

    def call(options: str) -> int:
        with torch.random.fork_rng(devices=[]):
            return main(options.split())

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer") / "images"
    make_images(folder, 7, 0)
    return folder


def losses(run: Path) -> list[float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines]


def line(data: Path, out: Path, steps: int, more: str, method: str = "simclr") -> str:
    return (
        f"--method {method} --preset cifar --backbone test_resnet --data.train {data} "
        f"--run.out {out} --data.batch-size 8 --run.steps {steps} --run.log-every 1 "
        f"--data.engine reference {more}"
    )


def test_a_run_at_a_constant_rate_becomes_longer(data: Path, tmp_path: Path, train: Train) -> None:
    """Its losses are those of a run that was as long from the beginning."""
    constant = "--optim.schedule constant --optim.warmup-epochs 0"
    assert train(line(data, tmp_path / "run", 3, constant)) == 0
    assert train(line(data, tmp_path / "run", 7, constant)) == 0
    assert train(line(data, tmp_path / "whole", 7, constant)) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "run")) == 7


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("simclr", ""),
        ("simclr", "--optim.schedule stable_decay --optim.decay-epochs 1"),
        ("simclr", "--optim.schedule constant --optim.final-weight-decay 0.1"),
        ("byol", "--optim.schedule constant"),
    ],
)
def test_what_would_be_another_run_is_refused(
    method: str, more: str, data: Path, tmp_path: Path, train: Train
) -> None:
    """A cosine, a decay that is over, a weight decay that moves, a teacher that slows down."""
    assert train(line(data, tmp_path / "run", 3, more, method)) == 0
    with pytest.raises(CheckpointError, match=r"total_steps was 3 and is 7.* stable_decay before"):
        train(line(data, tmp_path / "run", 7, more, method))


def test_other_weights_to_begin_with_are_refused_on_a_resume(
    data: Path, tmp_path: Path, train: Train
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    begun = f"--init {first}"
    assert train(line(data, first, 2, "")) == 0
    assert train(line(data, second, 2, begun)) == 0
    assert train(line(data, second, 2, begun)) == 0
    assert train(line(data, second, 2, "")) == 0
    with pytest.raises(ConfigError, match=r"second began with --init .*first and goes on from its"):
        train(line(data, second, 2, f"--init {second / 'encoder.safetensors'}"))
    with pytest.raises(ConfigError, match="first began with weights of its own"):
        train(line(data, first, 2, f"--init {second}"))


@pytest.mark.parametrize(
    ("schedule", "done", "same"),
    [("constant", 9, True), ("stable_decay", 6, True), ("stable_decay", 8.5, False),
     ("cosine", 1, False), ("steps", 1, False)],
)  # fmt: skip
def test_rates_that_a_longer_run_would_have_had(schedule: Any, done: float, same: bool) -> None:
    """Said of a run of 10 epochs that becomes one of 20; the decay takes the last 2."""
    optim = Optim(
        warmup_epochs=1,
        schedule=schedule,
        decay_epochs=2 if schedule == "stable_decay" else 0,
        milestones=(0.5,) if schedule == "steps" else (),
    )
    short, long = Schedule(optim, 256, 10), Schedule(optim, 256, 20)
    assert long.is_same_until(done, 10) is same
    assert short.is_same_until(done, 20) is same
    if same:
        for epoch in (0, 0.5, 1, done / 2, done):
            rates = [
                run.learning_rate_at(epoch / length) for run, length in ((short, 10), (long, 20))
            ]
            assert rates[0] == pytest.approx(rates[1], rel=1e-9)


@pytest.mark.parametrize("name", method_names())
def test_methods_say_whether_they_look_at_the_length(name: str) -> None:
    """What looks at it mentions it: no block does in a method's place."""
    words = (".fraction", ".total_steps", ".total_epochs")
    source = (PACKAGE / "methods" / f"{name}.py").read_text()
    classes = [
        value
        for value in vars(__import__(find_method(name).build.__module__, fromlist=["x"])).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__.endswith(name)
    ]
    assert len(classes) == 1
    assert classes[0].depends_on_length == any(word in source for word in words)
    for block in (PACKAGE / "blocks").glob("*.py"):
        assert not any(word in block.read_text() for word in words), block
