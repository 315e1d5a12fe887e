"""How far something is: a bar where somebody watches, plain lines now and then elsewhere."""

import os
import sys
from typing import Any, TextIO

from tqdm import tqdm
from typing_extensions import override

SECONDS_BETWEEN_LINES = 30.0


def say(text: str) -> None:
    """A line on stdout that stays, above a bar where there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class ProgressBar(tqdm):
    """No monitor thread: it would outlive the bar."""

    monitor_interval = 0

    @override
    @staticmethod
    def format_meter(*values: Any, **options: Any) -> str:
        """tqdm's, but for a rate below one in a second, which it writes as "1.07s/ images"."""
        return tqdm.format_meter(*values, **options).replace("s/ ", " s/")


class _Lines:
    """What tqdm draws over and over in one line, as lines below each other."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def on_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn there: some terminals say that they have no columns or no rows."""
    try:
        return stream.isatty() and min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return False


def progress_bar(
    what: str | None,
    total: int,
    *,
    done: int = 0,
    unit: str = "images",
    after_seconds: float = 0.0,
    shown: bool = True,
) -> "tqdm[Any]":
    """On stderr, with rate and remaining time: `update(n)` counts on; a context manager.

    unit: "B" counts bytes. done: how many were there before, which are not in the rate.
    after_seconds: what ends sooner shows nothing. shown: False for a bar that is never drawn.
    """
    watched = on_terminal(sys.stderr)
    return ProgressBar(
        desc=what,
        total=total,
        initial=done,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        delay=after_seconds,
        disable=not shown,
        file=sys.stderr if watched else _Lines(sys.stderr),
        dynamic_ncols=watched,
        bar_format=None
        if watched
        else "{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        mininterval=0.1 if watched else SECONDS_BETWEEN_LINES,
        miniters=1,
    )
