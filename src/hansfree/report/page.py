"""Everything on the page of a run or suite folder, each piece made when the template asks for it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from hansfree.report import charts, detectors, notices, sub_models, tables
from hansfree.report.bands import band_lines
from hansfree.report.curves import panels
from hansfree.report.dissection import best_units
from hansfree.report.facts import (
    as_yaml,
    facts_of,
    flat_config,
    meanings,
    plain_text,
    shortcut,
    story,
    without_empty,
)
from hansfree.report.heatmaps import Heatmaps, MapGrid, Strip, Tile, read_heatmaps
from hansfree.report.notices import Notice
from hansfree.report.representations import Representations
from hansfree.report.results import (
    SPLITS,
    Findings,
    Section,
    headline_metric,
    parts_of,
    seeds_of,
    shown_variants,
    teacher_titles,
    teachers_of,
    variant_titles,
)
from hansfree.report.shifts import shift_series
from hansfree.report.statistics import Estimate, Summary
from hansfree.report.word_maps import TextGrid, WordMaps, of_texts
from hansfree.report.wording import percent, supervision
from hansfree.runs import RunFolder, SuiteFolder, read_results


@dataclass(frozen=True)
class KeyFigure:
    """A large number and what it is."""

    number: str
    interval: str
    text: str


@dataclass(frozen=True)
class Curves:
    """The panels of one variant."""

    name: str
    panels: tuple[Markup, ...]


class Page:
    """Everything that the template shows, each piece made when it asks."""

    def __init__(self, place: RunFolder | SuiteFolder, results: Section | None = None, heading: str = "") -> None:
        self.place = place
        self.heading = heading
        self.results = read_results(place.results) if results is None else results
        self.cells: list[dict[str, Any]] = self.results.get("cells") or []
        self.suite: dict[str, Any] = self.results.get("suite") or {}
        self.config = flat_config(self.results.get("config") or {})
        self.data: dict[str, Any] = self.results.get("data") or {}
        self.reference: str | None = self.suite.get("reference")
        self.seeds = seeds_of(self.results)
        self.titles = variant_titles(self.cells)
        self.found = Findings(self.results["rows"], self.reference)

    # What was run

    @property
    def is_suite(self) -> bool:
        """Whether the folder holds several runs."""
        return isinstance(self.place, SuiteFolder)

    @property
    def title(self) -> str:
        """The suite's title, or the run's."""
        given = self.suite.get("title") or self.suite.get("name")
        return given or next(iter(self.titles.values()), None) or self.config.get("name") or self.place.path.name

    @property
    def description(self) -> str:
        """The suite's own description."""
        return self.suite.get("description") or ""

    @property
    def story(self) -> str:
        """What was asked of the students, in a sentence or three."""
        return story(self.config, self.data, several=self.is_suite)

    @property
    def has_shortcut(self) -> bool:
        """Whether a test split has a shortcut that is new or misleads."""
        return shortcut(self.data) is not None

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was run: (what, in words)."""
        return list(facts_of(self.config, self.data, self.cells, self.seeds))

    @property
    def splits(self) -> list[tuple[str, str, tuple[Tile, ...]]]:
        """The test splits that were measured: name, meaning, a few of their images."""
        measured = [split for split in SPLITS if any(row.get("split") == split for row in self.results["rows"])]
        means = meanings(self.config, self.data)
        return [(split, means.get(split, ""), self.heatmaps.images(split)[:4]) for split in measured]

    # Results

    @cached_property
    def parts(self) -> "list[Page]":
        """The page under each condition of a suite; without conditions the page itself."""
        found = parts_of(self.results)
        return [self] if not found[0][0] else [Page(self.place, part, title) for title, part in found]

    @property
    def shown(self) -> list[str]:
        """The variants that the headline compares: of a grid of settings only the chosen one."""
        return shown_variants(self.results)

    @property
    def teachers(self) -> dict[str, str]:
        """The teachers of the headline and what each is called."""
        return teacher_titles(self.results, self.shown, self.found.teachers)

    @property
    def others(self) -> list[str]:
        """The variants that were tried and not chosen."""
        return [variant for variant in self.titles if variant not in self.shown]

    @property
    def key_figures(self) -> list[KeyFigure]:
        """The few numbers to remember."""
        if self.parts != [self]:
            return []
        if not self.is_suite:
            variant = next(iter(self.titles), "")
            measured = [(split, self.found.student(variant, split)) for split in SPLITS]
            what = "F1" if headline_metric(self.results["rows"]) == "f1" else "right"
            return [_key_figure(found.estimate, f"{what} under {split}") for split, found in measured if found]
        under_shift = [(v, found) for v in self.shown if (found := self.found.student(v, "shift")) is not None]
        figures = []
        if under_shift:
            best, found = max(under_shift, key=lambda pair: pair[1].estimate.mean)
            figures.append(_key_figure(found.estimate, f"right under shift: {self.titles[best]}, the highest here"))
            reference = self.found.student(self.reference or "", "shift")
            if reference and self.reference != best:
                name = self.titles.get(self.reference or "", self.reference)
                figures.append(_key_figure(reference.estimate, f"right under shift: {name}, the reference"))
        for name, title in self.teachers.items():
            if teacher := self.found.teacher(name, "shift"):
                told = "the teacher" if len(self.teachers) == 1 else f"{title[0].lower()}{title[1:]}"
                figures.append(_key_figure(teacher, f"right under shift: {told}"))
        return figures

    @property
    def gap(self) -> Markup | None:
        """The picture of the gap; None where iid or shift was not measured."""
        lines = list(self._gap_lines())
        return charts.span_chart(lines) if lines else None

    def _gap_lines(self) -> Iterator[charts.SpanLine]:
        for name, title in self.teachers.items():
            iid, shift = self.found.teacher(name, "iid"), self.found.teacher(name, "shift")
            if iid and shift:
                gap = percent(self.found.teacher(name, None) or Estimate(1, iid.mean - shift.mean, None, None))
                ends = charts.End("iid", iid), charts.End("shift", shift)
                yield charts.SpanLine(title, "", ends, gap, is_teacher=True)
        for variant in self.shown:
            iid, shift, gap = (self.found.student(variant, split) for split in ("iid", "shift", None))
            if iid and shift:
                ends = _end("iid", iid), _end("shift", shift)
                yield self._line(variant, ends, percent(gap.estimate if gap else None))

    @property
    def faithfulness(self) -> Markup | None:
        """The picture of accuracy and agreement; None where there is a gap to show, or no agreement."""
        agreed = Findings(self.results["rows"], None, "agreement")
        lines = [
            self._line(variant, (_end("accuracy", right), _end("agreement", same)), percent(same.estimate))
            for variant in self.shown
            if (right := self.found.student(variant, "iid")) and (same := agreed.student(variant, "iid"))
        ]
        return charts.span_chart(lines) if lines and not self.gap else None

    def _line(self, variant: str, ends: tuple[charts.End, charts.End], value: str) -> charts.SpanLine:
        needs = next(cell.get("needs") for cell in self.cells if cell["variant"] == variant)
        return charts.SpanLine(self.titles[variant], supervision(needs), ends, value)

    @property
    def table(self) -> tables.Table:
        """The headline comparison."""
        return tables.method_table(self.results, self.shown)

    @property
    def further_tables(self) -> list[tables.Table]:
        """What was measured beside the headline: groups, tiers, agreement and the like."""
        return [table for further in tables.FURTHER if (table := further(self.results, self.shown)) is not None]

    @property
    def table_of_others(self) -> tables.Table | None:
        """The settings that were tried and not chosen; None where there are none."""
        return tables.method_table(self.results, self.others) if self.others else None

    @property
    def warnings(self) -> list[Notice]:
        """Failed cells first, then flagged ones of the headline, then what the page itself could not do."""
        shown = [cell for cell in self.cells if cell["variant"] in self.shown]
        return [*notices.failures(self.cells, self.titles), *notices.flags(shown, self.titles), *self._own_warnings()]

    @property
    def flags_of_others(self) -> list[Notice]:
        """What is flagged of the settings that were not chosen."""
        others = [cell for cell in self.cells if cell["variant"] in self.others]
        return list(notices.flags(others, self.titles))

    def _own_warnings(self) -> Iterator[Notice]:
        for grid in self.grids:
            if not any(setting["admitted"] for setting in grid["settings"]):
                yield Notice(
                    grid["method"],
                    "no setting that was tried is as accurate on validation data as the rule asks; the comparison "
                    "shows the most accurate one, where there is one.",
                )
        for variant in self.heatmaps.mismatched:
            yield Notice(
                self.titles[variant], "its heatmaps show other samples than the rest, so they are left out below."
            )

    # Settings that were tried

    @property
    def grids(self) -> list[dict[str, Any]]:
        """Each method's grid of settings, as the suite wrote it."""
        return self.suite.get("grids") or []

    @property
    def teacher_chart(self) -> Markup | None:
        """Each variant's shift accuracy against its teacher's, where there are at least three teachers."""
        series: dict[str, list[tuple[float, Estimate]]] = {}
        for part in self.parts:
            taught_by = teachers_of(part.results)
            for variant in part.shown:
                student = part.found.student(variant, "shift")
                teacher = part.found.teacher(taught_by.get(variant, "teacher"), "shift")
                family = next(cell.get("family") for cell in part.cells if cell["variant"] == variant)
                if student is not None and teacher is not None:
                    series.setdefault(str(family), []).append((teacher.mean, student.estimate))
        if len({x for points in series.values() for x, _ in points}) < 3:
            return None
        titles = {name: variant.get("title", name) for name, variant in self.results["config"]["variants"].items()}
        lines = [
            charts.Series(titles.get(name, name), tuple(sorted(points, key=lambda point: point[0])))
            for name, points in series.items()
        ]
        return charts.series_chart(lines, "the teacher's accuracy under shift", diagonal=True)

    @property
    def setting_charts(self) -> list[tuple[str, Markup]]:
        """Accuracy against a setting: title and chart."""
        return [made for curve in self.suite.get("curves") or [] if (made := _setting_chart(curve, self.found))]

    # Curves

    @property
    def curves(self) -> list[Curves]:
        """Every loss term of every variant of the headline, all seeds; the teacher's last."""
        groups = [
            (self.titles[variant], [folder for v, folder in self._finished if v == variant]) for variant in self.shown
        ]
        if isinstance(self.place, SuiteFolder) and self.place.teacher.metrics.exists():
            groups.append(("Teacher", [self.place.teacher]))
        made = [Curves(name, panels([folder.read_metrics() for folder in folders])) for name, folders in groups]
        return [curves for curves in made if curves.panels]

    @property
    def _finished(self) -> list[tuple[str, RunFolder]]:
        done = [cell for cell in self.cells if cell.get("status") == "done"]
        return [(cell["variant"], RunFolder(self.place.path / cell["folder"])) for cell in done]

    @property
    def shift_charts(self) -> list[tuple[str, Markup]]:
        """Similarity of explanations under shifts, where it was measured: title and chart."""
        drawn = []
        for (split, explainer), lines in shift_series(self.results, self.shown).items():
            period = "; ".join(f"{line.name}: {line.period}" for line in lines if line.period is not None)
            title = f"{split}, {explainer}" + (f". Periods in pixels: {period}" if period else "")
            series = [charts.Series(line.name, line.points) for line in lines]
            drawn.append((title, charts.series_chart(series, "diagonal shift in pixels", percent=False)))
        return drawn

    # Parts of models

    @property
    def tables_of_parts(self) -> list[tables.Table]:
        """Accuracies of sub-models, how well conflicting samples were found, and what units detect."""
        every = (*sub_models.TABLES, *detectors.TABLES)
        return [table for made in every if (table := made(self.results, self.shown)) is not None]

    @property
    def verdicts(self) -> list[str]:
        """Whether masks earn their place, a sentence or two for each variant that has controls."""
        return sub_models.verdicts(self.results, self.shown)

    @property
    def courses(self) -> list[tuple[str, list[Markup]]]:
        """What masks kept of each layer over training: a variant's title, and its tables."""
        drawn = []
        for variant in self.shown:
            seeds = [folder.read_metrics() for name, folder in self._finished if name == variant]
            found = [_course(course) for course in sub_models.courses(seeds)]
            if found:
                drawn.append((self.titles[variant], found))
        return drawn

    @cached_property
    def representations(self) -> list[tuple[str, Representations]]:
        """What representations look like, of each variant's first finished seed that kept them."""
        first: dict[str, Representations] = {}
        for variant, folder in self._finished:
            if variant in self.shown and variant not in first and folder.representations.exists():
                first[variant] = Representations(read_heatmaps(folder.representations))
        return [(self.titles[variant], found) for variant, found in first.items()]

    @cached_property
    def best_units(self) -> list[tuple[str, tuple[Strip, ...]]]:
        """By concept, the unit of each variant's first finished seed that detects it best."""
        first: dict[str, Path] = {}
        for variant, folder in self._finished:
            if variant in self.shown and folder.dissection.exists():
                first.setdefault(variant, folder.dissection)
        return best_units(first.values())

    @property
    def band_charts(self) -> list[tuple[str, Markup]]:
        """Maps against a truth of three bands, where they were measured: title and radar chart."""
        found = band_lines(self.results, self.shown)
        return [(title, charts.radar(axes, lines)) for title, axes, lines in found]

    # Heatmaps

    @cached_property
    def _kept_maps(self) -> dict[str, dict[str, np.ndarray]]:
        """The arrays of each variant's first finished seed."""
        first: dict[str, dict[str, np.ndarray]] = {}
        for variant, folder in self._finished:
            if variant not in first and folder.heatmaps.exists():
                first[variant] = read_heatmaps(folder.heatmaps)
        return first

    @property
    def _taught_by(self) -> dict[str, str]:
        """What the teacher of each variant is called."""
        named = teacher_titles(self.results, self._kept_maps, dict.fromkeys(teachers_of(self.results).values()))
        return {variant: named[name] for variant, name in teachers_of(self.results).items() if name in named}

    @cached_property
    def heatmaps(self) -> Heatmaps:
        """What was kept for pictures, of each variant's first finished seed."""
        first = {variant: arrays for variant, arrays in self._kept_maps.items() if not of_texts(arrays)}
        references = [self.reference, *(part["reference"] for part in self.suite.get("conditions") or [])]
        return Heatmaps(first, self.titles, self._taught_by, [name for name in references if name in first])

    @property
    def map_grids(self) -> list[MapGrid]:
        """The heatmaps of the headline, by split."""
        return self.heatmaps.grids(self.shown, meanings(self.config, self.data))

    @cached_property
    def word_maps(self) -> WordMaps:
        """What was kept of texts, of each variant's first finished seed."""
        texts = {variant: arrays for variant, arrays in self._kept_maps.items() if of_texts(arrays)}
        return WordMaps(texts, self.titles, self._taught_by)

    @property
    def text_grids(self) -> list[TextGrid]:
        """The coloured texts of the headline, by split."""
        return self.word_maps.grids(self.shown, meanings(self.config, self.data))

    # How to do it again

    @property
    def command(self) -> str:
        """What to type."""
        return f"hansfree {'suite' if self.is_suite else 'run'} config.yaml"

    @property
    def config_text(self) -> str:
        """The settings as a config file that the command takes."""
        return as_yaml(without_empty(self.config))

    @property
    def environment(self) -> list[tuple[str, str, bool]]:
        """Versions and machine: name, value, and whether it changes from run to run."""
        given = self.results.get("environment") or {}
        fixed = [(key, plain_text(value), False) for key, value in given.items() if key not in ("time", "command")]
        return fixed + [(key, plain_text(value), True) for key, value in (given.get("time") or {}).items()]

    @property
    def data_text(self) -> str:
        """The benchmark's record as YAML; empty where it is too long to read."""
        text = as_yaml(self.data) if self.data else ""
        return text if len(text) <= 20_000 else ""

    @property
    def files(self) -> list[tuple[str, str]]:
        """The raw files, relative to the page: path and what is in it."""
        return list(_files(self.place, self.cells))


def _course(course: sub_models.Course) -> Markup:
    steps = [str(step) for step in course.steps]
    return charts.share_table(list(course.layers), steps, list(course.layers.values()), course.title, "step")


def _end(name: str, found: Summary) -> charts.End:
    return charts.End(name, found.estimate, tuple(found.values.values()) if found.estimate.n > 1 else ())


def _key_figure(found: Estimate, text: str) -> KeyFigure:
    number, _, interval = percent(found).partition(" ± ")
    return KeyFigure(number, interval, text)


def _files(place: RunFolder | SuiteFolder, cells: Sequence[Section]) -> Iterator[tuple[str, str]]:
    def name(path: Path) -> str:
        return path.relative_to(place.path).as_posix()

    yield name(place.results), "every number on this page, in long format"
    if isinstance(place, RunFolder):
        run = place
    else:
        for suffix, what in (("md", "Markdown"), ("csv", "CSV"), ("tex", "LaTeX")):
            if place.table(suffix).exists():
                yield name(place.table(suffix)), f"the table as {what}"
        if place.teacher.config.exists():
            yield name(place.teacher.path) + "/", "the teacher's own run"
        done = next((cell for cell in cells if cell.get("status") == "done"), None)
        if done is None:
            return
        yield "runs/VARIANT/seed-N/", "one folder a run, with the files below"
        run = RunFolder(place.path / done["folder"])
    for path, what in (
        (run.config, "the run's settings"),
        (run.metrics, "every step and validation"),
        (run.exported, "the model, as safetensors with its config"),
        (run.heatmaps, "the arrays behind the heatmaps"),
        (run.representations, "the arrays behind the pictures of representations"),
    ):
        if path.exists():
            yield path.relative_to(run.path).as_posix(), what


def _setting_chart(curve: Section, found: Findings) -> tuple[str, Markup] | None:
    series = []
    for name, points in curve["series"].items():
        measured = [(x, found.student(variant, curve["split"])) for variant, x in points]
        kept = tuple(sorted((x, summary.estimate) for x, summary in measured if summary is not None))
        if kept:
            series.append(charts.Series(name, kept))
    return (curve["title"], charts.series_chart(series, curve["key"])) if series else None
