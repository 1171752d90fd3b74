"""Configs of texts: on tiny folders in the original layouts each builds every object and takes two steps."""

from pathlib import Path

import pytest
import yaml
from texts import write_film_reviews, write_model, write_trees

from hansfree.config import apply_overrides
from hansfree.experiment import run
from hansfree.parts import RunConfig
from hansfree.plan import read_suite
from hansfree.runs import SuiteFolder, read_results
from hansfree.suite import cells_of

CONFIGS = Path(__file__).parents[2] / "configs"
FEW = {"train": 24, "valid": 8, "test": 12, "length": 20}
SHORT = ["training.epochs=null", "training.steps=2", "training.batch_size=4", "evaluation.measure.samples=4"]
SHORT += ["teacher.train.training.epochs=null", "teacher.train.training.steps=1", "evaluation.heatmaps=2"]
SUITES = {
    "film-reviews": [f"benchmark.{key}={value}" for key, value in FEW.items()],
    "film-reviews-trigger": [f"benchmark.{key}={value}" for key, value in FEW.items()],
    "sst-paper": ["benchmark.length=12"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    write_model(root / "minilm", layers=6)
    write_model(root / "bert", layers=12)
    write_film_reviews(root / "film-reviews")
    write_trees(root / "sst")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_every_variant_takes_two_steps(name, place, tmp_path, monkeypatch):
    monkeypatch.setenv("HANSFREE_DATA", str(place))
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    changes = [*SHORT, *SUITES[name], "seeds=[0]"]
    if name == "sst-paper":
        bert = place / "bert"
        changes += [f"benchmark.root={place / 'sst'}", f"benchmark.tokenizer={bert}", f"model.name=hf-text/{bert}"]
    suite = read_suite(apply_overrides(written, changes))
    for cell in cells_of(suite, SuiteFolder(tmp_path)):
        folder = run(RunConfig(**cell.config.model_dump()), tmp_path / cell.variant, report=False)
        rows = read_results(folder.results)["rows"]
        assert {"word_auroc_all", "word_sign_acc_all", "acc"} <= {row["metric"] for row in rows}, cell.variant
        assert read_results(folder.results)["cells"][0]["steps"] == 2
