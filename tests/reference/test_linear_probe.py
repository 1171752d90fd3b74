"""A linear probe is the logistic regression that scikit-learn finds on the same features, and nothing else moves."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hansfree.training import Training, fit


@pytest.fixture
def probe(build):
    return build("linear-probe", norm="batch")


def test_the_loss_is_cross_entropy_of_what_evaluation_mode_says(probe, tiny):
    batch = tiny.split("train").batch(torch.arange(6))
    logits = probe.eval().student(batch.images).detach().double()
    slow = sum(float(row.exp().sum().log() - row[y]) for row, y in zip(logits, batch.label.tolist())) / 6
    assert probe.train().loss(batch)["label"].item() == pytest.approx(slow, rel=1e-5)


def test_it_ends_where_logistic_regression_does_and_moves_nothing_else(probe, tiny):
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    train = tiny.split("train")
    whole = train.batch(torch.arange(48))
    with torch.no_grad():
        features = probe.eval().student.forward_features(whole.images).mean((2, 3)).numpy()
    penalty = 0.01  # without one there is no best layer: these features tell all samples apart
    how = {"batch_size": 48, "optimiser": "adam", "lr": 0.2, "schedule": "cosine", "clip": None}
    for _ in fit(probe, tiny, Training(steps=400, weight_decay=penalty, **how)):
        pass
    inputs = np.concatenate([features, np.ones((48, 1))], 1)  # the bias is penalised as well
    slow = LogisticRegression(C=1 / (48 * penalty), fit_intercept=False, max_iter=5000)
    expected = slow.fit(inputs, whole.label.numpy()).predict_proba(inputs)
    with torch.no_grad():
        found = probe.eval().predict(whole.images).softmax(1).numpy()
    assert abs(found - expected).max() < 1e-3
    moved = {name for name, value in probe.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"stages_done", "student.network.fc.weight", "student.network.fc.bias"}
