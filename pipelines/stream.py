"""One rank's stream of batches: what determines it, and the thread that makes it ahead of time.

`Stream` is a value: from a place in the order to the work there, to a finished batch. `Worker` is
the one thread that walks it, so that everything here happens in the order of the places and a
failure surfaces where it belongs, after the batches before it. `loader` is what training sees.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.batch import Batch
from headrace.pipelines.components import with_components
from headrace.pipelines.draw import draw
from headrace.pipelines.engines import (
    Engine,
    EngineName,
    SampleError,
    Work,
    finishes,
    open_engine,
)
from headrace.pipelines.engines.contract import give_way
from headrace.pipelines.engines.device_stage import device_stage
from headrace.pipelines.faults import OnError, Unusable, fill, others_of
from headrace.pipelines.order import Order, rank_slice
from headrace.pipelines.recipe import Augmentation
from headrace.pipelines.table import Table
from headrace.shards.errors import UserError
from headrace.shards.index import printable
from headrace.shards.store import Store


class LoaderError(UserError):
    """A loader that cannot be built, resumed or continued: what is wrong and what may be done."""


def require(holds: bool, message: str) -> None:
    """Raise LoaderError unless `holds`."""
    if not holds:
        raise LoaderError(message)


class Place(NamedTuple):
    epoch: int
    step: int  # of the epoch
    part: int  # micro-batch of the step


@dataclass(frozen=True)
class Stream:
    """Everything that determines one rank's batches, and nothing that changes.

    The fields are `loader.open_loader`'s parameters of the same names; `engine_name` is the engine
    that was chosen, `table` an epoch's order that replaces `order`'s, `components` the recipe's.
    Raises LoaderError for what cannot be delivered.
    """

    store: Store
    augmentation: Augmentation
    order: Order
    engine_name: EngineName
    rank: int
    world_size: int
    accumulate: int
    device: torch.device
    dtype: torch.dtype
    threads: int
    prefetch: int
    passes: int | None
    stage: bool
    approximate: tuple[Approximation, ...] = ()
    table: Table | None = None
    components: Mapping[str, Store] = field(default_factory=dict)
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        for name, value in (
            ("world_size", self.world_size),
            ("accumulate", self.accumulate),
            ("prefetch", self.prefetch),
            ("passes", 1 if self.passes is None else self.passes),
            ("threads", self.threads),
        ):
            require(value > 0, f"{name} is {value}; it must be at least 1")
        require(
            0 <= self.rank < self.world_size,
            f"rank is {self.rank}; it must be in [0, {self.world_size})",
        )
        require(
            self.dtype in (torch.float32, torch.float16, torch.bfloat16),
            f"dtype is {self.dtype}; views can be float32, float16 or bfloat16",
        )
        batch_size, drop_last = self.order.batch_size, self.order.drop_last
        recipe, group = self.augmentation.name, self.augmentation.group
        require(
            drop_last or group == 1,
            f"drop_last=False leaves a last batch without whole groups of {group}, which the "
            f"recipe {recipe!r} draws for",
        )
        require(
            drop_last or self.accumulate == 1,
            "accumulate needs drop_last: its steps are all whole",
        )
        shares = self.world_size * self.accumulate
        require(
            batch_size % shares == 0,
            f"batch_size {batch_size} is no multiple of world_size x accumulate = "
            f"{self.world_size} x {self.accumulate}",
        )
        require(
            batch_size // shares % group == 0,
            f"a micro-batch of {batch_size // shares} samples holds no whole groups of {group}, "
            f"which the recipe {recipe!r} draws for",
        )

    @property
    def component_fingerprints(self) -> dict[str, dict[str, str]]:
        """For the loader's fingerprint, which stays what it was where there are none."""
        prints = {name: store.fingerprint for name, store in self.components.items()}
        return {"components": prints} if prints else {}

    @property
    def engine_finishes(self) -> bool:
        """Whether the engine hands out finished views, which saves a pass over all of them."""
        return self.stage and finishes(self.engine_name, self.augmentation, self.device, self.dtype)

    def open_engine(self) -> Engine:
        pictures = open_engine(
            self.engine_name,
            self.augmentation,
            device=self.device,
            threads=self.threads,
            finished=self.dtype if self.engine_finishes else None,
            approximate=self.approximate,
        )
        return with_components(
            pictures, self.components, self.augmentation, device=self.device, threads=self.threads
        )

    def step_length(self, step: int) -> int:
        """Samples in the global batch of a step: the last may be shorter in evaluation."""
        batch_size = self.order.batch_size
        return min(batch_size, self.order.epoch_length - step * batch_size)

    def share(self, step: int, part: int) -> slice:
        """This rank's micro-batch within the global batch: contiguous, of whole groups."""
        group, drop_last = self.augmentation.group, self.order.drop_last
        of_rank = rank_slice(
            self.step_length(step), self.world_size, self.rank, group=group, drop_last=drop_last
        )
        within = rank_slice(
            of_rank.stop - of_rank.start, self.accumulate, part, group=group, drop_last=drop_last
        )
        return slice(of_rank.start + within.start, of_rank.start + within.stop)

    def rank_steps(self) -> int:
        """Steps of an epoch in which this rank has samples: all, or all but a short last one."""
        steps = self.order.steps_per_epoch
        last = self.share(steps - 1, 0)
        return steps if last.stop > last.start else steps - 1

    def places(self, start: Place) -> Iterator[Place]:
        """From `start` on: `passes` epochs in all, or no end. `rank_steps` must not be 0."""
        epoch, step, part = start
        steps = self.rank_steps()
        while True:
            if step >= steps:
                epoch, step, part = epoch + 1, 0, 0
            if epoch == self.passes:
                return
            yield Place(epoch, step, part)
            part += 1
            if part == self.accumulate:
                step, part = step + 1, 0

    def global_batch(self, place: Place) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """(ids, occurrences) of a step: out of its epoch's table, if there is one."""
        if self.table is None or self.table.epoch != place.epoch:
            return self.order.global_batch(place.epoch, place.step)
        first = place.step * self.order.batch_size
        rows = slice(first, first + self.step_length(place.step))
        return self.table.ids[rows], self.table.occurrences[rows]

    def work(self, place: Place, unusable: Unusable) -> Work:
        """unusable: what was met so far; more is added, unless `on_error` is "raise"."""
        ids, occurrences = self.global_batch(place)
        share = self.share(place.step, place.part)
        first = place.step * self.order.batch_size
        ids, occurrences = ids[share], occurrences[share]
        filled = None
        if self.on_error != "raise":
            others = partial(others_of, self.order, self.table, place.epoch)
            filled = fill(
                self.store,
                ids,
                occurrences,
                unusable,
                epoch=place.epoch,
                first=first + share.start,
                others=others if self.on_error == "replace" else None,
            )
            ids, occurrences = filled.ids, filled.occurrences
        plan = draw(
            self.augmentation,
            seed=self.order.seed,
            epoch=place.epoch,
            position=first,
            first=share.start,
            ids=ids,
            occurrences=occurrences,
            sizes=self.store.sizes(ids),
        )
        give_way()
        encoded = self.store.read(ids) if filled is None else filled.encoded
        give_way()
        faults = () if filled is None else filled.faults
        return Work(plan, encoded, self.store.labels(ids), faults)

    def finish(self, batch: Batch) -> Batch:
        """To the consumer's device, and finished if that is asked for and not yet done."""
        if self.device.type == "cuda":
            batch = _pinned(batch)
        if not self.stage or self.engine_finishes:
            return batch.to(self.device)
        recipe = self.augmentation
        return device_stage(batch, recipe.mean, recipe.std, device=self.device, dtype=self.dtype)

    def explain(self, error: BaseException) -> BaseException:
        """The engine knows a sample's id; the store knows what its owner called it."""
        if not isinstance(error, SampleError):
            return error
        name = self.store.names(np.array([error.sample_id], dtype=np.int64))[0]
        named = LoaderError(
            f"sample {error.sample_id} ({printable(name)!r}) of {self.store.uri} cannot be "
            f"decoded: {error.reason}; repair the file, or convert the data set with make_shards, "
            "which leaves such files out"
        )
        named.__cause__ = error
        return named


def _pinned(batch: Batch) -> Batch:
    """Page-locked copies of what is on the host, so that the copies to the device do not block."""

    return batch.map(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)


def _side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """On CUDA the worker's own stream: its copies and kernels run beside the training step's."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def receive(batch: Batch, ready: torch.cuda.Event | None, device: torch.device) -> Batch:
    """Order the consumer's stream behind the worker's, and keep the memory until it is done."""
    if ready is not None:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(ready)
        for tensor in batch.tensors():
            tensor.record_stream(stream)
    return batch


class Delivery(NamedTuple):
    place: Place
    batch: Batch
    ready: torch.cuda.Event | None


class Worker:
    """A thread that makes batches from `start` on until there are no more, it fails or is stopped.

    A batch occupies a slot from before its bytes are read until it is taken. An engine takes up to
    two Works before it gives its first Batch, so that two slots are the least.

    It holds no reference to the Loader, so that a forgotten Loader can end it.
    """

    def __init__(self, stream: Stream, engine: Engine, start: Place) -> None:
        self._stream = stream
        self._engine = engine
        self._start = start
        self._ready: SimpleQueue[Delivery | BaseException] = SimpleQueue()
        self._slots = threading.Semaphore(stream.prefetch + 1)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-loader", daemon=True)
        self._thread.start()

    def take(self) -> Delivery:
        """The next batch, as soon as it is there. Raises what ended the worker."""
        taken = self._ready.get()
        if isinstance(taken, BaseException):
            raise taken
        self._slots.release()
        return taken

    def stop(self) -> None:
        """Ends the thread: at the latest when the batch that it is working on is done."""
        self._stopping.set()
        self._slots.release()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            with _side_stream(self._stream.device):
                self._produce()
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            self._ready.put(self._stream.explain(error))
        finally:
            self._engine.close()

    def _produce(self) -> None:
        unusable: Unusable = {}
        start = self._start
        while True:
            places: deque[Place] = deque()
            try:
                self._run_engine(start, places, unusable)
                return
            except SampleError as error:
                # Black or another picture in its place did not help: not the picture is at fault.
                if self._stream.on_error == "raise" or error.sample_id in unusable:
                    raise
                unusable[error.sample_id] = error.reason
            # An engine ends with its error: another one goes on at the batch that it stopped in.
            start = places[0]
            self._slots.release(len(places))
            self._engine.close()
            self._engine = self._stream.open_engine()

    def _run_engine(self, start: Place, places: deque[Place], unusable: Unusable) -> None:
        """Make batches from `start` on. places: those that are taken and not yet delivered."""
        failure: list[Exception] = []

        def works() -> Iterator[Work]:
            # A failure here waits until the engine has given back the batches before it.
            try:
                for place in self._stream.places(start):
                    self._slots.acquire()
                    if self._stopping.is_set():
                        return
                    places.append(place)
                    yield self._stream.work(place, unusable)
            except Exception as error:
                failure.append(error)

        for executed in self._engine.run(works()):
            if self._stopping.is_set():
                return
            batch = self._stream.finish(executed)
            ready = None
            if self._stream.device.type == "cuda":
                ready = torch.cuda.Event()
                ready.record()
            self._ready.put(Delivery(places.popleft(), batch, ready))
            del executed, batch  # the consumer may drop it while the next one is being made
        if failure:
            raise failure[0]
        if not self._stopping.is_set():  # and after the last pass, where nobody asks for more
            raise LoaderError(f"the {self._engine.name} engine ended before its work did")
