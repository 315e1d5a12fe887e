"""`--data.approximate`: from the command line to the engine, config.json and the fingerprint."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from headrace.pipelines import recipes
from headrace.pipelines.approximation import APPROXIMATIONS
from headrace.pipelines.differences import differences
from headrace.pipelines.engines import Unsupported
from headrace.shards.cores import threads_per_rank
from headrace.shards.store import Store, open_store
from headrace.training import evaluate
from headrace.training.command_line import parse_command_line
from headrace.training.config import Config, parse_approximations
from headrace.training.evaluate_options import parse_evaluate
from headrace.training.inputs import feature_pass, open_training_loader
from headrace.training.preset import ConfigError
from headrace.training.protocol import find_protocol
from headrace.training.world import World

BOTH = "affine-bilinear,equalize-opencv"


def parse(line: str) -> Config:
    return parse_command_line(f"--method supervised {line}".split(), lambda path: 32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for index in range(8):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return open_store(root)


def deit_config(line: str = "") -> Config:
    augmentation = recipes.deit(32, group=4)
    config = parse(f"--data.engine dali --data.batch-size 8 --data.threads 1 {line}")
    return replace(config, augmentation=augmentation)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ()),
        (f"--data.approximate {BOTH}", APPROXIMATIONS),
        ("--data.approximate equalize-opencv,affine-bilinear", APPROXIMATIONS),
        ("--data.approximate equalize-opencv affine-bilinear", APPROXIMATIONS),
        ("--data.approximate=equalize-opencv", ("equalize-opencv",)),
    ],
)
def test_names_are_separated_by_commas(line: str, expected: tuple[str, ...]) -> None:
    config = parse(line)
    assert config.data.approximate == expected
    assert config.declaration()["data"]["approximate"] == list(expected)


@pytest.mark.parametrize(
    ("name", "nearest"), [("affine-bilnear", ": did you mean affine-bilinear?"), ("mixup", "")]
)
def test_a_name_that_there_is_not_is_one_sentence(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"--data.approximate {name},equalize-opencv")
    assert str(caught.value) == (
        f"--data.approximate {name} is unknown{nearest}; there are affine-bilinear, equalize-opencv"
    )


def test_evaluation_takes_it_too_and_else_the_runs() -> None:
    def given(*arguments: str) -> argparse.Namespace:
        return parse_evaluate(["run", *arguments], find_protocol)[1]

    record = argparse.Namespace(approximate=("equalize-opencv",))
    chosen = evaluate.chosen_approximations
    assert chosen(record, given()) == ("equalize-opencv",)  # pyright: ignore[reportArgumentType]
    both = given("--data.approximate", BOTH)
    assert chosen(record, both) == APPROXIMATIONS  # pyright: ignore[reportArgumentType]
    none = given("--data.approximate", "")
    assert chosen(record, none) == ()  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"--data\.approximate x is unknown"):
        chosen(record, given("--data.approximate", "x"))  # pyright: ignore[reportArgumentType]


def test_each_once_and_in_their_order() -> None:
    assert (
        parse_approximations(["equalize-opencv", "affine-bilinear,equalize-opencv"])
        == APPROXIMATIONS
    )
    assert parse_approximations([]) == ()


@pytest.mark.dali
def test_a_recipe_that_needs_them_trains_with_them_and_says_so(store: Store) -> None:
    pytest.importorskip("nvidia.dali")
    config, world = deit_config(f"--data.approximate {BOTH}"), World()
    with open_training_loader(config, store, None, world, config.data.engine) as loader:
        batch = next(iter(loader))
        fingerprint = loader.fingerprint
    assert batch.views[0].shape == (8, 3, 32, 32)
    assert fingerprint["engine"] == {"name": "dali", "approximations": list(APPROXIMATIONS)}

    # Those that are asked for and not made change nothing.
    plain = replace(config, augmentation=recipes.supervised(32))
    with open_training_loader(plain, store, None, world, "dali") as loader:
        assert loader.fingerprint["engine"]["approximations"] == []
    with open_training_loader(config, store, None, world, "reference") as loader:
        assert differences(fingerprint["engine"], loader.fingerprint["engine"])

    passes = feature_pass(config, store, None, world, "dali", bf16=False)
    assert passes.approximate == APPROXIMATIONS


@pytest.mark.dali
def test_a_recipe_that_needs_them_is_refused_without(store: Store) -> None:
    pytest.importorskip("nvidia.dali")
    with pytest.raises(Unsupported, match=r"approximate affine-bilinear.*approximate equalize"):
        open_training_loader(deit_config(), store, None, World(), "dali")


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(64, 8, 8), (2, 1, 2), (96, 7, 13), (4, 8, 1), (1, 1, 1)]
)
def test_ranks_of_a_machine_share_its_cores(cores: int, ranks: int, threads: int) -> None:
    assert threads_per_rank(cores, ranks) == threads
    assert threads == 1 or ranks * threads <= cores
