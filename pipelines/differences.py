"""What differs between two fingerprints, for people to read."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_ABSENT = "(absent)"


def differences(old: Any, new: Any) -> list[str]:
    """What differs between two JSON values: "order.seed was 1 and is 2" by dotted key, sorted."""
    was, now = dict(_leaves(old, "")), dict(_leaves(new, ""))
    return [
        f"{key} was {_shown(was, key)} and is {_shown(now, key)}"
        for key in sorted(was.keys() | now.keys())
        if key not in was or key not in now or was[key] != now[key]
    ]


def plain(value: Any) -> Any:
    """As it comes back from a JSON file: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    match value:
        case dict() if value:
            for key, inner in value.items():
                yield from _leaves(inner, f"{path}.{key}" if path else key)
        case list() if value:
            for index, inner in enumerate(value):
                yield from _leaves(inner, f"{path}.{index}")
        case _:
            yield path, value


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else _ABSENT
