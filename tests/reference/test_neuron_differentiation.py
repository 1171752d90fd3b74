"""Neuron differentiation: losses, draws and rules again, slowly; what its stages leave behind; resuming in each."""

import copy
import io
import math

import pytest
import torch
from torch.nn import functional as F

from hansfree.errors import UserError
from hansfree.evaluation import judge
from hansfree.masks import iou_by_layer, masked, reserved
from hansfree.methods.neuron_differentiation import (
    distributions,
    least_remainder,
    mean_of,
    more_confident,
    reassigned,
    stages,
)
from hansfree.models import load_model, save_model
from hansfree.training import Training, fit

NAME = "neuron-differentiation"
TRAINING = Training(epochs=1, batch_size=16, optimiser="adam", lr=0.01, weight_decay=0.01)


def trained(method, benchmark, upto=None):
    """``method`` after all its stages, or at the beginning of the stage ``upto``."""
    steps = fit(method, benchmark, TRAINING, seed=4)
    for step in steps:
        if step.step == step.steps and upto is not None:
            following = method.stages[method.stages.index(step.stage) + 1]
            if following == upto:
                method.finish_stage()
                method.next_stage()
                return method
    return method


def tensors(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def slow_gce(logits, label, q=0.7):
    values = []
    for row, y in zip(logits.tolist(), label.tolist()):
        p = math.exp(row[y]) / sum(math.exp(value) for value in row)
        values.append((1 - p**q) / q)
    return sum(values) / len(values)


def whole_batch(benchmark):
    return benchmark.split("train").batch(torch.arange(48))


# The losses


def parts_by_hand(method, batch):
    """Images and labels of each sub-model's part, with the method's own coins."""
    wrong = method.in_a.tolist()
    share = sum(wrong) / len(wrong)
    for_a = [2 / share if w else 1.0 for w in wrong]
    for_b = [0.0 if w else 1.0 for w in wrong]
    odds = [(a / sum(for_a)) / (a / sum(for_a) + b / sum(for_b)) for a, b in zip(for_a, for_b)]
    coin = torch.rand(len(batch)).tolist()
    mine = [coin[i] < odds[i] for i in batch.index.tolist()]
    part = {"a": [i for i, taken in enumerate(mine) if taken], "b": [i for i, taken in enumerate(mine) if not taken]}
    return {name: (batch.images[rows], batch.label[rows]) for name, rows in part.items()}


def under(network, parameters, masks):
    """A copy of ``network`` with ``parameters`` times ``masks``."""
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for name, value in copied.named_parameters():
            value.copy_(parameters[name] * masks.get(name, torch.ones(())))
    return copied


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"samples": "soft", "temperature": 0.5, "size_of": "weights", "size_weight": 0.01},
        {"iou_of": "samples", "iou_over": "layers", "size_of": "logits", "size_weight": 0.01},
        {"granularity": "channels", "size_weight": 0.01, "iou_weight": 0.0},
    ],
)
def test_the_loss_of_the_masks(how, build, tiny):
    how = {"iou_weight": 1.0, **how}
    method = trained(build(NAME, start=0.3, **how), tiny, upto="masks 1").train()
    batch, theta = whole_batch(tiny), dict(method.trained.named_parameters())
    before = [copy.deepcopy(network) for network in (method.student, method.sub_b)]
    torch.manual_seed(8)
    terms = method.loss(batch)
    torch.manual_seed(8)
    parts, drawn = parts_by_hand(method, batch), {}
    for name, network, masks in zip("ab", before, (method.masks_a, method.masks_b)):
        drawn[name] = {}
        for key, z in masks.logits.items():
            u = torch.rand_like(z)
            soft = 1 / (1 + torch.exp(-(z + torch.log(u) - torch.log(1 - u)) / how.get("temperature", 1.0)))
            drawn[name][key] = soft if how.get("samples") == "soft" else (soft > 0.5).float()
        images, label = parts[name]
        logits = under(network, theta, drawn[name])(images)
        assert terms[f"gce_{name}"].item() == pytest.approx(slow_gce(logits, label), rel=1e-4)

    p = 1 / (1 + math.exp(-0.3))
    if how.get("iou_of") == "samples":
        ratios = []
        for key in drawn["a"]:
            both = (drawn["a"][key] * drawn["b"][key]).sum().item()
            ratios.append(both / (drawn["a"][key].sum().item() + drawn["b"][key].sum().item() - both))
        assert terms["iou"].item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    else:
        assert terms["iou"].item() == pytest.approx(how["iou_weight"] * p * p / (2 * p - p * p), rel=1e-5)
    count = sum(z.numel() for z in method.masks_a.logits.values())
    sizes = {
        "masks": count * p,
        "logits": count * 0.3,
        "weights": sum(p * theta[key].abs().sum().item() for key in method.masks_a.logits),
    }
    expected = 2 * how.get("size_weight", 1e-8) * sizes[how.get("size_of", "masks")]
    assert terms["size"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fine_tuning", ["apart", "together"])
def test_the_loss_of_fine_tuning(fine_tuning, build, tiny):
    method = trained(build(NAME, fine_tuning=fine_tuning), tiny, upto="fine-tune 1").train()
    batch = whole_batch(tiny)
    before = [copy.deepcopy(network) for network in (method.student, method.sub_b)]
    torch.manual_seed(8)
    terms = method.loss(batch)
    torch.manual_seed(8)
    parts = parts_by_hand(method, batch)
    for name, network, masks in zip("ab", before, (method.masks_a, method.masks_b)):
        images, label = parts[name]
        theta = dict(method.trained.named_parameters())
        kept = {key: (z >= 0).float() for key, z in masks.logits.items()}
        logits = under(network, theta, kept)(images)
        torch.testing.assert_close(terms[f"label_{name}"], F.cross_entropy(logits, label))


def test_the_warm_up_is_by_gce_and_the_training_by_cross_entropy(build, tiny):
    method, batch = build(NAME).eval(), whole_batch(tiny)
    logits = method.student.train()(batch.images)
    assert method.train().loss(batch)["mining"].item() == pytest.approx(slow_gce(logits, batch.label), rel=1e-5)
    method = trained(build(NAME), tiny, upto="train").train()
    expected = F.cross_entropy(method.student(batch.images), batch.label)
    torch.testing.assert_close(method.loss(batch), {"label": expected})


# The data


def test_the_draws_are_those_of_the_paper():
    in_a = torch.arange(1000) < 7
    for_a, for_b = distributions(in_a, 10)
    shares = torch.where(in_a, 9 / 0.007, 1.0)
    torch.testing.assert_close(for_a, shares / shares.sum())
    assert for_a[in_a].sum().item() == pytest.approx(9 / (9 + 0.993), rel=1e-5)
    assert for_b[:7].sum() == 0 and for_b[7:].sum().item() == pytest.approx(1)
    # Drawn by the mean of both and given to A by the odds, a part is a draw of its own distribution.
    drawn, odds = (for_a + for_b) / 2, for_a / (for_a + for_b)
    torch.testing.assert_close(2 * drawn * odds, for_a)
    torch.testing.assert_close(2 * drawn * (1 - odds), for_b)
    everybody, _ = distributions(torch.zeros(5, dtype=torch.bool), 3)
    assert everybody.tolist() == pytest.approx([0.2] * 5)


def test_parts_hold_what_their_draws_allow(build, tiny):
    method = build(NAME)
    method.in_a = torch.arange(48) % 4 == 0
    batch = whole_batch(tiny)
    shared = method.train().shared_out(batch)
    assert sum(len(label) for _, label in shared.values()) == 48
    rows = {tuple(image.flatten()[:20].tolist()) for image in shared["b"][0]}
    assert not any(tuple(image.flatten()[:20].tolist()) in rows for image in batch.images[method.in_a])


@pytest.mark.parametrize("guarded", [True, False])
def test_reassignment(guarded):
    for member in (True, False):
        for a in (True, False):
            for b in (True, False):
                leaves = (a and not b) if guarded else a
                expected = not leaves if member else b
                found = reassigned(*(torch.tensor([value]) for value in (member, a, b)), guarded=guarded)
                assert found.item() == expected


def test_the_split_is_what_the_warmed_up_student_gets_wrong(build, tiny):
    method, snapshots = build(NAME), {}
    for step in fit(method, tiny, TRAINING, seed=4):
        if step.stage in ("warm-up", "split"):
            snapshots[step.stage] = copy.deepcopy(method.student)
        if step.stage == "train":
            break
    assert equal(tensors(snapshots["warm-up"]), tensors(snapshots["split"]))
    batch = whole_batch(tiny)
    wrong = snapshots["warm-up"].eval()(batch.images).argmax(1) != batch.label
    assert 0 < wrong.sum() < 48
    assert torch.equal(method.in_a, wrong)
    assert not equal(tensors(snapshots["split"]), tensors(method.student))


@pytest.mark.parametrize("theta", ["cross-entropy", "warm-up"])
def test_an_epoch_ensemble_splits_by_the_doubt_of_all_steps(theta, build, tiny):
    method = build(NAME, detection="epoch-ensemble", threshold=0.65, theta=theta)
    for step in fit(method, tiny, TRAINING, seed=4):
        if step.stage != "warm-up":
            break
        warmed = copy.deepcopy(method.student)
    assert "split" not in method.stages
    assert set(method.mining.epochs.tolist()) == {float(method.warm_up_epochs)}
    assert torch.equal(method.in_a, method.mining.score > 0.65) and 0 < method.in_a.sum() < 48
    assert equal(tensors(warmed), tensors(method.trained)) == (theta == "warm-up")


def test_a_warm_up_that_is_always_wrong_is_refused(build):
    method = build(NAME)
    method.stages_done = torch.tensor(1)
    method.wrong_a = torch.ones(48, dtype=torch.bool)
    with pytest.raises(UserError, match="warm_up_epochs"):
        method.finish_stage()


@pytest.mark.parametrize(("samples", "size"), [(48, 48), (60_000, 240), (4_000, 200), (8_000, 200), (7, 256)])
def test_looks_leave_few_samples_over(samples, size):
    assert least_remainder(samples) == size


# The stages


def test_the_stages_by_name():
    assert stages("cross-entropy", True, 2) == (
        *("warm-up", "split", "train", "masks 1", "fine-tune 1", "reassign 1", "masks 2", "fine-tune 2"),
    )
    assert stages("warm-up", False, 2) == ("warm-up", "split", "fine-tune 1", "reassign 1", "fine-tune 2")
    assert stages("cross-entropy", False, 1, looks=False) == ("warm-up", "train", "fine-tune 1")


@pytest.mark.parametrize("fine_tuning", ["apart", "together"])
def test_it_ends_when_no_sample_moves(fine_tuning, build, tiny):
    method = trained(build(NAME, fine_tuning=fine_tuning), tiny, upto="reassign 1")
    before = tensors(method.student)
    method.wrong_a, method.wrong_b = ~method.in_a, method.in_a
    method.finish_stage()
    assert method.next_stage() is None and method.phase == "done"
    assert equal(before, tensors(method.student))


def test_a_new_round_begins_with_theta_where_sub_models_are_apart(build, tiny):
    method = trained(build(NAME), tiny, upto="reassign 1")
    method.wrong_a, method.wrong_b = method.in_a, torch.isin(torch.arange(48), torch.tensor([0, 5]))
    assert method.in_a.sum() > 2
    method.finish_stage()
    assert method.stages[int(method.stages_done)] == "masks 2"
    assert method.in_a.nonzero().flatten().tolist() == [0, 5]
    assert equal(tensors(method.student), tensors(method.trained))
    assert equal(tensors(method.sub_b), tensors(method.trained))


@pytest.mark.parametrize(
    "how",
    [
        {"theta": "cross-entropy"},
        {"fine_tuning": "together", "masks": "random", "rounds": 1},
        {"theta": "cross-entropy", "detection": "epoch-ensemble", "threshold": 0.65, "rounds": 1},
    ],
)
def test_resuming_inside_any_stage_gives_the_same_weights_to_the_bit(how, build, tiny):
    whole, saved = build(NAME, reassignment="literal", **how), {}
    for step in fit(whole, tiny, TRAINING, seed=3):
        if step.step == 1:
            file = io.BytesIO()
            torch.save(step.snapshot(), file)
            saved[step.stage] = file
    assert set(saved) == set(whole.stages)
    for file in saved.values():
        file.seek(0)
        torch.rand(17)
        resumed = build(NAME, seed=9, reassignment="literal", **how)
        for _ in fit(resumed, tiny, TRAINING, seed=3, resume=torch.load(file, weights_only=True)):
            pass
        assert equal(whole.state_dict(), resumed.state_dict())


# What is kept apart


@pytest.mark.parametrize("upto", ["masks 1", "fine-tune 1"])
@pytest.mark.parametrize("moves", ["a", "b"])
def test_training_one_sub_model_leaves_the_statistics_of_the_other_unmoved(upto, moves, build, tiny):
    method = trained(build(NAME), tiny, upto=upto).train()
    networks = {name: network for name, network, _ in method.sub_models()} | {"theta": method.trained}
    before = {name: tensors(network) for name, network in networks.items()}
    # All samples are of D_a, which B never gets, or a coin that gives none to A.
    method.shared_out = lambda batch: {
        name: (batch.images[:20], batch.label[:20]) if name == moves else (batch.images[:0], batch.label[:0])
        for name in "ab"
    }
    sum(method.loss(whole_batch(tiny)).values()).backward()
    for name, network in networks.items():
        assert equal(before[name], tensors(network)) == (name != moves)
        statistics = [key for key in before[name] if "running" in key]
        assert statistics
        assert all(torch.equal(before[name][key], tensors(network)[key]) == (name != moves) for key in statistics)


@pytest.mark.parametrize(
    "how", [{}, {"fine_tuning": "together"}, {"masks": "random"}, {"granularity": "channels", "iou_weight": 0.0}]
)
def test_sub_models_are_exported_as_weights_under_hard_masks_with_their_statistics(how, build, tiny, tmp_path):
    method = trained(build(NAME, **how), tiny).eval()
    images = tiny.split("iid").batch(torch.arange(24)).images
    for name, network, masks in method.sub_models():
        own, kept = dict(network.named_parameters()), masks.kept
        shares = reserved(kept)
        assert 0 < sum(shares.values()) / len(shares) < 1
        assert all((own[key][~mask.expand_as(own[key])] == 0).all() for key, mask in kept.items())
        if how.get("fine_tuning") == "together":
            theta = masked(dict(method.trained.named_parameters()), kept)
            assert equal(theta, own)
        save_model(network, tmp_path / name)
        alone = load_model(str(tmp_path / name), num_classes=3).eval()
        torch.testing.assert_close(alone(images), method.predictions(images)[f"sub-{name}"])
    assert not equal(tensors(method.student), tensors(method.sub_b))
    assert min(iou_by_layer(method.masks_a.kept, method.masks_b.kept).values()) < 1


# Controls


def test_reweighting_alone_takes_the_same_fine_tuning_steps_without_masks(build, tiny):
    counts = {}
    for masks in ("learned", "none"):
        method = build(NAME, masks=masks, rounds=1)
        steps = [step.stage for step in fit(method, tiny, TRAINING, seed=3)]
        counts[masks] = {stage: steps.count(stage) for stage in set(steps)}
    assert counts["learned"].pop("masks 1") == 3
    assert counts["learned"]["fine-tune 1"] == 12
    assert counts["learned"] == counts["none"]
    assert all(mask.all() for mask in method.masks_a.kept.values())
    assert all((value != 0).any() for value in method.student.parameters())


def test_random_masks_are_as_dense_as_the_learnt_ones(build, tiny):
    found = {}
    for masks in ("learned", "random"):
        method = trained(build(NAME, masks=masks), tiny, upto="fine-tune 1")
        found[masks] = {name: m.kept for name, _, m in method.sub_models()}
    for name in "ab":
        learned, random = found["learned"][name], found["random"][name]
        assert reserved(learned) == reserved(random)
        assert not all(torch.equal(learned[key], random[key]) for key in learned)


# Predictions


def test_predictions_by_a_by_b_by_their_mean_and_by_the_more_confident(build, tiny):
    method = trained(build(NAME, predict_with="mean"), tiny).eval()
    images = tiny.split("iid").batch(torch.arange(24)).images
    with torch.no_grad():
        found, a, b = method.predictions(images), method.student(images), method.sub_b(images)
    assert set(found) == {"student", "sub-a", "sub-b", "sub-mean", "sub-confident"}
    torch.testing.assert_close(found["sub-mean"].exp(), (a.softmax(1) + b.softmax(1)) / 2)
    for i in range(24):
        surer = a if a[i].softmax(0).max() >= b[i].softmax(0).max() else b
        assert torch.equal(found["sub-confident"][i], surer[i])
    assert torch.equal(found["student"], found["sub-mean"])
    assert torch.equal(method.predict(images), found["sub-mean"])
    judged = judge(method, None, tiny, ("iid", "shift"), 7, "cpu")
    assert list(judged) == [(model, split) for split in ("iid", "shift") for model in found]
    torch.testing.assert_close(judged["sub-b", "iid"].logits, b)


def test_sure_models_outvote_unsure_ones():
    a, b = torch.tensor([[0.0, 1.0], [5.0, 0.0]]), torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    assert more_confident(a, b).tolist() == [[4.0, 0.0], [5.0, 0.0]]
    assert mean_of(a, b).argmax(1).tolist() == [0, 0]


@pytest.mark.parametrize(
    "settings",
    [
        {"q": 0.0},
        {"rounds": 0},
        {"mask_epochs": 0},
        {"temperature": 0.0},
        {"fine_tune_lr": 0.0},
        {"iou_weight": -1.0},
        {"granularity": "neurons"},
        {"masks": "none", "fine_tuning": "together"},
    ],
)
def test_settings_without_a_meaning_are_refused(settings, build):
    with pytest.raises(UserError):
        build(NAME, **settings)
