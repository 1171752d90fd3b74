"""The page of a ROAR audit: accuracy against the share of pixels that was removed, and DiffROAR, over seeds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hansfree.errors import UserError
from hansfree.report import charts
from hansfree.report.facts import as_yaml
from hansfree.report.spelling import to_csv, to_markdown
from hansfree.report.statistics import Estimate, compare, estimate
from hansfree.report.tables import Cell, Column, Line, Table
from hansfree.report.wording import p_value, percent
from hansfree.runs import RunFolder, read_results, write_text

Row = Mapping[str, Any]
ENDS = {"top": "most relevant removed", "bottom": "least relevant removed"}
MISSED = "†"
"""Marks numbers in which a retraining has a part that did not reach its training accuracy."""


@dataclass(frozen=True)
class RoarPage:
    """What the template shows."""

    results: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """The audit's settings."""
        return self.results["config"]

    @property
    def title(self) -> str:
        """The heading."""
        return self.config["title"] or self.config["name"]

    @property
    def config_text(self) -> str:
        """The settings as the command reads them."""
        own = {key: value for key, value in self.config.items() if key not in ("audit", "base") and value is not None}
        return as_yaml({**own, **self.config["base"]})

    @cached_property
    def rows(self) -> list[Row]:
        """Accuracies after retraining, and DiffROAR."""
        return [row for row in self.results["rows"] if row["metric"] in ("roar", "diffroar")]

    @property
    def splits(self) -> list[str]:
        """The test splits."""
        return list(dict.fromkeys(row["split"] for row in self.rows))

    @property
    def models(self) -> dict[str, str]:
        """Titles of the models, by name."""
        return {name: section.get("title") or name for name, section in self.config["models"].items()}

    @property
    def both_ends(self) -> bool:
        """Whether there is a DiffROAR."""
        return set(self.config["removal"]["ends"]) == ENDS.keys()

    @property
    def fractions(self) -> list[float]:
        """The shares that are removed."""
        return sorted(self.config["removal"]["fractions"])

    @property
    def failed(self) -> list[str]:
        """What each retraining that failed says."""
        bad = [cell for cell in self.results["cells"] if cell["status"] != "done"]
        return [f"{cell['variant']}, seed {cell['seed']}: {cell['error']}" for cell in bad]

    @property
    def missed(self) -> str:
        """Which retrainings did not reach the training accuracy, in a sentence; empty where all did."""
        found = {
            (row["variant"], row["seed"], row["end"], row["fraction"]): row["train_acc"]
            for row in self.rows
            if row["metric"] == "roar" and not row["reached"]
        }
        if not found:
            return ""
        done = sum(cell["status"] == "done" for cell in self.results["cells"])
        shares = sorted({fraction for *_, fraction in found})
        return (
            f"{len(found)} of {done} retrainings did not reach a training accuracy of {_percent(self.config['reach'])} "
            f"(the lowest: {_percent(min(found.values()))}; shares removed: {', '.join(f'{x:g}' for x in shares)}). "
            f"Numbers that they have a part in are marked {MISSED}: they tell of the recipe as well as of the maps."
        )

    def charts(self, split: str) -> list[tuple[str, Markup]]:
        """For each model, accuracy against the share of pixels that was removed from either end."""
        whole = self._estimate(split, None, None, 0.0)
        drawn = []
        for name, title in self.models.items():
            series = []
            for end in self.config["removal"]["ends"]:
                points = [(share, self._estimate(split, name, end, share)) for share in self.fractions]
                known = [(100 * share, found) for share, found in [(0.0, whole), *points] if found is not None]
                if known:
                    series.append(charts.Series(ENDS[end], tuple(known)))
            if series:
                drawn.append((title, charts.series_chart(series, "share of pixels removed (%)")))
        return drawn

    def _estimate(self, split: str, model: str | None, end: str | None, share: float) -> Estimate | None:
        wanted = {"metric": "roar", "split": split, "end": end, "fraction": share}
        rows = [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]
        return estimate(row["value"] for row in rows if model is None or row["variant"] == model)

    def table(self, split: str) -> Table:
        """DiffROAR of each model: its mean over the shares removed, against the reference, and at each share."""
        reference = self.config["reference"]
        columns = [Column("model", "model"), _number("diffroar", "DiffROAR, mean")]
        if reference is not None:
            columns.append(Column("difference", f"less that of {self.models[reference]}", ("mean", "half", "p")))
        columns += [_number(f"diffroar_{share:g}", f"{100 * share:g} %") for share in self.fractions]
        lines = []
        for name, title in self.models.items():
            own, theirs = self._diffroar(split, name, None), self._diffroar(split, reference, None)
            cells = [Cell(title), _score(own)]
            if reference is not None:
                cells.append(Cell("") if name == reference else _difference(own, theirs, self.models[reference]))
            cells += [_score(self._diffroar(split, name, share)) for share in self.fractions]
            lines.append(Line(name, tuple(cells)))
        return Table(f"DiffROAR, {split}", tuple(columns), tuple(lines), tuple(self._notes()))

    def _diffroar(self, split: str, model: str | None, share: float | None) -> list[Row]:
        wanted = {"metric": "diffroar", "split": split, "variant": model, "fraction": share}
        return [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]

    def _notes(self) -> Iterable[str]:
        removal, seeds = self.config["removal"], self.config["seeds"]
        fill = removal["fill"] if removal["fill"] != "mean" else "the training images' mean colour"
        whose = "the label" if removal["target"] == "label" else "the class that the model chose"
        yield (
            "Accuracy without the least relevant pixels less accuracy without the most relevant ones, in points, at "
            f"each share removed and on average. Maps by {_on_one_line(removal['explainer'])} for {whose}; channels "
            f"{removal['channels']}; in place of what is removed, in training and test images alike: {fill}."
        )
        if len(seeds) > 1:
            yield f"Means over {len(seeds)} seeds, each with models and retrainings of its own, with 95 % t intervals."
        if self.missed:
            yield self.missed


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def _on_one_line(section: Mapping[str, Any]) -> str:
    settings = ((key, value) for key, value in section.items() if key != "name")
    return ", ".join([section["name"], *(key if value is True else f"{key} {value}" for key, value in settings)])


def _number(key: str, title: str) -> Column:
    return Column(key, title, ("mean", "half", "n"), title)


def _score(rows: list[Row]) -> Cell:
    found = estimate(row["value"] for row in rows)
    if found is None:
        return Cell("–")
    mark = "" if all(row["reached"] for row in rows) else MISSED
    return Cell(percent(found, signed=True), mark, (found.mean, found.half, found.n))


def _difference(own: list[Row], theirs: list[Row], name: str) -> Cell:
    ours, others = ({row["seed"]: row["value"] for row in rows} for rows in (own, theirs))
    found = compare(ours, others, name)
    if found is None:
        return Cell("–")
    numbers = (found.difference.mean, found.difference.half, found.p)
    return Cell(percent(found.difference, signed=True), p_value(found.p), numbers)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The DiffROAR tables of a results.json, one for each test split; none where only one end was removed."""
    page = RoarPage(results)
    return [page.table(split) for split in page.splits] if page.both_ends else []


def is_roar(folder: Path | str) -> bool:
    """Whether a folder's results are those of a ROAR audit."""
    results = RunFolder(Path(folder)).results
    return results.is_file() and (read_results(results).get("config") or {}).get("audit") == "roar"


def build_roar_report(folder: Path | str) -> Path:
    """Write report.html, table.md and table.csv into the folder of a ROAR audit; return the page's path.

    Raises ``UserError`` where the folder is of something else.
    """
    place = RunFolder(Path(folder))
    results = read_results(place.results)
    if not is_roar(folder):
        raise UserError(f"{place.results} is not of a ROAR audit; name the folder of one.")
    if made := tables(results):
        write_text(place.path / "table.md", "\n".join(f"## {table.title}\n\n{to_markdown(table)}" for table in made))
        write_text(place.path / "table.csv", "\n".join(to_csv(table) for table in made))
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup((here / "style.css").read_text(encoding="utf-8"))
    write_text(place.report, environment.get_template("roar.html.jinja").render(page=RoarPage(results), style=style))
    return place.report
