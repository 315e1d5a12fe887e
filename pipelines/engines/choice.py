"""Which engine runs a recipe: all of them by name, what they cannot do, and the one that is opened.

An engine's module is imported only when it is asked about.
"""

from collections.abc import Collection
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Literal, assert_never, get_args

import torch

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.engines.contract import Engine, EngineKind, Unsupported
from headrace.pipelines.recipe import Augmentation

EngineName = Literal["fused", "dali", "reference", "synthetic"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

# What "auto" tries, first to last, by the type of the device that trains. "synthetic" is never in
# it: its pictures are not the data's.
PREFERENCE: dict[str, tuple[EngineName, ...]] = {
    "cuda": ("dali", "fused", "reference"),
    "cpu": ("fused", "reference"),
}


def _kind(name: EngineName) -> EngineKind:
    match name:
        case "fused":
            from headrace.pipelines.engines.fused import Fused

            return Fused()
        case "dali":
            from headrace.pipelines.engines.dali import Dali

            return Dali()
        case "reference":
            from headrace.pipelines.engines.reference import Reference

            return Reference()
        case "synthetic":
            from headrace.pipelines.engines.synthetic import Synthetic

            return Synthetic()
        case _:
            assert_never(name)


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
    return _kind(name).unsupported(augmentation, torch.device(device), approximate)


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
    if name == "auto":
        rejected: list[str] = []
        for candidate in PREFERENCE.get(torch.device(device).type, PREFERENCE["cpu"]):
            reasons = unsupported(candidate, augmentation, device, approximate)
            if not reasons:
                return candidate
            rejected += [f"{candidate}: {reason}" for reason in reasons]
        raise Unsupported("; ".join(rejected), "auto")
    for engine in ENGINES:
        if name == engine:
            reasons = unsupported(engine, augmentation, device, approximate)
            if reasons:
                raise Unsupported("; ".join(reasons), engine)
            return engine
    near = get_close_matches(name, ENGINES, n=1)
    hint = f": did you mean {near[0]}?" if near else f"; there are auto, {', '.join(ENGINES)}"
    raise Unsupported(f"no engine has this name{hint}", name)


def finishes(
    name: EngineName, augmentation: Augmentation, device: torch.device | str, dtype: torch.dtype
) -> bool:
    """Whether engine `name` can do `device_stage`'s work itself and hand out finished views."""
    return _kind(name).finishes(augmentation, torch.device(device), dtype)


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
    return _kind(chosen).open(
        augmentation,
        device=torch.device(device),
        threads=threads,
        finished=finished,
        approximate=approximate,
    )
