"""The house rules that no linter knows: sizes, names, and what the top level may hold."""

import ast
import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest

from headrace.pipelines.engines.fused.render import KERNEL_FILES

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.split("\n")[:-1]
PYTHON = [Path(name) for name in TRACKED if name.endswith(".py") and (ROOT / name).exists()]


class HouseWarning(UserWarning):
    """Something to look at; no failure."""


STATEMENTS_OF_A_METHOD = 160
LINES_OF_A_FUNCTION = 60
LINES_OF_A_FILE = 500
LONGER = {
    ("training/train.py", "train"): 175,  # the story of a run, told once
    ("pipelines/engines/fused/resample.py", "resample"): 100,  # one compiled kernel, inlined
    ("pipelines/loader.py", "open_loader"): 75,  # a signature of 25 lines, handed on by name
    ("tools/bench_methods.py", "_parse"): 80,  # a table of options
    ("tools/bench_pipeline.py", "_parse"): 80,
    ("training/evaluate_options.py", "parse_evaluate"): 80,
}
"""Functions that may be longer than LINES_OF_A_FUNCTION, and why."""


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of a function without its docstring: prose is never cut to save lines."""
    first = function.body[0]
    lines = (function.end_lineno or 0) - function.lineno + 1
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", [p for p in PYTHON if p.parts[0] != "tests"], ids=str)
def test_functions_and_methods_stay_small(path: Path) -> None:
    """What a file does is counted, not its prose, its imports or its presets."""
    source = (ROOT / path).read_text()
    if len(source.splitlines()) > LINES_OF_A_FILE:
        message = f"{path} has {len(source.splitlines())} lines: is there a natural seam in it?"
        warnings.warn(HouseWarning(message), stacklevel=1)
    nodes = list(ast.walk(ast.parse(source)))
    long = {
        (path.as_posix(), node.name): lines_of(node)
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {
        where: lines
        for where, lines in long.items()
        if lines > LONGER.get(where, LINES_OF_A_FUNCTION)
    }
    if path.parent == Path("training/methods"):
        assert sum(isinstance(node, ast.stmt) for node in nodes) <= STATEMENTS_OF_A_METHOD


def test_no_file_has_a_name_that_says_nothing() -> None:
    vague = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    assert not [path for path in PYTHON if path.name in vague]


def test_errors_have_one_base() -> None:
    """So that a script ends with the sentence of each, and no list of them is kept anywhere.

    What a benchmark's row ends with stands in its table, and ends no script.
    """
    bases = {
        (path.as_posix(), node.name): [ast.unparse(base) for base in node.bases]
        for path in PYTHON
        if path.parts[0] != "tests"
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    builtin = {"Exception", "OSError", "RuntimeError", "TypeError", "ValueError"}
    assert {name for name, names in bases.items() if builtin.intersection(names)} == {
        ("shards/errors.py", "UserError"),
        ("tools/bench/methods/job.py", "JobError"),
        ("tools/bench/pipeline/row_process.py", "RowError"),
        ("tools/bench/pipeline/task.py", "CannotExpress"),
        ("tools/bench/pipeline/worker.py", "WrongBatch"),
    }


def test_no_test_file_imports_another() -> None:
    """What several of them need has a file of its own, without tests; fixtures: conftest.py."""
    importing = {
        (path.name, node.module)
        for path in PYTHON
        if path.parts[0] == "tests"
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests.test_")
    }
    assert not importing


def test_the_top_level_is_fixed() -> None:
    top = {Path(name).parts[0] for name in TRACKED if (ROOT / name).exists()}
    assert top == {
        ".ci", ".github", ".gitignore", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml",
        "pipelines", "shards", "tests", "tools", "training",
    }  # fmt: skip


def test_continuous_integration_runs_the_command_of_a_laptop() -> None:
    import yaml

    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["steps"][-1]["run"] == "bash tools/test.sh"
    assert "exec bash tools/test.sh" in (ROOT / ".ci/run").read_text()
    settings = job["strategy"]["matrix"]["include"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    assert all(f"Programming Language :: Python :: {s['python']}" in classifiers for s in settings)
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(path.read_text())
    for setting in settings:
        assert (ROOT / setting.get("constraints", ".")).exists()


def test_packages_are_the_ones_of_this_checkout() -> None:
    """A dependency that ships a top-level `training` would shadow ours."""
    from headrace import pipelines, shards, training

    for package in (pipelines, shards, training):
        assert Path(str(package.__file__)).is_relative_to(ROOT)


def test_every_folder_of_modules_is_packaged() -> None:
    """pyproject.toml lists what the wheel holds; a folder that it lacks would be missing there."""
    folders = {path.parent for path in PYTHON if path.parts[0] != "tests"}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(f"headrace.{'.'.join(path.parts)}" for path in folders)


def test_all_kernels_count_in_the_digest_of_their_cache() -> None:
    """A file of compiled functions that it lacks would leave stale machine code in use."""
    folder = ROOT / "pipelines/engines/fused"
    decorators = ("@numba", "@njit", "@intrinsic")
    compiled = {
        path.stem
        for path in folder.glob("*.py")
        if any(line.startswith(decorators) for line in path.read_text().splitlines())
    }
    assert compiled <= set(KERNEL_FILES) <= {path.stem for path in folder.glob("*.py")}
