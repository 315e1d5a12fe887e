"""What a measurement belongs to: the machine and the versions of what ran on it."""

import os
import platform
import re
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

from headrace.shards.cores import usable_cores


def processor() -> str:
    """The CPU's name, as the kernel has it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.machine()


def memory_bytes() -> int:
    """Of the whole machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> dict[str, Any]:
    """processor, usable cores, memory_bytes and system; JSON-ready."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "system": platform.platform(),
    }


def package_versions(packages: Collection[str]) -> dict[str, str]:
    """Of Python, of these packages and of DALI, as far as they are installed, sorted by name."""
    versions = {"python": platform.python_version()}
    for distribution in metadata.distributions():
        name = distribution.name.lower()
        if name in packages or name.startswith("nvidia-dali"):
            versions[name] = distribution.version
    return dict(sorted(versions.items()))
