"""The command line: what it resolves to, and that what is wrong becomes one sentence."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from headrace.training import config as configuration
from headrace.training import inputs as samples
from headrace.training.catalogue import find_method, method_names
from headrace.training.command_line import parse_command_line
from headrace.training.config import Config, Data, Run
from headrace.training.inputs import open_training_loader
from headrace.training.methods import dino, mae, supervised
from headrace.training.preset import ConfigError, Optim
from headrace.training.subset import read_subset
from headrace.training.world import World


def parse(line: str, largest_side: int = 32) -> Config:
    return parse_command_line(line.split(), lambda path: largest_side)


def refusal(line: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------------- what holds


def test_a_method_alone_is_its_whole_preset() -> None:
    config = parse("--method dino")
    preset = dino.PRESETS["cifar"]
    assert config.preset == "cifar"
    assert config.backbone == preset.backbone
    assert config.optim == preset.optim
    assert config.objective == preset.objective
    assert config.augmentation == preset.augmentation
    assert config.test == preset.test
    assert config.data.batch_size == preset.batch_size
    assert config.run.epochs == preset.epochs
    assert config.run.steps is None


@pytest.mark.parametrize(("largest_side", "preset"), [(64, "cifar"), (65, "imagenet")])
def test_preset_auto_looks_at_the_largest_image(largest_side: int, preset: str) -> None:
    assert parse("--method dino", largest_side).preset == preset


def test_a_named_preset_does_not_open_the_data() -> None:
    def unexpected(path: Path | None) -> int:
        raise AssertionError(f"{path} was opened")

    config = parse_command_line(
        ["--method", "supervised", "--preset", "vit_b16_imagenet"], unexpected
    )
    assert config.data.batch_size == 64
    assert config.data.holdout == 0.1
    assert config.optim.learning_rate == 1e-3
    assert config.optim.weight_decay == 0.01
    assert config.run.epochs == 30


def test_every_kind_of_option_replaces_one_value() -> None:
    config = parse(
        "--method=dino --data.batch-size 64 --data.holdout 0.1 --run.steps 7 --run.seed=3 "
        "--optim.learning-rate 0.5 --optim.no-scale-with-batch --optim.betas 0.8 0.9 "
        "--objective.out_dim 32 --augmentation.local.random-resized-crop.scale 0.2 0.3 "
        "--augmentation.local.count 2 --data.train some/where --run.out there --init other"
    )
    preset = dino.PRESETS["cifar"]
    assert config.data.batch_size == 64
    assert config.data.train == Path("some/where")
    assert config.run.steps == 7
    assert config.run.epochs is None
    assert config.run.seed == 3
    assert config.init == Path("other")
    expected = replace(preset.optim, learning_rate=0.5, scale_with_batch=False, betas=(0.8, 0.9))
    assert config.optim == expected
    assert config.objective == replace(preset.objective, out_dim=32)
    local = {view.name: view for view in config.augmentation.views}["local"]
    assert local.count == 2
    assert getattr(local.ops[0], "scale", None) == (0.2, 0.3)
    assert config.augmentation.views[:2] == preset.augmentation.views[:2]


def test_backbone_options_belong_to_the_presets_backbone() -> None:
    assert supervised.PRESETS["imagenet"].backbone_options
    line = "--method supervised --preset imagenet"
    assert parse(line).backbone_options == {"zero_init_last": False}
    assert parse(f"{line} --backbone resnet18").backbone_options == {}
    config = parse(f"{line} --backbone-options drop_rate=0.5 global_pool=avg")
    assert config.backbone_options == {
        "zero_init_last": False,
        "drop_rate": 0.5,
        "global_pool": "avg",
    }


def test_a_declaration_is_complete_json() -> None:
    config = parse("--method mae --data.train x")
    declared = config.declaration()
    assert json.loads(json.dumps(declared)) == declared
    assert declared["data"]["train"] == "x"
    assert declared["augmentation"]["views"][0]["mask"]["op"] == "RandomMask"


def test_identity_changes_with_what_changes_numbers_and_with_nothing_else() -> None:
    def fingerprint(line: str, world_size: int = 1) -> dict[str, Any]:
        config = parse(f"--method simclr {line}")
        return config.fingerprint(
            {"store": "s"}, total_steps=9, precision="fp32", world_size=world_size
        )

    same = fingerprint("")
    for line in ("--run.log-every 3", "--run.save-every 4", "--data.threads 2", "--run.out x"):
        assert fingerprint(line) == same, line
    for line in (
        "--optim.learning-rate 3",
        "--objective.temperature 3",
        "--run.seed 3",
        "--run.accumulate 2",
        "--backbone resnet18",
    ):
        assert fingerprint(line) != same, line
    assert fingerprint("", world_size=2) == same
    local = "--run.batch-norm local"
    assert fingerprint(local, world_size=2) != fingerprint(local, world_size=1)


def test_a_method_from_outside_is_found_by_its_dotted_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "outside_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text("from headrace.training.methods.simclr import *\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    config = parse("--method outside_package.mine")
    assert config.method == "outside_package.mine"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('JUDGE_BY = "linear"', "has JUDGE_BY, which means nothing: did you mean JUDGED_BY?"),
        ("INIT_IS_A_TEACHER = True", "did you mean INIT_IS_TEACHER?"),
        ('JUDGED_BY = "eye"', "JUDGED_BY is 'eye'; it must be knn or linear"),
    ],
)
def test_a_misspelt_part_of_a_method_is_no_silent_default(
    line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = f"package_of_{line.split()[0].lower()}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "mine.py").write_text(
        f"from headrace.training.methods.simclr import *\n{line}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert sentence in refusal(f"--method {package}.mine")


def test_the_parts_of_a_method_are_what_its_file_says() -> None:
    plain, mae_parts = find_method("simclr"), find_method("mae")
    assert (plain.judged_by, plain.backbone_options, plain.init_is_teacher) == ("knn", {}, False)
    assert (mae_parts.judged_by, mae_parts.backbone_options) == ("linear", mae.BACKBONE_OPTIONS)
    assert find_method("distill").init_is_teacher
    assert mae_parts.presets is mae.PRESETS
    assert mae_parts.objective_class is mae.Objective


def test_repeated_augmentation_reaches_the_order_of_training_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samples, "open_loader", lambda *_, **options: options)
    for line, copies in (
        ("--method dino", 1),
        ("--method dino --data.repeated-augmentation 3", 3),
        ("--method supervised --preset deit_s16_imagenet", 3),
        ("--method supervised --preset deit_s16_imagenet --data.repeated-augmentation 1", 1),
    ):
        config = parse(line)
        options: Any = open_training_loader(config, STORE, None, World(), "auto")
        assert (options["occurrences"], options["keep_length"]) == (copies, True)
        assert options["batch_size"] == config.data.batch_size


def test_a_length_in_epochs_is_rounded_to_steps() -> None:
    run = parse("--method dino --run.epochs 0.5").run
    assert configuration.total_steps(run, 9) == 4
    assert configuration.total_steps(run, 1) == 1
    assert configuration.total_steps(parse("--method dino --run.steps 3").run, 9) == 3


# ------------------------------------------------------------------------------------- what is told


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "--method is missing: choose among"),
        ("--method dinno", "did you mean dino?"),
        ("--method no.such.module", "there is no module 'no'"),
        ("--method json.decoder", "has no Objective and no PRESETS and no build"),
        ("--method dino --preset imagnet", "did you mean imagenet?"),
        ("--method dino --data.trian x", "did you mean --data.train?"),
        ("--method dino --optim.learning-rat=1", "did you mean --optim.learning-rate?"),
        ("--method dino --objective.temperature 1", "there is no option --objective.temperature"),
        ("--method dino --run.epochs 1 --run.steps 2", "--run.epochs and --run.steps"),
        ("--method dino --run.steps 0", "--run.steps is 0; it must be at least 1"),
        ("--method dino --run.steps few", "--run.steps is 'few'"),
        ("--method dino --run.epochs nan", "--run.epochs is nan"),
        ("--method dino --run.epochs -1", "--run.epochs is -1.0"),
        ("--method dino --run.seed -1", "--run.seed is -1"),
        ("--method dino --run.seed", "--run.seed"),
        ("--method dino --run.accumulate 0", "--run.accumulate is 0"),
        ("--method dino --data.holdout 1", "--data.holdout is 1.0"),
        ("--method dino --data.shuffle never", "'never'"),
        ("--method dino --data.repeated-augmentation 0", "--data.repeated-augmentation is 0"),
        ("--method dino --optim.clip-norm 0", "--optim.clip-norm is 0.0"),
        ("--method dino --optim.learning-rate inf", "--optim.learning-rate is inf"),
        ("--method dino --augmentation.local.flip.probability 2", "Flip.probability is 2.0"),
        ("--method dino --augmentation.local.random-resized-crop.scale 2 1", "scale is (2.0, 1.0)"),
        ("--method mae --augmentation.view.mask.patch-pixels 5", "patch_pixels 5"),
        ("--method dino --backbone-options wide", "write name=value"),
        ("--method dino stray", "stray"),
    ],
)
def test_a_mistake_is_one_sentence(line: str, part: str) -> None:
    assert part in refusal(line)


def test_a_method_that_cannot_be_imported_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lacking_package").mkdir()
    (tmp_path / "lacking_package" / "mine.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        parse("--method lacking_package.mine")


def test_help_shows_methods_examples_and_the_options_of_a_method(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in method_names():
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE), name
    assert "torchrun" in text
    assert max(map(len, text.splitlines())) <= 100
    with pytest.raises(SystemExit) as ended:
        parse("--method dino --preset cifar --help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in ("--data.train", "--objective.out-dim", "--augmentation.local.flip.probability"):
        assert option in text
    assert str(dino.PRESETS["cifar"].objective.out_dim) in text


# ---------------------------------------------------------------------------------------- a subset


class NamedStore:
    """Only what `read_subset` asks of a store."""

    uri = "the store"
    fingerprint = ""
    classes = ()
    shard_starts = np.array([0, 5])

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def names(self, ids: ArrayLike) -> list[str]:
        return [self._names[sample] for sample in np.asarray(ids)]

    def sizes(self, ids: ArrayLike) -> NDArray[np.int32]:
        raise NotImplementedError

    def labels(self, ids: ArrayLike) -> NDArray[np.int64]:
        raise NotImplementedError

    def read(self, ids: ArrayLike) -> list[NDArray[np.uint8]]:
        raise NotImplementedError


STORE = NamedStore(["a/1.png", "a/2.png", "b/2.png", "b/3.png", "3.png"])


def subset(tmp_path: Path, text: str) -> list[int]:
    path = tmp_path / "list.txt"
    path.write_text(text)
    ids = read_subset(path, STORE)
    assert ids is not None
    assert ids.dtype == np.int64
    return ids.tolist()


def test_a_subset_is_ids_names_or_last_parts(tmp_path: Path) -> None:
    assert subset(tmp_path, "4\n0\n4\n\n") == [0, 4]
    assert subset(tmp_path, "b/2.png\n1.png\r\n") == [0, 2]
    assert subset(tmp_path, "3.png\n") == [4]  # a whole name wins over another's last part
    assert subset(tmp_path, "1\n b/3.png ") == [1, 3]
    assert subset(tmp_path, "\ufeffa/1.png\r\n3.png\r\n") == [0, 4]  # as Windows' editors save it
    assert read_subset(None, STORE) is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("0\n5\n", "line 2: '5' is no id of the store, which has 5"),
        ("c/1.png", "'c/1.png' is no name"),
        ("2.png", "names several samples"),
        ("-1", "'-1' is no name"),
        ("\n\n", "lists no sample"),
    ],
)
def test_a_wrong_subset_says_which_line(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        subset(tmp_path, text)


def test_a_subset_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.txt cannot be read"):
        read_subset(tmp_path / "none.txt", STORE)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: Optim(weight_decay=math.nan),
            "--optim.weight-decay is nan; it must not be negative",
        ),
        (lambda: Data(batch_size=0), "--data.batch-size is 0; it must be at least 1"),
        (lambda: Run(epochs=math.inf), "--run.epochs is inf; it must be above 0"),
        (lambda: replace(Run(steps=1), epochs=1), "a run has one length"),
    ],
)
def test_what_is_built_in_code_is_checked_as_the_command_line_is(
    build: Callable[[], object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        build()


def test_a_count_of_0_drops_a_view() -> None:
    config = parse("--method dino --augmentation.local.count 0")
    assert [view.name for view in config.augmentation.views] == ["global_1", "global_2"]
    assert "has no views" in refusal("--method supervised --augmentation.view.count 0")
    assert "count is -1" in refusal("--method dino --augmentation.local.count -1")
