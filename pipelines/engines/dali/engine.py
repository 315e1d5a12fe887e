"""The DALI engine: a whole recipe as one graph, on a GPU or on CPU threads.

DALI executes; it decides nothing (`graph` says how). It does not fuse arithmetic: every node
passes over the pictures. On a GPU that is bandwidth it has; on the CPU this engine is there to
check the graph, and slower than the reference engine for recipes with colours.

Feeding a GPU: what is fed is copied once, into DALI's own page-locked buffers, since its executor
pins whatever a GPU reads; from there it is copied on DALI's stream while the step before computes.
(Our own memory, passed on without a copy, was measured to take the host longer: DALI then keeps
track of every sample.) What is handed out is torch's memory, filled on the stream that is
current where `run` is iterated, for the loader's `record_stream`.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline
from typing_extensions import override

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.batch import Batch
from headrace.pipelines.engines.contract import EngineKind, SampleError, Unsupported, Work
from headrace.pipelines.engines.dali.columns import AFFINE
from headrace.pipelines.engines.dali.files import file_for_dali
from headrace.pipelines.engines.dali.graph import (
    FINISHED,
    build_pipeline,
    input_columns,
    probing_pipeline,
)
from headrace.pipelines.engines.dali.nodes import Placement
from headrace.pipelines.ops import RandAugment
from headrace.pipelines.recipe import Augmentation
from headrace.shards.pixels import PixelError

BATCHES_IN_FLIGHT = 2


def _complaint(error: RuntimeError) -> str:
    """The line of DALI's long message that says what went wrong."""
    message = str(error).partition("encountered:")[2] or str(error)
    lines = [line.strip() for line in message.splitlines()]
    reason = next((line for line in lines if line and "pipeline" not in line), "no reason given")
    return reason.rstrip(" :")


class DaliEngine:
    """Executes Plans with DALI: on `device` cpu with `threads` threads, or on a CUDA device.

    Views and masks are on that device; on a GPU they are ready in the order of the CUDA stream that
    is current where `run` is iterated. The graph is built when the first batch comes, whose length
    says how much room it needs; a longer one later builds it again.
    """

    name = "dali"

    def __init__(
        self,
        augmentation: Augmentation,
        device: torch.device,
        threads: int,
        finished: torch.dtype | None,
        approximations: tuple[Approximation, ...],
    ) -> None:
        self._augmentation = augmentation
        self._threads = threads
        self._placement: Placement = "gpu" if device.type == "cuda" else "cpu"
        self._device = device
        self._finished = finished
        self._pipeline: Pipeline | None = None
        self.approximations: tuple[str, ...] = approximations

    def run(self, work: Iterator[Work]) -> Iterator[Batch]:
        item = next(work, None)
        while item is not None:
            samples = len(item.encoded)
            source = _UpTo(item, work, samples)
            yield from self._run_pipeline(source, samples)
            item = source.longer

    def close(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline._shutdown()  # what its __del__ does, but now and whoever still refers to it

    def _run_pipeline(self, source: "_UpTo", samples: int) -> Iterator[Batch]:
        in_flight: deque[Work] = deque()

        def inputs() -> Sequence[Any]:
            item = next(source)
            whole = np.array([_is_cut_short(encoded) for encoded in item.encoded])
            finished = self._finished is not None
            columns = input_columns(self._augmentation, item.plan, whole, finished=finished)
            files = [_file(item, row) for row in range(len(item.encoded))]
            in_flight.append(item)
            return files, *columns.values()

        pipeline = self._pipeline = build_pipeline(
            self._augmentation,
            self._placement,
            finished=self._finished,
            source=inputs,
            device_id=self._device_id,
            threads=self._threads,
            samples=samples,
            in_flight=BATCHES_IN_FLIGHT,
        )
        try:
            pipeline.schedule_run()
            while in_flight:
                yield self._finish(pipeline, in_flight)
                if self._pipeline is not pipeline:  # closed meanwhile
                    return
                pipeline.schedule_run()
        finally:
            if self._pipeline is pipeline:
                self.close()

    @property
    def _device_id(self) -> int | None:
        if self._device.type != "cuda":
            return None
        index = self._device.index
        return torch.cuda.current_device() if index is None else index

    def _finish(self, pipeline: Pipeline, in_flight: deque[Work]) -> Batch:
        """The oldest batch that is in flight."""
        work = in_flight[0]
        stream = torch.cuda.current_stream(self._device) if self._placement == "gpu" else None
        try:
            *outputs, shapes = pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            raise self._diagnosis(work, error) from None
        sizes = np.asarray(shapes.as_tensor())[:, :2]
        for row in np.flatnonzero((sizes != work.plan.sizes).any(axis=1)):
            raise _wrong_size(work, int(row), sizes[row])
        tensors = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        declared = self._augmentation.views
        views = tuple(
            self._owned(stack[:, picture]).permute(0, 3, 1, 2)
            for stack, view in zip(tensors, declared, strict=False)
            for picture in range(view.count)
        )
        masks = iter([self._owned(mask) for mask in tensors[len(declared) :]])
        pipeline.release_outputs()
        in_flight.popleft()
        batch = work.batch(views)
        return replace(
            batch, masks=tuple(None if mask is None else next(masks) for mask in batch.masks)
        )

    def _owned(self, output: torch.Tensor) -> torch.Tensor:
        """The same without gaps, in memory that is the caller's.

        DALI's executor counts references to its outputs and does not write to one that is held, so
        what has no gaps on the CPU is taken as it is. On a GPU it is copied to torch's own memory:
        what is freed there is used again in the order of streams, as `record_stream` wants.
        """
        if self._placement == "gpu" or not output.is_contiguous():
            return output.clone(memory_format=torch.contiguous_format)
        return output

    def _diagnosis(self, work: Work, error: RuntimeError) -> Exception:
        """Which sample DALI stopped at: it does not always say, so each is decoded by itself."""
        for row, encoded in enumerate(work.encoded):
            probe = probing_pipeline(encoded, self._placement, device_id=self._device_id)
            try:
                (shapes,) = probe.run()
            except RuntimeError as refusal:
                complaint = _complaint(refusal).replace(
                    " sample #0", ""
                )  # the probe's own counting
                reason = f"DALI refuses it ({complaint})"
                return SampleError(int(work.plan.ids[row]), reason)
            size = np.asarray(shapes.as_tensor())[0, :2]
            if (size != work.plan.sizes[row]).any():
                return _wrong_size(work, row, size)
        ids = ", ".join(str(sample) for sample in work.plan.ids)
        return RuntimeError(f"DALI stopped at the batch of samples {ids}: {_complaint(error)}")


def _file(work: Work, row: int) -> NDArray[np.uint8]:
    try:
        return file_for_dali(work.encoded[row])
    except PixelError as error:
        raise SampleError(int(work.plan.ids[row]), str(error)) from error


def _is_cut_short(encoded: NDArray[np.uint8]) -> bool:
    """Whether a file is a JPEG without its end: a box in the part that is there would be decoded,
    in one epoch and not in another. Such files are decoded wholly, and refused each time."""
    return bytes(encoded[:2]) == b"\xff\xd8" and bytes(encoded[-2:]) != b"\xff\xd9"


def _wrong_size(work: Work, row: int, size: NDArray[np.int64]) -> SampleError:
    expected = work.plan.sizes[row]
    return SampleError(
        int(work.plan.ids[row]),
        f"it is {size[0]} x {size[1]} pixels (height x width), but the index says "
        f"{expected[0]} x {expected[1]}",
    )


class _UpTo(Iterator[Work]):
    """`first` and what follows it, until one has more than `samples`: that is kept in `longer`."""

    def __init__(self, first: Work, rest: Iterator[Work], samples: int) -> None:
        self._first: Work | None = first
        self._rest = rest
        self._samples = samples
        self.longer: Work | None = None

    def __next__(self) -> Work:
        if self._first is not None:
            item, self._first = self._first, None
            return item
        if self.longer is None:
            item = next(self._rest)
            if len(item.encoded) <= self._samples:
                return item
            self.longer = item
        raise StopIteration


_LACKING: dict[Approximation, str] = {
    "affine-bilinear": "RandAugment turns, shears and shifts bicubically, DALI only bilinearly",
    "equalize-opencv": "RandAugment's Equalize is Pillow's, DALI has OpenCV's",
}


def _approximations(augmentation: Augmentation) -> tuple[Approximation, ...]:
    """What the recipe has that DALI can only approximate."""
    needed: set[Approximation] = set()
    for op in (op for view in augmentation.views for op in view.executed):
        if isinstance(op, RandAugment):
            if op.interpolation != "bilinear" and AFFINE.intersection(op.operations):
                needed.add("affine-bilinear")
            if "Equalize" in op.operations:
                needed.add("equalize-opencv")
    return tuple(sorted(needed))


class Dali(EngineKind):
    """The DALI engine before it is opened."""

    @override
    def unsupported(
        self,
        augmentation: Augmentation,
        device: torch.device,
        approximate: Collection[Approximation],
    ) -> list[str]:
        """What DALI has no operator for, within the tolerances of the tests, and what nobody asked
        to approximate."""
        if device.type not in ("cpu", "cuda"):
            return [f"DALI knows CPUs and CUDA devices, not {device}"]
        if device.type == "cuda" and not torch.cuda.is_available():
            return [f"torch finds no CUDA device, and {device} was asked for"]
        return [
            f"{_LACKING[name]}; --data.approximate {name} takes it as it is"
            for name in _approximations(augmentation)
            if name not in approximate
        ]

    @override
    def finishes(
        self, augmentation: Augmentation, device: torch.device, dtype: torch.dtype
    ) -> bool:
        """Yes, but for what DALI has no type for, what a CPU is slow at (float16), and noise for
        every pixel, which torch makes from keys."""
        noise = any(
            view.erase is not None and view.erase.fill == "pixel" for view in augmentation.views
        )
        types = FINISHED if device.type == "cuda" else (torch.float32,)
        return dtype in types and not noise

    @override
    def open(
        self,
        augmentation: Augmentation,
        *,
        device: torch.device,
        threads: int,
        finished: torch.dtype | None = None,
        approximate: Collection[Approximation] = (),
    ) -> DaliEngine:
        """On `device`, with `threads` host threads of its own. Raises Unsupported."""
        reasons = self.unsupported(augmentation, device, approximate)
        if reasons:
            raise Unsupported("; ".join(reasons), DaliEngine.name)
        approximations = _approximations(augmentation)
        return DaliEngine(augmentation, device, threads, finished, approximations)
