"""Numbers that an option cannot have are refused, with what they must be; every option counts."""

import math
import re
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from headrace.training.catalogue import find_method, method_names
from headrace.training.command_line import parse_command_line
from headrace.training.config import Config, Data, Run
from headrace.training.preset import ConfigError, Optim
from headrace.training.ranges import numbers_of, range_of, require_ranges


def parse(line: str) -> Config:
    return parse_command_line(line.split(), lambda path: 32)


@pytest.mark.parametrize("name", method_names())
def test_every_number_of_a_method_has_a_range_that_its_presets_keep(name: str) -> None:
    for preset in find_method(name).presets.values():
        require_ranges(preset.objective)
        for field, _ in numbers_of(preset.objective):
            known = range_of(preset.objective, field)
            assert known is not None, field
            wrong = [math.nan, math.inf] + ([-1] if field != "local_stage" else [])
            for value in wrong:
                assert not known.holds(value), field


@pytest.mark.parametrize("name", method_names())
def test_every_option_of_a_method_changes_what_the_run_is(name: str) -> None:
    """Whatever is changed stands in the fingerprint: no resume takes it for the same run."""
    config = parse(f"--method {name} --preset cifar")

    def fingerprint(changed: Config) -> dict[str, Any]:
        stream = {"augmentation": changed.augmentation.declaration()}
        return changed.fingerprint(stream, total_steps=1, precision="fp32", world_size=1)

    plain = fingerprint(config)
    assert plain["objective"].keys() == asdict(config.objective).keys()
    assert plain["optim"].keys() == asdict(config.optim).keys()
    for field in fields(config.objective):
        value = getattr(config.objective, field.name)
        objective = replace(config.objective, **{field.name: other(value)})
        assert fingerprint(replace(config, objective=objective)) != plain, field.name
    for line in ("--augmentation.mean 0.1 0.1 0.1", "--test.size 96"):
        assert fingerprint(parse(f"--method {name} --preset cifar {line}")) != plain, line


def other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case tuple():
            return (*value, 1)
        case _:
            return "another"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--optim.betas 0.9 1.5", "each of --optim.betas is 1.5; it must be in [0, 1)"),
        ("--optim.name sgd --optim.schedule steps --optim.milestones 120 160",
         "a fraction of the run: 120 is not; epoch 120 of 200 is 0.6"),
        ("--optim.schedule steps", "needs --optim.milestones"),
        ("--optim.epsilon 0", "--optim.epsilon is 0.0; it must be above 0"),
        ("--optim.name sgd --optim.momentum 1", "--optim.momentum is 1.0; it must be in [0, 1)"),
        ("--optim.momentum 0.5", "--optim.momentum means nothing to --optim.name adamw"),
        ("--optim.milestones 0.5", "--optim.milestones means nothing to --optim.schedule cosine"),
        ("--optim.name lars --optim.betas 0.5 0.9", "--optim.betas means nothing to --optim.name"),
        ("--optim.schedule constant --optim.final-learning-rate 0.1", "it is for cosine"),
        ("--optim.warmup-epochs 0 --optim.warmup-from 0.1", "means nothing without a warm-up"),
        ("--data.window-shards 4", "it is for window"),
        ("--data.window-shards 0 --data.shuffle window", "--data.window-shards is 0"),
        ("--objective.student-temperature 0", "--objective.student-temperature is 0.0; it must be"),
        ("--objective.teacher-momentum 1.5", "a fraction in [0, 1]"),
        ("--objective.freeze-last-layer-epochs -1", "a number of epochs, at least 0"),
        ("--objective.out-dim 0", "a whole number of at least 1"),
        ("--objective.drop-path 1", "a fraction in [0, 1)"),
        ("--objective.clip nan", "--objective.clip is nan"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_or_without_effect_is_refused(options: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse(f"--method dino {options}")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--method moco --objective.bank-momentum 0.9", "with --objective.dictionary queue; it is "
         "for bank"),
        ("--method dinov2 --objective.center-momentum 0.5", "it is for mean"),
        ("--method ibot --objective.patch-out-dim 64", "with --objective.shared-head True"),
        ("--method pair --objective.temperature 1", "it is for logistic"),
        ("--method simclr --run.evaluate-every 2", "there is nothing to evaluate on"),
    ],
)  # fmt: skip
def test_what_a_choice_does_not_look_at_is_refused(options: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse(options)
    assert parse("--method moco --objective.dictionary bank --objective.bank-momentum 0.9")
    assert parse("--method moco --objective.batch-norm-group 0")
    assert parse("--method npid --objective.loss softmax --objective.negatives 0")


@pytest.mark.parametrize(
    ("group", "declared"), [("optim", Optim()), ("run", Run()), ("data", Data())]
)
def test_nothing_is_not_a_number(group: str, declared: Any) -> None:
    """Of every float option of these groups: refused in a sentence that names it."""
    for field in fields(declared):
        if "float" not in str(field.type) or "tuple" in str(field.type):
            continue
        for value in (math.nan, math.inf, -1.0):
            with pytest.raises(ConfigError, match=f"--{group}.{field.name.replace('_', '-')}"):
                replace(declared, **{field.name: value})
