"""Order, store, plan and engine, run ahead of training: the loop that training iterates.

One worker thread per loader walks the order from the current position, reads the samples' bytes,
draws their Plan, has the engine execute it, normalises on the consumer's device and keeps a few
finished batches ready, across the end of an epoch too. What a batch holds is a function of
(seed, epoch, position); how many batches are ready, how many threads work and when the consumer
comes changes nothing but `wait_seconds`.

The state is what was *delivered*: prefetched batches are thrown away by a resume and made again.
"""

import copy
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.pipelines.approximation import APPROXIMATIONS, Approximation
from headrace.pipelines.batch import Batch
from headrace.pipelines.components import open_components
from headrace.pipelines.differences import differences, plain
from headrace.pipelines.draw import PLAN_VERSION
from headrace.pipelines.engines import Engine, choose
from headrace.pipelines.faults import OnError
from headrace.pipelines.order import Order, OrderError, Part, Shuffle
from headrace.pipelines.recipe import Augmentation
from headrace.pipelines.stream import LoaderError, Place, Stream, Worker, receive, require
from headrace.pipelines.table import Table, make_table
from headrace.shards.cores import usable_cores
from headrace.shards.store import Store

__all__ = ["Loader", "LoaderError", "open_loader"]

_DIFFERENCES_SHOWN = 5


class Loader:
    """One rank's batches, for ever, an epoch per iteration. Made by `open_loader`.

        with open_loader(store, augmentation, batch_size=256) as loader:
            for batch in loader: ...            # to the end of the current epoch
            for batch in loader: ...            # the next epoch, already prefetched

    Leaving an iteration early keeps the place: the next one goes on there. `close` (or leaving the
    `with`) ends the worker; so does dropping the last reference. Batches are the caller's to keep
    and change: none aliases another or the loader. For one consuming thread.

    engine_name: the engine that was chosen. steps_per_epoch: global batches in an epoch; each is
    `accumulate` items. `len(loader)`: items that this rank gets in a whole epoch, which in an
    evaluation (drop_last=False) may be one less on ranks that the last batch has no sample for.
    wait_seconds: host time spent blocked for batches, in all. fingerprint: JSON-ready, all that
    determines the stream.
    """

    def __init__(self, stream: Stream, engine: Engine) -> None:
        self._stream = stream
        self._idle_engine: Engine | None = engine
        self._next = Place(0, 0, 0)
        self._worker: Worker | None = None
        self._finalizer: weakref.finalize[Any, Loader] | None = None
        self._closed = False
        self._digests: dict[int, str | None] = {}  # of epochs with a table
        self.wait_seconds = 0.0
        self.engine_name = stream.engine_name
        self.steps_per_epoch = stream.order.steps_per_epoch
        self.fingerprint: dict[str, Any] = plain(
            {
                "store": stream.store.fingerprint,
                "order": stream.order.declaration(),
                "plan": {"version": PLAN_VERSION},
                "augmentation": stream.augmentation.declaration(),
                "engine": {"name": engine.name, "approximations": sorted(engine.approximations)},
                **stream.component_fingerprints,
            }
        )

    def __len__(self) -> int:
        return self._stream.rank_steps() * self._stream.accumulate

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch. Raises what the worker met, as it was raised there.

        Raises LoaderError after the last of a limited number of passes.
        """
        epoch, passes = self._next.epoch, self._stream.passes
        require(
            passes is None or epoch < passes,
            f"this loader was opened with passes={passes}, and they are over: open another one",
        )
        while self._next.epoch == epoch:
            if self._next.step >= self._stream.rank_steps():
                self._next = Place(epoch + 1, 0, 0)
                return
            yield self._take()

    def _take(self) -> Batch:
        require(not self._closed, "this loader is closed; open another one")
        started = time.perf_counter()
        if self._worker is None:
            self._worker = self._new_worker()
        try:
            place, batch, ready = self._worker.take()
        except BaseException:
            self._halt()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - started
        epoch, step, part = place
        if part + 1 < self._stream.accumulate:
            self._next = Place(epoch, step, part + 1)
        elif step + 1 < self.steps_per_epoch:
            self._next = Place(epoch, step + 1, 0)
        else:
            self._next = Place(epoch + 1, 0, 0)
        return receive(batch, ready, self._stream.device)

    def _new_worker(self) -> Worker:
        engine, self._idle_engine = self._idle_engine, None
        worker = Worker(self._stream, engine or self._stream.open_engine(), self._next)
        self._finalizer = weakref.finalize(self, worker.stop)
        return worker

    def use_table(self, ids: NDArray[np.int64] | None) -> None:
        """Let `ids` [n] be this epoch's order, by position; None: the order's own.

        For the current epoch alone, before its first batch is taken or, to go on in the middle of
        an epoch, before load_state_dict. n is at least the epoch's length, what is beyond is
        dropped, and ids may repeat: see `table.make_table`. Batches that were prefetched in another
        order are thrown away. Every rank gives the same ids.
        Raises LoaderError for an epoch that has begun and a table that does not fit the order.
        """
        epoch, step, part = self._next
        require(
            step == part == 0,
            f"a table is the order of a whole epoch, and {step} steps of epoch {epoch} were "
            f"delivered in another one",
        )
        try:
            table = None if ids is None else make_table(self._stream.order, epoch, ids)
        except OrderError as error:
            raise LoaderError(f"{self._stream.store.uri}: {error}") from error
        self._digests = {epoch - 1: self._digests.get(epoch - 1), epoch: _digest(table)}
        if _digest(table) != _digest(self._table):
            self._halt()
            self._stream = replace(self._stream, table=table)

    @property
    def _table(self) -> Table | None:
        """The current epoch's."""
        table = self._stream.table
        return table if table is not None and table.epoch == self._next.epoch else None

    def _halt(self) -> None:
        if self._finalizer is not None:
            self._finalizer()  # stops the worker, once
        self._worker = self._finalizer = None

    def close(self) -> None:
        """End the worker thread and the engine. The state can still be read. May be repeated."""
        self._closed = True
        self._halt()
        if self._idle_engine is not None:
            self._idle_engine.close()
            self._idle_engine = None

    def state_dict(self, at: tuple[int, int] | None = None) -> dict[str, Any]:
        """{"epoch", "position", "table", "fingerprint"}: where the next step starts; JSON-ready.

        position: samples of the epoch's global order whose steps were delivered. After an epoch's
        last step it is position 0 of the next epoch. table: sha256 of the epoch's table, or None.
        at: (epoch, step) of a step that was delivered, to go on there and deliver it again.
        Raises LoaderError between the micro-batches of a step, unless `at` is given.
        """
        epoch, step, part = self._next if at is None else Place(*at, 0)
        require(
            part == 0,
            f"micro-batch {part} of {self._stream.accumulate} of step {step} was delivered: "
            f"a state is taken between steps",
        )
        table = _digest(self._table) if epoch == self._next.epoch else self._digests.get(epoch)
        return {
            "epoch": epoch,
            "position": step * self._stream.order.batch_size,
            "table": table if at is None or step > 0 else None,
            "fingerprint": copy.deepcopy(self.fingerprint),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, with any world size, accumulation or thread count.

        The table of an epoch that had one is given to `use_table` before; where the epoch has yet
        to begin, that may also come afterwards.
        Raises LoaderError, changing nothing, for a state of another stream: it names what differs.
        """
        try:
            epoch, position = int(state["epoch"]), int(state["position"])
            theirs = state["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise LoaderError(f"this is no state of a loader: {error!r}") from error
        changes = differences(plain(theirs), self.fingerprint)
        more = len(changes) - _DIFFERENCES_SHOWN
        require(
            not changes,
            "the state belongs to another stream of samples: "
            + "; ".join(changes[:_DIFFERENCES_SHOWN])
            + (f"; and {more} more" if more > 0 else ""),
        )
        order = self._stream.order
        step, rest = divmod(position, order.batch_size)
        require(
            epoch >= 0 and rest == 0 and 0 <= step < order.steps_per_epoch,
            f"epoch {epoch}, position {position} is no start of a step: epochs have "
            f"{order.epoch_length} positions in batches of {order.batch_size}",
        )
        table, theirs, ours = self._table, state.get("table"), _digest(self._table)
        if theirs is None and step == 0:
            table = None  # nothing of that epoch was delivered in any order
        else:
            require(
                theirs == ours,
                f"the state was taken in an epoch ordered by {_named(theirs)}, and this loader has "
                f"{_named(ours)}: give use_table the ids of that epoch first",
            )
        self._halt()
        self._next = Place(epoch, step, 0)
        self._digests = {epoch: _digest(table)}
        self._stream = replace(
            self._stream, table=None if table is None else replace(table, epoch=epoch)
        )


def _digest(table: Table | None) -> str | None:
    return None if table is None else table.digest


def _named(digest: str | None) -> str:
    return "no table" if digest is None else f"the table {digest[:12]}"


def open_loader(
    store: Store,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int = 0,
    engine: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    shuffle: Shuffle = "full",
    window_shards: int = 16,
    drop_last: bool = True,
    holdout: float = 0.0,
    part: Part = "train",
    subset: NDArray[np.int64] | None = None,
    occurrences: int = 1,
    keep_length: bool = False,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    threads: int | None = None,
    prefetch: int = 2,
    passes: int | None = None,
    stage: bool = True,
    approximate: tuple[Approximation, ...] = (),
    on_error: OnError = "raise",
) -> Loader:
    """A Loader of `augmentation`'s views of the store's samples, for one rank.

    batch_size: samples in a *global* batch, divided among `world_size` ranks and `accumulate`
    micro-batches. seed, shuffle, window_shards, drop_last, holdout, part, subset, occurrences,
    keep_length: see `order.Order`. For evaluation shuffle="none", drop_last=False: every sample
    once, no padding; the last batch may be shorter, also by rank, and a rank without a sample in it
    gets none.
    engine: "auto" or a name in `engines.ENGINES`. device, dtype: of the finished views.
    threads: host threads of the engine, by default all cores of this process (give a rank its
    share where several run on a machine). prefetch: finished batches kept ready, 1 or more; at most
    prefetch + 1 exist at any time between the reading of their bytes and their delivery.
    passes: how many epochs there are, None for no end: nothing is read or made beyond the last
    one, and iterating after it raises LoaderError. It counts from epoch 0, also after a resume.
    stage: False leaves the views uint8, neither erased nor mixed.
    approximate: names in `approximation.APPROXIMATIONS` of differences from `reference` that the
    engine may make where it has nothing better; those that it makes enter the fingerprint.
    on_error: what becomes of a sample that cannot be read or decoded: "raise" ends the iteration;
    "report" and "replace" go on, as `faults` says, and the batch names it in `Batch.faults`. No
    part of the fingerprint.
    Raises LoaderError for what cannot be delivered, Unsupported for what no engine can run,
    ShardError where the data set lacks a component that the recipe asks for.
    """
    target = torch.device(device)
    if target.type == "cuda":
        require(torch.cuda.is_available(), f"device {target}: torch finds no CUDA device")
        if target.index is None:  # the worker thread has a current device of its own
            target = torch.device("cuda", torch.cuda.current_device())
    require(len(store) > 0, f"{store.uri} has no samples")
    for name in approximate:
        require(
            name in APPROXIMATIONS,
            f"approximate names {name!r}; there are {', '.join(APPROXIMATIONS)}",
        )
    try:
        order = Order(
            samples=len(store),
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            occurrences=occurrences,
            keep_length=keep_length,
            window_shards=window_shards if shuffle == "window" else 0,
            shard_starts=store.shard_starts if shuffle == "window" else None,
            holdout=holdout,
            part=part,
            subset=subset,
            drop_last=drop_last,
        )
    except OrderError as error:
        raise LoaderError(f"{store.uri}: {error}") from error
    stream = Stream(
        store=store,
        augmentation=augmentation,
        order=order,
        engine_name=choose(engine, augmentation, target, approximate),
        rank=rank,
        world_size=world_size,
        accumulate=accumulate,
        device=target,
        dtype=dtype,
        threads=usable_cores() if threads is None else threads,
        prefetch=prefetch,
        passes=passes,
        stage=stage,
        approximate=approximate,
        components=open_components(store, augmentation),
        on_error=on_error,
    )
    return Loader(stream, stream.open_engine())
