"""Curves of how alike the explanations of shifted images are to those of the images themselves."""

import statistics
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from hansfree.report.results import Section, teacher_titles, variant_titles
from hansfree.report.statistics import Estimate, Row, estimate

_GROUP = "shift:"


@dataclass(frozen=True)
class ShiftLine:
    """One model's curve: similarity at each shift, over seeds; and its period in pixels, the median over seeds."""

    name: str
    points: tuple[tuple[float, Estimate], ...]
    period: int | None


def shift_series(results: Section, variants: Iterable[str]) -> dict[tuple[str, str], list[ShiftLine]]:
    """The curves of teachers and of ``variants``, by split and explainer; empty where none were measured."""
    rows = [row for row in results["rows"] if row.get("value") is not None and row.get("measured_with") is not None]
    curves = [row for row in rows if row["metric"] == "shift_similarity" and str(row["group"]).startswith(_GROUP)]
    if not curves:
        return {}
    chosen = list(variants)
    cells = results.get("cells") or []
    students = {name: title for name, title in variant_titles(cells).items() if name in chosen}
    measured = dict.fromkeys(row["variant"] for row in curves if row["model"] == "teacher")
    named = [*teacher_titles(results, chosen, measured).items(), *students.items()]
    if set(measured) <= set(students):  # a single run files its teacher's rows under its own variant
        named = [*((name, "Teacher") for name in measured), *students.items()]
    teachers = len(named) - len(students)
    found: dict[tuple[str, str], list[ShiftLine]] = {}
    for place in dict.fromkeys((row["split"], row["measured_with"]) for row in curves):
        here = [row for row in rows if (row["split"], row["measured_with"]) == place]
        for number, (variant, title) in enumerate(named):
            model = "teacher" if number < teachers else "student"
            own = [row for row in here if row["variant"] == variant and row["model"] == model]
            if points := _points(own):
                found.setdefault(place, []).append(ShiftLine(title, points, _period(own)))
    return found


def _points(rows: Iterable[Row]) -> tuple[tuple[float, Estimate], ...]:
    by_shift: dict[float, dict[Hashable, float]] = {}
    for row in rows:
        if row["metric"] == "shift_similarity":
            by_shift.setdefault(float(row["group"].removeprefix(_GROUP)), {})[row.get("seed")] = row["value"]
    means = ((shift, estimate(values.values())) for shift, values in sorted(by_shift.items()))
    return tuple((shift, mean) for shift, mean in means if mean is not None)


def _period(rows: Iterable[Row]) -> int | None:
    periods = [row["value"] for row in rows if row["metric"] == "shift_period"]
    return round(statistics.median_low(periods)) if periods else None
