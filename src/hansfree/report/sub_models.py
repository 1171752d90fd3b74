"""Models that are made of parts: each part's accuracy, what was mined for them, and whether masks earn their place."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from hansfree.report.curves import over_all_stages
from hansfree.report.results import SPLITS, Section, headline_metric, seeds_of, shown_variants, variant_titles
from hansfree.report.statistics import Comparison, Row, Summary, compare, summarise
from hansfree.report.tables import Cell, Column, Line, Table, score_cell, seeds_note
from hansfree.report.wording import p_value, percent

PARTS = {
    "sub-a": "sub-model A",
    "sub-b": "sub-model B",
    "sub-mean": "mean of A and B",
    "sub-confident": "the more confident",
}
"""Models of which a method reports figures apart, and what a reader calls them."""

CONTROLS = {"random": "random masks", "none": "no masks"}
"""Settings of ``method.masks`` that a method with masks must surpass, and what a reader calls them."""

_SCORE = ("percent", "half_width", "seeds")


def sub_model_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """The accuracy of each part of each variant on each split, and on conflicting samples; None without parts."""
    rows = [row for row in results["rows"] if row["model"] in PARTS and row["metric"] in ("acc", "acc_bc")]
    things = [(split, metric) for split in SPLITS for metric in ("acc", "acc_bc") if _measured(rows, split, metric)]
    found = _summaries(rows)
    chosen = _shown(results, variants)
    parts = [(variant, part) for variant in chosen for part in PARTS if (variant, part) in {key[:2] for key in found}]
    if not parts:
        return None
    titles, seeds = variant_titles(results["cells"]), len(seeds_of(results))

    def scores_of(variant: str, part: str) -> Iterator[Cell]:
        return (score_cell(found.get((variant, part, *thing)), (), seeds) for thing in things)

    lines = [Line(f"{v} {p}", (Cell(titles[v]), Cell(PARTS[p]), *scores_of(v, p))) for v, p in parts]
    spelt = {"acc": "", "acc_bc": ", conflicting"}
    columns = [Column(f"{s}_{m}", f"{s}{spelt[m]} (%)", _SCORE) for s, m in things]
    note = "Conflicting: the samples of a split whose bias disagrees with the label, where it is not all of them."
    return Table(
        "Accuracy of the sub-models",
        (Column("method", "Method"), Column("model", "Model"), *columns),
        tuple(lines),
        (note, seeds_note(seeds)),
    )


def mined_table(results: Section, variants: Iterable[str] | None = None) -> Table | None:
    """Precision and recall of the conflicting training samples that methods found; None where none looked for any."""
    metrics = {"mined_precision": "precision (%)", "mined_recall": "recall (%)"}
    found = _summaries(row for row in results["rows"] if row["metric"] in metrics)
    chosen = [variant for variant in _shown(results, variants) if any(key[0] == variant for key in found)]
    if not chosen:
        return None
    titles, seeds = variant_titles(results["cells"]), len(seeds_of(results))
    lines = [
        Line(v, (Cell(titles[v]), *(score_cell(found.get((v, "student", "train", m)), (), seeds) for m in metrics)))
        for v in chosen
    ]
    columns = (Column("method", "Method"), *(Column(metric, title, _SCORE) for metric, title in metrics.items()))
    note = (
        "Of the training samples that a method took for conflicting, those that are; and of those that are, the ones "
        "that it found. The bias labels serve this table alone."
    )
    return Table("Conflicting samples found", columns, tuple(lines), (note, seeds_note(seeds)))


TABLES = (sub_model_table, mined_table)
"""What is shown of methods that have parts or mine samples; each is None where there is nothing to show."""


def _measured(rows: Iterable[Row], split: str, metric: str) -> bool:
    return any((row["split"], row["metric"]) == (split, metric) for row in rows)


def _shown(results: Section, variants: Iterable[str] | None) -> list[str]:
    chosen = set(variant_titles(results["cells"]) if variants is None else variants)
    return [variant for variant in variant_titles(results["cells"]) if variant in chosen]


def _summaries(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Summary]:
    """By variant, model, split and metric, of rows about whole splits."""
    whole = [row for row in rows if row["group"] is None and row.get("tier") is None]
    return {(str(s.variant), str(s.model), str(s.split), s.metric): s for s in summarise(whole)}


# Whether masks earn their place -------------------------------------------------------------------------------


class Against(NamedTuple):
    """A variant less one of its controls."""

    control: str
    comparison: Comparison


def verdicts(results: Section, variants: Iterable[str] | None = None) -> list[str]:
    """For each variant with masks that has controls, in plain words: whether the masks earn their place here.

    A control is a variant of the same method with ``masks: random`` or ``masks: none``. Masks earn their place where
    the variant is better than every control with p below 0.05, paired by seed, on the last test split.
    """
    cells: dict[str, Section] = {}
    for cell in results["cells"]:
        if cell.get("status") == "done":
            cells.setdefault(cell["variant"], cell)
    measured = {row["split"] for row in results["rows"] if row["model"] == "student" and row["split"] in SPLITS}
    split = next((split for split in reversed(SPLITS) if split in measured), "")
    metric = headline_metric(results["rows"])
    found = _summaries(row for row in results["rows"] if (row["model"], row["metric"]) == ("student", metric))
    scores = {variant: found[key].values for variant in cells if (key := (variant, "student", split, metric)) in found}
    titles = variant_titles(results["cells"])
    shown = set(shown_variants(results) if variants is None else variants)
    said = []
    for variant in [v for v in scores if v in shown and _control(cells[v]) is None]:
        rivals = [v for v in scores if cells[v]["method"] == cells[variant]["method"] and _control(cells[v])]
        compared = ((v, compare(scores[variant], scores[v], v)) for v in rivals if v in shown)
        against = [Against(titles[v], comparison) for v, comparison in compared if comparison is not None]
        missing = [words for kind, words in CONTROLS.items() if kind not in {_control(cells[v]) for v in rivals}]
        if against:
            said.append(verdict(titles[variant], split, against, missing))
    return said


def _control(cell: Section) -> str | None:
    """Which control a variant is; None: it is none."""
    masks = (cell.get("settings") or {}).get("masks")
    return masks if masks in CONTROLS else None


def verdict(title: str, split: str, against: Sequence[Against], missing: Sequence[str]) -> str:
    """The differences of ``title`` from its controls on ``split``, and what follows."""
    told = ", ".join(_difference(one) for one in against)
    absent = f" There is no control with {' and none with '.join(missing)}." if missing else ""
    return f"On {split}, {title} is {told}. {_conclusion(against)}{absent}"


def _difference(one: Against) -> str:
    found = one.comparison.difference
    where = "ahead of" if found.mean >= 0 else "behind"
    p = p_value(one.comparison.p)
    return f"{percent(replace(found, mean=abs(found.mean)))} points {where} {one.control}{f' ({p})' if p else ''}"


def _conclusion(against: Sequence[Against]) -> str:
    tested = [(one.control, one.comparison.difference.mean, one.comparison.p) for one in against]
    if any(p is None for _, _, p in tested):
        few = any(one.comparison.difference.n < 2 for one in against)
        why = "of a single seed" if few else "that do not vary over seeds"
        return f"Differences {why} cannot be tested, so this does not say whether the masks earn their place."
    better = [name for name, mean, p in tested if mean > 0 and p is not None and p < 0.05]
    worse = [name for name, mean, p in tested if mean < 0 and p is not None and p < 0.05]
    if len(better) == len(tested):
        return "So the masks earn their place here."
    if worse:
        return f"So the masks do not earn their place here: {' and '.join(worse)} did better."
    even = " and ".join(name for name, _, _ in tested if name not in better)
    return f"So it is not shown that the masks earn their place: chance may explain the difference from {even}."


# Masks by layer over training ---------------------------------------------------------------------------------


class Course(NamedTuple):
    """A share of each layer over training: at which steps, by layer, means over seeds."""

    title: str
    steps: tuple[int, ...]
    layers: Mapping[str, tuple[float, ...]]


MOST_STEPS = 12
"""Validations shown, evenly chosen of those at which anything had changed."""


def courses(seeds: Sequence[Sequence[Section]]) -> Iterator[Course]:
    """What the records of several seeds tell of layers, at the steps that all of them have."""
    traces = [_trace(records) for records in seeds]
    for title in dict.fromkeys(title for trace in traces for title in trace):
        told = [trace[title] for trace in traces if title in trace]
        steps = [step for step in told[0] if all(step in other for other in told)]
        means = {
            step: {layer: sum(one[step][layer] for one in told) / len(told) for layer in told[0][step]}
            for step in steps
        }
        changed = [s for n, s in enumerate(steps) if n == 0 or means[s] != means[steps[n - 1]]]
        kept = evenly(changed, MOST_STEPS)
        layers = {layer: tuple(means[step][layer] for step in kept) for layer in means[kept[0]]} if kept else {}
        if layers:
            yield Course(title, tuple(kept), layers)


def _trace(records: Sequence[Section]) -> dict[str, dict[int, Mapping[str, float]]]:
    """By quantity and step (counted over all stages): the share of each layer."""
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for step, record in over_all_stages(records):
        for title, layers in (record.get("layers") or {}).items():
            found.setdefault(title, {})[step] = layers
    return found


def evenly(things: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``things``, the first and the last among them."""
    if len(things) <= most:
        return list(things)
    return [things[round(n * (len(things) - 1) / (most - 1))] for n in range(most)]
