"""What a results.json holds: its seeds, variants and parts, and the accuracies among its rows."""

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from hansfree.report.statistics import Estimate, Row, Summary, estimate, summarise

Section = Mapping[str, Any]
"""A part of a results.json, or all of it."""

SPLITS = ("iid", "ood", "shift")

NOT_APPLICABLE = "n/a"
"""The status of a run that needs what its benchmark does not give; its ``error`` says what."""


def parts_of(results: Section) -> list[tuple[str, Section]]:
    """The results under each condition of a suite, with the condition's title; all in one, untitled, without any."""
    suite: Section = results.get("suite") or {}
    if not suite.get("conditions"):
        return [("", results)]
    return [(condition["title"], _part(results, suite, condition)) for condition in suite["conditions"]]


def _part(results: Section, suite: Section, condition: Section) -> dict[str, Any]:
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
        "not_run": [missing for missing in suite.get("not_run") or [] if missing["condition"] == name],
    }
    rows = [row for row in results["rows"] if row["variant"] in models]
    return {**results, "cells": cells, "rows": rows, "suite": {**suite, **own}}


def shown_variants(results: Section) -> list[str]:
    """The variants that a headline compares: of a grid of settings the chosen one alone."""
    settings = [setting for grid in (results.get("suite") or {}).get("grids") or [] for setting in grid["settings"]]
    left_out = {setting["variant"] for setting in settings if not setting["chosen"]}
    return [variant for variant in variant_titles(results.get("cells") or []) if variant not in left_out]


def seeds_of(results: Section) -> list[int]:
    """The seeds that were asked for."""
    asked = (results.get("suite") or {}).get("seeds")
    return list(asked or dict.fromkeys(cell["seed"] for cell in results.get("cells") or []))


def variant_titles(cells: Iterable[Section]) -> dict[str, str]:
    """What to call each variant, in order: its title, else its own name."""
    titles: dict[str, str] = {}
    for cell in cells:
        titles.setdefault(cell["variant"], cell.get("title") or cell["variant"])
    return titles


def teacher_titles(results: Section, variants: Iterable[str], measured: Iterable[str]) -> dict[str, str]:
    """What to call each of the teachers ``measured`` that taught one of ``variants``: the shared one is the Teacher,
    others are told by their students."""
    titles = variant_titles(results.get("cells") or [])
    students: dict[str, list[str]] = {}
    for variant, teacher in teachers_of(results).items():
        if variant in set(variants):
            students.setdefault(teacher, []).append(titles[variant])
    named = [name for name in measured if name in students or not students]
    if len(named) == 1:
        return {named[0]: "Teacher"}
    told = {name: f"Teacher of {'; '.join(taught)}" for name, taught in students.items()} | {"teacher": "Teacher"}
    return {name: told.get(name, name) for name in named}


def teachers_of(results: Section) -> dict[str, str]:
    """What the rows of each variant's teacher are filed under, where a suite says it."""
    return {cell["variant"]: cell["teacher"] for cell in results.get("cells") or [] if cell.get("teacher")}


def headline_metric(rows: Iterable[Row]) -> str:
    """Accuracy; F1 where it was measured and accuracy was not, because images have labels of several classes."""
    measured = {row["metric"] for row in rows}
    return "f1" if "f1" in measured and "acc" not in measured else "acc"


class Findings:
    """The accuracies (or F1, or another ``metric``) and gaps among the rows, by variant and split (None: the gap)."""

    def __init__(self, rows: Iterable[Row], reference: str | None, metric: str | None = None) -> None:
        apart = ("tier", "group", "measured_with")
        rows = list(rows)
        metric = metric or headline_metric(rows)
        plain = [row for row in rows if all(row.get(key) is None for key in apart)]
        wanted = [row for row in plain if row["metric"] == ("gap" if row.get("split") is None else metric)]
        students = [row for row in wanted if row.get("model") == "student"]
        self._students = {(found.variant, found.split): found for found in summarise(students, reference)}
        # A single run files its teacher's rows under its own variant.
        own = {row["variant"] for row in students}
        by_teacher: dict[str, list[Row]] = {}
        for row in wanted:
            if row.get("model") == "teacher":
                by_teacher.setdefault("teacher" if row["variant"] in own else row["variant"], []).append(row)
        self._teachers = {name: scores for name, theirs in by_teacher.items() if (scores := _teacher_scores(theirs))}

    @property
    def teachers(self) -> tuple[str, ...]:
        """What the rows of the teachers that were measured are filed under."""
        return tuple(self._teachers)

    @property
    def teacher_runs(self) -> int:
        """From how many trainings of one teacher its numbers come, at most."""
        return max((found.n for scores in self._teachers.values() for found in scores.values()), default=0)

    @property
    def splits(self) -> tuple[str | None, ...]:
        """The splits that anyone was measured on, and None for the gap where both its ends were; else all of them."""
        measured = {split for _, split in self._students}.union(*self._teachers.values())
        splits = [split for split in SPLITS if split in measured] or list(SPLITS)
        return (*splits, *([None] if {"iid", "shift"} <= set(splits) else []))

    def student(self, variant: str, split: str | None) -> Summary | None:
        """The student's accuracy on ``split``; None where it was not measured."""
        return self._students.get((variant, split))

    def teacher(self, name: str, split: str | None) -> Estimate | None:
        """That teacher's accuracy on ``split``; None where it was not measured."""
        return self._teachers.get(name, {}).get(split)


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
