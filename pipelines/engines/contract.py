"""What an engine is given, what it gives back, and what it says of itself before it is opened.

An engine decides nothing. It gets `Work` (what `draw.draw` fixed, and the samples' bytes) and gives
`Batch`es in the same order, with uint8 views or, where it `finishes` them, finished ones.
"""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.batch import Batch, Erased, Mixed
from headrace.pipelines.faults import Fault
from headrace.pipelines.plan import Columns, Plan
from headrace.pipelines.recipe import Augmentation
from headrace.shards.errors import UserError


class Unsupported(UserError):
    """An engine was asked for something that it cannot do exactly.

    what: the op, its field or the missing requirement, in words. engine: the engine's name.
    """

    def __init__(self, what: str, engine: str) -> None:
        super().__init__(f"the {engine} engine cannot run this: {what}")
        self.what = what
        self.engine = engine

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.engine)


class SampleError(UserError):
    """One sample could not be turned into pixels. The loader adds the sample's name.

    sample_id: its place in the store. reason: what the decoder said.
    """

    def __init__(self, sample_id: int, reason: str) -> None:
        super().__init__(f"sample {sample_id} cannot be decoded: {reason}")
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.sample_id, self.reason)


@dataclass(frozen=True)
class Work:
    """One (micro-)batch before it is executed; B = samples in it, 1 or more, may vary.

    plan: ids, sizes and every random number of the B samples.
    encoded: B read-only uint8 [bytes] arrays, JPEG, PNG or PNM P6, valid until the Batch is out.
    labels: int64 [B], -1 where there is none. faults: for the Batch.
    """

    plan: Plan
    encoded: list[NDArray[np.uint8]]
    labels: NDArray[np.int64]
    faults: tuple[Fault, ...] = ()

    def batch(self, views: tuple[torch.Tensor, ...]) -> Batch:
        """The finished Batch: `views` ([B, 3, H, W] channels_last) with the plan's rest."""
        labels = torch.tensor(self.labels, dtype=torch.int64)
        return Batch(
            views=views,
            labels=labels,
            ids=torch.tensor(self.plan.ids, dtype=torch.int64),
            masks=tuple(
                None if view.mask is None else torch.tensor(view.mask, dtype=torch.bool)
                for view in self.plan.views
            ),
            epoch=self.plan.epoch,
            position=self.plan.position,
            draws={name: torch.tensor(values) for name, values in self.plan.draws.items()},
            erased=tuple(_erased(view.erase) for view in self.plan.views),
            mixed=_mixed(self.plan.mix, labels),
            faults=self.faults,
        )


def _erased(columns: Columns) -> Erased | None:
    if not columns:
        return None
    color, key = columns.get("color"), columns.get("key")
    return Erased(
        boxes=torch.tensor(columns["box"]),
        colors=None if color is None else torch.tensor(color),
        keys=None if key is None else torch.tensor(key.view(np.int64)),
    )


def _mixed(columns: Columns, labels: torch.Tensor) -> Mixed | None:
    if not columns:
        return None
    partners = torch.arange(len(labels)) + torch.tensor(columns["partner"], dtype=torch.int64)
    return Mixed(
        partners=partners,
        labels=labels[partners],
        weights=torch.tensor(columns["weight"]),
        boxes=torch.tensor(columns["box"]),
    )


class Engine(Protocol):
    """Executes work for one augmentation. Made by `open_engine`, used by one thread, run once.

    name: as in ENGINES. approximations: known differences from `reference` that were asked for and
    are made, by name; they enter the fingerprint.
    """

    @property
    def name(self) -> str: ...

    @property
    def approximations(self) -> tuple[str, ...]: ...

    def run(self, work: Iterator[Work]) -> Iterator[Batch]:
        """One Batch per Work, in order, with a bounded number of Works taken ahead.

        `work` may be endless. Closing the returned generator abandons what is in flight. No tensor
        that was yielded aliases memory that the engine uses again.
        Raises SampleError where a sample cannot be decoded; what `work` raises comes through.
        """
        ...

    def close(self) -> None:
        """Free threads and memory. May be called twice, and in the middle of a run."""
        ...


class EngineKind(Protocol):
    """An engine that is not open: what it can do, and how it is opened. Has no state.

    device: where the views are wanted. approximate: the known differences that were asked for.
    """

    def unsupported(
        self,
        augmentation: Augmentation,
        device: torch.device,
        approximate: Collection[Approximation],
    ) -> list[str]:
        """Why it cannot run the recipe for `device`: sentences, none if it can."""
        ...

    def finishes(
        self, augmentation: Augmentation, device: torch.device, dtype: torch.dtype
    ) -> bool:
        """Whether it can do `device_stage`'s work itself and hand out finished views."""
        ...

    def open(
        self,
        augmentation: Augmentation,
        *,
        device: torch.device,
        threads: int,
        finished: torch.dtype | None,
        approximate: Collection[Approximation],
    ) -> Engine:
        """A new engine with `threads` host threads of its own, for a recipe that it supports.

        finished: of which dtype views come out, where it `finishes` them; None for uint8.
        """
        ...


def give_way() -> None:
    """Let threads that wait for the interpreter have it for a moment.

    They get it by themselves only every 5 ms (`sys.setswitchinterval`, which is the whole process's
    and not ours to change), and a thread that prepares a batch would keep all engine threads
    waiting meanwhile: with two of them that cost 4 % of the images/s. A sleep of 0 would not do:
    the thread would be back before the others are awake.
    """
    time.sleep(2e-5)
