"""The quickstart's options, its first words, and the row that it ends with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.tools.bench import quickstart
from headrace.training.run.record import read_record

SCRIPT = Path(__file__).resolve().parent.parent / "tools/quickstart.sh"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--sed", "1"), "unknown option --sed"),
        (("--seed", "one"), "--seed one is no whole number"),
        (("--epochs", "few"), "--epochs few is no number"),
        (("--seed",), "--seed wants a number"),
    ],
)
def test_options_are_refused_before_anything_is_installed(
    options: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    refused = subprocess.run(
        ["bash", str(SCRIPT), *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert sentence in refused.stderr
    assert "setup:" not in refused.stdout


def test_every_step_has_the_seed() -> None:
    """Each command of the script that draws anything, views and training."""
    lines = SCRIPT.read_text().replace("\\\n", " ").splitlines()
    drawing = [line for line in lines if "show_batch.py" in line or "training/train.py --m" in line]
    with_seed = [line for line in drawing if '"$SEED"' in line]
    assert len(with_seed) == 2
    # What judges and draws neighbours takes the run's own seed; the rest is what a reader may type.
    assert all(
        line.startswith(("  python", "Your own images"))
        for line in drawing
        if line not in with_seed
    )


def test_the_estimate_says_what_will_happen() -> None:
    """As a process of its own, to which nothing else has introduced the network."""
    module = [sys.executable, "-m", "headrace.tools.bench.quickstart"]
    said = subprocess.run(
        [*module, "estimate", "--epochs", "2"], capture_output=True, text=True, check=True
    ).stdout
    assert "without their labels (2 epochs of SimCLR)" in said
    assert "just measured on" in said
    assert quickstart._minutes(50.2) == "50 s"
    assert quickstart._minutes(150.0) == "2 min"


@pytest.fixture
def judged(run: Path) -> Path:
    for name, top1 in (("knn", 63.2), ("knn-untrained", 40.6), ("pixels", 45.5)):
        text = {"results": {"20": {"top1": top1, "top5": 90.0}}, "seconds": {"knn": 2.0, "a": 1.5}}
        (run / f"{name}.json").write_text(json.dumps(text))
    config = json.loads((run / "config.json").read_text())
    config["derived"]["epoch_steps"] = 3
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_a_row_of_a_run(judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (judged / "training-seconds").write_text("begun\n100.5 2.5 60.0\nbegun\n10 0 9.5\n")
    out = tmp_path / "row.json"
    pixels = ["--pixels", str(judged / "pixels.json")]
    assert quickstart.main(["result", str(judged), *pixels, "--json", str(out)]) == 0
    said = capsys.readouterr().out
    row: dict[str, Any] = json.loads(out.read_text())
    assert row["knn"] == {"pixels": 45.5, "untrained": 40.6, "trained": 63.2}
    assert (row["seed"], row["epochs"]) == (5, 10)
    assert row["samples"] == 30 * read_record(judged).batch_size
    assert (row["train_cpu_seconds"], row["train_seconds"]) == (113.0, 69.5)
    assert row["judge_seconds"] == {"pixels": 3.5, "untrained": 3.5, "trained": 3.5}
    assert row["images_per_second"] == pytest.approx(117.5)
    assert {"date", "machine", "versions"} <= row.keys()
    assert " 45.5 %  raw pixels" in said
    assert "113 CPU seconds" in said


def test_an_interrupted_training_has_no_sum(judged: Path, tmp_path: Path) -> None:
    assert quickstart.train_seconds(tmp_path / "none") == (None, None)
    (judged / "training-seconds").write_text("begun\nbegun\n10 0 9.5\n")
    assert quickstart.train_seconds(judged / "training-seconds") == (None, None)
    row = quickstart.result(judged, judged / "pixels.json")
    assert row["train_cpu_seconds"] is None
    assert "CPU seconds" not in quickstart.shown(row)


def test_a_run_without_judgement_is_refused(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert quickstart.main(["result", str(tmp_path), "--pixels", "p.json"]) == 2
    assert "is no run" in capsys.readouterr().err
