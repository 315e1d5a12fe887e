"""Convert a source into shards: parallel, resumable, atomic, and the same bytes every time.

1. Workers encode chunks of the source into parts (see parts.py) under DIR/.parts.
2. When all parts are there, it is known what was left out. The remaining samples are put into the
   order of a permutation that depends on the seed and the number of samples alone, and get the ids
   0 to n-1; readers can then stream shards in order and still see a shuffled set.
3. Shards are written from the parts, in parallel where the format has several files; then names,
   index, report and, last, the manifest: a directory that has a manifest is complete.

Every file gets its name when it is whole. After a `kill -9` at any point the same command goes on
where it stopped and ends with the same bytes; neither the number of workers nor the order in which
they finish enters the result. The price is disk: until the end, parts and shards are both there,
about twice the size of the result. In return nothing is ever decoded twice.
"""

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.shards.assemble import write_shards
from headrace.shards.atomic import PARTIAL_SUFFIX, atomic_file
from headrace.shards.cores import usable_cores
from headrace.shards.encode import EncodeOptions
from headrace.shards.index import ShardError, encode_name, write_index
from headrace.shards.lock import HeldError, held
from headrace.shards.manifest import (
    MANIFEST_FILE,
    PARTS_DIRECTORY,
    Format,
    Manifest,
    read_manifest,
    tool_version,
    write_manifest,
)
from headrace.shards.parts import LEFT_OUT, Note, read_parts, table_path, write_part
from headrace.shards.sources import Sample, SourceSplit
from headrace.shards.workers import Runner, open_executor

REPORT_FILE = "report.jsonl"
_PLAN_FILE = "plan.json"
_LOCK_FILE = "lock"
_PARTS_AIMED_AT = 64
_SAMPLES_PER_PART = (16, 1024)
_NAMED_IN_ERRORS = 5
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ConvertOptions:
    """Everything besides the source that decides what is written.

    shard_megabytes: about how large a tar shard becomes (10^6 bytes); it holds at most 10,000
    samples. encode: see `EncodeOptions`.
    """

    format: Format = "webdataset"
    seed: int = 0
    encode: EncodeOptions = field(default_factory=EncodeOptions)
    shard_megabytes: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ShardError(f"seed is {self.seed}; it must be from 0 to 2^64 - 1")
        if self.shard_megabytes < 1:
            raise ShardError(f"shard_megabytes is {self.shard_megabytes}; it must be at least 1")


@dataclass(frozen=True)
class Conversion:
    """A finished conversion. was_complete: it had been finished before, nothing was written."""

    directory: Path
    manifest: Manifest
    was_complete: bool


def convert(
    split: SourceSplit,
    directory: Path,
    options: ConvertOptions = ConvertOptions(),
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    strict: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write `split` as a data set into `directory`, or finish what an earlier call began.

    workers: processes to use (default: the cores this process may use). executor: take this one
    instead, of any kind; `workers` then says how much it can do at once. strict: refuse to finish
    if a sample had to be left out; what was encoded stays, and a call that is not strict goes on.
    progress: show bars on stderr.

    Raises `ShardError`: a source cannot be read, the disk is full, `directory` holds something
    else or a conversion with other options. Nothing that is in `directory` is ever deleted but
    this function's own intermediate files.
    """
    samples = split.samples
    if not samples:
        raise ShardError("there is no sample to convert")
    requested = _options_of(options, split)
    workers = workers or usable_cores()
    manifest_path, parts_directory = directory / MANIFEST_FILE, directory / PARTS_DIRECTORY
    with _in_words(directory):
        if manifest_path.exists() and not parts_directory.exists():
            return _finished(directory, options.format, requested, strict)
        _refuse_foreign(directory)
        with _locked(directory):
            if manifest_path.exists():
                # Killed between the manifest and the clean-up.
                result = _finished(directory, options.format, requested, strict)
            else:
                per_part = _samples_per_part(len(samples))
                _make_plan(directory, options.format, requested, per_part)
                with ExitStack() as stack:
                    pool = executor or stack.enter_context(open_executor(workers))
                    run = Runner(pool, workers, progress)
                    _encode_all(run, parts_directory, samples, per_part, options)
                    table, notes = read_parts(parts_directory, -(-len(samples) // per_part))
                    _refuse_omissions(notes, strict, len(samples))
                    order = permutation(len(samples), options.seed)
                    order = order[table["kind"][order] != LEFT_OUT]
                    manifest = _finish(
                        run, directory, split, options, requested, table, notes, order
                    )
                result = Conversion(directory, manifest, was_complete=False)
            _empty_parts(parts_directory)
        # With the lock, which Windows keeps as long as it is held.
        shutil.rmtree(parts_directory, ignore_errors=True)
    return result


def _empty_parts(parts_directory: Path) -> None:
    """Remove everything but the lock."""
    for path in parts_directory.iterdir():
        if path.name.partition("-")[0] != _LOCK_FILE:
            path.unlink()


def permutation(samples: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0..samples-1, int64, for a seed from 0 to 2^64 - 1.

    The order of 64-bit Philox words: NumPy keeps the streams of its bit generators from version to
    version, those of `Generator.permutation` not.
    """
    return np.argsort(np.random.Philox(key=seed).random_raw(samples), kind="stable")


def _options_of(options: ConvertOptions, split: SourceSplit) -> dict[str, Any]:
    listing = sha256()
    for sample in split.samples:
        # The path does not enter: a source may move between two runs.
        _, *place = (getattr(sample.reference, key) for key in sample.reference.__slots__)
        listing.update(encode_name(f"{sample.name}\0{sample.label}\0{place}\n"))
    for entry in split.classes:
        listing.update(encode_name(f"{entry.id}\0{entry.name}\n"))
    return {
        "seed": options.seed,
        "max_side_pixels": options.encode.max_side_pixels,
        "quality": options.encode.quality,
        "shard_megabytes": options.shard_megabytes,
        "source_sha256": listing.hexdigest(),
    }


def _samples_per_part(samples: int) -> int:
    """Many parts lose little by a kill, few cost little (each is flushed to the device)."""
    return int(np.clip(-(-samples // _PARTS_AIMED_AT), *_SAMPLES_PER_PART))


def _finished(
    directory: Path,
    format: Format,  # noqa: A002  (the word of the manifest and of the command line)
    requested: dict[str, Any],
    strict: bool,
) -> Conversion:
    manifest = read_manifest(directory)
    there = {**manifest.options, "format": manifest.format}
    _compare(directory, "a finished data set", there, {**requested, "format": format})
    left_out = sum(manifest.omissions.values())
    if strict and left_out:
        raise ShardError(
            f"{directory} is finished, but {left_out} sample(s) were left out of it (strict); they "
            f"are listed in {directory / REPORT_FILE}"
        )
    return Conversion(directory, manifest, was_complete=True)


def _refuse_foreign(directory: Path) -> None:
    """Refuse a directory that holds anything before a conversion was begun in it."""
    ours = (directory / MANIFEST_FILE, directory / PARTS_DIRECTORY / _PLAN_FILE)
    if not directory.exists() or any(path.exists() for path in ours):
        return
    others = [name for name in sorted(os.listdir(directory)) if name != PARTS_DIRECTORY]
    if others:
        raise ShardError(
            f"{directory} is not empty (it holds {others[0]}) and no conversion was begun there: "
            "choose another directory"
        )


def _make_plan(
    directory: Path,
    format: Format,  # noqa: A002
    requested: dict[str, Any],
    per_part: int,
) -> None:
    """Note what is being done, or refuse to mix it with what was begun before."""
    # Another version of a library would encode the rest differently.
    plan = {**requested, "format": format, "samples_per_part": per_part, "tool": tool_version()}
    parts_directory = directory / PARTS_DIRECTORY
    path = parts_directory / _PLAN_FILE
    if path.exists():
        _compare(directory, "an unfinished conversion", json.loads(path.read_bytes()), plan)
    else:
        with atomic_file(path) as file:
            file.write(json.dumps(plan, sort_keys=True, indent=2).encode("ascii"))
    for place in (directory, parts_directory):
        for left_over in place.glob(f".*{PARTIAL_SUFFIX}"):
            left_over.unlink()


def _compare(directory: Path, what: str, there: dict[str, Any], requested: dict[str, Any]) -> None:
    differing = sorted(key for key in requested if there.get(key) != requested[key])
    if not differing:
        return
    if "source_sha256" in differing:
        difference = "the source has other samples or labels"
    else:
        difference = ", ".join(
            f"{key} is {there.get(key)} there and {requested[key]} here" for key in differing
        )
    raise ShardError(
        f"{directory} holds {what} with other options ({difference}): choose another directory "
        "with --out, repeat the former options, or delete it yourself"
    )


def _refuse_omissions(notes: list[Note], strict: bool, samples: int) -> None:
    left_out = [note for note in notes if note.action == "left out"]
    some = "; ".join(f"{note.name!r}: {note.reason}" for note in left_out[:_NAMED_IN_ERRORS])
    more = len(left_out) - _NAMED_IN_ERRORS
    listed = some + (f"; and {more} more" if more > 0 else "")
    if len(left_out) == samples:
        raise ShardError(f"none of the {samples} samples can be used ({listed})")
    if strict and left_out:
        raise ShardError(
            f"{len(left_out)} of {samples} samples would be left out (strict): {listed}. Repair "
            "them and start with another directory, or go on in this one without --strict"
        )


def _encode_all(
    run: Runner,
    parts_directory: Path,
    samples: Sequence[Sample],
    per_part: int,
    options: ConvertOptions,
) -> None:
    starts = range(0, len(samples), per_part)
    missing = [
        part for part in range(len(starts)) if not table_path(parts_directory, part).exists()
    ]
    tasks = (
        (
            parts_directory,
            part,
            samples[starts[part] : starts[part] + per_part],
            options.encode,
            options.format,
        )
        for part in missing
    )
    to_do = sum(len(samples[starts[part] : starts[part] + per_part]) for part in missing)
    with run.bar("encoding", len(samples), len(samples) - to_do) as bar:
        for count in run(write_part, tasks):
            bar.update(count)


def _finish(
    run: Runner,
    directory: Path,
    split: SourceSplit,
    options: ConvertOptions,
    requested: dict[str, Any],
    table: NDArray[np.void],
    notes: list[Note],
    order: NDArray[np.int64],
) -> Manifest:
    with run.bar("writing shards", len(order), 0) as bar:
        rows, shards = write_shards(
            run, bar.update, directory, directory / PARTS_DIRECTORY, split, table[order], order,
            options.format, options.shard_megabytes * 1_000_000,
        )  # fmt: skip
    hashes = write_index(directory, rows, (split.samples[position].name for position in order))
    with atomic_file(directory / REPORT_FILE) as file:
        file.write("".join(note.to_json() + "\n" for note in notes).encode("ascii"))
    counts = Counter((note.action, note.reason) for note in notes)
    manifest = Manifest(
        format=options.format,
        samples=len(order),
        classes=split.classes,
        shards=tuple(shards),
        index=hashes,
        options=requested,
        tool=tool_version(),
        repairs={reason: n for (action, reason), n in counts.items() if action == "repaired"},
        omissions={reason: n for (action, reason), n in counts.items() if action == "left out"},
    )
    write_manifest(directory, manifest)
    return manifest


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """DIR/.parts is there, and for this process alone."""
    parts_directory = directory / PARTS_DIRECTORY
    parts_directory.mkdir(parents=True, exist_ok=True)
    try:
        with held(parts_directory / _LOCK_FILE):
            yield
    except HeldError as error:
        raise ShardError(
            f"another process is writing {directory} ({error.holder}); wait for it"
        ) from error


@contextmanager
def _in_words(directory: Path) -> Iterator[None]:
    """Turn what the disk and the workers can do to us into sentences."""
    again = "what was finished is kept, and the same command goes on from there"
    try:
        yield
    except BrokenExecutor as error:
        raise ShardError(
            f"a worker process was killed, perhaps for lack of memory: {again}; try fewer --workers"
        ) from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise ShardError(
                f"no room to write in {directory} ({error.strerror}): {again} once there is room"
            ) from error
        where = error.filename or directory
        raise ShardError(f"cannot write {where}: {error.strerror or error}; {again}") from error
