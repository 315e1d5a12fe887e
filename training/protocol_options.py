"""The options of a protocol: every field of its `Options` becomes `--<name>.<field>`.

A field is a number, a string, a path, a truth value, a Literal of strings, several of one of these
(`tuple[float, ...]`) or one of these or None.
"""

import argparse
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from headrace.training.preset import ConfigError
from headrace.training.protocol import ProtocolDeclaration, ProtocolOptions

Value = TypeVar("Value")


def option(default: Value, help: str, *, also: str | None = None) -> Value:  # noqa: A002
    """A field of `Options` with what `--help` says of it. also: a second, shorter name for it."""
    return field(default=default, metadata={"help": help, "also": also})


def add_options(parser: argparse.ArgumentParser, protocol: ProtocolDeclaration) -> None:
    """A group of the parser, under the first paragraph of the protocol's docstring.

    Raises ConfigError for a field that no command line can give.
    """
    summary = protocol.description.partition("\n\n")[0]
    group = parser.add_argument_group(f"--protocol {protocol.name}", summary)
    for declared, kind in _fields(protocol):
        reading = _reading(kind)
        destination = _destination(protocol, declared)
        names = _names(destination, declared)
        if reading is None or declared.default is MISSING:
            raise ConfigError(
                f"--protocol {protocol.name}: {names[0]} is a {kind} and cannot be given on a "
                f"command line, or has no default"
            )
        meaning = f"{declared.metadata.get('help', '')}; default: {_shown(declared.default)}"
        try:
            group.add_argument(
                *names,
                dest=destination,
                default=declared.default,
                help=meaning.lstrip("; "),
                **reading,
            )
        except argparse.ArgumentError as error:
            raise ConfigError(f"--protocol {protocol.name}: {error}") from error


def options_of(protocol: ProtocolDeclaration, given: argparse.Namespace) -> ProtocolOptions:
    """The protocol's `Options` as the command line gave them.

    Raises UserError for values that mean nothing to the protocol.
    """
    values: dict[str, Any] = {}
    for declared, _ in _fields(protocol):
        value = getattr(given, _destination(protocol, declared))
        values[declared.name] = tuple(value) if isinstance(value, list) else value
    return protocol.options_class(**values)


def option_names(protocol: ProtocolDeclaration) -> set[str]:
    """Every option of a protocol, as a command line spells it."""
    names: set[str] = set()
    for declared, kind in _fields(protocol):
        spelled = _names(_destination(protocol, declared), declared)
        names.update(spelled, [f"--no-{spelled[0][2:]}"] if kind is bool else [])
    return names


def _names(destination: str, declared: "Field[Any]") -> list[str]:
    """Of one option: the name of its field, and a second one where it has that."""
    also = declared.metadata.get("also")
    return [f"--{destination.replace('_', '-')}", *([also] if also else [])]


def _fields(protocol: ProtocolDeclaration) -> "list[tuple[Field[Any], Any]]":
    """Every field with its type."""
    kinds = get_type_hints(protocol.options_class)
    return [(declared, kinds[declared.name]) for declared in fields(protocol.options_class)]


def _destination(protocol: ProtocolDeclaration, declared: "Field[Any]") -> str:
    return f"{protocol.name.rpartition('.')[2]}.{declared.name}"


def _reading(kind: Any) -> Mapping[str, Any] | None:
    """How argparse reads a field of this type; None where it cannot."""
    if get_origin(kind) in (Union, types.UnionType):
        inner = [entry for entry in get_args(kind) if entry is not type(None)]
        return _reading(inner[0]) if len(inner) == 1 else None
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        single = _reading(first)
        return None if rest != [...] or single is None else {**single, "nargs": "+"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind in (int, float):
        return {"type": kind, "metavar": "NUMBER"}
    return {"type": kind, "metavar": "TEXT"} if kind in (str, Path) else None


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
