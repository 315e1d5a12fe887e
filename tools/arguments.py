"""What the scripts' options may be: parsers for argparse that say in one sentence what is wrong."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from headrace.shards.local import local

Value = TypeVar("Value")
Name = TypeVar("Name", bound=str)


def whole(low: int, high: int | None = None, multiple: int = 1) -> Callable[[str], int]:
    """A whole number from `low` to `high`, both included, and a multiple of `multiple`."""
    kind = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        fits = text.isdecimal() and int(text) >= low and int(text) % multiple == 0
        if not fits or (high is not None and int(text) > high):
            raise ArgumentTypeError(f"{text!r} is not {kind} {bounds}")
        return int(text)

    return parse


positive = whole(1)


def decimal(allowed: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """A number that fits; `allowed` says in words which ones do."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not fits(value):
            raise ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


def several(parse: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """What `parse` takes, with commas between."""

    def parse_all(text: str) -> list[Value]:
        values = [parse(part) for part in text.split(",") if part]
        if not values:
            raise ArgumentTypeError(f"{text!r} names nothing")
        return values

    return parse_all


def some_of(available: Sequence[Name]) -> Callable[[str], list[Name]]:
    """Some of these names with commas between, each once, in the order given."""

    def parse(text: str) -> list[Name]:
        chosen = dict.fromkeys(text.split(","))
        if unknown := [name for name in chosen if name not in available]:
            raise ArgumentTypeError(f"no {unknown[0]!r} here, only {', '.join(available)}")
        return [available[available.index(name)] for name in chosen]

    return parse


def png(text: str) -> Path:
    """The name of a picture to write."""
    local(text)
    if Path(text).suffix.lower() != ".png":
        raise ArgumentTypeError(f"{text!r} does not end in .png, and a PNG is what is written")
    return Path(text)
