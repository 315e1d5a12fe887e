"""What `pip install` gives someone who has no clone: built, installed and used in another place."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = ("headrace-shards", "headrace-train", "headrace-evaluate")

pytestmark = pytest.mark.slow


def run(directory: Path, *command: str | Path, code: int = 0) -> str:
    """What a command says, both streams. It knows no path but the ones that Python finds itself."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=directory,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of the tracked files alone, in a copy: a build leaves folders behind."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    copy = tmp_path_factory.mktemp("source")
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run(copy, *pip, "--wheel-dir", out, copy.as_uri())
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment that holds the wheel, and sees this one's other packages."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    python = place / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(place, *pip, wheel)
    # Only now, so that pip takes nothing there for installed. A folder that a .pth names is
    # searched, but its own .pth files, this checkout's among them, are not followed.
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python.parent


@pytest.fixture(scope="module")
def place(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory with data/cifar10/{train,test}, converted by the installed command."""
    directory = tmp_path_factory.mktemp("user")
    (directory / "arrays").mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 320), ("test", 40)):
        images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        classes = np.array([f"class {label}" for label in range(10)])
        labels = np.arange(count) % 10
        path = directory / "arrays" / f"{split}.npz"
        np.savez(path, images=images, labels=labels, classes=classes)
    convert = ["arrays", "--out", "data/cifar10", "--workers", "2"]
    assert "320 samples" in run(directory, binaries / "headrace-shards", *convert)
    return directory


def test_the_wheel_holds_one_package_and_all_that_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        said = archive.read(metadata).decode()
    tops = {Path(name).parts[0] for name in names}
    assert tops == {"headrace", Path(metadata).parts[0]}
    assert not [name for name in names if "/benchmarks/" in name or "/tests/" in name]
    for folder in ("shards", "pipelines", "training", "tools"):
        assert f"headrace/{folder}/py.typed" in names
        for path in (ROOT / folder).rglob("*.py"):
            assert f"headrace/{path.relative_to(ROOT).as_posix()}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in said
    assert re.search(r"^Requires-Dist: torch(?!=).*>=", said, flags=re.MULTILINE)


def test_the_three_commands_explain_themselves_under_their_own_names(
    binaries: Path, tmp_path: Path
) -> None:
    for command in COMMANDS:
        said = run(tmp_path, binaries / command, "--help")
        assert f"usage: {command}" in said or f"\n  {command}" in said
        assert said.count(command) >= 2, said
        assert not re.search(r"(training|tools)/\w+\.py", said), said
    said = run(tmp_path, binaries / "headrace-train", "--method", "simclr", "--help")
    assert "usage: headrace-train" in said
    for command, wrong in (
        ("headrace-shards", "usage: headrace-shards"),
        ("headrace-train", "error: --method is missing"),
        ("headrace-evaluate", "error: the following arguments are required: RUN"),
    ):
        assert wrong in run(tmp_path, binaries / command, code=2)


def test_what_is_imported_is_what_was_installed(binaries: Path, place: Path) -> None:
    """README's loop, in a folder that has a `shards` and a `training` of its own."""
    for name in ("shards", "training", "pipelines", "tools"):
        (place / name).mkdir(exist_ok=True)
        (place / name / "__init__.py").write_text(f"raise ImportError('the user\\'s own {name}')\n")
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (loop,) = [block for block in blocks if "open_loader" in block]
    check = """
import sys
assert torch.isfinite(loss)
loader.close()
print(*(module.__file__ for name, module in sys.modules.items()
        if name.startswith("headrace.")), sep="\\n")
"""
    said = run(place, binaries / "python", "-c", loop + check)
    files = [Path(line) for line in said.splitlines()]
    assert len(files) > 20
    assert not [path for path in files if not path.is_relative_to(binaries.parent)]


def test_from_images_to_an_accuracy_without_a_clone(binaries: Path, place: Path) -> None:
    options = "--method simclr --data.batch-size 32 --run.steps 2 --run.out runs/first"
    options += " --gpus 2 --run.device cpu"
    said = run(place, binaries / "headrace-train", *options.split())
    assert "finished: runs/first is at step 2 of 2" in said
    judged = ["--protocol", "knn", "--json", "knn.json"]
    data = ["--data.train", "data/cifar10", "--data.val", "data/cifar10"]
    run(place, binaries / "headrace-evaluate", "runs/first", *judged, *data)
    assert json.loads((place / "knn.json").read_text())["val"]["samples"] == 40
    assert (place / "runs/first/encoder.safetensors").is_file()
