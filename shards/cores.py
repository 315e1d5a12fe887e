"""How many cores a process may use, and its share of a machine's."""

import os


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_rank(cores: int, local_world_size: int) -> int:
    """An engine's threads where `local_world_size` ranks share a machine: no core is taken twice.

    What is left over stays idle for the ranks' own threads; with more ranks than cores it is 1.
    """
    return max(1, cores // local_world_size)
