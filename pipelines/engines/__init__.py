"""Engines execute a Plan: encoded bytes and drawn numbers in, uint8 views out.

    from headrace.pipelines.engines import open_engine

`reference` says what every op means; the others are faster and are held to it, op by op. What an
engine cannot do it says before anything runs (`unsupported`), so that `choose` never picks it and
`open_engine` refuses it: never a silent difference. `contract` has what an engine is, `choice`
which one runs a recipe; README.md beside this file says how to add one.
"""

from headrace.pipelines.engines.choice import (
    ENGINES,
    PREFERENCE,
    EngineName,
    choose,
    finishes,
    open_engine,
    rejections,
    unsupported,
)
from headrace.pipelines.engines.contract import (
    Engine,
    EngineKind,
    SampleError,
    Unsupported,
    Work,
)

__all__ = [
    "ENGINES",
    "PREFERENCE",
    "Engine",
    "EngineKind",
    "EngineName",
    "SampleError",
    "Unsupported",
    "Work",
    "choose",
    "finishes",
    "open_engine",
    "rejections",
    "unsupported",
]
