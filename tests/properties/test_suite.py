"""Suites: grids, shared teachers, failures that stay their own, interruptions, and the same results on Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hansfree.errors import UserError
from hansfree.parts import named_benchmark
from hansfree.plan import curves, grids, plan, read_suite, selected
from hansfree.report import build_report
from hansfree.report.results import parts_of
from hansfree.report.tables import method_table
from hansfree.runs import SuiteFolder, read_results, write_json, write_text
from hansfree.suite import cells_of, check_variants, gather, place_teachers, run_cell, run_suite


def small(**changes):
    return {
        "name": "small",
        "seeds": [0, 1],
        "reference": "erm",
        "benchmark": {"name": "coloured-digits", "limit": 300, "valid": 60, "test": 60},
        "model": {"name": "small-cnn", "widths": [4, 8], "norm": "scale"},
        "teacher": {"train": {"benchmark.colouring": "random", "training.epochs": 1}},
        "training": {"epochs": 1, "batch_size": 32, "optimiser": "adam"},
        "variants": {
            "erm": {"method": {"name": "erm"}},
            "output": {"method": {"name": "output-distillation"}},
        },
        **changes,
    }


def without_time(value):
    if isinstance(value, dict):
        return {key: without_time(item) for key, item in value.items() if key != "time"}
    return [without_time(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run_suite(read_suite(small()), tmp_path_factory.mktemp("suite") / "small", jobs=2)


def test_every_cell_has_rows_and_the_teacher_is_trained_once(done):
    results = read_results(done.results)
    assert {(cell["variant"], cell["seed"], cell["status"]) for cell in results["cells"]} == {
        (variant, seed, "done") for variant in ("erm", "output") for seed in (0, 1)
    }
    assert done.teacher.is_done()
    teachers = [row for row in results["rows"] if row["model"] == "teacher" and row["metric"] == "acc"]
    assert len({(row["split"], row["group"]) for row in teachers}) == len(teachers)
    assert all(done.table(suffix).exists() for suffix in ("md", "csv", "tex"))
    assert done.report.exists()


def test_running_again_repeats_nothing(done):
    before = {path: path.stat().st_mtime_ns for path in done.path.glob("runs/*/*/results.json")}
    rows = read_results(done.results)["rows"]
    again = run_suite(read_suite(small()), done.path, jobs=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read_results(again.results)["rows"] == rows


def test_another_suite_in_the_same_folder_is_refused(done):
    with pytest.raises(UserError, match="another run"):
        run_suite(read_suite(small(seeds=[5])), done.path)


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells without worker processes, whose start takes longer than the cells."""

    def run_here(cells, jobs, device, watch):
        return {cell.label: run_cell(cell.config.model_dump(), str(cell.folder.path), device) for cell in cells}

    monkeypatch.setattr("hansfree.suite.run_locally", run_here)


def test_a_suite_in_parts_says_what_is_missing_and_ends_as_one_run_at_once(in_this_process, tmp_path):
    variants = {"erm": {"method": {"name": "erm"}}, "smooth": {"method": {"name": "label-smoothing"}}}
    suite = read_suite(small(seeds=[0], variants=variants, teacher=None))
    at_once = read_results(run_suite(suite, tmp_path / "whole").results)
    folder = run_suite(suite, tmp_path / "parts", only=["smooth"])
    part = read_results(folder.results)
    assert {(cell["variant"], cell["status"]) for cell in part["cells"]} == {("smooth", "done")}
    assert part["suite"]["reference"] is None, "nothing can be compared with what was not run"
    assert method_table(part).notes[0] == "Not run yet: erm."
    assert "Not run yet: erm." in folder.report.read_text()
    assert "Not run yet: erm." in folder.table("md").read_text()
    run_suite(suite, folder.path, only=["erm"])
    assert without_time(read_results(folder.results)) == without_time(at_once), "what was done stays in the tables"
    assert at_once["suite"]["not_run"] == []


def test_teachers_lie_where_the_whole_suite_has_them(in_this_process, tmp_path):
    variants = {
        "first": {"method": {"name": "output-distillation"}},
        "second": {"method": {"name": "output-distillation"}, "teacher.train.training.epochs": 2},
    }
    suite = read_suite(small(seeds=[0], variants=variants, reference=None))
    folder = SuiteFolder(tmp_path / "suite")
    placed = place_teachers(cells_of(suite, folder), folder)
    places = [Path(cell.config.teacher.path).parent.name for cell in placed]
    assert places == ["teacher", "teacher-second"]
    run_suite(suite, folder.path, only=["second"])
    assert not folder.teacher.path.exists(), "no teacher is trained before it is needed"
    assert (folder.path / "teacher-second" / "results.json").exists()


def test_one_cell_s_failure_leaves_the_others_alone(tmp_path):
    broken = {"method": {"name": "erm"}, "training.lr": 1e38, "training.optimiser": "sgd", "training.clip": None}
    suite = small(seeds=[0], variants={"broken": broken, "erm": {"method": {"name": "erm"}}})
    folder = run_suite(read_suite(suite), tmp_path / "suite", jobs=1)
    status = {cell["variant"]: cell for cell in read_results(folder.results)["cells"]}
    assert status["broken"]["status"] == "failed"
    assert "training.lr" in status["broken"]["error"]
    assert status["erm"]["status"] == "done"


def test_a_process_that_dies_takes_only_its_cell_along(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(
        "import os\nfrom hansfree.methods import ERM\n\n"
        "class Dying(ERM):\n    def observe(self, batch, terms):\n        os._exit(9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    variants = {"dies": {"method": {"name": "dying:Dying"}}, "erm": {"method": {"name": "erm"}}}
    folder = run_suite(read_suite(small(seeds=[0], variants=variants)), tmp_path / "suite", jobs=1)
    status = {cell["variant"]: cell for cell in read_results(folder.results)["cells"]}
    assert status["dies"]["status"] == "failed"
    assert "died" in status["dies"]["error"]
    assert status["erm"]["status"] == "done"


def test_teachers_that_differ_are_filed_apart(tmp_path):
    method = {"method": {"name": "output-distillation"}}
    variants = {
        "plain": method,
        "again": method,
        "dark": {**method, "teacher_input": "black"},
        "other": {**method, "teacher.path": "elsewhere"},
    }
    suite = read_suite(small(seeds=[0], reference="plain", variants=variants, teacher={"path": "somewhere"}))
    folder = SuiteFolder(tmp_path)
    cells = cells_of(suite, folder)
    for n, cell in enumerate(cells):
        told = {"variant": cell.variant, "seed": 0, "status": "done", "selection": "last"}
        rows = [
            {**row(cell.variant, "acc", value, "shift"), "model": model}
            for model, value in (("student", 0.0), ("teacher", 0.9 - 0.1 * n))
        ]
        write_json(cell.folder.results, {"schema": 1, "rows": rows, "cells": [told]})
    results = gather(suite, cells, {cell.label: ("done", None) for cell in cells}, folder)
    names = {"plain": "teacher", "again": "teacher", "dark": "teacher sees black", "other": "teacher elsewhere"}
    assert {cell["variant"]: cell["teacher"] for cell in results["cells"]} == names
    found = {r["variant"]: r["value"] for r in results["rows"] if r["model"] == "teacher"}
    assert found == pytest.approx({"teacher": 0.9, "teacher sees black": 0.7, "teacher elsewhere": 0.6})


def row(variant, metric, value, split="valid", seed=0):
    return {"variant": variant, "metric": metric, "value": value, "split": split, "group": None, "seed": seed}


def rows_of_rates(losses_and_accuracies):
    rows = [row("teacher", "acc", 0.9)]
    for lr, (loss, acc) in losses_and_accuracies.items():
        rows += [row(f"erm lr={lr}", "loss", loss), row(f"erm lr={lr}", "acc", acc)]
        rows += [row(f"erm lr={lr}", "acc", 1.0 if lr == 0.3 else 0.0, split="shift")]
    return rows


def three_rates(**changes):
    variants = {"erm": {"method": {"name": "erm"}, "grid": {"training.lr": [0.1, 0.2, 0.3]}}}
    return read_suite(small(**{"variants": variants, "reference": None, "seeds": [0]} | changes))


def chosen(suite, rows, rule="iid_val_loss"):
    (grid,) = grids(suite, plan(suite), rows, dict.fromkeys((one.name for one in plan(suite)), rule), {})
    return [(s["admitted"], s["chosen"]) for s in grid["settings"]]


def test_grids_become_variants_and_are_chosen_on_validation_data_alone():
    suite = three_rates()
    assert [one.name for one in plan(suite)] == ["erm lr=0.1", "erm lr=0.2", "erm lr=0.3"]
    assert [cell.config.training.lr for cell in cells_of(suite, SuiteFolder(Path("x")))] == [0.1, 0.2, 0.3]
    rows = rows_of_rates({0.1: (0.5, 0.79), 0.2: (0.7, 0.81), 0.3: (0.9, 0.95)})
    assert chosen(suite, rows) == [(False, False), (True, True), (True, False)]
    assert chosen(suite, rows, "iid_val") == [(False, False), (True, False), (True, True)]
    two = suite.model_copy(update={"seeds": (0, 1)})
    assert not any(admitted for admitted, _ in chosen(two, rows)), "a seed is missing"
    tuned = two.model_copy(update={"tuning_seeds": (0,)})
    later = [row("erm lr=0.1", "loss", 0.0, seed=1), row("erm lr=0.1", "acc", 1.0, seed=1)]
    assert chosen(tuned, rows + later) == chosen(suite, rows), "a later seed must not choose"
    (curve,) = curves(plan(suite))
    assert curve["series"]["erm"] == [["erm lr=0.1", 0.1], ["erm lr=0.2", 0.2], ["erm lr=0.3", 0.3]]


def test_where_no_setting_is_accurate_enough_the_most_accurate_is_shown():
    rows = rows_of_rates({0.1: (0.1, 0.3), 0.2: (0.2, 0.5), 0.3: (0.3, 0.4)})
    assert chosen(three_rates(), rows) == [(False, False), (False, True), (False, False)]


def test_without_accuracies_the_loss_alone_chooses():
    rows = [row("teacher", "acc", 0.9), *(row(f"erm lr={lr}", "loss", lr) for lr in (0.2, 0.3))]
    assert chosen(three_rates(), rows) == [(False, False), (True, True), (True, False)], "0.1 did not finish"


def test_the_rule_of_a_variant_chooses_its_setting_where_it_looks():
    rows = rows_of_rates({0.1: (0.1, 0.9), 0.2: (0.2, 0.9), 0.3: (0.3, 0.9)})
    rows += [row("erm lr=0.1", "acc", 0.2, "valid_ood"), row("erm lr=0.3", "acc", 0.4, "valid_ood")]
    assert chosen(three_rates(), rows, "ood_val") == [(True, False), (True, False), (True, True)]
    assert chosen(three_rates(), rows, "iid_val") == [(True, True), (True, False), (True, False)], "the lower loss"


def test_a_grid_of_two_keys_tries_every_combination():
    grid = {"training.lr": [0.1, 0.2], "method.epsilon": [0.0, 0.5]}
    variants = {"smooth": {"method": {"name": "label-smoothing"}, "grid": grid}}
    cells = cells_of(three_rates(variants=variants), SuiteFolder(Path("x")))
    assert [(c.variant, c.config.training.lr, c.config.method["epsilon"]) for c in cells][1:3] == [
        ("smooth lr=0.1 epsilon=0.5", 0.1, 0.5),
        ("smooth lr=0.2 epsilon=0.0", 0.2, 0.0),
    ]


def test_conditions_change_every_variant_and_have_the_last_word():
    conditions = {"short": {"title": "One epoch", "training.epochs": 1}, "long": {"training.epochs": 2}}
    variants = {
        "erm": {"method": {"name": "erm"}, "training.epochs": 9},
        "smooth": {"method": {"name": "label-smoothing"}, "conditions": ["long"]},
    }
    suite = three_rates(variants=variants, conditions=conditions, reference="erm")
    cells = cells_of(suite, SuiteFolder(Path("x")))
    assert [(c.variant, c.config.title, c.config.training.epochs) for c in cells] == [
        ("erm @ short", "erm, One epoch", 1),
        ("erm @ long", "erm, long", 2),
        ("smooth @ long", "smooth, long", 2),
    ]


def of_parts(**changes):
    variants = {
        "erm": {"method": {"name": "erm"}, "title": "ERM", "grid": {"training.lr": [0.1, 0.2]}},
        "smooth": {"method": {"name": "label-smoothing"}, "conditions": ["long"]},
    }
    conditions = {"short": {"title": "Short", "training.epochs": 1}, "long": {"training.epochs": 2}}
    return three_rates(**{"variants": variants, "conditions": conditions, "reference": "erm"} | changes)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], ["erm lr=0.1 @ short", "erm lr=0.2 @ short", "erm lr=0.1 @ long", "erm lr=0.2 @ long", "smooth @ long"]),
        (["erm"], ["erm lr=0.1 @ short", "erm lr=0.2 @ short", "erm lr=0.1 @ long", "erm lr=0.2 @ long"]),
        (["long"], ["erm lr=0.1 @ long", "erm lr=0.2 @ long", "smooth @ long"]),
        (["short", "erm"], ["erm lr=0.1 @ short", "erm lr=0.2 @ short"]),
        (["smooth", "short", "long"], ["smooth @ long"]),
    ],
)
def test_names_select_whole_grids_and_conditions(names, found):
    assert [one.name for one in selected(of_parts(), names)] == found


@pytest.mark.parametrize(
    ("names", "said"),
    [(["emr"], "did you mean 'erm'"), (["erm", "shirt"], "did you mean 'short'"), (["smooth", "short"], "none of")],
)
def test_names_that_select_nothing_are_refused_before_anything_is_made(tmp_path, names, said):
    with pytest.raises(UserError, match=said):
        run_suite(of_parts(), tmp_path / "suite", only=names)
    assert not (tmp_path / "suite").exists()


def gathered_in_part(folder, suite, ran):
    cells = cells_of(suite, folder)
    outcomes = {cell.label: ("done", None) for cell in cells if (cell.variant, cell.seed) in ran}
    for cell in cells:
        told = {"variant": cell.variant, "title": None, "seed": cell.seed, "status": "done", "selection": "last"}
        rows = [
            {**row(cell.variant, metric, cell.config.training.lr, "valid", cell.seed), "model": "student"}
            for metric in ("loss", "acc")
        ]
        results = {"schema": 1, "rows": rows, "cells": [{**told, "method": "erm", "needs": [], "steps": 1, "time": {}}]}
        write_json(cell.folder.results, results)
    return gather(suite, cells, outcomes, folder)


def test_nothing_is_chosen_from_a_grid_of_which_a_part_is_missing(tmp_path):
    suite, folder = of_parts(tuning_seeds=[0], seeds=[0, 1]), SuiteFolder(tmp_path)
    short = {("erm lr=0.1 @ short", 0), ("erm lr=0.2 @ short", 0)}
    results = gathered_in_part(folder, suite, short | {("erm lr=0.1 @ long", 0), ("erm lr=0.1 @ long", 1)})
    (grid,) = results["suite"]["grids"]
    assert [s["chosen"] for s in grid["settings"]] == [True, False]
    assert [c["reference"] for c in results["suite"]["conditions"]] == ["erm lr=0.1 @ short", None]
    tables = [method_table(part) for _, part in parts_of(results)]
    assert [table.notes[0] for table in tables] == [
        "Not run yet: ERM (in part).",
        "Not run yet: ERM (in part), smooth.",
    ]


def test_a_condition_of_which_nothing_was_run_has_an_empty_table(tmp_path):
    suite, folder = of_parts(), SuiteFolder(tmp_path)
    results = gathered_in_part(folder, suite, {("erm lr=0.1 @ short", 0), ("erm lr=0.2 @ short", 0)})
    write_json(folder.results, results)
    write_text(folder.config, "{}")
    build_report(folder.path)
    assert "Not run yet: ERM, smooth." in folder.table("md").read_text()
    assert "Not run yet: ERM, smooth." in folder.report.read_text()


def test_tuning_seeds_try_every_setting_and_the_others_the_chosen_one(tmp_path):
    variants = {
        "erm": {"method": {"name": "erm"}, "grid": {"training.lr": [0.0001, 0.02]}},
        "output": {"method": {"name": "output-distillation"}},
        "irm": {"method": {"name": "irm"}},
    }
    suite = read_suite(small(variants=variants, reference="erm", tuning_seeds=[0], within=1.0))
    folder = run_suite(suite, tmp_path / "suite", jobs=1)
    results = read_results(folder.results)
    (grid,) = results["suite"]["grids"]
    best = next(setting["variant"] for setting in grid["settings"] if setting["chosen"])
    runs = sorted((cell["variant"], cell["seed"]) for cell in results["cells"] if cell["status"] == "done")
    other = ({"erm lr=0.0001", "erm lr=0.02"} - {best}).pop()
    assert runs == sorted([(best, 0), (best, 1), (other, 0), ("output", 0), ("output", 1)])
    assert results["suite"]["reference"] == best
    assert {cell["variant"] for cell in results["cells"] if cell["status"] == "n/a"} == {"irm"}
    assert len(results["cells"]) == 7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"referense": "erm"}, "did you mean 'reference'"),
        ({"reference": "emr"}, "did you mean 'erm'"),
        ({"variants": {"a": {"method": {"name": "erm"}, "grid": {"training.lr": 3}}}, "reference": None}, "grid"),
        ({"variants": {"a": {"method": {"name": "erm"}, "training.lrr": 3}}, "reference": None}, "'lr'"),
        ({"seeds": []}, "seeds"),
        ({"variants": {"erm": {"method": {"name": "erm"}, "training.epochs": None}}}, "training needs a length"),
        ({"tuning_seeds": [7]}, "some of the seeds"),
        ({"variants": {"erm": {"method": {"name": "erm"}, "grid": {"training.lr": [0.1, 0.1]}}}}, "'erm lr=0.1'"),
        ({"variants": {"erm": {"method": {"name": "erm"}, "conditions": ["x"]}}}, "no condition"),
    ],
)
def test_mistakes_show_before_anything_is_trained(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        run_suite(read_suite(small(**changes)), tmp_path / "suite")
    assert not list(tmp_path.glob("suite/runs/*"))


def test_each_benchmark_is_read_once_for_all_that_is_checked(monkeypatch, tmp_path):
    asked = []

    def read(section):
        asked.append(section.get("colouring"))
        return named_benchmark(section)

    monkeypatch.setattr("hansfree.suite.named_benchmark", read)
    assert check_variants(cells_of(read_suite(small()), SuiteFolder(tmp_path))) == {}
    assert asked == ["random", None], "the teachers' and the students', each for all"


def test_ctrl_c_ends_the_workers_and_the_same_command_goes_on(done, tmp_path):
    config = tmp_path / "suite.yaml"
    config.write_text(yaml.safe_dump(small()))
    command = [sys.executable, "-m", "hansfree", "suite", str(config), "--jobs", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/runs/*/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    ours = json.loads((tmp_path / "out" / "results.json").read_text())
    theirs = json.loads(done.results.read_text())
    assert without_time(ours["rows"]) == without_time(theirs["rows"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_rows(done, tmp_path):
    pytest.importorskip("ray")
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    folder = run_suite(read_suite(small()), tmp_path / "ray", jobs=2, on="ray")
    assert read_results(folder.results)["rows"] == read_results(done.results)["rows"]
