"""Schedules: pure functions of progress in [0, 1]. No counters, no state, nothing to resume."""

import math
from collections.abc import Sequence


def linear(progress: float, start: float, end: float) -> float:
    """`start` at 0, `end` at 1, straight in between; constant outside [0, 1]."""
    progress = min(max(progress, 0.0), 1.0)
    return start + (end - start) * progress


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` at 0 to `end` at 1 (Loshchilov & Hutter 2016, eq. 5)."""
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * (1.0 + math.cos(math.pi * progress)) / 2.0


def steps(progress: float, start: float, milestones: Sequence[float], factor: float) -> float:
    """`start`, multiplied by `factor` at each milestone that has been reached."""
    return start * factor ** sum(progress >= milestone for milestone in milestones)


def after_warmup(progress: float, warmup_fraction: float) -> float:
    """Progress of what follows a warm-up of `warmup_fraction` of the run: 0 at its end, 1 at 1."""
    if warmup_fraction >= 1.0:
        return 0.0
    return max(0.0, (progress - warmup_fraction) / (1.0 - warmup_fraction))


def warmup_cosine(
    progress: float, peak: float, final: float, warmup_fraction: float, start: float = 0.0
) -> float:
    """Linear from `start` to `peak` during the warm-up, then a cosine to `final`.

    A warm-up that is longer than the run (fraction > 1) is cut off where the run ends.
    """
    if progress < warmup_fraction:
        return linear(progress / warmup_fraction, start, peak)
    return cosine(after_warmup(progress, warmup_fraction), peak, final)
