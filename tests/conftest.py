"""What every test stands on: a cache of its own, so that no run leaves traces in the user's, and no
limit on the time that an example of Hypothesis takes."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A machine that is busy with something else makes no promise false.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Indexes of foreign data go to a temporary directory; subprocesses inherit it."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory))
        # numba's compiled kernels are worth keeping where a checkout cannot be written.
        if "NUMBA_CACHE_DIR" not in os.environ and not os.access(Path(__file__).parent, os.W_OK):
            patch.setenv("NUMBA_CACHE_DIR", str(directory / "numba"))
        yield directory


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """on_two_ranks(function, *arguments): what a function of two_ranks.py gives on each rank."""
    from tests.two_ranks import two_ranks

    with two_ranks(tmp_path_factory.mktemp("ranks")) as call:
        yield call


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with 60 training and 21 test images of three classes."""
    from tests.handmade_runs import make_images

    root = tmp_path_factory.mktemp("evaluate") / "colours"
    make_images(root / "train", 20, seed=0)
    make_images(root / "test", 7, seed=1)
    return root


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A run of dino with a small encoder, as training leaves it, but for what is not read here."""
    from tests.handmade_runs import make_finished_run

    directory = data.parent / "run"
    make_finished_run(directory, data)
    return directory
