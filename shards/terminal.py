"""What is printed may hold names of files, and those may be no text."""

import io
import sys


def print_any_name() -> None:
    """Let stdout and stderr take every name: what they cannot encode is escaped.

    For the start of a command. A name that is no UTF-8 would end it with an error otherwise, where
    a terminal or PYTHONIOENCODING is strict.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
