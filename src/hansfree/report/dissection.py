"""The page of a network dissection: detectors of each model side by side, and where their best units are active.

A picture is lit where the unit is active and dimmed elsewhere; a line runs around the concept's mask.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from hansfree.errors import UserError
from hansfree.report import charts
from hansfree.report.heatmaps import Strip, Tile, read_heatmaps
from hansfree.runs import RunFolder, read_json, read_results, write_text

Entry = Mapping[str, Any]

DIMMED = 0.4
FEW_CONCEPTS = 2
"""Of each category, beside a suite's other figures."""
LINE = (255, 214, 0)
RULES = {
    "": "as published: of images where a unit's active pixels touch a label of the category",
    "_defined": "as defined: of all images annotated for the category",
    "_adjusted": "adjusted: from 0, what chance gives, to 1, the most that masks of these sizes can give",
}


@dataclass(frozen=True)
class Dissection:
    """One model's dissection, as its folder has it."""

    name: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    entries: Sequence[Entry]
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path | str) -> "Dissection":
        """The dissection in ``folder``. Raises ``UserError`` where there is none."""
        place = RunFolder(Path(folder))
        results = read_results(place.results)
        if results["config"].get("audit") != "dissection":
            raise UserError(f"{place.results} is not of a network dissection; name the folder of one.")
        figures = place.figures / "dissection"
        arrays = read_heatmaps(figures.with_suffix(".npz"))
        return cls(results["config"]["name"], results["config"], results["rows"], read_json(f"{figures}.json"), arrays)

    @property
    def categories(self) -> list[str]:
        """The categories of the concepts."""
        return list(dict.fromkeys(row["group"] for row in self.rows if row["group"] is not None))

    def value(self, metric: str, how: str, group: str | None = None) -> float | None:
        """A row's value."""
        key = (metric, how, group)
        return next((r["value"] for r in self.rows if (r["metric"], r["measured_with"], r["group"]) == key), None)

    def strip(self, place: int, detail: str) -> Strip:
        """The pictures of an entry."""
        entry, tiles = self.entries[place], []
        for image in entry["images"]:
            drawn = lit(
                *(self.arrays[key.format(image)] for key in ("image {}", f"active {place} {{}}", f"mask {place} {{}}"))
            )
            told = f"{self.name}, unit {entry['unit']} of {entry['layer']}, image {image}, {entry['concept']} outlined"
            tiles.append(Tile(charts.image_uri(drawn), told, ""))
        return Strip(
            f"{self.name}, unit {entry['unit']}", f"{detail}{entry['rule']} IoU {entry['iou']:.3f}", tuple(tiles)
        )


def lit(image: np.ndarray, active: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``image``, uint8 [h, w, c], dimmed where not ``active``, with a line around ``mask``; both boolean, any size."""
    height, width = image.shape[:2]
    active, mask = (
        np.asarray(Image.fromarray(part.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)) > 0
        for part in (active, mask)
    )
    drawn = np.broadcast_to(image, (height, width, 3)) * np.where(active, 1.0, DIMMED)[..., None]
    drawn[_inner_edge(mask)] = LINE
    return drawn.round().astype(np.uint8)


def _inner_edge(mask: np.ndarray) -> np.ndarray:
    around = np.pad(mask, 1)  # what lies outside of the image is not in the mask
    inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask & ~inside


# The page


@dataclass(frozen=True)
class Table:
    """Numbers of detectors by one rule: a line for each model and layer."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Page:
    """What the templates show of several dissections by the same concepts."""

    dissections: Sequence[Dissection]

    def __post_init__(self) -> None:
        if not self.dissections:
            raise UserError("There is no dissection to show; name the folder of one or several.")
        first = self.dissections[0]
        for other in self.dissections[1:]:
            if other.config["concepts"] != first.config["concepts"]:
                raise UserError(
                    f"{first.name} and {other.name} were dissected by different concepts, so they cannot be compared; "
                    "dissect them by the same ones."
                )

    @property
    def config(self) -> Mapping[str, Any]:
        """What all share: the concepts; quantiles and thresholds are the first one's."""
        return self.dissections[0].config

    @property
    def tables(self) -> list[Table]:
        """A table for each rule, the published one first; settings other than the first are lines of their own."""
        categories = self.dissections[0].categories
        columns = (*categories, "unique", "exclusive", "total", "mean best IoU")
        return [Table(title, columns, tuple(self._lines(suffix, categories))) for suffix, title in RULES.items()]

    def _lines(self, suffix: str, categories: Sequence[str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        for one in self.dissections:
            for how in dict.fromkeys(row["measured_with"] for row in one.rows if row["metric"] == f"detectors{suffix}"):
                counts = [one.value(f"detectors{suffix}", how, category) for category in categories]
                counts += [one.value(f"{kind}detectors{suffix}", how) for kind in ("unique_", "exclusive_", "")]
                best = one.value(f"best_iou{suffix}", how)
                shown = (
                    *("–" if count is None else f"{count:g}" for count in counts),
                    "" if best is None else f"{best:.3f}",
                )
                yield one.name, how, shown

    @property
    def units(self) -> list[tuple[str, tuple[Strip, ...]]]:
        """By model and layer, the best units of each category on the images that they are most active in."""
        found: dict[str, list[Strip]] = {}
        for one in self.dissections:
            for place, entry in enumerate(one.entries):
                if entry["kind"] == "unit":
                    strip = one.strip(place, f"{entry['concept']} ({entry['category']}), ")
                    found.setdefault(f"{one.name}, {entry['layer']}", []).append(strip)
        return [(title, tuple(strips)) for title, strips in found.items()]

    @property
    def concepts(self) -> list[tuple[str, tuple[Strip, ...]]]:
        """By concept, each model's and layer's best unit for it, on the same images."""
        found: dict[str, list[Strip]] = {}
        several = len({entry["layer"] for one in self.dissections for entry in one.entries}) > 1
        for one in self.dissections:
            for place, entry in enumerate(one.entries):
                if entry["kind"] == "concept":
                    strip = one.strip(place, f"{entry['layer']}, " if several else "")
                    found.setdefault(f"{entry['concept']} ({entry['category']})", []).append(strip)
        return [(title, tuple(strips)) for title, strips in found.items()]


def best_units(folders: Iterable[Path]) -> list[tuple[str, tuple[Strip, ...]]]:
    """By concept, each model's best unit for it in its last dissected layer, on the same images: of a few concepts.

    Models that were dissected by different concepts stand apart.
    """
    found: dict[tuple[str, str, str], list[Strip]] = {}
    for one in map(Dissection.read, folders):
        last = [n for n, entry in enumerate(one.entries) if entry["layer"] == one.config["layers"][-1]]
        for place in last:
            entry = one.entries[place]
            if entry["kind"] == "concept":
                strip = one.strip(place, f"{entry['layer']}, ")
                key = (str(one.config["concepts"]), entry["category"], entry["concept"])
                found.setdefault(key, []).append(strip)
    kept: list[tuple[str, tuple[Strip, ...]]] = []
    for _, group in groupby(found, key=lambda key: key[:2]):
        kept += [(f"{key[2]} ({key[1]})", tuple(found[key])) for key in islice(group, FEW_CONCEPTS)]
    return kept


def section(folders: Sequence[Path | str]) -> Markup:
    """The section of a page that shows the dissections in ``folders`` side by side.

    Raises ``UserError`` for a folder that holds none, and for dissections by different concepts.
    """
    page = Page([Dissection.read(folder) for folder in folders])
    return Markup(_environment().get_template("dissection.html.jinja").render(page=page))


def write_page(folders: Sequence[Path | str], out: Path | str) -> Path:
    """Write one self-contained page of the dissections in ``folders`` to ``out``; raises as :func:`section` does."""
    style = Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8"))
    page = _environment().get_template("dissection-page.html.jinja")
    write_text(out, page.render(section=section(folders), style=style))
    return Path(out)


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
