"""Contact sheet of a recipe at work: original images beside all their augmented views.

    python tools/show_batch.py --data DIR --recipe dino --out sheet.png
    python tools/show_batch.py --run RUN --out sheet.png
    python tools/show_batch.py --data DIR --recipe deit --diff reference,fused --out difference.png

Real samples through a real engine, as training gets them but for the normalisation, which is taken
back. What a mask removes is greyed; what was erased or pasted is outlined. `--diff` shows the views
of two engines and, amplified, where they differ.
"""

if __name__ == "__main__":
    from headrace.tools import front

    front.answer(__file__)  # help and mistakes need none of what follows


import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from headrace.pipelines import recipes
from headrace.pipelines.approximation import APPROXIMATIONS, Approximation
from headrace.pipelines.batch import Batch
from headrace.pipelines.loader import LoaderError, open_loader
from headrace.pipelines.masks import BlockMask, Mask, MultiBlockMask, RandomMask
from headrace.pipelines.recipe import Augmentation, View
from headrace.shards.atomic import atomic_file
from headrace.shards.errors import UserError
from headrace.shards.index import ShardError
from headrace.shards.local import local
from headrace.shards.pixels import decode_rgb
from headrace.shards.store import Store
from headrace.shards.terminal import print_any_name
from headrace.tools.arguments import png, positive, some_of
from headrace.tools.contact_sheet import CAPTION_HEIGHT, Cell, Group, contact_sheet, fitting_columns
from headrace.tools.result_tables import number
from headrace.tools.view_pictures import (
    class_name,
    coloured,
    enlargement,
    greyed,
    last_parts,
    levels,
    picture_of,
)
from headrace.training.catalogue import find_method, find_preset
from headrace.training.data_sets import largest_side_pixels, open_train
from headrace.training.run.record import read_record

ERASED_OUTLINE, PASTED_OUTLINE = (255, 255, 0), (255, 0, 255)


@dataclass(frozen=True)
class Request:
    """What to show: training images, their views and what to call these; through which engines."""

    store: Store
    augmentation: Augmentation
    called: str
    engines: tuple[str, ...]
    seed: int
    samples: int
    approximate: tuple[Approximation, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    print_any_name()
    options = _parse(arguments)
    try:
        request = _requested(options)
        batches, names = zip(
            *(_first_batch(request, engine) for engine in request.engines), strict=True
        )
        cells, note = _cells(batches, request)
        through = f"{' and '.join(names)} engine" + "s" * (len(names) > 1)
        title = (
            f"{request.called}   {last_parts(request.store.uri)}   {through}, seed {request.seed}"
        )
        sheet = contact_sheet(cells, _groups(request.augmentation, names), title + note)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.out) as file:
            sheet.save(file, format="PNG")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    views = len(batches[0].views)
    print(f"{options.out}: {len(cells)} samples, {views} views each, {through}{note}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw original images beside all their augmented views.",
        epilog="""examples:
  python tools/show_batch.py --method dino --data data/cifar10 --out views.png
  python tools/show_batch.py --recipe ijepa --data data/imagenet --out masks.png
  python tools/show_batch.py --run runs/dino --engine reference --out views.png
  python tools/show_batch.py --recipe deit --diff reference,fused --out difference.png""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(recipes.NAMED)}")
    what.add_argument("--method", metavar="NAME", help="the training views of a method's preset")
    what.add_argument(
        "--run", type=local, help="a run's directory: its training views and its data"
    )
    parser.add_argument(
        "--data", type=local, help="data set; by default the run's, or ./data's only"
    )
    parser.add_argument("--preset", default="auto", help="with --method: which of its presets")
    parser.add_argument("--out", type=png, required=True, help="the PNG file to write")
    through = parser.add_mutually_exclusive_group()
    through.add_argument("--engine", help="auto, dali, reference, ...; default: the run's")
    through.add_argument(
        "--diff", type=_two, metavar="A,B", help="two engines and where they differ"
    )
    parser.add_argument(
        "--approximate",
        type=some_of(APPROXIMATIONS),
        default=(),
        metavar="NAMES",
        help=f"what an engine may do differently: {', '.join(APPROXIMATIONS)}",
    )
    parser.add_argument("--seed", type=int, help="of order and randomness; default: the run's")
    parser.add_argument("--samples", type=positive, default=8, help="number of images")
    return parser.parse_args(arguments)


def _two(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if len(names) != 2 or not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not two engines with a comma between them")
    return names


def _requested(options: argparse.Namespace) -> Request:
    engine, seed = "auto", 0
    if options.run is not None:
        record = read_record(options.run)
        store = open_train(options.data or record.train)
        views, called = record.augmentation, f"{record.method} as in {options.run.name}"
        engine, seed = record.engine, record.seed
    elif options.recipe is not None:
        views, called = recipes.named(options.recipe), options.recipe
        store = open_train(options.data)
    else:
        method = find_method(options.method)
        store = open_train(options.data)
        name, preset = find_preset(method, options.preset, lambda: largest_side_pixels(store))
        views, called = preset.augmentation, f"{options.method} ({name})"
    if options.samples > len(store):
        raise ShardError(f"--samples is {options.samples}, and {store.uri} has {len(store)} images")
    return Request(
        store,
        views,
        called,
        options.diff or (options.engine or engine,),
        seed if options.seed is None else options.seed,
        options.samples,
        tuple(options.approximate),
    )


def _first_batch(request: Request, engine: str) -> tuple[Batch, str]:
    """(the first batch of epoch 0, of whole groups, on the CPU; the engine's name).

    Views are uint8, or finished where the recipe erases or mixes.
    """
    group = request.augmentation.group
    length = -(-request.samples // group) * group
    if length > len(request.store):
        raise LoaderError(
            f"the recipe {request.augmentation.name!r} draws for groups of {group} samples, and "
            f"{request.store.uri} has {len(request.store)}"
        )
    with open_loader(
        request.store,
        request.augmentation,
        batch_size=length,
        seed=request.seed,
        engine=engine,
        stage=_finishes(request.augmentation),
        threads=2,
        prefetch=1,
        passes=1,
        approximate=request.approximate,
    ) as loader:
        return next(iter(loader)), loader.engine_name


def _finishes(augmentation: Augmentation) -> bool:
    erases = any(view.erase is not None for view in augmentation.views)
    return erases or augmentation.mix is not None


def _cells(batches: Sequence[Batch], request: Request) -> tuple[list[Cell], str]:
    """(a cell per sample, what the title must say of them)."""
    batch, store = batches[0], request.store
    ids = batch.ids.numpy()[: request.samples]
    by_engine = [[levels(view, request.augmentation) for view in batch.views] for batch in batches]
    factor = 1
    if len(batches) == 2:
        mine, theirs = by_engine
        # By one value in a thousand: a few far ones would hide all others.
        large = max(np.quantile(np.abs(a - b), 0.999) for a, b in zip(mine, theirs, strict=True))
        factor = max(1, int(255 // max(large, 1)))
    cells = []
    for row, (encoded, name) in enumerate(zip(store.read(ids), store.names(ids), strict=True)):
        pictures, labels = [], []
        if len(batches) == 1:
            for view in range(len(batch.views)):
                pictures += _view_pictures(batch, row, view, by_engine[0][view][row], request)
            labels = [""] * len(pictures)
        else:
            for a, b in zip(*by_engine, strict=True):
                difference = np.abs(a[row] - b[row])
                pictures += [
                    picture_of(a[row]),
                    picture_of(b[row]),
                    picture_of(difference * factor),
                ]
                labels += ["", "", f"{number(difference.mean())} / {number(difference.max())}"]
        caption = class_name(int(batch.labels[row]), store.classes)
        small_print = (f"{ids[row]}: {name}", *_mixing(batch, row))
        cells.append(
            Cell(decode_rgb(encoded), caption, small_print, tuple(pictures), tuple(labels))
        )
    return cells, f", differences x {factor}" if len(batches) == 2 else ""


def _view_pictures(
    batch: Batch, row: int, view: int, pixels: NDArray[np.float32], request: Request
) -> Iterator[Image.Image]:
    """A view with its boxes outlined; where it has a mask, again with what that hides or names."""
    picture = picture_of(pixels)
    outline = ImageDraw.Draw(picture)
    if batch.erased and (erased := batch.erased[view]) is not None:
        for box in erased.boxes[row].tolist():
            _outline(outline, box, ERASED_OUTLINE)
    if batch.mixed is not None:
        _outline(outline, batch.mixed.boxes[row].tolist(), PASTED_OUTLINE)
    yield picture
    mask, kind = batch.masks[view], request.augmentation.flat_views[view].mask
    if mask is not None and kind is not None:
        plain = np.asarray(picture)
        removed = mask[row].numpy()
        if isinstance(kind, MultiBlockMask):
            yield Image.fromarray(greyed(plain, removed[0], kind))
            yield Image.fromarray(coloured(plain, removed[1:], kind))
        else:
            yield Image.fromarray(greyed(plain, removed, kind))


def _outline(draw: ImageDraw.ImageDraw, box: list[int], colour: tuple[int, int, int]) -> None:
    top, left, height, width = box
    if height > 0 and width > 0:
        draw.rectangle((left, top, left + width - 1, top + height - 1), outline=colour)


def _mixing(batch: Batch, row: int) -> tuple[str, ...]:
    """How much of the sample is left, and whose the rest is."""
    if batch.mixed is None or batch.mixed.weights[row] == 1:
        return ()
    kind = "CutMix" if batch.mixed.boxes[row].any() else "Mixup"
    partner = int(batch.ids[batch.mixed.partners[row]])
    return (f"{kind}: {float(batch.mixed.weights[row]):.2f}, the rest is {partner}",)


def _groups(augmentation: Augmentation, engines: Sequence[str] = ("",)) -> list[Group]:
    # One number for all, so that their sizes stay comparable.
    longest = max(max(view.shape) for view in augmentation.views)
    scale = enlargement(longest)
    # Beside the original's caption there is room, too.
    room = longest * scale + CAPTION_HEIGHT
    groups = []
    for view in augmentation.views:
        side = max(view.shape) * scale
        heading = view.name + (f" × {view.count}" if view.count > 1 else "")
        if len(engines) == 2:
            at_once, small_print = 3, f"{engines[0]}, {engines[1]}, difference (mean / maximum)"
        else:
            at_once, small_print = _pictures(view.mask), _small_print(view)
        count = at_once * view.count
        columns = fitting_columns(count, side, room, at_once)
        groups.append(Group(heading, small_print, count, side, columns))
    return groups


def _pictures(mask: Mask | None) -> int:
    match mask:
        case None:
            return 1
        case RandomMask() | BlockMask():
            return 2
        case MultiBlockMask():
            return 3


def _small_print(view: View) -> str:
    height, width = view.shape
    pixels = f"{height} × {width} pixels"
    match view.mask:
        case None:
            return pixels
        case RandomMask(ratio=ratio):
            return f"{pixels}, {ratio:.0%} removed"
        case BlockMask(ratio=(low, high), probability=probability):
            ratio = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
            often = "" if probability == 1 else f" from {probability:.0%}"
            return f"{pixels}, {ratio} removed{often}"
        case MultiBlockMask(targets=targets):
            return f"{pixels}, context, {targets} targets"


if __name__ == "__main__":
    sys.exit(main())
