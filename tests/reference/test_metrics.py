"""Every accuracy again, slowly, and against torchmetrics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hansfree.core import Predictions
from hansfree.metrics import METRICS, group_accuracies
from hansfree.torchvision_guard import import_torchvision

import_torchvision()  # torchmetrics imports it where it is installed
from torchmetrics.functional.classification import multiclass_accuracy  # noqa: E402


@st.composite
def predictions(draw, classes=4):
    n = draw(st.integers(1, 30))
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    groups = {(y, a): draw(st.integers(0, 3)) for y in range(classes) for a in range(classes)}
    return Predictions(
        torch.randn(n, classes, generator=generator),
        torch.randint(classes, (n,), generator=generator),
        torch.randint(classes, (n,), generator=generator),
        torch.randn(n, classes, generator=generator),
        groups,
    )


def slowly(p):
    right = [int(row.argmax()) == y for row, y in zip(p.logits, p.label.tolist())]
    groups = {}
    for hit, y, a in zip(right, p.label.tolist(), p.bias.tolist()):
        groups.setdefault((y, a), []).append(hit)
    shares = {group: sum(hits) / len(hits) for group, hits in groups.items()}
    aligned = [hit for hit, y, a in zip(right, p.label.tolist(), p.bias.tolist()) if y == a]
    against = [hit for hit, y, a in zip(right, p.label.tolist(), p.bias.tolist()) if y != a]
    weight = sum(p.training_groups[g] for g in shares)
    same = [int(a.argmax()) == int(b.argmax()) for a, b in zip(p.logits, p.teacher_logits)]
    return {
        "acc": sum(right) / len(right),
        "acc_wg": min(shares.values()),
        "acc_group_mean": sum(shares.values()) / len(shares),
        "acc_avg": sum(shares[g] * p.training_groups[g] for g in shares) / weight if weight else None,
        "acc_ba": sum(aligned) / len(aligned) if aligned and against else None,
        "acc_bc": sum(against) / len(against) if aligned and against else None,
        "agreement": sum(same) / len(same),
    }


@settings(max_examples=60)
@given(predictions())
def test_every_accuracy_is_what_a_loop_says(p):
    slow = slowly(p)
    assert {name for name in METRICS if name.startswith("acc")} < slow.keys()
    for name, expected in slow.items():
        value = METRICS[name](p)
        assert value == (None if expected is None else pytest.approx(expected)), name
        assert value is None or 0 <= value <= 1
    theirs = multiclass_accuracy(p.logits, p.label, num_classes=4, average="micro").item()
    assert METRICS["acc"](p) == pytest.approx(theirs)
    assert METRICS["acc_wg"](p) == pytest.approx(min(group_accuracies(p).values()))


def test_what_is_not_known_is_not_measured():
    p = Predictions(torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]))
    known = {name for name, metric in METRICS.items() if metric(p) is not None}
    assert known == {"acc", "ece", "brier", "nll"}
