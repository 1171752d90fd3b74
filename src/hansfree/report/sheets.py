"""A picture of one image's explanations: rows are classes, columns are the image and its maps.

Every map lies over the greyed image. Maps with both signs have a diverging scale centred on zero, maps without
negative values a sequential one; one scale holds for a column, so that classes can be compared. Drawn with Pillow:
a picture takes some milliseconds, and nothing of it stays in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hansfree.report.charts import RELEVANCE

CELL = 224
"""Width and height of a cell in pixels."""
GAP, MARGIN, LINE, TITLE, BAR = 8, 20, 21, 37, 10
WITHIN = 0.98
"""Colours end where this share of a column's pixels lies below."""

INK, SOFT, PAPER, PANEL = (28, 36, 48), (88, 98, 115), (255, 255, 255), (246, 247, 249)
AMOUNT = ((255, 250, 205), (253, 196, 76), (241, 118, 47), (200, 42, 62), (104, 6, 66))
"""Colours of maps without negative values, from little to much."""


@dataclass(frozen=True)
class Column:
    """One explainer's maps [classes, h, w], or the sentence that says why there are none.

    ``title`` is the explainer as it was asked for: its name, and after a colon its settings.
    """

    title: str
    maps: np.ndarray | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Sheet:
    """One picture. ``image`` is uint8, [h, w, 3]; ``rows`` are the words above each row of maps."""

    title: str
    subtitle: str
    image: np.ndarray
    rows: Sequence[str]
    columns: Sequence[Column] = field(default_factory=tuple)


@dataclass(frozen=True)
class Scale:
    """What the colours of a map mean: they end at ``limit``, and go below zero where ``signed``."""

    limit: float
    signed: bool

    @classmethod
    def of(cls, maps: np.ndarray) -> "Scale":
        """The scale that fits all ``maps``; its limit is 1 where they are zero everywhere."""
        signed, sizes = bool((maps < 0).any()), np.abs(maps)
        limit = float(np.quantile(sizes, WITHIN)) or float(sizes.max()) or 1.0
        return cls(limit, signed)

    def blend(self, grey: np.ndarray, map: np.ndarray) -> np.ndarray:
        """``map`` [h, w] in colour over ``grey`` [h, w], as uint8 [h, w, 3]; zero shows the grey alone."""
        share = np.clip(map / self.limit, -1, 1)
        stops = np.asarray(RELEVANCE if self.signed else AMOUNT, dtype=np.float32)
        place = (share + 1) / 2 if self.signed else share
        at = np.linspace(0, 1, len(stops))
        colour = np.stack([np.interp(place, at, channel) for channel in stops.T], -1)
        cover = 0.94 * np.abs(share)[..., None] ** 0.6
        return (grey[..., None] * (1 - cover) + colour * cover).round().astype(np.uint8)


# Pictures -----------------------------------------------------------------------------------------------------


def head_height() -> int:
    """Pixels above the titles of the columns: the file's name and what the model says."""
    return MARGIN + LINE + LINE + 4


def sheet_size(rows: int, columns: int) -> tuple[int, int]:
    """Width and height of a picture with so many classes and explainers."""
    width = 2 * MARGIN + (1 + columns) * CELL + columns * GAP
    return width, cell_corner(rows, 0)[1] - LINE + 2 * LINE + MARGIN


def cell_corner(row: int, column: int) -> tuple[int, int]:
    """The top left corner of a cell; column 0 is the image."""
    return MARGIN + column * (CELL + GAP), head_height() + TITLE + LINE + row * (LINE + CELL + GAP)


def draw_sheet(sheet: Sheet) -> Image.Image:
    """The picture of one image, all its classes and all its explainers."""
    canvas = Image.new("RGB", sheet_size(len(sheet.rows), len(sheet.columns)), PAPER)
    pen = ImageDraw.Draw(canvas)
    inner = canvas.width - 2 * MARGIN
    pen.text((MARGIN, MARGIN - 4), shortened(sheet.title, 16, inner, bold=True), INK, font(16, bold=True))
    pen.text((MARGIN, MARGIN - 4 + LINE + 2), shortened(sheet.subtitle, 13, inner), SOFT, font(13))
    for number, title in enumerate(("image", *(column.title for column in sheet.columns))):
        _write_title(pen, title, cell_corner(0, number)[0], head_height(), CELL, 13)
    for row, name in enumerate(sheet.rows):
        x, y = cell_corner(row, 0)
        pen.text((x, y - LINE + 1), shortened(name, 13, inner), SOFT, font(13))
        canvas.paste(fitted(sheet.image), (x, y))
    grey = greyed(sheet.image)
    for number, column in enumerate(sheet.columns, 1):
        _draw_column(canvas, column, grey, number, len(sheet.rows))
    return canvas


def _write_title(pen: ImageDraw.ImageDraw, title: str, x: int, y: int, width: int, size: int) -> None:
    name, _, settings = title.partition(":") if "=" in title else (title, "", "")
    pen.text((x, y), shortened(name, size, width, bold=True), INK, font(size, bold=True))
    pen.text((x, y + size + 4), shortened(settings.replace(",", ", "), size - 2, width), SOFT, font(size - 2))


def _draw_column(canvas: Image.Image, column: Column, grey: np.ndarray, number: int, rows: int) -> None:
    refusal = column.refusal or ("" if column.maps is not None and np.isfinite(column.maps).all() else "not finite")
    if column.maps is None or refusal:
        for row in range(rows):
            canvas.paste(_words(refusal), cell_corner(row, number))
        return
    scale = Scale.of(column.maps)
    for row, map in enumerate(column.maps):
        canvas.paste(overlaid(grey, map, scale), cell_corner(row, number))
    x, y = cell_corner(rows - 1, number)
    _draw_bar(canvas, scale, x, y + CELL + GAP)


def _draw_bar(canvas: Image.Image, scale: Scale, x: int, y: int) -> None:
    values = np.linspace(-1 if scale.signed else 0, 1, CELL) * scale.limit
    bar = scale.blend(np.full((BAR, CELL), 200.0), np.broadcast_to(values, (BAR, CELL)))
    canvas.paste(Image.fromarray(bar), (x, y))
    pen, small, below, end = ImageDraw.Draw(canvas), font(11), y + BAR + 3, rounded(scale.limit)
    if scale.signed:
        for place, anchor, text in (
            (0, "la", f"−{end}"),
            (CELL // 2, "ma", "against  0  for"),
            (CELL, "ra", f"+{end}"),
        ):
            pen.text((x + place, below), text, SOFT, small, anchor=anchor)
    else:
        pen.text((x, below), "0", SOFT, small)
        pen.text((x + CELL, below), end, SOFT, small, anchor="ra")


def rounded(value: float) -> str:
    """A positive number with two digits that count, as short as can be: 0.021, 1400, 2.5e-6."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{float(f'{value:.1e}'):.10g}" if -4 <= int(power) < 5 else f"{float(digits):g}e{int(power)}"


def greyed(image: np.ndarray) -> np.ndarray:
    """``image`` in light greys [h, w], so that colours over it stand out."""
    light = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return 255 - 0.55 * (255 - light)


def overlaid(grey: np.ndarray, map: np.ndarray, scale: Scale) -> Image.Image:
    """``map`` over the greyed image, in a cell; coarser maps are interpolated to the image's size."""
    height, width = grey.shape
    if map.shape != grey.shape:
        coarse = Image.fromarray(map.astype(np.float32))
        map = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    return fitted(scale.blend(grey, map))


def fitted(pixels: np.ndarray) -> Image.Image:
    """An image in the middle of a cell, as large as fits; small images keep their pixels' edges."""
    image = Image.fromarray(pixels)
    scale = CELL / max(image.size)
    how = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, how) if size != image.size else image
    if image.size == (CELL, CELL):
        return image
    cell = Image.new("RGB", (CELL, CELL), PANEL)
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return cell


# Words --------------------------------------------------------------------------------------------------------


def _words(text: str) -> Image.Image:
    """A cell that holds a sentence instead of a map."""
    cell = Image.new("RGB", (CELL, CELL), PANEL)
    pen, pad = ImageDraw.Draw(cell), 12
    pen.rectangle((0, 0, CELL - 1, CELL - 1), outline=(223, 227, 233))
    y = pad
    pen.text((pad, y), "no map", INK, font(12, bold=True))
    for line in wrapped(text, 11, CELL - 2 * pad)[:11]:
        y += 16
        pen.text((pad, y), line, SOFT, font(11))
    return cell


@cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: it has Greek, Cyrillic and signs, and needs no system fonts."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def shortened(text: str, size: int, width: int, *, bold: bool = False) -> str:
    """``text`` on one line of ``width`` pixels; what is too long loses its middle."""
    text = " ".join(text.split())
    letters, kept = font(size, bold=bold), len(text)
    shown = text
    while kept > 2 and letters.getlength(shown) > width:
        kept -= max(1, kept // 20)
        shown = f"{text[: (kept + 1) // 2].rstrip()}…{text[len(text) - kept // 2 :].lstrip()}"
    return shown


def wrapped(text: str, size: int, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(shortened(word, size, width))
    return lines if lines[0] else lines[1:]


# Overview -----------------------------------------------------------------------------------------------------

THUMB = 112


def draw_overview(pictures: Sequence[tuple[Path, str]], titles: Sequence[str]) -> Image.Image:
    """Many images at a glance: a row each, the first class's maps alone, cut from the finished ``pictures``.

    ``pictures`` are paths of sheets, each with the words beside its row; ``titles`` name the explainers.
    """
    words, step = 230, THUMB + 6
    columns = 1 + len(titles)
    size = 2 * MARGIN + words + columns * step, 2 * MARGIN + TITLE + len(pictures) * step
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, title in enumerate(("image", *titles)):
        _write_title(pen, title, MARGIN + words + number * step, MARGIN, THUMB, 12)
    for row, (path, text) in enumerate(pictures):
        y = MARGIN + TITLE + row * step
        name, _, rest = text.partition("\n")
        pen.text((MARGIN, y + 2), shortened(name, 12, words - 12, bold=True), INK, font(12, bold=True))
        for number, line in enumerate(wrapped(rest, 11, words - 12)[:5], 1):
            pen.text((MARGIN, y + 5 + 16 * number), line, SOFT, font(11))
        with Image.open(path) as sheet:
            for number in range(columns):
                x, top = cell_corner(0, number)
                cell = sheet.crop((x, top, x + CELL, top + CELL)).resize((THUMB, THUMB), Image.Resampling.LANCZOS)
                canvas.paste(cell, (MARGIN + words + number * step, y))
    return canvas
