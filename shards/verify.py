"""Check a data set against its own records: counts, hashes, and every image decoded.

Bits rot, copies end early, and one bad sample ends a training run. What is compared: files with the
manifest (bytes, sha256), the index with the shards (content hash of every sample), labels with the
classes, and every image with its declared size, decoded as strictly as when it was written.
"""

from collections import Counter
from concurrent.futures import BrokenExecutor, Executor
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from headrace.shards.cores import usable_cores
from headrace.shards.encode import check_decodes
from headrace.shards.errors import printable
from headrace.shards.index import RAW, Index, ShardError, content_hash, hash_file, read_index
from headrace.shards.manifest import (
    MANIFEST_FILE,
    PARTS_DIRECTORY,
    Manifest,
    ShardFile,
    read_manifest,
)
from headrace.shards.workers import Runner, open_executor

_READ_BYTES = 1 << 22
_SAMPLES_PER_TASK = 512


@dataclass(frozen=True)
class Verification:
    """The result for one directory. problems: sentences, each naming a shard or a sample."""

    directory: Path
    manifest: Manifest
    decoded: bool
    problems: tuple[str, ...]


def written_directories(root: Path) -> list[Path]:
    """`root` itself, or its sub-directories, as far as they hold a manifest.

    Raises `ShardError` if there is none, or one is unfinished.
    """
    if (root / MANIFEST_FILE).is_file():
        return [root]
    finished = sorted(path.parent for path in root.glob(f"*/{MANIFEST_FILE}"))
    for parts in sorted(root.glob(f"*/{PARTS_DIRECTORY}")):
        if parts.parent not in finished:
            raise ShardError(f"{parts.parent} is unfinished; run make_shards.py again to go on")
    if not finished:
        raise ShardError(
            f"{root} holds no finished data set (no {MANIFEST_FILE} there or one level below)"
        )
    return finished


def verify(
    directory: Path,
    *,
    decode: bool = True,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: bool = False,
) -> Verification:
    """Check the data set in `directory`.

    decode: also hash and decode every sample; else only files, counts and the index are checked.
    workers, executor, progress: as in `convert`.
    Raises `ShardError` if manifest or index cannot be read at all.
    """
    manifest, index = read_manifest(directory), read_index(directory)
    workers = workers or usable_cores()
    problems = _check_counts(directory, manifest, index)
    with ExitStack() as stack:
        pool = executor or stack.enter_context(open_executor(workers))
        run = Runner(pool, workers, progress)
        try:
            with run.bar("hashing", sum(shard.bytes for shard in manifest.shards), unit="B") as bar:
                tasks = ((directory, shard) for shard in manifest.shards)
                for problem, size_bytes in run(_check_file, tasks):
                    problems += problem
                    bar.update(size_bytes)
            if decode:
                with run.bar("decoding", len(index)) as bar:
                    starts = range(0, len(index), _SAMPLES_PER_TASK)
                    tasks = ((directory, start) for start in starts)
                    for problem, count in run(_check_samples, tasks):
                        problems += problem
                        bar.update(count)
        except BrokenExecutor as error:
            raise ShardError(
                "a worker process was killed, perhaps for lack of memory: try fewer --workers"
            ) from error
    return Verification(directory, manifest, decode, tuple(sorted(problems)))


def _check_counts(directory: Path, manifest: Manifest, index: Index) -> list[str]:
    problems: list[str] = []
    if len(index) != manifest.samples:
        problems.append(
            f"{directory}: the index has {len(index)} samples, the manifest {manifest.samples}"
        )
    in_shards = Counter(index.rows["shard"].tolist())
    for number, shard in enumerate(manifest.shards):
        if in_shards[number] != shard.samples:
            problems.append(
                f"{directory / shard.file}: the index has {in_shards[number]} samples in it, the "
                f"manifest {shard.samples}"
            )
    problems += [
        f"{directory / name} has changed: its sha256 is not the manifest's"
        for name, known in manifest.index.items()
        if hash_file(directory / name) != known
    ]
    labels = index.rows["label"]
    outside = np.flatnonzero((labels < -1) | (labels >= len(manifest.classes)))
    problems += [
        f"{_sample(directory, index, sample_id)}: label {labels[sample_id]}, but there are "
        f"{len(manifest.classes)} classes"
        for sample_id in outside.tolist()
    ]
    return problems


def _check_file(directory: Path, shard: ShardFile) -> tuple[list[str], int]:
    path = directory / shard.file
    digest = sha256()
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror or error}"], shard.bytes
    if size_bytes != shard.bytes:
        return [f"{path} has {size_bytes} bytes, the manifest says {shard.bytes}"], shard.bytes
    if digest.hexdigest() != shard.sha256:
        return [f"{path} has changed: its sha256 is not the manifest's"], shard.bytes
    return [], shard.bytes


def _check_samples(directory: Path, start: int) -> tuple[list[str], int]:
    manifest, index = read_manifest(directory), read_index(directory)
    stop = min(start + _SAMPLES_PER_TASK, len(index))
    problems: list[str] = []
    for sample_id in range(start, stop):
        try:
            _check_sample(directory, manifest, index, sample_id)
        except (ShardError, OSError) as error:
            problems.append(f"{_sample(directory, index, sample_id)}: {error}")
    return problems, stop - start


def _check_sample(directory: Path, manifest: Manifest, index: Index, sample_id: int) -> None:
    row = index.rows[sample_id]
    if row["shard"] >= len(manifest.shards):
        raise ShardError(f"in shard {row['shard']}, which the manifest does not have")
    offset, length = int(row["offset"]), int(row["length"])
    with (directory / manifest.shards[int(row["shard"])].file).open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise ShardError("lies beyond the end of its shard")
    if content_hash(data) != row["content_hash"]:
        raise ShardError("its bytes have changed (content hash)")
    height, width = int(row["height"]), int(row["width"])
    if row["encoding"] != RAW:
        check_decodes(data, height, width)
    elif length != 3 * height * width:
        raise ShardError(f"{length} bytes are not {height} x {width} RGB pixels")


def _sample(directory: Path, index: Index, sample_id: int) -> str:
    name = printable(index.name(sample_id))
    return f"{directory}, sample {sample_id} ({name!r})"
