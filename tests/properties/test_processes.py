"""Several processes: the same steps as one, one run folder, nothing written twice."""

import json
import subprocess
import sys

import pytest
import yaml

from hansfree.config import merge

CONFIG = {
    "name": "tried",
    "benchmark": {"name": "coloured-digits", "limit": 300, "valid": 60, "test": 60},
    "model": {"name": "small-cnn", "widths": [4, 8], "norm": "none"},
    "teacher": {"train": {"training.epochs": 1}},
    "method": {"name": "explanation-distillation"},
    "explainer": {"name": "lrp", "epsilon": 0.05},
    "training": {"epochs": 2, "batch_size": 32, "optimiser": "sgd", "lr": 0.1},
}


TWO_STAGES = """
import json, sys
import torch
from hansfree.benchmarks import ColouredDigits
from hansfree.core import Setup, Stage
from hansfree.methods import ERM
from hansfree.models import load_model
from hansfree.training import Training, fit, make_accelerator

class HeadFirst(ERM):
    def next_stage(self):
        head = tuple(self.student.get_classifier().parameters())
        stages = Stage("head", {"head": head}, {"steps": 3}), Stage("all", {"all": tuple(self.parameters())})
        return stages[self.stages_done] if self.stages_done < 2 else None

torch.manual_seed(0)
digits = ColouredDigits(limit=200, valid=40, test=40)
student = load_model("small-cnn", num_classes=10, options={"widths": [4, 8], "norm": "none"})
method = HeadFirst(Setup(lambda: student, None, 120, 10, digits.input))
here = make_accelerator(device="cpu")
steps = list(fit(method, digits, Training(steps=4, batch_size=32, lr=0.1), accelerator=here))
if here.is_main_process:
    print(json.dumps([list(step.grad_norm.items()) for step in steps]))
"""


def started(processes, *what):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *what]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_go_through_the_stages_of_one(tmp_path):
    script = tmp_path / "two_stages.py"
    script.write_text(TWO_STAGES)
    one, two = (json.loads(started(processes, script)) for processes in (1, 2))
    assert [name for ((name, _),) in two] == ["head"] * 3 + ["all"] * 4
    assert [norm for ((_, norm),) in two] == pytest.approx([norm for ((_, norm),) in one], rel=1e-3)


def launched(processes, config, out):
    started(processes, "-m", "hansfree", "run", config, "--device", "cpu", "--out", out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"], json.loads((out / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"method": {"name": "explanation-distillation", "top_probability": 1.0}}])
def test_two_processes_take_the_steps_of_one(tmp_path, changes):
    """Without batch statistics and random draws, the mean of two processes' gradients is one's gradient."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(merge(CONFIG, changes)))
    one, first = launched(1, path, tmp_path / "one")
    two, second = launched(2, path, tmp_path / "two")
    assert len(one) == len(two) == 10
    norms = [[step["grad_norm"]["train"] for step in steps] for steps in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)
    assert second["environment"]["processes"] == 2
    accuracy = [
        {(r["model"], r["split"]): r["value"] for r in results["rows"] if r["metric"] == "acc" and not r["group"]}
        for results in (first, second)
    ]
    assert accuracy[0].keys() == accuracy[1].keys()
