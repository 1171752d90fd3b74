"""Every verb does what its help says."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from hansfree.benchmarks import BENCHMARKS
from hansfree.explainers import EXPLAINERS
from hansfree.methods import METHODS
from hansfree.metrics import MEASURES
from hansfree.models import MODELS, load_model

VERBS = ("run", "suite", "evaluate", "explain", "report", "list", "doctor", "export")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(hansfree, verb):
    code, out, _ = hansfree(verb, "--help")
    assert code == 0
    assert f"Example: hansfree {verb}" in " ".join(out.split())


def test_run_writes_a_whole_folder_and_says_where(finished, hansfree):
    assert {"config.yaml", "environment.json", "metrics.jsonl", "results.json", "report.html"} <= {
        path.name for path in finished.iterdir()
    }
    assert {path.name for path in (finished / "exported").iterdir()} == {"config.json", "model.safetensors"}
    code, out, _ = hansfree("report", finished)
    assert code == 0
    assert str(finished / "report.html") in out.replace("\n", "")


def test_dry_run_trains_nothing(hansfree, config, tmp_path):
    code, out, _ = hansfree("run", config(), "--dry-run", "--out", tmp_path / "dry")
    assert code == 0
    assert "parameters" in out
    assert not (tmp_path / "dry").exists()


def test_overrides_reach_the_run(hansfree, config, tmp_path):
    code, _, _ = hansfree("run", config(), "training.epochs=1", "seed=3", "--out", tmp_path / "run")
    assert code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"]["training"]["epochs"] == 1
    assert {row["seed"] for row in results["rows"]} == {3}


def test_evaluate_gives_the_same_rows_again(finished, hansfree):
    before = json.loads((finished / "results.json").read_text())
    code, _, err = hansfree("evaluate", finished)
    assert code == 0, err
    assert json.loads((finished / "results.json").read_text())["rows"] == before["rows"]


def test_export_writes_a_model_that_loads(finished, hansfree, tmp_path):
    code, _, _ = hansfree("export", finished, "--out", tmp_path / "model")
    assert code == 0
    assert load_model(str(tmp_path / "model")).get_classifier().out_features == 10
    code, _, err = hansfree("export", finished, "--out", tmp_path / "model")
    assert code == 2
    assert "not empty" in err


@pytest.mark.parametrize(
    ("what", "registry"),
    [
        ("methods", METHODS),
        ("explainers", EXPLAINERS),
        ("benchmarks", BENCHMARKS),
        ("metrics", MEASURES),
        ("models", MODELS),
    ],
)
def test_list_shows_every_registered_name(hansfree, what, registry):
    code, out, _ = hansfree("list", what, "--json")
    assert code == 0
    entries = {entry["name"]: entry for entry in json.loads(out)}
    assert registry.keys() <= entries.keys()
    assert all(entry["summary"] for entry in entries.values())
    assert registry.keys() <= set(hansfree("list", what)[1].split())


def test_doctor_finds_this_installation_well(hansfree):
    code, out, _ = hansfree("doctor")
    assert code == 0
    assert "explanations can be trained through" in out


def test_version_is_the_package_s(hansfree):
    code, out, _ = hansfree("--version")
    assert (code, out.strip()) == (0, version("hansfree"))


def test_module_and_command_are_the_same():
    shown = subprocess.run([sys.executable, "-m", "hansfree", "--help"], capture_output=True, text=True, check=True)
    assert "explain" in shown.stdout
