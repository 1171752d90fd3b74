"""Mistakes: one sentence, the right exit code, nothing lost."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from hansfree import runs
from hansfree.runs import RunFolder


def sentence(err):
    """The error as printed, which must be one line and no traceback."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("hansfree: ")
    return lines[0]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("method.name=emr", "did you mean 'erm'?"),
        ("training.lrr=1", "did you mean 'lr'?"),
        ("training.lr=fast", "training.lr cannot be 'fast'"),
        ("trainin.lr=1", "did you mean 'training'?"),
        ("benchmark.bias_ratio=1.2", "benchmark.bias_ratio"),
        ("benchmark.pallete=pgi", "did you mean 'palette'?"),
        ("benchmark.palette=pgj", "pgi"),
        ("benchmark.source=idx", "root"),
        ("model.widhts=[2]", "did you mean 'widths'?"),
        ("model.name=small-cmn", "did you mean 'small-cnn'?"),
        ("model.name=nowhere/exported", "config.json"),
        ("method.name=output-distillation", "teacher"),
        ("method.name=explanation-distillation", "explainer"),
        ("explainer.name=lrp", "takes no explainer"),
        ("method.name=nowhere:Method", "cannot be imported"),
        ("training.epochs=null", "training.epochs"),
        ("selection=best", "selection"),
        ("noequals", "key=value"),
        ("name.deeper=1", "name"),
    ],
)
def test_a_wrong_setting_is_answered_in_one_sentence(hansfree, config, tmp_path, setting, said):
    code, _, err = hansfree("run", config(), setting, "--out", tmp_path / "run")
    assert code == 2, err
    assert said in sentence(err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(hansfree, config, tmp_path, device):
    code, _, err = hansfree("run", config(), "--device", device, "--out", tmp_path / "run")
    assert code == 2
    assert device in sentence(err)


def test_broken_and_missing_configs(hansfree, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2", encoding="utf-8")
    for path in (broken, tmp_path / "absent.yaml"):
        code, _, err = hansfree("run", path)
        assert code == 2
        assert path.name in sentence(err)


def test_a_suite_and_a_run_are_not_mistaken_for_each_other(hansfree, config):
    code, _, err = hansfree("suite", config())
    assert code == 2
    assert "hansfree run" in sentence(err)
    code, _, err = hansfree("run", config(variants={"a": {}}))
    assert code == 2
    assert "hansfree suite" in sentence(err)


def test_only_names_what_the_suite_has(hansfree, config, tmp_path):
    suite = config(seeds=[0], variants={"erm": {}, "smooth": {"method": {"name": "label-smoothing"}}})
    code, _, err = hansfree("suite", suite, "--only", "erm,smoth", "--out", tmp_path / "suite")
    assert code == 2
    assert "did you mean 'smooth'?" in sentence(err)
    assert not (tmp_path / "suite").exists()
    code, out, _ = hansfree("suite", suite, "--only", "smooth", "--dry-run")
    assert code == 0
    assert "smooth, seed 0: label-smoothing" in out
    assert "erm, seed 0" not in out


def test_a_folder_that_holds_another_run_is_left_alone(hansfree, config, finished):
    before = (finished / "results.json").read_bytes()
    for extra in ([], ["training.epochs=1", "--resume"]):
        code, _, err = hansfree("run", config(), *extra, "--out", finished)
        assert code == 2
        assert str(finished) in sentence(err)
    assert (finished / "results.json").read_bytes() == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(hansfree, config, finished):
    folder = RunFolder(finished)
    weights = (folder.exported / "model.safetensors").read_bytes()
    folder.results.unlink()
    folder.last.write_bytes(folder.last.read_bytes()[:1000])
    code, _, err = hansfree("run", config(), "--out", finished, "--resume")
    assert code == 2
    assert str(folder.last) in sentence(err)
    assert str(folder.previous) in err
    folder.last.unlink()
    code, _, err = hansfree("run", config(), "--out", finished, "--resume")
    assert code == 0, err
    assert (folder.exported / "model.safetensors").read_bytes() == weights


def test_a_teacher_for_other_classes_or_of_another_architecture(hansfree, config, finished, tmp_path):
    changes = {
        "method": {"name": "output-distillation"},
        "teacher": {"path": str(finished / "exported")},
        "benchmark": {"name": "coloured-digits", "limit": 300, "valid": 60, "test": 60},
    }
    described = finished / "exported" / "config.json"
    text = described.read_text()
    described.write_text(text.replace('"num_classes": 10', '"num_classes": 7'))
    code, _, err = hansfree("run", config(**changes), "--out", tmp_path / "run")
    assert code == 2
    assert "7 classes" in sentence(err)
    described.write_text(text.replace("small-cnn", "small-resnet"))
    code, _, err = hansfree("run", config(**changes), "--out", tmp_path / "other")
    assert code == 2
    assert "small-resnet" in sentence(err)


def test_a_loss_that_is_not_a_number_names_step_term_and_checkpoint(hansfree, config, tmp_path):
    settings = ["training.optimiser=sgd", "training.lr=1e38", "training.clip=null"]
    code, _, err = hansfree("run", config(), *settings, "--out", tmp_path / "run")
    assert code == 1
    assert "step" in sentence(err)
    assert "training.lr" in err


def test_a_full_disk_stops_the_run_and_loses_nothing(hansfree, config, tmp_path, monkeypatch):
    saved = torch.save
    seen = []

    def full(state, path):
        seen.append(path)
        if len(seen) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved(state, path)

    monkeypatch.setattr(torch, "save", full)
    code, _, err = hansfree("run", config(), "--out", tmp_path / "run")
    assert code == 1
    assert "free space" in sentence(err)
    monkeypatch.setattr(torch, "save", saved)
    assert not list((tmp_path / "run").rglob(f"{runs._TEMPORARY}*"))
    code, _, err = hansfree("run", config(), "--out", tmp_path / "run", "--resume")
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="needs a small file system of its own")
def test_a_really_full_disk(hansfree, config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        code, _, err = hansfree("run", config(model={"name": "small-cnn"}), "--out", disk / "run")
        assert code == 1
        assert "free space" in sentence(err)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_is_not_a_run(hansfree, tmp_path):
    for verb in ("evaluate", "report"):
        code, _, err = hansfree(verb, tmp_path)
        assert code == 2
        assert str(tmp_path) in sentence(err)


def test_interrupting_a_run_keeps_what_was_saved(config, finished, tmp_path):
    """Ctrl-C in the middle: exit code 130, one sentence, and resuming gives what an uninterrupted run gives."""
    path = config("long.yaml", training={"epochs": 40, "batch_size": 8, "optimiser": "adam"})
    command = [sys.executable, "-m", "hansfree", "run", str(path), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    checkpoint = RunFolder(tmp_path / "run").last
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in sentence(err)
    assert checkpoint.exists()
