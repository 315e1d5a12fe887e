"""What a file declares, without what it computes: a method's options and presets without torch.

A method's file holds networks, and importing it loads torch, which takes seconds. Help and most
mistakes need only what it declares. So the file's statements are followed backwards from the names
that are wanted, through all names that these use, and nothing else of the file is run.
"""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


def read_declared(path: Path, name: str, wanted: Iterable[str]) -> ModuleType:
    """A module `name` with those of the wanted names that the file binds, and its docstring.

    name: not the file's own, which stands for all of it. Raises whatever running these statements
    raises: the whole file has to be imported then.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    module = ModuleType(name, ast.get_docstring(tree))
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses and typing look for the names of annotations
    code = compile(ast.Module(_followed(tree.body, set(wanted)), []), str(path), "exec")
    exec(code, module.__dict__)
    return module


def _followed(statements: list[ast.stmt], wanted: set[str]) -> list[ast.stmt]:
    """The statements that bind or change a wanted name, or one that such a statement uses."""
    kept: set[int] = set()
    while True:
        more = {
            index
            for index, statement in enumerate(statements)
            if index not in kept and _changed(statement) & wanted
        }
        if not more:
            return [_needed_part(statements[index], wanted) for index in sorted(kept)]
        kept |= more
        wanted = wanted.union(*(_used(statements[index]) for index in more))


def _needed_part(statement: ast.stmt, wanted: set[str]) -> ast.stmt:
    """Of `from module import ...` the names that are wanted; anything else whole."""
    if not isinstance(statement, ast.ImportFrom):
        return statement
    names = [entry for entry in statement.names if (entry.asname or entry.name) in wanted]
    part = ast.ImportFrom(statement.module, names, statement.level)
    return ast.copy_location(part, statement)


def _used(statement: ast.stmt) -> set[str]:
    nodes = ast.walk(statement)
    return {node.id for node in nodes if isinstance(node, ast.Name) and _is_read(node)}


def _changed(statement: ast.stmt) -> set[str]:
    """Names of the module that the statement binds or may change."""
    match statement:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {(entry.asname or entry.name).partition(".")[0] for entry in names}
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {name for target in targets for name in _names(target)}
        case ast.AnnAssign(target=target):
            return _names(target)
        case ast.If(test=test) if "__name__" in _names(test):
            return set()  # what a script does when it runs
        case _:  # a call may change what it mentions; an if, a loop or a try may bind it
            return _names(statement)


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _is_read(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)
