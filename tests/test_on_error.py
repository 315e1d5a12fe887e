"""--data.on-error: a run that meets a bad image, alone and on two ranks; real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headrace import training
from headrace.pipelines.faults import Fault
from headrace.shards.store import open_store
from headrace.training.run.faults import Faults
from headrace.training.world import World

TRAIN = Path(training.__file__).parent / "train.py"
SAMPLES = 33
BAD = "class_1/13.png"
OPTIONS = (
    "--method simclr --preset cifar --backbone test_resnet --data.batch-size 8 --run.steps 6 "
    "--run.log-every 1 --run.seed 3 --run.device cpu --data.engine reference "
    "--augmentation.view.random-resized-crop.size 16"
)


def write_pictures(folder: Path) -> Path:
    for sample in range(SAMPLES):
        random = np.random.default_rng(sample)
        path = folder / f"class_{sample % 2}" / f"{sample}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return folder


def cut(path: Path) -> bytes:
    """Half of a picture: its header is whole, so that only decoding shows it. Gives all of it."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


def run(data: Path, out: Path, ranks: int, *more: str) -> "subprocess.CompletedProcess[str]":
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, str(TRAIN), *OPTIONS.split(), *more]
    command += ["--data.train", str(data), "--run.out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, env=environment
    )


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses by step of a run that met nothing."""
    place = tmp_path_factory.mktemp("sound")
    done = run(write_pictures(place / "data"), place / "run", 1)
    assert done.returncode == 0, done.stderr
    return losses(place / "run")


RANKS = [1, pytest.param(2, marks=pytest.mark.dist)]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_run_stops_saved_at_a_bad_image_and_goes_on_when_it_is_repaired(
    tmp_path: Path, sound: dict[int, float], ranks: int
) -> None:
    data, out = write_pictures(tmp_path / "data"), tmp_path / "run"
    whole = cut(data / BAD)
    stopped = run(data, out, ranks)
    assert stopped.returncode != 0
    (sentence,) = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert f"'{BAD}'" in sentence
    if ranks == 1:  # torchrun has a report of its own
        assert "Traceback" not in stopped.stderr
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert f"saved at step {state['step']}:" in sentence
    assert losses(out).keys() == set(range(1, state["step"] + 1))

    (data / BAD).write_bytes(whole)
    went_on = run(data, out, ranks)
    assert went_on.returncode == 0, went_on.stderr
    assert losses(out) == pytest.approx(sound, rel=1e-5)
    if ranks == 1:
        assert losses(out) == sound


@pytest.mark.parametrize("ranks", RANKS)
def test_a_bad_image_is_skipped_and_listed(
    tmp_path: Path, sound: dict[int, float], ranks: int
) -> None:
    data, out = write_pictures(tmp_path / "data"), tmp_path / "run"
    cut(data / BAD)
    done = run(data, out, ranks, "--data.on-error", "skip", "--run.save-every", "3")
    assert done.returncode == 0, done.stderr
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert skipped
    assert {(line["name"], line["id"]) for line in skipped} == {(BAD, skipped[0]["id"])}
    assert skipped[0]["replaced_by"] != skipped[0]["id"]
    assert f"skipped, and listed in {out / 'skipped.jsonl'}: '{BAD}'" in done.stdout
    # Nothing else moves: until the first one, the losses are those of a run that met nothing.
    first = skipped[0]["step"]
    found = losses(out)
    assert len(found) == 6
    for step in range(1, first):
        assert found[step] == pytest.approx(sound[step], rel=1e-5)
    assert found[first] != pytest.approx(sound[first], rel=1e-5)


def test_a_bad_image_that_is_judged_by_stops_the_run_saved_or_is_left_out(tmp_path: Path) -> None:
    data, val = write_pictures(tmp_path / "data"), write_pictures(tmp_path / "val")
    out = tmp_path / "run"
    cut(val / BAD)
    options = ("--data.val", str(val), "--run.evaluate-every", "0.5")
    stopped = run(data, out, 1, *options)
    assert stopped.returncode == 2
    assert f"1 image(s) cannot be used: '{BAD}' of {val}" in stopped.stderr
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert f"saved at step {step}: repair" in stopped.stderr
    went_on = run(data, out, 1, *options, "--data.on-error", "skip")
    assert went_on.returncode == 0, went_on.stderr
    assert f"step {step} of 6 on 1 x cpu" in went_on.stdout
    assert f"1 image(s) cannot be used: '{BAD}' of {val}" in went_on.stdout
    # 32 of 33 images are judged: each share is a number of them.
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shares = [line["val_knn_top1"] for line in lines if "val_knn_top1" in line]
    assert len(shares) == 3
    assert all(share * 32 == pytest.approx(round(share * 32), abs=1e-6) for share in shares)


def test_a_repaired_file_alone_may_change(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    whole = cut(data / BAD)
    store = open_store(data)
    faults = Faults(store)
    bad = store.names(np.arange(len(store))).index(BAD)
    assert not list(faults.met({5: [Fault(bad, 0, 3, "cut")]}, tmp_path, World(), skipped=False))

    def accepted() -> bool:
        """Whether a checkpoint of the store before is one of the store now."""
        fingerprint = {"store": store.fingerprint}
        before = {"fingerprint": {"stream": fingerprint}, "loader": {"fingerprint": fingerprint}}
        now = open_store(data)
        Faults(now, faults.known).accept_repairs(before)
        return before["fingerprint"]["stream"]["store"] == now.fingerprint

    assert accepted()
    (data / BAD).write_bytes(whole)
    assert open_store(data).fingerprint != store.fingerprint
    assert accepted()
    Image.new("RGB", (20, 20)).save(data / "class_0" / "2.png")
    assert not accepted()
