"""What a method needs against what its benchmark gives: refused before anything is trained, N/A in a suite."""

import sys

import pytest
import torch
import yaml

from hansfree import cli
from hansfree.core import Batch, Benchmark, InputSpec, Method, Split
from hansfree.errors import UserError
from hansfree.experiment import check, run
from hansfree.parts import NotGivenError, RunConfig, check_needs, make_method, needs_of, teacher_config
from hansfree.plan import read_suite
from hansfree.runs import SuiteFolder, read_results
from hansfree.suite import cells_of, check_variants, run_cell, run_suite

HERE = "test_needs_parts"
PARTS = """
from torch import nn

from hansfree.errors import NotGivenError
from hansfree.methods import ERM


class Boxed(ERM):
    needs = frozenset({"boxes"})


class Late(ERM):
    needs = frozenset({"teacher"})

    def loss(self, batch):
        assert self.training and len(batch) == 2
        raise NotGivenError("Late needs snow, but there is none; wait.", "needs snow")


class Masking(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.conv(x)
        return self.fc((x * (x > 0)).mean((2, 3)))
"""


class PlainSplit(Split):
    def __init__(self, count, bias=None):
        self.label, self.bias = torch.arange(count) % 2, bias

    def batch(self, index, generator=None):
        return Batch(torch.rand(len(index), 3, 8, 8), self.label[index], index)


class Plain(Benchmark):
    """Two classes, and whatever ``gives`` and the splits' bias are set to."""

    name, classes, input = "plain", ("a", "b"), InputSpec(3, 8, 8)

    def __init__(self, gives=(), biased=()):
        self.gives, self.biased = frozenset(gives), biased

    def split(self, name):
        return PlainSplit(8, torch.zeros(8, dtype=torch.long) if name in self.biased else None)


@pytest.fixture
def needing(monkeypatch):
    """Registers a method with the given needs as ``needy``."""

    def register(*needs):
        from hansfree.methods import METHODS

        kind = type("Needy", (Method,), {"needs": frozenset(needs), "loss": lambda self, batch: {}})
        monkeypatch.setitem(METHODS, "needy", kind)

    return register


def config(**changes):
    told = {"benchmark": {"name": "plain"}, "model": {"name": "small-cnn"}, "method": {"name": "needy"}}
    return RunConfig.model_validate({**told, "training": {"epochs": 1}, **changes})


@pytest.mark.parametrize(
    ("need", "words", "enough"),
    [
        ("mask", "masks", Plain(["mask"])),
        ("boxes", "boxes", Plain(["boxes"])),
        ("clean", "unbiased images", Plain(["clean"])),
        ("bias", "bias labels", Plain(["bias"], ["train"])),
        ("bias:valid", "bias labels in validation", Plain([], ["valid"])),
    ],
)
def test_each_need_is_refused_in_one_sentence_and_met_where_it_is_given(needing, need, words, enough):
    needing(need)
    told = f"The method 'needy' needs {words}, but the benchmark plain gives none; choose"
    with pytest.raises(NotGivenError, match=told) as caught:
        make_method(config(), Plain(), None)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    assert caught.value.reason == f"needs {words}; plain gives none"
    check_needs(config(), enough)


@pytest.mark.parametrize("half", [Plain(["bias"]), Plain([], ["train"]), Plain(["bias"], ["valid"])])
def test_bias_in_training_must_be_there_for_the_training_split(needing, half):
    needing("bias")
    with pytest.raises(NotGivenError):
        check_needs(config(), half)


def test_bias_in_training_says_nothing_of_validation(needing):
    needing("bias:valid")
    with pytest.raises(NotGivenError, match="in validation"):
        check_needs(config(), Plain(["bias"], ["train"]))


@pytest.mark.parametrize("need", ["teacher", "bias-model"])
def test_what_the_config_brings_is_not_asked_of_the_benchmark(needing, need):
    needing(need)
    check_needs(config(), Plain())


@pytest.mark.parametrize("seen", ["clean", "noise", "mean", "black", "recombine"])
def test_what_the_teacher_sees_is_a_need_of_those_with_a_teacher(needing, seen):
    needing("teacher")
    need = "clean" if seen == "clean" else "mask"
    assert needs_of(config(teacher_input=seen)) == {"teacher", need}
    with pytest.raises(NotGivenError, match=f"teacher_input: {seen} needs .*; use teacher_input: input") as caught:
        check_needs(config(teacher_input=seen), Plain())
    assert caught.value.reason.startswith(f"teacher_input: {seen} needs ")
    check_needs(config(teacher_input=seen), Plain([need]))
    needing()
    assert needs_of(config(teacher_input=seen)) == set()
    check_needs(config(teacher_input=seen), Plain())


def test_the_selection_rule_needs_what_it_reads(needing):
    needing()
    assert needs_of(config(selection="worst_group_val")) == {"bias:valid"}
    assert needs_of(config(selection="conflicting_val")) == {"bias:valid"}
    with pytest.raises(NotGivenError, match="selection: worst_group_val needs bias labels in validation"):
        check_needs(config(selection="worst_group_val"), Plain())
    check_needs(config(selection="worst_group_val"), Plain([], ["valid"]))


# A run and a suite


@pytest.fixture
def parts(tmp_path, monkeypatch):
    (tmp_path / f"{HERE}.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield {
        "benchmark": {"name": "coloured-digits", "limit": 200, "valid": 40, "test": 40},
        "model": {"name": "small-cnn", "widths": [4, 8]},
        "training": {"epochs": 1, "batch_size": 32, "optimiser": "adam"},
    }
    sys.modules.pop(HERE, None)


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["hansfree", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, capsys.readouterr()


def test_a_run_is_refused_with_2_before_its_teacher_is_trained(parts, tmp_path, monkeypatch, capsys):
    teacher = {"train": {"training.epochs": 1}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**parts, "method": {"name": f"{HERE}:Boxed"}, "teacher": teacher}))
    code, said = command(monkeypatch, capsys, "run", path, "--out", tmp_path / "out")
    assert code == 2
    assert f"The method '{HERE}:Boxed' needs boxes, but the benchmark coloured-digits gives none" in said.err
    assert not (tmp_path / "out").exists()


def here(cells, jobs, device, watch):
    """Cells in this process, which needs no start."""
    return {c.label: run_cell(c.config.model_dump(), str(c.folder.path), device) for c in cells}


@pytest.fixture
def suite(parts, monkeypatch):
    monkeypatch.setattr("hansfree.suite.run_locally", here)
    boxed = {"method": {"name": f"{HERE}:Boxed"}}
    variants = {
        "erm": {"method": {"name": "erm"}},
        "boxed": {"title": "Boxed", **boxed},
        "tuned": {**boxed, "grid": {"training.lr": [0.1, 0.2]}},
    }
    return {**parts, "name": "some", "seeds": [0], "reference": "erm", "variants": variants}


def test_in_a_suite_it_is_no_error_but_a_row_that_says_why(suite, tmp_path, monkeypatch, capsys):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    code, said = command(monkeypatch, capsys, "suite", path, "--dry-run")
    assert code == 0 and "boxed, seed 0: N/A: needs boxes; coloured-digits gives none" in said.out
    code, said = command(monkeypatch, capsys, "suite", path, "--jobs", "1", "--out", tmp_path / "out")
    assert code == 0, said.err
    assert "N/A" in said.out and said.err == ""
    results = read_results(tmp_path / "out" / "results.json")
    status = {cell["variant"]: (cell["status"], cell["error"], cell["needs"]) for cell in results["cells"]}
    told = ("n/a", "needs boxes; coloured-digits gives none", ["boxes"])
    assert status == {"erm": ("done", None, []), "boxed": told, "tuned lr=0.1": told, "tuned lr=0.2": told}
    assert results["suite"]["grids"] == []
    for name in ("table.md", "table.csv", "table.tex", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert text.count("needs boxes; coloured-digits gives none") >= 3, name
        assert ("N/A" in text) == (name != "table.csv")
    assert not (tmp_path / "out" / "runs" / "boxed").exists()


def test_a_suite_of_nothing_else_still_says_so(suite, tmp_path):
    del suite["variants"]["erm"], suite["reference"]
    folder = run_suite(read_suite(suite), tmp_path / "out", jobs=1)
    assert {cell["status"] for cell in read_results(folder.results)["cells"]} == {"n/a"}
    assert "N/A" in folder.report.read_text()


def test_a_teacher_s_own_recipe_that_cannot_be_had_is_an_error(suite, tmp_path):
    suite["teacher"] = {"train": {"method": {"name": f"{HERE}:Boxed"}}}
    with pytest.raises(UserError, match=r"Variant 'erm': The method .* needs boxes"):
        run_suite(read_suite(suite), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_run_would_take_is_told_beforehand(parts):
    asked = RunConfig.model_validate({**parts, "method": {"name": "erm"}, "selection": "worst_group_val"})
    assert check(asked)["needs"] == "bias:valid"


# What shows only when a method meets its networks


def test_what_the_first_loss_refuses_is_a_row_that_says_why(suite, tmp_path):
    suite["teacher"] = {"train": {"training.epochs": 1}}
    suite["variants"] = {"erm": {"method": {"name": "erm"}}, "late": {"method": {"name": f"{HERE}:Late"}}}
    folder = run_suite(read_suite(suite), tmp_path / "out", jobs=1)
    told = {c["variant"]: (c["status"], c["error"]) for c in read_results(folder.results)["cells"]}
    assert told == {"erm": ("done", None), "late": ("n/a", "needs snow")}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "explanation-distillation", "last_layer": "free"}, "explainer": {"name": "lrp"}},
        {"method": {"name": "erm"}},  # LRP draws the report's heatmaps
    ],
)
def test_an_explainer_s_refusal_comes_before_the_teacher_is_trained(parts, changes, tmp_path):
    own = {"model": {"name": f"{HERE}:Masking"}, "evaluation": {"heatmaps": 0 if "explainer" in changes else 1}}
    asked = {**parts, **own, "teacher": {"train": {"training.epochs": 1}}, **changes}
    with pytest.raises(UserError, match="LRP has no rule for a mask"):
        run(RunConfig.model_validate(asked), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_heatmaps_no_explainer_is_asked(parts):
    asked = {**parts, "model": {"name": f"{HERE}:Masking"}, "method": {"name": "erm"}, "evaluation": {"heatmaps": 0}}
    check(RunConfig.model_validate(asked))


def test_a_config_may_call_a_variant_not_applicable_but_not_misspell_it(suite, tmp_path):
    judged = {"method": {"name": "rrr"}, "not_applicable": "the colour lies on the object"}
    suite["variants"]["rrr"] = judged
    cells = cells_of(read_suite(suite), SuiteFolder(tmp_path))
    assert check_variants(cells)["rrr"] == "the colour lies on the object"
    with pytest.raises(UserError, match="take not_applicable out"):
        run(next(cell.config for cell in cells if cell.variant == "rrr"), tmp_path / "out")
    judged["method"] = {"name": "rrr", "wieght": 1.0}
    with pytest.raises(UserError, match="did you mean 'weight'"):
        check_variants(cells_of(read_suite(suite), SuiteFolder(tmp_path)))


def test_a_teacher_is_not_called_what_its_student_is(parts):
    student = {"method": {"name": "output-distillation"}, "not_applicable": "no", "teacher": {"train": {}}}
    assert teacher_config(RunConfig.model_validate({**parts, **student})).not_applicable is None
