"""How training went: the loss terms and the validation accuracy of every seed, against steps over all stages."""

from collections.abc import Iterable, Iterator
from typing import Any

from markupsafe import Markup

from hansfree.report import charts
from hansfree.report.results import Section


def panels(seeds: Iterable[list[dict[str, Any]]]) -> tuple[Markup, ...]:
    """A picture for each loss term and one of the accuracy, from the records of each seed."""
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
    drawn = [
        charts.Panel(f"Loss term: {term}", tuple(lines.get(term, ())), tuple(dots.get(term, ())))
        for term in dict.fromkeys([*lines, *dots])
        if term
    ]
    if "" in dots:
        drawn.append(charts.Panel("Validation accuracy", (), tuple(dots[""]), percent=True))
    return tuple(map(charts.panel, drawn))


def _traces(
    records: Iterable[Section],
) -> tuple[dict[str, charts.Points], dict[str, charts.Points], charts.Points]:
    """Loss terms in training, the same in validation, and validation accuracy, against steps over all stages."""
    trained: dict[str, list[tuple[float, float]]] = {}
    validated: dict[str, list[tuple[float, float]]] = {}
    accuracy: list[tuple[float, float]] = []
    for step, record in over_all_stages(records):
        into = trained if record["event"] == "step" else validated
        for term, value in (record.get("terms") or {}).items():
            if value is not None:
                into.setdefault(term, []).append((step, value))
        if record["event"] == "valid" and (record.get("metrics") or {}).get("acc") is not None:
            accuracy.append((step, record["metrics"]["acc"]))
    return dict(trained), dict(validated), accuracy


def over_all_stages(records: Iterable[Section]) -> Iterator[tuple[int, Section]]:
    """The steps and validations among ``records``, each with its step counted over all stages."""
    stage, before, latest = None, 0, 0
    for record in records:
        if record.get("event") not in ("step", "valid"):
            continue
        if record.get("stage") != stage:
            stage, before = record.get("stage"), latest
        latest = max(latest, before + record["step"])
        yield before + record["step"], record
