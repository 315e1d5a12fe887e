"""How far the engines are from each other, op by op and recipe by recipe, on real photographs.

    python tools/compare_engines.py --data data/photos
    python tools/compare_engines.py --data data/photos --engine dali --recipe dino,deit --no-ops

Every engine executes the same Plan on the same bytes. Differences are in 8-bit levels: the mean
over all values, the 99th percentile, the maximum. Boxes, keys and masks must be equal. Ends with 1
where a mean is above its limit, and names the row. An engine that needs a named approximation is
measured with it, and the row says so; an approximation is not held to the limits of single ops.
"""

if __name__ == "__main__":
    from headrace.tools import front

    front.answer(__file__)  # help and mistakes need none of what follows


import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from headrace.pipelines import engines, recipes
from headrace.pipelines.approximation import APPROXIMATIONS, Approximation
from headrace.pipelines.batch import Batch, Erased, Mixed
from headrace.pipelines.draw import draw
from headrace.pipelines.engines import EngineName, Work
from headrace.pipelines.engines.device_stage import device_stage
from headrace.pipelines.ops import resized_shape
from headrace.pipelines.recipe import Augmentation
from headrace.shards.errors import UserError
from headrace.shards.index import ShardError
from headrace.shards.local import local
from headrace.shards.pixels import decode_rgb
from headrace.shards.store import Store
from headrace.tools.arguments import some_of, whole
from headrace.tools.bench.machine import machine, package_versions
from headrace.tools.compare_cases import LIMITS, PIXELS, Case, levels_of_one, op_cases, recipe_cases
from headrace.tools.result_tables import agreement_table, cell
from headrace.tools.view_pictures import last_parts
from headrace.training.data_sets import open_train

COMPARED: Final = ("fused", "dali")
CPU = torch.device("cpu")
PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "pillow", "simplejpeg")


@dataclass(frozen=True)
class Outcome:
    """What an engine made of a case: a batch, or the reason why there is none.

    approximate: the named differences that it had to be allowed.
    """

    batch: Batch | None
    reason: str = ""
    approximate: tuple[Approximation, ...] = ()
    finished_by: str = ""


@dataclass(frozen=True)
class Differences:
    """|difference| of two batches over all values, in 8-bit levels."""

    mean: float
    percentile_99: float
    maximum: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        store = open_train(options.data)
        if options.samples > len(store):
            raise ShardError(
                f"--samples is {options.samples}, and {store.uri} has {len(store)} images"
            )
        cases = [
            *(() if options.no_ops else op_cases()),
            *recipe_cases(options.recipe, options.samples),
        ]
        lines = list(_measured(cases, store, options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    if options.markdown:
        print(f"\n{agreement_table(lines)}")
    broken = [line for line in lines if not line["holds"]]
    for line in broken:
        print(f"broken: {_sentence(line)}", file=sys.stderr)
    print(f"{len(lines)} comparisons, {len(broken)} beyond their limit")
    return 1 if broken else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare the engines on real photographs, with the same Plan.",
        epilog="""examples:
  python tools/compare_engines.py --data data/photos --markdown
  python tools/compare_engines.py --data data/photos --recipe dino,deit --json agreement.jsonl
  python tools/compare_engines.py --data data/photos --engine fused --recipe none""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=local, help="data set; by default ./data's only one")
    parser.add_argument(
        "--engine", type=some_of(COMPARED), default=COMPARED, help="fused,dali or one"
    )
    parser.add_argument(
        "--recipe",
        type=_recipes,
        default=list(recipes.NAMED),
        metavar="NAMES",
        help="named recipes, by commas; none or all (the default)",
    )
    parser.add_argument("--no-ops", action="store_true", help="recipes only")
    parser.add_argument("--samples", type=whole(4), default=44, help="photographs, 4 or more")
    parser.add_argument("--seed", type=int, default=0, help="of the Plan")
    parser.add_argument("--threads", type=int, default=2, help="host threads of each engine")
    parser.add_argument("--json", type=local, metavar="FILE", help="append a line per comparison")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    return parser.parse_args(arguments)


def _recipes(text: str) -> list[str]:
    match text:
        case "none":
            return []
        case "all":
            return list(recipes.NAMED)
        case _:
            return text.split(",")


def _measured(
    cases: Sequence[Case], store: Store, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A JSON line per case and pair of engines; each is printed as it comes."""
    context = _context(store, options)
    pairs = list(itertools.combinations(("reference", *options.engine), 2))
    _print_row("mean / 99th percentile / maximum", (" - ".join(pair) for pair in pairs))
    for case in cases:
        work = work_for(case, store, options.samples, options.seed)
        outcomes = {
            name: execute(name, case, work, options.threads)
            for name in ("reference", *options.engine)
        }
        lines = [compared(case, against, engine, outcomes) | context for against, engine in pairs]
        _print_row(case.name, map(cell, lines))
        yield from lines


def _print_row(name: str, cells: Iterable[str]) -> None:
    print(f"{name:<36}" + "".join(f"{text:<28}" for text in cells), flush=True)


def work_for(case: Case, store: Store, samples: int, seed: int) -> Work:
    """The case's pictures, spread over the whole store, and their Plan."""
    samples -= samples % case.augmentation.group
    ids = np.linspace(0, len(store) - 1, samples).astype(np.int64)
    encoded = store.read(ids)
    sizes = store.sizes(ids)
    if case.source != "jpeg":
        pictures = [decode_rgb(data) for data in encoded]
        if case.source in ("square", "faded"):
            pictures = [_square(picture, PIXELS) for picture in pictures]
        if case.source == "faded":
            pictures = [ImageEnhance.Contrast(picture).enhance(0.5) for picture in pictures]
        encoded = [_pnm(picture) for picture in pictures]
        sizes = np.array([picture.size[::-1] for picture in pictures], np.int32)
    plan = draw(
        case.augmentation,
        seed=seed,
        epoch=0,
        position=0,
        first=0,
        ids=ids,
        occurrences=np.zeros(samples, np.int32),
        sizes=sizes,
    )
    return Work(plan, encoded, store.labels(ids))


def _square(picture: Image.Image, side: int) -> Image.Image:
    height, width = resized_shape(picture.height, picture.width, side)
    left, top = (width - side) // 2, (height - side) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))


def _pnm(picture: Image.Image) -> NDArray[np.uint8]:
    """Raw pixels with a header, as stores hand them out: no decoder is compared."""
    file = BytesIO()
    picture.save(file, "PPM")
    return np.frombuffer(file.getvalue(), np.uint8)


def execute(name: EngineName, case: Case, work: Work, threads: int) -> Outcome:
    """One batch through one engine, with no more approximations than it needs."""
    recipe = case.augmentation
    allowed = needed(name, recipe)
    if allowed is None:
        return Outcome(None, "; ".join(engines.unsupported(name, recipe, CPU, APPROXIMATIONS)))
    itself = case.finished and engines.finishes(name, recipe, CPU, torch.float32)
    engine = engines.open_engine(
        name,
        recipe,
        threads=threads,
        finished=torch.float32 if itself else None,
        approximate=allowed,
    )
    with closing(engine):
        (batch,) = engine.run(iter([work]))
    if case.finished and not itself:
        batch = device_stage(batch, recipe.mean, recipe.std, device=CPU)
    finished_by = "" if not case.finished else name if itself else "device_stage"
    return Outcome(batch, "", allowed, finished_by)


def needed(name: EngineName, recipe: Augmentation) -> tuple[Approximation, ...] | None:
    """The fewest approximations with which the engine runs the recipe; None if it never does."""
    for count in range(len(APPROXIMATIONS) + 1):
        for allowed in itertools.combinations(APPROXIMATIONS, count):
            if not engines.unsupported(name, recipe, CPU, allowed):
                return allowed
    return None


def compared(
    case: Case, against: EngineName, engine: EngineName, outcomes: dict[str, Outcome]
) -> dict[str, Any]:
    """The line of one case and one pair of engines."""
    mine, theirs = outcomes[against], outcomes[engine]
    approximate = sorted({*mine.approximate, *theirs.approximate})
    limits = LIMITS[case.limits]
    limit = max(limits[name] for name in (against, engine) if name in limits)
    line: dict[str, Any] = {
        "kind": case.kind,
        "name": case.name,
        "engine": engine,
        "against": against,
        "approximate": approximate,
        "finished_by": theirs.finished_by,
        "limit_levels": limit,
    }
    if mine.batch is None or theirs.batch is None:
        reason = mine.reason or theirs.reason
        return line | {"supported": False, "reason": reason, "holds": True}
    differences = distance(mine.batch, theirs.batch, case.augmentation)
    exact = facts_equal(mine.batch, theirs.batch)
    within = differences.mean <= limit or (bool(approximate) and case.kind == "op")
    return line | {
        "supported": True,
        "reason": "",
        "mean_levels": differences.mean,
        "percentile_99_levels": differences.percentile_99,
        "maximum_levels": differences.maximum,
        "facts_equal": exact,
        "holds": exact and within,
    }


def distance(batch: Batch, other: Batch, recipe: Augmentation) -> Differences:
    """|difference| over all values of all views, in 8-bit levels; finished ones scaled back."""
    parts = []
    for mine, theirs in zip(batch.views, other.views, strict=True):
        if mine.dtype == torch.uint8:
            parts.append((mine.to(torch.int16) - theirs.to(torch.int16)).abs().float())
        else:
            scale = torch.tensor(levels_of_one(recipe.std))[:, None, None]
            parts.append((mine - theirs).abs() * scale)
    values = np.concatenate([part.permute(0, 2, 3, 1).numpy().reshape(-1) for part in parts])
    kept = np.partition(values, round(0.99 * (len(values) - 1)))
    return Differences(
        mean=float(values.mean(dtype=np.float64)),
        percentile_99=float(kept[round(0.99 * (len(values) - 1))]),
        maximum=float(values.max()),
    )


def facts_equal(batch: Batch, other: Batch) -> bool:
    """Whether all that is no pixel is equal, bit for bit: masks, boxes, keys, weights, draws."""
    mine, theirs = list(_facts(batch)), list(_facts(other))
    return [name for name, _ in mine] == [name for name, _ in theirs] and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for (_, a), (_, b) in zip(mine, theirs, strict=True)
    )


def _facts(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    yield from (("labels", batch.labels), ("ids", batch.ids))
    yield from ((f"draw {name}", batch.draws[name]) for name in sorted(batch.draws))
    held: list[tuple[str, torch.Tensor | Erased | Mixed | None]] = [("mixed", batch.mixed)]
    held += [(f"mask {view}", mask) for view, mask in enumerate(batch.masks)]
    held += [(f"erased {view}", erased) for view, erased in enumerate(batch.erased)]
    for name, value in held:
        fields = vars(value) if isinstance(value, Erased | Mixed) else {"": value}
        for field, tensor in fields.items():
            if tensor is not None:
                yield f"{name} {field}", tensor


def _context(store: Store, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "samples": options.samples,
        "seed": options.seed,
        "data": last_parts(store.uri),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": package_versions(PACKAGES),
    }


def _sentence(line: dict[str, Any]) -> str:
    pair = f"{line['kind']} {line['name']!r}, {line['against']} and {line['engine']}"
    if not line["facts_equal"]:
        return f"{pair}: boxes, keys, masks or draws differ"
    return f"{pair}: {line['mean_levels']:.3f} levels on average, limit {line['limit_levels']:g}"


if __name__ == "__main__":
    sys.exit(main())
