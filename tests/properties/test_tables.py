import csv
import io
import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from hansfree.report.results import seeds_of
from hansfree.report.spelling import to_csv, to_latex, to_markdown, to_rich
from hansfree.report.statistics import compare, estimate, summarise
from hansfree.report.tables import (
    Cell,
    Column,
    Line,
    Table,
    agreement_table,
    group_table,
    method_table,
    paper_form,
    side_by_side,
    similarity_table,
    trigger_table,
    word_table,
)
from hansfree.report.wording import percent, supervision

numbers = st.lists(st.floats(0, 1).map(lambda x: round(x, 4)), min_size=2, max_size=8)


def row(variant: str, seed: int | None, value: float | None, **changes: Any) -> dict[str, Any]:
    place = {"benchmark": "b", "model": "student", "split": "shift", "tier": None, "group": None}
    return {
        "variant": variant,
        "seed": seed,
        "value": value,
        **place,
        "metric": "acc",
        "measured_with": None,
        **changes,
    }


def cell(variant: str, seed: int, **changes: Any) -> dict[str, Any]:
    told = {"variant": variant, "title": None, "seed": seed, "status": "done", "method": variant, "needs": []}
    return {**told, "selection": "last", "steps": 1308, "time": {"train_seconds": 10.0}, **changes}


# Statistics


@given(numbers)
def test_the_interval_is_student_s(values: list[float]):
    found = estimate(values)
    assert found is not None and found.half is not None and found.sd is not None
    assert found.mean == pytest.approx(statistics.fmean(values))
    if found.sd > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=stats.sem(values))
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_three_seeds_by_hand():
    found = estimate([0.8, 0.9, 1.0])
    assert found is not None
    assert (found.n, found.mean, found.sd) == pytest.approx((3, 0.9, 0.1))
    assert found.half == pytest.approx(4.30265273 * 0.1 / math.sqrt(3))


def test_no_interval_from_one_number_and_nothing_from_none():
    found = estimate([0.5])
    assert found is not None and (found.n, found.sd, found.half) == (1, None, None)
    assert estimate([]) is None


@given(st.data(), numbers)
def test_the_comparison_is_the_paired_t_test(data: st.DataObject, values: list[float]):
    shifts = data.draw(st.lists(st.floats(-1, 1), min_size=len(values), max_size=len(values)))
    mine = dict(enumerate(values))
    other = {seed: value + shift for (seed, value), shift in zip(mine.items(), shifts)}
    found = compare(mine, other, "erm")
    assert found is not None
    differences = [mine[seed] - other[seed] for seed in mine]
    assert found.difference.mean == pytest.approx(statistics.fmean(differences), abs=1e-12)
    if found.p is None:
        assert statistics.stdev(differences) < 1e-10
    elif statistics.stdev(differences) > 1e-6:
        expected = stats.ttest_rel(list(mine.values()), list(other.values()))
        assert found.p == pytest.approx(float(expected.pvalue), abs=1e-9)


def test_only_common_seeds_are_compared():
    found = compare({0: 0.5, 1: 0.7, 5: 0.0}, {1: 0.1, 0: 0.2}, "erm")
    assert found is not None and found.difference.n == 2
    assert found.difference.mean == pytest.approx(0.45)
    assert compare({0: 0.5}, {1: 0.5}, "erm") is None


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_differences_that_do_not_vary_have_no_p(shift: float):
    found = compare({0: 0.3, 1: 0.6, 2: 0.9}, {0: 0.3 - shift, 1: 0.6 - shift, 2: 0.9 - shift}, "erm")
    assert found is not None and found.p is None
    assert found.difference.half == pytest.approx(0, abs=1e-12)


def test_one_common_seed_has_a_difference_and_no_p():
    found = compare({0: 0.5}, {0: 0.2}, "erm")
    assert found is not None and found.p is None and found.difference.half is None


def test_a_summary_keeps_apart_what_differs_and_leaves_out_nulls():
    rows = [row("a", seed, value) for seed, value in enumerate([0.1, None, 0.3])]
    rows += [row("a", 0, 0.9, group="y:0"), row("a", 0, 0.8, split="iid"), row("a", 0, 0.7, model="teacher")]
    rows += [row("ref", seed, 0.05) for seed in range(3)]
    summaries = summarise(rows, "ref")
    first = summaries[0]
    assert [s.estimate.n for s in summaries] == [2, 1, 1, 1, 3]
    assert first.values == {0: 0.1, 2: 0.3}
    assert first.comparison is not None and first.comparison.difference.mean == pytest.approx(0.15)
    assert all(s.comparison is None for s in summaries[1:])


# The table


def results() -> dict[str, Any]:
    rows = []
    for seed in (0, 1, 2):
        for variant, value in (("erm", 0.01), ("lrp", 0.86 + 0.01 * seed)):
            rows += [row(variant, seed, value), row(variant, seed, 0.99, split="iid")]
            rows.append(row(variant, seed, 0.99 - value, split=None, metric="gap"))
    rows += [row("teacher", 0, 0.95, model="teacher", split=split) for split in ("iid", "ood", "shift")]
    cells = [cell("erm", seed) for seed in (0, 1, 2)]
    cells += [
        cell("lrp", seed, title="LRP", needs=["teacher", "mask"], time={"train_seconds": 40.0}) for seed in (0, 1, 2)
    ]
    cells += [cell("broken", seed, status="failed", needs=["bias"], steps=None, time={}) for seed in (0, 1, 2)]
    return {"rows": rows, "cells": cells, "suite": {"reference": "erm", "seeds": [0, 1, 2]}}


def texts(table: Table, variant: str) -> dict[str, str]:
    line = next(line for line in table.lines if line.variant == variant)
    return {column.key: cell.text for column, cell in zip(table.columns, line.cells)}


def test_the_table_says_what_was_measured():
    table = method_table(results())
    assert [line.variant for line in table.lines] == ["teacher", "erm", "lrp", "broken"]
    assert texts(table, "teacher")["shift"] == "95.0"
    lrp = texts(table, "lrp")
    half = 100 * 4.30265273 * 0.01 / math.sqrt(3)
    assert lrp["shift"] == f"87.0 ± {half:.1f}" and lrp["gap"] == f"12.0 ± {half:.1f}"
    assert lrp["difference"] == f"+86.0 ± {half:.1f}"
    assert lrp["time"] == "4.0 ×" and lrp["supervision"] == "masks, a teacher"
    assert texts(table, "erm")["difference"] == "reference"
    assert lrp["ood"] == "not measured"


def test_a_cell_without_a_number_says_why():
    broken = texts(method_table(results()), "broken")
    assert {broken[key] for key in ("iid", "ood", "shift", "gap")} == {"failed"}
    assert broken["supervision"] == "bias labels"


def test_a_missing_seed_is_counted():
    given_results = results()
    given_results["rows"] = [r for r in given_results["rows"] if (r["variant"], r["seed"]) != ("lrp", 1)]
    line = method_table(given_results).lines[2]
    assert line.cells[5].remark == "2 of 3 seeds"


def test_a_teacher_shared_by_all_runs_counts_once_and_one_per_seed_as_many():
    shared, each = results(), results()
    shared["rows"] += [row("lrp", seed, 0.95, model="teacher") for seed in (1, 2)]
    each["rows"] += [row("teacher", seed, 0.9, model="teacher") for seed in (1, 2)]
    assert texts(method_table(shared), "teacher")["shift"] == "95.0"
    assert texts(method_table(each), "teacher")["shift"].startswith("91.7 ± ")
    assert "One teacher serves all runs" in " ".join(method_table(shared).notes)
    assert "One teacher serves all runs" not in " ".join(method_table(each).notes)


def with_two_teachers() -> dict[str, Any]:
    """``lrp`` and ``erm`` share the teacher; ``dark`` has one of its own, which ``pale`` had too and is not shown."""
    told = results()
    told["rows"] += [row("teacher sees black", 0, 0.4, model="teacher", split=s) for s in ("iid", "ood", "shift")]
    told["rows"] += [row(v, 0, 0.3, split=s) for v in ("dark", "pale") for s in ("iid", "ood", "shift")]
    told["cells"] = [{**c, "teacher": "teacher"} for c in told["cells"] if c["variant"] != "broken"]
    told["cells"] += [cell(v, 0, title=v.title(), teacher="teacher sees black") for v in ("dark", "pale")]
    return told


def test_every_teacher_has_its_line_and_is_told_by_its_students():
    told = with_two_teachers()
    table = method_table(told, ["erm", "lrp", "dark"])
    assert [line.cells[0].text for line in table.lines] == ["Teacher", "Teacher of Dark", "erm", "LRP", "Dark"]
    assert texts(table, "teacher")["shift"] == "95.0" and texts(table, "teacher sees black")["shift"] == "40.0"
    assert "Each teacher was trained once" in " ".join(table.notes)
    assert method_table(told).lines[1].cells[0].text == "Teacher of Dark; Pale"
    told["rows"].append(row("teacher sees black", 0, 0.2, model="teacher", metric="acc_wg"))
    groups = group_table(told)
    assert groups is not None and texts(groups, "teacher sees black")["shift_acc_wg"] == "20.0"
    assert texts(groups, "lrp")["shift_acc_wg"] == "not measured"


def test_only_teachers_of_the_shown_students_are_shown():
    for shown, accuracy in ((["lrp"], "95.0"), (["dark"], "40.0")):
        table = method_table(with_two_teachers(), shown)
        assert [line.cells[0].text for line in table.lines if line.is_teacher] == ["Teacher"]
        assert next(
            cell.text for column, cell in zip(table.columns, table.lines[0].cells) if column.key == "shift"
        ) == (accuracy)
        assert "One teacher serves all runs" in " ".join(table.notes)


REASON = "needs masks; coloured-digits gives none"


def with_not_applicable() -> dict[str, Any]:
    told = results()
    told["cells"] += [
        cell("rrr", seed, status="n/a", error=REASON, needs=["mask"], steps=None, time={}) for seed in (0, 1, 2)
    ]
    return told


def test_a_method_that_cannot_be_applied_is_in_every_spelling_with_its_reason():
    table = method_table(with_not_applicable())
    shown = texts(table, "rrr")
    assert {shown[key] for key in ("iid", "ood", "shift", "gap", "difference")} == {"N/A"}
    assert "failed" in texts(table, "broken")["shift"] and "N/A" not in texts(table, "broken").values()
    for made in (table, paper_form(table)):
        for spell in (to_markdown, to_latex):
            line = next(line for line in spell(made).splitlines() if "rrr (" in line)
            assert f"rrr ({REASON})" in line and line.count("N/A") == 5 and "masks" in line
    (line,) = [line for line in csv.DictReader(io.StringIO(to_csv(table))) if line["variant"] == "rrr"]
    assert line["reason"] == REASON and line["shift_percent"] == "" and line["supervision"] == "masks"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_rich(table))
    text = console.export_text()
    assert "N/A" in text and all(word in text for word in REASON.split())


# Groups


def with_groups() -> dict[str, Any]:
    told = results()
    for seed in (0, 1, 2):
        for variant, worst, mean, weighted in (("erm", 0.0, 0.3, 0.9), ("lrp", 0.5 + 0.1 * seed, 0.6, 0.7)):
            for split in ("iid", "shift"):
                told["rows"].append(row(variant, seed, worst, split=split, metric="acc_wg"))
                told["rows"].append(row(variant, seed, mean, split=split, metric="acc_group_mean"))
            told["rows"].append(row(variant, seed, weighted, split="iid", metric="acc_avg"))
            told["rows"].append(row(variant, seed, worst, metric="acc", group="y:0,a:1"))
    return told


def test_the_table_over_groups_names_its_means_and_compares_the_worst():
    table = group_table(with_groups())
    assert table is not None
    assert [column.title for column in table.columns[3:]] == [
        "iid, worst group (%)",
        "iid, per group (%)",
        "iid, train-weighted (%)",
        "shift, worst group (%)",
        "shift, per group (%)",
        "shift, worst group, against erm (points)",
    ]
    lrp = texts(table, "lrp")
    half = 100 * 4.30265273 * 0.1 / math.sqrt(3)
    assert lrp["iid_acc_wg"] == lrp["shift_acc_wg"] == f"60.0 ± {half:.1f}"
    assert lrp["iid_acc_avg"] == "70.0 ± 0.0" and lrp["shift_acc_group_mean"] == "60.0 ± 0.0"
    assert lrp["group_difference"] == f"+60.0 ± {half:.1f}" and texts(table, "erm")["group_difference"] == "reference"
    assert texts(table, "broken")["iid_acc_wg"] == "failed"
    assert all(words in " ".join(table.notes) for words in ("Worst:", "Per group:", "Train-weighted:", "paired"))


def test_without_groups_there_is_no_table_over_them():
    assert group_table(results()) is None
    assert side_by_side(method_table(results()), None) == method_table(results())


def test_numbers_over_groups_stand_beside_the_others():
    told = with_groups()
    told["rows"].append(row("teacher", 0, 0.8, model="teacher", metric="acc_wg"))
    table = side_by_side(method_table(told), group_table(told))
    parsed = {line["variant"]: line for line in csv.DictReader(io.StringIO(to_csv(table)))}
    assert float(parsed["lrp"]["shift_percent"]) == pytest.approx(87.0)
    assert float(parsed["lrp"]["iid_acc_avg_percent"]) == pytest.approx(70.0)
    assert float(parsed["teacher"]["shift_acc_wg_percent"]) == pytest.approx(80.0)
    assert parsed["teacher"]["iid_acc_wg_percent"] == parsed["broken"]["iid_acc_wg_percent"] == ""


def test_agreement_has_a_table_where_there_is_a_teacher_to_agree_with():
    told = results()
    assert agreement_table(told) is None
    for seed in (0, 1, 2):
        told["rows"] += [
            row("lrp", seed, 0.8 + 0.1 * (seed - 1), split=s, metric="agreement") for s in ("iid", "shift")
        ]
        told["rows"].append(row("lrp", seed, 0.1, metric="agreement", group="y:0,a:1"))
        told["rows"].append(row("erm", seed, 0.7, metric="agreement"))
    table = agreement_table(told)
    assert table is not None and table.title == "Agreement with the teacher"
    lrp, half = texts(table, "lrp"), 100 * 4.30265273 * 0.1 / math.sqrt(3)
    assert lrp["iid_agreement"] == lrp["shift_agreement"] == f"80.0 ± {half:.1f}"
    assert lrp["agreement_difference"] == f"+10.0 ± {half:.1f}"
    assert texts(table, "erm")["iid_agreement"] == "not measured"
    assert "teacher" not in [line.variant for line in table.lines]


# The paper's form


def test_entropies_are_told_in_bits():
    values = {"erm": [0.1, 0.14], "kd": [0.2504, 0.31]}
    found = results()
    found["rows"] += [
        row(variant, seed, value, split="iid", metric="entropy_category")
        for variant, own in values.items()
        for seed, value in enumerate(own)
    ]
    found["cells"] = [cell(variant, seed) for variant in values for seed in (0, 1)]
    found["suite"] = {"reference": "erm", "seeds": [0, 1]}
    table = similarity_table(found)
    assert table is not None
    told = texts(table, "kd")
    assert told["iid_entropy_category"].startswith("0.280 ± ")
    assert told["similarity_difference"].startswith("+0.160 ± ")
    assert {"iid, within the category (bits)", "iid, within the category, against erm (bits)"} <= {
        column.title for column in table.columns
    }
    assert similarity_table(results()) is None


def test_words_and_planted_words_have_tables_of_the_first_explainer():
    found = results()
    for explainer, value in (("integrated-gradients", 0.8), ("gradient", 0.1)):
        for metric in ("word_auroc", "word_auroc_all", "trigger_share"):
            own = row("erm", 0, value, split="shift", metric=metric)
            found["rows"].append({**own, "measured_with": explainer})
    words, planted = word_table(found), trigger_table(found)
    assert words is not None and planted is not None
    assert [column.key for column in words.columns if column.parts] == ["shift_word_auroc", "words_difference"]
    assert texts(words, "erm")["shift_word_auroc"].startswith("80.0")
    assert texts(planted, "erm")["shift_trigger_share"].startswith("80.0")
    assert "integrated-gradients" in words.notes[0]
    assert word_table(results()) is None and trigger_table(results()) is None


def test_the_paper_s_form_has_its_columns_and_the_teacher_last():
    latex = to_latex(paper_form(method_table(results())))
    body = [line.strip() for line in latex[latex.index("\\toprule") :].splitlines()]
    assert body[1] == "Method & Supervision & Chosen by & IID & OOD & Shift & Gap & Difference \\\\"
    assert [line.split(" & ")[0] for line in body[3:-2]] == ["erm", "LRP", "broken", "Teacher"]
    assert all(line.count(" & ") == 7 for line in body[3:-2])
    assert "Difference: shift against erm (points)." in latex and "paired by seed" in latex


@pytest.mark.parametrize("form", [method_table, group_table, lambda told: paper_form(method_table(told))])
def test_every_table_tells_rule_supervision_and_paired_difference(form):
    table = form(with_groups())
    assert [column.key for column in table.columns[:3]] == ["method", "supervision", "selection"]
    assert any(column.key.endswith("difference") for column in table.columns)
    assert any("paired by seed" in note for note in table.notes)
    assert texts(table, "lrp")["selection"] == "the last step"


def test_variants_can_be_chosen():
    assert [line.variant for line in method_table(results(), ["lrp"]).lines] == ["teacher", "lrp"]


def test_seeds_are_those_asked_for():
    assert seeds_of(results()) == [0, 1, 2]
    assert seeds_of({"cells": [cell("a", 4)]}) == [4]


def test_numbers_are_spelt_plainly():
    assert percent(estimate([-0.0001]), signed=True) == "0.0"
    assert percent(estimate([-0.05])) == "−5.0"
    assert percent(estimate([0.05]), signed=True) == "+5.0"
    assert percent(None) == "not measured"
    assert supervision([]) == "labels only" and supervision(["new-kind"]) == "new-kind"


# Spellings

AWKWARD = r"50% & $x$ #1_a {b} ~^\ <i>|[red]*`" + "\nnext ± −"


def awkward() -> Table:
    columns = (Column("method", AWKWARD, short="method"), Column("shift", "shift (%)", ("percent", "seeds"), "shift %"))
    line = Line(AWKWARD, (Cell(AWKWARD), Cell("1.0 ± 0.1", AWKWARD, (1.0, None))))
    return Table("title", columns, (line,), (AWKWARD,))


def test_latex_escapes_every_special_character():
    latex = to_latex(awkward())
    body = latex[latex.index("\\midrule") : latex.index("\\bottomrule")]
    assert (
        r"50\% \& \$x\$ \#1\_a \{b\} \textasciitilde{}\textasciicircum{}\textbackslash{} \textless{}i\textgreater{}"
        in body
    )
    assert r"next $\pm$ $-$" in body
    assert body.count("\n") == 2 and body.rstrip().endswith("\\\\")
    assert all(line.startswith("%") for line in latex[: latex.index("\\begin")].splitlines())


def test_markdown_keeps_its_columns_and_no_markup():
    lines = to_markdown(awkward()).splitlines()
    assert "\\|" in lines[2] and "&lt;i&gt;" in lines[2] and "<i>" not in lines[2]
    bars = [line.replace("\\|", "").count("|") for line in lines[:3]]
    assert bars == [3, 3, 3]


def test_csv_gives_the_numbers_back():
    header, line = csv.reader(io.StringIO(to_csv(awkward())))
    assert header == ["variant", "method", "shift_percent", "shift_seeds", "reason"]
    assert line == [AWKWARD, AWKWARD, "1.0", "", ""]
    table = method_table(results())
    parsed = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert float(parsed[2]["shift_percent"]) == pytest.approx(87.0)
    assert parsed[2]["iid_seeds"] == "3" and parsed[3]["iid_percent"] == ""
    assert parsed[2]["reason"] == "" and parsed[3]["reason"] == "failed"


def test_the_terminal_shows_brackets_as_they_are_and_fits_80_columns():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_rich(awkward()))
    assert "[red]" in console.export_text()
    console.print(to_rich(method_table(results())))
    text = console.export_text()
    assert "…" not in text and "±2.5" in text and "87.0" in text and "4.0 ×" in text


def test_only_splits_that_were_measured_have_columns():
    def row(variant, split, value):
        return {"variant": variant, "model": "student", "seed": 0, "split": split, "metric": "acc", "value": value}

    cells = [
        {"variant": name, "title": None, "seed": 0, "status": "done", "steps": 1, "time": {}} for name in ("a", "b")
    ]
    results = {"rows": [row("a", "iid", 0.5), row("b", "iid", 0.75)], "cells": cells, "suite": {"reference": "a"}}
    table = method_table(results)
    assert [column.key for column in table.columns[3:]] == ["iid", "difference", "steps", "time"]
    assert table.columns[4].title == "Iid against a (points)"
    assert [line.cells[4].text for line in table.lines] == ["reference", "+25.0"]


def test_a_column_names_its_measure_unless_that_is_accuracy():
    cells = [cell("a", 0), cell("b", 0)]
    for metric, iid, against in (
        ("acc", "iid (%)", "Iid against b (points)"),
        ("f1", "iid, F1 (%)", "Iid, F1 against b (points)"),
    ):
        rows = [row(variant, 0, 0.5, metric=metric, split="iid") for variant in ("a", "b")]
        table = method_table({"suite": {"reference": "b"}, "cells": cells, "rows": rows, "seeds": [0]})
        assert [c.title for c in table.columns if c.key in ("iid", "difference")] == [iid, against]
