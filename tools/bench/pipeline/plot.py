"""The picture of `bench_pipeline.py`: a panel of bars per recipe, below the line of decoding."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from headrace.tools.bench.pipeline.result import Result, find, ratio
from headrace.tools.bench.pipeline.task import DALI_READER, DECODE, OWN_ENGINES, VIEW_SIDES

OWN, PEER, PALE, CEILING = "#2166ac", "#8c8c8c", "#d9d9d9", "#b2182b"
UNASKED = (DECODE, DALI_READER)
PANEL_INCHES = (5.6, 4.2)


def draw(groups: Sequence[Sequence[Result]], context: dict[str, Any]) -> Figure:
    """A panel for each recipe, at the largest number of threads that was measured for it."""
    group_of = {group[0].task.recipe: group for group in groups}  # the last has the most threads
    columns = min(2, len(group_of))
    rows = -(-len(group_of) // columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, group in zip(panels.flat, group_of.values(), strict=False):
        _panel(panel, group)
    for panel in list(panels.flat)[len(group_of) :]:
        panel.set_axis_off()
    machine, data = context["machine"], context["data"]
    figure.suptitle(
        f"Images per second to normalised float32\n{machine['processor']}, {machine['cores']} cores"
        f" · {data['name']}, {data['mean_width']:.0f} x {data['mean_height']:.0f}, "
        f"{data['mean_bytes'] / 1000:.0f} kB · {context['date'][:10]}",
        fontsize=11,
    )
    tasks = [row.task for group in groups for row in group if row.task.engine not in UNASKED]
    is_own = [task.engine in OWN_ENGINES for task in tasks]
    entries = {
        "headrace": (OWN, any(is_own)),
        "peers": (PEER, not all(is_own)),
        "the same to uint8": (PALE, any(task.output == "uint8" for task in tasks)),
        "decoding alone": (CEILING, True),
    }
    figure.legend(
        handles=[Patch(color=color, label=name) for name, (color, on) in entries.items() if on],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    return figure


def _panel(panel: Axes, group: Sequence[Result]) -> None:
    task = group[0].task
    engines = dict.fromkeys(row.task.engine for row in group if row.task.engine not in UNASKED)
    decode = find(group, DECODE)
    top = 0.0 if decode is None else decode.rate
    for place, engine in enumerate(engines):
        result, small = find(group, engine), find(group, engine, "uint8")
        if small is not None:
            panel.bar(place + 0.28, small.rate, 0.28, color=PALE)
            top = max(top, small.rate)
        if result is None:
            if small is None:
                refused = any(row.cannot for row in group if row.task.engine == engine)
                reason = "cannot\nexpress it" if refused else "failed"
                panel.text(place, 0, reason, ha="center", va="bottom", color=PEER, fontsize=8)
            continue
        spread = [
            [max(0.0, result.rate - min(result.rates))],
            [max(0.0, max(result.rates) - result.rate)],
        ]
        colour = OWN if engine in OWN_ENGINES else PEER
        panel.bar(place - 0.05, result.rate, 0.4, color=colour, yerr=spread, capsize=3)
        share = "" if decode is None else f"\n{ratio(result, decode):.0%}"
        panel.annotate(
            f"{result.rate:,.0f}{share}",
            (place - 0.05, max(result.rates)),
            textcoords="offset points",
            xytext=(0, 3),
            ha="center",
            fontsize=8,
        )
        top = max(top, max(result.rates))
    if decode is not None:
        panel.axhline(decode.rate, color=CEILING, linewidth=1.2)
        panel.axhspan(min(decode.rates), max(decode.rates), color=CEILING, alpha=0.12, linewidth=0)
        panel.annotate(
            f"{decode.rate:,.0f}",
            (1, decode.rate),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(-2, 2),
            ha="right",
            color=CEILING,
            fontsize=8,
        )
    sides = VIEW_SIDES[task.recipe]
    views = " + ".join(f"{sides.count(side)} x {side}" for side in dict.fromkeys(sides))
    plural = "s" if task.threads > 1 else ""
    title = f"{task.recipe}: {views}, {task.threads} thread{plural}"
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xticks(range(len(engines)), list(engines), rotation=20, fontsize=9)
    panel.set_xlim(-0.6, len(engines) - 0.4)
    panel.set_ylim(0, 1.25 * top if top else 1)
    panel.grid(axis="y", alpha=0.25)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
