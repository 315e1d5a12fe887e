"""A script's help, and mistakes on its command line, before it loads what it works with."""

from pathlib import Path

from headrace.training.declared import read_declared


def answer(script: str) -> None:
    """Read the command line by the script's own `_parse`, and by nothing else of it: ends the
    process as argparse does for help and for mistakes, else returns."""
    path = Path(script)
    read_declared(path, f"{path.stem}:parser", ("_parse",))._parse(None)
