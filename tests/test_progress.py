"""Progress: a bar on a terminal that has a size, plain lines anywhere else."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

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
