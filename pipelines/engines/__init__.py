"""Engines execute a Plan: encoded bytes and drawn numbers in, uint8 views out.

An engine decides nothing. It gets `Work` (what `draw.draw` fixed, and the samples' bytes) and gives
`Batch`es in the same order, with uint8 views or, where it `finishes` them, finished ones.
`reference` says what every op means; the others are faster and are held to it, op by op. What an
engine cannot do it says before anything runs (`unsupported`), so that `choose` never picks it and
`open_engine` refuses it: never a silent difference.

Each module of this package is imported only when its engine is asked about. To add one: its name in
`EngineName`, and a module with

    unsupported(augmentation, device, approximate) -> list[str]
    finishes(augmentation, device, dtype) -> bool
    open_engine(augmentation, *, device, threads, finished, approximate) -> Engine
"""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.batch import Batch, Erased, Mixed
from headrace.pipelines.plan import Columns, Plan
from headrace.pipelines.recipe import Augmentation
from headrace.shards.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType

EngineName = Literal["fused", "dali", "reference", "synthetic"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

# What "auto" tries, first to last, by the type of the device that trains. "synthetic" is never in
# it: its pictures are not the data's.
PREFERENCE: dict[str, tuple[EngineName, ...]] = {
    "cuda": ("dali", "fused", "reference"),
    "cpu": ("fused", "reference"),
}


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
    labels: int64 [B], -1 where there is none.
    """

    plan: Plan
    encoded: list[NDArray[np.uint8]]
    labels: NDArray[np.int64]

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


def give_way() -> None:
    """Let threads that wait for the interpreter have it for a moment.

    They get it by themselves only every 5 ms (`sys.setswitchinterval`, which is the whole process's
    and not ours to change), and a thread that prepares a batch would keep all engine threads
    waiting meanwhile: with two of them that cost 4 % of the images/s. A sleep of 0 would not do:
    the thread would be back before the others are awake.
    """
    time.sleep(2e-5)


def _module(name: EngineName) -> "ModuleType":
    return import_module(f"headrace.pipelines.engines.{name}")


def _dali_is_installed() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def unsupported(
    name: EngineName,
    augmentation: Augmentation,
    device: torch.device | str = "cpu",
    approximate: Collection[Approximation] = (),
) -> list[str]:
    """Why engine `name` cannot run the recipe for `device`: sentences, none if it can."""
    if name == "dali" and not _dali_is_installed():
        return ["nvidia-dali is not installed (pip install 'headrace[dali]')"]
    return _module(name).unsupported(augmentation, torch.device(device), approximate)


def rejections(
    augmentation: Augmentation, device: torch.device | str = "cpu"
) -> dict[EngineName, list[str]]:
    """For each engine why it cannot run the recipe; an empty list where it can. For printing."""
    return {name: unsupported(name, augmentation, device) for name in ENGINES}


def choose(
    name: str,
    augmentation: Augmentation,
    device: torch.device | str = "cpu",
    approximate: Collection[Approximation] = (),
) -> EngineName:
    """The engine to open: `name` itself, or for "auto" the preferred one that can run the recipe.

    Raises Unsupported with every reason if the named engine, or none of the preferred ones, can.
    """
    kind = torch.device(device).type
    if name == "auto":
        reasons: list[str] = []
        for candidate in PREFERENCE.get(kind, PREFERENCE["cpu"]):
            found = unsupported(candidate, augmentation, device, approximate)
            if not found:
                return candidate
            reasons += [f"{candidate}: {reason}" for reason in found]
        raise Unsupported("; ".join(reasons), "auto")
    for known in ENGINES:
        if name == known:
            found = unsupported(known, augmentation, device, approximate)
            if found:
                raise Unsupported("; ".join(found), known)
            return known
    raise Unsupported(f"no engine has this name; there are auto, {', '.join(ENGINES)}", name)


def finishes(
    name: EngineName, augmentation: Augmentation, device: torch.device | str, dtype: torch.dtype
) -> bool:
    """Whether engine `name` can do `device_stage`'s work itself and hand out finished views."""
    return _module(name).finishes(augmentation, torch.device(device), dtype)


def open_engine(
    name: str,
    augmentation: Augmentation,
    *,
    device: torch.device | str = "cpu",
    threads: int = 1,
    finished: torch.dtype | None = None,
    approximate: Collection[Approximation] = (),
) -> Engine:
    """A new engine for the recipe: `name` as in `choose`, `threads` host threads at most.

    Views come out on the CPU, or for `dali` with a CUDA `device` on that device; uint8, or as
    `device_stage` would make them, of dtype `finished`, from an engine that `finishes` them.
    Raises Unsupported.
    """
    chosen = choose(name, augmentation, device, approximate)
    if finished is not None and not finishes(chosen, augmentation, device, finished):
        raise Unsupported(f"finishing this recipe's views as {finished}", chosen)
    return _module(chosen).open_engine(
        augmentation,
        device=torch.device(device),
        threads=threads,
        finished=finished,
        approximate=approximate,
    )
