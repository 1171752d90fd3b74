"""Configs at full size: on a tiny folder in the original layout each builds every object and takes two steps.

What is shortened is said in :func:`shortened`; everything else is the file as it stands, so that a misspelt key or a
method that is not there fails.
"""

import json
import math
import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hansfree.config import apply_overrides
from hansfree.core import TEST_SPLITS
from hansfree.errors import NotGivenError, UserError
from hansfree.evaluation import Selection, judge
from hansfree.experiment import built
from hansfree.metrics import accuracy
from hansfree.parts import selection_rule
from hansfree.plan import read_suite
from hansfree.runs import SuiteFolder, read_results
from hansfree.suite import cells_of, check_variants, run_cell, run_suite
from hansfree.torchvision_guard import import_torchvision
from hansfree.training import fit, make_accelerator

CONFIGS = Path(__file__).parents[2] / "configs"
ONE_BIAS = "needs a bias that varies within a class"
ONE_PIXEL = "needs a feature map larger than 1 x 1"
INSIDE = "the colour lies on the digit, inside of the mask"
NOT_GIVEN = {
    "coloured-mnist-paper": {
        "grad-cam": ONE_PIXEL,
        "attention": ONE_PIXEL,
        "irm": ONE_BIAS,
        "group-dro": ONE_BIAS,
        "pgi": ONE_BIAS,
        "isnet": INSIDE,
        "rrr": INSIDE,
        "gain": INSIDE,
        "gals": "the colour lies on the digit, inside of what attention shows",
    },
    "coloured-fashion": {},
    "mnist-background-paper": {},
    "clip-teacher-paper": {},
    "dogs-with-ties-paper": {},
    "coco-on-places-paper": {"gals": "no vision-language model takes part in this experiment"},
    "waterbirds-100-paper": {},
    "waterbirds-guided-paper": {},
}
"""Every config that needs data of one's own and a GPU, and of its variants those that tables call N/A, and why."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """80 training and 20 test images where torchvision looks for MNIST."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for part, count in (("train", 80), ("t10k", 20)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a small CLIP of random weights, for images of 64 pixels."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 8, "image_size": 64}
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    described = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described, "preprocess_cfg": {}}))
    open_clip = import_torchvision("open_clip")
    torch.manual_seed(0)
    torch.save(open_clip.model.CLIP(**described).state_dict(), folder / "open_clip_model.pth")
    return folder


@pytest.fixture(params=NOT_GIVEN)
def shortened(request, digits, stanford_dogs, coco_and_places, waterbirds, clip):
    """The suite's file with one seed, two steps of eight samples everywhere, few heatmaps, and local data."""
    section = yaml.safe_load((CONFIGS / f"{request.param}.yaml").read_text(encoding="utf-8"))
    changes = ["seeds=[0]", "evaluation.heatmaps=2"]
    if section["benchmark"]["name"] == "dogs-with-ties":
        changes += [f"benchmark.root={stanford_dogs}", "benchmark.valid=4", "benchmark.size=64"]
    elif section["benchmark"]["name"] == "coco-on-places":
        changes += [f"benchmark.{key}={folder}" for key, folder in coco_and_places.items()]
        changes += ["benchmark.train=5", "benchmark.valid=1", "benchmark.test=1"]
    elif section["benchmark"]["name"] == "waterbirds":
        changes += [f"benchmark.root={waterbirds}", f"benchmark.segmentations={waterbirds / 'segmentations'}"]
        changes += ["benchmark.size=64", "teacher.train.model.pretrained=false"]
        if section["model"]["name"].startswith("bcos/"):
            changes += ["model.inplanes=4", "teacher.train.model.name=bcos/resnet18", "teacher.train.model.inplanes=4"]
            changes += ["evaluation.measure.samples=4"]
    else:
        root = digits if section["benchmark"]["source"] == "mnist" else digits / "MNIST" / "raw"
        changes += [f"benchmark.root={root}"]
    if "model" in section["teacher"]:
        changes += [f"teacher.model.name=open_clip/{clip}", "teacher.model.pretrained=false", "model.size=[64, 64]"]
    section = apply_overrides(section, changes)
    parts = (
        section["teacher"].get("train", {}),
        *section["variants"].values(),
        *section.get("conditions", {}).values(),
    )
    for part in (section, *parts):
        for key in ("epochs", "steps", "batch_size"):
            part.get("training", {}).pop(key, None)
            part.pop(f"training.{key}", None)
    section["training"] |= {"steps": 2, "batch_size": 8}
    return section


def here(cells, jobs, device, watch):
    """Cells in this process, which needs no start."""
    return {c.label: run_cell(c.config.model_dump(), str(c.folder.path), device) for c in cells}


def test_every_config_at_full_size_is_tried():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in CONFIGS.glob("*.yaml")}
    tried_apart = {"voc-paper"}  # by test_voc_config.py: of labels of several classes
    # By test_imagenet_configs.py: without ood and shift.
    tried_apart |= {"imagenet-few-shots-paper", "imagenet-unrelated-paper", "sun397-unrelated-paper"}
    tried_apart |= {"imagenet-kd-interpretability-paper"}
    tried_apart |= {"sst-paper"}  # by test_text_configs.py
    # By test_conflicting_configs.py: of several stages, of which each takes steps.
    tried_apart |= {"conflicting-paper", "conflicting-digits-paper", "conflicting-faces-paper"}
    assert {name for name, text in texts.items() if "a GPU" in text} == set(NOT_GIVEN) | tried_apart


def test_every_variant_takes_two_steps(shortened, tmp_path):
    cells = cells_of(read_suite(shortened), SuiteFolder(tmp_path))
    not_given = {}
    for cell in {cell.planned.family: cell for cell in cells}.values():  # a grid's settings differ in numbers alone
        try:
            benchmark, method = built(cell.config)
        except NotGivenError as error:
            not_given[cell.variant] = error.reason
            continue
        steps = list(fit(method, benchmark, cell.config.training, accelerator=make_accelerator(device="cpu")))
        assert sum(step.stage == steps[-1].stage for step in steps) == 2, cell.variant
        selection = Selection(selection_rule(cell.config, method), benchmark)
        metrics, _ = selection.validate(method, 50, "cpu")
        judged = judge(method, method.teacher, benchmark, TEST_SPLITS, 50, "cpu") if "teacher" in method.needs else {}
        found = [selection.score(metrics), *(accuracy(predictions) for predictions in judged.values())]
        assert all(math.isfinite(value) for value in found), cell.variant
    assert not_given == NOT_GIVEN[shortened["name"]]


@pytest.mark.slow
def test_as_suites_they_give_rows_for_every_variant(shortened, tmp_path, monkeypatch):
    monkeypatch.setattr("hansfree.suite.run_locally", here)
    results = read_results(run_suite(read_suite(shortened), tmp_path / "out", jobs=1).results)
    told = {cell["variant"]: (cell["status"], cell["error"]) for cell in results["cells"]}
    expected = NOT_GIVEN[shortened["name"]]
    names = {cell.variant for cell in cells_of(read_suite(shortened), SuiteFolder(tmp_path))}
    assert told == {name: ("n/a", expected[name]) if name in expected else ("done", None) for name in names}
    for name in names - set(expected):
        rows = [row for row in results["rows"] if row["variant"] == name and row["metric"] == "acc"]
        assert {row["split"] for row in rows if row["group"] is None} >= {"valid", *TEST_SPLITS}, name
        assert all(math.isfinite(row["value"]) for row in rows), name


def test_a_misspelt_key_anywhere_is_found(shortened, tmp_path):
    variant = next(iter(shortened["variants"].values()))
    for place in (shortened["benchmark"], shortened["model"], shortened["training"], variant["method"]):
        place["misspelt"] = 1
        with pytest.raises(UserError, match="misspelt"):
            check_variants(cells_of(read_suite(shortened), SuiteFolder(tmp_path)))
        del place["misspelt"]


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "table-1.md"


def test_the_page_on_the_table_names_every_config_and_what_it_runs_can_be_read(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"configs/{name}.yaml" in text for name in NOT_GIVEN)
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M) for line in block.splitlines()]
    assert lines
    for line in lines:
        program, verb, config, *rest = shlex.split(line, comments=True)
        assert (program, verb) in {("hansfree", "suite"), ("python", "bench/step_cost.py")}
        section = yaml.safe_load((CONFIGS.parent / config).read_text(encoding="utf-8"))
        assert cells_of(
            read_suite(apply_overrides(section, [word for word in rest if "=" in word])), SuiteFolder(tmp_path)
        )
