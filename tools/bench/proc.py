"""What Linux says of processes: CPU time and memory, of a whole family of them, from /proc."""

import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_STATUS = re.compile(r"^Rss(Anon|Shmem|File):\s+(\d+) kB$", re.MULTILINE)
_ROLLUP = re.compile(r"^(Pss_Anon|Anonymous):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a family of processes, summed over its members.

    anonymous: of their own. shared: in shared memory, where worker processes leave their batches.
    mapped: pages of files, libraries as well as shards.
    """

    anonymous: int = 0
    shared: int = 0
    mapped: int = 0

    def largest(self, other: "Memory") -> "Memory":
        return Memory(
            max(self.anonymous, other.anonymous),
            max(self.shared, other.shared),
            max(self.mapped, other.mapped),
        )


def family(pid: int) -> list[int]:
    """The process and all its descendants that are there now."""
    members, unseen = [], [pid]
    while unseen:
        members.append(unseen.pop())
        for task in _tasks(members[-1]):
            unseen += map(int, _text(task / "children").split())
    return members


def memory(pid: int) -> Memory:
    """Of the process and its descendants; what vanishes meanwhile counts nothing."""
    sums = dict.fromkeys(("Anon", "Shmem", "File"), 0)
    for member in family(pid):
        for kind, kilobytes in _STATUS.findall(_text(PROC / str(member) / "status")):
            sums[kind] += int(kilobytes) << 10
    return Memory(sums["Anon"], sums["Shmem"], sums["File"])


def counted_twice(pid: int) -> int:
    """Anonymous bytes that `memory` counts more than once: pages that forks still share.

    Takes some 10 ms per process, in which it cannot map memory: not while time is measured.
    """
    sums = dict.fromkeys(("Pss_Anon", "Anonymous"), 0)
    members = family(pid)
    if len(members) == 1:
        return 0
    for member in members:
        for kind, kilobytes in _ROLLUP.findall(_text(PROC / str(member) / "smaps_rollup")):
            sums[kind] += int(kilobytes) << 10
    return max(0, sums["Anonymous"] - sums["Pss_Anon"])


def cpu_seconds() -> dict[str, float]:
    """CPU time of this process and its descendants so far, by part.

    A part is a kind of Python thread (its name without numbers), `native threads` for those that
    libraries started, `processes` for the descendants. Resolution: 10 ms each.
    """
    parts: dict[str, float] = {}
    left = time.process_time()
    for thread in threading.enumerate():
        seconds = _stat_seconds(PROC / "self" / "task" / str(thread.native_id) / "stat")
        name = re.sub(r"[-_ ]*\d+.*$", "", thread.name)
        parts[name] = parts.get(name, 0.0) + seconds
        left -= seconds
    parts["native threads"] = max(0.0, left)
    parts["processes"] = sum(
        _stat_seconds(PROC / str(pid) / "stat") for pid in family(os.getpid())[1:]
    )
    return parts


def _stat_seconds(path: Path) -> float:
    fields = _text(path).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND if fields else 0.0


def _tasks(pid: int) -> list[Path]:
    try:
        return list((PROC / str(pid) / "task").iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process or thread has ended
        return ""
