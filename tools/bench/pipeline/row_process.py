"""The parent's side of a row's process: start it, tell it what to do, watch its memory."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from headrace.tools.bench.pipeline.task import CannotExpress, Task
from headrace.tools.bench.proc import Memory, counted_twice, memory

SAMPLE_EVERY_SECONDS = 0.1
OPEN_WITHIN_SECONDS = 600.0  # compiling kernels for the first time is in it
ANSWER_WITHIN_SECONDS = 300.0  # beyond the time that was asked for
CLOSE_WITHIN_SECONDS = 10.0


class RowError(Exception):
    """A row stopped or never answered; says which, and what it said last."""


class RowProcess:
    """A row's process. peak: the largest memory seen so far, while it was opened and in rounds."""

    def __init__(self, task: Task, log: Path) -> None:
        self.task = task
        self.peak = Memory()
        self._twice = 0
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "headrace.tools.bench.pipeline.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(task),
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )

    def open(self) -> dict[str, Any]:
        """Open the row: {"import_seconds", "first_batch_seconds", "notes"}.

        Raises CannotExpress or RowError.
        """
        answer = self._ask(self.task.to_json(), OPEN_WITHIN_SECONDS)
        self._twice = counted_twice(self._process.pid)
        return answer

    def run(self, seconds: float) -> dict[str, Any]:
        """One round: {"images", "seconds", "cpu_seconds": {part: seconds}}."""
        return self._ask({"run": seconds}, seconds + ANSWER_WITHIN_SECONDS)

    def draw(self, seconds: float) -> float:
        """CPU seconds per image of drawing plans alone."""
        answer = self._ask({"draw": seconds}, seconds + ANSWER_WITHIN_SECONDS)
        return answer["plan_seconds_per_image"]

    def profile(self, seconds: float) -> float:
        """The interpreter's share of the CPU time."""
        answer = self._ask({"profile": seconds}, seconds + ANSWER_WITHIN_SECONDS)
        return answer["interpreter_share"]

    def epochs(self, count: int, within_seconds: float) -> list[int]:
        """Anonymous bytes after each of so many epochs."""
        return self._ask({"epochs": count}, within_seconds)["anonymous_bytes"]

    @property
    def peak_memory(self) -> Memory:
        """`peak`, with the pages that forked workers share with their parent counted once."""
        return Memory(self.peak.anonymous - self._twice, self.peak.shared, self.peak.mapped)

    def close(self) -> None:
        """End the process and whatever it started. May be repeated."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()
        try:
            self._process.wait(CLOSE_WITHIN_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: nobody else's processes
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, command: Mapping[str, Any], within_seconds: float) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RowError(f"{self.task.called}: its process has no pipes")
        try:
            stdin.write(json.dumps(command).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        line = b""
        deadline = time.monotonic() + within_seconds
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if selector.select(SAMPLE_EVERY_SECONDS):
                    read = os.read(stdout.fileno(), 1 << 16)
                    if not read:
                        raise self._ended()
                    line += read
                elif time.monotonic() > deadline:
                    raise RowError(
                        f"{self.task.called} did not answer within {within_seconds:.0f} s"
                    )
                else:
                    self.peak = self.peak.largest(memory(self._process.pid))
        answer = json.loads(line)
        if "cannot" in answer:
            raise CannotExpress(answer["cannot"])
        if "error" in answer:
            raise RowError(f"{self.task.called} failed: {answer['error']}")
        return answer

    def _ended(self) -> RowError:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        return RowError(f"{self.task.called}: its process ended{last}")


def _environment(task: Task) -> dict[str, str]:
    """Libraries that start threads start as many as the row may have."""
    threads = str(task.threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, threads)}
