"""What a report says of sub-models and their controls: numbers again from the rows, and conclusions that they allow."""

import pytest
from scipy import stats

from hansfree.report.spelling import to_markdown
from hansfree.report.sub_models import courses, evenly, mined_table, sub_model_table, verdicts

TITLES = {"nd": "ND", "random": "ND, random masks", "none": "Reweighting alone", "erm": "ERM"}
MASKS = {"nd": {}, "random": {"masks": "random"}, "none": {"masks": "none"}, "erm": {}}
METHOD = {name: "erm" if name == "erm" else "neuron-differentiation" for name in TITLES}


def row(variant, seed, value, model="student", split="shift", metric="acc"):
    place = {"split": split, "tier": None, "group": None, "metric": metric, "measured_with": None}
    return {"benchmark": "digits", "variant": variant, "model": model, "seed": seed, "value": value, **place}


def results(scores, further=()):
    """Of accuracies under shift by variant, one a seed."""
    cells = [
        {
            **{"variant": name, "title": TITLES[name], "seed": seed, "status": "done", "method": METHOD[name]},
            "settings": MASKS[name],
        }
        for name, values in scores.items()
        for seed in range(len(values))
    ]
    rows = [row(name, seed, value) for name, values in scores.items() for seed, value in enumerate(values)]
    return {"rows": [*rows, *further], "cells": cells}


def test_masks_earn_their_place_where_they_beat_every_control():
    ours, random, none = [0.60, 0.62, 0.61], [0.50, 0.53, 0.51], [0.55, 0.58, 0.56]
    (said,) = verdicts(results({"nd": ours, "random": random, "none": none, "erm": [0.9, 0.9, 0.9]}))
    p = [f"p = {stats.ttest_rel(ours, other).pvalue:.2g}" for other in (random, none)]
    assert said.startswith("On shift, ND is 9.7 ± 1.4 points ahead of ND, random masks (")
    assert all(words in said for words in p)
    assert said.endswith("So the masks earn their place here.")
    assert "ERM" not in said


@pytest.mark.parametrize(
    ("random", "none", "conclusion"),
    [
        ([0.50, 0.53, 0.51], [0.70, 0.58, 0.50], "it is not shown that the masks earn their place: chance may explain"),
        ([0.50, 0.53, 0.51], [0.70, 0.725, 0.71], "do not earn their place here: Reweighting alone did better."),
        ([0.50, 0.52, 0.51], [0.55, 0.58, 0.56], "not vary over seeds cannot be tested"),
    ],
)
def test_masks_that_beat_one_control_have_not_earned_it(random, none, conclusion):
    (said,) = verdicts(results({"nd": [0.60, 0.62, 0.61], "random": random, "none": none}))
    assert conclusion in said
    assert "So the masks earn" not in said


def test_one_seed_concludes_nothing():
    (said,) = verdicts(results({"nd": [0.6], "random": [0.5], "none": [0.65]}))
    assert said == (
        "On shift, ND is 10.0 points ahead of ND, random masks, 5.0 points behind Reweighting alone. Differences of a "
        "single seed cannot be tested, so this does not say whether the masks earn their place."
    )


def test_only_common_seeds_are_compared_and_a_missing_control_is_said():
    (said,) = verdicts(results({"nd": [0.60, 0.62, 0.61], "none": [0.5]}))
    assert "10.0 points ahead of Reweighting alone. Differences of a single seed" in said
    assert said.endswith("There is no control with random masks.")
    assert verdicts(results({"nd": [0.6, 0.7], "erm": [0.5, 0.6]})) == []
    assert verdicts(results({"random": [0.6, 0.7], "none": [0.5, 0.6]})) == []


def test_parts_and_mined_samples_have_tables():
    parts = {"sub-a": (0.6, 0.62), "sub-b": (0.1, 0.12)}
    further = [row("nd", seed, value, part) for part, values in parts.items() for seed, value in enumerate(values)]
    further += [row("nd", 0, 0.2, "sub-b", "iid", "acc_bc")]
    further += [row("nd", seed, 0.9 + 0.02 * seed, split="train", metric="mined_precision") for seed in range(2)]
    found = results({"nd": [0.6, 0.62], "erm": [0.3, 0.3]}, further)
    table = sub_model_table(found)
    assert [line.variant for line in table.lines] == ["nd sub-a", "nd sub-b"]
    assert [column.key for column in table.columns[2:]] == ["iid_acc_bc", "shift_acc"]
    assert table.lines[1].cells[2].text == "20.0" and table.lines[1].cells[2].remark == "1 of 2 seeds"
    half = stats.t.interval(0.95, 1, loc=11, scale=stats.sem([10, 12]))[1] - 11
    assert table.lines[1].cells[3].numbers == pytest.approx((11.0, half, 2))
    mined = mined_table(found)
    assert [line.variant for line in mined.lines] == ["nd"]
    assert mined.lines[0].cells[1].numbers[0] == pytest.approx(91.0)
    assert mined.lines[0].cells[2].text == "not measured"
    assert "sub-model B" in to_markdown(table)
    assert sub_model_table(results({"erm": [0.3]})) is None and mined_table(results({"erm": [0.3]})) is None


def valid(stage, step, **layers):
    return {"event": "valid", "stage": stage, "step": step, **({"layers": {"kept": layers}} if layers else {})}


def test_courses_count_steps_over_stages_and_leave_out_what_stayed():
    seeds = [
        [
            *(valid("start", 0), valid("train", 10), valid("masks", 5, a=last, b=0.5)),
            *(valid("masks", 9, a=0.6, b=0.5), valid("fine-tune", 4, a=0.6, b=0.5), *extra),
        ]
        for last, extra in ((0.8, [valid("masks 2", 7, a=0.1, b=0.1)]), (0.9, []))
    ]
    (course,) = courses(seeds)
    assert course.title == "kept" and course.steps == (15, 19)
    assert course.layers == {"a": pytest.approx((0.85, 0.6)), "b": (0.5, 0.5)}
    assert list(courses([[valid("train", 3)]])) == []


def test_thinning_keeps_both_ends():
    assert evenly(range(5), 12) == [0, 1, 2, 3, 4]
    assert evenly(range(100), 12)[0] == 0 and evenly(range(100), 12)[-1] == 99
    assert len(set(evenly(range(13), 12))) == 12
