"""Progress: a bar on a terminal that has a size, plain lines anywhere else."""

import fcntl
import io
import math
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from headrace.pipelines.compiling import told_of_compiling
from headrace.shards.progress import progress_bar
from headrace.training.run import journal

PROGRAM = """
from headrace.shards import progress
progress.SECONDS_BETWEEN_LINES = 0.0
with progress.progress_bar("packing", 3, done=1) as bar:
    bar.update()
    bar.update()
with progress.progress_bar("silent", 3, shown=False) as bar:
    bar.update()
with progress.progress_bar("soon over", 3, after_seconds=60) as bar:
    bar.update()
"""


def on_pty(rows: int, columns: int) -> str:
    """What the program writes to a terminal of this size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        text = b""
        try:
            while chunk := os.read(ours, 4096):
                text += chunk
        except OSError:  # how Linux tells that the other side is closed
            pass
        os.close(ours)
    assert process.returncode == 0
    return text.decode()


def lines_of(text: str) -> list[str]:
    assert "\r" not in text.replace("\r\n", "\n")
    return text.replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize("where", ["pipe", "terminal without columns", "terminal without rows"])
def test_who_has_no_terminal_gets_lines(where: str) -> None:
    if where == "pipe":
        command = [sys.executable, "-c", PROGRAM]
        text = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr
    else:
        text = on_pty(24, 0) if where.endswith("columns") else on_pty(0, 80)
    lines = lines_of(text)
    heads = dict.fromkeys(line.partition(" [")[0] for line in lines)
    assert list(heads) == [f"packing: {done}/3 images" for done in (1, 2, 3)]
    assert lines[-1].startswith("packing: 3/3 images [")
    assert " images/s]" in lines[-1]
    assert "silent" not in text
    assert "soon over" not in text


def test_a_terminal_gets_a_bar() -> None:
    text = on_pty(24, 80)
    assert "\rpacking: 100%" in text.replace("\r\n", "\n")
    assert "3/3 [" in text
    assert "silent" not in text


def test_a_rate_below_one_in_a_second_reads_well() -> None:
    with progress_bar("slowly", 10, shown=False) as bar:
        shown = bar.format_meter(2, 10, 8.0, unit=" images")
    assert "4.00 s/images]" in shown


class Board:
    def add_scalar(self, *values: object) -> None:
        pass


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 3), (math.inf, 0)])
def test_in_a_terminal_a_line_stays_now_and_then(
    seconds: float,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_KEPT_LINES", seconds)
    with progress_bar(None, 9, unit="steps", shown=False) as bar:
        written = journal.MainJournal(io.StringIO(), Board(), bar, start=0, total_steps=9)  # pyright: ignore[reportArgumentType]
        for step in (3, 6, 9):
            values = {"epoch": 1.0, "loss": 2.0, "images_per_second": 5.0, "wait_share": 0.1}
            written.record({"step": step, **values}, {})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    assert all(line.startswith("step ") and line.endswith(" left") for line in said)


@pytest.mark.parametrize("name", ["render", "draw"])
def test_compiling_the_engine_is_said_once_and_small_functions_are_not(name: str) -> None:
    numba = pytest.importorskip("numba")

    def add(x: int) -> int:
        return x + 1

    add.__name__, add.__module__ = name, "headrace.pipelines.engines.fused.render"
    said: list[str] = []
    with told_of_compiling(said.append):
        compiled = numba.njit(add)
        assert compiled(1) == compiled(1) == 2
    assert [line.partition(" ")[0] for line in said] == (
        ["compiling", "compiled"] if name == "render" else []
    )
