"""macOS and Windows, simulated: what they lack is taken away. No test has run on either of them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headrace.training.world import WorldError, join

ROOT = Path(__file__).resolve().parent.parent
ABSENT = {
    "macOS": (
        "del os.sched_getaffinity, os.sched_setaffinity\n"
        "import ctypes, signal\n"
        "import headrace.shards.lifetime as lifetime\n"
        "lifetime._LIBC = None\n"
    ),
    "Windows": (
        "for name in ('fcntl', 'resource', 'termios', 'tty', 'pty', 'pwd', 'grp'):\n"
        "    sys.modules[name] = None\n"
        "for name in ('sched_getaffinity', 'sched_setaffinity', 'pread', 'pwrite', 'getuid',\n"
        "             'killpg', 'fork', 'O_DIRECTORY'):\n"
        "    delattr(os, name)\n"
        "import signal\n"
        "del signal.SIGKILL, signal.SIGHUP, signal.SIGALRM\n"
    ),
}
PROGRAM = """
import filelock, numba, timm, torch, tensorboard  # whatever these need of Linux, they may have
import torch.utils.tensorboard, concurrent.futures, multiprocessing.spawn, subprocess, shutil
import os, sys
{absent}
from headrace.tools import make_shards, verify_shards
photos, out = sys.argv[1:]
assert make_shards.main([photos, "--out", out + "/shards", "--workers", "1"]) == 0
assert verify_shards.main([out + "/shards", "--workers", "1"]) == 0
from headrace.training.train import main
line = "--method simclr --preset cifar --backbone test_resnet --data.batch-size 4 --run.steps 2"
run = f"{{line}} --data.engine reference --data.train {{out}}/shards --run.out {{out}}/run"
assert main(run.split()) == 0
"""


@pytest.mark.parametrize("system", ABSENT)
def test_packing_and_training_need_nothing_that_others_lack(system: str, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    program = PROGRAM.format(absent=ABSENT[system])
    ended = subprocess.run(
        [sys.executable, "-c", program, str(photos), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()


def test_apples_gpu_is_taken_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorldError, match="torch finds no GPU of Apple's"), join("mps"):
        pass
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with join("mps") as world:
        assert world.device == torch.device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(WorldError, match="has one process, and there are 2"), join("mps"):
        pass
