"""Paths as they are written on a command line: globs, and braces such as x-{000..012}.tar."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from headrace.shards.index import ShardError

_PATTERN = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def is_pattern(text: str) -> bool:
    """Whether a text may stand for several paths."""
    return bool(_PATTERN.search(text))


def expand(pattern: str) -> Iterator[Path]:
    """The files of a pattern: brace alternatives in their order, each a path or a glob."""
    for alternative in _expand_braces(pattern):
        if os.path.exists(alternative):
            yield Path(alternative)
            continue
        matches = sorted(glob.glob(alternative))
        if not matches:
            raise ShardError(f"{alternative} does not exist; {pattern} names it")
        yield from map(Path, matches)


def _expand_braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, alternatives = match.groups()
    if alternatives is not None:
        choices = alternatives.split(",")
    elif int(first) <= int(last):
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        raise ShardError(f"{pattern}: the range {match[0]} runs backwards")
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
