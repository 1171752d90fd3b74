"""Pictures for the page: charts as inline SVG, images and relevance maps as PNG in data URIs.

Charts are laid out in percentages of their width, so that they fit any screen while lines and letters keep their
size; their colours are the page's variables, so that they follow light, dark and print. Every chart is a pure
function of its numbers: the same data give the same bytes. All text goes through :func:`tag`, which escapes it.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image, ImageDraw

from hansfree.report.statistics import Estimate

Points = Sequence[tuple[float, float]]

MARKERS = {
    "circle": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0Z",
    "diamond": "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
    "square": "M-4.5 -4.5H4.5V4.5H-4.5Z",
    "triangle": "M0 -6L5.5 4.5H-5.5Z",
    "wedge": "M0 6L5.5 -4.5H-5.5Z",
    "cross": "M-5 -2H-2V-5H2V-2H5V2H2V5H-2V2H-5Z",
}
LOG_SPAN = 30
"""Positive numbers whose largest is this many times the smallest are drawn on a logarithmic axis."""
BINS = 120
"""A long curve is drawn as the means of this many stretches."""
LARGEST_SIDE = 96
"""Images are drawn at most this many pixels wide and high."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """One element with everything escaped; ``class_`` is class, ``stroke_width`` stroke-width, None is left out."""
    spelt = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value) if isinstance(value, float) else value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{spelt}>{''.join(escape(child) for child in children)}</{name}>")


def _number(value: float) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _percent(value: float) -> str:
    return f"{_number(value)}%"


def marker(shape: str, x: float = 0, y: float = 0, **attributes: Any) -> Markup:
    """A marker at (x, y) percent."""
    path = tag("path", d=MARKERS[shape], **attributes)
    return tag("svg", path, x=_percent(x), y=_percent(y), overflow="visible")


def legend_mark(shape: str, **attributes: Any) -> Markup:
    """A marker to stand in running text."""
    return tag("svg", marker(shape, 50, 50, **attributes), class_="mark", width="14", height="14", aria_hidden="true")


# Axes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers, linear or logarithmic, mapped to 0 ... 100 percent."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Where ``value`` lies, in percent; beyond the ends, at the end."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return 100 * min(max((value - low) / (high - low), 0.0), 1.0)


def axis(values: Iterable[float], *, log: bool | None = None) -> Axis:
    """An axis around ``values`` that ends on ticks; logarithmic where they span ``LOG_SPAN`` (or as told)."""
    numbers = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(numbers), max(numbers)
    if low > 0 and (high / low >= LOG_SPAN if log is None else log):
        ticks = _log_ticks(low, high)
        return Axis(min(low, ticks[0]), max(high, ticks[-1]), True, ticks)
    # A curve that stays near its height should look flat, so zero belongs on the axis unless it is far away.
    if 0 < low < 0.7 * high:
        low = 0.0
    step = _step((high - low) or abs(high) or 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, max(last, first + 1) + 1))
    return Axis(ticks[0], ticks[-1], False, ticks)


def _step(span: float) -> float:
    power = 10 ** math.floor(math.log10(span / 4))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if span / (step * power) <= 4 + 1e-9)


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**power for power in powers]
    if len(decades) > 3:
        stride = math.ceil((len(decades) - 1) / 4)
        return tuple(decades[::stride])
    fine = [factor * decade for decade in decades for factor in (1, 2, 5)]
    start = max((i for i, tick in enumerate(fine) if tick <= low * (1 + 1e-9)), default=0)
    end = min((i for i, tick in enumerate(fine) if tick >= high * (1 - 1e-9)), default=len(fine) - 1)
    return tuple(fine[start : end + 1])


def _tick_text(value: float, factor: float = 1.0) -> str:
    value *= factor
    power = math.log10(value) if value > 0 else 0.0
    if abs(power) >= 4 and power == round(power):
        return "10" + str(round(power)).translate(_SUPERSCRIPT)
    return f"{value:g}".replace("-", "−")


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


# Two ends --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """One end of a line: a fraction, the same for each seed, and what it is of."""

    name: str
    estimate: Estimate
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class SpanLine:
    """One method in a picture of two fractions, and what is written beside it."""

    name: str
    detail: str
    ends: tuple[End, End]
    value: str
    is_teacher: bool = False


def span_chart(lines: Sequence[SpanLine]) -> Markup:
    """Each method's way from one end, a circle, to the other, a diamond, on one scale from 0 to 100 %."""
    rows = [
        tag(
            "div",
            tag("div", tag("strong", line.name), tag("small", line.detail), class_="gap-name"),
            _track(line),
            tag("div", tag("strong", line.value), class_="gap-value"),
            class_="gap-row teacher" if line.is_teacher else "gap-row",
        )
        for line in lines
    ]
    labels = [tag("text", f"{x} %", x=f"{x}%", y="14", text_anchor="middle") for x in range(0, 101, 25)]
    scale = tag("div", tag("svg", *labels, class_="gap-track", aria_hidden="true"), class_="gap-row axis")
    return tag("div", *rows, scale, class_="gap")


def _track(line: SpanLine) -> Markup:
    grid = [tag("line", x1=f"{x}%", x2=f"{x}%", y1="0", y2="100%", class_="grid") for x in range(0, 101, 25)]
    first, last = (_percent(100 * end.estimate.mean) for end in reversed(line.ends))
    bridge = tag("line", x1=first, x2=last, y1="40%", y2="40%", class_="bridge")
    marks = []
    for end, shape, style in zip(line.ends, ("circle", "diamond"), ("iid", "shift"), strict=True):
        at = end.estimate
        if at.half is not None:
            low, high = (_percent(100 * min(max(at.mean + s * at.half, 0), 1)) for s in (-1, 1))
            marks.append(tag("line", x1=low, x2=high, y1="40%", y2="40%", class_=f"whisker {style}"))
        marks += [tag("circle", cx=_percent(100 * x), cy="82%", r="2.5", class_=f"seed {style}") for x in end.seeds]
        marks.append(marker(shape, 100 * at.mean, 40, class_=style))
    told = f"{line.name}: " + ", ".join(f"{end.name} {_told(end.estimate)}" for end in line.ends)
    return tag("svg", *grid, bridge, *marks, class_="gap-track", role="img", aria_label=told)


def _told(end: Estimate) -> str:
    interval = "" if end.half is None else f" plus or minus {100 * end.half:.1f}"
    return f"{100 * end.mean:.1f}{interval} percent"


# Curves -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One small chart: a line per seed, and dots."""

    title: str
    lines: tuple[Points, ...]
    dots: tuple[Points, ...]
    percent: bool = False


def panel(content: Panel) -> Markup:
    """A small chart over training steps."""
    everything = [point for points in (*content.lines, *content.dots) for point in points]
    across = axis([0.0, *(x for x, _ in everything)])
    up = axis([y for _, y in everything] + ([0.0, 1.0] if content.percent else []))
    lines = [_polyline(points, across, up, "curve") for points in content.lines]
    dots = [
        tag("circle", cx=_percent(across(x)), cy=_percent(100 - up(y)), r="2.75", class_="dot")
        for points in content.dots
        for x, y in points
    ]
    scale = ", log scale" if up.log else ""
    told = f"{content.title}{scale}, over training steps"
    plot = tag(
        "svg",
        *_frame(across, up, content.percent),
        tag("svg", *lines, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height="100%"),
        *dots,
        class_="plot",
        role="img",
        aria_label=told,
    )
    title = tag("figcaption", content.title, tag("small", scale.lstrip(", ")) if scale else "")
    return tag("figure", title, plot, class_="panel")


def binned(points: Points, bins: int = BINS) -> Points:
    """``points`` as the means of ``bins`` equal stretches, where there are more than that many."""
    if len(points) <= bins:
        return points
    return [tuple(np.mean(part, axis=0).tolist()) for part in np.array_split(np.array(points), bins)]


@dataclass(frozen=True)
class Series:
    """One line of a chart against a setting: (setting, estimate) in the order of the setting."""

    name: str
    points: tuple[tuple[float, Estimate], ...]


def series_chart(
    series: Sequence[Series], across_title: str, *, diagonal: bool = False, percent: bool = True
) -> Markup:
    """Accuracy against a setting, with intervals; each line has a colour and a marker of its own.

    ``diagonal`` is for a setting that is an accuracy itself: both axes go from 0 to 100 %, and a line marks equality.
    Without ``percent`` the upward axis is from 0 to 1.
    """
    xs = [0.0, 0.25, 0.5, 0.75, 1.0] if diagonal else [x for line in series for x, _ in line.points]
    across, up = axis(xs, log=not diagonal and min(xs) > 0 and max(xs) / min(xs) >= 5), axis([0.0, 1.0])
    drawn: list[Markup] = []
    if diagonal:
        drawn.append(tag("line", x1="0%", y1="100%", x2="100%", y2="0%", class_="grid diagonal"))
    for number, line in enumerate(series):
        shape, colour = _style(number)
        points = [(across(x), 100 - up(found.mean), found) for x, found in line.points]
        drawn.append(
            tag(
                "svg",
                _polyline([(x, found.mean) for x, found in line.points], across, up, f"{colour} link"),
                viewBox="0 0 1000 1000",
                preserveAspectRatio="none",
                width="100%",
                height="100%",
            )
        )
        for x, y, found in points:
            if found.half is not None:
                ends = (100 - up(found.mean - found.half), 100 - up(found.mean + found.half))
                at = _percent(x)
                drawn.append(
                    tag("line", x1=at, x2=at, y1=_percent(ends[0]), y2=_percent(ends[1]), class_=f"{colour} bar")
                )
            drawn.append(marker(shape, x, y, class_=colour))
    spelt = _told if percent else lambda found: f"{found.mean:.2f}"
    told = "; ".join(f"{s.name}: " + ", ".join(f"{spelt(e)} at {x:g}" for x, e in s.points) for s in series)
    frame = _frame(across, up, percent, xs, shares=diagonal)
    plot = tag("svg", *frame, *drawn, class_="plot tall", role="img", aria_label=told)
    keys = [tag("span", legend_mark(_style(i)[0], class_=_style(i)[1]), line.name) for i, line in enumerate(series)]
    return tag(
        "div", tag("div", *keys, class_="legend"), plot, tag("p", across_title, class_="axis-title"), class_="series"
    )


RADAR = 120
"""Radius of a radar chart's outermost ring."""


@dataclass(frozen=True)
class RadarLine:
    """One line of a radar chart: an estimate in [0, 1] for each axis; None where there is none."""

    name: str
    values: tuple[Estimate | None, ...]


def radar(axes: Sequence[str], series: Sequence[RadarLine]) -> Markup:
    """Several measures at once, each on an axis from 0 in the middle to 1; colours and markers as in other charts.

    Raises ``ValueError`` for fewer than three axes, and for a line that has not a value or None for each.
    """
    if len(axes) < 3 or any(len(line.values) != len(axes) for line in series):
        raise ValueError("A radar chart takes three axes or more, and of each line one value for each axis.")
    rings = [
        tag("polygon", points=_corners([RADAR * share] * len(axes)), class_="grid ring")
        for share in (0.25, 0.5, 0.75, 1)
    ]
    spokes = [tag("line", x1="0", y1="0", x2=x, y2=y, class_="grid") for x, y in map(_spoke, *_turns(axes, RADAR))]
    names = []
    for name, (x, y) in zip(axes, map(_spoke, *_turns(axes, RADAR + 14))):
        anchor = "middle" if abs(x) < 1 else "start" if x > 0 else "end"
        names.append(tag("text", name, x=x, y=y, dy="0.35em", text_anchor=anchor))
    scale = [tag("text", f"{share:g}", x="4", y=-RADAR * share, dy="0.35em", class_="scale") for share in (0.5, 1)]
    drawn = [part for number, line in enumerate(series) for part in _radar_line(number, line)]
    told = "; ".join(
        f"{line.name}: " + ", ".join(f"{axis} {_spelt(value)}" for axis, value in zip(axes, line.values))
        for line in series
    )
    half = RADAR + 28
    plot = tag(
        "svg",
        *rings, *spokes, *names, *scale, *drawn,
        viewBox=f"{-half - 70} {-half} {2 * half + 140} {2 * half}", class_="radar", role="img", aria_label=told,
    )  # fmt: skip
    keys = [tag("span", legend_mark(_style(n)[0], class_=_style(n)[1]), line.name) for n, line in enumerate(series)]
    return tag("div", tag("div", *keys, class_="legend"), plot, class_="series")


def _radar_line(number: int, line: RadarLine) -> list[Markup]:
    """Its outline where all values are there, and a marker for each that is."""
    shape, colour = _style(number)
    sizes = [None if value is None else RADAR * min(max(value.mean, 0.0), 1.0) for value in line.values]
    whole = [size for size in sizes if size is not None]
    drawn = [tag("polygon", points=_corners(whole), class_=f"{colour} link")] if len(whole) == len(sizes) else []
    for turn, size in enumerate(sizes):
        if size is not None:
            x, y = _spoke(turn / len(sizes), size)
            path = tag("path", d=MARKERS[shape], transform=f"translate({_number(x)} {_number(y)}) scale(0.7)")
            drawn.append(tag("g", path, class_=colour))
    return drawn


def _turns(axes: Sequence[str], radius: float) -> tuple[list[float], list[float]]:
    return [number / len(axes) for number in range(len(axes))], [radius] * len(axes)


def _spoke(turn: float, radius: float) -> tuple[float, float]:
    """A point ``turn`` of the way around, clockwise from the top."""
    return round(radius * math.sin(2 * math.pi * turn), 9), round(-radius * math.cos(2 * math.pi * turn), 9)


def _corners(sizes: Sequence[float]) -> str:
    points = (_spoke(number / len(sizes), size) for number, size in enumerate(sizes))
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in points)


def _spelt(value: Estimate | None) -> str:
    return "not measured" if value is None else f"{value.mean:.2f}"


def _style(number: int) -> tuple[str, str]:
    shapes = list(MARKERS)
    return shapes[number % len(shapes)], f"c{number % 6}"


def _polyline(points: Points, across: Axis, up: Axis, class_: str) -> Markup:
    spelt = " ".join(f"{10 * across(x):.0f},{1000 - 10 * up(y):.0f}" for x, y in points)
    return tag("polyline", points=spelt, class_=class_, vector_effect="non-scaling-stroke")


def _frame(
    across: Axis, up: Axis, percent: bool, marked: Iterable[float] | None = None, *, shares: bool = False
) -> list[Markup]:
    frame = []
    for tick in up.ticks:
        y = _percent(100 - up(tick))
        text = f"{_tick_text(tick, 100)} %" if percent else _tick_text(tick)
        frame.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        frame.append(tag("text", text, x="-8", y=y, dy="0.35em", text_anchor="end"))
    for tick in sorted(set(across.ticks if marked is None else marked)):
        frame.append(
            tag(
                "text",
                f"{_tick_text(tick, 100)} %" if shares else _tick_text(tick),
                x=_percent(across(tick)),
                y="100%",
                dy="1.5em",
                text_anchor="middle",
            )
        )
    return frame


# Shares -------------------------------------------------------------------------------------------------------


def share_table(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], caption: str, corner: str = ""
) -> Markup:
    """Shares in [0, 1] as a table whose cells are the darker the nearer they are to 1; beyond the ends, as the end."""
    head = tag("tr", tag("th", corner, scope="col"), *(tag("th", column, scope="col") for column in columns))
    body = [tag("tr", tag("th", name, scope="row"), *map(_share, row)) for name, row in zip(rows, values, strict=True)]
    return tag("div", tag("table", tag("caption", caption), head, *body, class_="shares"), class_="scroll")


def _share(value: float) -> Markup:
    if not math.isfinite(value):
        return tag("td", "–")
    depth = min(max(value, 0.0), 1.0)
    text = f"{value:.2f}".replace("-", "−")
    return tag("td", text, style=f"--share: {100 * depth:.0f}%", class_="deep" if depth > 0.6 else None)


# Images -------------------------------------------------------------------------------------------------------

RELEVANCE = (
    (12, 44, 112),
    (62, 133, 190),
    (170, 208, 229),
    (250, 249, 246),
    (246, 178, 139),
    (214, 84, 62),
    (112, 8, 32),
)
"""Against the class (blue), none (white), for the class (red): told apart by all common kinds of colour vision."""


@cache
def relevance_palette() -> bytes:
    """255 colours from -1 to 1, RGB one after the other."""
    stops = np.linspace(0, 254, len(RELEVANCE))
    channels = [np.interp(np.arange(255), stops, channel) for channel in zip(*RELEVANCE)]
    return np.stack(channels, axis=1).round().astype(np.uint8).tobytes()


def normalised(map: np.ndarray) -> np.ndarray | None:
    """``map`` divided by its mean absolute value (a map of zeros stays one); None where it is not finite."""
    if not np.isfinite(map).all():
        return None
    size = np.abs(map).mean(dtype=np.float64)
    return map / size if size > 0 else map


def common_limit(maps: Iterable[np.ndarray]) -> float:
    """The end of the colour scale: 99 % of all pixels of all (normalised) maps lie within it."""
    sizes = [np.abs(map).ravel() for map in maps]
    limit = float(np.quantile(np.concatenate(sizes), 0.99)) if sizes else 1.0
    return float(f"{limit:.2g}") or 1.0


def image_uri(pixels: np.ndarray) -> str:
    """An image, uint8 [h, w, 3] or [h, w, 1] or [h, w], as a data URI."""
    squeezed = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    return _data_uri(_within(Image.fromarray(squeezed), Image.Resampling.BILINEAR))


def map_uri(map: np.ndarray, limit: float) -> str:
    """A (normalised) relevance map [h, w] as a data URI; colours end at ``limit``."""
    shrunk = _within(Image.fromarray(map.astype(np.float32)), Image.Resampling.BOX)
    index = np.rint(np.clip(np.asarray(shrunk) / limit, -1, 1) * 127 + 127).astype(np.uint8)
    coloured = Image.fromarray(index)
    coloured.putpalette(relevance_palette())
    return _data_uri(coloured)


GROUPS = (
    (214, 39, 40), (255, 191, 0), (31, 119, 180), (44, 160, 44), (148, 103, 189),
    (23, 190, 207), (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34),
)  # fmt: skip
"""Colours of groups of samples; further groups begin again."""
PLANE = 260
"""Width and height of a plane of samples, in pixels."""


def plane_uri(points: np.ndarray, group: np.ndarray) -> str:
    """Samples at ``points`` [n, 2], coloured by ``group`` [n], as a data URI; the plane is stretched to fit."""
    fine, radius = 3 * PLANE, 7
    low, high = points.min(0), points.max(0)
    places = (points - low) / np.maximum(high - low, 1e-12) * (fine - 4 * radius) + 2 * radius
    canvas = Image.new("RGB", (fine, fine), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    for (x, y), number in zip(places.tolist(), group.tolist()):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=group_colour(number))
    drawn = canvas.resize((PLANE, PLANE), Image.Resampling.BOX)
    return _data_uri(drawn.quantize(64, dither=Image.Dither.NONE))


def group_colour(number: int) -> tuple[int, int, int]:
    """The colour of a group; grey for one that is not known."""
    return GROUPS[number % len(GROUPS)] if number >= 0 else (200, 200, 200)


@cache
def colour_bar_uri() -> str:
    """The colours of the maps from against to for."""
    bar = Image.fromarray(np.arange(255, dtype=np.uint8)[None])
    bar.putpalette(relevance_palette())
    return _data_uri(bar)


def _within(image: Image.Image, how: Image.Resampling) -> Image.Image:
    scale = LARGEST_SIDE / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), how)


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=9)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
