"""What every method promises, whatever its paper: a new entry of METHODS is tested here without a line."""

import copy
import io
import sys

import pytest
import torch

from hansfree.core import Method, Setup
from hansfree.errors import UserError
from hansfree.explainers import LRP
from hansfree.methods import METHODS
from hansfree.training import Training, fit

TRAINING = Training(epochs=2, batch_size=8, optimiser="adam", lr=0.01)


def tensors(state):
    return {name: value.clone() for name, value in state.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", METHODS)
def test_terms_are_finite_scalars_and_every_weight_gets_a_gradient(name, build, tiny):
    method = build(name).train()
    for start in (0, 16):
        terms = method(tiny.split("train").batch(torch.arange(start, start + 16)))
        assert terms
        assert all(term.shape == () and term.isfinite() for term in terms.values())
        sum(terms.values()).backward()
    missed = [
        key for key, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())
    ]
    assert not missed


@pytest.mark.parametrize("name", METHODS)
def test_it_fits_one_batch(name, build, tiny):
    # By default no stage of neuron differentiation has the run's own length.
    own = {"theta": "cross-entropy"} if name == "neuron-differentiation" else {}
    method = build(name, norm="scale", **own)  # biases make explanations hard to match
    one_batch = Training(steps=80, batch_size=48, optimiser="adam", lr=0.02)
    # Of several stages the one whose length is the run's own: others have other losses.
    losses = [step.loss for step in fit(method, tiny, one_batch) if step.steps == one_batch.steps]
    share = 0.95 if name == "linear-probe" else 0.9  # six features that stay as they are
    assert sum(losses[-5:]) < share * sum(losses[:5])


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_is_never_part_of_it_and_never_moves(name, build, tiny):
    method = build(name)
    teacher = method.teacher.model
    before = tensors(teacher.state_dict())
    owned = {id(p) for p in method.parameters()} | {id(b) for b in method.buffers()}
    assert not owned & {id(t) for t in (*teacher.parameters(), *teacher.buffers())}
    assert not any("teacher" in key for key in method.state_dict())
    for _ in fit(method, tiny, TRAINING):
        pass
    assert equal(before, teacher.state_dict())
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_pure_and_validation_draws_are_fixed(name, build, tiny):
    method = build(name).eval()
    before, state = tensors(method.state_dict()), torch.get_rng_state()
    whole = tiny.split("valid").batch(torch.arange(24))
    with torch.no_grad():
        first, second = method.loss(whole), method.loss(whole)
        halves = [method.loss(tiny.split("valid").batch(index)) for index in torch.arange(24).split(12)]
    assert equal(first, second)
    for term, value in first.items():
        torch.testing.assert_close(sum(half[term] for half in halves) / 2, value)
    assert equal(before, method.state_dict())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", METHODS)
def test_resuming_anywhere_gives_the_same_weights_to_the_bit(name, build, tiny):
    whole = build(name)
    saved = {}
    for step in fit(whole, tiny, TRAINING, seed=3):
        if step.step in (4, 6):  # in the middle of an epoch and at its end
            file = io.BytesIO()
            torch.save(step.snapshot(), file)
            saved[step.step] = file
    for file in saved.values():
        file.seek(0)
        torch.rand(17)
        resumed = build(name, seed=9)
        for _ in fit(resumed, tiny, TRAINING, seed=3, resume=torch.load(file, weights_only=True)):
            pass
        assert equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_what_it_needs_is_asked_for_in_one_sentence(name, build, tiny):
    student, train = copy.deepcopy(build(name).student), tiny.split("train")
    bias = train.bias if "bias" in METHODS[name].needs else None
    setup = Setup(lambda: student, None, 48, 3, tiny.input, label=train.label, bias=bias)
    explains = {"explainer": LRP()} if "explainer" in METHODS[name].__init__.__annotations__ else {}
    if "teacher" not in METHODS[name].needs:
        assert isinstance(METHODS[name](setup, **explains), Method)
        return
    with pytest.raises(UserError, match="needs a teacher"):
        METHODS[name](setup, **explains)


@pytest.mark.parametrize("name", METHODS)
def test_it_has_a_card(name):
    card = sys.modules[METHODS[name].__module__].__doc__
    for part in ("Formula.", "Source.", "Supervision.", "Cost."):
        assert f"\n{part}" in card, f"{name} lacks {part}"
