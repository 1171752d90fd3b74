"""The command behind docs/explainers.md, on networks small enough for the fast tests."""

import json

import pytest
import torch
from torch import Tensor, nn

from hansfree.core import Classifier, Explainer, Explanation
from hansfree.errors import UserError
from hansfree.explainers import GradientXInput
from hansfree.models import SmallCNN


@pytest.fixture(autouse=True)
def _bench(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "bench")


def tiny() -> Classifier:
    return Classifier(SmallCNN(5, widths=(4, 6)), {}, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


class Detached(Explainer):
    """Gradient x input whose gradient in the first layer is lost on the way."""

    def __call__(self, model, input, target, *, draws=None):
        first = model.network.convs[0].weight
        logits, map = GradientXInput()(model, input, target)
        return Explanation(logits, map + 0.5 * (first.detach() - first).sum())


class Refusing(Explainer):
    def __call__(self, model, input, target, *, draws=None):
        raise UserError("There is no rule for this; use another.")


class Broken(Explainer):
    def __call__(self, model, input, target, *, draws=None):
        raise ZeroDivisionError("oh")


def test_cells_and_page(tmp_path):
    from table_of_truth import measure, page, read
    from truth_networks import Network

    network = Network("tiny CNN", tiny, 12, homogeneous=True, conserving=True)
    explainers = {"gradient-x-input": GradientXInput(), "wrong": Detached(), "shy": Refusing(), "broken": Broken()}
    cells = measure("tiny", network, explainers, tmp_path)

    right = cells["gradient-x-input"]
    assert right.worst < 1e-5 and right.reached == right.matrices == 3
    assert right.oracle == "Captum" and right.oracle_error < 1e-12
    assert right.promise_error < 1e-12
    assert cells["wrong"].worst > 1e-2 and cells["wrong"].worst_name == "network.convs.0.weight"
    assert cells["shy"].refusal and not cells["shy"].failure
    assert cells["broken"].failure == "ZeroDivisionError: oh"

    text = page(read(tmp_path), explainers)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert sum(line.startswith("| gradient-x-input | ✓ ") for line in rows) == 1
    assert any(line.startswith("| wrong | ✗ ") and "**" in line for line in rows)
    assert "| shy | refused [1] |" in rows and "1. There is no rule for this; use another." in text
    assert any(line.startswith("| broken | **fails**") for line in rows)
    assert len({line.count("|") for line in rows}) == 1


def test_resuming_measures_what_is_missing_or_of_other_code(tmp_path):
    from table_of_truth import measure
    from truth_networks import Network

    file, column = tmp_path / "tiny.json", ("tiny", Network("tiny CNN", tiny, 12), {"shy": Refusing()}, tmp_path)
    measure(*column)
    kept = json.loads(file.read_text())
    kept["shy"]["refusal"] = "kept"
    file.write_text(json.dumps(kept))
    assert measure(*column, resume=True)["shy"].refusal == "kept"
    kept["shy"]["code"] = "of old"
    file.write_text(json.dumps(kept))
    assert measure(*column, resume=True)["shy"].refusal != "kept"


def test_a_network_that_cannot_be_built_says_why(tmp_path):
    from table_of_truth import measure
    from truth_networks import Network

    def build() -> nn.Module:
        raise UserError("It needs an extra.")

    cells = measure("none", Network("none", build), {"shy": Refusing()}, tmp_path)
    assert cells["shy"].failure == "UserError: It needs an extra."


def test_every_registered_explainer_has_a_row():
    from table_of_truth import rows

    from hansfree.explainers import EXPLAINERS

    assert {type(explainer) for explainer in rows().values()} == set(EXPLAINERS.values())


def test_gradient_errors_tell_right_from_wrong():
    """x^2 + 3 y with both gradients, with one missing, and with one doubled."""
    from gradient_check import gradient_errors

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.y = (nn.Parameter(torch.rand(4, dtype=torch.double) + 1) for _ in range(2))

    pair = Pair()
    parameters = dict(pair.named_parameters())

    def errors(loss) -> dict[str, float]:
        return gradient_errors(loss, pair, parameters)

    def doubled(y: Tensor) -> Tensor:
        return 2 * y - y.detach()

    found = errors(lambda: pair.x.square().sum() + 3 * pair.y.sum())
    assert max(found.values()) < 1e-5
    found = errors(lambda: pair.x.square().sum() + 3 * pair.y.detach().sum())
    assert found["x"] < 1e-5 and found["y"] > 0.9
    found = errors(lambda: pair.x.square().sum() + 3 * doubled(pair.y).sum())
    assert found["x"] < 1e-5 and found["y"] == pytest.approx(0.5, abs=0.01)
