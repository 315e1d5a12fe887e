"""What the user types: a script of a clone, or the command that an installation made of it.

Help is written for a clone. Imports nothing heavy: `--help` should not wait for torch.
"""

import re
import sys
from pathlib import Path

COMMANDS = {
    "tools/make_shards.py": "headrace-shards",
    "training/train.py": "headrace-train",
    "training/evaluate.py": "headrace-evaluate",
}
"""Installed command by script, as in pyproject.toml."""


def is_installed() -> bool:
    """Whether this process was started by one of the installed commands."""
    return Path(sys.argv[0]).name in COMMANDS.values()


def as_typed(text: str) -> str:
    """A help text that names scripts, with the installed commands where one of them runs."""
    if not is_installed():
        return text
    text = re.sub(r"(torchrun .*?) training/(\w+)\.py", r"\1 -m headrace.training.\2", text)
    for script, command in COMMANDS.items():
        text = re.sub(rf"(python )?{re.escape(script)}", command, text)
    return text
