"""Seeds as repeats: splits that follow them, teachers asked once for each, students as they are before training."""

import pytest
import torch

from hansfree.config import merge, parse
from hansfree.errors import RunError, UserError
from hansfree.experiment import reevaluate, run
from hansfree.models import load_model
from hansfree.parts import RunConfig, make_benchmark, teacher_config
from hansfree.plan import read_suite
from hansfree.runs import SuiteFolder, read_results
from hansfree.suite import cells_of, run_cell, run_suite

SMALL = {"size": 16, "train": 16, "valid": 8, "test": 16}
CONFIG = {
    "benchmark": {"name": "accessories", "split_seed": "seed", **SMALL},
    "model": {"name": "small-cnn", "widths": [4, 8], "norm": "none"},
    "teacher": {"seed": "each", "train": {"benchmark.worn": "none", "training.steps": 1}},
    "training": {"steps": 1, "batch_size": 8},
    "evaluation": {"heatmaps": 0},
}
LRP = {"name": "lrp", "epsilon": [0.01, 0.1]}
OUTPUT = {"method": {"name": "output-distillation"}}


@pytest.fixture(autouse=True)
def _installed(photographs, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(photographs))


@pytest.fixture
def _here(monkeypatch):
    """Cells in this process, which needs no start."""
    monkeypatch.setattr(
        "hansfree.suite.run_locally",
        lambda cells, jobs, device, watch: {
            c.label: run_cell(c.config.model_dump(), str(c.folder.path), device) for c in cells
        },
    )


def config(**changes):
    return parse(RunConfig, merge({**CONFIG, **OUTPUT}, changes))


# Splits that follow the seed


@pytest.mark.parametrize("seed", [0, 5])
def test_the_split_follows_the_seed_of_the_run_and_of_its_teacher(seed):
    asked = config(seed=seed)
    assert asked.benchmark["split_seed"] == seed and teacher_config(asked).benchmark["split_seed"] == seed
    animals = [make_benchmark(one).record()["animals"] for one in (asked, teacher_config(asked))]
    assert animals[0] == animals[1]


def test_in_a_suite_every_seed_has_its_split_and_variants_share_it(tmp_path):
    suite = read_suite({"name": "s", "seeds": [0, 1, 2], **CONFIG, "variants": {"a": OUTPUT, "b": OUTPUT}})
    cells = cells_of(suite, SuiteFolder(tmp_path))
    assert [(c.variant, c.seed, c.config.benchmark["split_seed"]) for c in cells] == [
        (name, seed, seed) for seed in (0, 1, 2) for name in ("a", "b")
    ]
    assert {c.teacher.benchmark["split_seed"] for c in cells if c.seed == 2} == {2}


def test_one_teacher_for_all_splits_is_refused():
    with pytest.raises(UserError, match=r"set teacher\.seed: each"):
        config(**{"teacher.seed": 0})
    assert config(teacher=None, method={"name": "erm"}, seed=3).benchmark["split_seed"] == 3


# Before training


def test_without_a_step_the_student_is_what_it_was(tmp_path):
    copied = {"name": "output-distillation", "start": "teacher"}
    changes = {"method": copied, "training.steps": 0, "teacher.train": {"benchmark.worn": "none", "training.steps": 3}}
    folder = run(config(**changes), tmp_path / "run")
    student = load_model(str(folder.exported), num_classes=2).state_dict()
    teacher = load_model(str(folder.path / "teacher/exported"), num_classes=2).state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in student.items())
    results = read_results(folder.results)
    assert results["cells"][0]["steps"] == 0
    rows = {(r["model"], r["split"]): r["value"] for r in results["rows"] if r["metric"] == "acc" and not r["tier"]}
    assert rows["student", "shift"] == rows["teacher", "shift"]
    again = reevaluate(folder)["rows"]
    assert [row["value"] for row in again] == [row["value"] for row in results["rows"]]


def test_no_fewer_steps_than_none():
    with pytest.raises(UserError, match=r"training\.steps cannot be -1"):
        config(**{"training.steps": -1})


# Teachers that are asked once


def frozen_suite(**changes):
    freeze = {"explainers": [LRP], "epsilons": [0.01, 0.1], "classes": "all"}
    variants = {
        "erm": {"method": {"name": "erm"}},
        "lrp": {"method": {"name": "explanation-distillation"}, "explainer": LRP},
        "live": {"method": {"name": "feature-distillation"}, "teacher.freeze": None},
    }
    section = {"name": "s", "seeds": [0, 1], **CONFIG, "variants": variants}
    return read_suite(merge(section, {"teacher.freeze": freeze, **changes}))


def test_a_suite_asks_each_teacher_once_and_its_students_read_the_answers(tmp_path, monkeypatch, _here):
    folder = run_suite(frozen_suite(), tmp_path / "out", jobs=1)
    results = read_results(folder.results)
    assert {(c["variant"], c["seed"], c["status"]) for c in results["cells"]} == {
        (name, seed, "done") for name in ("erm", "lrp", "live") for seed in (0, 1)
    }, [c["error"] for c in results["cells"]]
    for seed in (0, 1):
        place = folder.path / f"teacher/seed-{seed}/store"
        assert (place / "meta.json").is_file()
        used = {name: read_results(folder.run(name, seed).results)["config"]["teacher"] for name in ("lrp", "live")}
        assert used["lrp"]["store"] == str(place) and used["live"]["store"] is None
    taught = {r["seed"] for r in results["rows"] if r["model"] == "teacher" and r["split"] == "shift"}
    assert taught == {0, 1}

    def asked(*args, **kwargs):
        raise AssertionError("a finished store is not made again")

    monkeypatch.setattr("hansfree.freezing.answer_chunk", asked)
    run_suite(frozen_suite(), tmp_path / "out", jobs=1)


def trained_together(tmp_path, monkeypatch, outcome=None):
    """The labels of what is handed to several processes when two teachers are to be trained."""
    handed = []

    def here(cells, jobs, device, watch):
        handed.append([cell.label for cell in cells])
        return {c.label: outcome or run_cell(c.config.model_dump(), str(c.folder.path), device) for c in cells}

    monkeypatch.setattr("hansfree.suite.run_locally", here)
    suite = read_suite({"name": "s", "seeds": [0, 1], **CONFIG, "variants": {"output": OUTPUT}})
    return handed, lambda jobs: run_suite(suite, tmp_path / "out", jobs=jobs)


def test_several_teachers_are_shared_out_between_processes(tmp_path, monkeypatch):
    handed, start = trained_together(tmp_path, monkeypatch)
    folder = start(2)
    assert handed[0] == ["teacher, seed 0", "teacher, seed 1"] and handed[1:] == [handed[1]]
    assert {cell["status"] for cell in read_results(folder.results)["cells"]} == {"done"}
    start(2)
    assert handed[2] == handed[1], "teachers that are done are not trained again"


def test_a_teacher_that_fails_ends_the_suite_in_words(tmp_path, monkeypatch):
    _, start = trained_together(tmp_path, monkeypatch, outcome=("failed", "It fell asleep."))
    with pytest.raises(RunError, match="teacher, seed 0: It fell asleep"):
        start(2)


def test_a_wrong_explainer_of_the_store_is_the_cell_s_failure_in_words(tmp_path, _here):
    other = {"explainers": [{"name": "grad-cam"}], "classes": "all"}
    results = read_results(run_suite(frozen_suite(**{"teacher.freeze": other}), tmp_path / "out", jobs=1).results)
    told = {cell["error"] for cell in results["cells"] if cell["variant"] == "lrp"}
    assert all("holds no maps of lrp" in error for error in told)


def test_a_single_run_points_to_the_command_for_stores(tmp_path):
    with pytest.raises(UserError, match=r"teacher\.freeze is for suites"):
        run(config(**{"teacher.freeze": {}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
