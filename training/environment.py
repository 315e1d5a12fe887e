"""What a launcher tells the processes that it starts, read without torch."""

import os


def rank_from_environment() -> int:
    """The rank that torchrun gave, before anything is joined; 0 for a process by itself."""
    return int(os.environ.get("RANK", "0"))


def is_launched() -> bool:
    """Whether a launcher started this process, as one of several or alone."""
    return "LOCAL_RANK" in os.environ
