"""Methods by name: where the file of each is, what it offers, and its presets by name."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from headrace.training.declared import read_declared
from headrace.training.preset import ConfigError, Preset, nearest, require

if TYPE_CHECKING:  # method.py loads torch, for which help and mistakes should not wait
    from headrace.training.method import Facts, MakeEncoder, Method

SMALL_PIXELS = 64  # the largest image of a data set that --preset auto calls CIFAR-sized

Judgement = Literal["knn", "linear"]

_DECLARED = ("Objective", "PRESETS")
_OPTIONAL = ("BACKBONE_OPTIONS", "JUDGED_BY", "INIT_IS_TEACHER")


@dataclass(frozen=True)
class Declaration:
    """What a method's file declares, under the names of `method.py`, found and checked.

    name: as --method has it. description: the file's docstring. objective_class: its Objective.
    """

    name: str
    description: str
    objective_class: type[Any]
    presets: Mapping[str, Preset]
    backbone_options: Mapping[str, Any]
    judged_by: Judgement
    init_is_teacher: bool


@dataclass(frozen=True)
class MethodModule(Declaration):
    """All that a method's file offers: what it declares, and how the method is built."""

    build: "Callable[[Any, MakeEncoder, Facts], Method]"


def find_method(name: str) -> MethodModule:
    """What training/methods/<name>.py offers, or any importable module by dotted name.

    Raises ConfigError, listing what exists, for an unknown name, and for a module that is no
    method.
    """
    module = find_module("--method", name, "methods")
    declaration = _offered(name, module, (*_DECLARED, "build"))
    return MethodModule(**vars(declaration), build=module.build)


def find_declaration(name: str) -> Declaration:
    """The same without importing what the method computes with; raises the same."""
    module = declared_module("--method", name, "methods", (*_DECLARED, *_OPTIONAL))
    try:
        return _offered(name, module, _DECLARED)
    except ConfigError:
        return find_method(name)  # the whole file knows best what is wrong with it


def _offered(name: str, module: ModuleType, required: Iterable[str]) -> Declaration:
    """The parts of a method's file. Raises ConfigError where one is missing or misspelt."""
    parts = vars(module)
    where = f"--method {name}: {module.__file__}"
    missing = [part for part in required if part not in parts]
    require(not missing, f"{where} has no {' and no '.join(missing)}")
    for part in parts:
        if part.isupper() and part not in (*_DECLARED, *_OPTIONAL):
            # A file may have constants of its own; one that reads like a part is a slip.
            meant = nearest(part, _OPTIONAL, cutoff=0.75)
            require(not meant, f"{where} has {part}, which means nothing{meant}")
    judged_by = parts.get("JUDGED_BY", "knn")
    require(
        judged_by in get_args(Judgement),
        f"{where}: JUDGED_BY is {judged_by!r}; it must be {' or '.join(get_args(Judgement))}",
    )
    return Declaration(
        name=name,
        description=(module.__doc__ or "").strip(),
        objective_class=parts["Objective"],
        presets=parts["PRESETS"],
        backbone_options=parts.get("BACKBONE_OPTIONS", {}),
        judged_by=judged_by,
        init_is_teacher=parts.get("INIT_IS_TEACHER", False),
    )


def method_names() -> list[str]:
    """The methods that are files of training/methods."""
    return names_in("methods")


def find_preset(
    method: Declaration, preset_name: str, largest_side_pixels: Callable[[], int]
) -> tuple[str, Preset]:
    """(name, preset) of a method. "auto" is "cifar" where no image is larger than 64 pixels, else
    "imagenet". Raises ConfigError for a name that the method has not."""
    if preset_name == "auto":
        preset_name = "cifar" if largest_side_pixels() <= SMALL_PIXELS else "imagenet"
        require(
            preset_name in method.presets,
            f"{method.name} has no preset {preset_name!r}, which --preset auto asks for with these "
            f"images; choose among {', '.join(method.presets)}",
        )
    require(
        preset_name in method.presets,
        f"--preset {preset_name} is unknown{nearest(preset_name, method.presets)}; {method.name} "
        f"has auto, {', '.join(method.presets)}",
    )
    return preset_name, method.presets[preset_name]


def find_module(option: str, name: str, folder: str) -> ModuleType:
    """training/<folder>/<name>.py, or any importable module by dotted name, also in the current
    directory. Raises ConfigError, listing what exists, for an unknown name."""
    _look_here(name)
    try:
        return importlib.import_module(_module_name(name, folder))
    except ModuleNotFoundError as error:
        raise _unknown(option, name, folder, error) from error


def declared_module(option: str, name: str, folder: str, wanted: Iterable[str]) -> ModuleType:
    """The same, with no more than the wanted names and what they need. Raises the same."""
    _look_here(name)
    module_name = _module_name(name, folder)
    try:
        # Of a dotted name this imports the packages around the module.
        found = importlib.util.find_spec(module_name)
    except ModuleNotFoundError as error:
        raise _unknown(option, name, folder, error) from error
    if found is not None and found.origin and found.origin.endswith(".py"):
        try:
            return read_declared(Path(found.origin), f"{module_name}:declared", wanted)
        except ConfigError:
            raise
        except Exception:  # whatever cannot be read in parts is imported as a whole
            return find_module(option, name, folder)
    return find_module(option, name, folder)


def _look_here(name: str) -> None:
    """As `python -m` does, so that a file beside the data is found by its dotted name."""
    if "." in name and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


def _module_name(name: str, folder: str) -> str:
    return name if "." in name else f"headrace.training.{folder}.{name}"


def _unknown(option: str, name: str, folder: str, error: ModuleNotFoundError) -> Exception:
    """A sentence where the module is not there; `error` where something that it imports is not."""
    if error.name is None or not (_module_name(name, folder) + ".").startswith(error.name + "."):
        return error
    if "." in name:
        return ConfigError(
            f"{option} {name}: there is no module {error.name!r} in the current directory or on "
            f"the Python path"
        )
    names = names_in(folder)
    return ConfigError(
        f"{option} {name} is unknown{nearest(name, names)}; there are {', '.join(names)} in "
        f"training/{folder}, and any module by its dotted name"
    )


def names_in(folder: str) -> list[str]:
    """The files of training/<folder>."""
    files = (Path(__file__).parent / folder).glob("*.py")
    return sorted(file.stem for file in files if file.stem != "__init__")
