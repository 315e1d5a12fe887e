"""The README's tables of measurements, made of the JSON lines that the tools left.

    python tools/readme_tables.py            # the newest files in tools/benchmarks
    python tools/readme_tables.py --check    # ends with 1 where the README says something else

What stands between `<!-- agreement -->` and `<!-- /agreement -->`, `<!-- speed -->` and
`<!-- /speed -->`, and likewise for `costs`, `methods` and `recipes`, is replaced, and nothing else;
a section without markers is left out. Of lines for the same thing the last one counts.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch

from headrace.pipelines import recipes
from headrace.pipelines.engines import finishes
from headrace.pipelines.recipe import Augmentation
from headrace.shards.atomic import atomic_file
from headrace.tools.bench.methods.rows import is_pixels, table, verdicts
from headrace.tools.result_tables import Line, agreement_table, markdown, number

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "tools/benchmarks"
OWN = ("fused", "dali", "reference")
PEERS = ("torchvision", "dali_native", "ffcv", "webdataset")


class TableError(ValueError):
    """A file or a README that no table can be made of: which and why."""


def agreement_section(lines: Sequence[Line]) -> str:
    """Each engine against `reference`; of the pairs of the others what is worst."""
    last = _last(lines)
    table = agreement_table([line for line in lines if line["against"] == "reference"])
    said = [f"{last['samples']} photographs."]
    others = [line for line in lines if line["against"] != "reference" and line["supported"]]
    for against, engine in dict.fromkeys((line["against"], line["engine"]) for line in others):
        worst = max(
            (line for line in others if (line["against"], line["engine"]) == (against, engine)),
            key=lambda line: line["mean_levels"],
        )
        said.append(
            f"Between `{against}` and `{engine}` no mean is above {number(worst['mean_levels'])} "
            f"({worst['name']})."
        )
    beyond = [
        line
        for line in lines
        if not line["holds"] or (line["supported"] and line["mean_levels"] > line["limit_levels"])
    ]
    broken = dict.fromkeys(line["name"] for line in beyond if not line["holds"])
    approximated = dict.fromkeys(line["name"] for line in beyond if line["holds"])
    said.append(f"Beyond their limit: {'; '.join(broken)}." if broken else "All limits hold")
    if not broken:
        but = f" but those of what is approximated: {'; '.join(approximated)}."
        said[-1] += but if approximated else "."
    return f"{table}\n\n{' '.join([*said, _where(last)])}"


def speed_section(lines: Sequence[Line]) -> str:
    """Images per second by recipe and engine, and what the best of ours is worth."""
    last = _last(lines)
    threads = max(line["threads"] for line in lines)
    chosen = {
        (line["recipe"], line["engine"]): line
        for line in lines
        if line["threads"] == threads and line["output"] in ("float32", "any")
    }
    names = list(dict.fromkeys(recipe for recipe, _ in chosen))
    cannot = {
        (line["recipe"], engine) for line in lines for engine in line.get("cannot_express", ())
    }
    engines = [
        *(engine for engine in (*OWN, *PEERS) if any((name, engine) in chosen for name in names)),
    ]
    rates = [["images/s", "decoding alone", *(f"`{engine}`" for engine in engines)]]
    worth = [["recipe", "best of ours", "of decoding alone", *(f"vs `{p}`" for p in PEERS)]]
    for name in names:
        of_name = {engine: chosen[name, engine] for engine in engines if (name, engine) in chosen}
        rate = {engine: line["images_per_second"] for engine, line in of_name.items()}
        ours = [engine for engine in OWN if engine in rate]
        decode = next(
            (
                line["decode_images_per_second"]
                for line in of_name.values()
                if line["decode_images_per_second"]
            ),
            None,
        )
        shown = [
            f"{rate[engine]:,.0f}"
            if engine in rate
            else "cannot"
            if (name, engine) in cannot
            else ""
            for engine in engines
        ]
        rates.append([name, "" if decode is None else f"{decode:,.0f}", *shown])
        if ours:
            best = max(ours, key=lambda engine: rate[engine])
            line = of_name[best]
            share = line.get("decode_share") or (decode and rate[best] / decode)
            times = line.get("times_peer", {})
            factors = [
                times.get(peer) or (rate[best] / rate[peer] if peer in rate else None)
                for peer in PEERS
            ]
            worth.append(
                [
                    name,
                    f"`{best}`",
                    "" if not share else f"{share:.2f}",
                    *("" if factor is None else f"{factor:.1f} x" for factor in factors),
                ]
            )
    plural = "s" if threads > 1 else ""
    note = f"{threads} thread{plural}, batches of {last['batch_size']}. {_where(last)}"
    return "\n\n".join([markdown(_filled(rates)), markdown(_filled(worth)), note])


def costs_section(lines: Sequence[Line]) -> str:
    """What a row of ours costs beside its speed, by recipe and threads."""
    rows = [
        ["recipe", "threads", "images/s", "least - most", "x 1 thread", "of decoding", "plans",
         "interpreter", "peak MB", "MB after 1, 10, 50 epochs", "first batch s"],
    ]  # fmt: skip
    latest = {
        (line["recipe"], line["threads"]): line
        for line in lines
        if line["engine"] == "fused" and line["output"] == "float32"
    }
    for line in latest.values():
        spread = f"{line['images_per_second_least']:,.0f} - {line['images_per_second_most']:,.0f}"
        epochs = line.get("anonymous_bytes_by_epoch", ())
        rows.append(
            [
                line["recipe"],
                str(line["threads"]),
                f"{line['images_per_second']:,.0f}",
                spread,
                f"{line['times_one_thread']:.2f}" if line.get("times_one_thread") else "",
                f"{line['decode_share']:.2f}",
                f"{line['plan_share']:.1%}",
                f"{line['interpreter_share']:.1%}",
                f"{line['peak_memory_bytes'] / 1e6:,.0f}",
                ", ".join(f"{epochs[n - 1] / 1e6:,.0f}" for n in (1, 10, 50) if n <= len(epochs)),
                f"{line['first_batch_seconds']:.2f}",
            ]
        )
    last = _last(lines)
    note = f"`fused`, float32, batches of {last['batch_size']}. {_where(last)}"
    return "\n\n".join([markdown(_filled(rows)), note])


def methods_section(lines: Sequence[Line]) -> str:
    """Whether each method learns, beside its untrained encoder and raw pixels."""
    done = [line for line in lines if line["status"] == "done"]
    runs = [line for line in done if not is_pixels(line)]
    if not runs:
        raise TableError("there is no row of a method that was trained")
    last = _last(runs)
    judged = verdicts(lines)
    learning = sum(one.learns is True for one in judged)
    seen = ", ".join(f"{number:,}" for number in sorted({line["samples"] for line in runs}))
    jobs = sorted({line["jobs"] for line in runs})
    beside = "" if jobs == [1] else f" ({jobs[-1]} runs side by side)"
    images = f"{last['subset_samples']:,} images"
    note = (
        f"{learning} of {len(judged)} methods learn: top-1 in %, gained over the untrained encoder "
        f"of the same seeds by more than 1 point and more than twice the pooled deviation over "
        f"seeds. {seen} samples seen of {images}, judged on the whole set. "
        f"Images/s of one process with {last['threads']} "
        f"thread{'s' if last['threads'] > 1 else ''}{beside}, the fastest seed's; MB its largest "
        f"resident set."
    )
    return "\n\n".join([markdown(_filled(table(lines))), f"{note} {_where(last)}"])


def recipes_section() -> str:
    """The named recipes: what each is, its views, how many deviations it lists, its GPU graph."""
    from headrace.pipelines.engines.dali.describe import graph_of

    rows = [["recipe", "what it is", "views", "deviations", "nodes of the GPU graph"]]
    for name, recipe in recipes.NAMED.items():
        what = (recipe.__doc__ or "").partition("\n\n")[0]
        listed = len(recipe().deviations)
        whole = finishes("dali", recipe(), "cpu", torch.float32)
        nodes = graph_of(recipe(), "gpu", torch.float32 if whole else None).counts()
        shown = f"{nodes['all']}, {nodes['gpu']} on the GPU"
        rows.append([f"`{name}`", what, views(recipe()), str(listed or "none"), shown])
    return markdown(rows)


def views(augmentation: Augmentation) -> str:
    """The sizes of its views: 2 x 224 + 8 x 96."""
    sizes = [
        (size, len(list(same))) for size, same in groupby(v.size for v in augmentation.flat_views)
    ]
    return " + ".join(f"{count} x {size}" for size, count in sizes)


def _filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Without the columns that are empty in every row but the head."""
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _last(lines: Sequence[Line]) -> Line:
    return max(lines, key=lambda line: line["date"])


def _where(line: Line) -> str:
    machine, versions = line["machine"], line["versions"]
    named = ("python", "torch", "torchvision", "pillow", "timm")
    shown = [f"{name} {versions[name]}" for name in named if name in versions]
    shown += [f"DALI {value}" for name, value in versions.items() if name.startswith("nvidia-dali")]
    return (
        f"Measured {line['date'][:10]} on {machine['cores']} cores of {machine['processor']}; "
        f"{', '.join(shown)}."
    )


def replaced(text: str, section: str, content: str) -> str:
    """The text with `content` between the markers of `section`, as it was where it has none.

    Raises TableError for markers that do not come as one pair, in order.
    """
    start, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    if start not in text and end not in text:
        return text
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed or start in rest or end in before + after:
        raise TableError(f"{start} and {end} must both be there once, in this order")
    return f"{before}{start}\n{content}\n{end}{after}"


def read_lines(path: Path) -> list[Line]:
    """The JSON lines of a file. Raises TableError where it has none or something else."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TableError(f"{path} has no JSON lines: {error}") from error
    if not found or not all(isinstance(line, dict) for line in found):
        raise TableError(f"{path} has no JSON lines")
    return found


def _newest(kind: str) -> Path | None:
    """Files begin with their date, so that the last name is the newest."""
    return max(BENCHMARKS.glob(f"*-{kind}.jsonl"), default=None)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        old = options.readme.read_text(encoding="utf-8")
        text = replaced(old, "recipes", recipes_section())
        sections: tuple[tuple[str, Path | None, Callable[[Sequence[Line]], str]], ...] = (
            ("agreement", options.agreement, agreement_section),
            ("speed", options.speed, speed_section),
            ("costs", options.costs, costs_section),
            ("methods", options.methods, methods_section),
        )
        for section, path, made in sections:
            if path is None:
                print(f"no {section}: there is no file tools/benchmarks/<date>-{section}.jsonl")
                continue
            try:
                text = replaced(text, section, made(read_lines(path)))
            except (KeyError, TypeError) as error:
                raise TableError(f"{path}: a line has no {error}") from error
    except (TableError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if text == old:
        print(f"{options.readme} says what was measured")
        return 0
    if options.check:
        print(f"{options.readme} differs; run tools/readme_tables.py", file=sys.stderr)
        return 1
    with atomic_file(options.readme) as file:
        file.write(text.encode())
    print(f"{options.readme} is rewritten")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write the measured tables into the README.",
        epilog="""examples:
  python tools/readme_tables.py
  python tools/readme_tables.py --agreement agreement.jsonl --check""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    for kind, tool in (
        ("agreement", "compare_engines.py"),
        ("speed", "bench_pipeline.py"),
        ("costs", "bench_pipeline.py --engine fused"),
        ("methods", "bench_methods.py"),
    ):
        parser.add_argument(
            f"--{kind}",
            type=Path,
            default=_newest(kind),
            metavar="FILE",
            help=f"JSON lines of {tool}; by default the newest in tools/benchmarks",
        )
    parser.add_argument("--check", action="store_true", help="write nothing; compare")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
