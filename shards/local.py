"""Paths on this machine: what a user wrote where only these can be opened."""

import os
import re
from argparse import ArgumentTypeError
from pathlib import Path

from headrace.shards.index import ShardError

# One slash is enough: Path("s3://bucket/x") has lost the other. One letter is a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?!$)|pipe:")


def local_path(given: str | os.PathLike[str]) -> Path:
    """Absolute, with ~ expanded. Raises ShardError for an address of something elsewhere."""
    text = os.fspath(given)
    if _ADDRESS.match(text) and not os.path.exists(text):
        address = re.sub(r"^([A-Za-z][\w+.-]+):/+", r"\1://", text)
        raise ShardError(
            f"{address} is an address, and only files on this machine can be opened: fetch it "
            f"first, or mount it, and name the directory"
        )
    return Path(os.path.abspath(os.path.expanduser(text)))


def local(text: str) -> Path:
    """A path as argparse's `type`: as given, ~ expanded, refused where `local_path` does."""
    try:
        local_path(text)
    except ShardError as error:
        raise ArgumentTypeError(str(error)) from error
    return Path(text).expanduser()
