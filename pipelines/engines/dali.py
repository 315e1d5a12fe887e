"""The DALI engine: a whole recipe as one graph, on a GPU or on CPU threads.

DALI executes; it decides nothing (`dali_graph` says how). It does not fuse arithmetic: every node
passes over the pictures. On a GPU that is bandwidth it has; on the CPU this engine is there to
check the graph, and slower than the reference engine for recipes with colours.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import Batch
from pipelines.engines import SampleError, Unsupported, Work
from pipelines.engines.dali_columns import plan_columns
from pipelines.engines.dali_graph import FedPipeline, Placement, build_pipeline, decoding_pipeline
from pipelines.recipe import Augmentation

BATCHES_IN_FLIGHT = 2


def _complaint(error: RuntimeError) -> str:
    """The line of DALI's long message that says what went wrong."""
    said = str(error).partition("encountered:")[2] or str(error)
    lines = [line.strip() for line in said.splitlines()]
    found = next((line for line in lines if line and "pipeline" not in line), "no reason given")
    return found.rstrip(" :")


class DaliEngine:
    """Executes Plans with DALI: on `device` cpu with `threads` threads, or on a CUDA device.

    Views are on that device; those on a GPU are ready in the order of the CUDA stream that is
    current where `run` is iterated. The graph is built when the first batch comes, whose length
    says how much room it needs; a longer one later builds it again.
    """

    name = "dali"
    approximations: tuple[str, ...] = ()

    def __init__(self, augmentation: Augmentation, device: torch.device, threads: int) -> None:
        self._augmentation = augmentation
        self._threads = threads
        self._placement: Placement = "gpu" if device.type == "cuda" else "cpu"
        self._device = device
        self._pipeline: FedPipeline | None = None

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

        def feed(pipeline: FedPipeline) -> None:
            item = next(source)
            pipeline.feed_input("encoded", item.encoded)
            for name, column in plan_columns(self._augmentation, item.plan).items():
                pipeline.feed_input(name, column)
            in_flight.append(item)

        pipeline = self._pipeline = build_pipeline(
            self._augmentation,
            self._placement,
            device_id=self._device_id,
            threads=self._threads,
            samples=samples,
            in_flight=BATCHES_IN_FLIGHT,
        )
        pipeline.feed = feed
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

    def _finish(self, pipeline: FedPipeline, in_flight: deque[Work]) -> Batch:
        """The oldest batch that is in flight."""
        work = in_flight[0]
        stream = torch.cuda.current_stream(self._device) if self._placement == "gpu" else None
        try:
            *views, shapes = pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            raise self._diagnosis(work, error) from None
        sizes = np.asarray(shapes.as_tensor())[:, :2]
        for row in np.flatnonzero((sizes != work.plan.sizes).any(axis=1)):
            raise _wrong_size(work, int(row), sizes[row])
        pictures = [
            self._owned(torch.from_dlpack(view.as_tensor())[:, picture])
            for view, declared in zip(views, self._augmentation.views, strict=True)
            for picture in range(declared.count)
        ]
        pipeline.release_outputs()
        in_flight.popleft()
        return work.batch(tuple(pictures))

    def _owned(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W], channels last, from DALI's [B, H, W, 3] that may have gaps.

        DALI's executor counts references to its outputs and does not write to one that is held, so
        what has no gaps on the CPU is taken as it is. On a GPU it is copied to torch's own memory:
        what is freed there is used again in the order of streams, as `record_stream` wants.
        """
        if self._placement == "gpu" or not pictures.is_contiguous():
            pictures = pictures.clone(memory_format=torch.contiguous_format)
        return pictures.permute(0, 3, 1, 2)

    def _diagnosis(self, work: Work, error: RuntimeError) -> Exception:
        """Which sample DALI stopped at: it does not always say, so each is decoded by itself."""
        for row, encoded in enumerate(work.encoded):
            probe = decoding_pipeline(self._placement, device_id=self._device_id)
            probe.build()
            probe.feed_input("encoded", [encoded])
            try:
                (shapes,) = probe.run()
            except RuntimeError as refusal:
                said = _complaint(refusal).replace(" sample #0", "")  # the probe's own counting
                reason = f"DALI refuses it ({said})"
                return SampleError(int(work.plan.ids[row]), reason)
            size = np.asarray(shapes.as_tensor())[0, :2]
            if (size != work.plan.sizes[row]).any():
                return _wrong_size(work, row, size)
        ids = ", ".join(str(sample) for sample in work.plan.ids)
        return RuntimeError(f"DALI stopped at the batch of samples {ids}: {_complaint(error)}")


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


def unsupported(augmentation: Augmentation, device: torch.device) -> list[str]:  # noqa: ARG001
    """Why DALI cannot run for `device`. It has all ops, within the tolerances of the tests."""
    if device.type not in ("cpu", "cuda"):
        return [f"DALI knows CPUs and CUDA devices, not {device}"]
    if device.type == "cuda" and not torch.cuda.is_available():
        return [f"torch finds no CUDA device, and {device} was asked for"]
    return []


def open_engine(augmentation: Augmentation, *, device: torch.device, threads: int) -> DaliEngine:
    """A DALI engine on `device` with `threads` host threads of its own. Raises Unsupported."""
    reasons = unsupported(augmentation, device)
    if reasons:
        raise Unsupported("; ".join(reasons), DaliEngine.name)
    return DaliEngine(augmentation, device, threads)
