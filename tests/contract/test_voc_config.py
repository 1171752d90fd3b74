"""configs/voc-paper.yaml on a tiny VOCdevkit: every variant takes two steps, and a suite of two gives the tables."""

import math
from pathlib import Path

import pytest
import yaml

from hansfree.config import apply_overrides
from hansfree.errors import UserError
from hansfree.evaluation import judge
from hansfree.experiment import built
from hansfree.metrics import f1
from hansfree.outcome import make_selection
from hansfree.plan import read_suite
from hansfree.runs import SuiteFolder, read_results
from hansfree.suite import cells_of, check_variants, run_cell, run_suite
from hansfree.torchvision_guard import import_torchvision
from hansfree.training import fit, make_accelerator

import_torchvision()
pytest.importorskip("bcos")

CONFIG = Path(__file__).parents[2] / "configs" / "voc-paper.yaml"


@pytest.fixture
def shortened(voc):
    """One seed, two steps of four images of 64 pixels everywhere, narrow networks without published weights."""
    section = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    changes = [
        *(f"benchmark.root={voc}", "benchmark.size=64", "seeds=[0]", "model.inplanes=4", "evaluation.heatmaps=1"),
        *("teacher.train.model.name=bcos/resnet18", "teacher.train.model.pretrained=false"),
        *("teacher.train.model.inplanes=4", "evaluation.measure.samples=4"),
    ]
    section = apply_overrides(section, changes)
    for part in (section, section["teacher"]["train"]):
        part["training"].pop("epochs")
    section["training"] |= {"steps": 2, "batch_size": 4}
    return section


def test_every_variant_takes_two_steps(shortened, tmp_path):
    cells = cells_of(read_suite(shortened), SuiteFolder(tmp_path))
    check_variants(cells)
    assert {cell.planned.condition for cell in cells} == {"epg", "iou"}
    for cell in {cell.planned.family: cell for cell in cells}.values():
        benchmark, method = built(cell.config)
        steps = list(fit(method, benchmark, cell.config.training, accelerator=make_accelerator(device="cpu")))
        assert len(steps) == 2
        selection = make_selection(cell.config, method, benchmark)
        assert math.isfinite(selection.score(selection.validate(method, 8, "cpu")[0]))
        teacher = method.teacher if "teacher" in method.needs else None
        assert all(f1(said) is not None for said in judge(method, teacher, benchmark, ("iid",), 8, "cpu").values())


def test_a_misspelt_key_anywhere_is_found(shortened, tmp_path):
    for place in (shortened["benchmark"], shortened["training"], shortened["variants"]["e2kd"]["method"]):
        place["misspelt"] = 1
        with pytest.raises(UserError, match="misspelt"):
            check_variants(cells_of(read_suite(shortened), SuiteFolder(tmp_path)))
        del place["misspelt"]


def here(cells, jobs, device, watch):
    """Cells in this process, which needs no start."""
    return {c.label: run_cell(c.config.model_dump(), str(c.folder.path), device) for c in cells}


@pytest.mark.slow
def test_a_suite_gives_f1_map_and_where_explanations_are(shortened, tmp_path, monkeypatch):
    monkeypatch.setattr("hansfree.suite.run_locally", here)
    shortened["variants"] = {name: dict(shortened["variants"][name]) for name in ("erm", "kd")}
    shortened["variants"]["kd"].pop("grid")
    folder = run_suite(read_suite(shortened), tmp_path / "out", jobs=1)
    results = read_results(folder.results)
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    measured = {row["metric"] for row in results["rows"]}
    assert {"f1", "mean_average_precision", "epg", "iou"} <= measured and "acc" not in measured
    table = folder.table("md").read_text(encoding="utf-8")
    for heading in ("Mean average precision", "Where explanations are"):
        assert f"## {heading}" in table
    assert "EPG" in table and "mAP" in table
    page = folder.report.read_text(encoding="utf-8")
    assert "Where explanations are" in page and "iid, F1 (%)" in page
    teachers = list(tmp_path.glob("out/**/teacher*/**/results.json")) + list(tmp_path.glob("out/**/results.json"))
    fronts = [read_results(path)["pareto"] for path in teachers if "pareto" in read_results(path)]
    assert fronts and all({"f1", "epg", "iou", "step"} <= point.keys() for front in fronts for point in front)
