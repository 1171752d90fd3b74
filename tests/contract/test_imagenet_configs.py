"""Configs on ImageNet and SUN397: on small folders in the original layouts every variant takes two steps.

As in test_paper_configs.py; apart because there is neither ood nor shift here, and because of the conditions.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from hansfree.benchmarks import Folder
from hansfree.config import apply_overrides
from hansfree.core import UNKNOWN
from hansfree.errors import UserError
from hansfree.evaluation import judge
from hansfree.experiment import built
from hansfree.metrics import accuracy
from hansfree.outcome import make_selection
from hansfree.plan import read_suite
from hansfree.runs import SuiteFolder, read_results
from hansfree.suite import cells_of, check_variants, run_cell, run_suite
from hansfree.torchvision_guard import import_torchvision
from hansfree.training import fit, make_accelerator

import_torchvision()
pytest.importorskip("bcos")

CONFIGS = Path(__file__).parents[2] / "configs"
FEW_SHOTS = "imagenet-few-shots-paper"
UNRELATED = ("sun397-unrelated-paper", "imagenet-unrelated-paper")
DISSECTED = "imagenet-kd-interpretability-paper"
ALL = (FEW_SHOTS, *UNRELATED, DISSECTED)


@pytest.fixture
def shortened(imagenet, sun397, tmp_path):
    """Gives a config with one seed, two steps of four images of 40 pixels, and small networks of random weights."""

    def short(name, *, narrow=True):
        section = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        teacher = "teacher.model" if "model" in section["teacher"] else "teacher.train.model"
        changes = ["seeds=[0]", "evaluation.heatmaps=1", "augmentation.size=40", f"{teacher}.pretrained=false"]
        changes += [f"{model}.size=[40, 40]" for model in ("model", teacher)]
        roots = {"folder": imagenet, "sun397": sun397}
        for part in ("benchmark", "transfer"):
            if part in section:
                changes += [f"{part}.root={roots[section[part]['name']]}", f"{part}.size=44", f"{part}.valid=3"]
        small = ("bcos/resnet18", "inplanes=4") if name in UNRELATED else ("small-resnet", "widths=[4, 8]")
        for model in ("model", teacher) if narrow else ():
            changes += [f"{model}.name={small[0]}", f"{model}.{small[1]}"]
        if name == FEW_SHOTS:
            few = tmp_path / "few.txt"
            few.write_text("".join(f"{file.name}\n" for file in listed(imagenet)))
            changes += ["conditions.50 images.shots=2", f"conditions.200 images.shots={few}"]
        if name == DISSECTED:
            changes += dissected(section["variants"], narrow)
        section = apply_overrides(section, changes)
        for part in (section, *section.get("conditions", {}).values(), *section["variants"].values()):
            for key in ("epochs", "batch_size"):
                part.get("training", {}).pop(key, None)
        section["training"] |= {"steps": 2, "batch_size": 4, "workers": 0}
        return section

    return short


def dissected(variants, narrow):
    """What shortens the variants: few epochs before the student, teachers of their own as small as the others."""
    found = [f"variants.{name}.method.projection_epochs=1" for name in variants if name.startswith("sskd")]
    models = ["variants.self-kd.teacher.model"]
    models += [f"variants.{name}.teacher.train.model" for name in variants if name.startswith("smoothed")]
    found += [f"{model}.size=[40, 40]" for model in models] + [f"{models[0]}.pretrained=false"]
    if narrow:
        found += [f"{model}.{key}" for model in models for key in ("name=small-resnet", "widths=[4, 8]")]
        layers = [f"{role}_layers=[blocks.0, blocks.1]" for role in ("student", "teacher")]
        found += [f"variants.{name}.method.{key}" for name in ("at", "at-logits") for key in layers]
    return found


def listed(imagenet):
    """Two training images of each class that ``valid: 3`` does not hold out."""
    train = Folder(root=imagenet, valid=3, size=8).split("train")
    return [train.files[row] for y in range(3) for row in (train.label == y).nonzero()[:2, 0].tolist()]


def two_steps(cell):
    """The benchmark, after two steps, a validation and the tests of one cell."""
    benchmark, method = built(cell.config)
    steps = list(fit(method, benchmark, cell.config.training, accelerator=make_accelerator(device="cpu")))
    assert sum(step.stage == steps[-1].stage for step in steps) == 2, cell.variant
    assert all(math.isfinite(step.loss) for step in steps), cell.variant
    selection = make_selection(cell.config, method, benchmark)
    assert math.isfinite(selection.score(selection.validate(method, 9, "cpu")[0])), cell.variant
    teacher = method.teacher if "teacher" in method.needs else None
    for predictions in judge(method, teacher, benchmark, ("iid",), 12, "cpu").values():
        assert math.isfinite(accuracy(predictions)), cell.variant
    return benchmark


def cells(section, folder):
    """The cells of a suite; of those of a condition that differ in numbers alone, one."""
    found = {}
    for cell in cells_of(read_suite(section), SuiteFolder(folder)):
        config = cell.config.model_dump(exclude={"name", "variant", "title"})
        found[cell.planned.condition, re.sub(r"[0-9.]+", "0", json.dumps(config))] = cell
    return list(found.values())


def test_every_variant_on_few_images_takes_two_steps(shortened, tmp_path):
    found = cells(shortened(FEW_SHOTS), tmp_path)
    assert {cell.planned.condition for cell in found} == {"50 images", "200 images", "all images"} and len(found) == 24
    for cell in found:
        if cell.planned.condition == "50 images":
            assert two_steps(cell).split("train").label.bincount().tolist() == [2, 2, 2]


def test_the_other_conditions_take_a_list_and_all_images(shortened, imagenet, tmp_path):
    found = {cell.planned.condition: cell for cell in cells(shortened(FEW_SHOTS), tmp_path) if "kd" in cell.variant}
    few, everything = two_steps(found["200 images"]), two_steps(found["all images"])
    assert few.record()["shots"]["list"].endswith("few.txt")
    origin = few.split("train").batch(torch.arange(6)).origin
    assert [Folder(root=imagenet, valid=3, size=8).split("train").files[row] for row in origin] == listed(imagenet)
    assert len(everything.split("train")) == 3 * 11


@pytest.mark.parametrize(
    "chosen",
    [
        ("at-logits", "ft"),
        pytest.param(None, marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_distillers_whose_units_are_dissected_take_two_steps(chosen, shortened, tmp_path):
    for cell in cells_of(read_suite(shortened(DISSECTED)), SuiteFolder(tmp_path)):
        if chosen is None or cell.variant in chosen:
            two_steps(cell)


@pytest.mark.parametrize("name", UNRELATED)
def test_every_variant_on_unrelated_images_takes_two_steps(name, shortened, tmp_path):
    found = {cell.planned.family: cell for cell in cells(shortened(name), tmp_path)}
    assert {family[:3] for family in found} == {"erm", "kd-", "e2k"} and len(found) == 3
    for family, cell in found.items():
        benchmark = two_steps(cell)
        assert benchmark.name == {"sun397": "folder", "imagenet": "sun397"}[name.partition("-")[0]]
        assert set(benchmark.split("train").label.tolist()) == ({0, 1, 2} if family == "erm" else {UNKNOWN})


@pytest.mark.parametrize("name", ALL)
def test_the_networks_that_are_named_are_built_as_they_stand(name, shortened, tmp_path):
    every = cells_of(read_suite(shortened(name, narrow=False)), SuiteFolder(tmp_path))
    variant = next(cell for cell in every if "kd" in cell.variant)
    _, method = built(variant.config)
    wanted = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert method.student.config["architecture"] == wanted["model"]["name"]
    teacher = wanted["teacher"].get("model") or wanted["teacher"]["train"]["model"]
    assert method.teacher.model.config["architecture"] == teacher["name"]


@pytest.mark.parametrize("name", ALL)
def test_a_misspelt_key_anywhere_is_found(name, shortened, tmp_path):
    section = shortened(name)
    section["variants"] = {"kd": next(one for key, one in section["variants"].items() if key.startswith("kd"))}
    section["reference"] = "kd"
    for place in (section["benchmark"], section["model"], section["training"], section["variants"]["kd"]["method"]):
        place["misspelt"] = 1
        with pytest.raises(UserError, match="misspelt"):
            check_variants(cells_of(read_suite(section), SuiteFolder(tmp_path)))
        del place["misspelt"]


def here(cells, jobs, device, watch):
    """Cells in this process, which needs no start."""
    return {c.label: run_cell(c.config.model_dump(), str(c.folder.path), device) for c in cells}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_as_suites_they_give_rows_for_some_variants(name, shortened, tmp_path, monkeypatch):
    monkeypatch.setattr("hansfree.suite.run_locally", here)
    section = shortened(name)
    kept = [key for key in section["variants"] if key in ("erm", "kd", "kd-t1", "e2kd-1-t1")]
    section["variants"] = {key: section["variants"][key] for key in kept}
    results = read_results(run_suite(read_suite(section), tmp_path / "out", jobs=1).results)
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    rows = [row for row in results["rows"] if row["metric"] == "acc" and row["split"] == "iid"]
    assert {cell["variant"] for cell in results["cells"]} <= {row["variant"] for row in rows}
