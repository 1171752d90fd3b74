"""Every example runs as it stands, prints its loss and both accuracies, and is short enough to be read."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NEEDS = {"lightning_module": "lightning", "hugging_face_trainer": "transformers"}


def output_of(example, steps):
    package = NEEDS.get(example.stem)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    done = subprocess.run([sys.executable, example, "--steps", str(steps)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(label, text):
    return [float(value) for value in re.findall(rf"\b{label}\W+([\d.]+)", text)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_and_says_how_it_went(example):
    shown = output_of(example, steps=4)
    assert numbers("loss", shown)
    assert all(0 <= value <= 1 for split in ("iid", "shift") for value in numbers(split, shown))
    assert numbers("iid", shown)
    assert numbers("shift", shown)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_loss_falls_and_the_student_holds_under_shift(example):
    shown = output_of(example, steps=300)
    loss = numbers("loss", shown)
    student = loss[len(loss) // 2 :]  # two examples print the teacher's before
    assert student[-1] < 0.8 * student[0]
    assert numbers("shift", shown)[-1] > 0.4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_under_sixty_lines(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60
