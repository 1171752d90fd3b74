"""The science: the shortcut learner falls for the shortcut, the cure holds, and explanations depend on weights."""

from pathlib import Path

import pytest
import torch

from hansfree.benchmarks import BENCHMARKS
from hansfree.explainers import EXPLAINERS
from hansfree.models import load_model
from hansfree.plan import read_suite
from hansfree.runs import read_results, read_yaml
from hansfree.suite import run_suite

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory):
    """Mean accuracy over two seeds by (variant, split), of the demo's own settings."""
    config = read_yaml(CONFIGS / "coloured-digits.yaml")
    chosen = {name: config["variants"][name] for name in ("erm", "lrp")}
    suite = read_suite({**config, "seeds": [10, 11], "variants": chosen})
    folder = run_suite(suite, tmp_path_factory.mktemp("claims") / "suite")
    rows = read_results(folder.results)["rows"]
    return lambda variant, split: (
        sum(
            row["value"]
            for row in rows
            if (row["variant"], row["split"], row["metric"], row["group"], row["model"])
            == (variant, split, "acc", None, "student")
        )
        / len(suite.seeds)
    )


@pytest.mark.slow
def test_erm_learns_the_colour_and_nothing_else(accuracy):
    assert accuracy("erm", "iid") > 0.99
    assert accuracy("erm", "shift") < 0.05


@pytest.mark.slow
def test_lrp_distillation_learns_the_digit(accuracy):
    assert accuracy("lrp", "shift") >= 0.84
    assert accuracy("lrp", "iid") - accuracy("lrp", "shift") <= 0.06


@pytest.mark.parametrize("name", EXPLAINERS)
def test_a_randomised_model_changes_its_maps(name):
    """Adebayo et al., Sanity checks for saliency maps, 2018: what does not depend on weights explains nothing."""
    batch = BENCHMARKS["coloured-digits"](limit=300, valid=60, test=60).split("iid").batch(torch.arange(16))
    settings = {"epsilon": 0.01} if name == "lrp" else {}
    maps = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = load_model("bcos/resnet18" if name == "bcos" else "small-cnn", num_classes=10).eval()
        with torch.no_grad():
            maps.append(EXPLAINERS[name](**settings)(model, batch.images, batch.label).map.flatten(1))
    first, second = (map - map.mean(1, keepdim=True) for map in maps)
    similarity = torch.nn.functional.cosine_similarity(first, second, dim=1).mean()
    assert similarity < 0.9
