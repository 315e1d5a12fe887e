"""The command line of a run: every field of the configuration is an option.

The options of a method are its preset's: `--objective.*` has the fields of its own dataclass,
`--augmentation.<view>.<op>.*` the ops of its views by name, and each default is the preset's value.
tyro reads them; what it and we refuse becomes one sentence.
"""

import argparse
import ast
import difflib
import io
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from headrace.pipelines.approximation import Approximation
from headrace.pipelines.ops import OneOf, RecipeError, ViewOp
from headrace.pipelines.recipe import Augmentation, Mix, RandomErasing, View
from headrace.training.catalogue import (
    SMALL_PIXELS,
    Declaration,
    find_method,
    find_preset,
    method_names,
)
from headrace.training.config import Config, Data, Run, parse_approximations
from headrace.training.invocation import as_typed
from headrace.training.judged_view import ViewChange, changed, following, require_normalisation
from headrace.training.near_options import near_option
from headrace.training.preset import (
    ConfigError,
    Optim,
    Preset,
    nearest,
    require,
    require_effect,
    require_own_option,
)
from headrace.training.ranges import require_ranges, require_used
from headrace.training.run.directory import CONFIG_FILE
from headrace.training.run.record import read_network


def parse_command_line(
    arguments: Sequence[str],
    largest_side_pixels: Callable[[Path | None], int],
    find: Callable[[str], Declaration] = find_method,
) -> Config:
    """The configuration of a run. largest_side_pixels: of a training set, for --preset auto.
    find: gives a method by its name, whole or what it declares.

    Raises ConfigError, one sentence, for whatever is wrong. Prints help and raises SystemExit(0)
    where help is asked for.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--method")
    first.add_argument("--preset", default="auto")
    first.add_argument("--data.train", dest="train", type=Path)
    first.add_argument("-h", "--help", action="store_true")
    try:
        chosen, _ = first.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if chosen.method is None:
        if chosen.help:
            sys.stdout.write(_general_help() + "\n")
            raise SystemExit(0)
        raise _no_method(arguments)
    method = find(chosen.method)
    arguments = _with_flags(arguments, _options_of(method.presets.values()))
    _check_options(arguments, method.presets.values())

    def largest_side() -> int:
        return SMALL_PIXELS + 1 if chosen.help else largest_side_pixels(chosen.train)

    preset_name, preset = find_preset(method, chosen.preset, largest_side)
    given = _parse_options(method, preset_name, preset, arguments)
    names = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    return _resolve(method, preset_name, preset, given, names)


def _parse_options(
    method: Declaration, preset_name: str, preset: Preset, arguments: Sequence[str]
) -> Any:
    """An instance of `_command_line_class`, the preset's values where nothing is given."""
    import tyro

    declared = _command_line_class(preset)
    _check_options(arguments, [preset])
    complaint = io.StringIO()
    asked_for_help = "-h" in arguments or "--help" in arguments
    description = _method_help(method, preset_name) if asked_for_help else ""
    try:
        with nullcontext() if asked_for_help else redirect_stderr(complaint), _approximation_rule():
            return tyro.cli(
                declared,
                args=list(arguments),
                prog=as_typed("training/train.py"),
                description=description,
            )
    except SystemExit as error:
        if asked_for_help:
            raise
        # A ConfigError names its option by itself; around others tyro says where they arose.
        refusal = _config_error(error) or ConfigError(_first_sentence(complaint.getvalue()))
        raise refusal from error


def _approximation_rule() -> AbstractContextManager[Any]:
    """Within it tyro reads approximations as `parse_approximations` does, with commas or blanks."""
    from tyro import constructors

    registry = constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(
        kind: constructors.PrimitiveTypeInfo,
    ) -> constructors.PrimitiveConstructorSpec[tuple[Approximation, ...]] | None:
        if kind.type != tuple[Approximation, ...]:
            return None
        return constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="NAMES",
            instance_from_str=parse_approximations,
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=lambda names: [*names],
        )

    return registry


def _config_error(error: BaseException) -> ConfigError | None:
    """The ConfigError during whose handling `error` was raised, if there is one."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__context__
    return cause


def _no_method(arguments: Sequence[str]) -> ConfigError:
    """What is wrong with a command line that names no method: the word that was meant for one, an
    option that there is not, or that it is missing."""
    names = method_names()
    if arguments and not arguments[0].startswith("-") and nearest(arguments[0], names, cutoff=0.7):
        meant = difflib.get_close_matches(arguments[0], names, n=1)[0]
        return ConfigError(f"{arguments[0]} is no option: write --method {meant}")
    groups = {"data": Data, "optim": Optim, "run": Run}
    options = [
        *_PLAIN_OPTIONS,
        *(name for group, kind in groups.items() for name in _option_names(kind, f"--{group}.")),
    ]
    of_methods = ("--objective.", "--augmentation.", "--test.")
    for given in _given_options(arguments):
        if _spelled(given) not in options and not given.startswith(of_methods):
            return ConfigError(f"there is no option {given}{near_option(given, options)}")
    return ConfigError(
        f"--method is missing: choose among {', '.join(names)}; --help shows examples"
    )


def _options_of(presets: Iterable[Preset]) -> set[str]:
    return {option for preset in presets for option in _option_names(_command_line_class(preset))}


def _check_options(arguments: Sequence[str], presets: Iterable[Preset]) -> None:
    """Raises ConfigError for an option that no preset has: before anything is opened."""
    options = {*_options_of(presets), *_PLAIN_OPTIONS}
    for given in _given_options(arguments):
        if _spelled(given) not in options:
            raise ConfigError(
                f"there is no option {given}{near_option(given, sorted(options - {'-h'}))}"
            )


def _given_options(arguments: Sequence[str]) -> list[str]:
    """Without their values. A minus before a number is none."""
    return [
        argument.partition("=")[0]
        for argument in arguments
        if re.match(r"--|-[A-Za-z]", argument) and argument != "-inf"
    ]


def _spelled(given: str) -> str:
    return given.replace("_", "-")


def _with_flags(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """`--run.compile true` and `--run.compile=false` as the flags --run.compile and
    --run.no-compile."""
    flags: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, equals, value = argument.partition("=")
        prefix, dot, last = _spelled(name).rpartition(".")
        negated = f"{prefix}{dot}no-{last}"
        if negated in options:
            word = value if equals else (remaining[0] if remaining else "")
            truth = _TRUTH.get(word.lower())
            if truth is not None:
                argument = name if truth else negated
                if not equals:
                    remaining.pop(0)
        flags.append(argument)
    return flags


def _command_line_class(preset: Preset) -> type:
    """One dataclass of all options, with this preset's values as defaults."""
    data = Data(
        batch_size=preset.batch_size,
        holdout=preset.holdout,
        repeated_augmentation=preset.repeated_augmentation,
    )
    views = [
        (view.name, declared := _view_class(view), _default(declared()))
        for view in preset.augmentation.views
    ]
    whole: list[Any] = [
        ("group", int, preset.augmentation.group),
        ("mean", tuple[float, float, float], preset.augmentation.mean),
        ("std", tuple[float, float, float], preset.augmentation.std),
    ]
    if preset.augmentation.mix is not None:
        whole.append(("mix", Mix, _default(preset.augmentation.mix)))
    augmentation = make_dataclass(
        "Augmentation", [*whole, *views], frozen=True, namespace=_doc("Views.")
    )
    fields: list[Any] = [
        ("method", str),
        ("preset", str, "auto"),
        ("backbone", str, preset.backbone),
        ("backbone_options", tuple[str, ...], ()),
        ("init", Path | None, None),
        ("data", Data, data),
        ("optim", Optim, preset.optim),
        ("run", Run, Run()),
        ("objective", type(preset.objective), preset.objective),
        ("augmentation", augmentation, augmentation()),
        ("test", ViewChange, ViewChange()),
    ]
    return make_dataclass(
        "CommandLine",
        [(name, kind, *(_default(value) for value in rest)) for name, kind, *rest in fields],
        frozen=True,
        namespace=_doc(_OPTION_HELP),
    )


def _view_class(view: View) -> type:
    """A view as options: each op under its own name, so that no index has to be counted."""
    fields: list[Any] = [("count", int, view.count)]
    fields += [(name, type(op), _default(op)) for name, op in _named_ops(view)]
    if view.mask is not None:
        fields.append(("mask", type(view.mask), _default(view.mask)))
    if view.erase is not None:
        fields.append(("erase", RandomErasing, _default(view.erase)))
    return make_dataclass("View", fields, frozen=True, namespace=_doc("One view."))


def _named_ops(view: View) -> list[tuple[str, ViewOp]]:
    """Ops under snake-case names of their classes; a second of a kind gets the suffix _2.

    Not OneOf, which says which ops there are and has no numbers.
    """
    named: dict[str, ViewOp] = {}
    for op in view.ops:
        if isinstance(op, OneOf):
            continue
        base = re.sub(r"(?<!^)(?=[A-Z])", "_", type(op).__name__).lower()
        earlier = sum(name == base or name.startswith(base + "_") for name in named)
        named[base if earlier == 0 else f"{base}_{earlier + 1}"] = op
    return list(named.items())


def _augmented(augmentation: Augmentation, given: Any) -> Augmentation:
    """The preset's augmentation with the values of the command line."""
    views = []
    for view in augmentation.views:
        values = getattr(given, view.name)
        if values.count == 0:
            continue
        options = iter([getattr(values, name) for name, _ in _named_ops(view)])
        ops = tuple(op if isinstance(op, OneOf) else next(options) for op in view.ops)
        mask = values.mask if view.mask is not None else None
        erase = values.erase if view.erase is not None else None
        views.append(replace(view, ops=ops, count=values.count, mask=mask, erase=erase))
    mix = given.mix if augmentation.mix is not None else None
    require_normalisation("--augmentation", given.mean, given.std)
    return replace(
        augmentation,
        views=tuple(views),
        group=given.group,
        mean=given.mean,
        std=given.std,
        mix=mix,
    )


def _resolve(
    method: Declaration, preset_name: str, preset: Preset, given: Any, names: Collection[str]
) -> Config:
    run: Run = given.run
    if run.epochs is None and run.steps is None:
        run = replace(run, epochs=preset.epochs)
    backbone, options = _backbone(method, preset, given, named="--backbone" in names)
    asked = dict(_parse_backbone_option(text) for text in given.backbone_options)
    require_own_option(given.objective, asked)
    require_ranges(given.objective)
    require_used(preset.objective, given.objective)
    require(
        not ("--run.evaluate-every" in names and given.run.evaluate_every)
        or given.data.val is not None
        or given.data.holdout > 0,
        "--run.evaluate-every: there is nothing to evaluate on; give --data.val or --data.holdout",
    )
    require_effect(preset.optim, given.optim)
    options |= asked
    try:
        augmentation = _augmented(preset.augmentation, given.augmentation)
    except RecipeError as error:
        raise ConfigError(f"--augmentation: {error}") from error
    return Config(
        method=method.name,
        preset=preset_name,
        backbone=backbone,
        backbone_options=options,
        init=given.init,
        data=given.data,
        optim=given.optim,
        run=run,
        objective=given.objective,
        augmentation=augmentation,
        test=changed(following(preset, augmentation), given.test),
        batch_size_given="--data.batch-size" in names,
    )


def _backbone(
    method: Declaration, preset: Preset, given: Any, *, named: bool
) -> tuple[str, dict[str, Any]]:
    """(backbone, its options but for those of the command line): those of the run that --init
    names, if there is one and no other backbone is asked for, else the preset's."""
    if (
        given.init is not None
        and (given.init / CONFIG_FILE).is_file()
        and not method.init_is_teacher
    ):
        network = read_network(given.init)
        if not named or given.backbone == network.backbone:
            options = {
                key: value
                for key, value in network.backbone_options.items()
                if key not in ("img_size", "dynamic_img_size")  # which follow the views
            }
            return network.backbone, {**options, **method.backbone_options}
    # The preset's options belong to its backbone; another one starts with its own defaults.
    own = preset.backbone_options if given.backbone == preset.backbone else {}
    return given.backbone, {**method.backbone_options, **own}


def _parse_backbone_option(text: str) -> tuple[str, Any]:
    """("drop_path_rate", 0.1) for "drop_path_rate=0.1"; what is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--backbone-options {text}: write name=value, as drop_path_rate=0.1")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _option_names(declared: Any, prefix: str = "--") -> list[str]:
    """Every option of a (nested) dataclass of options, spelled as in the help."""
    names = []
    hints = get_type_hints(declared)
    for entry in fields(declared):
        name = prefix + entry.name.replace("_", "-")
        if is_dataclass(hints[entry.name]):
            names += _option_names(hints[entry.name], name + ".")
        else:
            names.append(name)
        if hints[entry.name] is bool:
            names.append(f"{prefix}no-{entry.name.replace('_', '-')}")
    return names


def _first_sentence(message: str) -> str:
    """What tyro says in a frame, without the frame, its title and the help below it.

    Where the terminal has no lines to draw frames with, they are blanks, and rules are minuses.
    """
    sentence = []
    for line in message.splitlines()[1:]:
        text = line.strip("╭╮╰╯│─ ")
        if text.strip("-"):
            sentence.append(text)
        elif sentence:
            break  # a rule or an empty line ends the first paragraph
    text = " ".join(sentence).rstrip(".")
    if refusal := re.match(r"Error parsing (\S+): no type matching (\S+) .*from \['(.*)'\]", text):
        option, kinds, value = refusal.groups()
        kinds = kinds.replace("{None}", "None").replace("|", " or ")
        return f"{option} is {value!r}; it must be {kinds}"
    return text or "the command line cannot be read"


def _default(value: Any) -> Any:
    """Frozen dataclasses are safe to share, but dataclasses refuse those that are not hashable."""
    return field(default_factory=lambda: value)


def _doc(text: str) -> dict[str, Any]:
    return {"__doc__": text}


_PLAIN_OPTIONS = (
    "--method",
    "--preset",
    "--backbone",
    "--backbone-options",
    "--init",
    "--gpus",
    "--help",
    "-h",
)
_TRUTH = {"true": True, "yes": True, "1": True, "on": True} | {
    "false": False,
    "no": False,
    "0": False,
    "off": False,
}

_OPTION_HELP = """The options of a run.

Args:
    method: A file of training/methods by its name, or a module by its dotted name.
    preset: auto takes cifar where no image is larger than 64 pixels, else imagenet.
    backbone: A timm model.
    backbone_options: Options of the timm model, as drop_path_rate=0.1.
    init: A run whose encoder this one starts from, with its backbone if no other is named; or a
        file of weights (.safetensors, .pth).
"""


def _general_help() -> str:
    methods = "\n".join(_hanging(f"  {name:<12} {_summary(name)}", 15) for name in method_names())
    groups = "\n".join(
        _hanging(f"  {f'--{prefix}.*':<16} {', '.join(names)}", 19)
        for prefix, kind in (("data", Data), ("run", Run), ("optim", Optim))
        for names in [[name for name in _option_names(kind, "") if not name.startswith("no-")]]
    )
    return as_typed(f"""Pre-train an image encoder.

  training/train.py --method METHOD [options]

examples
  training/train.py --method dino                           the only data set under ./data
  training/train.py --method dino --data.train data/cifar10 --run.out runs/first --run.epochs 20
  training/train.py --method supervised --preset vit_b16_imagenet --data.holdout 0.1
  training/train.py --method mae --backbone vit_small_patch16_224 --run.steps 1000
  training/train.py --method dino --run.out runs/first      again: continues where it stopped
  training/train.py --method dino --gpus 8                  a process for each GPU of this machine
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:PORT training/train.py ...

methods
{methods}

options (METHOD's own ones, all meanings and defaults: --method METHOD --help)
  --preset         a published set of numbers; the options below replace single ones
  --backbone       a timm model; --backbone-options name=value ...
  --init           a run, or a file of weights (.safetensors, .pth), that the encoder starts from
  --gpus           processes on this machine, each with a GPU of its own
{groups}
  --objective.*    of the method
  --augmentation.* of the preset's views
  --test.*         of the view that images are judged in: it follows the training views""")


def _method_help(method: Declaration, preset_name: str) -> str:
    """The page of a method, its presets with their numbers, and what to type."""
    width = max(map(len, method.presets))
    presets = "\n".join(
        _hanging(
            f"  {name:<{width}} {preset.backbone}, batch {preset.batch_size}, {preset.epochs:g} "
            f"epochs. {preset.notes}",
            width + 3,
        )
        for name, preset in method.presets.items()
    )
    other = next((name for name in method.presets if name != preset_name), preset_name)
    train = as_typed("training/train.py")
    return f"""{method.description}

presets, all numbers published unless they say otherwise
{presets}

examples
  {train} --method {method.name} --data.train DIR
  {train} --method {method.name} --preset {other} --data.train DIR --run.epochs 20
  {train} --method {method.name} --data.train DIR --data.batch-size 64 --run.steps 1000
  {train} --method {method.name} --data.train DIR --gpus 8

options, with the values of preset {preset_name}"""


def _hanging(text: str, columns: int) -> str:
    return textwrap.fill(text, 96, subsequent_indent=" " * columns, break_on_hyphens=False)


def _summary(method: str) -> str:
    """The first line of a method's docstring, without importing it."""
    source = (Path(__file__).parent / "methods" / f"{method}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
