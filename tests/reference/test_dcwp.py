"""Mining of conflicting samples and debiased contrastive weight pruning again, slowly, from their papers and code."""

import copy
import io
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from hansfree.errors import UserError
from hansfree.methods.conflict_mining import Mining
from hansfree.methods.dcwp import conflict_contrast
from hansfree.training import Training, fit

SHORT = {"mining_epochs": 1, "mask_epochs": 1, "fine_tune_epochs": 1}
TRAINING = Training(epochs=1, batch_size=8, optimiser="adam", lr=0.01)


@pytest.fixture
def batch(tiny):
    return tiny.split("train").batch(torch.arange(20))


def snapshots(method, benchmark):
    """The state before the first step and after each one, and the stages they are of."""
    states, stages = [copy.deepcopy(method.state_dict())], []
    for step in fit(method, benchmark, TRAINING, seed=3):
        states.append(copy.deepcopy(method.state_dict()))
        stages.append(step.stage)
    return states, stages


def moved(before, after, module, prefix):
    return any(not torch.equal(before[prefix + name], after[prefix + name]) for name, _ in module.named_parameters())


def test_an_epoch_ensemble_is_the_mean_doubt_over_epochs(build, tiny):
    network = build("erm").student.train()
    mining = Mining(48, "epoch-ensemble", threshold=0.6)
    doubts = {}
    for start in (0, 8, 0, 4):
        batch = tiny.split("train").batch(torch.arange(start, start + 8))
        mining.observe(network, batch)
        with torch.no_grad():
            for i, y, row in zip(batch.index.tolist(), batch.label.tolist(), network.eval()(batch.images).softmax(1)):
                doubts.setdefault(i, []).append(1 - row[y].item())
            network.train()
            for parameter in network.parameters():
                parameter.mul_(1.3)
    means = {i: sum(values) / len(values) for i, values in doubts.items()}
    assert [len(doubts[i]) for i in (0, 5, 9, 15)] == [2, 3, 2, 1]
    expected = [means.get(i, 0.0) for i in range(48)]
    assert mining.score.tolist() == pytest.approx(expected, rel=1e-5)
    assert mining.conflicting().tolist() == [value > 0.6 for value in expected]
    assert mining.conflicting().any() and not mining.conflicting()[:16].all()


def test_the_ensembles_network_learns_only_what_it_believes(batch):
    logits = 4 * torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    losses = [math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(logits.tolist(), batch.label.tolist())]
    believed = [loss for loss in losses if math.exp(-loss) > 0.2]
    assert 0 < len(believed) < 20
    mining = Mining(48, "epoch-ensemble", confidence=0.2)
    assert mining.loss(logits, batch).item() == pytest.approx(sum(believed) / len(believed), rel=1e-5)
    doubted = F.one_hot((batch.label + 1) % 3, 3) * 30.0
    assert mining.loss(doubted, batch) == 0


def test_what_the_biased_network_last_got_wrong_is_mined(build, batch):
    network, mining = build("erm").student, Mining(48)
    mining.observe(network, batch)
    for parameter in network.parameters():
        parameter.data.mul_(-1)
    mining.observe(network, batch)
    wrong = network.eval()(batch.images).argmax(1) != batch.label
    assert mining.conflicting().tolist() == wrong.tolist() + [False] * 28
    assert 0 < wrong.sum() < 20


def test_the_contrast_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(10, 4, dtype=torch.float64, generator=generator)
    label, conflicting = torch.arange(10) % 3, torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0, 0]).bool()
    rows = features.tolist()

    def cosine(i, j):
        return sum(a * b for a, b in zip(rows[i], rows[j])) / math.hypot(*rows[i]) / math.hypot(*rows[j])

    anchors = []
    for i in range(10):
        others = [j for j in range(10) if j != i]
        positive = [j for j in others if label[j] == label[i] and conflicting[j]]
        total = sum(math.exp(cosine(i, a) / 0.3) for a in others)
        shares = [math.log(math.exp(cosine(i, p) / 0.3) / total) for p in positive]
        anchors += [-sum(shares) / len(shares)] if shares else []
    assert len(anchors) == 6  # not class 2, and of class 1 not its only conflicting one
    found = conflict_contrast(features, label, conflicting, 0.3).item()
    assert found == pytest.approx(sum(anchors) / len(anchors), rel=1e-9)


def test_the_contrast_without_conflicting_samples_is_nothing():
    features = torch.randn(6, 4, requires_grad=True)
    found = conflict_contrast(features, torch.arange(6) % 2, torch.zeros(6, dtype=torch.bool), 0.07)
    found.backward()
    assert found == 0 and features.grad is not None and features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("relaxation", "kept"),
    [
        ("double-sigmoid", lambda pi: 1 / (1 + math.exp(-1 / (1 + math.exp(-pi))))),
        ("concrete", lambda pi: 1 / (1 + math.exp(-pi))),
    ],
)
@pytest.mark.parametrize("start", [-3.0, 1.5])
def test_how_often_a_weight_is_kept_while_masks_are_learnt(relaxation, kept, start, build):
    method = build("dcwp", relaxation=relaxation, start=start)
    torch.manual_seed(0)
    draws = torch.cat([mask.flatten() for _ in range(12) for mask in method.drawn().values()])
    torch.testing.assert_close(draws, draws.round(), atol=1e-6, rtol=0)
    assert set(draws.round().tolist()) == {0.0, 1.0}
    expected = kept(start)
    assert draws.mean().item() == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(draws)))


def test_each_stage_trains_its_own_and_cut_weights_stay_zero(build, tiny):
    method = build("dcwp", start=0.0, mask_lr=0.1, fine_tune_lr=0.01, **SHORT)
    states, stages = snapshots(method, tiny)
    assert stages == [stage for stage in ("mine", "train", "masks", "fine-tune") for _ in range(6)]
    for (before, after), stage in zip(itertools.pairwise(states), stages):
        assert moved(before, after, method.masks, "masks.") == (stage == "masks")
        if stage == "masks" and before["stages_done"] == after["stages_done"]:
            assert not moved(before, after, method.student, "student.")
    weights = dict(method.student.named_parameters())
    for name, kept in method.masks.kept.items():
        assert torch.equal(kept, method.masks.logits[name] >= 0)
        assert torch.equal(weights[name] != 0, kept)
    share = torch.cat([kept.flatten() for kept in method.masks.kept.values()]).float().mean()
    assert 0 < share < 1


def test_the_control_cuts_nothing(build, tiny):
    method = build("dcwp", masks="none", **SHORT)
    _, stages = snapshots(method, tiny)
    assert "masks" not in stages and stages[-1] == "fine-tune"
    assert all((parameter != 0).any() for parameter in method.student.parameters())
    assert all(kept.all() for kept in method.masks.kept.values())


def test_mined_samples_weigh_more(build):
    method = build("dcwp", upweight=30, mask_upweight=70)
    method.mining.wrong = torch.arange(48) % 5 == 0
    for stage, weight in (("mine", None), ("train", None), ("masks", 70), ("fine-tune", 30)):
        next_stage = method.next_stage()
        assert next_stage.name == stage
        expected = None if weight is None else [weight if i % 5 == 0 else 1 for i in range(48)]
        assert (None if next_stage.weights is None else next_stage.weights.tolist()) == expected
        super(type(method), method).finish_stage()
    assert method.next_stage() is None


def test_resuming_in_each_stage_gives_the_same_weights_to_the_bit(build, tiny):
    whole, saved = build("dcwp", **SHORT), []
    for number, step in enumerate(fit(whole, tiny, TRAINING, seed=3)):
        if number in (8, 14, 17, 20):
            file = io.BytesIO()
            torch.save(step.snapshot(), file)
            saved.append(file)
    for file in saved:
        file.seek(0)
        resumed = build("dcwp", seed=9, **SHORT)
        for _ in fit(resumed, tiny, TRAINING, seed=3, resume=torch.load(file, weights_only=True)):
            pass
        first, second = whole.state_dict(), resumed.state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "chosen",
    [
        {"detection": "guess"},
        {"relaxation": "soft"},
        {"masks": "random"},
        {"threshold": 1.0},
        {"mask_epochs": 0},
        {"upweight": 0.0},
        {"contrast_weight": -1.0},
    ],
)
def test_settings_without_meaning_are_refused(chosen, build):
    with pytest.raises(UserError, match=next(iter(chosen))):
        build("dcwp", **chosen)
