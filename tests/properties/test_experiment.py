"""A run: stopped anywhere and resumed it is the same run; what goes wrong is named."""

import json

import pytest
import torch

from hansfree.checkpoints import Keeper
from hansfree.config import merge, parse
from hansfree.errors import UserError
from hansfree.experiment import run
from hansfree.outcome import flags
from hansfree.parts import RunConfig
from hansfree.runs import RunFolder

CONFIG = {
    "name": "tried",
    "benchmark": {"name": "coloured-digits", "limit": 300, "valid": 60, "test": 60},
    "model": {"name": "small-cnn", "widths": [4, 8], "norm": "batch"},
    "teacher": {"train": {"benchmark.colouring": "random", "training.epochs": 1, "model.norm": "scale"}},
    "method": {"name": "explanation-distillation"},
    "explainer": {"name": "lrp", "epsilon": [0.01, 0.1]},
    "training": {"epochs": 3, "batch_size": 32, "optimiser": "adam"},
    "evaluation": {"heatmaps": 4},
}


def config(**changes):
    return parse(RunConfig, merge(CONFIG, changes))


def without_time(value):
    if isinstance(value, dict):
        return {key: without_time(item) for key, item in value.items() if key != "time"}
    return [without_time(item) for item in value] if isinstance(value, list) else value


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(config(), tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize("settings", [{}, {"training.save_every": 2}])
def test_a_run_that_is_stopped_again_and_again_ends_the_same(whole, tmp_path, settings):
    expected = whole if not settings else run(config(**settings), tmp_path / "whole")
    stops = iter([3, 2, 7, 11, 5, 13])

    def stop_after(count):
        def on_step(what, step, steps):
            nonlocal count
            count -= 1
            if count == 0:
                raise Stop

        return on_step

    for count in stops:
        try:
            run(config(**settings), tmp_path / "run", resume=True, on_step=stop_after(count))
        except Stop:
            continue
        break
    folder = run(config(**settings), tmp_path / "run", resume=True)
    for name in ("exported/model.safetensors", "exported/config.json", "figures/heatmaps.npz", "config.yaml"):
        assert (folder.path / name).read_bytes() == (expected.path / name).read_bytes(), name
    assert without_time(folder.read_metrics()) == without_time(expected.read_metrics())
    results = [json.loads(f.results.read_text()) for f in (folder, expected)]
    assert without_time(results[0]) == without_time(results[1])


def test_rows_follow_the_schema(whole):
    results = json.loads(whole.results.read_text())
    assert results["schema"] == 1
    keys = {"benchmark", "variant", "method", "explainer", "model", "seed", "split", "tier", "group", "metric"}
    keys |= {"measured_with", "value", "selection"}
    for row in results["rows"]:
        assert set(row) == keys
        assert isinstance(row["value"], float)
    rows = {(r["model"], r["split"], r["metric"]): r["value"] for r in results["rows"] if r["group"] is None}
    for model in ("student", "teacher"):
        assert rows[model, None, "gap"] == pytest.approx(rows[model, "iid", "acc"] - rows[model, "shift", "acc"])
    assert {r["selection"] for r in results["rows"]} == {"iid_val_loss"}
    (cell,) = results["cells"]
    assert cell["needs"] == ["teacher"]


def test_the_best_checkpoint_is_the_one_reported(whole):
    seen = [line for line in whole.read_metrics() if line["event"] == "valid" and line["epoch"] >= 0]
    best = min(seen, key=lambda line: line["metrics"]["loss"])
    loaded = torch.load(whole.best, weights_only=True)
    assert loaded["epoch"] == best["epoch"]
    rows = json.loads(whole.results.read_text())["rows"]
    (loss,) = [r["value"] for r in rows if r["metric"] == "loss"]
    assert loss == pytest.approx(best["metrics"]["loss"])


def test_training_never_touches_a_test_split(tmp_path, monkeypatch):
    from hansfree import experiment

    trained = experiment.train

    def guarded(config, method, benchmark, *rest):
        asked = []
        real = benchmark.split
        monkeypatch.setattr(benchmark, "split", lambda name: asked.append(name) or real(name))
        done = trained(config, method, benchmark, *rest)
        assert set(asked) <= {"train", "valid"}, asked
        return done

    monkeypatch.setattr(experiment, "train", guarded)
    run(config(**{"method": {"name": "output-distillation"}, "explainer": None}), tmp_path / "run")


@pytest.mark.parametrize("selection", ["last", "iid_val", "worst_group_val", "ood_val", "oracle"])
def test_every_rule_carries_through_to_the_rows(selection, tmp_path):
    short = config(**{"method": {"name": "erm"}, "teacher": None, "explainer": None, "selection": selection})
    folder = run(short, tmp_path / "run", report=False)
    assert {r["selection"] for r in json.loads(folder.results.read_text())["rows"]} == {selection}


def test_the_teacher_may_see_clean_twins(tmp_path):
    folder = run(config(teacher_input="clean"), tmp_path / "run", report=False)
    (cell,) = json.loads(folder.results.read_text())["cells"]
    assert cell["needs"] == ["clean", "teacher"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation.splits": ["idd"]}, "did you mean 'iid'"),
        ({"teacher": {"train": None, "path": "absent"}}, r"teacher\.path: absent"),
        ({"teacher.path": "absent"}, "exactly one of path, model and train"),
    ],
)
def test_what_cannot_work_is_said_before_the_folder_is_claimed(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        run(config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_precision_is_told(tmp_path):
    folder = run(config(**{"training.precision": "bf16", "training.epochs": 1}), tmp_path / "run", report=False)
    assert json.loads(folder.environment.read_text())["precision"] == "bf16"


@pytest.mark.parametrize(("loss", "acc", "flagged"), [(0.5, 0.2, True), (0.5, 0.6, False), (0.9, 0.2, False)])
def test_a_low_loss_with_a_low_accuracy_is_flagged(tmp_path, loss, acc, flagged):
    folder = RunFolder(tmp_path)
    folder.append_metrics([{"event": "valid", "metrics": {"loss": 1.0, "acc": 0.1}}])
    assert bool(flags(folder, {"loss": loss, "acc": acc}, 0.9)) is flagged
    assert not flags(folder, {"loss": loss, "acc": acc}, None)


def test_a_new_stage_selects_anew(build, tmp_path):
    """A first stage's student, however good in validation, is not yet the method's."""
    keeper = Keeper(RunFolder(tmp_path / "run"), active=True)
    method = build("erm")
    wanted = {}
    for stage, score in (("first", 0.9), ("first", 0.8), ("second", 0.5), ("second", 0.4)):
        torch.nn.init.normal_(next(method.parameters()))
        keeper.offer(method, score, {"stage": stage, "step": 1, "epoch": 0})
        if score == 0.5:
            wanted = {name: value.clone() for name, value in method.state_dict().items()}
    keeper.restore_best(method)
    assert all(torch.equal(value, wanted[name]) for name, value in method.state_dict().items())
