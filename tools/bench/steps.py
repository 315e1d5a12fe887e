"""The steps of a benchmark, told on stderr as they begin, with the time that is left."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Steps:
    """A line on stderr per step. A kind of step lasts as long as those before it did."""

    def __init__(self, expected: Mapping[str, tuple[int, float]]) -> None:
        """expected: kind of step -> (how many, seconds of each as a first guess)."""
        self._left = {kind: count for kind, (count, _) in expected.items()}
        self._guess = {kind: seconds for kind, (_, seconds) in expected.items()}
        self._steps = sum(self._left.values())
        self._taken: dict[str, list[float]] = {kind: [] for kind in expected}

    @contextmanager
    def step(self, kind: str, what: str) -> Iterator[None]:
        done = self._steps - sum(self._left.values()) + 1
        left = sum(count * self._expected(kind) for kind, count in self._left.items())
        when = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
        say(f"[{done}/{self._steps}, about {when} left] {what}")
        started = time.monotonic()
        yield
        self._taken[kind].append(time.monotonic() - started)
        self._left[kind] -= 1

    def skip(self, kind: str, count: int) -> None:
        """These will not come."""
        self._left[kind] -= count

    def _expected(self, kind: str) -> float:
        taken = self._taken[kind]
        return sum(taken) / len(taken) if taken else self._guess[kind]


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)
