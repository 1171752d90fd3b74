"""Ten steps of each method on generated data give the recorded losses.

After a change that is meant to change them: ``python -m pytest tests/golden --golden-update``.
"""

import json
from pathlib import Path

import pytest

from hansfree.methods import METHODS
from hansfree.training import Training, fit

RECORDED = Path(__file__).with_name("golden.json")


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps(name, build, tiny, request):
    method = build(name, norm="batch")
    training = Training(steps=10, batch_size=16, optimiser="adam", lr=0.01, schedule="one-cycle")
    losses = [step.loss for step in fit(method, tiny, training, seed=5)]
    if request.config.getoption("--golden-update"):
        recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        RECORDED.write_text(json.dumps({**recorded, name: losses}, indent=1, sort_keys=True) + "\n")
    assert losses == pytest.approx(json.loads(RECORDED.read_text())[name], rel=2e-3)
