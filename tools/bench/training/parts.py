"""What a run's input is made of, each part alone: for `bench_training.py`.

On the run's first samples, with its threads and its engine, while nobody trains. Decoding is the
engine itself with a recipe that leaves it little else to do; the copies to a CUDA device are
written, but have not been run on one yet.
"""

import math
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from glob import glob
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.pipelines.ops import RandomResizedCrop
from headrace.pipelines.recipe import Augmentation, View
from headrace.shards.manifest import MANIFEST_FILE
from headrace.shards.store import Store
from headrace.tools.bench.training.segment import device_of, fetched_bytes, settling_steps
from headrace.training.config import Config
from headrace.training.inputs import open_training_loader
from headrace.training.world import World

# Two views, so that no engine decodes only the part that it needs.
DECODING = Augmentation("decoding", (View("tiny", (RandomResizedCrop(8, (0.001, 0.002)),), 2),))
SAMPLES_ALONE = 1000  # or a little more, in whole batches; fewer where an epoch has fewer


def data_files(store: Store) -> list[Path]:
    """The files that samples are read from; for a pattern at least those."""
    path = Path(store.uri)
    if path.is_dir() and (path / MANIFEST_FILE).is_file():
        return [entry for entry in path.iterdir() if entry.suffix in (".tar", ".beton")]
    if path.is_dir():
        return [path / name for name in store.names(np.arange(len(store)))]
    return [path] if path.is_file() else [Path(f) for f in glob(re.sub(r"\{.*?\}", "*", str(path)))]


def forget(files: Sequence[Path]) -> bool:
    """Ask the kernel to drop files from the page cache: what is mapped by others stays there.

    False where it cannot be asked.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return True


def read_alone(store: Store, ids: NDArray[np.int64], threads: int) -> tuple[float, float | None]:
    """(images/s, share of the bytes that came from storage) of copying every byte once."""

    def copy(chunk: NDArray[np.int64]) -> int:
        total, room = 0, np.empty(0, np.uint8)
        for encoded in store.read(chunk):
            if room.size < encoded.size:
                room = np.empty(2 * encoded.size, np.uint8)
            np.copyto(room[: encoded.size], encoded)
            total += encoded.size
        return total

    before, started = fetched_bytes("self"), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(copy, np.array_split(ids, 8 * threads)))
    seconds, after = time.perf_counter() - started, fetched_bytes("self")
    share = None if before is None or after is None else min(1.0, (after - before) / total)
    return len(ids) / seconds, share


def first_samples(
    config: Config, store: Store, subset: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Ids of the run's first steps, in their order."""
    batch_size = config.data.batch_size
    wanted = -(-SAMPLES_ALONE // batch_size) * batch_size
    ids: list[int] = []
    cheap = replace(config, augmentation=DECODING)
    with open_training_loader(cheap, store, subset, World(), "synthetic") as loader:
        for batch in loader:
            ids += batch.ids.tolist()
            if len(ids) == wanted:
                break
    return np.array(ids, np.int64)


def loader_alone(
    config: Config, store: Store, ids: NDArray[np.int64], engine: str, seconds: float
) -> float:
    """Images/s of the run's loader over these samples again and again, with nobody training."""
    world = World(device=device_of(config))
    config = replace(config, data=replace(config.data, holdout=0.0))
    with open_training_loader(config, store, np.unique(ids), world, engine) as loader:
        batches = chain.from_iterable(repeat(loader))
        for _ in range(settling_steps(config)):
            next(batches)
        images, passed, started = 0, 0.0, time.perf_counter()
        while passed < seconds:
            images += len(next(batches))
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            passed = time.perf_counter() - started
    return images / passed


def transfer_alone(config: Config, engine: str, bytes_per_image: float) -> float | None:
    """Images/s of pinned copies to a CUDA device: of files for `dali`, else of 8-bit views."""
    device = device_of(config)
    if device.type != "cuda":
        return None
    if engine != "dali":
        bytes_per_image = 3 * sum(math.prod(view.shape) for view in config.augmentation.flat_views)
    images = config.data.batch_size // config.run.accumulate
    host = torch.empty(int(bytes_per_image * images), dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for count in (3, 30):  # the first are not counted
        begin.record()
        for _ in range(count):
            target.copy_(host, non_blocking=True)
        end.record()
        torch.cuda.synchronize(device)
    return 30 * images / (begin.elapsed_time(end) / 1000)
