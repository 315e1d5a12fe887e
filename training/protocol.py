"""The contract between evaluate.py and a protocol, a way to judge a trained encoder.

A protocol is one file, `training/protocols/<name>.py`, found by its name. It offers

    Options                     frozen dataclass: `--<name>.*` on the command line, derived from its
                                fields (`protocol_options.py`); refuses what means nothing when made
    Options.check(train, val)   refuses data sets that cannot be judged so, before anything is
                                computed; both are a Store
    judge(subject, options) -> Result

and knows neither the command line nor where results go; `evaluate.py` knows no protocol. A dotted
name (`--protocol my_package.my_protocol`) loads a file from outside the repository; its options
bear the last part of that name.

`judge` runs on every rank and gives every rank the same. It takes from the subject what it needs:
features of a split, which all protocols of one run of evaluate.py share, the encoder itself, or the
images.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from headrace.shards.errors import UserError
from headrace.shards.store import Store
from headrace.training.catalogue import declared_module, find_module, names_in
from headrace.training.preset import ConfigError

if TYPE_CHECKING:  # what loads torch, for which help and mistakes should not wait
    from torch import nn

    from headrace.pipelines.loader import Loader
    from headrace.training.features import FeaturePass, Features
    from headrace.training.world import World

Split = Literal["train", "val"]
IDENTIFIERS_FROM = 10
"""Labels whose largest is above so many times the number of those that occur are identifiers."""


class ProtocolError(UserError):
    """Options, features or labels that a protocol cannot judge: says what is missing."""


class ProtocolOptions(Protocol):
    """What `Options` is besides a frozen dataclass."""

    def check(self, train: Store, val: Store) -> None:
        """Raises ProtocolError for data sets that cannot be judged so."""
        ...


class Result(Protocol):
    """What a protocol found."""

    def shown(self) -> str:
        """For people: one line or several."""
        ...

    def stored(self) -> dict[str, Any]:
        """JSON-ready: entries of the object that `--json` writes, under names of the protocol's."""
        ...


@dataclass
class Subject:
    """What is judged. Every rank has one, and all ranks ask for the same in the same order.

    encoder: [B, 3, H, W] -> [B, D] on `world.device`. passes: over the labelled images of each
    split, in the test view of the run. seconds: what took how long.
    """

    encoder: "nn.Module"
    passes: "Mapping[Split, FeaturePass]"
    world: "World"
    seconds: dict[str, float] = field(default_factory=dict)
    _features: "dict[Split, Features]" = field(default_factory=dict, repr=False)

    def features(self, split: Split) -> "Features":
        """This rank's share of the encoder's features; taken once, then remembered."""
        from headrace.training.features import extract

        if split not in self._features:
            with self.timed(f"{split}_features"):
                self._features[split] = extract(
                    self.encoder, self.passes[split], progress=f"features of {split}"
                )
        return self._features[split]

    def images(self, split: Split) -> "Loader":
        """This rank's share of the images, once: a context manager over batches."""
        return self.passes[split].loader()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Notes the seconds inside under `name`, without those that are noted inside of it."""
        started, noted = time.perf_counter(), sum(self.seconds.values())
        yield
        noted_inside = sum(self.seconds.values()) - noted
        self.seconds[name] = time.perf_counter() - started - noted_inside


@dataclass(frozen=True)
class ProtocolDeclaration:
    """What a protocol's file declares, found and checked. name: as --protocol has it."""

    name: str
    description: str
    options_class: type[Any]


@dataclass(frozen=True)
class ProtocolModule(ProtocolDeclaration):
    """All that a protocol's file offers."""

    judge: Callable[[Subject, Any], Result]


def find_protocol(name: str) -> ProtocolModule:
    """What training/protocols/<name>.py offers, or any importable module by dotted name.

    Raises ConfigError, listing what exists, for an unknown name, and for a module that is no
    protocol.
    """
    module = find_module("--protocol", name, "protocols")
    declaration = _offered(name, module, ("Options", "judge"))
    return ProtocolModule(**vars(declaration), judge=module.judge)


def find_protocol_declaration(name: str) -> ProtocolDeclaration:
    """The same without importing what the protocol computes with; raises the same."""
    module = declared_module("--protocol", name, "protocols", ("Options",))
    try:
        return _offered(name, module, ("Options",))
    except ConfigError:
        return find_protocol(name)  # the whole file knows best what is wrong with it


def _offered(name: str, module: ModuleType, required: tuple[str, ...]) -> ProtocolDeclaration:
    missing = [part for part in required if not hasattr(module, part)]
    options_class: type[Any] = getattr(module, "Options", object)
    if not missing and not (is_dataclass(options_class) and hasattr(options_class, "check")):
        missing = ["dataclass Options with a method check"]
    if missing:
        raise ConfigError(f"--protocol {name}: {module.__file__} has no {' and no '.join(missing)}")
    return ProtocolDeclaration(
        name=name, description=(module.__doc__ or "").strip(), options_class=options_class
    )


def protocol_names() -> list[str]:
    """The protocols that are files of training/protocols."""
    return names_in("protocols")


# ----------------------------------------------------------- of protocols that measure accuracy


@dataclass(frozen=True)
class Accuracy:
    """In percent of the test samples."""

    top1: float
    top5: float


def totals(values: list[int], world: "World") -> list[int]:
    """Sums over all ranks."""
    import torch

    from headrace.training.collectives import sum_over_ranks_

    return sum_over_ranks_(torch.tensor(values, device=world.device)).tolist()


def with_class_numbers(train: "Features", test: "Features") -> "tuple[Features, Features, int]":
    """Both with labels that are class numbers, and the number of classes; the same on every rank.

    Labels of which at most one in ten occurs are identifiers, and numbered in ascending order: what
    is sized by the number of classes would be sized by the largest identifier. Others stay.
    """
    import torch

    from headrace.training.collectives import gather_objects

    here = torch.cat([train.labels, test.labels]).unique().tolist()
    occurring = sorted({label for labels in gather_objects(here) for label in labels})
    classes = occurring[-1] + 1
    if classes <= IDENTIFIERS_FROM * len(occurring):
        return train, test, classes
    known = torch.tensor(occurring, device=train.labels.device)
    train = train._replace(labels=torch.searchsorted(known, train.labels))
    test = test._replace(labels=torch.searchsorted(known, test.labels))
    return train, test, len(occurring)


def problem_of(share: "Features", name: str, samples: int, world: "World") -> str | None:
    """What keeps features from being judged, for a sentence; None where nothing does.

    share: this rank's. name: "training" or "test". samples: over all ranks. The same on every rank.
    """
    if samples == 0:
        return f"there are no {name} samples"
    missing, broken = totals(
        [
            int((share.labels < 0).sum()),
            int((~share.features.isfinite().all(dim=1)).sum()),
        ],
        world,
    )
    if missing:
        return (
            f"the class of every image is needed, and {missing:,} of the {samples:,} {name} images "
            f"have none"
        )
    if broken:
        return (
            f"the encoder's features of {broken:,} of the {samples:,} {name} images are not finite"
        )
    return None
