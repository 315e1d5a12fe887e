"""A place that one process at a time may write: held until that process ends, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from headrace.shards.errors import UserError

_HOLDER_SUFFIX = "-holder"  # a file of its own: on Windows nobody else reads what is locked


class HeldError(UserError):
    """Another process holds the lock. holder: its id, or "unknown"."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by process {holder}")
        self.holder = holder


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock file `path` inside; it stays there afterwards, and means nothing then.

    Raises HeldError at once where another process holds it, OSError where it cannot be written.
    """
    holder = path.with_name(path.name + _HOLDER_SUFFIX)
    lock = FileLock(path, timeout=0, mode=0o666)
    try:
        lock.acquire()
    except Timeout as error:
        raise HeldError(path, _read(holder)) from error
    try:
        holder.write_text(f"{os.getpid()}\n", encoding="ascii")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read(holder: Path) -> str:
    try:
        return holder.read_text(encoding="ascii").strip() or "unknown"
    except OSError:
        return "unknown"
