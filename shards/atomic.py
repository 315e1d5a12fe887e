"""Files that appear whole or not at all.

Every file of a data set is written under a temporary name in its own directory, flushed to the
device and renamed. Whoever opens the final name therefore never meets a half-written file, also
after a `kill -9` or a power cut; what such an end leaves behind is a `.partial` file that nobody
reads.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

PARTIAL_SUFFIX = ".partial"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new binary file that becomes `path` when the block ends without an exception.

    The temporary name is `.<name>.<pid>-<random>.partial`, so that several processes may write the
    same path at once; the last rename wins. An exception removes the temporary file and passes on
    (a full disk is an `OSError`).
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        with partial.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable. Not on Windows, which opens no directories."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class HashedFile:
    """A write-only front of a binary file that counts and hashes what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = sha256()
        self.bytes_written = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`; returns its length in bytes."""
        self._hash.update(data)
        self._file.write(data)
        self.bytes_written += len(data)
        return len(data)

    @property
    def sha256(self) -> str:
        """Hash (hex) of everything written so far."""
        return self._hash.hexdigest()
