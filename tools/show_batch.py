"""Contact sheet of a recipe at work: original images beside all their augmented views.

    python tools/show_batch.py --data DIR --method dino --out sheet.png
    python tools/show_batch.py --run RUN --out sheet.png

Real samples through a real engine, as training gets them but for the normalisation. What a mask
removes is greyed. Small pictures are enlarged without smoothing, so that every pixel is seen.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.batch import Batch
from pipelines.engines import Unsupported
from pipelines.engines.reference import decode
from pipelines.loader import LoaderError, open_loader
from pipelines.recipe import Augmentation, Mask, RecipeError, View
from shards.atomic import atomic_file
from shards.index import ShardError
from shards.store import Store
from training.config import ConfigError, find_method, find_preset
from training.evaluation.record import read_record
from training.samples import largest_side_pixels, open_train

LEAST_CELL_PIXELS = 144
GAP = 6
GROUP_GAP = 20
MARGIN = 16
CAPTION_HEIGHT = 36
HEADING_HEIGHT = 40
TITLE_HEIGHT = 40
INK, FAINT, PAPER, MASK_GREY = (32, 32, 32), (120, 120, 120), (255, 255, 255), 150


@dataclass(frozen=True)
class Cell:
    """An original picture, what to write below it, and its views in the order of the groups."""

    original: Image.Image
    caption: str
    small_print: str
    views: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Group:
    """The pictures that one View of the recipe makes, packed into a block."""

    heading: str
    small_print: str
    count: int
    side: int  # of a picture on the sheet, in pixels
    per_column: int

    @property
    def width(self) -> int:
        columns = math.ceil(self.count / self.per_column)
        block = columns * (self.side + GAP) - GAP
        return max(block, _text_width(self.heading, 15), _text_width(self.small_print, 12))

    def place(self, number: int) -> tuple[int, int]:
        """(x, y) of its picture `number` within the block, filled row by row."""
        columns = math.ceil(self.count / self.per_column)
        row, column = divmod(number, columns)
        return column * (self.side + GAP), row * (self.side + GAP)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        store, augmentation, recipe_name, engine, seed = _what_to_show(options)
        batch, engine = _first_batch(store, augmentation, engine, seed, options.samples)
        sheet = contact_sheet(
            _cells(batch, store, augmentation),
            _groups(augmentation),
            f"{recipe_name}   {_short(store.uri)}   {engine} engine, seed {seed}",
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.out) as file:
            sheet.save(file, format="PNG")
    except (ShardError, LoaderError, Unsupported, RecipeError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{options.out}: {len(batch)} samples, {len(batch.views)} views each, {engine} engine")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw original images beside all their augmented views.",
        epilog="""examples:
  python tools/show_batch.py --method dino --data data/cifar10 --out views.png
  python tools/show_batch.py --method mae --preset imagenet --data data/imagenet --out masks.png
  python tools/show_batch.py --run runs/dino --engine reference --out views.png""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--method", "--recipe", metavar="NAME", help="a method: the training views of its preset"
    )
    what.add_argument("--run", type=Path, help="a run's directory: its training views and its data")
    parser.add_argument(
        "--data", type=Path, help="data set; by default the run's, or ./data's only"
    )
    parser.add_argument("--preset", default="auto", help="with --method: which of its presets")
    parser.add_argument("--out", type=Path, required=True, help="the PNG file to write")
    parser.add_argument("--engine", help="auto, dali, reference, ...; default: the run's")
    parser.add_argument("--seed", type=int, help="of order and randomness; default: the run's")
    parser.add_argument("--samples", type=_positive, default=8, help="number of images")
    return parser.parse_args(arguments)


def _what_to_show(options: argparse.Namespace) -> tuple[Store, Augmentation, str, str, int]:
    """(the training images, the training views, what to call these, the engine, the seed)."""
    if options.run is not None:
        record = read_record(options.run)
        store = open_train(options.data or record.train)
        views, called = record.augmentation, f"{record.method} as in {options.run.name}"
        engine, seed = record.engine, record.seed
    else:
        module = find_method(options.method)
        store = open_train(options.data)
        preset, recipe = find_preset(module, options.preset, lambda: largest_side_pixels(store))
        views, called = recipe.augmentation, f"{options.method} ({preset})"
        engine, seed = "auto", 0
    if options.samples > len(store):
        raise ShardError(f"--samples is {options.samples}, and {store.uri} has {len(store)} images")
    seed = seed if options.seed is None else options.seed
    return store, views, called, options.engine or engine, seed


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _first_batch(
    store: Store, augmentation: Augmentation, engine: str, seed: int, samples: int
) -> tuple[Batch, str]:
    """(the first batch of epoch 0 with uint8 views, the engine's name)."""
    with open_loader(
        store,
        augmentation,
        batch_size=samples,
        seed=seed,
        engine=engine,
        stage=False,
        threads=2,
    ) as loader:
        return next(iter(loader)), loader.engine_name


def _cells(batch: Batch, store: Store, augmentation: Augmentation) -> list[Cell]:
    ids = batch.ids.numpy()
    cells = []
    for row, (encoded, name) in enumerate(zip(store.read(ids), store.names(ids), strict=True)):
        pictures = []
        for view, pixels, mask in zip(
            augmentation.flat_views, batch.views, batch.masks, strict=True
        ):
            picture = pixels[row].permute(1, 2, 0).numpy()
            pictures.append(Image.fromarray(picture))
            if view.mask is not None and mask is not None:
                pictures.append(Image.fromarray(greyed(picture, mask[row], view.mask)))
        label = int(batch.labels[row])
        caption = _class_name(label, store.classes)
        cells.append(Cell(decode(encoded), caption, f"{ids[row]}: {name}", tuple(pictures)))
    return cells


def greyed(picture: NDArray[np.uint8], mask: Tensor, kind: Mask) -> NDArray[np.uint8]:
    """A copy of the picture uint8 [H, W, 3] whose removed patches (mask bool [N]) are faint."""
    side = len(picture) // kind.patch_pixels
    removed = mask.numpy().reshape(side, side).repeat(kind.patch_pixels, 0)
    removed = removed.repeat(kind.patch_pixels, 1)[..., None]
    faint = (picture * 0.15 + MASK_GREY * 0.85).astype(np.uint8)
    return np.where(removed, faint, picture)


def _groups(augmentation: Augmentation) -> list[Group]:
    scale = _scale(augmentation)
    # Beside the original's caption there is room, too.
    room = max(view.size for view in augmentation.views) * scale + CAPTION_HEIGHT + GAP
    groups = []
    for view in augmentation.views:
        side = view.size * scale
        pictures = view.count * (1 if view.mask is None else 2)
        groups.append(
            Group(
                heading=view.name + (f" × {view.count}" if view.count > 1 else ""),
                small_print=_small_print(view),
                count=pictures,
                side=side,
                per_column=1 if view.mask else max(1, room // (side + GAP)),
            )
        )
    return groups


def _small_print(view: View) -> str:
    pixels = f"{view.size} × {view.size} pixels"
    return pixels if view.mask is None else f"{pixels}, {view.mask.ratio:.0%} removed"


def _scale(augmentation: Augmentation) -> int:
    """Whole number by which all views are enlarged: their sizes stay comparable."""
    return max(1, round(LEAST_CELL_PIXELS / max(view.size for view in augmentation.views)))


def contact_sheet(cells: Sequence[Cell], groups: Sequence[Group], title: str) -> Image.Image:
    """One row per cell: the original, then a block of pictures per group."""
    cell_side = max(group.side for group in groups)
    originals = [_fitted(cell.original, cell_side) for cell in cells]
    row_height = GROUP_GAP + max(
        *(original.height + CAPTION_HEIGHT for original in originals),
        *(min(group.count, group.per_column) * (group.side + GAP) - GAP for group in groups),
    )
    lefts = [MARGIN + cell_side + GROUP_GAP]
    for group in groups:
        lefts.append(lefts[-1] + group.width + GROUP_GAP)
    width = max(lefts[-1] - GROUP_GAP, MARGIN + _text_width(title, 18)) + MARGIN
    top = MARGIN + TITLE_HEIGHT + HEADING_HEIGHT
    sheet = Image.new("RGB", (width, top + len(cells) * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)

    draw.text((MARGIN, MARGIN), title, INK, _font(18))
    headings = [("original", "", MARGIN)] + [
        (group.heading, group.small_print, left) for group, left in zip(groups, lefts, strict=False)
    ]
    for heading, small_print, left in headings:
        draw.text((left, MARGIN + TITLE_HEIGHT), heading, INK, _font(15))
        draw.text((left, MARGIN + TITLE_HEIGHT + 18), small_print, FAINT, _font(12))
    for number, (cell, original) in enumerate(zip(cells, originals, strict=True)):
        y = top + number * row_height
        sheet.paste(original, (MARGIN, y))
        below = y + original.height + 3
        draw.text((MARGIN, below), _cut(cell.caption, cell_side, 13), INK, _font(13))
        draw.text((MARGIN, below + 16), _cut(cell.small_print, cell_side, 11), FAINT, _font(11))
        views = iter(cell.views)
        for group, left in zip(groups, lefts, strict=False):
            for place in range(group.count):
                x_in_block, y_in_block = group.place(place)
                picture = next(views).resize((group.side, group.side), Image.Resampling.NEAREST)
                sheet.paste(picture, (left + x_in_block, y + y_in_block))
    return sheet


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """At most side x side: shrunk smoothly, or enlarged by a whole number without smoothing."""
    factor = side / max(picture.size)
    method = Image.Resampling.LANCZOS
    if factor >= 1:
        factor, method = int(factor), Image.Resampling.NEAREST
    shape = tuple(max(1, round(length * factor)) for length in picture.size)
    return picture.resize((shape[0], shape[1]), method)


def _class_name(label: int, classes: tuple[str, ...]) -> str:
    if label < 0:
        return "no label"
    return classes[label] if label < len(classes) else f"class {label}"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own: Pillow's default one has few characters beyond ASCII."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(fonts / "DejaVuSans.ttf", size)


def _text_width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))


def _cut(text: str, width: int, size: int) -> str:
    """The text, or as much of its beginning as fits, with dots."""
    if _text_width(text, size) <= width:
        return text
    while text and _text_width(text + "...", size) > width:
        text = text[:-1]
    return text + "..."


def _short(uri: str) -> str:
    """The last two parts of a path: what people call the data set."""
    return "/".join(Path(uri).parts[-2:])


if __name__ == "__main__":
    sys.exit(main())
