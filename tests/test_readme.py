"""What the README tells a user to type, typed: from another directory, on real processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.slow


def run(directory: Path, *command: str) -> str:
    """Standard output of a command that must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data/cifar10/{train,test}: 320 + 40 pictures of ten colours in the noise."""
    directory = tmp_path_factory.mktemp("user")
    source = directory / "arrays"
    source.mkdir()
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (10, 1, 1, 3))
    for split, count in (("train", 320), ("test", 40)):
        labels = np.arange(count) % 10
        noise = random.integers(-40, 40, (count, 32, 32, 3))
        images = np.clip(colours[labels] + noise, 0, 255).astype(np.uint8)
        classes = np.array([f"colour {label}" for label in range(10)])
        np.savez(source / f"{split}.npz", images=images, labels=labels, classes=classes)
    tool = str(ROOT / "tools/make_shards.py")
    said = run(directory, sys.executable, tool, "arrays", "--out", "data/cifar10", "--workers", "1")
    assert "320 samples" in said
    return directory


def test_our_loader_in_a_users_loop(place: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (loop,) = [block for block in blocks if "open_loader" in block]
    check = "assert loader.state_dict()['epoch'] == 1 and torch.isfinite(loss)\nloader.close()\n"
    run(place, sys.executable, "-c", loop + check)


def test_the_commands_one_after_the_other(place: Path) -> None:
    """Shortest forms: the only data set under ./data, and a run directory named after both."""
    train = str(ROOT / "training/train.py")
    short = ["--method", "dino", "--run.steps", "2", "--run.log-every", "1"]
    said = run(place, "torchrun", "--standalone", "--nproc-per-node", "2", train, *short)
    assert "finished: runs/dino-cifar10 is at step 2 of 2" in said
    lines = (place / "runs/dino-cifar10/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert {"step", "loss", "images_per_second", "wait_share"} <= json.loads(lines[-1]).keys()

    script = str(ROOT / "training/evaluate.py")
    judged = ["--protocol", "knn", "--data.train", "data/cifar10", "--data.val", "data/cifar10"]
    run(place, sys.executable, script, "runs/dino-cifar10", *judged, "--json", "knn.json")
    result = json.loads((place / "knn.json").read_text())
    assert 0 <= result["results"]["20"]["top1"] <= 100
    assert result["val"]["samples"] == 40

    for tool, *arguments in (
        ("verify_shards.py", "data/cifar10"),
        ("plot_run.py", "runs/dino-cifar10"),
        ("show_batch.py", "--data", "data/cifar10", "--method", "dino", "--out", "views.png"),
    ):
        run(place, sys.executable, str(ROOT / "tools" / tool), *arguments)
    assert (place / "views.png").stat().st_size > 1000
    assert (place / "runs/dino-cifar10/curves.png").stat().st_size > 1000


def test_a_network_is_tuned_and_teaches_another(place: Path) -> None:
    """SimCLR v2's three runs, and DeiT with a run as its teacher."""
    (place / "some.txt").write_text("".join(f"{sample}\n" for sample in range(0, 40, 2)))
    for method, options in (
        ("simclr", "--run.accumulate 2 --run.gradient-cache"),
        ("supervised", "--init runs/simclr --data.subset some.txt"),
        ("distill", "--init runs/supervised"),
        ("deit", "--objective.teacher runs/supervised --augmentation.group 4"),
    ):
        line = f"--method {method} --preset cifar --run.out runs/{method} {options}"
        sizes = "--data.batch-size 8 --data.holdout 0 --run.steps 2 --backbone test_resnet"
        script = str(ROOT / "training/train.py")
        said = run(place, sys.executable, script, *line.split(), *sizes.split())
        assert f"finished: runs/{method} is at step 2 of 2" in said
        assert (method == "simclr") == ("batch norm normalises each micro-batch" in said)
        exported = {path.stem for path in (place / "runs" / method).glob("*.safetensors")}
        assert exported == ({"encoder"} if method == "simclr" else {"encoder", "classifier"})


def test_shell_scripts_explain_themselves_and_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    quickstart = str(ROOT / "tools/quickstart.sh")
    assert "--seed" in run(tmp_path, "bash", quickstart, "--help")
    wrong = subprocess.run(
        ["bash", quickstart, "--sed", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert "unknown option --sed" in wrong.stderr
    for script in ("quickstart.sh", "test.sh", "setup.sh"):
        run(tmp_path, "bash", "-n", str(ROOT / "tools" / script))


def test_the_readme_is_finished() -> None:
    assert not re.findall(r"^[A-Z_]{4,}$", README, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "script",
    [
        "tools/make_shards.py",
        "tools/make_masks.py",
        "tools/verify_shards.py",
        "tools/sample_data.py",
        "tools/show_batch.py",
        "tools/plot_run.py",
        "tools/show_reconstruction.py",
        "tools/bench_pipeline.py",
        "tools/bench_training.py",
        "tools/bench_methods.py",
        "tools/compare_engines.py",
        "tools/readme_tables.py",
        "training/train.py",
        "training/evaluate.py",
    ],
)
def test_help_has_examples(script: str, tmp_path: Path) -> None:
    assert Path(script).name in README
    said = run(tmp_path, sys.executable, str(ROOT / script), "--help")
    assert "example" in said
    assert said.count(Path(script).name) >= 2
