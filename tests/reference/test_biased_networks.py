"""Each loss of the methods that learn from a biased network again, slowly, from its paper."""

import math

import pytest
import torch
from torch.nn import functional as F

from hansfree.errors import UserError
from hansfree.methods.gce import generalised_cross_entropy


@pytest.fixture
def batch(tiny):
    return tiny.split("train").batch(torch.arange(20))


def probabilities(logits, label):
    """Of each sample's label, in plain Python."""
    rows = [[math.exp(z) for z in row] for row in logits.tolist()]
    return [row[y] / sum(row) for row, y in zip(rows, label.tolist())]


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_gce_is_the_papers(build, batch, q):
    method = build("gce", q=q).eval()
    with torch.no_grad():
        p = probabilities(method.student(batch.images), batch.label)
        assert method.loss(batch)["label"].item() == pytest.approx(sum((1 - v**q) / q for v in p) / len(p), rel=1e-5)


def test_gce_runs_from_cross_entropy_to_absolute_error():
    logits = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label = torch.arange(9) % 4
    near = generalised_cross_entropy(logits, label, 1e-9)
    torch.testing.assert_close(near, F.cross_entropy(logits, label, reduction="none"))
    absolute = (F.one_hot(label, 4) - logits.softmax(1)).abs().sum(1) / 2
    torch.testing.assert_close(generalised_cross_entropy(logits, label, 1.0), absolute)


def test_gce_weighs_the_gradient_of_cross_entropy_by_p_to_the_q():
    logits = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = torch.arange(9) % 4
    ours = torch.autograd.grad(generalised_cross_entropy(logits, label, 0.7).sum(), logits)[0]
    plain = torch.autograd.grad(F.cross_entropy(logits, label, reduction="sum"), logits)[0]
    weight = torch.tensor(probabilities(logits, label), dtype=torch.float64) ** 0.7
    torch.testing.assert_close(ours, weight[:, None] * plain)


@pytest.mark.parametrize("q", [0.0, -0.5, 1.1])
def test_a_q_without_meaning_is_refused(build, q):
    with pytest.raises(UserError, match=r"method\.q must lie above 0"):
        build("gce", q=q)
