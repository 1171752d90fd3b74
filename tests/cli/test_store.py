"""hansfree store make and check, and runs that take a store in place of a teacher."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from hansfree.config import apply_overrides, parse
from hansfree.experiment import stored_teacher
from hansfree.models import load_model, save_model
from hansfree.outcome import store_warnings
from hansfree.parts import RunConfig
from hansfree.runs import read_results, read_yaml

STUDENT = {"method": {"name": "e2kd"}, "explainer": {"name": "grad-cam"}, "teacher_input": "input"}


@pytest.fixture
def teacher(tmp_path):
    """A network that has learnt nothing, but is always the same."""
    torch.manual_seed(0)
    network = load_model("small-cnn", num_classes=10, options={"widths": [4, 8], "norm": "scale"})
    save_model(network, tmp_path / "teacher")
    return {"path": str(tmp_path / "teacher")}


@pytest.fixture
def made(hansfree, config, teacher, tmp_path):
    """A config, and the folder of a store made from it: ``config, store = made("--split", "iid")``."""

    def make(*options, **changes):
        path = config("student.yaml", teacher=teacher, **{**STUDENT, **changes})
        code, out, err = hansfree("store", "make", path, "--out", tmp_path / "store", *options)
        assert code == 0, err
        assert f"Store: {tmp_path / 'store'}" in out
        return path, tmp_path / "store"

    return make


@pytest.mark.parametrize("verb", ["make", "check"])
def test_help_has_an_example(verb, hansfree):
    code, out, _ = hansfree("store", verb, "--help")
    assert code == 0 and f"Example: hansfree store {verb}" in " ".join(out.split())


def test_a_run_takes_a_store_in_place_of_a_teacher(made, hansfree, tmp_path):
    path, store = made("--split", "iid")
    code, _, err = hansfree("run", path, f"teacher={{store: {store}}}", "--out", tmp_path / "frozen")
    assert code == 0, err
    results = read_results(tmp_path / "frozen" / "results.json")
    seen = {(row["model"], row["split"]) for row in results["rows"] if row["metric"] == "acc"}
    assert {("teacher", "valid"), ("teacher", "iid"), ("student", "ood")} <= seen and ("teacher", "ood") not in seen
    (warning,) = [text for text in results["cells"][0]["warnings"] if "No figures of the teacher" in text]
    assert "on ood, shift" in warning and "--split ood" in warning and warning in " ".join(err.split())


def test_the_teacher_is_judged_alike_from_a_store_and_alive(made, hansfree, tmp_path):
    path, store = made("--split", "iid", "--dtype", "float32")
    for name, settings in (("live", []), ("frozen", [f"teacher.store={store}"])):
        code, _, err = hansfree("run", path, *settings, "training.epochs=1", "--out", tmp_path / name)
        assert code == 0, err
    accuracies = [
        {row["split"]: row["value"] for row in read_results(tmp_path / name / "results.json")["rows"]
         if (row["model"], row["metric"], row["group"]) == ("teacher", "acc", None)}
        for name in ("live", "frozen")
    ]  # fmt: skip
    assert accuracies[1] == {split: accuracies[0][split] for split in ("valid", "iid")}


def test_without_augmentation_frozen_training_is_live_training(made, hansfree, tmp_path):
    path, store = made("--dtype", "float32")
    losses = []
    for name, settings in (("live", []), ("frozen", [f"teacher={{store: {store}}}"])):
        assert hansfree("run", path, *settings, "training.epochs=1", "--out", tmp_path / name)[0] == 0
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["event"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_check_says_what_it_holds_and_names_what_was_altered(made, hansfree):
    _, store = made("--dtype", "int8", "--explainer", "grad-cam", "--explainer", "lrp", "--epsilon", "0.01")
    code, out, err = hansfree("store", "check", store)
    assert code == 0 and "lrp-map: 2,352 bytes per sample" in out and "GB per million samples" in out, err
    damaged = store / "train" / "logits-00000.npy"
    np.load(damaged, mmap_mode="r+")[0, 0] += 1
    code, _, err = hansfree("store", "check", store)
    assert code == 2 and f"{damaged} was altered" in " ".join(err.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["augmentation.mixup=1"], "cannot be replayed, because mixup"),
        (["benchmark.colour_seed=5"], "made for other data (`options.colour_seed` is 0 there and 5 here)"),
        (["benchmark.limit=299"], "made for other data"),
        (["explainer.relu=false"], "holds no maps of grad-cam with these settings (`relu` is True there"),
        (["teacher_input=clean"], "saw teacher_input: input, but the run says clean"),
        (["teacher.statistics=batch"], "use teacher.statistics: running"),
        (["teacher.model={name: small-cnn, widths: [4, 8], norm: scale}"], "was made for another teacher"),
        (["teacher.store=nowhere"], "nowhere holds no store"),
        (["method.base=at"], "answers and not its network"),
        (["method={name: grad-cam-distillation, last_layer: free}", "explainer=null"], "--classes all"),
    ],
)
def test_a_run_that_asks_for_something_else_is_refused_before_it_trains(settings, message, made, hansfree, tmp_path):
    path, store = made()
    code, _, err = hansfree("run", path, f"teacher={{store: {store}}}", *settings, "--out", tmp_path / "run")
    assert code == 2 and message in " ".join(err.split())
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "best"], "neither top, top-K (such as top-2) nor all"),
        (["--explainer", "lrp"], "say which ones to store, such as --epsilon 0.001 --epsilon 0.01"),
        (["--explainer", "smoothgrad:explainer=gradient"], "cannot be replayed"),
        (["--split", "idd"], "did you mean 'iid'"),
        (["teacher.statistics=batch"], "depend on the whole batch"),
        (["teacher_input=recombine"], "other images of the batch"),
        (["teacher=null"], "A store needs the teacher itself"),
        (["teacher={store: x}"], "A store needs the teacher itself"),
        (["variants={a: {}}"], "describes a suite"),
    ],
)
def test_a_store_that_could_not_be_replayed_is_not_made(options, message, hansfree, config, teacher, tmp_path):
    path = config("student.yaml", teacher=teacher, **STUDENT)
    code, _, err = hansfree("store", "make", path, *options, "--out", tmp_path / "store")
    assert code == 2 and message in " ".join(err.split()) and not (tmp_path / "store").exists()


def test_crops_of_maps_as_fine_as_the_image_come_with_a_warning(made):
    path, store = made("--explainer", "lrp", "--explainer", "grad-cam", "--epsilon", "0.01")
    lrp = "explainer={name: lrp, epsilon: 0.01}"
    for settings, warned in (
        (["augmentation.crop=[0.5, 1]", lrp], True),
        (["augmentation.rotation=10", lrp], True),
        (["augmentation.flip=0.5", lrp], False),
        (["augmentation.crop=[0.5, 1]"], False),
        ([lrp], False),
    ):
        section = apply_overrides(read_yaml(path), [f"teacher={{store: {store}}}", *settings])
        config = parse(RunConfig, section)
        found = store_warnings(config, stored_teacher(config, None), ("valid",))
        assert ["hardly resemble those of a cropped image" in text for text in found] == [True] * warned


@pytest.mark.slow
def test_killed_processes_leave_what_the_same_command_finishes(config, teacher, tmp_path):
    # A batch size of 1 makes it slow enough to be killed amid.
    data = {"name": "coloured-digits", "limit": 4000, "valid": 600, "test": 60}
    path = config("student.yaml", teacher=teacher, **{**STUDENT, "benchmark": data})
    command = [sys.executable, "-m", "hansfree", "store", "make", path, "--jobs", "2", "--batch-size", "1", "--out"]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    stopped, marks = tmp_path / "stopped", tmp_path / "stopped" / "train" / "done.npy"
    chunks = 0
    for wanted in (1, 6):
        process = subprocess.Popen([*command, stopped], start_new_session=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            chunks = int(np.load(marks).sum()) if marks.exists() else 0
            if chunks >= wanted:
                break
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (stopped / "meta.json").exists() and wanted <= chunks
    subprocess.run([*command, stopped], check=True, capture_output=True)
    for name in json.loads((tmp_path / "whole" / "meta.json").read_text())["files"]:
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
