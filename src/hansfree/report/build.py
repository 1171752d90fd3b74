"""The page: what a run or suite folder holds, put into words, tables and pictures.

The same folder gives the same page to the byte, but for what stands in elements marked ``data-time``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hansfree.errors import UserError
from hansfree.report import charts, tables
from hansfree.runs import RunFolder, SuiteFolder, open_folder, read_results, write_text

Section = Mapping[str, Any]

SPLIT_MEANING = {
    "iid": "The shortcut points to the right class, as it did in training.",
    "ood": "The shortcut takes values that training never showed.",
    "shift": "The shortcut points to another class.",
}
COLOUR_MEANING = {
    "iid": "Each class in its own colour, as in training.",
    "ood": "In colours that training never showed.",
    "shift": "Each class in another class's colour.",
}
SEEN_BY_TEACHER = {
    "input": "sees the student's own images",
    "clean": "sees the unbiased twins of the images",
    "noise": "sees noise in place of the images' background",
    "mean": "sees each image's mean colour in place of its background",
    "black": "sees black in place of the images' background",
    "recombine": "sees the background of other images in place of the image's own",
}
MOST_SAMPLES = 10
"""Samples drawn per split, where a run kept more."""


def build_report(folder: Path | str) -> Path:
    """Write report.html into a run or suite folder, and a suite's tables beside it; return the page's path.

    Raises ``UserError`` where the folder is neither, or holds no readable results.json.
    """
    place = open_folder(folder)
    if isinstance(place, SuiteFolder):
        write_tables(place)
    write_text(place.report, render(place))
    return place.report


def write_tables(folder: SuiteFolder) -> None:
    """Write table.md, table.csv and table.tex from results.json, every variant in each."""
    spelt = [_spelt_tables(title, part) for title, part in tables.parts(read_results(folder.results))]
    markdown, numbers, latex = zip(*spelt)
    write_text(folder.table("md"), "\n".join(markdown))
    write_text(folder.table("csv"), numbers[0] + "".join(text.partition("\n")[2] for text in numbers[1:]))
    write_text(folder.table("tex"), "\n".join(latex))


def _spelt_tables(title: str, results: Section) -> tuple[str, str, str]:
    """The tables as Markdown, CSV (all that was tried) and LaTeX, under the title of their condition."""
    shown = tables.shown_variants(results)
    others = [variant for variant in tables.variant_titles(results["cells"]) if variant not in shown]
    table, everything = tables.method_table(results, shown), tables.method_table(results)
    markdown, latex = tables.to_markdown(table), tables.to_latex(tables.paper_form(table))
    for further in (tables.group_table, tables.agreement_table):
        everything = tables.side_by_side(everything, further(results))
        if (more := further(results, shown)) is not None:
            markdown += f"\n## {more.title}\n\n{tables.to_markdown(more)}"
            latex += f"\n% {more.title}\n{tables.to_latex(more)}"
    if others:
        tried = tables.method_table(results, others)
        markdown += f"\n## Settings that were tried and not chosen\n\n{tables.to_markdown(tried)}"
    if title:
        markdown, latex = f"## {title}\n\n{markdown}", f"% {title}\n{latex}"
    return markdown, tables.to_csv(everything), latex


def render(place: RunFolder | SuiteFolder) -> str:
    """The page as text."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(mark=charts.legend_mark, bar=charts.colour_bar_uri(), bins=charts.BINS)
    style = Markup((here / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html.jinja").render(page=Page(place), style=style)


@dataclass(frozen=True)
class KeyFigure:
    """A large number and what it is."""

    number: str
    interval: str
    text: str


@dataclass(frozen=True)
class Notice:
    """Something that a reader must know before believing a number."""

    about: str
    text: str
    detail: str = ""


@dataclass(frozen=True)
class Tile:
    """One small picture with what is written under it."""

    uri: str | None
    told: str
    caption: str
    wrong: bool = False


@dataclass(frozen=True)
class Strip:
    """A row of tiles: the images, or one model's maps."""

    name: str
    detail: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class MapGrid:
    """The strips of one split."""

    split: str
    meaning: str
    strips: tuple[Strip, ...]


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
        self.seeds = tables.seeds_of(self.results)
        self.titles = tables.variant_titles(self.cells)
        self.found = tables.Findings(self.results["rows"], self.reference)

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
        shortcut = "a shortcut, the colour," if self._meanings is COLOUR_MEANING else "a shortcut"
        share = _aligned_share(self.data)
        often = "" if share in (None, 1) else f" in {100 * share:.4g} % of the cases"
        who, they = ("The students learn", "They are") if self.is_suite else ("The student learns", "It is")
        return (
            f"{who} from images in which {shortcut} gives the class away{often}. {they} then tested where it still "
            "does, where it takes values never seen, and where it misleads. "
            "A model that is right for the right reasons does equally well in all three."
        )

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was run: (what, in words)."""
        return list(_facts(self.config, self.data, self.cells, self.seeds))

    @property
    def splits(self) -> list[tuple[str, str, tuple[Tile, ...]]]:
        """The test splits that were measured: name, meaning, a few of their images."""
        measured = [split for split in tables.SPLITS if any(row.get("split") == split for row in self.results["rows"])]
        examples = next(iter(self.heatmaps.values()), None)
        return [
            (split, self._meaning(split), () if examples is None else _images(examples, split)[:4])
            for split in measured
        ]

    @property
    def _meanings(self) -> Mapping[str, str]:
        named = (self.config.get("benchmark") or {}).get("name") or self.data.get("name")
        return COLOUR_MEANING if named == "coloured-digits" else SPLIT_MEANING

    def _meaning(self, split: str) -> str:
        return self._meanings.get(split, "")

    # Results

    @cached_property
    def parts(self) -> "list[Page]":
        """The page under each condition of a suite; without conditions the page itself."""
        found = tables.parts(self.results)
        return [self] if not found[0][0] else [Page(self.place, part, title) for title, part in found]

    @property
    def shown(self) -> list[str]:
        """The variants that the headline compares: of a grid of settings only the chosen one."""
        return tables.shown_variants(self.results)

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
            measured = [(split, self.found.student(variant, split)) for split in tables.SPLITS]
            return [_key_figure(found.estimate, f"right under {split}") for split, found in measured if found]
        under_shift = [(v, found) for v in self.shown if (found := self.found.student(v, "shift")) is not None]
        figures = []
        if under_shift:
            best, found = max(under_shift, key=lambda pair: pair[1].estimate.mean)
            figures.append(_key_figure(found.estimate, f"right under shift: {self.titles[best]}, the highest here"))
            reference = self.found.student(self.reference or "", "shift")
            if reference and self.reference != best:
                name = self.titles.get(self.reference or "", self.reference)
                figures.append(_key_figure(reference.estimate, f"right under shift: {name}, the reference"))
        if teacher := self.found.teacher("shift"):
            figures.append(_key_figure(teacher, "right under shift: the teacher"))
        return figures

    @property
    def gap(self) -> Markup | None:
        """The picture of the gap; None where iid or shift was not measured."""
        lines = list(self._gap_lines())
        return charts.gap_chart(lines) if lines else None

    def _gap_lines(self) -> Iterator[charts.GapLine]:
        iid, shift = self.found.teacher("iid"), self.found.teacher("shift")
        if iid and shift:
            gap = tables.percent(self.found.teacher(None) or tables.Estimate(1, iid.mean - shift.mean, None, None))
            yield charts.GapLine("Teacher", "", iid, shift, (), (), gap, is_teacher=True)
        for variant in self.shown:
            iid, shift, gap = (self.found.student(variant, split) for split in ("iid", "shift", None))
            if iid is None or shift is None:
                continue
            needs = next(cell.get("needs") for cell in self.cells if cell["variant"] == variant)
            yield charts.GapLine(
                self.titles[variant],
                tables.supervision(needs),
                iid.estimate,
                shift.estimate,
                tuple(iid.values.values()) if iid.estimate.n > 1 else (),
                tuple(shift.values.values()) if shift.estimate.n > 1 else (),
                tables.percent(gap.estimate if gap else None),
            )

    @property
    def table(self) -> tables.Table:
        """The headline comparison."""
        return tables.method_table(self.results, self.shown)

    @property
    def table_of_groups(self) -> tables.Table | None:
        """The same comparison over groups; None where none was measured."""
        return tables.group_table(self.results, self.shown)

    @property
    def table_of_agreement(self) -> tables.Table | None:
        """Agreement with the teacher; None where none was measured."""
        return tables.agreement_table(self.results, self.shown)

    @property
    def table_of_others(self) -> tables.Table | None:
        """The settings that were tried and not chosen; None where there are none."""
        return tables.method_table(self.results, self.others) if self.others else None

    @property
    def warnings(self) -> list[Notice]:
        """Failed cells first, then flagged ones of the headline, then what the page itself could not do."""
        shown = [cell for cell in self.cells if cell["variant"] in self.shown]
        return [*_failures(self.cells, self.titles), *_flags(shown, self.titles), *self._own_warnings()]

    @property
    def flags_of_others(self) -> list[Notice]:
        """What is flagged of the settings that were not chosen."""
        others = [cell for cell in self.cells if cell["variant"] in self.others]
        return list(_flags(others, self.titles))

    def _own_warnings(self) -> Iterator[Notice]:
        for grid in self.grids:
            if not any(setting["admitted"] for setting in grid["settings"]):
                yield Notice(
                    grid["method"],
                    "no setting that was tried is as accurate on validation data as the rule asks; the comparison "
                    "shows the most accurate one, where there is one.",
                )
        for variant in self._mismatched:
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
        """Each variant's shift accuracy against its teacher's, where the conditions have teachers of their own."""
        series: dict[str, list[tuple[float, tables.Estimate]]] = {}
        for part in self.parts:
            teacher = part.found.teacher("shift")
            for variant in part.shown if teacher else ():
                student = part.found.student(variant, "shift")
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
        made = [Curves(name, _panels([folder.read_metrics() for folder in folders])) for name, folders in groups]
        return [curves for curves in made if curves.panels]

    @property
    def _finished(self) -> list[tuple[str, RunFolder]]:
        done = [cell for cell in self.cells if cell.get("status") == "done"]
        return [(cell["variant"], RunFolder(self.place.path / cell["folder"])) for cell in done]

    # Heatmaps

    @cached_property
    def heatmaps(self) -> dict[str, dict[str, np.ndarray]]:
        """What was kept for pictures, by variant, from its first finished seed."""
        first: dict[str, dict[str, np.ndarray]] = {}
        for variant, folder in self._finished:
            if variant not in first and folder.heatmaps.exists():
                first[variant] = read_heatmaps(folder.heatmaps)
        return first

    @cached_property
    def _mismatched(self) -> list[str]:
        if not self.heatmaps:
            return []
        standard = next(iter(self.heatmaps.values()))
        return [variant for variant, kept in self.heatmaps.items() if not _same_samples(kept, standard)]

    @cached_property
    def limit(self) -> float:
        """The end of the one colour scale of all maps."""
        return charts.common_limit(
            map
            for kept in self._comparable.values()
            for name, array in kept.items()
            if name.startswith(("map_", "teacher_map_"))
            for map in map_or_nothing(array)
        )

    @property
    def _comparable(self) -> dict[str, dict[str, np.ndarray]]:
        return {variant: kept for variant, kept in self.heatmaps.items() if variant not in self._mismatched}

    @property
    def has_long_names(self) -> bool:
        """Whether class names need more room than a phone has for a whole row."""
        return any(len(str(name)) > 4 for kept in self._comparable.values() for name in kept["classes"])

    @property
    def explainers(self) -> list[str]:
        """What drew the maps."""
        return list(dict.fromkeys(str(kept["explainer"]) for kept in self._comparable.values()))

    def map_grids(self, variants: Sequence[str]) -> list[MapGrid]:
        """For each split the images, the teacher's maps and those of ``variants``."""
        kept = {variant: self._comparable[variant] for variant in variants if variant in self._comparable}
        if not kept:
            return []
        splits = [str(split) for split in next(iter(kept.values()))["splits"]]
        return [MapGrid(split, self._meaning(split), tuple(self._strips(split, kept))) for split in splits]

    def _strips(self, split: str, kept: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[Strip]:
        yield Strip("Image", "and its class", _images(next(iter(kept.values())), split))
        by_explainer: dict[str, list[str]] = {}
        for variant, arrays in kept.items():
            by_explainer.setdefault(str(arrays["explainer"]), []).append(variant)
        for explainer, variants in by_explainer.items():
            detail = explainer if len(self.explainers) > 1 else ""
            taught = next((kept[v] for v in variants if f"teacher_map_{split}" in kept[v]), None)
            if taught is not None:
                yield Strip("Teacher", detail, _maps(taught, split, "teacher_", "Teacher", self.limit))
            for variant in variants:
                name = self.titles[variant]
                yield Strip(name, detail, _maps(kept[variant], split, "", name, self.limit))

    # How to do it again

    @property
    def command(self) -> str:
        """What to type."""
        return f"hansfree {'suite' if self.is_suite else 'run'} config.yaml"

    @property
    def config_text(self) -> str:
        """The settings as a config file that the command takes."""
        return _yaml(_without_empty(self.config))

    @property
    def environment(self) -> list[tuple[str, str, bool]]:
        """Versions and machine: name, value, and whether it changes from run to run."""
        given = self.results.get("environment") or {}
        fixed = [(key, _plain_text(value), False) for key, value in given.items() if key not in ("time", "command")]
        return fixed + [(key, _plain_text(value), True) for key, value in (given.get("time") or {}).items()]

    @property
    def data_text(self) -> str:
        """The benchmark's record as YAML; empty where it is too long to read."""
        text = _yaml(self.data) if self.data else ""
        return text if len(text) <= 20_000 else ""

    @property
    def files(self) -> list[tuple[str, str]]:
        """The raw files, relative to the page: path and what is in it."""
        return list(_files(self.place, self.cells))


# Words --------------------------------------------------------------------------------------------------------


def flat_config(config: Section) -> dict[str, Any]:
    """A suite's config in the shape of its file, where the shared settings stand beside the suite's own."""
    own = {key: value for key, value in config.items() if key != "base"}
    return {**own, **(config.get("base") or {})}


def _facts(config: Section, data: Section, cells: Sequence[Section], seeds: Sequence[int]) -> Iterator[tuple[str, str]]:
    variants = len({cell["variant"] for cell in cells})
    spelt = ", ".join(map(str, seeds))
    if 1 < len(cells) != variants * len(seeds):
        yield "Runs", f"{len(cells)} of {_count(variants, 'variant')}, seeds {spelt}; not every setting with every seed"
    elif variants > 1 or len(seeds) > 1:
        yield "Runs", f"{_count(variants, 'variant')} × {_count(len(seeds), 'seed')} ({spelt})"
    elif seeds:
        yield "Run", f"{cells[0].get('method')}, seed {spelt}"
    if config.get("benchmark"):
        yield "Data", _section_text(config["benchmark"]) + _sizes(data)
    teacher = config.get("teacher")
    if teacher:
        yield "Teacher", _teacher_text(teacher, config)
    if config.get("model"):
        altered = any("model" in key.split(".")[0] for key in _changed_keys(config))
        yield "Student", _section_text(config["model"]) + ("; some variants differ" if altered else "")
    if config.get("training"):
        yield "Training", _training_text(config["training"])
    rules = dict.fromkeys(cell.get("selection") for cell in cells)
    if rules:
        yield "Weights kept", "; ".join(tables.selection(rule) for rule in rules if rule) or "not recorded"


def _changed_keys(config: Section) -> set[str]:
    variants = config.get("variants") or {}
    return {key for variant in variants.values() if isinstance(variant, Mapping) for key in variant}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _section_text(section: Any) -> str:
    if not isinstance(section, Mapping):
        return str(section)
    options = [f"{key.replace('_', ' ')} {_plain_text(value)}" for key, value in section.items() if key != "name"]
    return f"{section.get('name', '')} ({', '.join(options)})" if options else str(section.get("name", ""))


def _plain_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " / ".join(map(_plain_text, value))
    if isinstance(value, Mapping):
        return _section_text(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _sizes(data: Section) -> str:
    splits = data.get("splits")
    if not isinstance(splits, Mapping):
        return ""
    sizes = [
        f"{split['size']} {name}" for name, split in splits.items() if isinstance(split, Mapping) and "size" in split
    ]
    return f": {', '.join(sizes)}" if sizes else ""


def _aligned_share(data: Section) -> float | None:
    """The share of training images in which the shortcut points to the class; None where it is not recorded."""
    splits = data.get("splits")
    train = splits.get("train") if isinstance(splits, Mapping) else None
    if not isinstance(train, Mapping) or "aligned" not in train or not train.get("size"):
        return None
    return train["aligned"] / train["size"]


def _teacher_text(teacher: Any, config: Section) -> str:
    if not isinstance(teacher, Mapping):
        return str(teacher)
    recipe = teacher.get("train") or {}
    model = recipe.get("model") or teacher.get("model")
    parts = [_section_text(model) if model else _plain_text(teacher.get("path") or "")]
    if recipe:
        changes = ", ".join(f"{key} {_plain_text(value)}" for key, value in recipe.items() if key != "model")
        parts.append("trained first" + (f" with {changes}" if changes else ""))
    seen = config.get("teacher_input", "input")
    parts.append(SEEN_BY_TEACHER.get(seen, f"sees {seen}"))
    return "; ".join(part for part in parts if part)


def _training_text(training: Section) -> str:
    length = [f"{training[key]} {key}" for key in ("epochs", "steps") if training.get(key)]
    named = [training.get("optimiser"), training.get("lr") and f"learning rate {training['lr']:g}"]
    rest = [training.get("schedule"), training.get("batch_size") and f"batches of {training['batch_size']}"]
    return ", ".join(str(part) for part in (*length, *named, *rest) if part)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=90, default_flow_style=None)


def _without_empty(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {key: _without_empty(value) for key, value in config.items() if value is not None}
    return [_without_empty(value) for value in config] if isinstance(config, list | tuple) else config


def _key_figure(found: tables.Estimate, text: str) -> KeyFigure:
    number, _, interval = tables.percent(found).partition(" ± ")
    return KeyFigure(number, interval, text)


def _failures(cells: Sequence[Section], titles: Mapping[str, str]) -> Iterator[Notice]:
    said: dict[str, list[tuple[int, str]]] = {}
    for cell in cells:
        if cell.get("status") not in ("done", tables.NOT_APPLICABLE):
            reason = (cell.get("error") or "no reason was recorded").strip()
            said.setdefault(cell["variant"], []).append((cell["seed"], f"{cell.get('status')}: {reason}"))
    return _grouped(said, titles)


def _flags(cells: Sequence[Section], titles: Mapping[str, str]) -> Iterator[Notice]:
    said: dict[str, list[tuple[int, str]]] = {}
    for cell in cells:
        for text in cell.get("warnings") or []:
            said.setdefault(cell["variant"], []).append((cell["seed"], text))
    return _grouped(said, titles)


def _grouped(said: Mapping[str, list[tuple[int, str]]], titles: Mapping[str, str]) -> Iterator[Notice]:
    """One notice a variant, in full where its seeds say different things."""
    for variant, texts in said.items():
        seeds = list(dict.fromkeys(seed for seed, _ in texts))
        about = f"{titles[variant]}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
        first, *_ = lines = texts[0][1].splitlines()
        # A traceback names the error in its last line.
        summary = f"{first} … {lines[-1]}" if len(lines) > 1 else first
        same = len({text for _, text in texts}) == 1
        detail = "" if same and len(lines) == 1 else "\n".join(f"seed {seed}: {text}" for seed, text in texts)
        yield Notice(about, summary, detail)


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
    ):
        if path.exists():
            yield path.relative_to(run.path).as_posix(), what


# Curves -------------------------------------------------------------------------------------------------------


def _panels(seeds: Iterable[list[dict[str, Any]]]) -> tuple[Markup, ...]:
    lines: dict[str, list[charts.Points]] = {}
    dots: dict[str, list[charts.Points]] = {}
    for records in seeds:
        trained, validated, accuracy = _traces(records)
        for term, points in trained.items():
            lines.setdefault(term, []).append(charts.binned(points))
        for term, points in validated.items():
            dots.setdefault(term, []).append(points)
        if accuracy:
            dots.setdefault("", []).append(accuracy)
    panels = [
        charts.Panel(f"Loss term: {term}", tuple(lines.get(term, ())), tuple(dots.get(term, ())))
        for term in dict.fromkeys([*lines, *dots])
        if term
    ]
    if "" in dots:
        panels.append(charts.Panel("Validation accuracy", (), tuple(dots[""]), percent=True))
    return tuple(map(charts.panel, panels))


def _traces(
    records: Iterable[Section],
) -> tuple[dict[str, charts.Points], dict[str, charts.Points], charts.Points]:
    """Loss terms in training, the same in validation, and validation accuracy, against steps over all stages."""
    trained: dict[str, list[tuple[float, float]]] = {}
    validated: dict[str, list[tuple[float, float]]] = {}
    accuracy: list[tuple[float, float]] = []
    stage, before, latest = None, 0, 0
    for record in records:
        if record.get("event") not in ("step", "valid"):
            continue
        if record.get("stage") != stage:
            stage, before = record.get("stage"), latest
        latest = max(latest, before + record["step"])
        into = trained if record["event"] == "step" else validated
        for term, value in (record.get("terms") or {}).items():
            if value is not None:
                into.setdefault(term, []).append((before + record["step"], value))
        if record["event"] == "valid" and (record.get("metrics") or {}).get("acc") is not None:
            accuracy.append((before + record["step"], record["metrics"]["acc"]))
    return dict(trained), dict(validated), accuracy


def _setting_chart(curve: Section, found: tables.Findings) -> tuple[str, Markup] | None:
    series = []
    for name, points in curve["series"].items():
        measured = [(x, found.student(variant, curve["split"])) for variant, x in points]
        kept = tuple(sorted((x, summary.estimate) for x, summary in measured if summary is not None))
        if kept:
            series.append(charts.Series(name, kept))
    return (curve["title"], charts.series_chart(series, curve["key"])) if series else None


# Heatmaps -----------------------------------------------------------------------------------------------------


def read_heatmaps(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a heatmaps.npz. Raises ``UserError`` where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate the run again to write it anew.") from None


def map_or_nothing(maps: np.ndarray) -> Iterator[np.ndarray]:
    """The maps that will be drawn, normalised; those that are not finite are left out."""
    for map in maps[:MOST_SAMPLES]:
        if (drawn := charts.normalised(map)) is not None:
            yield drawn


def _same_samples(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return np.array_equal(one["splits"], other["splits"]) and all(
        np.array_equal(one[f"index_{split}"], other[f"index_{split}"]) for split in one["splits"]
    )


def _images(kept: Mapping[str, np.ndarray], split: str) -> tuple[Tile, ...]:
    if f"image_{split}" not in kept:
        return ()
    names = [str(kept["classes"][label]) for label in kept[f"label_{split}"][:MOST_SAMPLES]]
    images = kept[f"image_{split}"][:MOST_SAMPLES]
    return tuple(Tile(charts.image_uri(image), f"{split}: {name}", name) for image, name in zip(images, names))


def _maps(kept: Mapping[str, np.ndarray], split: str, prefix: str, who: str, limit: float) -> tuple[Tile, ...]:
    tiles = []
    columns = (kept[f"{prefix}map_{split}"], kept[f"{prefix}prediction_{split}"], kept[f"label_{split}"])
    for map, prediction, label in zip(*(column[:MOST_SAMPLES] for column in columns)):
        said, truth = (str(kept["classes"][number]) for number in (prediction, label))
        wrong = bool(prediction != label)
        told = f"{who}, {split}, {truth}: says {said}, {'wrong' if wrong else 'right'}"
        drawn = charts.normalised(map)
        tiles.append(Tile(None if drawn is None else charts.map_uri(drawn, limit), told, said, wrong))
    return tuple(tiles)
