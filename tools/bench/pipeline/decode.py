"""The ceiling above all rows of `bench_pipeline.py`: decoding the same files and nothing else.

libjpeg-turbo with the fused engine's settings (accurate DCT and upsampling), into a buffer that is
used again. Threads, queue and batches are as there, so that the difference is the rest of a
pipeline.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from io import BytesIO
from queue import SimpleQueue

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from headrace.shards.store import open_store
from headrace.tools.bench.pipeline.task import Contender, Task, Views

BATCHES_IN_FLIGHT = 2


class _Latch:
    """Opens when as many pictures are decoded as a batch has."""

    def __init__(self, pictures: int) -> None:
        self.opened = threading.Event()
        self._left = pictures
        self._lock = threading.Lock()

    def count_down(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self.opened.set()


def open_contender(task: Task) -> Contender:
    """The row `decode`."""
    store = open_store(task.store)
    pictures: SimpleQueue[tuple[NDArray[np.uint8], _Latch] | None] = SimpleQueue()
    longest = 3 * int(store.sizes(np.arange(task.samples)).prod(axis=1).max())
    failures: list[Exception] = []

    def work() -> None:
        buffer = np.empty(longest, np.uint8)
        while (taken := pictures.get()) is not None:
            encoded, latch = taken
            try:
                _decode(encoded, buffer)
            except Exception as error:  # raised where the batch is awaited
                failures.append(error)
            latch.count_down()

    def batches() -> Iterator[Views]:
        generator = np.random.default_rng(0)
        pending: deque[_Latch] = deque()
        epochs = (generator.permutation(task.samples) for _ in itertools.count())
        for ids in itertools.chain.from_iterable(
            epoch.reshape(-1, task.batch_size) for epoch in epochs
        ):
            latch = _Latch(len(ids))
            for encoded in store.read(ids):
                pictures.put((encoded, latch))
            pending.append(latch)
            if len(pending) == BATCHES_IN_FLIGHT:
                pending.popleft().opened.wait()
                if failures:
                    raise failures[0]
                yield (range(task.batch_size),)

    threads = [
        threading.Thread(target=work, name="decode", daemon=True) for _ in range(task.threads)
    ]
    for thread in threads:
        thread.start()

    def close() -> None:
        for _ in threads:
            pictures.put(None)
        for thread in threads:
            thread.join()

    return Contender(batches(), BATCHES_IN_FLIGHT, close)


def _decode(encoded: NDArray[np.uint8], buffer: NDArray[np.uint8]) -> None:
    if encoded[0] == 0xFF:
        try:
            simplejpeg.decode_jpeg(encoded, buffer=buffer)
            return
        except ValueError:
            pass  # damaged, or CMYK: Pillow decides, as in the engines
    with Image.open(BytesIO(encoded.data)) as file:
        file.convert("RGB")
