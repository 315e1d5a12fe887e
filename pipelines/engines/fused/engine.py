"""The fused engine: whole recipes on CPU cores, each picture decoded once and made in one call.

A few plain threads take one picture at a time: libjpeg-turbo decodes it, then one compiled call
(`render`) makes all its views and writes them into the batch, without the interpreter and mostly
within the caches. Two that are mixed are finished by the thread that made the second of them.
Pixels are `reference`'s but for roundings in the resampler; what it costs is a compilation, once
per machine and version, and memory for finished batches that is used again.
"""

import re
import threading
import weakref
from collections import deque
from collections.abc import Collection, Generator, Iterator
from operator import gt
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from typing_extensions import override

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.batch import Batch
from headrace.pipelines.engines.contract import EngineKind, SampleError, Work, give_way
from headrace.pipelines.engines.fused.memory import Room, aligned, allocate, room
from headrace.pipelines.engines.fused.program import Layout, lower
from headrace.pipelines.engines.fused.render import Program, Scratch, mix, render
from headrace.pipelines.recipe import Augmentation
from headrace.shards.pixels import decode_rgb, in_words

BATCHES_IN_FLIGHT = 2

_JPEG = b"\xff\xd8"
_PNM = re.compile(rb"P6\s(\d+)\s(\d+)\s255\s")
_PNM_HEADER_BYTES = 64
_LIBJPEG_SPACES = ("YCbCr", "Gray", "RGB")  # what both libjpeg-turbo and Pillow turn into RGB alike


class _Pixels(NamedTuple):
    """height x width interleaved RGB from byte `first` of a flat uint8 array on.

    source: always read-only, because to numba an array that can be written is another type, for
    which it would compile everything once more.
    """

    source: NDArray[np.uint8]
    first: int
    height: int
    width: int


def _decode(encoded: NDArray[np.uint8], buffer: NDArray[np.uint8]) -> _Pixels:
    """The picture in an encoded file, decoded into `buffer` if that is large enough.

    Pillow decides about whatever is no plain JPEG, or no undamaged one, and raises what it raises.
    """
    start = encoded[:_PNM_HEADER_BYTES].tobytes()
    if start.startswith(_JPEG):
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
            height, width = int(height), int(width)
            if space in _LIBJPEG_SPACES and 3 * height * width <= buffer.size:
                simplejpeg.decode_jpeg(encoded, buffer=buffer)
                return _Pixels(_read_only(buffer), 0, height, width)
        except ValueError:
            pass  # damaged, or of a rare kind: as below
    elif (header := _PNM.match(start)) is not None:
        width, height = int(header[1]), int(header[2])
        if encoded.size - header.end() >= 3 * height * width:
            return _Pixels(_read_only(encoded), header.end(), height, width)
    pixels = np.array(decode_rgb(encoded))
    return _Pixels(_read_only(pixels.reshape(-1)), 0, *pixels.shape[:2])


def _read_only(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    view = array[:]
    view.flags.writeable = False
    return view


class _Memory:
    """Arrays for finished batches, used again when nobody refers to them any more.

    A fresh array of this size is pages that the kernel has to find and clear on first touch, which
    costs about as much as filling them.
    """

    def __init__(self, kind: type[np.generic], spare: int) -> None:
        self._kind = kind
        self._free: deque[NDArray[Any]] = deque(maxlen=spare)

    def take(self, length: int) -> NDArray[Any]:
        try:
            block = self._free.pop()
        except IndexError:
            block = None
        if block is None or block.size < length:
            block = aligned(length, self._kind)
        # Tensors made of the lease keep it alive, and with it the block out of the spare ones.
        lease = block[:length]
        weakref.finalize(lease, self._free.append, block).atexit = False
        return lease


class _Job:
    """A batch that is being made."""

    def __init__(self, work: Work, program: Program, need: Room, target: NDArray[Any]) -> None:
        self.work = work
        self.program = program
        self.need = need
        self.target = target
        # The same memory twice, so that the compiled functions know one type of batch.
        self.values = target if program.finished else np.empty(0, np.float32)
        self.pixels = target.view(np.uint8)
        self.sizes: list[list[int]] = work.plan.sizes.tolist()
        self.abandoned = False
        self.done = threading.Event()
        self.errors: dict[int, BaseException] = {}
        self._partners: list[int] = program.partners.tolist()
        self._waiting: set[int] = set()
        self._left = len(work.encoded)
        self._lock = threading.Lock()

    def sample_id(self, row: int) -> int:
        return int(self.work.plan.ids[row])

    def rows(self) -> list[int]:
        """All rows, partners one after the other: the first should wait in a cache."""
        first = np.arange(len(self._partners))
        partners = self.program.partners
        return np.argsort(
            np.where(partners < 0, first, np.minimum(first, partners)), kind="stable"
        ).tolist()

    def partner(self, row: int) -> int | None:
        """Whom a row that was rendered is to be mixed with now: None, or one that waits for it."""
        partner = self._partners[row]
        if partner < 0:
            return None
        with self._lock:
            if partner in self._waiting:
                return partner
            self._waiting.add(row)
        return None

    def count_down(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self.done.set()


class _Thread:
    """One worker and the memory that it reuses from picture to picture."""

    def __init__(self, rows: "SimpleQueue[tuple[_Job, int] | None]") -> None:
        self._rows = rows
        self._room = Room(*[0] * len(Room._fields))
        self._scratch: Scratch | None = None
        self._fits: Room | None = None  # the last one that was asked for
        self._picture = np.empty(0, np.uint8)
        self._thread = threading.Thread(target=self._run, name="headrace-fused", daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while (taken := self._rows.get()) is not None:
            job, row = taken
            try:
                if not job.abandoned:
                    self._render(job, row)
            except BaseException as error:  # whoever waits for the batch raises it
                job.errors[row] = error
            job.count_down()
            del job, taken  # an idle thread must not keep a batch alive

    def _render(self, job: _Job, row: int) -> None:
        scratch = self._fitting(job.need)
        try:
            pixels = _decode(job.work.encoded[row], self._picture)
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise SampleError(job.sample_id(row), in_words(error)) from error
        height, width = job.sizes[row]
        if pixels.height != height or pixels.width != width:
            raise SampleError(
                job.sample_id(row),
                f"it is {pixels.width} x {pixels.height} pixels (width x height), but the index "
                f"says {width} x {height}",
            )
        render(
            pixels.source,
            pixels.first,
            height,
            width,
            job.program,
            row,
            scratch,
            job.values,
            job.pixels,
        )
        partner = job.partner(row)
        if partner is not None:
            mix(job.program, row, partner, scratch, job.values, job.pixels)

    def _fitting(self, need: Room) -> Scratch:
        if self._scratch is None or (need is not self._fits and any(map(gt, need, self._room))):
            self._room = Room(*map(max, need, self._room))
            self._scratch = allocate(self._room)
            self._picture = aligned(self._room.picture, np.uint8)
        self._fits = need
        return self._scratch


class FusedEngine:
    """Executes Plans on `threads` threads; output on the CPU.

    finished: views come out as float32, as `device_stage` would make them, and not as uint8.
    """

    name = "fused"
    approximations: tuple[str, ...] = ()

    def __init__(self, augmentation: Augmentation, threads: int, finished: bool = False) -> None:
        self._layout = Layout.of(augmentation, finished)
        # In flight, and as many again that loader and training hold and give back one by one.
        self._memory = _Memory(np.float32 if finished else np.uint8, spare=2 * BATCHES_IN_FLIGHT)
        self._rows: SimpleQueue[tuple[_Job, int] | None] = SimpleQueue()
        self._thread_count = threads
        self._threads: list[_Thread] = []  # started by `run`: an engine may be opened for nothing

    def run(self, work: Iterator[Work]) -> Generator[Batch, None, None]:
        self._threads += [_Thread(self._rows) for _ in range(self._thread_count)]
        pending: deque[_Job] = deque()
        try:
            for item in work:
                pending.append(self._start(item))
                if len(pending) == BATCHES_IN_FLIGHT:
                    yield self._finish(pending.popleft())
            while pending:
                yield self._finish(pending.popleft())
        finally:
            for job in pending:
                job.abandoned = True
            for job in pending:
                job.done.wait()  # nothing reads the encoded bytes any more

    def close(self) -> None:
        threads, self._threads = self._threads, []
        for _ in threads:
            self._rows.put(None)
        for thread in threads:
            thread.join()

    def _start(self, work: Work) -> _Job:
        program = lower(self._layout, work.plan)
        give_way()
        need = room(self._layout, program, work.plan.sizes)
        give_way()
        samples = len(work.encoded)
        job = _Job(work, program, need, self._memory.take(self._layout.starts(samples)[1]))
        for row in job.rows():
            self._rows.put((job, row))
        return job

    def _finish(self, job: _Job) -> Batch:
        job.done.wait()
        if job.errors:
            raise job.errors[min(job.errors)]
        return job.work.batch(self._layout.views_of(job.target, len(job.work.encoded)))


class Fused(EngineKind):
    """The fused engine before it is opened. The loader moves its batches to any device."""

    @override
    def unsupported(
        self,
        augmentation: Augmentation,
        device: torch.device,
        approximate: Collection[Approximation],
    ) -> list[str]:
        """Nothing: it has all ops."""
        return []

    @override
    def finishes(
        self, augmentation: Augmentation, device: torch.device, dtype: torch.dtype
    ) -> bool:
        """On a CPU its last pass writes floats, erased and mixed: no other pass over the batch."""
        return device.type == "cpu" and dtype == torch.float32

    @override
    def open(
        self,
        augmentation: Augmentation,
        *,
        device: torch.device,
        threads: int,
        finished: torch.dtype | None = None,
        approximate: Collection[Approximation] = (),
    ) -> FusedEngine:
        return FusedEngine(augmentation, threads, finished=finished is not None)
