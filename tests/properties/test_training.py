"""The loop: order, schedules, clipping, stages, selection and what it refuses."""

import io
import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hansfree.core import TEST_SPLITS, Method, Setup, Stage
from hansfree.errors import DivergenceError, UserError
from hansfree.evaluation import Rule, Selection, spread_over_classes
from hansfree.explainers import GradientXInput
from hansfree.methods import ERM
from hansfree.torchvision_guard import import_torchvision
from hansfree.training import (
    Training,
    _ByBatch,
    batches,
    clip_adaptively,
    fit,
    make_accelerator,
    make_optimiser,
    make_schedule,
)


def training(**changes):
    return Training(**{"epochs": 2, "batch_size": 8, "optimiser": "adam", "lr": 0.01, **changes})


@pytest.fixture
def setup(build, tiny):
    student = build("erm").student
    return Setup(lambda: student, None, 48, 3, tiny.input)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 99))
def test_an_epoch_is_a_permutation_without_its_incomplete_end(samples, size, seed):
    order = batches(samples, min(size, samples), seed)
    seen = torch.cat([index for index, _ in order]).tolist()
    assert len(seen) == len(set(seen)) == samples // min(size, samples) * min(size, samples)
    again = batches(samples, min(size, samples), seed)
    assert all(torch.equal(a, b) and s == t for (a, s), (b, t) in zip(order, again))


def test_weights_draw_in_proportion():
    weights = torch.tensor([0.0, 1.0, 3.0])
    drawn = torch.cat([index for seed in range(300) for index, _ in batches(3, 3, seed, weights)])
    shares = drawn.bincount(minlength=3) / len(drawn)
    assert shares[0] == 0
    assert shares[2] == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 1.0, 99: 1.0}),
        ({"schedule": "step", "milestones": (2, 5)}, {0: 1.0, 19: 1.0, 20: 0.1, 49: 0.1, 50: 0.01}),
        ({"schedule": "cosine"}, {0: 1.0, 50: 0.5, 99: (1 + math.cos(math.pi * 0.99)) / 2}),
        ({"schedule": "cosine", "warmup": 0.1}, {0: 0.1, 4: 0.5, 9: 1.0, 55: 0.5}),
        ({"warmup": 0.1}, {0: 0.1, 9: 1.0, 60: 1.0}),
        ({"schedule": "one-cycle", "warmup": 0.2}, {0: 1 / 25, 99: 4e-4}),
    ],
)
def test_the_learning_rate_follows_its_schedule(changes, expected):
    asked = training(lr=2.0, optimiser="sgd", **changes)
    weight = nn.Parameter(torch.ones(1))
    optimiser = make_optimiser({"all": (weight,)}, asked)
    schedule = make_schedule(optimiser, asked, steps=100, per_epoch=10)
    rates = []
    for _ in range(100):
        rates.append(optimiser.param_groups[0]["lr"] / 2.0)
        optimiser.step()
        schedule.step()
    for step, share in expected.items():
        assert rates[step] == pytest.approx(share, abs=2e-3 if changes.get("schedule") == "one-cycle" else 1e-6)
    if changes.get("schedule") == "one-cycle":
        assert max(range(100), key=rates.__getitem__) in (19, 20)


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 9), (0.05, 19), (0.2, 4), (0.5, 1), (0.0, 1)])
def test_a_short_cycle_still_rises_from_its_start(warmup, steps):
    asked = training(schedule="one-cycle", warmup=warmup, lr=1.0, optimiser="sgd")
    optimiser = make_optimiser({"all": (nn.Parameter(torch.ones(1)),)}, asked)
    schedule = make_schedule(optimiser, asked, steps=steps, per_epoch=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates[0] == pytest.approx(1 / 25)
    assert all(0 < rate <= 1 for rate in rates)


def test_processes_share_a_batch_out_without_a_rest(setup, tiny):
    split = tiny.split("train")
    ((index, seed),) = batches(48, 48, 0)
    shares = [_ByBatch(split, rank, 3)[index, seed].index for rank in range(3)]
    assert torch.equal(torch.cat(shares), index)
    assert {len(share) for share in shares} == {16}
    three = SimpleNamespace(num_processes=3, process_index=0, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"training\.batch_size: 8 .* 3 processes"):
        list(fit(ERM(setup), tiny, training(), accelerator=three))


class TwoStages(Method):
    """First the head, then the rest with another learning rate, two groups each clipped apart."""

    def loss(self, batch):
        return {"label": nn.functional.cross_entropy(self.student(batch.images), batch.label)}

    def next_stage(self):
        head = tuple(self.student.get_classifier().parameters())
        rest = tuple(p for p in self.student.parameters() if all(p is not q for q in head))
        stages = (
            Stage("head", {"head": head}, {"epochs": 1}),
            Stage("all", {"head": head, "rest": rest}, {"lr": 0.001}, weights=torch.ones(48)),
        )
        return stages[self.stages_done] if self.stages_done < 2 else None


def test_stages_train_their_groups_with_their_settings_and_resume_anywhere(setup, tiny):
    method = TwoStages(setup)
    first = {key: value.clone() for key, value in method.state_dict().items()}
    saved, steps = {}, []
    for step in fit(method, tiny, training(clip=0.01), seed=1):
        steps.append(step)
        if len(steps) in (3, 6, 9):
            saved[len(steps)] = io.BytesIO()
            torch.save(step.snapshot(), saved[len(steps)])
        if step.stage == "head":
            assert torch.equal(method.student.network.convs[0].weight, first["student.network.convs.0.weight"])
    assert [step.stage for step in steps] == ["head"] * 6 + ["all"] * 12
    assert {rate for step in steps[6:] for rate in step.lr.values()} == {0.001}
    assert set(steps[-1].grad_norm) == {"head", "rest"}
    final = {key: value.clone() for key, value in method.state_dict().items()}
    for file in saved.values():
        file.seek(0)
        resumed = TwoStages(setup)
        resumed.load_state_dict(first)
        for _ in fit(resumed, tiny, training(clip=0.01), seed=1, resume=torch.load(file, weights_only=True)):
            pass
        assert all(torch.equal(final[key], value) for key, value in resumed.state_dict().items())


def test_a_stage_s_own_length_replaces_the_run_s(setup, tiny):
    stages = [step.stage for step in fit(TwoStages(setup), tiny, training(epochs=None, steps=4))]
    assert stages == ["head"] * 6 + ["all"] * 4


@pytest.mark.parametrize("key", ["validate_every", "save_every"])
def test_a_stage_cannot_change_what_holds_for_the_run(key, setup, tiny):
    class Impatient(TwoStages):
        def next_stage(self):
            return Stage("head", overrides={key: 2})

    with pytest.raises(UserError, match=f"stage 'head' of the method changes {key}, which holds for a whole run"):
        next(iter(fit(Impatient(setup), tiny, training())))


def test_a_snapshot_stays_what_it_was(setup, tiny):
    method = ERM(setup)
    for step in fit(method, tiny, training()):
        if step.step == 4:
            snapshot = step.snapshot()
    final = {key: value.clone() for key, value in method.state_dict().items()}
    for _ in range(2):  # the first use must not spoil the second
        for _ in fit(method, tiny, training(), resume=snapshot):
            pass
        assert all(torch.equal(final[key], value) for key, value in method.state_dict().items())


def test_one_process_may_change_precision_and_device(build, tiny):
    losses = {}
    for precision in ("fp32", "bf16", "fp32"):
        steps = fit(build("output-distillation"), tiny, training(precision=precision, epochs=1))
        losses.setdefault(precision, []).append([step.loss for step in steps])
    assert losses["fp32"][0] == losses["fp32"][1]
    assert losses["bf16"][0] != losses["fp32"][0]
    assert losses["bf16"][0][0] == pytest.approx(losses["fp32"][0][0], rel=0.2)
    fastest = make_accelerator().device
    assert make_accelerator(device="cpu").device.type == "cpu"
    assert make_accelerator().device == fastest


def test_clipping_bounds_what_the_optimiser_sees(setup, tiny):
    method = ERM(setup)
    before = [p.clone() for p in method.parameters()]
    plain = training(steps=1, epochs=None, optimiser="sgd", momentum=0.0, lr=1.0, clip=1e-3)
    (step,) = fit(method, tiny, plain)
    moved = torch.cat([(p - q).flatten() for p, q in zip(method.parameters(), before)])
    assert step.grad_norm["train"] > 1e-3
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


class Broken(ERM):
    def loss(self, batch):
        bad = torch.tensor(float("nan")) if int(batch.index[0]) >= 0 and self.training else torch.tensor(0.0)
        return {**super().loss(batch), "bad": bad}


class Steep(ERM):
    def loss(self, batch):
        value = sum((p * 0).abs().sum().sqrt() for p in self.parameters())  # an infinite gradient at zero
        return {"label": value}


def test_numbers_that_are_not_stop_the_loop_with_step_and_term(setup, tiny):
    with pytest.raises(DivergenceError, match=r"'bad' became nan in step 1 of stage 'train'"):
        list(fit(Broken(setup), tiny, training()))
    with pytest.raises(DivergenceError, match=r"gradient of the group 'train'.*step 1"):
        list(fit(Steep(setup), tiny, training()))


def test_length_is_given_once(setup, tiny):
    with pytest.raises(UserError, match=r"training\.epochs or training\.steps"):
        list(fit(ERM(setup), tiny, Training(batch_size=8)))
    with pytest.raises(ValueError, match="either epochs or steps"):
        Training(epochs=1, steps=1)
    with pytest.raises(ValueError, match="needs milestones"):
        Training(epochs=1, schedule="step")


@pytest.mark.parametrize("rule", get_args(Rule))
def test_no_rule_but_oracle_reaches_a_test_split(rule, build, tiny):
    selection = Selection(rule, tiny, GradientXInput())
    method = build("erm")
    metrics, _ = selection.validate(method, 16, "cpu")
    assert math.isfinite(selection.score(metrics))
    for name in TEST_SPLITS:
        if rule == "oracle":
            selection.split(name)
        else:
            with pytest.raises(PermissionError, match=name):
                selection.split(name)
    assert ("valid_ood" in tiny.asked) == (rule == "ood_val")
    touched = set(tiny.asked) & set(TEST_SPLITS)
    assert touched == (set(TEST_SPLITS) if rule == "oracle" else set())


def test_rules_prefer_what_they_say(tiny):
    early = {"loss": 1.0, "acc": 0.9, "acc_wg": 0.1, "acc_bc": 0.1, "ood_val": 0.3, "oracle": 0.5}
    late = {"loss": 0.5, "acc": 0.8, "acc_wg": 0.2, "acc_bc": 0.2, "ood_val": 0.4, "oracle": 0.4}
    better = {"iid_val": early, "iid_val_loss": late, "worst_group_val": late, "ood_val": late, "oracle": early}
    better["conflicting_val"] = late
    for rule, wanted in better.items():
        score = Selection(rule, tiny).score
        assert max((early, late), key=score) is wanted
    assert Selection("last", tiny).score(late) >= Selection("last", tiny).score(early)


@pytest.mark.parametrize("rule", ["worst_group_val", "conflicting_val"])
def test_rules_over_groups_need_a_known_bias(rule, build, tiny, monkeypatch):
    split = tiny.split("valid")
    split.bias = None
    monkeypatch.setattr(tiny, "split", lambda name: split)
    with pytest.raises(UserError, match="bias"):
        Selection(rule, tiny).validate(build("erm"), 16, "cpu")


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 12))
def test_samples_for_heatmaps_take_turns_over_classes(labels, count):
    label = torch.tensor(labels)
    chosen = label[spread_over_classes(label, count)].bincount(minlength=5)
    missing = label.bincount(minlength=5) - chosen
    assert chosen.sum() == min(count, len(labels))
    most = int(chosen.max())
    assert all(int(c) >= most - 1 for c, m in zip(chosen, missing) if m > 0)


def test_adaptive_clipping_is_that_of_the_b_cos_package_and_shortens_units_alone():
    import_torchvision()  # before bcos, which imports it too
    pytest.importorskip("bcos")
    from bcos.training.agc import adaptive_clip_grad_

    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(*shape)) for shape in ((5, 4), (3, 2, 3, 3), (7,))]
    with torch.no_grad():
        parameters[0][0] = 0  # a unit of no length may still move
    for scale in (0.001, 1.0, 100.0):
        gradients = [scale * torch.randn_like(p) for p in parameters]
        found = []
        for clip in (adaptive_clip_grad_, clip_adaptively):
            for p, g in zip(parameters, gradients):
                p.grad = g.clone()
            clip(parameters, 0.01)
            found.append([p.grad for p in parameters])
        for theirs, ours, before in zip(*found, gradients):
            torch.testing.assert_close(ours, theirs)
            cosines = nn.functional.cosine_similarity(
                ours.flatten(1 if ours.ndim > 1 else 0), before.flatten(1 if ours.ndim > 1 else 0), dim=-1
            )
            torch.testing.assert_close(cosines, torch.ones_like(cosines))


def test_adaptive_clipping_bounds_what_a_step_moves(setup, tiny):
    method = ERM(setup)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    ratio = 0.01
    for _ in fit(
        method, tiny, Training(steps=1, optimiser="sgd", momentum=0.0, lr=1.0, clip=None, adaptive_clip=ratio)
    ):
        pass
    for name, p in method.named_parameters():
        rows = before[name].view(len(p), -1) if p.ndim > 1 else before[name].view(1, -1)
        moved = (p.detach() - before[name]).view_as(rows).norm(dim=1)
        assert (moved <= ratio * rows.norm(dim=1).clamp_min(1e-3) * 1.001).all()
        assert moved.any()
