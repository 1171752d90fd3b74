"""``hansfree roar``: what it trains and writes, that it goes on where it stopped, and what it refuses."""

import shutil

import numpy as np
import pytest
import yaml

from hansfree.report.roar import build_roar_report
from hansfree.roar import Plan, gather, read_roar, run_roar
from hansfree.runs import read_results, write_json
from hansfree.suite import run_cell


def config(**changes):
    return {
        "name": "try",
        "seeds": [3],
        "reference": "plain",
        "benchmark": {"name": "digits", "limit": 200, "valid": 50, "test": 50},
        "model": {"name": "small-cnn", "widths": [3, 4], "norm": "scale"},
        "training": {"epochs": 1, "batch_size": 50, "optimiser": "adam"},
        "evaluation": {"heatmaps": 0},
        "models": {"plain": {"title": "Plain", "method": {"name": "erm"}}, "chance": {"order": "random"}},
        "removal": {"fractions": [0.5], "fill": 0.25},
        "reach": 0,
        **changes,
    }


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """Runs without worker processes, whose start takes longer than the runs."""

    def run_here(cells, jobs, device, watch):
        return {cell.label: ("done", None) if cell.folder.is_done() else train(cell, device) for cell in cells}

    def train(cell, device):
        return run_cell(cell.config.model_dump(), str(cell.folder.path), device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hansfree.suite.run_locally", run_here)
        patch.setattr("hansfree.roar.run_locally", run_here)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a finished audit; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("roar") / "out"
    run_roar(read_roar(config()), out)
    return out


def test_each_model_has_its_accuracies_and_diffroar(done):
    rows = [row for row in read_results(done / "results.json")["rows"] if row["model"] == "retrained"]
    roar = {(row["variant"], row["end"], row["fraction"]): row for row in rows if row["metric"] == "roar"}
    ends = [(name, end, 0.5) for name in ("plain", "chance") for end in ("top", "bottom")]
    assert set(roar) == {("nothing removed", None, 0.0), *ends}
    for name in ("plain", "chance"):
        scores = [row for row in rows if row["metric"] == "diffroar" and row["variant"] == name]
        assert {row["fraction"] for row in scores} == {0.5, None}
        expected = roar[name, "bottom", 0.5]["value"] - roar[name, "top", 0.5]["value"]
        assert [row["value"] for row in scores] == pytest.approx([expected, expected])
    told = roar["plain", "top", 0.5]
    assert told["measured_with"] == (
        "top 0.5 removed, gradient absolute=True, target label, channels together, fill 0.25"
    )
    assert (told["fill"], told["target"], told["seed"], told["split"]) == (0.25, "label", 3, "iid")
    assert "random order" in roar["chance", "top", 0.5]["measured_with"]


def test_a_retrained_network_saw_masked_images_in_every_split(done):
    results = read_results(done / "retrained" / "runs" / "plain, top 0.5" / "seed-3" / "results.json")
    assert results["config"]["benchmark"]["name"] == "masked-pixels"
    assert results["config"]["benchmark"]["end"] == "top"
    assert {row["split"] for row in results["rows"] if row["metric"] == "acc"} == {"valid", "iid", "train"}
    assert not list(done.glob("retrained/runs/*/*/checkpoints"))
    assert list(done.glob("models/runs/*/*/checkpoints"))


def test_a_training_accuracy_that_was_not_reached_is_marked(done, tmp_path):
    rows = read_results(done / "results.json")["rows"]
    assert all(row["reached"] for row in rows if row["model"] == "retrained")
    assert "†" not in (done / "report.html").read_text()
    plan = Plan(read_roar(config(reach=1.0)), done)
    retrainings = list(plan.retrainings())
    outcomes = {one.cell.label: ("done", None) for one in retrainings}
    outcomes["chance, top 0.5, seed 3"] = ("failed", "out of memory")
    write_json(tmp_path / "results.json", gather(plan, retrainings, outcomes))
    rows = [row for row in read_results(tmp_path / "results.json")["rows"] if row["model"] == "retrained"]
    assert len(rows) == 4 + 2  # accuracies, and DiffROAR of the model both of whose ends are there
    assert not any(row["reached"] for row in rows)
    page = build_roar_report(tmp_path).read_text()
    assert "4 of 4 retrainings did not reach a training accuracy of 100 %" in page
    assert "chance, top 0.5, seed 3: out of memory" in page
    assert "†" in (tmp_path / "table.md").read_text()


def test_it_goes_on_where_it_stopped(done, tmp_path):
    out = shutil.copytree(done, tmp_path / "out")
    whole = read_results(out / "results.json")["rows"]
    lost = [out / "retrained" / "runs" / "chance, bottom 0.5", out / "ranks" / "chance"]
    for place in lost:
        shutil.rmtree(place)
    (out / "results.json").unlink()
    kept = [path for path in out.rglob("*") if path.is_file() and path.parent.name == "seed-3"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    run_roar(read_roar(config()), out)
    assert read_results(out / "results.json")["rows"] == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert all(place.is_dir() for place in lost)


def test_other_settings_in_the_same_folder_are_refused(done, hansfree, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(config(removal={"fractions": [0.5], "fill": 0.0})))
    code, _, err = hansfree("roar", path, "--out", done)
    assert code == 2
    assert "`removal.fill` is 0.25 there and 0.0 here" in err


def test_the_page_shows_table_and_curves_and_is_the_same_again(done, hansfree):
    page = (done / "report.html").read_text()
    assert all(text in page for text in ("DiffROAR, iid", "Plain", "most relevant removed", "less that of Plain"))
    assert page.count('class="plot tall"') == 2
    code, _, err = hansfree("report", done)
    assert code == 0, err
    assert (done / "report.html").read_text() == page
    assert (done / "table.csv").read_text().startswith("variant,model,diffroar_mean")


def test_a_finished_run_is_named_by_its_folder_and_one_end_has_no_diffroar(done, hansfree, tmp_path):
    given = {"given": {"path": f"{done}/models/runs/plain/seed-{{seed}}"}}
    path = tmp_path / "given.yaml"
    removal = {"fractions": [0.5], "fill": 0.25, "ends": ["top"]}
    path.write_text(yaml.safe_dump(config(models=given, reference=None, removal=removal)))
    code, _, err = hansfree("roar", path, "--out", tmp_path / "out")
    assert code == 0, err
    for split in ("train", "valid", "iid"):
        ours, theirs = (
            np.load(out / f"{split}.npy") for out in (tmp_path / "out/ranks/given/seed-3", done / "ranks/plain/seed-3")
        )
        assert np.array_equal(ours, theirs)
    rows = read_results(tmp_path / "out" / "results.json")["rows"]
    assert {(row["metric"], row["end"]) for row in rows} == {("roar", None), ("roar", "top")}
    assert not (tmp_path / "out" / "models").exists()
    assert not (tmp_path / "out" / "table.md").exists()


def test_dry_run_says_what_would_be_trained_and_trains_nothing(hansfree, tmp_path):
    path = tmp_path / "dry.yaml"
    path.write_text(yaml.safe_dump(config()))
    code, out, err = hansfree("roar", path, "--dry-run", "--out", tmp_path / "dry")
    assert code == 0, err
    assert "5 networks" in out
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("removal.fractions=[0.5,1.5]", "fractions must be numbers between 0 and 1"),
        ("removal.ends=[top,top]", "nothing twice"),
        ("removal.fill=[0.1,0.2]", "no colour of 1 channels"),
        ("removal.target=bird", "removal.target"),
        ("removal.fractions=[0.0001]", "none or all"),
        ("removal.explainer={name: bcos}", "B-cos"),
        ("removal.explainer.name=gradent", "did you mean 'gradient'?"),
        ("removal.fracton=1", "did you mean 'fractions'?"),
        ("reference=plane", "did you mean 'plain'?"),
        ("retraining.training.lrr=1", "did you mean 'lr'?"),
        ("models.plain.method.name=emr", "did you mean 'erm'?"),
        ("models.other.path=nowhere", "nowhere holds no exported model"),
        ("models.other={order: best}", "the only one is random"),
        ("models.other={path: x, method: {name: erm}}", "only title"),
        ("models.plain.grid={training.lr: [1]}", "belongs to suites"),
        ("remove=1", "no setting 'remove'"),
        ("reach=95", "reach"),
        ("models={}", "models"),
    ],
)
def test_a_wrong_setting_is_answered_in_one_sentence(hansfree, tmp_path, setting, said):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(config()))
    code, _, err = hansfree("roar", path, setting, "--out", tmp_path / "bad")
    assert code == 2, err
    assert said in err
    assert len([line for line in err.splitlines() if line.strip()]) == 1
    assert not (tmp_path / "bad").exists()


def test_a_config_of_something_else_is_refused(hansfree, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "run"}))
    code, _, err = hansfree("roar", path)
    assert code == 2
    assert "add a section models" in err


def test_its_help_has_an_example(hansfree):
    code, out, _ = hansfree("roar", "--help")
    assert code == 0
    assert "Example: hansfree roar" in " ".join(out.split())
