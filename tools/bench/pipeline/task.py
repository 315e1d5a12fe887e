"""What the parts of `bench_pipeline.py` say to each other: one row's task, and who carries it out.

A row is one engine on one recipe with one number of threads and one kind of output. It lives in a
process of its own, which gets the task as JSON and opens the row's `Contender`.
"""

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

Output = Literal["float32", "uint8"]
RecipeName = Literal["dino", "simclr", "mae", "deit"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)

OWN_ENGINES = ("fused", "dali", "reference")
PEERS = ("torchvision", "dali_native", "ffcv", "webdataset")
# `decode` is the ceiling: the JPEGs decoded and nothing else. `dali_reader` is the dali engine
# whose bytes come from DALI's own reader instead of our store. Both are measured unasked.
DECODE, DALI_READER = "decode", "dali_reader"

# Module of `open_contender(task) -> Contender`, by engine; imported by the row's process alone.
MODULES = {
    DECODE: "headrace.tools.bench.pipeline.decode",
    **dict.fromkeys((*OWN_ENGINES, DALI_READER), "headrace.tools.bench.pipeline.own_engines"),
    **dict.fromkeys(("torchvision", "webdataset"), "headrace.tools.bench.pipeline.peer_torch"),
    "dali_native": "headrace.tools.bench.pipeline.peer_dali",
    "ffcv": "headrace.tools.bench.pipeline.peer_ffcv",
}

# Sides in pixels of what a recipe makes of one image, in the order of its views.
VIEW_SIDES: dict[RecipeName, tuple[int, ...]] = {
    "dino": (224,) * 2 + (96,) * 8,
    "simclr": (224,) * 2,
    "mae": (224,),
    "deit": (224,),
}

Views = Sequence[Sized]


class CannotExpress(Exception):
    """This engine has no way to run this row; says in one sentence what is missing."""


@dataclass(frozen=True)
class Task:
    """One row, and where the images are in the form that its engine reads.

    samples: the first so many of the store, a whole number of batches. folder: class folders, tars:
    WebDataset shards in id order, beton: an FFCV file; all hold these samples with their original
    bytes, or are empty where no row of the run reads them.
    """

    engine: str
    recipe: RecipeName
    threads: int
    output: Output
    batch_size: int
    store: str
    samples: int
    folder: str = ""
    tars: tuple[str, ...] = ()
    beton: str = ""

    @property
    def called(self) -> str:
        """For people."""
        plural = "s" if self.threads > 1 else ""
        return f"{self.engine} on {self.recipe}, {self.threads} thread{plural}, {self.output}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        return cls(**{**fields, "tars": tuple(fields["tars"])})


@dataclass(frozen=True)
class Contender:
    """A running pipeline.

    batches: endless; each item holds the views of one batch, [B, 3, H, W] tensors in the order of
    `VIEW_SIDES`. ready_ahead: batches that may lie finished when it was left alone for a while;
    they are taken before time is measured. together: batches that become ready at the same time,
    one per worker process; only whole numbers of them are counted. notes: where the row does less
    than the recipe, or other things; for the table. draw: seconds of CPU time per image for drawing
    plans alone, measured for about so many seconds; None for whom that means nothing. profile: the
    share of CPU time that the interpreter takes, likewise.
    """

    batches: Iterator[Views]
    ready_ahead: int
    close: Callable[[], None]
    together: int = 1
    notes: tuple[str, ...] = ()
    draw: Callable[[float], float] | None = None
    profile: Callable[[float], float] | None = None
