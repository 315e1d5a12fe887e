"""A run's directory, made and held by the one run that writes there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from headrace.shards.atomic import PARTIAL_SUFFIX
from headrace.shards.lock import HeldError, held
from headrace.training.collectives import from_main
from headrace.training.run.directory import LOCK_FILE, CheckpointError


@contextmanager
def locked(directory: Path) -> Iterator[Path]:
    """Make and hold a run's directory; the lock ends with this process, however that ends.

    Raises CheckpointError on every rank where another process holds it.
    """
    with ExitStack() as stack:
        from_main(lambda: _lock(directory, stack))
        yield directory


def _lock(directory: Path, stack: ExitStack) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stack.enter_context(held(directory / LOCK_FILE))
    except HeldError as error:
        raise CheckpointError(
            f"{directory} is being written by process {error.holder}: end it, or choose another "
            f"--run.out"
        ) from error
    except OSError as error:
        raise CheckpointError(f"--run.out {directory} cannot be written: {error}") from error
    # Nobody else writes here now, so these are what a killed run was in the middle of.
    for leftover in directory.glob(f".*{PARTIAL_SUFFIX}"):
        leftover.unlink()
