"""Child processes of `bench_methods.py`, some side by side, driven by one loop without threads.

A job is a generator: it yields the command that it wants to be run, is sent what came of it, and
returns its result. Between commands jobs build networks from torch's global generator, which
threads would disturb.

Linux keeps a process's largest resident set itself, so that reading it now and then misses no peak
but one in the last moments. (What `os.wait4` tells is no less than this process had when it forked:
that of a small command would be ours.)
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from headrace.shards.lifetime import end_with_parent

POLL_SECONDS = 0.2
ENDING_SECONDS = 60.0  # for a run to write its checkpoint once it was asked to end
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Command:
    """A Python script with its arguments; `log` receives what it says, after what is there.

    called: for people.
    """

    called: str
    script: Path
    arguments: Sequence[str]
    log: Path
    threads: int


@dataclass(frozen=True)
class Ended:
    """code: as a shell sees it. said: the last line of its output. peak_memory_bytes: the largest
    resident set, libraries and mapped shards included; None where the system does not tell."""

    code: int
    said: str
    seconds: float
    peak_memory_bytes: int | None


Job = Generator[Command, Ended, Outcome]


class _Child:
    """A command under way."""

    def __init__(self, command: Command) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(command.threads)}
        self._log = command.log
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._began, self._peak = time.perf_counter(), 0
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(command.script), *command.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # A run whose measurement is gone saves its checkpoint and ends.
                preexec_fn=partial(end_with_parent, signal.SIGTERM),
            )

    def poll(self) -> Ended | None:
        """None while it runs."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            status = ""
        if peak := _PEAK.search(status):
            self._peak = max(self._peak, int(peak[1]) << 10)
        code = self.process.poll()
        if code is None:
            return None
        seconds = time.perf_counter() - self._began
        return Ended(code, self._last_line(), seconds, self._peak or None)

    def _last_line(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        return lines[-1].removeprefix("error: ") if lines else "it said nothing"


@dataclass
class _Active(Generic[Outcome]):
    job: Job[Outcome]
    child: _Child


def run_jobs(
    jobs: Mapping[str, Callable[[], Job[Outcome]]],
    waits_for: Mapping[str, Sequence[str]],
    side_by_side: int,
    begun: Callable[[str, Command], None],
    finished: Callable[[str, Outcome], None],
) -> None:
    """Every job, in order, so many at a time.

    jobs: by name. begun and finished are called with each command and each result. waits_for: names
    of those that must be over before a job starts. Whatever ends this early (Ctrl-C) ends the
    processes too: they are asked to, and have a minute for it.
    """
    pending, active = list(jobs), dict[str, _Active[Outcome]]()
    try:
        while pending or active:
            for name in list(pending):
                over = not {*pending, *active}.intersection(waits_for.get(name, ()))
                if len(active) < side_by_side and over:
                    pending.remove(name)
                    job = jobs[name]()
                    _proceed(name, job, None, active, begun, finished)
            for name, running in list(active.items()):
                if (ended := running.child.poll()) is not None:
                    del active[name]
                    _proceed(name, running.job, ended, active, begun, finished)
            if active:
                time.sleep(POLL_SECONDS)
    finally:
        processes = [running.child.process for running in active.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _proceed(
    name: str,
    job: Job[Outcome],
    ended: Ended | None,
    active: dict[str, _Active[Outcome]],
    begun: Callable[[str, Command], None],
    finished: Callable[[str, Outcome], None],
) -> None:
    """Send a job what came of its command, and start its next one."""
    try:
        command = next(job) if ended is None else job.send(ended)
    except StopIteration as stop:
        finished(name, stop.value)
        return
    begun(name, command)
    active[name] = _Active(job, _Child(command))
