"""The gallery of a folder of explained images: linked pages of pictures that load as one scrolls."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hansfree.report.sheets import WITHIN, draw_overview, head_height, sheet_size
from hansfree.runs import atomic_path, write_text

PER_PAGE = 24
"""Images on one page, so that ten thousand of them do not weigh a browser down."""
MOST_IN_OVERVIEW = 40
MOST_CLASSES = 12


@dataclass(frozen=True)
class Said:
    """What a model says about one class."""

    index: int
    name: str
    probability: float

    @property
    def short(self) -> str:
        """The name without its synonyms."""
        return self.name.partition(",")[0]

    @property
    def percent(self) -> str:
        """The probability, as people read it."""
        return f"{100 * self.probability:.1f} %"


@dataclass(frozen=True)
class Entry:
    """One image of a gallery, and a line of its manifest. Paths are relative to the folder, with slashes.

    ``error`` says why an image could not be read; it then has no picture. ``refused`` holds the sentences of
    explainers that have no map for it.
    """

    source: str
    size: int
    changed: int
    """When the file was last changed, in nanoseconds: an image that was replaced is explained anew."""
    title: str
    picture: str = ""
    arrays: str = ""
    top: tuple[Said, ...] = ()
    explained: tuple[Said, ...] = ()
    refused: Mapping[str, str] | None = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """The manifest's line as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Entry":
        """An entry of a manifest's line. Raises ``TypeError`` for what is none."""
        said = {key: tuple(Said(**item) for item in line[key]) for key in ("top", "explained") if key in line}
        return cls(**{**line, **said})

    @property
    def told(self) -> str:
        """The likeliest classes and their probabilities, on one line."""
        return "  ·  ".join(f"{said.short} {said.percent}" for said in self.top)


@dataclass(frozen=True)
class Page:
    """What one page of the gallery shows."""

    number: int
    pages: int
    about: Mapping[str, Any]
    entries: Sequence[Entry]
    all: Sequence[Entry]
    explainers: Sequence[str]
    has_overview: bool

    @property
    def counts(self) -> list[tuple[str, int]]:
        """The classes that the model gave to most images."""
        return Counter(entry.top[0].name for entry in self.all).most_common()

    @property
    def links(self) -> list[tuple[str, str]]:
        """Other pages worth a link: the first, the last, and those around this one."""
        near = {1, self.pages, *range(self.number - 2, self.number + 3)}
        return [(str(n), page_name(n)) for n in sorted(near) if 1 <= n <= self.pages]

    def shape(self, entry: Entry) -> tuple[int, int, int]:
        """Width and height of an entry's picture, and its height without the words above it."""
        width, height = sheet_size(len(entry.explained), len(self.explainers))
        return width, height, height - head_height() + 4


def page_name(number: int) -> str:
    """The file of a page."""
    return "index.html" if number == 1 else f"page-{number}.html"


def write_gallery(
    folder: Path, about: Mapping[str, Any], entries: Sequence[Entry], explainers: Sequence[str], notices: Sequence[str]
) -> Path:
    """Write the pages and, for few images, the overview; return the first page.

    ``about`` are lines of what was done, ``notices`` sentences that a reader must see first.
    """
    shown = [entry for entry in entries if entry.picture]
    pages = max(1, -(-len(shown) // PER_PAGE))
    has_overview = _overview(folder / "overview.png", folder, shown, explainers)
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(page_name=page_name, most_classes=MOST_CLASSES, within=WITHIN)
    environment.filters["link"] = quote
    template = environment.get_template("gallery.html.jinja")
    style = Markup((here / "style.css").read_text(encoding="utf-8"))
    for number in range(1, pages + 1):
        part = shown[(number - 1) * PER_PAGE : number * PER_PAGE]
        page = Page(number, pages, about, part, shown, explainers, has_overview)
        write_text(folder / page_name(number), template.render(page=page, notices=notices, style=style))
    for stale in folder.glob("page-*.html"):
        if stale.stem.removeprefix("page-").isdigit() and int(stale.stem.removeprefix("page-")) > pages:
            stale.unlink()
    return folder / page_name(1)


def _overview(path: Path, folder: Path, entries: Sequence[Entry], explainers: Sequence[str]) -> bool:
    if not 1 < len(entries) <= MOST_IN_OVERVIEW:
        with suppress(FileNotFoundError):
            path.unlink()
        return False
    rows = [(folder / entry.picture, f"{entry.title}\n{_because(entry)}") for entry in entries]
    with atomic_path(path) as temporary:
        draw_overview(rows, explainers).save(temporary)
    return True


def _because(entry: Entry) -> str:
    first = entry.explained[0]
    return f"{entry.top[0].short} {entry.top[0].percent}" + (
        f"; maps for {first.short} {first.percent}" if first.index != entry.top[0].index else ""
    )
