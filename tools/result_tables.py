"""Tables of results: numbers in few digits, cells of differences, Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
"""One measurement, as the tools write it to a file of JSON lines."""


def number(value: float) -> str:
    """Two significant digits without an exponent: 0, 0.00003, 0.18, 4.2, 57."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 1 - math.floor(math.log10(abs(value))))
    shown = f"{value:.{decimals}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def cell(line: Line) -> str:
    """Mean / 99th percentile / maximum, and how the engine came by them."""
    if not line["supported"]:
        return f"no: {line['reason']}"
    shown = " / ".join(
        "<0.0001" if 0 < line[key] < 0.0001 else number(line[key])
        for key in ("mean_levels", "percentile_99_levels", "maximum_levels")
    )
    asked = line["approximate"]
    return f"needs {', '.join(asked)}: {shown}" if asked else shown


def agreement_table(lines: Sequence[Line]) -> str:
    """Op or recipe x engine: the differences from `reference`, and between the others in pairs."""
    pairs = list(dict.fromkeys((line["against"], line["engine"]) for line in lines))
    pairs.sort(key=lambda pair: pair[0] != "reference")
    line_of = {
        (line["kind"], line["name"], line["against"], line["engine"]): line for line in lines
    }
    parts = []
    for kind, title in (("op", "op"), ("recipe", "whole recipe")):
        names = list(dict.fromkeys(line["name"] for line in lines if line["kind"] == kind))
        if not names:
            continue
        rows = [[title, *(_pair(*pair) for pair in pairs)]]
        for name in names:
            of_name = [line_of.get((kind, name, *pair)) for pair in pairs]
            rows.append([name, *("" if line is None else cell(line) for line in of_name)])
        parts.append(markdown(rows))
    return "\n\n".join(parts)


def _pair(against: str, engine: str) -> str:
    return f"`{engine}`" if against == "reference" else f"`{engine}` and `{against}`"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("---" for _ in rows[0]) + " |")
    return "\n".join(lines)
