"""The tables of measurements on the project's pages, made of the JSON lines that the tools left.

    python tools/make_tables.py            # every page, from the newest files in tools/benchmarks
    python tools/make_tables.py --check    # ends with 1 where a page says something else

What stands on a page between `<!-- agreement -->` and `<!-- /agreement -->` is replaced, and
nothing else; likewise for the other names of `SECTIONS`. A page says with its markers what it
shows. Of lines for the same thing the last one counts.
"""

if __name__ == "__main__":
    from headrace.tools import front

    front.answer(__file__)  # help and mistakes need none of what follows


import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from headrace.pipelines import recipes
from headrace.pipelines.engines import finishes
from headrace.pipelines.recipe import Augmentation
from headrace.shards.atomic import atomic_file
from headrace.shards.errors import UserError
from headrace.shards.local import local
from headrace.tools.bench.methods.rows import is_pixels, table, verdicts
from headrace.tools.result_tables import Line, agreement_table, markdown, number

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "tools/benchmarks"
PAGES = (
    ROOT / "README.md",
    ROOT / "pipelines/engines/README.md",
    ROOT / "training/methods/README.md",
    ROOT / "tools/benchmarks/README.md",
)
OWN = ("fused", "dali", "reference")
PEERS = {
    "torchvision": "vs torchvision's DataLoader",
    "dali_native": "vs DALI's own operators",
    "ffcv": "vs FFCV",
    "webdataset": "vs webdataset",
}
"""Other libraries by their name in the lines, and what a table calls them."""


class TableError(UserError):
    """A file or a page that no table can be made of: which and why."""


def agreement_section(lines: Sequence[Line]) -> str:
    """Each engine against `reference`; of the pairs of the others what is worst."""
    last = _last(lines)
    table = agreement_table([line for line in lines if line["against"] == "reference"])
    sentences = [f"{last['samples']} photographs."]
    others = [line for line in lines if line["against"] != "reference" and line["supported"]]
    for against, engine in dict.fromkeys((line["against"], line["engine"]) for line in others):
        worst = max(
            (line for line in others if (line["against"], line["engine"]) == (against, engine)),
            key=lambda line: line["mean_levels"],
        )
        sentences.append(
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
    sentences.append(f"Beyond their limit: {'; '.join(broken)}." if broken else "All limits hold")
    if not broken:
        but = f" but those of what is approximated: {'; '.join(approximated)}."
        sentences[-1] += but if approximated else "."
    return f"{table}\n\n{' '.join([*sentences, _where(last)])}"


@dataclass(frozen=True)
class Speed:
    """Images/s of one recipe by engine, and what the best of ours is worth.

    decode: of decoding alone, and the best one's share of it; times: the peers' factors, medians
    over rounds where the lines have them.
    """

    recipe: str
    rates: dict[str, float]
    cannot: frozenset[str]
    best: str | None
    decode: float | None
    decode_share: float | None
    times: dict[str, float]


def speeds(lines: Sequence[Line]) -> list[Speed]:
    """One per recipe: of the largest number of threads, at finished float32 batches."""
    threads = max(line["threads"] for line in lines)
    chosen = {
        (line["recipe"], line["engine"]): line
        for line in lines
        if line["threads"] == threads and line["output"] in ("float32", "any")
    }
    cannot = {(line["recipe"], peer) for line in lines for peer in line.get("cannot_express", ())}
    result = []
    for recipe in dict.fromkeys(recipe for recipe, _ in chosen):
        line_of = {engine: line for (name, engine), line in chosen.items() if name == recipe}
        rates = {engine: line["images_per_second"] for engine, line in line_of.items()}
        decodes = [line["decode_images_per_second"] for line in line_of.values()]
        decode = next((rate for rate in decodes if rate), None)
        best = max((e for e in OWN if e in rates), key=lambda e: rates[e], default=None)
        share, times = None, {}
        if best is not None:
            share = line_of[best].get("decode_share") or (decode and rates[best] / decode)
            times = {p: rates[best] / rates[p] for p in PEERS if p in rates}
            times |= line_of[best].get("times_peer", {})
        unable = frozenset(peer for name, peer in cannot if name == recipe)
        result.append(Speed(recipe, rates, unable, best, decode, share, times))
    return result


def speed_section(lines: Sequence[Line]) -> str:
    """Images per second by recipe and engine, and what the best of ours is worth."""
    of_recipes = speeds(lines)
    engines = [e for e in (*OWN, *PEERS) if any(e in speed.rates for speed in of_recipes)]
    rates = [["images/s", "decoding alone", *(f"`{engine}`" for engine in engines)]]
    worth = [["recipe", "best of ours", "of decoding alone", *(f"vs `{p}`" for p in PEERS)]]
    for speed in of_recipes:
        decode = "" if speed.decode is None else f"{speed.decode:,.0f}"
        rates.append([speed.recipe, decode, *(_rate(speed, engine) for engine in engines)])
        if speed.best is not None:
            share = "" if not speed.decode_share else f"{speed.decode_share:.2f}"
            factors = [f"{speed.times[p]:.1f} x" if p in speed.times else "" for p in PEERS]
            worth.append([speed.recipe, f"`{speed.best}`", share, *factors])
    return "\n\n".join([markdown(_filled(rates)), markdown(_filled(worth)), _speed_note(lines)])


def _rate(speed: Speed, engine: str) -> str:
    if engine in speed.rates:
        return f"{speed.rates[engine]:,.0f}"
    return "cannot" if engine in speed.cannot else ""


def _speed_note(lines: Sequence[Line]) -> str:
    threads, last = max(line["threads"] for line in lines), _last(lines)
    plural = "s" if threads > 1 else ""
    return f"{threads} thread{plural}, batches of {last['batch_size']}. {_where(last)}"


def peers_section(lines: Sequence[Line]) -> str:
    """A row per recipe: our images per second, and how many times those of each peer they are."""
    rows = [["recipe", "headrace", *(PEERS[peer] for peer in PEERS), "of decoding alone"]]
    for speed in speeds(lines):
        if speed.best is None:
            continue
        factors = [
            f"{speed.times[peer]:.1f} x" if peer in speed.times
            else "cannot" if peer in speed.cannot
            else ""
            for peer in PEERS
        ]  # fmt: skip
        share = f"{speed.decode_share:.0%}" if speed.decode_share else ""
        rows.append([speed.recipe, f"{speed.rates[speed.best]:,.0f} images/s", *factors, share])
    return "\n\n".join([markdown(_filled(rows)), _speed_note(lines)])


def claim_section(lines: Sequence[Line]) -> str:
    """What the first paragraph says of speed: the range over recipes, on what and when."""
    compared = [speed for speed in speeds(lines) if "torchvision" in speed.times]
    if not compared:
        raise TableError("there is no row of torchvision to compare with")
    times = sorted(speed.times["torchvision"] for speed in compared)
    shares = sorted(speed.decode_share or 0 for speed in compared)
    last = _last(lines)
    return (
        f"**{times[0]:.1f} to {times[-1]:.0f} times the images per second** of torchvision's "
        f"transforms in a DataLoader, on the same {last['machine']['cores']} CPU cores, and "
        f"{shares[0]:.0%} to {shares[-1]:.0%} of decoding the JPEGs and doing nothing else "
        f"([measured](tools/benchmarks/README.md) {last['date'][:10]})."
    )


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
    return "\n\n".join([markdown(_filled(table(lines))), f"{note} {_where(last, runs)}"])


def quickstart_section(lines: Sequence[Line]) -> str:
    """kNN of each run of the quickstart beside raw pixels and the untrained network."""
    head = ["samples", "seed", "raw pixels", "untrained", "trained", "CPU seconds of training"]
    rows = [[*head, "images/s"]]
    for line in sorted(lines, key=lambda line: (line["samples"], line["seed"])):
        judged = [f"{line['knn'][name]:.1f} %" for name in ("pixels", "untrained", "trained")]
        cost = line["train_cpu_seconds"]
        rows.append(
            [
                f"{line['samples']:,}",
                str(line["seed"]),
                *judged,
                "" if cost is None else f"{cost:,.0f}",
                f"{line['images_per_second']:,.0f}",
            ]
        )
    last = _last(lines)
    note = (
        f"`{last['method']}`, preset `{last['preset']}`, `{last['backbone']}`; top-1 of all 10,000 "
        f"test images by kNN with k = 20."
    )
    return "\n\n".join([markdown(_filled(rows)), f"{note} {_where(last, lines)}"])


def demo_section(lines: Sequence[Line]) -> str:
    """What the first page says of the quickstart, of the runs that were as long as the last."""
    lines = [line for line in lines if line["samples"] == _last(lines)["samples"]]
    judged = {
        name: sorted(line["knn"][name] for line in lines)
        for name in ("trained", "pixels", "untrained")
    }
    trained, pixels, untrained = judged.values()
    costs = sorted(line["train_cpu_seconds"] for line in lines if line["train_cpu_seconds"])
    seeds = len({line["seed"] for line in lines})
    return (
        f"**{sum(trained) / len(trained):.1f} %** of CIFAR-10's test images find their class among "
        f"their nearest neighbours ({trained[0]:.1f} to {trained[-1]:.1f} over {seeds} seeds), "
        f"after {costs[0]:,.0f} to {costs[-1]:,.0f} CPU seconds of training; by raw pixels it is "
        f"{pixels[0]:.1f} %, by the untrained network {sum(untrained) / len(untrained):.1f} % "
        f"([measured](tools/benchmarks/README.md#quickstart) {_last(lines)['date'][:10]})."
    )


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


def _where(line: Line, among: Sequence[Line] = ()) -> str:
    """When and on what: of one line, or on the days of several that were measured alike."""
    days = sorted({each["date"][:10] for each in among or [line]})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    machine, versions = line["machine"], line["versions"]
    named = ("python", "torch", "torchvision", "pillow", "timm")
    shown = [f"{name} {versions[name]}" for name in named if name in versions]
    shown += [f"DALI {value}" for name, value in versions.items() if name.startswith("nvidia-dali")]
    return (
        f"Measured {when} on {machine['cores']} cores of {machine['processor']}; "
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


@dataclass(frozen=True)
class Section:
    """What stands between two markers. kind: of the file tools/benchmarks/<date>-<kind>.jsonl."""

    name: str
    kind: str
    made: Callable[[Sequence[Line]], str]


SECTIONS = (
    Section("agreement", "agreement", agreement_section),
    Section("claim", "speed", claim_section),
    Section("peers", "speed", peers_section),
    Section("speed", "speed", speed_section),
    Section("costs", "costs", costs_section),
    Section("methods", "methods", methods_section),
    Section("demo", "quickstart", demo_section),
    Section("quickstart", "quickstart", quickstart_section),
)
"""Those made of measurements; `recipes` is made of the code."""

TOOLS = {
    "agreement": "compare_engines.py",
    "speed": "bench_pipeline.py",
    "costs": "bench_pipeline.py --engine fused",
    "methods": "bench_methods.py",
    "quickstart": "quickstart.sh",
}
"""Kinds of files, and what writes them."""


def rewritten(text: str, files: Mapping[str, Path | None]) -> str:
    """A page with its tables made anew. files: by kind; None where there is none.

    Raises TableError for a page or a file that no table can be made of.
    """
    if _marked(text, "recipes"):
        text = replaced(text, "recipes", recipes_section())
    for section in SECTIONS:
        if not _marked(text, section.name):
            continue
        path = files[section.kind]
        if path is None:
            raise TableError(
                f"a page shows {section.name}, and there is no file "
                f"tools/benchmarks/<date>-{section.kind}.jsonl"
            )
        try:
            text = replaced(text, section.name, section.made(read_lines(path)))
        except (KeyError, TypeError) as error:
            raise TableError(f"{path}: a line has no {error}") from error
    return text


def _marked(text: str, section: str) -> bool:
    return f"<!-- {section} -->" in text or f"<!-- /{section} -->" in text


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    files = {kind: getattr(options, kind) for kind in TOOLS}
    try:
        old = {page: page.read_text(encoding="utf-8") for page in options.page or PAGES}
        new = {page: rewritten(text, files) for page, text in old.items()}
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differ = [page for page in new if new[page] != old[page]]
    for page in differ:
        if options.check:
            print(f"{page} differs; run tools/make_tables.py", file=sys.stderr)
        else:
            with atomic_file(page) as file:
                file.write(new[page].encode())
            print(f"{page} is rewritten")
    if not differ:
        print(f"{len(new)} page{'s' * (len(new) > 1)} say{'s' * (len(new) == 1)} what was measured")
    return 1 if differ and options.check else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write the measured tables into the pages beside the code.",
        epilog="""examples:
  python tools/make_tables.py
  python tools/make_tables.py --agreement agreement.jsonl --check""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--page",
        type=local,
        action="append",
        metavar="FILE",
        help="one page, may be repeated; by default all: "
        + ", ".join(str(page.relative_to(ROOT)) for page in PAGES),
    )
    for kind, tool in TOOLS.items():
        parser.add_argument(
            f"--{kind}",
            type=local,
            default=_newest(kind),
            metavar="FILE",
            help=f"JSON lines of {tool}; by default the newest in tools/benchmarks",
        )
    parser.add_argument("--check", action="store_true", help="write nothing; compare")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
