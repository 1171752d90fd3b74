"""Lines of radar charts: maps of each model against a truth of three bands."""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace

from hansfree.report.charts import RadarLine
from hansfree.report.results import Section, teacher_titles, variant_titles
from hansfree.report.statistics import Estimate, Row, estimate

_AREAS = {"AUROC": "auroc", "AUPRC": "auprc"}
_AT_THRESHOLDS = {"precision": "precision", "recall": "recall", "F1": "f1"}
_BEST = {f"{name}*": f"{metric}_best" for name, metric in _AT_THRESHOLDS.items()}
_BINARY = _AREAS | _AT_THRESHOLDS | _BEST

CHARTS: dict[str, dict[str, str]] = {
    "Five bands": {
        "pixels": "five_band_accuracy", "recall": "five_band_recall", "precision": "five_band_precision",
        "1 − FPR": "five_band_fpr",
    },
    "The object": {name: f"object_{metric}" for name, metric in _BINARY.items()},
    "The feature": {name: f"feature_{metric}" for name, metric in _BINARY.items()},
}  # fmt: skip
"""What each chart shows: the measure of each axis."""

Found = tuple[str, list[str], list[RadarLine]]


def band_lines(results: Section, variants: Iterable[str]) -> Iterator[Found]:
    """Title, axes and lines of each chart, of teachers and ``variants``; nothing where nothing was measured."""
    metrics = {metric for axes in CHARTS.values() for metric in axes.values()}
    rows = [row for row in results["rows"] if row["metric"] in metrics and row["value"] is not None]
    models = _named(results, rows, list(variants))
    for split, explainer in dict.fromkeys((row["split"], row["measured_with"]) for row in rows):
        here = [row for row in rows if (row["split"], row["measured_with"]) == (split, explainer)]
        for title, axes in CHARTS.items():
            lines = [
                RadarLine(name, tuple(_value(here, variant, model, metric) for metric in axes.values()))
                for variant, model, name in models
            ]
            measured = [line for line in lines if any(value is not None for value in line.values)]
            if measured:
                yield f"{title}: {split}, {explainer}", list(axes), measured


def _named(results: Section, rows: list[Row], variants: list[str]) -> list[tuple[str, str, str]]:
    """(variant, model, what it is called), teachers first."""
    titles = variant_titles(results.get("cells") or [])
    measured = dict.fromkeys(row["variant"] for row in rows if row["model"] == "teacher")
    if set(measured) <= set(titles):  # a single run files its teacher's rows under its own variant
        teachers = dict.fromkeys(measured, "Teacher")
    else:
        teachers = teacher_titles(results, variants, measured)
    students = [(variant, "student", titles[variant]) for variant in variants]
    return [*((variant, "teacher", name) for variant, name in teachers.items()), *students]


def _value(rows: list[Row], variant: str, model: str, metric: str) -> Estimate | None:
    """The mean over seeds; of the false positive rate, what it leaves of 1."""
    by_seed: dict[Hashable, float] = {
        row.get("seed"): row["value"]
        for row in rows
        if (row["variant"], row["model"], row["metric"]) == (variant, model, metric)
    }
    found = estimate(by_seed.values())
    if found is None or metric != "five_band_fpr":
        return found
    return replace(found, mean=1 - found.mean)
