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


def launched(processes, config, out):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "hansfree", "run", str(config), "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
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
