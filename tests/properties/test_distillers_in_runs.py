"""Distillers with state of their own, in the loop and in runs: resumed anywhere they end the same, to the bit."""

import io
import json
import subprocess
import sys

import pytest
import torch

from hansfree.config import apply_overrides, parse
from hansfree.errors import UserError
from hansfree.experiment import check, run
from hansfree.explainers import GradCAM
from hansfree.parts import RunConfig
from hansfree.training import Training, fit

FULL_BANK = {"name": "crd", "bank": "full", "negatives": 20, "dimensions": 8}
CONFIG = {
    "name": "tried",
    "benchmark": {"name": "coloured-digits", "limit": 300, "valid": 60, "test": 60},
    "model": {"name": "small-cnn", "widths": [4, 8]},
    "teacher": {"model": {"name": "small-resnet", "widths": [4, 8]}},
    "method": {"name": "e2kd", "base": FULL_BANK, "every": 2},
    "explainer": {"name": "grad-cam"},
    "training": {"epochs": 3, "batch_size": 64, "optimiser": "adamw"},
    "evaluation": {"heatmaps": 0},
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("crd", {"bank": "full", "negatives": 20}),
        ("crd", {"negatives": 20}),
        ("e2kd", {"explainer": GradCAM(), "base": FULL_BANK, "every": 3}),
        ("review-kd", {"warmup_epochs": 3}),
    ],
)
def test_resuming_finds_banks_and_counts_as_they_were(name, settings, build, tiny):
    training = Training(epochs=3, batch_size=8, optimiser="adam", lr=0.01)
    whole, saved = build(name, **settings), {}
    for step in fit(whole, tiny, training, seed=3):
        if step.step in (7, 12):
            saved[step.step] = io.BytesIO()
            torch.save(step.snapshot(), saved[step.step])
    for file in saved.values():
        file.seek(0)
        resumed = build(name, seed=9, **settings)
        for _ in fit(resumed, tiny, training, seed=3, resume=torch.load(file, weights_only=True)):
            pass
        for before, after in zip(everything(whole), everything(resumed), strict=True):
            assert torch.equal(before, after)


def everything(method):
    """Parameters and buffers, those too that no checkpoint holds."""
    return [*method.parameters(), *method.buffers()]


def test_the_full_bank_is_no_part_of_the_method_s_state_and_the_queue_is(build):
    full, queue = build("crd", bank="full"), build("crd")
    assert not any("bank" in key for key in full.state_dict())
    assert {key for key in queue.state_dict() if "bank" in key} == {
        f"bank.{name}" for name in ("ours", "theirs", "index", "position")
    }
    assert full.apart().keys() == {"ours", "theirs"} and queue.apart() == {}


def test_a_shared_student_is_saved_once(build):
    sizes = {}
    for name, settings in {"e2kd": {"explainer": GradCAM()}, "kd": {}}.items():
        file = io.BytesIO()
        torch.save(build(name, **settings).state_dict(), file)
        sizes[name] = len(file.getvalue())
    assert len({id(p) for p in build("e2kd", explainer=GradCAM()).parameters()}) == len(list(build("kd").parameters()))
    assert sizes["e2kd"] < 2 * sizes["kd"]


class Stop(Exception):
    pass


def test_a_run_keeps_the_full_bank_in_a_file_for_resuming_alone(tmp_path):
    config = parse(RunConfig, CONFIG)
    whole = run(config, tmp_path / "whole", report=False)

    def stop(what, step, steps):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        run(config, tmp_path / "run", on_step=stop, report=False)
    folder = tmp_path / "run"
    (bank,) = (folder / "checkpoints").glob("apart-*.pt")
    assert torch.load(bank, weights_only=True)["ours"].shape == (180, 8)
    held = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert "apart" not in held["fit"] and not any("bank" in key for key in held["fit"]["method"])
    good = bank.read_bytes()
    bank.write_bytes(good[:100])
    with pytest.raises(UserError, match=f"The checkpoint {bank} is damaged"):
        run(config, folder, resume=True, report=False)
    bank.write_bytes(good)
    resumed = run(config, folder, resume=True, report=False)
    weights = [(done.exported / "model.safetensors").read_bytes() for done in (resumed, whole)]
    assert weights[0] == weights[1]
    assert len(list((whole.path / "checkpoints").glob("apart-*.pt"))) == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.base.temperature=0", "method.temperature must be above 0"),
        ("method.base={name: crd, bnak: full}", "The base method 'crd' has no setting 'bnak'"),
        ("method.base=crd2", "There is no base method 'crd2'"),
        ("explainer=null", "The method 'e2kd' needs an explainer"),
    ],
)
def test_a_base_is_a_section_of_the_config(override, said):
    plain = apply_overrides(CONFIG, ["method.base={}"])
    assert check(parse(RunConfig, apply_overrides(plain, ["method.base.temperature=5"])))["needs"] == "teacher"
    with pytest.raises(UserError, match=said):
        check(parse(RunConfig, apply_overrides(plain, [override])))


IN_PROCESSES = """
import json
import torch
from hansfree.benchmarks import ColouredDigits
from hansfree.core import Setup, Teacher
from hansfree.explainers import GradCAM
from hansfree.methods import METHODS
from hansfree.models import load_model
from hansfree.training import Training, fit, make_accelerator

def network(name):
    return load_model(name, num_classes=10, options={"widths": [4, 8], "norm": "none"})

torch.manual_seed(0)
digits = ColouredDigits(limit=200, valid=40, test=40)
label = digits.split("train").label
setup = Setup(lambda: network("small-cnn"), Teacher.live(network("small-resnet")), len(label), 10, digits.input, label)
method = METHODS["e2kd"](setup, explainer=GradCAM(), base={"name": "crd"}, every=2)
here = make_accelerator(device="cpu")
steps = list(fit(method, digits, Training(steps=6, batch_size=16, lr=0.1), accelerator=here))
if here.is_main_process:
    print(json.dumps([[step.grad_norm["train"] for step in steps], method.base.bank.index[:96].tolist()]))
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_remember_the_same(tmp_path):
    script = tmp_path / "distil.py"
    script.write_text(IN_PROCESSES)
    norms, banks = [], []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        norm, bank = json.loads(done.stdout.splitlines()[-1])
        norms.append(norm)
        banks.append(bank)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert banks[1] == banks[0]
