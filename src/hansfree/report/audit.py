"""The page of an audit: models side by side under every measure, with intervals over samples, and pictures."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hansfree.report import charts, dissection
from hansfree.report.heatmaps import Strip, Tile, read_heatmaps
from hansfree.report.statistics import Estimate
from hansfree.runs import RunFolder, read_results, write_text

Row = Mapping[str, Any]

MOST_LINES = 12
"""Lines of a table that are shown at once; what a longer one holds is folded away."""
CURVES = {
    "deletion_curve": ("share:", "Deletion: probability of the class against the share of pixels replaced"),
    "insertion_curve": ("share:", "Insertion: probability of the class against the share of pixels put back"),
    "shift_similarity": ("shift:", "Likeness of maps against the shift in pixels"),
}
"""Measures that are drawn as curves: how their groups begin, and what the chart shows."""
DEPTH = "randomisation_rank_correlation_absolute"
"""The measure that is drawn against the depth of randomised layers; below 0 it is drawn at 0."""
WAYS = {"cascading": "random from the last layer down to this one", "independent": "this layer alone random"}


class Line(NamedTuple):
    """A line of a table: what was measured, and each model's value and interval as text."""

    metric: str
    place: str
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """What one measure found, side by side."""

    title: str
    about: str
    lines: tuple[Line, ...]
    details: tuple[Line, ...]
    """By group and tier."""
    charts: tuple[tuple[str, Markup], ...]
    grids: tuple[tuple[str, tuple[Strip, ...]], ...]


def is_audit(folder: Path | str) -> bool:
    """Whether a folder's results are those of an audit of models."""
    results = RunFolder(Path(folder)).results
    return results.is_file() and (read_results(results).get("config") or {}).get("audit") == "models"


def write_audit_page(folder: Path | str) -> Path:
    """Write report.html of an audit from the files in its folder, one self-contained page; return its path.

    Raises ``UserError`` where there are no results, or damaged files.
    """
    place = RunFolder(Path(folder))
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(bar=charts.colour_bar_uri(), most_lines=MOST_LINES)
    style = Markup((here / "style.css").read_text(encoding="utf-8"))
    page = AuditPage(place)
    write_text(place.report, environment.get_template("audit.html.jinja").render(page=page, style=style))
    return place.report


class AuditPage:
    """Everything that the template shows."""

    def __init__(self, place: RunFolder) -> None:
        self.place = place
        self.results = read_results(place.results)
        self.config = self.results["config"]
        self.models: list[str] = list(self.config["models"])
        self._ends = {_key(row): (row["low"], row["high"]) for row in self.results["intervals"]["rows"]}

    @property
    def title(self) -> str:
        """What was audited on what."""
        many = self.models[0] if len(self.models) == 1 else f"{len(self.models)} models"
        return f"{many} on {self.config['data']['name']}"

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was done, in lines."""
        data, size = self.config["data"], self.config["data"]["input"]
        splits = ", ".join(f"{count} {name}" for name, count in data["splits"].items())
        return [
            ("Models", ", ".join(self.models)),
            ("Images", f"{splits}, {size['height']} × {size['width']} pixels"),
            ("Classes", ", ".join(data["classes"]) or "not known: the images have no labels"),
            ("Explainers", ", ".join(self.config["explainers"])),
            ("Layers", ", ".join(self.config["layers"]) or "the last feature map"),
            ("Maps measured", f"of {self.config['samples']} images of each split, where there are so many"),
        ]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """What was not measured, and why."""
        return [
            (entry["title"] if entry["model"] is None else f"{entry['title']} of {entry['model']}", entry["reason"])
            for entry in self.results["skipped"]
        ]

    @cached_property
    def tables(self) -> list[Table]:
        """What each measure found, in the order of the audit; dissection has a section of its own."""
        return list(self._tables())

    def _tables(self) -> Iterator[Table]:
        rows = iter(self.results["rows"])
        for measure in self.results["measures"]:
            own = [next(rows) for _ in range(measure["rows"])]
            grids = tuple(self._grids(measure["name"]))
            if measure["name"] == "dissection" or not (own or grids):
                continue
            plain = [row for row in own if row["group"] is None and row["tier"] is None]
            drawn = (*(prefix for prefix, _ in CURVES.values()), "layer:")
            apart = [row for row in own if row["tier"] or (row["group"] and not row["group"].startswith(drawn))]
            drawings = (*self._curves(own), *self._depths(own))
            yield Table(measure["title"], measure["about"], self._lines(plain), self._lines(apart), drawings, grids)

    @property
    def dissection(self) -> Markup | None:
        """The section of the dissected models; None where none was."""
        folders = [self.place.path / "dissection" / str(number) for number in range(len(self.models))]
        there = [folder for folder in folders if RunFolder(folder).is_done()]
        return dissection.section(there) if there else None

    # Numbers

    def _lines(self, rows: Iterable[Row]) -> tuple[Line, ...]:
        by_place: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
        for row in rows:
            place = (row["split"], row["tier"], row["group"], row["measured_with"])
            told = ", ".join(str(part) for part in place if part is not None)
            ends = self._ends.get(_key(row))
            interval = "" if ends is None else f"{_number(ends[0])} to {_number(ends[1])}"
            by_place.setdefault((row["metric"], told), {})[row["model"]] = (_number(row["value"]), interval)
        empty = ("–", "")
        return tuple(
            Line(metric, told, tuple(values.get(model, empty) for model in self.models))
            for (metric, told), values in by_place.items()
        )

    # Charts

    def _curves(self, rows: Sequence[Row]) -> Iterator[tuple[str, Markup]]:
        for metric, (prefix, title) in CURVES.items():
            own = [row for row in rows if row["metric"] == metric and row["group"]]
            for split in dict.fromkeys(row["split"] for row in own):
                points = [(row, float(row["group"].removeprefix(prefix))) for row in own if row["split"] == split]
                yield f"{title}, on {split}", self._chart(points, title.partition("against the ")[2])

    def _depths(self, rows: Sequence[Row]) -> Iterator[tuple[str, Markup]]:
        for way, told in WAYS.items():
            own = [
                row for row in rows if row["metric"] == DEPTH and row["group"] and row["measured_with"].endswith(way)
            ]
            seen = Counter[tuple[str, str]]()
            points: list[tuple[Row, float]] = []
            for row in own:
                place = row["model"], row["measured_with"]
                seen[place] += 1
                points.append((row, float(seen[place] - 1)))
            if points:
                title = f"Likeness of the sizes of maps (rank correlation), {told}"
                yield title, self._chart(points, "layers looked at, the last one first; 0: none is random")

    def _chart(self, points: Iterable[tuple[Row, float]], across: str) -> Markup:
        """Values against a setting, a line for each model and way of measuring."""
        lines: dict[str, list[tuple[float, Estimate]]] = {}
        for row, at in points:
            name = ", ".join(([row["model"]] if len(self.models) > 1 else []) + [row["measured_with"]])
            if row["value"] is not None:
                lines.setdefault(name, []).append((at, Estimate(1, row["value"], None, None)))
        return charts.series_chart(
            [charts.Series(name, tuple(own)) for name, own in lines.items()], across, percent=False
        )

    # Pictures

    def _grids(self, measure: str) -> Iterator[tuple[str, tuple[Strip, ...]]]:
        kept = {model: arrays for number, model in enumerate(self.models) if (arrays := self._arrays(measure, number))}
        if measure in ("heatmaps", "loss-gradient") and kept:
            first = next(iter(kept.values()))
            for split in map(str, first["splits"]):
                yield split, tuple(self._maps(kept, split))
        if measure == "randomisation":
            for model, arrays in kept.items():
                for how in [name.removeprefix("layers of ") for name in arrays if name.startswith("layers of ")]:
                    yield f"{model}, {how}", (_randomised(arrays, how),)

    def _arrays(self, measure: str, number: int) -> dict[str, np.ndarray]:
        path = self.place.figures / f"{measure}-{number}.npz"
        return read_heatmaps(path) if path.is_file() else {}

    def _maps(self, kept: Mapping[str, Mapping[str, np.ndarray]], split: str) -> Iterator[Strip]:
        """The images of a split, and each model's maps of them by each explainer."""
        first = next(iter(kept.values()))
        classes = self.config["data"]["classes"]
        names = [classes[label] if classes else "" for label in first[f"label_{split}"]]
        tiles = (
            Tile(charts.image_uri(image), f"{split}: {name}", name)
            for image, name in zip(first[f"image_{split}"], names)
        )
        yield Strip("Image", "and its class" if classes else "", tuple(tiles))
        for model, arrays in kept.items():
            for key in [name for name in arrays if name.startswith(f"map_{split}")]:
                yield Strip(
                    model,
                    key.removeprefix(f"map_{split}").strip(),
                    tuple(_tiles(arrays, split, key, model, bool(classes))),
                )


def _tiles(arrays: Mapping[str, np.ndarray], split: str, key: str, model: str, labelled: bool) -> Iterator[Tile]:
    """A model's maps, with what it says where that was kept."""
    drawn = [charts.normalised(map) for map in arrays[key]]
    limit = charts.common_limit(map for map in drawn if map is not None)
    said = arrays.get(f"prediction_{split}")
    for number, map in enumerate(drawn):
        name = "" if said is None else _called(arrays, int(said[number]))
        wrong = labelled and said is not None and said[number] != arrays[f"label_{split}"][number]
        uri = None if map is None else charts.map_uri(map, limit)
        yield Tile(uri, f"{model}, {key.removeprefix('map_')}: {name}", name, bool(wrong))


def _called(arrays: Mapping[str, np.ndarray], number: int) -> str:
    classes = arrays["classes"]
    return str(classes[number]).partition(",")[0] if number < len(classes) else f"class {number}"


def _randomised(arrays: Mapping[str, np.ndarray], how: str) -> Strip:
    """The maps of one image while weights are random, from the last layer to the first."""
    drawn = [charts.normalised(map) for map in arrays[how]]
    limit = charts.common_limit(map for map in drawn if map is not None)
    tiles = [Tile(charts.image_uri(arrays["image"]), "the image", "the image")]
    for map, layer in zip(drawn, arrays[f"layers of {how}"]):
        tiles.append(Tile(None if map is None else charts.map_uri(map, limit), f"{how}, {layer}", str(layer)))
    return Strip("Random layer", "and all after it" if how.endswith("cascading") else "alone", tuple(tiles))


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "split", "tier", "group", "metric", "measured_with"))


def _number(value: float | None) -> str:
    """Three digits after the point; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.3f}".replace("-", "−")
