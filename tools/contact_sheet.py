"""One large picture of many: a row per image, its original on the left, its views in blocks beside.

Small pictures are enlarged without smoothing, so that every pixel is seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from headrace.shards.index import printable

GAP = 6
GROUP_GAP = 20
MARGIN = 16
LINE_HEIGHT = 16
CAPTION_HEIGHT = 3 * LINE_HEIGHT + 4
HEADING_HEIGHT = 40
TITLE_HEIGHT = 40
INK, FAINT, PAPER = (32, 32, 32), (120, 120, 120), (255, 255, 255)


@dataclass(frozen=True)
class Cell:
    """An original picture, what to write below it, and its views in the order of the groups.

    labels: what is written on the lower edge of each view, or () for nothing anywhere.
    """

    original: Image.Image
    caption: str
    small_print: tuple[str, ...]
    views: tuple[Image.Image, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """The pictures that one View of the recipe makes, packed into a block, row by row."""

    heading: str
    small_print: str
    count: int
    side: int  # of a picture on the sheet, in pixels
    columns: int

    @property
    def width(self) -> int:
        block = self.columns * (self.side + GAP) - GAP
        return max(block, _text_width(self.heading, 15), _text_width(self.small_print, 12))

    @property
    def height(self) -> int:
        return math.ceil(self.count / self.columns) * (self.side + GAP) - GAP

    def place(self, number: int) -> tuple[int, int]:
        """(x, y) of its picture `number` within the block."""
        row, column = divmod(number, self.columns)
        return column * (self.side + GAP), row * (self.side + GAP)


def fitting_columns(count: int, side: int, room: int, at_once: int = 1) -> int:
    """Columns, a multiple of `at_once`, with which `count` pictures are no higher than `room`."""
    rows = max(1, room // (side + GAP))
    return math.ceil(count / at_once / rows) * at_once


def contact_sheet(cells: Sequence[Cell], groups: Sequence[Group], title: str) -> Image.Image:
    """One row per cell: the original, then a block of pictures per group."""
    title = printable(title)
    cell_side = max(group.side for group in groups)
    originals = [_fitted(cell.original, cell_side) for cell in cells]
    row_height = GROUP_GAP + max(
        *(original.height + CAPTION_HEIGHT for original in originals),
        *(group.height for group in groups),
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
        for line, text in enumerate(cell.small_print, 1):
            place = (MARGIN, below + line * LINE_HEIGHT)
            draw.text(place, _cut(text, cell_side, 11), FAINT, _font(11))
        views = iter(zip(cell.views, cell.labels or ("",) * len(cell.views), strict=True))
        for group, left in zip(groups, lefts, strict=False):
            for place in range(group.count):
                x_in_block, y_in_block = group.place(place)
                picture, label = next(views)
                enlarged = picture.resize((group.side, group.side), Image.Resampling.NEAREST)
                corner = (left + x_in_block, y + y_in_block)
                sheet.paste(enlarged, corner)
                _write_label(draw, corner, group.side, label)
    return sheet


def _write_label(draw: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, label: str) -> None:
    if label:
        text = _cut(label, side - 4, 11)
        left, bottom = corner[0], corner[1] + side
        draw.rectangle(
            (left, bottom - LINE_HEIGHT, left + _text_width(text, 11) + 4, bottom - 1), PAPER
        )
        draw.text((left + 2, bottom - LINE_HEIGHT + 1), text, INK, _font(11))


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """At most side x side: shrunk smoothly, or enlarged by a whole number without smoothing."""
    factor = side / max(picture.size)
    method = Image.Resampling.LANCZOS
    if factor >= 1:
        factor, method = int(factor), Image.Resampling.NEAREST
    shape = tuple(max(1, round(length * factor)) for length in picture.size)
    return picture.resize((shape[0], shape[1]), method)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own: Pillow's default one has few characters beyond ASCII."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(fonts / "DejaVuSans.ttf", size)


def _text_width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))


def _cut(text: str, width: int, size: int) -> str:
    """The text on one line, or as much of its beginning as fits, with dots."""
    text = printable(text)
    if _text_width(text, size) <= width:
        return text
    while text and _text_width(text + "...", size) > width:
        text = text[:-1]
    return text + "..."
