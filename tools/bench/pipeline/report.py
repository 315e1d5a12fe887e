"""What `bench_pipeline.py` prints at the end: a table per recipe, and which targets hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.tools.bench.pipeline.result import Result, best_own, find, ratio, reader_cost
from headrace.tools.bench.pipeline.task import (
    DALI_READER,
    DECODE,
    OWN_ENGINES,
    VIEW_SIDES,
    Output,
    RecipeName,
)

PLAN_SHARE, READER_COST, INTERPRETER_SHARE, FIRST_BATCH_SECONDS = 0.02, 0.05, 0.05, 3.0
PEAK_BYTES, MEMORY_GROWTH = 2 << 30, 0.02
BUSY_BELOW = 0.9  # of its cores: decoding alone takes all that it can get
IDLE_BELOW = 0.03  # of a core, that a row may take from the others


@dataclass(frozen=True)
class Target:
    """For two cores and photographs of 500 x 375: (to reach, to try for), nan where there is none.

    torchvision, dali_native: times as fast. decode: share of decoding alone.
    """

    torchvision: tuple[float, float]
    dali_native: tuple[float, float]
    decode: tuple[float, float]


NONE = float("nan")
TARGETS: dict[RecipeName, Target] = {
    "dino": Target((8, 10), (7, 9), (0.36, 0.45)),
    "simclr": Target((5, 6), (3.5, 4), (0.50, 0.55)),
    "mae": Target((2.2, 2.5), (1.9, 2), (0.72, 0.85)),
    "deit": Target((4, NONE), (2.4, 3), (0.5, 0.6)),
}

HEADINGS: tuple[str, ...] = (
    "engine", "images/s", "from - to", "uint8", "crops/s", "per core", "of decode", "CPU",
    "anon MB", "shared MB", "mapped MB", "1st batch s", "imports s",
)  # fmt: skip


def table(group: Sequence[Result]) -> str:
    """The rows of one recipe and one number of threads."""
    first = group[0].task
    sides = VIEW_SIDES[first.recipe]
    views = " + ".join(f"{sides.count(side)}x{side}" for side in dict.fromkeys(sides))
    plural = "s" if first.threads > 1 else ""
    head = f"{first.recipe}: {views}, {first.threads} thread{plural}, batches of {first.batch_size}"
    floats = any(r.task.output == "float32" and r.task.engine != DECODE for r in group)
    output: Output = "float32" if floats else "uint8"
    head += f", {output}"
    best = best_own(group, output)
    if best is not None:
        head += f"; the fastest of our engines is {best.task.engine}"
    rows: list[tuple[str, ...]] = [(*HEADINGS, "" if best is None else f"{best.task.engine} is")]
    below = []
    engines = list(dict.fromkeys(result.task.engine for result in group))
    for engine in engines:
        rows.append(_cells(group, engine, output, best))
        for result in group:
            if result.task.engine == engine:
                if result.cannot and result.task.output == output:
                    below.append(f"  {engine} cannot express this: {result.cannot}")
                if result.failed:
                    below.append(f"  {result.failed}")
            if result.task.engine == engine and result.idle and result.idle_cpu_share > IDLE_BELOW:
                below.append(
                    f"  {result.task.called} was not idle between its rounds: it used "
                    f"{result.idle_cpu_share:.0%} of a core"
                )
        notes = {note for r in group if r.task.engine == engine for note in r.notes}
        below += [f"  {engine}: {note}" for note in sorted(notes)]
    decode = find(group, DECODE)
    if decode is not None and decode.cpu_share < BUSY_BELOW:
        below.append(
            f"  NOT QUIET: decoding got {decode.cpu_share:.0%} of its cores, so something else ran "
            "on this machine; do not keep these figures"
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [head, ""]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join([*lines, *([""] if below else []), *below])


def _cells(
    group: Sequence[Result], engine: str, output: Output, best: Result | None
) -> tuple[str, ...]:
    result = find(group, engine, output)
    if result is None:
        return (engine, *["-"] * (len(HEADINGS) - 1), "")
    decode, small = find(group, DECODE), find(group, engine, "uint8")
    views = len(VIEW_SIDES[result.task.recipe])
    is_decode = engine == DECODE
    return (
        engine,
        f"{result.rate:,.0f}",
        f"{min(result.rates):,.0f} - {max(result.rates):,.0f}",
        f"{small.rate:,.0f}" if small is not None and not is_decode else "",
        f"{views * result.rate:,.0f}" if not is_decode else "",
        f"{result.rate / result.task.threads:,.0f}",
        f"{ratio(result, decode):.2f}" if decode is not None and not is_decode else "",
        f"{result.cpu_share:.0%}",
        f"{result.peak.anonymous / 1e6:,.0f}",
        f"{result.peak.shared / 1e6:,.0f}",
        f"{result.peak.mapped / 1e6:,.0f}",
        f"{result.first_batch_seconds:.2f}",
        f"{result.import_seconds:.1f}",
        f"{ratio(best, result):.2f} x" if best is not None and best is not result else "",
    )


def verdicts(groups: Sequence[Sequence[Result]]) -> Iterator[str]:
    """A sentence per target that was measured, for the largest number of threads."""
    for group in groups:
        recipe, best = group[0].task.recipe, best_own(group)
        if best is None:
            continue
        threads = f"{best.task.threads} thread" + "s" * (best.task.threads > 1)
        who = f"{recipe}, {threads}: {best.task.engine}"
        for peer in ("torchvision", "dali_native"):
            row = find(group, peer)
            if row is not None:
                aims = getattr(TARGETS[recipe], peer)
                yield f"{who} is {_against(ratio(best, row), aims, ' x')} as fast as {peer}"
        decode = find(group, DECODE)
        if decode is not None:
            aims = TARGETS[recipe].decode
            yield f"{who} reaches {_against(ratio(best, decode), aims, '')} of decoding alone"
        for result in group:
            if result.measured and result.task.engine in OWN_ENGINES:
                yield from _costs(result, f"{recipe}, {threads}: {result.task.engine}")
        cost = reader_cost(group)
        if cost is not None:
            yield (
                f"{recipe}, {threads}: our bytes cost dali {_limit(cost, READER_COST, '.1%')} of "
                f"its speed, compared with DALI's own reader ({DALI_READER})"
            )


def _costs(result: Result, who: str) -> Iterator[str]:
    if result.task.output != "float32":
        return
    if result.plan_share is not None:
        yield f"{who} spends {_limit(result.plan_share, PLAN_SHARE, '.2%')} on drawing plans"
    if result.interpreter_share is not None:
        share = _limit(result.interpreter_share, INTERPRETER_SHARE, ".1%")
        yield f"{who} spends {share} of its CPU time in the interpreter"
    seconds = _limit(result.first_batch_seconds, FIRST_BATCH_SECONDS, ".2f")
    yield f"{who} has its first batch after {seconds} s"
    peak = result.peak.anonymous
    yield f"{who} takes at most {peak / 1e6:,.0f} MB of anonymous memory" + (
        f" (holds: below {PEAK_BYTES / 1e6:,.0f})" if peak < PEAK_BYTES else " (MISSED: 2 GiB)"
    )
    by_epoch = result.anonymous_by_epoch
    if by_epoch:
        last = len(by_epoch)
        settled = min(10, last)
        listed = ", ".join(
            f"{by_epoch[epoch - 1] / 1e6:,.1f} after {epoch}"
            for epoch in sorted({1, settled, last})
        )
        growth = by_epoch[-1] / by_epoch[settled - 1] - 1
        yield (
            f"{who} has {listed} epochs, in MB of anonymous memory, and {max(by_epoch) / 1e6:,.1f} "
            f"at most; from epoch {settled} on it grows by {_limit(growth, MEMORY_GROWTH, '.1%')}"
        )


def _against(value: float, aims: tuple[float, float], unit: str) -> str:
    reach, try_for = aims
    if value >= try_for:
        verdict = f"holds: {reach:g}, and {try_for:g} was tried for"
    elif value >= reach:
        verdict = f"holds: {reach:g}" + (f", not yet {try_for:g}" if try_for == try_for else "")
    else:
        verdict = f"MISSED: {reach:g}"
    return f"{value:.2f}{unit} ({verdict})"


def _limit(value: float, limit: float, style: str) -> str:
    verdict = "holds: below" if value < limit else "MISSED: below"
    return f"{value:{style}} ({verdict} {limit:{style}})"
