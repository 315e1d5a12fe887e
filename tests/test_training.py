"""Runs from beginning to end: resumed, refused, killed, failed. Tiny pictures, tiny networks."""

import fcntl
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from headrace import training
from headrace.pipelines.batch import Batch
from headrace.training.backbones import EncoderFactory, resolve_options
from headrace.training.collectives import from_main
from headrace.training.guard import Guard, Signals
from headrace.training.meters import Meters
from headrace.training.preset import ConfigError
from headrace.training.run import checkpoint
from headrace.training.run.directory import METRICS_FILE, CheckpointError, cut_back
from headrace.training.run.export import read_initial
from headrace.training.run.lock import locked
from headrace.training.world import World

TRAIN = Path(training.__file__).parent / "train.py"
SAMPLES = 48
TIMES = ("images_per_second", "wait_share", "seconds")

# A method as somebody else would write it. It has everything that a resume could lose: dropout
# from the global generator, batch norm, a teacher, a queue, randomness of its own.
OUTSIDE = '''
"""A test's method."""
import os
import signal
from dataclasses import dataclass, replace

import torch
from torch import nn

from headrace.pipelines import recipes
from headrace.training.preset import (Optim, Preset)
from headrace.training.method import Method


@dataclass(frozen=True)
class Objective:
    nan_step: int = -1
    signal_step: int = -1
    crash_step: int = -1
    slow_seconds: float = 0.0


class Toy(Method):
    def __init__(self, objective, make_encoder, facts):
        super().__init__()
        self.options = objective
        self.encoder = make_encoder()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(self.encoder.num_features, max(1, facts.num_classes))
        self.teacher = nn.Linear(self.encoder.num_features, 1).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("epochs_begun", torch.zeros((), dtype=torch.int64))

    def embed(self, batch, progress):
        return {"features": self.encoder(batch.views[0])}

    def objective(self, embeddings, batch, progress):
        logits = self.head(self.drop(embeddings["features"]))
        noise = torch.rand((), generator=progress.generator("noise"))
        loss = nn.functional.cross_entropy(logits, batch.labels) + 0.01 * noise
        if progress.step + 1 == self.options.nan_step:
            loss = loss * float("nan")
        return {"loss": loss, "noise": noise}

    def before_epoch(self, context, progress):
        self.epochs_begun += 1

    def before_step(self, progress):
        import time
        time.sleep(self.options.slow_seconds)
        marker = os.environ.get("HEADRACE_TEST_MARKER")
        if marker and not os.path.exists(marker):
            if progress.step + 1 == self.options.signal_step:
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGTERM)
            if progress.step + 1 == self.options.crash_step:
                open(marker, "w").close()
                raise KeyError("a crash in the middle")

    def after_step(self, embeddings, batches, progress):
        with torch.no_grad():
            self.teacher.weight.lerp_(self.head.weight[:1], 0.1)
            self.queue = torch.cat([self.queue[1:], embeddings[-1]["features"].mean()[None]])

    def evaluate(self, batch):
        nearest = self.head(self.encoder(batch.views[0])).argmax(1)
        return {"top1": nearest == batch.labels, "seen": torch.ones(len(batch))}


PRESETS = {
    "cifar": Preset(
        backbone="test_resnet",
        augmentation=recipes.supervised(32),
        test=recipes.center(32, 32),
        optim=Optim(name="adamw", learning_rate=0.05, warmup_epochs=0.5, clip_norm=1.0),
        batch_size=8,
        epochs=2,
        objective=Objective(),
    )
}


def build(objective, make_encoder, facts):
    return Toy(objective, make_encoder, facts)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 48 small pictures in four classes, and a method."""
    directory = tmp_path_factory.mktemp("training")
    generator = np.random.default_rng(0)
    for sample in range(SAMPLES):
        folder = directory / "data" / f"class_{sample % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{sample}.png")
    (directory / "outside").mkdir()
    (directory / "outside" / "toy.py").write_text(OUTSIDE)
    return directory


@pytest.fixture(scope="module")
def main() -> Callable[..., int]:
    """train.py's `main`, which nothing may import."""
    return runpy.run_path(str(TRAIN), run_name="train_under_test")["main"]


Run = Callable[..., int]


@pytest.fixture
def run(
    place: Path,
    main: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Run]:
    """run(out, "options") in this process, with the method above; returns the exit code."""
    monkeypatch.syspath_prepend(place)

    def call(out: Path, options: str = "", method: str = "outside.toy") -> int:
        line = f"--method {method} --data.train {place / 'data'} --run.out {out} {options}"
        return main(line.split())

    state = torch.random.get_rng_state()
    yield call
    torch.random.set_rng_state(state)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def untimed(out: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in TIMES} for line in lines(out)
    ]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same(one: object, other: object, where: str = "") -> None:
    """Equal to the last bit, through nested containers."""
    match one, other:
        case torch.Tensor(), torch.Tensor():
            assert torch.equal(one, other), where
        case dict(), dict():
            assert one.keys() == other.keys(), where
            for key in one:
                assert_same(one[key], other[key], f"{where}.{key}")
        case list() | tuple(), list() | tuple():
            assert len(one) == len(other), where
            for index, (a, b) in enumerate(zip(one, other, strict=True)):
                assert_same(a, b, f"{where}[{index}]")
        case _:
            assert one == other, where


# -------------------------------------------------------------------------------------- whole runs

OPTIONS = "--run.steps 11 --run.log-every 3 --run.save-every 4 --run.accumulate 2"
"""6 steps in an epoch: stops fall inside log intervals, inside epochs and at their ends."""


@pytest.fixture(scope="module")
def whole(place: Path, main: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, with a hold-out."""
    out = tmp_path_factory.mktemp("whole") / "run"
    sys.path.insert(0, str(place))
    try:
        line = f"--method outside.toy --data.train {place / 'data'} --run.out {out} {OPTIONS}"
        assert main(f"{line} --data.holdout 0.2".split()) == 0
    finally:
        sys.path.remove(str(place))
    return out


def test_metrics_hold_what_is_promised(whole: Path) -> None:
    found = lines(whole)
    # 39 of 48 samples are trained on: 4 steps of 8 in an epoch.
    assert [line["step"] for line in found] == [3, 4, 6, 8, 9, 11]
    for line in found:
        assert line["epoch"] == line["step"] / 4
        assert line["images_per_second"] > 0
        assert 0 <= line["wait_share"] <= 1
        assert line["loss"] > 0
        assert {"learning_rate", "weight_decay", "seconds", "gradient_norm", "noise"} <= {*line}
    assert found[-1]["seconds"] > found[0]["seconds"]
    evaluated = [line for line in found if "holdout_top1" in line]
    assert [line["step"] for line in evaluated] == [4, 8, 11]
    assert all(line["holdout_seen"] == 1 for line in evaluated)
    assert all(round(line["holdout_top1"] * 9, 9) % 1 == 0 for line in evaluated)


def test_the_configuration_is_recorded(whole: Path, place: Path) -> None:
    recorded = json.loads((whole / "config.json").read_text())
    assert recorded["config"]["method"] == "outside.toy"
    assert recorded["config"]["data"]["train"] == str(place / "data")
    assert recorded["config"]["data"]["batch_size"] == 8
    assert recorded["derived"]["learning_rate"] == pytest.approx(0.05 * 8 / 256)
    assert recorded["derived"]["steps"] == 11
    assert recorded["derived"]["world_size"] == 1
    assert recorded["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "timm", "numpy", "headrace"} <= recorded["versions"].keys()
    assert recorded["fingerprint"]["stream"]["engine"]["name"] == "fused"
    assert "--method" in recorded["command"] or recorded["command"]
    (events,) = (whole / "tensorboard").iterdir()
    assert b"config.json" in events.read_bytes()


def test_timm_reads_the_encoder(whole: Path) -> None:
    options = json.loads((whole / "config.json").read_text())["config"]["backbone_options"]
    encoder = timm.create_model(
        "test_resnet",
        num_classes=0,
        checkpoint_path=str(whole / "encoder.safetensors"),
        **options,
    )
    trained = load(whole / "checkpoint.pt")["method"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, trained[f"encoder.{name}"]), name


def test_a_finished_run_says_so(whole: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert run(whole, f"{OPTIONS} --data.holdout 0.2") == 0
    assert f"finished: {whole} is at step 11 of 11" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ("--optim.learning-rate 0.1", "optim.learning_rate was 0.05 and is 0.1"),
        ("--run.seed 5", "seed was 0 and is 5"),
        ("--data.batch-size 16", "batch_size was 8 and is 16"),
        ("--augmentation.view.flip.probability 0.1", "probability was 0.5 and is 0.1"),
        ("--run.resume never", "--run.resume is never"),
    ],
)
def test_another_configuration_is_refused(
    whole: Path, run: Run, options: str, difference: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        run(whole, f"{OPTIONS} --data.holdout 0.2 {options}")
    assert difference in str(caught.value)
    assert "choose another --run.out" in str(caught.value)


@pytest.mark.parametrize(
    ("how", "step"),
    [
        ("signal", 5),
        ("crash", 7),
        pytest.param("signal", 1, marks=pytest.mark.slow),
        pytest.param("signal", 4, marks=pytest.mark.slow),
        pytest.param("signal", 10, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_run_never_stopped(
    how: str,
    step: int,
    whole: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HEADRACE_TEST_MARKER", str(tmp_path / "stopped"))
    out = tmp_path / "run"
    # The option that stops the run is part of its fingerprint, so both parts have it.
    options = f"{OPTIONS} --data.holdout 0.2 --objective.{how}-step {step}"
    if how == "signal":
        assert run(out, options) == 128 + signal.SIGTERM
        assert f"goes on at step {step}" in capsys.readouterr().out
        assert load(out / "checkpoint.pt")["step"] == step
    else:
        with pytest.raises(KeyError, match="a crash in the middle"):
            run(out, options)
        assert load(out / "checkpoint.pt")["step"] == 4
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "lo')  # half a line, as a kill leaves it
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(out, options) == 0
    assert untimed(out) == untimed(whole)
    one, other = load(out / "checkpoint.pt"), load(whole / "checkpoint.pt")
    for part in ("method", "optimizer", "loader", "step"):
        assert_same(one[part], other[part], part)
    encoders = [(path / "encoder.safetensors").read_bytes() for path in (out, whole)]
    assert encoders[0] == encoders[1]


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "lars"))],
)
def test_a_loss_that_is_not_finite_changes_nothing(
    optimizer: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = (
        f"--optim.name {optimizer} --objective.nan-step 3 --run.steps 9 --run.save-every 2 "
        f"--run.log-every 5 --run.accumulate 2"
    )
    assert run(out, options) == 1
    message = capsys.readouterr().err
    failed, saved = load(out / "failed-step-3.pt"), load(out / "checkpoint.pt")
    assert failed["step"] == saved["step"] == 2
    assert_same(failed["method"], saved["method"])
    assert_same(failed["optimizer"]["state"], saved["optimizer"]["state"])
    assert "not finite at step 3" in message
    assert list(failed["ids"]) == [3]
    assert len(set(failed["ids"][3])) == 8
    assert ", ".join(map(str, failed["ids"][3])) in message


def test_an_absurd_learning_rate_ends_in_words(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--optim.learning-rate 1e30 --optim.warmup-epochs 0 --run.steps 9 --optim.name sgd"
    assert run(tmp_path / "run", f"{options} --data.batch-size 16") == 1
    assert "is not finite at step 2" in capsys.readouterr().err


def test_a_run_starts_from_the_encoder_of_another(
    whole: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    frozen = "--optim.learning-rate 0 --run.steps 1 --optim.weight-decay 0"
    assert run(out, f"--init {whole} {frozen}") == 0
    old, new = read_initial(whole), read_initial(out)
    for name in old:
        if "running" not in name and "batches" not in name:
            assert torch.equal(old[name], new[name]), name
    with pytest.raises(ConfigError, match="do not fit backbone 'test_resnet'"):
        run(tmp_path / "other", f"--init {whole} {frozen} --backbone-options stem_width=8")
    with pytest.raises(ConfigError, match=r"there is no .*encoder\.safetensors"):
        run(tmp_path / "third", f"--init {tmp_path} {frozen}")


def test_a_subset_is_all_that_is_trained_on(run: Run, place: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{sample}.png\n" for sample in range(8)))
    out = tmp_path / "run"
    assert run(out, f"--data.subset {listed} --run.epochs 3") == 0
    assert lines(out)[-1]["step"] == 3


def test_the_seed_fixes_the_weights_and_another_one_changes_them(run: Run, tmp_path: Path) -> None:
    files = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        assert run(tmp_path / name, f"--run.steps 1 --run.seed {seed}") == 0
        files.append((tmp_path / name / "encoder.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


# ------------------------------------------------------------------------------------ its directory


def test_a_directory_has_one_writer(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with locked(out), pytest.raises(CheckpointError) as caught:
        run(out, "--run.steps 1")
    assert f"being written by process {os.getpid()}" in str(caught.value)
    assert run(out, "--run.steps 1") == 0


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".checkpoint.pt.123-abc.partial"
    leftover.write_bytes(b"half")
    with locked(tmp_path):
        assert not leftover.exists()
        with (tmp_path / "lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_broken_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read"):
        checkpoint.load(tmp_path, torch.device("cpu"))


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": -1}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of format"):
        checkpoint.load(tmp_path, torch.device("cpu"))


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\nnoise\n{"step": 3}\n{"st')
    cut_back(tmp_path / METRICS_FILE, 2)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


# ------------------------------------------------------------------------------------------ parts


def test_the_guard_undoes_everything_but_what_the_optimiser_did() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(2, 2)
            self.teacher = nn.Linear(2, 2).requires_grad_(False)
            self.queue: torch.Tensor
            self.pointer: torch.Tensor
            self.register_buffer("queue", torch.zeros(2))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    parts = Parts()
    optimizer = torch.optim.SGD(parts.student.parameters(), lr=1.0, fused=True)
    guard = Guard(parts, optimizer, World(), Signals())
    ids = Batch((), torch.zeros(2), torch.tensor([4, 7]), (), 0, 0)

    def step(number: int, loss: float) -> None:
        guard.begin()
        for parameter in parts.student.parameters():
            parameter.grad = torch.ones_like(parameter)
        guard.check([torch.tensor(loss)])
        optimizer.step()
        with torch.no_grad():
            parts.teacher.weight.add_(1)
            parts.queue = torch.full((2,), loss)  # another tensor in its place
            parts.pointer = parts.pointer + 1
        guard.end(number, [ids])

    step(1, 0.5)
    assert guard.read().failed_step is None
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    assert before["queue"].tolist() == [0.5, 0.5]
    for number, loss in ((2, float("inf")), (3, 0.5)):  # blocked from then on
        step(number, loss)
        assert_same(parts.state_dict(), before)
    verdict = guard.read()
    assert verdict.failed_step == 2
    assert verdict.ids == {2: [4, 7], 3: [4, 7]}


def test_a_signal_reaches_the_verdict() -> None:
    module = nn.Linear(1, 1)
    signals = Signals()
    guard = Guard(module, torch.optim.SGD(module.parameters(), fused=True), World(), signals)
    stops = []
    for number in (1, 2):
        guard.begin()
        guard.check([torch.zeros(())])
        guard.end(number, [])
        stops.append(guard.read().stop)
        signals.received = signal.SIGTERM
    assert stops == [False, True]


def test_meters_give_means_and_continue_an_interval_exactly() -> None:
    def slow() -> Iterator[Batch]:
        while True:
            time.sleep(0.002)
            yield Batch((), torch.zeros(2), torch.tensor([4, 7]), (), 0, 0)

    def feed(meters: Meters, values: list[float]) -> None:
        for value, _ in zip(values, meters.timed(slow()), strict=False):
            meters.step([{"loss": torch.tensor(value)}, {"norm": torch.tensor(2 * value)}])

    values = [0.1, 0.7, 1e-3, 5.5]
    meters = Meters(World(), 8, None)
    feed(meters, values[:3])
    state = json.loads(json.dumps(meters.state_dict()))
    resumed = Meters(World(), 8, state)
    for each in (meters, resumed):
        feed(each, values[3:])
    whole, continued = meters.take(), resumed.take()
    expected = float(np.mean(np.array(values, np.float32).astype(np.float64)))
    assert whole["loss"] == pytest.approx(expected, rel=1e-8)
    assert whole["norm"] == pytest.approx(2 * expected, rel=1e-8)
    assert (continued["loss"], continued["norm"]) == (whole["loss"], whole["norm"])
    assert 0 < whole["wait_share"] <= 1
    assert whole["images_per_second"] > 0
    feed(meters, [3.0])
    assert meters.take()["loss"] == 3.0


def test_paused_time_is_not_training_time() -> None:
    meters = Meters(World(), 100, None)
    meters.step([{"loss": torch.ones(())}])
    with meters.paused():
        time.sleep(0.3)
    assert meters.take()["images_per_second"] > 100 / 0.3


def test_backbone_options_follow_the_views() -> None:
    assert resolve_options("test_resnet", {}, (32, 32, 16), 32) == {}
    assert resolve_options("test_vit", {"patch_size": 4}, (32,), 32) == {
        "patch_size": 4,
        "img_size": 32,
    }
    several = resolve_options("test_vit", {"patch_size": 4}, (32, 16), 32)
    assert several["dynamic_img_size"] is True
    encoder = EncoderFactory("test_vit", several)()
    with torch.no_grad():
        for side in (16, 32):
            assert encoder(torch.zeros(2, 3, side, side)).shape[0] == 2
    with pytest.raises(ConfigError, match="near it are resnet18"):
        resolve_options("resnte18", {}, (224,), 224)
    with pytest.raises(ConfigError, match="made for 224 pixels, cannot take views of 96"):
        resolve_options("mixer_s32_224", {}, (224, 96), 224)
    with pytest.raises(ConfigError, match="cannot build 'test_resnet' with width='wide'"):
        resolve_options("test_resnet", {"width": "wide"}, (32,), 32)


def test_an_error_of_rank_0_is_everybodys() -> None:
    def fails() -> None:
        raise ConfigError("told")

    with pytest.raises(ConfigError, match="told"):
        from_main(fails)


# -------------------------------------------------------------------------------------- processes


def launch(place: Path, out: Path, processes: int, options: str) -> subprocess.Popen[str]:
    """torchrun in a session of its own, so that nothing but its death reaches its workers."""
    torchrun = Path(sys.executable).with_name("torchrun")
    port = ["--standalone", "--nproc-per-node", str(processes)]
    line = f"--method outside.toy --data.train data --run.out {out} {options}"
    return subprocess.Popen(
        [str(torchrun), *port, str(TRAIN), *line.split()],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="a worker's end with its launcher is Linux'")
def test_kill_9_of_torchrun_ends_the_workers_and_the_run_can_go_on(
    place: Path, run: Run, tmp_path: Path
) -> None:
    options = "--run.steps 6 --run.log-every 1 --run.save-every 2 --data.holdout 0.2"
    slow = f"{options} --objective.slow-seconds 0.4"
    out, whole = tmp_path / "killed", tmp_path / "whole"
    launcher = launch(place, out, 2, slow)
    workers: list[int] = []
    try:
        wait_for(lambda: (out / "checkpoint.pt").exists(), 120, "a checkpoint")
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        workers = [int(child) for child in children.split()]
        assert len(workers) == 2
        with pytest.raises(CheckpointError, match="is being written by process") as told:
            run(out, slow)
        assert any(str(worker) in str(told.value) for worker in workers)
        launcher.kill()
        wait_for(lambda: not any(map(alive, workers)), 10, "the workers' end")
    finally:
        launcher.kill()
        launcher.communicate()
        for worker in workers:
            if alive(worker):
                os.kill(worker, signal.SIGKILL)
    assert lines(out)[-1]["step"] < 6
    for directory in (out, whole):
        resumed = launch(place, directory, 2, slow)
        said, _ = resumed.communicate(timeout=200)
        assert resumed.returncode == 0, said
    assert [line["step"] for line in lines(out)] == list(range(1, 7))
    assert untimed(out) == untimed(whole)
    assert_same(load(out / "checkpoint.pt")["method"], load(whole / "checkpoint.pt")["method"])
    assert all(line["holdout_seen"] == 1 for line in lines(out) if "holdout_seen" in line)


@pytest.mark.slow
def test_the_script_ends_with_a_sentence_and_an_exit_code(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(TRAIN), "--method", "dinno"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: --method dinno is unknown: did you mean dino?")
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
