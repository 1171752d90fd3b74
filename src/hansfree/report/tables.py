"""From rows of results to tables: means with intervals over seeds, paired comparisons, and their spellings.

The interval is Student's t over seeds: mean +- t(0.975, n - 1) sd / sqrt(n). A comparison is paired by seed, so
it is the same interval for the differences, and p is that of the paired t-test. With one seed there is no interval.
"""

import csv
import html
import io
import math
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable
from scipy.special import stdtr, stdtrit

Row = Mapping[str, Any]
Values = Mapping[Hashable, float]
"""One number a seed."""

SUPERVISION = {
    "teacher": "a teacher",
    "clean": "unbiased images",
    "bias": "bias labels",
    "bias:valid": "bias labels in validation",
    "mask": "masks",
    "boxes": "boxes",
    "bias-model": "a biased model",
}

SELECTION = {
    "last": "the last step",
    "iid_val": "best validation accuracy",
    "iid_val_loss": "lowest validation loss",
    "worst_group_val": "best worst-group validation accuracy",
    "conflicting_val": "best accuracy on conflicting validation samples",
    "ood_val": "best accuracy on unbiased validation images",
    "oracle": "best test result (oracle)",
}

SPLITS = ("iid", "ood", "shift")

GROUP_METRICS = {"acc_wg": "worst group", "acc_group_mean": "per group", "acc_avg": "train-weighted"}
"""Accuracies over groups (class, bias), and what a reader calls them."""

AGREEMENT_METRICS = {"agreement": "agreement"}
"""Measures of a student against its teacher, and what a reader calls them."""

NOT_APPLICABLE = "n/a"
"""The status of a run that needs what its benchmark does not give; its ``error`` says what."""


# Statistics ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds, its standard deviation and the half-width of its 95 % interval (None with one seed)."""

    n: int
    mean: float
    sd: float | None
    half: float | None


@dataclass(frozen=True)
class Comparison:
    """The mean difference from a reference over common seeds, and the p of a paired t-test.

    ``p`` is None where the test is undefined: fewer than two common seeds, or differences that do not vary.
    """

    reference: str
    difference: Estimate
    p: float | None


@dataclass(frozen=True)
class Summary:
    """One measured thing of one variant over its seeds."""

    benchmark: str | None
    variant: str | None
    model: str | None
    split: str | None
    tier: str | None
    group: str | None
    metric: str
    measured_with: str | None
    values: Values
    estimate: Estimate
    comparison: Comparison | None


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean and 95 % Student-t interval of at least one number; None for none."""
    numbers = list(values)
    n = len(numbers)
    if n == 0:
        return None
    mean = statistics.fmean(numbers)
    if n == 1:
        return Estimate(1, mean, None, None)
    sd = statistics.stdev(numbers)
    return Estimate(n, mean, sd, float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n))


def compare(values: Values, reference: Values, name: str) -> Comparison | None:
    """``values`` minus ``reference``, paired by seed; None without a common seed."""
    seeds = [seed for seed in values if seed in reference]
    difference = estimate(values[seed] - reference[seed] for seed in seeds)
    if difference is None:
        return None
    scale = max(abs(number) for seed in seeds for number in (values[seed], reference[seed]))
    if difference.sd is None or difference.sd <= 1e-12 * scale:
        return Comparison(name, difference, None)
    t = difference.mean / (difference.sd / math.sqrt(difference.n))
    return Comparison(name, difference, 2 * float(stdtr(difference.n - 1, -abs(t))))


def summarise(rows: Iterable[Row], reference: str | None = None) -> list[Summary]:
    """One :class:`Summary` per measured thing and variant, in the order of ``rows``; null values are left out.

    ``reference`` is the variant that the others are compared with, each measured thing with its own like.
    """
    collected: dict[tuple[Any, ...], dict[Hashable, float]] = {}
    for row in rows:
        if row["value"] is not None:
            key = (row["variant"], *(row.get(field) for field in _THING))
            collected.setdefault(key, {})[row.get("seed")] = row["value"]
    summaries = []
    for (variant, *thing), values in collected.items():
        found = estimate(values.values())
        assert found is not None
        against = collected.get((reference, *thing)) if reference is not None and variant != reference else None
        comparison = None if against is None or reference is None else compare(values, against, reference)
        named = dict(zip(_THING, thing))
        summaries.append(Summary(variant=variant, values=values, estimate=found, comparison=comparison, **named))
    return summaries


_THING = ("benchmark", "model", "split", "tier", "group", "metric", "measured_with")


# The table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column: its key in CSV, its heading, what its numbers are called in CSV (none: text), its heading
    on a terminal (empty: not shown there)."""

    key: str
    title: str
    parts: tuple[str, ...] = ()
    short: str = ""


@dataclass(frozen=True)
class Cell:
    """What a reader sees; a remark in small print; the numbers behind it, as many as the column has parts."""

    text: str
    remark: str = ""
    numbers: tuple[float | int | None, ...] = ()


@dataclass(frozen=True)
class Line:
    """One method of the table; ``reason`` says why it has no numbers, where it has none."""

    variant: str
    cells: tuple[Cell, ...]
    is_teacher: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """The comparison of methods, ready to be spelt as Markdown, CSV, LaTeX, HTML or on a terminal."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def parts(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The results under each condition of a suite, with the condition's title; all in one, untitled, without any."""
    suite: Mapping[str, Any] = results.get("suite") or {}
    if not suite.get("conditions"):
        return [("", results)]
    return [(condition["title"], _part(results, suite, condition)) for condition in suite["conditions"]]


def _part(results: Mapping[str, Any], suite: Mapping[str, Any], condition: Mapping[str, Any]) -> dict[str, Any]:
    name = condition["name"]
    suffix = f", {condition['title']}"
    cells = [
        {**cell, "title": (cell["title"] or cell["variant"]).removesuffix(suffix)}
        for cell in results["cells"]
        if cell.get("condition") == name
    ]
    models = {cell["variant"] for cell in cells} | {cell.get("teacher") for cell in cells}
    own = {
        "conditions": [],
        "reference": condition["reference"],
        "grids": [grid for grid in suite["grids"] if grid.get("condition") == name],
    }
    rows = [row for row in results["rows"] if row["variant"] in models]
    return {**results, "cells": cells, "rows": rows, "suite": {**suite, **own}}


def shown_variants(results: Mapping[str, Any]) -> list[str]:
    """The variants that a headline compares: of a grid of settings the chosen one alone."""
    settings = [setting for grid in (results.get("suite") or {}).get("grids") or [] for setting in grid["settings"]]
    left_out = {setting["variant"] for setting in settings if not setting["chosen"]}
    return [variant for variant in variant_titles(results.get("cells") or []) if variant not in left_out]


def method_table(results: Mapping[str, Any], variants: Iterable[str] | None = None) -> Table:
    """One line per variant (default: all), the teacher first, from a results.json of a run or of a suite."""
    cells, suite = results.get("cells") or [], results.get("suite") or {}
    reference = suite.get("reference")
    seeds = seeds_of(results)
    found = Findings(results["rows"], reference)
    titles = variant_titles(cells)
    seconds = {variant: _training_seconds(cells, variant) for variant in titles}
    headline = shown_variants(results)
    baselines = [cell["variant"] for cell in cells if cell.get("method") == "erm"]
    yardstick = next((variant for variant in baselines if variant in headline), next(iter(baselines), None))
    shown = found.splits
    lines = [_teacher_line([found.teacher(split) for split in shown], 3 if reference else 2)]
    for variant in _shown(titles, variants):
        own = [cell for cell in cells if cell["variant"] == variant]
        measured = [_score_cell(found.student(variant, split), own, len(seeds)) for split in shown]
        difference = _difference_cell(found.student(variant, _compared(shown)), own, variant == reference)
        time = _time_cell(seconds[variant], seconds.get(yardstick) if yardstick else None)
        against = (difference,) if reference else ()
        rest = (*measured, *against, _steps_cell(own), time)
        lines.append(Line(variant, (*_words(titles[variant], own), *rest), reason=_reason(own)))
    one_teacher = found.has_teacher and found.teachers == 1
    notes = _notes(len(seeds), titles.get(reference or ""), titles.get(yardstick or ""), one_teacher)
    columns = _columns(shown, titles.get(reference or "", reference))
    return Table("Accuracy by method", columns, tuple(lines if found.has_teacher else lines[1:]), notes)


def group_table(results: Mapping[str, Any], variants: Iterable[str] | None = None) -> Table | None:
    """Accuracies over groups, a group being a class with a value of the bias; None where no group was measured.

    For each split that has them: the worst group's, the mean in which all groups count the same, and the mean in
    which they count by their size in training. The last column compares the worst group of the last split.
    """
    return _by_split(results, variants, "Accuracy over groups", "group", GROUP_METRICS, _GROUPS)


def agreement_table(results: Mapping[str, Any], variants: Iterable[str] | None = None) -> Table | None:
    """Agreement of each student with its teacher on each split; None where none was measured.

    The last column compares that of the last split.
    """
    return _by_split(results, variants, "Agreement with the teacher", "agreement", AGREEMENT_METRICS, _AGREEMENT)


def _by_split(
    results: Mapping[str, Any],
    variants: Iterable[str] | None,
    title: str,
    key: str,
    metrics: Mapping[str, str],
    note: str,
) -> Table | None:
    """A column for each split and each of ``metrics`` that was measured on it; the first one is compared."""
    cells, suite = results.get("cells") or [], results.get("suite") or {}
    reference, seeds = suite.get("reference"), seeds_of(results)
    rows = [row for row in results["rows"] if row.get("metric") in metrics and row.get("value") is not None]
    things = [(s, m) for s in SPLITS for m in metrics if any((r["split"], r["metric"]) == (s, m) for r in rows)]
    if not things:
        return None
    found = {thing: Findings(rows, reference, metric=thing[1]) for thing in things}
    titles = variant_titles(cells)
    first = next(iter(metrics))
    compared = next((thing for thing in reversed(things) if thing[1] == first), None) if reference else None
    score = ("percent", "half_width", "seeds")
    columns = [*_WORDS, *(Column(f"{s}_{m}", f"{s}, {metrics[m]} (%)", score, f"{s} %") for s, m in things)]
    lines = [_teacher_line([found[thing].teacher(thing[0]) for thing in things], 1 if compared else 0)]
    for variant in _shown(titles, variants):
        own = [cell for cell in cells if cell["variant"] == variant]
        line = [*_words(titles[variant], own)]
        line += [_score_cell(found[thing].student(variant, thing[0]), own, len(seeds)) for thing in things]
        if compared:
            line.append(_difference_cell(found[compared].student(variant, compared[0]), own, variant == reference))
        lines.append(Line(variant, tuple(line), reason=_reason(own)))
    named = titles.get(reference or "", reference)
    if compared:
        against = f"{compared[0]}, {metrics[first]}, against {named} (points)"
        columns.append(Column(f"{key}_difference", against, (*score, "p"), "Δ"))
    has_teacher = any(found[thing].has_teacher for thing in things)
    one_teacher = has_teacher and all(found[thing].teachers <= 1 for thing in things)
    notes = (note, *_notes(len(seeds), named if compared else None, None, one_teacher))
    return Table(title, tuple(columns), tuple(lines if has_teacher else lines[1:]), notes)


_GROUPS = (
    "A group is a class with a value of the bias. Worst: the lowest accuracy of a group. Per group: the mean over "
    "groups, each counting the same. Train-weighted: the mean over groups, each counting by its size in training; "
    "groups that training never showed count nothing."
)

_AGREEMENT = "Agreement is the share of samples for which student and teacher have the same highest logit."


def side_by_side(table: Table, other: Table | None) -> Table:
    """The numbers of ``other`` as further columns of ``table``, for those who compute with them."""
    if other is None:
        return table
    columns = other.columns[len(_WORDS) :]
    more = {line.variant: line.cells[len(_WORDS) :] for line in other.lines}
    empty = tuple(Cell("–") for _ in columns)
    lines = tuple(replace(line, cells=line.cells + more.get(line.variant, empty)) for line in table.lines)
    return replace(table, columns=table.columns + columns, lines=lines)


def paper_form(table: Table) -> Table:
    """The table in the form in which papers print it: no steps and times, short headings, the teacher last."""
    kept = [n for n, column in enumerate(table.columns) if column.key not in ("steps", "time")]
    short = {"iid": "IID", "ood": "OOD", "shift": "Shift", "gap": "Gap", "difference": "Difference"}
    columns = tuple(replace(column, title=short.get(column.key, column.title)) for column in table.columns)
    lines = sorted(table.lines, key=lambda line: line.is_teacher)
    against = next((c.title for c in table.columns if c.key == "difference"), None)
    told = (
        "Accuracies in %, gaps from IID to Shift and differences in points.",
        *(() if against is None else (f"Difference: {against[0].lower()}{against[1:]}.",)),
        *(note for note in table.notes if not note.startswith("Training time")),
    )
    return Table(
        table.title,
        tuple(columns[n] for n in kept),
        tuple(replace(line, cells=tuple(line.cells[n] for n in kept)) for line in lines),
        told,
    )


def _shown(titles: Mapping[str, str], variants: Iterable[str] | None) -> list[str]:
    chosen = set(titles if variants is None else variants)
    return [variant for variant in titles if variant in chosen]


def _words(title: str, cells: Sequence[Mapping[str, Any]]) -> tuple[Cell, Cell, Cell]:
    first = cells[0]
    needs = Cell(supervision(first.get("needs")))
    if _is_not_applicable(cells):
        return Cell(title, _reason(cells)), needs, Cell("–")
    return Cell(title), needs, Cell(selection(first.get("selection")))


def _is_not_applicable(cells: Sequence[Mapping[str, Any]]) -> bool:
    return any(cell.get("status") == NOT_APPLICABLE for cell in cells)


def _reason(cells: Sequence[Mapping[str, Any]]) -> str:
    """Why there are no numbers: what is not given, or that runs failed; empty where any run is done."""
    if any(cell.get("status", "done") == "done" for cell in cells):
        return ""
    return (cells[0].get("error") or "") if _is_not_applicable(cells) else str(cells[0].get("status"))


class Findings:
    """The accuracies (or another ``metric``) and gaps among the rows, by variant and split (None: the gap)."""

    def __init__(self, rows: Iterable[Row], reference: str | None, metric: str = "acc") -> None:
        apart = ("tier", "group", "measured_with")
        plain = [row for row in rows if all(row.get(key) is None for key in apart)]
        wanted = [row for row in plain if row["metric"] == ("gap" if row.get("split") is None else metric)]
        students = [row for row in wanted if row.get("model") == "student"]
        self._students = {(found.variant, found.split): found for found in summarise(students, reference)}
        self._teacher = _teacher_scores([row for row in wanted if row.get("model") == "teacher"])

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher was measured."""
        return bool(self._teacher)

    @property
    def teachers(self) -> int:
        """How many teachers were measured."""
        return max((found.n for found in self._teacher.values()), default=0)

    @property
    def splits(self) -> tuple[str | None, ...]:
        """The splits that anyone was measured on, and None for the gap where both its ends were; else all of them."""
        measured = {split for _, split in self._students} | self._teacher.keys()
        splits = [split for split in SPLITS if split in measured] or list(SPLITS)
        return (*splits, *([None] if {"iid", "shift"} <= set(splits) else []))

    def student(self, variant: str, split: str | None) -> Summary | None:
        """The student's accuracy on ``split``; None where it was not measured."""
        return self._students.get((variant, split))

    def teacher(self, split: str | None) -> Estimate | None:
        """The teacher's accuracy on ``split``; None where it was not measured."""
        return self._teacher.get(split)


def _teacher_scores(rows: Iterable[Row]) -> dict[str | None, Estimate]:
    by_split: dict[str | None, dict[Hashable, float]] = {}
    for row in rows:
        if row["value"] is not None:
            by_split.setdefault(row.get("split"), {}).setdefault(row.get("seed"), row["value"])
    scores = {}
    for split, values in by_split.items():
        # One teacher that serves several runs scores the same in each: that is one observation, not several.
        distinct = values.values() if len(set(values.values())) > 1 else [next(iter(values.values()))]
        scores[split] = estimate(distinct)
    return scores


def seeds_of(results: Mapping[str, Any]) -> list[int]:
    """The seeds that were asked for."""
    asked = (results.get("suite") or {}).get("seeds")
    return list(asked or dict.fromkeys(cell["seed"] for cell in results.get("cells") or []))


def variant_titles(cells: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What to call each variant, in order: its title, else its own name."""
    titles: dict[str, str] = {}
    for cell in cells:
        titles.setdefault(cell["variant"], cell.get("title") or cell["variant"])
    return titles


def supervision(needs: Iterable[str] | None) -> str:
    """What a method is given, in words: ``labels only``, ``a teacher, masks``."""
    return ", ".join(SUPERVISION.get(need, need) for need in sorted(needs or ())) or "labels only"


def selection(rule: str | None) -> str:
    """A selection rule in words."""
    return "not recorded" if rule is None else SELECTION.get(rule, rule)


def percent(estimate: Estimate | None, *, signed: bool = False) -> str:
    """A fraction as ``87.0 ± 1.2`` (percent or points); without the interval where there is none."""
    if estimate is None:
        return "not measured"
    mean = f"{100 * estimate.mean:{'+' if signed else ''}.1f}".replace("-", "−")
    # A value that rounds to nothing has no sign.
    mean = mean.lstrip("+−") if mean in ("+0.0", "−0.0") else mean
    return mean if estimate.half is None else f"{mean} ± {100 * estimate.half:.1f}"


_WORDS = (
    Column("method", "Method", short="method"),
    Column("supervision", "Supervision", short="supervision"),
    Column("selection", "Chosen by", short="chosen by"),
)


def _compared(shown: Sequence[str | None]) -> str:
    """The split whose accuracies are compared: shift, or the last one that was measured."""
    return [split for split in shown if split is not None][-1]


def _columns(shown: Sequence[str | None], reference: str | None) -> tuple[Column, ...]:
    score, compared = ("percent", "half_width", "seeds"), _compared(shown)
    title = f"{compared.capitalize()} against {reference} (points)"
    against = Column("difference", title, (*score, "p"), f"Δ {compared}")
    return (
        *_WORDS,
        *(Column(split, f"{split} (%)", score, f"{split} %") for split in shown if split is not None),
        *([Column("gap", "Gap iid to shift (points)", score, "gap")] if None in shown else []),
        *([against] if reference else []),
        Column("steps", "Steps", ("count",)),
        Column("time", "Training time", ("seconds", "relative"), "time"),
    )


def _teacher_line(scores: Iterable[Estimate | None], empty: int) -> Line:
    words = (Cell("Teacher"), Cell("–"), Cell("–"))
    measured = [Cell("not measured") if score is None else _numbers(score) for score in scores]
    return Line("teacher", (*words, *measured, *[Cell("–")] * empty), is_teacher=True)


def _score_cell(found: Summary | None, cells: Sequence[Mapping[str, Any]], seeds: int) -> Cell:
    unfinished = [cell["status"] for cell in cells if cell.get("status") != "done"]
    if found is None:
        told = "N/A" if _is_not_applicable(cells) else unfinished[0] if unfinished else "not measured"
        return Cell(told)
    missing = seeds - found.estimate.n
    return _numbers(found.estimate, remark=f"{found.estimate.n} of {seeds} seeds" if missing > 0 else "")


def _numbers(found: Estimate, *, signed: bool = False, remark: str = "", extra: tuple[float | None, ...] = ()) -> Cell:
    half = None if found.half is None else 100 * found.half
    return Cell(percent(found, signed=signed), remark, (100 * found.mean, half, found.n, *extra))


def _difference_cell(found: Summary | None, cells: Sequence[Mapping[str, Any]], is_reference: bool) -> Cell:
    if _is_not_applicable(cells):
        return Cell("N/A")
    if is_reference:
        return Cell("reference")
    if found is None or found.comparison is None:
        return Cell("–")
    p = found.comparison.p
    return _numbers(found.comparison.difference, signed=True, remark=p_value(p), extra=(p,))


def p_value(p: float | None) -> str:
    """A p-value to two significant digits, empty where there is none."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _steps_cell(cells: Sequence[Mapping[str, Any]]) -> Cell:
    steps = next((cell["steps"] for cell in cells if cell.get("steps") is not None), None)
    return Cell("–") if steps is None else Cell(f"{steps:,}".replace(",", "\u202f"), numbers=(steps,))


def _training_seconds(cells: Iterable[Mapping[str, Any]], variant: str) -> float | None:
    times = [
        cell["time"]["train_seconds"]
        for cell in cells
        if cell["variant"] == variant and (cell.get("time") or {}).get("train_seconds") is not None
    ]
    return statistics.fmean(times) if times else None


def _time_cell(seconds: float | None, yardstick: float | None) -> Cell:
    if seconds is None:
        return Cell("–")
    absolute = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    if not yardstick:
        return Cell(absolute, numbers=(seconds, None))
    return Cell(f"{seconds / yardstick:.1f} ×", absolute, (seconds, seconds / yardstick))


def _notes(seeds: int, reference: str | None, yardstick: str | None, one_teacher: bool) -> tuple[str, ...]:
    notes = ["Supervision is what a method is given beyond class labels."]
    if seeds > 1:
        notes.append(f"Each number is a mean over {seeds} seeds; ± is the half-width of its 95 % Student t interval.")
        if one_teacher:
            notes.append("One teacher serves all runs, so the chance in its own training is not in the intervals.")
    else:
        notes.append("There is one seed, so no number has an interval, and chance alone may explain differences.")
    if reference:
        paired = "paired by seed; p is that of a paired t-test" if seeds > 1 else "for the same seed"
        notes.append(f"Differences are from {reference}, {paired}.")
    if yardstick:
        notes.append(f"Training time is relative to {yardstick}, and depends on the machine and on its load.")
    return tuple(notes)


# Spellings ----------------------------------------------------------------------------------------------------


def to_markdown(table: Table) -> str:
    """The table and its notes as GitHub Markdown."""

    def line(texts: Iterable[str]) -> str:
        return f"| {' | '.join(texts)} |\n"

    rule = line("---:" if column.parts else ":---" for column in table.columns)
    body = "".join(line(_markdown(full_text(cell)) for cell in row.cells) for row in table.lines)
    notes = "".join(f"\n{_markdown(note)}\n" for note in table.notes)
    return line(_markdown(column.title) for column in table.columns) + rule + body + notes


def to_csv(table: Table) -> str:
    """The numbers behind the table, a column each, to six decimals; what is missing stays empty, with its reason."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [
        f"{column.key}_{part}" if part else column.key for column in table.columns for part in column.parts or ("",)
    ]
    writer.writerow(["variant", *names, "reason"])
    for line in table.lines:
        values: list[Any] = [line.variant]
        for column, cell in zip(table.columns, line.cells):
            numbers = cell.numbers or (None,) * len(column.parts)
            values += [None if x is None else round(x, 6) for x in numbers] if column.parts else [cell.text]
        writer.writerow([*values, line.reason])
    return file.getvalue()


def to_latex(table: Table) -> str:
    """A booktabs ``tabular``, the notes as comments before it."""

    def line(texts: Iterable[str]) -> str:
        return f"  {' & '.join(texts)} \\\\\n"

    notes = "".join(f"% {_one_line(note)}\n" for note in table.notes)
    body = "".join(line(_latex(full_text(cell)) for cell in row.cells) for row in table.lines)
    columns = "".join("r" if column.parts else "l" for column in table.columns)
    head = line(_latex(column.title) for column in table.columns)
    return (
        f"{notes}% needs \\usepackage{{booktabs}}\n\\begin{{tabular}}{{{columns}}}\n"
        f"  \\toprule\n{head}  \\midrule\n{body}  \\bottomrule\n\\end{{tabular}}\n"
    )


def to_rich(table: Table) -> RichTable:
    """The table for a terminal of 80 columns: two lines a method, the interval below its mean."""
    notes = "\n".join(table.notes)
    shown = RichTable(title=table.title, box=box.SIMPLE_HEAD, caption=notes, caption_justify="left", pad_edge=False)
    shown.padding, shown.collapse_padding = (0, 1), True
    numeric = [(number, column) for number, column in enumerate(table.columns) if column.parts and column.short]
    words = [number for number, column in enumerate(table.columns) if not column.parts]
    shown.add_column(", ".join(table.columns[number].short for number in words), min_width=20)
    for _, column in numeric:
        shown.add_column(escape(column.short), justify="right", no_wrap=True)
    for line in table.lines:
        name, *details = (line.cells[number].text for number in words)
        below = ", ".join(detail for detail in (*details, line.cells[words[0]].remark) if detail not in ("", "–"))
        first = escape(name) + (f"\n[dim]{escape(below)}[/]" if below else "")
        shown.add_row(first, *(_two_lines(line.cells[number]) for number, _ in numeric))
    return shown


def _two_lines(cell: Cell) -> str:
    mean, _, half = cell.text.partition(" ± ")
    below = f"±{half}" if half else cell.remark
    if not cell.numbers:
        mean, _, below = mean.partition(" ")
    return escape(mean) + (f"\n[dim]{escape(below)}[/]" if below else "")


def full_text(cell: Cell) -> str:
    """The cell with its remark."""
    return f"{cell.text} ({cell.remark})" if cell.remark else cell.text


def _one_line(text: str) -> str:
    return re.sub(r"[\r\n\t]+", " ", text)


def _replacing(characters: Mapping[str, str]) -> Callable[[str], str]:
    table = str.maketrans(dict(characters))
    return lambda text: _one_line(text).translate(table)


_markdown = _replacing({c: "\\" + c for c in "\\`*_[]|"} | {c: html.escape(c) for c in "<>&"})
_latex = _replacing(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"±": r"$\pm$", "×": r"$\times$", "−": "$-$", "–": "--", "\u202f": r"\,"}
)
