"""The command line of evaluate.py: its own options, and those of every protocol."""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from typing_extensions import override

from headrace.shards.local import local
from headrace.training.invocation import as_typed
from headrace.training.judged_view import ViewChange
from headrace.training.near_options import near_option
from headrace.training.preset import ConfigError
from headrace.training.protocol import ProtocolDeclaration, ProtocolOptions, protocol_names
from headrace.training.protocol_options import add_options, option_names, options_of

Protocol = TypeVar("Protocol", bound=ProtocolDeclaration)


class _Parser(argparse.ArgumentParser):
    """Whatever is wrong becomes one sentence, as everywhere else."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_evaluate(
    arguments: Sequence[str], find: Callable[[str], Protocol]
) -> tuple[list[tuple[Protocol, ProtocolOptions]], argparse.Namespace]:
    """(the protocols that are asked for, by name, with their options; everything else).

    find: gives a protocol by its name, whole or what it declares.
    """
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--protocol", nargs="+", default=["knn"])
    asked = sorted(set(first.parse_known_args(arguments)[0].protocol))
    modules = {name: find(name) for name in sorted({*asked, *protocol_names()})}
    parser = _Parser(
        prog=as_typed("training/evaluate.py"),
        description="Judge a run's encoder by its frozen features of the recipe's test view, a "
        "fixed view without augmentation, in one or several ways: its protocols.",
        epilog=as_typed("""examples:
  python training/evaluate.py runs/dino
  python training/evaluate.py runs/dino --untrained --k 20 --json untrained.json
  python training/evaluate.py runs/mae --protocol knn linear --linear.learning-rates 0.01 0.1 1
  python training/evaluate.py runs/dino --data.val data/imagenet --gpus 8
"""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=local, metavar="RUN", help="the run's directory")
    add(
        "--protocol",
        nargs="+",
        default=["knn"],
        metavar="NAME",
        help=f"{', '.join(protocol_names())}, or a module by its dotted name; several share the "
        f"features. Default: knn",
    )
    add(
        "--data.train",
        dest="train",
        type=local,
        metavar="DIR",
        help="what the classes are learnt from; of a root with splits, train. Default: the run's",
    )
    add(
        "--data.val",
        dest="val",
        type=local,
        metavar="DIR",
        help="these are judged; of a root with splits, val, else test. Default: the run's",
    )
    add("--json", type=local, metavar="FILE", help="write the results there")
    judged = parser.add_mutually_exclusive_group()
    judged.add_argument(
        "--untrained", action="store_true", help="judge the weights that the run began with"
    )
    judged.add_argument(
        "--pixels", action="store_true", help="judge the pixels of the test view, without a network"
    )
    _add_view_options(parser)
    add("--batch-size", type=_positive, default=256, help="images per process and step")
    add("--engine", help="auto, or an engine by name; default: the run's")
    add(
        "--data.approximate",
        dest="approximate",
        metavar="NAMES",
        help="what the engine may do differently, separated by commas; default: the run's",
    )
    add("--threads", type=_positive, help="of the engine, per process")
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    add("--run.device", dest="device", choices=["auto", "cpu", "cuda"], default="auto")
    # For the help: launch.py has taken it out.
    add("--gpus", metavar="N", help="processes on this machine, each with a GPU of its own")
    for module in modules.values():
        add_options(parser, module)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        given = unknown[0].partition("=")[0]
        near = near_option(given, sorted(parser._option_string_actions))
        raise ConfigError(f"there is no option {given}{near}")
    for name, module in modules.items():
        if name not in asked:
            _require_unasked(module, arguments)
    options.test = _view_change(options)
    settings = {name: options_of(module, options) for name, module in modules.items()}
    return [(modules[name], settings[name]) for name in asked], options


def _require_unasked(protocol: ProtocolDeclaration, arguments: Sequence[str]) -> None:
    """Raises ConfigError where an option is of a protocol that nobody asked for."""
    names = option_names(protocol)
    given = [argument for argument in arguments if argument.partition("=")[0] in names]
    if given:
        raise ConfigError(
            f"{given[0].partition('=')[0]} is an option of --protocol {protocol.name}, which is "
            f"not asked for"
        )


def _add_view_options(parser: argparse.ArgumentParser) -> None:
    view = parser.add_argument_group("the view that is judged", "Default: the run's")
    view.add_argument("--test.size", dest="size", type=int, metavar="N", help="pixels of its side")
    view.add_argument(
        "--test.resize",
        dest="resize",
        type=int,
        metavar="N",
        help="pixels of a picture's shorter side before the square is cut; default: in proportion",
    )
    for name, meaning in (("mean", "subtracted from"), ("std", "divides")):
        view.add_argument(
            f"--test.{name}",
            dest=name,
            type=float,
            nargs=3,
            metavar="X",
            help=f"{meaning} pixels in [0, 1]: one number per channel",
        )


def _view_change(options: argparse.Namespace) -> ViewChange:
    """What --test.* says. Raises ConfigError for what no view can be."""
    return ViewChange(
        size=options.size,
        resize=options.resize,
        mean=options.mean and tuple(options.mean),
        std=options.std and tuple(options.std),
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)
