"""Bytes of samples without copying: shard files mapped into memory, read-only.

The page cache is the only cache, shared by all processes that read the same files. Files are
mapped when first touched. A mapping holds a file descriptor, so with more shards than the process
may have open files the least recently used mapping is let go; arrays already handed out keep
theirs alive.
"""

import mmap
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.shards.index import ShardError


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file as a read-only array backed by the page cache (empty file: empty)."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return np.frombuffer(b"", np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _mappings_at_most() -> int:
    try:
        import resource
    except ImportError:  # Windows, where a mapping needs no descriptor
        return 1 << 16
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 16 if soft_limit == resource.RLIM_INFINITY else max(soft_limit // 2, 8)


class MappedFiles:
    """Shard files of known size; safe to use from several threads."""

    def __init__(self, paths: tuple[Path, ...], sizes_bytes: tuple[int, ...]) -> None:
        self._paths = paths
        self._sizes_bytes = sizes_bytes
        self._lock = threading.Lock()
        self._mapped: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._mappings_at_most = _mappings_at_most()

    def read(self, shard: int, offset: int, length: int) -> NDArray[np.uint8]:
        """A read-only view uint8 [length]. `ShardError` if the file changed since it was opened."""
        mapped = self._map(shard)
        if offset + length > len(mapped):
            raise ShardError(
                f"{self._paths[shard]} has {len(mapped)} bytes, the index points to byte "
                f"{offset + length}: index and shard do not belong together"
            )
        return mapped[offset : offset + length]

    def _map(self, shard: int) -> NDArray[np.uint8]:
        with self._lock:
            mapped = self._mapped.get(shard)
            if mapped is None:
                path = self._paths[shard]
                try:
                    mapped = map_file(path)
                except OSError as error:
                    raise ShardError(f"{path} cannot be read any more ({error})") from error
                if len(mapped) != self._sizes_bytes[shard]:
                    raise ShardError(
                        f"{path} had {self._sizes_bytes[shard]} bytes when the data set was "
                        f"opened and has {len(mapped)} now: open the data set again"
                    )
                self._mapped[shard] = mapped
                if len(self._mapped) > self._mappings_at_most:
                    self._mapped.popitem(last=False)
            self._mapped.move_to_end(shard)
            return mapped
