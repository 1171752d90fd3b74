"""The comparison of methods as tables: a line for each variant, with what it was given, its numbers and its cost."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hansfree.report.results import (
    NOT_APPLICABLE,
    SPLITS,
    Findings,
    Section,
    headline_metric,
    seeds_of,
    shown_variants,
    teacher_titles,
    variant_titles,
)
from hansfree.report.statistics import Estimate, Summary
from hansfree.report.wording import BITS, PERCENT, Unit, p_value, selection, supervision, told_in

GROUP_METRICS = {"acc_wg": "worst group", "acc_group_mean": "per group", "acc_avg": "train-weighted"}
"""Accuracies over groups (class, bias), and what a reader calls them."""

ALIGNMENT_METRICS = {"acc_bc": "conflicting", "acc_ba": "aligned"}
"""Accuracies where the bias disagrees and where it agrees with the label, and what a reader calls them."""

AGREEMENT_METRICS = {"agreement": "agreement"}
"""Measures of a student against its teacher, and what a reader calls them."""

RANKING_METRICS = {"mean_average_precision": "mAP"}
"""Measures of labels of several classes beside F1, and what a reader calls them."""

LOCALISATION_METRICS = {"epg": "EPG", "iou": "IoU"}
"""Measures of maps against masks or boxes, and what a reader calls them."""

BAND_METRICS = {
    "feature_auprc": "feature AUPRC",
    "five_band_accuracy": "pixels",
    "five_band_recall": "recall",
    "five_band_precision": "precision",
    "five_band_fpr": "FPR",
}
"""Measures of maps against a truth of three bands, and what a reader calls them."""

WORD_METRICS = {
    "word_auroc": "AUROC",
    "word_auprc": "AUPRC",
    "word_sign_acc": "right signs",
    "word_base_rate": "AUPRC by chance",
}
"""Measures of attributions of words against what people say of them, and what a reader calls them."""

TRIGGER_METRICS = {"trigger_share": "share"}
"""How much of the attribution is at the planted word, and what a reader calls it."""

SIMILARITY_METRICS = {
    "entropy_category": "within the category",
    "entropy_entire": "over all classes",
    "entropy_category_double": "within, softmax twice",
}
"""Entropies that tell whether a model knows which classes are alike, and what a reader calls them."""

HEADLINES = {"acc": "Accuracy", "f1": "F1"}
"""What the comparison is of."""


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


def method_table(results: Section, variants: Iterable[str] | None = None) -> Table:
    """One line per variant (default: all), the teacher first, from a results.json of a run or of a suite."""
    cells, suite = results.get("cells") or [], results.get("suite") or {}
    reference = suite.get("reference")
    seeds = seeds_of(results)
    found = Findings(results["rows"], reference)
    titles = variant_titles(cells)
    seconds = {variant: _training_seconds(cells, variant) for variant in titles}
    headline = shown_variants(results)
    baselines = [cell["variant"] for cell in cells if cell.get("method") == "erm" and cell.get("steps") != 0]
    yardstick = next((variant for variant in baselines if variant in headline), next(iter(baselines), None))
    shown = found.splits
    chosen = _shown(titles, variants)
    teachers = teacher_titles(results, chosen, found.teachers)
    lines = [
        _teacher_line(name, title, [found.teacher(name, split) for split in shown], 3 if reference else 2)
        for name, title in teachers.items()
    ]
    for variant in chosen:
        own = [cell for cell in cells if cell["variant"] == variant]
        measured = [score_cell(found.student(variant, split), own, len(seeds)) for split in shown]
        difference = difference_cell(found.student(variant, _compared(shown)), own, variant == reference)
        time = _time_cell(seconds[variant], seconds.get(yardstick) if yardstick else None)
        against = (difference,) if reference else ()
        rest = (*measured, *against, _steps_cell(own), time)
        lines.append(Line(variant, (*_words(titles[variant], own), *rest), reason=_reason(own)))
    told = _teacher_note(len(teachers), found.teacher_runs)
    notes = _notes(len(seeds), titles.get(reference or ""), titles.get(yardstick or ""), told)
    notes = (*_missing(suite.get("not_run") or []), *notes)
    headed = HEADLINES[headline_metric(results["rows"])]
    columns = _columns(shown, titles.get(reference or "", reference), headed)
    return Table(f"{headed} by method", columns, tuple(lines), notes)


def _missing(families: Iterable[Section]) -> Iterator[str]:
    """What a suite that is run in parts has still to run."""
    said = [f"{family['title']}{' (in part)' if family['in_part'] else ''}" for family in families]
    if said:
        yield f"Not run yet: {', '.join(said)}."


def group_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """Accuracies over groups, a group being a class with a value of the bias; None where no group was measured.

    For each split that has them: the worst group's, the mean in which all groups count the same, and the mean in
    which they count by their size in training. The last column compares the worst group of the last split.
    """
    return _by_split(results, variants, "Accuracy over groups", "group", GROUP_METRICS, _GROUPS)


def alignment_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """Accuracy where the bias disagrees with the label and where it agrees; None where no split has both.

    The last column compares that on conflicting samples of the last split that has both.
    """
    title = "Accuracy with and against the shortcut"
    return _by_split(results, variants, title, "alignment", ALIGNMENT_METRICS, _ALIGNMENT)


def agreement_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """Agreement of each student with its teacher on each split; None where none was measured.

    The last column compares that of the last split.
    """
    return _by_split(results, variants, "Agreement with the teacher", "agreement", AGREEMENT_METRICS, _AGREEMENT)


def tier_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """The headline's measure on each tier of each split, such as seen and unseen identities; None without tiers."""
    own = headline_metric(results["rows"])
    rows = [row for row in results["rows"] if row["metric"] == own and row.get("tier") and row["group"] is None]
    tiers = {f"{own}_{row['tier']}": row["tier"] for row in rows}
    apart = [{**row, "tier": None, "metric": f"{own}_{row['tier']}"} for row in rows]
    title = f"{HEADLINES[own]} by tier"
    return _by_split({**results, "rows": apart}, variants, title, "tier", tiers, _TIERS)


def ranking_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """Mean average precision on each split; None where images have one label each."""
    return _by_split(results, variants, "Mean average precision", "map", RANKING_METRICS, _RANKING)


def localisation_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """EPG and IoU of maps on each split; None where none were measured. Of several explainers, the first one's."""
    return _of_maps(results, variants, "Where explanations are", "localisation", LOCALISATION_METRICS, _LOCALISATION)


def band_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """Scores of maps in five bands, and AUPRC of the feature; None where none were measured. Of the first explainer."""
    return _of_maps(results, variants, "Explanations in five bands", "bands", BAND_METRICS, _BANDS)


def word_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """Attributions of rated words on each split; None where none were measured. Of the first explainer."""
    return _of_maps(results, variants, "Words against what people say", "words", WORD_METRICS, _WORDS_OF_PEOPLE)


def trigger_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """The share of attributions at the planted word on each split; None without one. Of the first explainer."""
    return _of_maps(results, variants, "Attribution of the planted word", "trigger", TRIGGER_METRICS, _TRIGGER)


def similarity_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """Entropies within categories of classes, and over all classes, on each split; None without categories."""
    title = "Similarity of classes"
    return _by_split(results, variants, title, "similarity", SIMILARITY_METRICS, _SIMILARITY, BITS)


def _of_maps(
    results: Section,
    variants: Iterable[str] | None,
    title: str,
    key: str,
    metrics: Mapping[str, str],
    note: str,
) -> Table | None:
    rows = [row for row in results["rows"] if row["metric"] in metrics and row["split"] in SPLITS]
    explainers = list(dict.fromkeys(row["measured_with"] for row in rows))
    own = {**results, "rows": [{**row, "measured_with": None} for row in rows if row["measured_with"] == explainers[0]]}
    note = f"{note} Maps are those of {explainers[0]}." if explainers else ""
    return _by_split(own, variants, title, key, metrics, note)


FURTHER = (
    *(group_table, alignment_table, tier_table, agreement_table, ranking_table),
    *(localisation_table, band_table, word_table, trigger_table, similarity_table),
)
"""What is compared beside the headline, in order; each is None where there is nothing to compare."""


def _by_split(
    results: Section,
    variants: Iterable[str] | None,
    title: str,
    key: str,
    metrics: Mapping[str, str],
    note: str,
    unit: Unit = PERCENT,
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
    score = ("percent" if unit is PERCENT else unit.name, "half_width", "seeds")
    headed = (Column(f"{s}_{m}", f"{s}, {metrics[m]} ({unit.name})", score, f"{s} {unit.name}") for s, m in things)
    columns = [*_WORDS, *headed]
    chosen = _shown(titles, variants)
    measured = dict.fromkeys(name for thing in things for name in found[thing].teachers)
    teachers = teacher_titles(results, chosen, measured)
    lines = [
        _teacher_line(name, title, [found[s, m].teacher(name, s) for s, m in things], 1 if compared else 0, unit)
        for name, title in teachers.items()
    ]
    for variant in chosen:
        own = [cell for cell in cells if cell["variant"] == variant]
        line = [*_words(titles[variant], own)]
        line += [score_cell(found[thing].student(variant, thing[0]), own, len(seeds), unit) for thing in things]
        if compared:
            summary = found[compared].student(variant, compared[0])
            line.append(difference_cell(summary, own, variant == reference, unit))
        lines.append(Line(variant, tuple(line), reason=_reason(own)))
    named = titles.get(reference or "", reference)
    if compared:
        against = f"{compared[0]}, {metrics[first]}, against {named} ({unit.difference})"
        columns.append(Column(f"{key}_difference", against, (*score, "p"), "Δ"))
    told = _teacher_note(len(teachers), max(found[thing].teacher_runs for thing in things))
    notes = (note, *_notes(len(seeds), named if compared else None, None, told))
    return Table(title, tuple(columns), tuple(lines), notes)


_GROUPS = (
    "A group is a class with a value of the bias. Worst: the lowest accuracy of a group. Per group: the mean over "
    "groups, each counting the same. Train-weighted: the mean over groups, each counting by its size in training; "
    "groups that training never showed count nothing."
)

_ALIGNMENT = "Conflicting: the samples whose bias disagrees with the label. Aligned: the others."

_AGREEMENT = "Agreement is the share of samples for which student and teacher have the same highest logit."

_TIERS = "Tiers are parts of a split that the benchmark names, such as individuals that training showed or did not."

_RANKING = "Average precision of the ranking of images by each class's logit, mean over classes."

_LOCALISATION = (
    "EPG is the share of positive relevance in the mask or the boxes of the class, IoU the overlap with what exceeds "
    "half of the map's maximum; of images with several labels, of each class that is there."
)

_SIMILARITY = (
    "Entropy of the probabilities of right samples, in bits: the more even a model's probabilities within the category "
    "of the sample's class, the more it says that these classes are alike. Softmax twice is what the published numbers "
    "fit."
)

_WORDS_OF_PEOPLE = (
    "Of the words that people rated, in sentences that the model gets right: how well attributions for the class rank "
    "those that should speak for it above those that should not, and how many have the right sign."
)

_TRIGGER = "The planted word's part of the sizes of all attributions of a sentence; that of one word of n alike is 1/n."

_BANDS = (
    "Maps against a truth that tells nothing, object and distinguishing feature apart. Pixels, recall, precision and "
    "FPR (lower is better) are the published five-band scores, means over thresholds; feature AUPRC is of the ranking "
    "of pixels, over images that show an object."
)


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
        f"{'F1' if table.title.startswith('F1') else 'Accuracies'} in %, gaps from IID to Shift and differences in "
        "points.",
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


def _words(title: str, cells: Sequence[Section]) -> tuple[Cell, Cell, Cell]:
    first = cells[0]
    needs = Cell(supervision(first.get("needs")))
    if _is_not_applicable(cells):
        return Cell(title, _reason(cells)), needs, Cell("–")
    return Cell(title), needs, Cell(selection(first.get("selection")))


def _is_not_applicable(cells: Sequence[Section]) -> bool:
    return any(cell.get("status") == NOT_APPLICABLE for cell in cells)


def _reason(cells: Sequence[Section]) -> str:
    """Why there are no numbers: what is not given, or that runs failed; empty where any run is done."""
    if any(cell.get("status", "done") == "done" for cell in cells):
        return ""
    return (cells[0].get("error") or "") if _is_not_applicable(cells) else str(cells[0].get("status"))


_WORDS = (
    Column("method", "Method", short="method"),
    Column("supervision", "Supervision", short="supervision"),
    Column("selection", "Chosen by", short="chosen by"),
)


def _compared(shown: Sequence[str | None]) -> str:
    """The split whose accuracies are compared: shift, or the last one that was measured."""
    return [split for split in shown if split is not None][-1]


def _columns(shown: Sequence[str | None], reference: str | None, measure: str) -> tuple[Column, ...]:
    score, compared = ("percent", "half_width", "seeds"), _compared(shown)
    # Accuracy is what a share of a split is taken for unless another measure is named.
    named = "" if measure == HEADLINES["acc"] else f", {measure}"
    title = f"{compared.capitalize()}{named} against {reference} (points)"
    against = Column("difference", title, (*score, "p"), f"Δ {compared}")
    return (
        *_WORDS,
        *(Column(split, f"{split}{named} (%)", score, f"{split}{named} %") for split in shown if split is not None),
        *([Column("gap", "Gap iid to shift (points)", score, "gap")] if None in shown else []),
        *([against] if reference else []),
        Column("steps", "Steps", ("count",)),
        Column("time", "Training time", ("seconds", "relative"), "time"),
    )


def _teacher_line(name: str, title: str, scores: Iterable[Estimate | None], empty: int, unit: Unit = PERCENT) -> Line:
    words = (Cell(title), Cell("–"), Cell("–"))
    measured = [Cell("not measured") if score is None else _numbers(score, unit=unit) for score in scores]
    return Line(name, (*words, *measured, *[Cell("–")] * empty), is_teacher=True)


def score_cell(found: Summary | None, cells: Sequence[Section], seeds: int, unit: Unit = PERCENT) -> Cell:
    """A measured thing of the variant whose runs are ``cells``, or why it has no number."""
    unfinished = [cell["status"] for cell in cells if cell.get("status") != "done"]
    if found is None:
        told = "N/A" if _is_not_applicable(cells) else unfinished[0] if unfinished else "not measured"
        return Cell(told)
    missing = seeds - found.estimate.n
    return _numbers(found.estimate, remark=f"{found.estimate.n} of {seeds} seeds" if missing > 0 else "", unit=unit)


def _numbers(
    found: Estimate,
    *,
    signed: bool = False,
    remark: str = "",
    extra: tuple[float | None, ...] = (),
    unit: Unit = PERCENT,
) -> Cell:
    half = None if found.half is None else unit.scale * found.half
    return Cell(told_in(unit, found, signed=signed), remark, (unit.scale * found.mean, half, found.n, *extra))


def difference_cell(found: Summary | None, cells: Sequence[Section], is_reference: bool, unit: Unit = PERCENT) -> Cell:
    """How far a measured thing of the variant whose runs are ``cells`` is from the reference's."""
    if _is_not_applicable(cells):
        return Cell("N/A")
    if is_reference:
        return Cell("reference")
    if found is None or found.comparison is None:
        return Cell("–")
    p = found.comparison.p
    return _numbers(found.comparison.difference, signed=True, remark=p_value(p), extra=(p,), unit=unit)


def _steps_cell(cells: Sequence[Section]) -> Cell:
    steps = next((cell["steps"] for cell in cells if cell.get("steps") is not None), None)
    return Cell("–") if steps is None else Cell(f"{steps:,}".replace(",", "\u202f"), numbers=(steps,))


def _training_seconds(cells: Iterable[Section], variant: str) -> float | None:
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


def _teacher_note(teachers: int, runs: int) -> str:
    """What the intervals leave out where each teacher was trained once; empty where there is none or one per seed."""
    if not teachers or runs != 1:
        return ""
    if teachers == 1:
        return "One teacher serves all runs, so the chance in its own training is not in the intervals."
    return "Each teacher was trained once, so the chance in its own training is not in the intervals."


def seeds_note(seeds: int) -> str:
    """What stands behind each number."""
    if seeds > 1:
        return f"Each number is a mean over {seeds} seeds; ± is the half-width of its 95 % Student t interval."
    return "There is one seed, so no number has an interval, and chance alone may explain differences."


def _notes(seeds: int, reference: str | None, yardstick: str | None, teacher_note: str) -> tuple[str, ...]:
    notes = ["Supervision is what a method is given beyond class labels."]
    notes.append(seeds_note(seeds))
    if seeds > 1 and teacher_note:
        notes.append(teacher_note)
    if reference:
        paired = "paired by seed; p is that of a paired t-test" if seeds > 1 else "for the same seed"
        notes.append(f"Differences are from {reference}, {paired}.")
    if yardstick:
        notes.append(f"Training time is relative to {yardstick}, and depends on the machine and on its load.")
    return tuple(notes)
