"""Sample data: deterministic crops, nothing fetched twice, and words where nothing can be had."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

TOOL = Path(__file__).resolve().parent.parent / "tools" / "sample_data.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_data", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photograph(seed: int, detailed: bool = True) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (900, 1200, 3), np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels) if detailed else Image.new("RGB", (1200, 900), (seed, 0, 0))
    image.save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def test_crops_are_distinct_and_deterministic(tool: ModuleType, tmp_path: Path) -> None:
    photographs = {"b": photograph(1), "a": photograph(2), "sky": photograph(3, detailed=False)}
    for name in ("one", "two"):
        tool.make_photos(photographs, tmp_path / name, count=24, seed=3)
    paths = sorted(p.relative_to(tmp_path / "one") for p in tmp_path.glob("one/*/*/*.jpg"))
    data = [(tmp_path / "one" / path).read_bytes() for path in paths]
    assert data == [(tmp_path / "two" / path).read_bytes() for path in paths]
    assert len(set(data)) == 24
    assert {Image.open(io.BytesIO(jpeg)).size for jpeg in data} == {(500, 375)}
    # The smooth one gives nothing, the others make up for it; every eleventh goes to val.
    assert {path.parts[1] for path in paths} == {"a", "b"}
    assert sum(path.parts[0] == "val" for path in paths) == 2
    tool.make_photos(photographs, tmp_path / "other", count=24, seed=4)
    assert (tmp_path / "other" / paths[0]).read_bytes() != data[0]


def test_smooth_photographs_alone_are_an_error(tool: ModuleType, tmp_path: Path) -> None:
    photographs = {"sky": photograph(3, detailed=False)}
    with pytest.raises(tool.SampleDataError, match="gave 0 detailed crops of 11"):
        tool.make_photos(photographs, tmp_path, count=11, seed=0)


def run(*arguments: object, path: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={"PATH": path}
    )


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    for name in ("train.npz", "test.npz"):
        (tmp_path / name).write_bytes(b"")
    result = run("cifar10", "--out", tmp_path, "--cache", tmp_path / "cache")
    assert (result.returncode, "already" in result.stdout) == (0, True)


def test_words_instead_of_tracebacks(tmp_path: Path) -> None:
    result = run("photos", "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert result.returncode == 2
    assert result.stderr == "error: photos need apt-get: run this on Debian or Ubuntu\n"
    result = run("photos", "--out", tmp_path, "--cache", tmp_path / "cache")
    assert "is not empty; choose another --out" in result.stderr
    assert run("photos", "--out", tmp_path, "--count", 3).returncode == 2
