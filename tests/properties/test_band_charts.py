"""Radar charts: what they draw, and when reports have them."""

import re

import pytest

from hansfree.report.bands import CHARTS, band_lines
from hansfree.report.charts import RADAR, RadarLine, radar
from hansfree.report.statistics import Estimate
from hansfree.report.tables import band_table


def at(*means):
    return tuple(None if mean is None else Estimate(1, mean, None, None) for mean in means)


def test_a_value_lies_on_its_axis_at_its_height():
    drawn = str(radar(["a", "b", "c", "d"], [RadarLine("one", at(1, 0.5, 0.25, 2))]))
    (outline,) = re.findall(r'points="([^"]+)" class="c0 link"', drawn)
    corners = [tuple(map(float, corner.split(","))) for corner in outline.split()]
    assert corners == [(0, -RADAR), (RADAR / 2, 0), (0, RADAR / 4), (-RADAR, 0)]  # beyond the end, at the end
    assert 'aria-label="one: a 1.00, b 0.50, c 0.25, d 2.00"' in drawn
    assert drawn == str(radar(["a", "b", "c", "d"], [RadarLine("one", at(1, 0.5, 0.25, 2))]))


def test_what_was_not_measured_has_no_corner_and_no_outline():
    drawn = str(radar(["a", "b", "<c>"], [RadarLine("x", at(1, None, 0.5)), RadarLine("y", at(0.1, 0.2, 0.3))]))
    assert drawn.count("translate(") == 5 and "c0 link" not in drawn and "c1 link" in drawn
    assert "b not measured" in drawn and "&lt;c&gt;" in drawn


def test_too_few_axes_and_unequal_lines_are_refused():
    for axes, values in ((["a", "b"], at(1, 1)), (["a", "b", "c"], at(1, 1))):
        with pytest.raises(ValueError, match="three axes"):
            radar(axes, [RadarLine("one", values)])


def results(metrics):
    rows = [
        {
            "benchmark": "cells", "variant": variant, "model": model, "seed": seed, "split": "iid", "tier": None,
            "group": None, "metric": metric, "measured_with": "gradient", "value": value + seed / 100,
        }
        for variant, model, value in (("teacher", "teacher", 0.8), ("kd", "student", 0.4), ("erm", "student", 0.3))
        for metric in metrics
        for seed in (0, 1)
    ]  # fmt: skip
    cells = [
        {"variant": name, "title": name.upper(), "seed": seed, "status": "done", "needs": [], "selection": "last"}
        for name in ("erm", "kd")
        for seed in (0, 1)
    ]
    return {"rows": rows, "cells": cells, "suite": {"reference": "erm", "seeds": [0, 1]}}


def test_teacher_and_students_have_a_line_in_each_chart():
    every = [metric for axes in CHARTS.values() for metric in axes.values()]
    found = list(band_lines(results(every), ["erm", "kd"]))
    assert [title for title, _, _ in found] == [f"{title}: iid, gradient" for title in CHARTS]
    for _, axes, lines in found:
        assert [line.name for line in lines] == ["Teacher", "ERM", "KD"]
        for line, value in zip(lines, (0.805, 0.305, 0.405)):
            expected = [1 - value if axis == "1 − FPR" else value for axis in axes]
            assert [point.mean for point in line.values] == pytest.approx(expected)
    table = band_table(results(every), ["erm", "kd"])
    assert table is not None and table.columns[3].title == "iid, feature AUPRC (%)"


def test_without_such_rows_there_is_nothing():
    assert list(band_lines(results(["acc", "epg"]), ["erm", "kd"])) == []
    assert band_table(results(["acc", "epg"]), ["erm", "kd"]) is None
