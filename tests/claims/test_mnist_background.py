"""A background that gives the class away is learnt instead of the digit, and not where it is random."""

import pytest
import torch

from hansfree.benchmarks import MNISTBackground
from hansfree.core import Setup
from hansfree.evaluation import judge
from hansfree.methods import ERM
from hansfree.metrics import accuracy
from hansfree.models import load_model
from hansfree.training import Training, fit


def trained(**options):
    """Accuracy per test split of a small network after four epochs."""
    torch.manual_seed(0)
    data = MNISTBackground(**options)
    settings = {"widths": [12, 24, 48]}
    setup = Setup(
        lambda: load_model("small-cnn", num_classes=10, options=settings),
        None,
        len(data.split("train")),
        10,
        data.input,
    )
    method = ERM(setup)
    for _ in fit(method, data, Training(epochs=4, batch_size=32, optimiser="adam", lr=0.003)):
        pass
    judged = judge(method, None, data, ("iid", "ood", "shift"), 500, "cpu")
    return {split: accuracy(predictions) for (_, split), predictions in judged.items()}


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["colour", "texture"])
def test_the_shortcut_is_learnt_and_the_digit_is_not(shortcut):
    biased, random = trained(shortcut=shortcut), trained(shortcut=shortcut, ground="random")
    assert biased["iid"] > 0.95 and biased["shift"] < 0.1 and biased["ood"] < 0.4
    assert random["shift"] > 0.5 and abs(random["iid"] - random["shift"]) < 0.1


@pytest.mark.slow
def test_a_mark_costs_accuracy_where_it_misleads():
    found = trained(shortcut="mark")
    assert found["iid"] - found["shift"] > 0.2
