"""Each loss of the group methods again, slowly, from its paper; and what their stages leave behind."""

import io
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from hansfree.core import Setup
from hansfree.errors import NotGivenError, UserError
from hansfree.methods import METHODS
from hansfree.methods.dfr import SELECTS, TRAINS, half_of, last_layer
from hansfree.methods.groups import Groups, gathered, numbered
from hansfree.training import Training, fit

TRAINING = Training(epochs=2, batch_size=8, optimiser="adam", lr=0.01)


@pytest.fixture
def batch(tiny):
    return tiny.split("train").batch(torch.arange(20))


def setup_of(label, bias, classes=3):
    return Setup(
        lambda: torch.nn.Linear(1, 1), None, len(label), classes, None, torch.tensor(label), torch.tensor(bias)
    )


def kinds(split, by):
    """The group of each sample, as a name, in plain Python."""
    pairs = list(zip(split.label.tolist(), split.bias.tolist()))
    usual = {}
    for y in {y for y, _ in pairs}:
        counts = Counter(a for other, a in pairs if other == y)
        usual[y] = min(a for a in counts if counts[a] == max(counts.values()))
    names = {
        "label-bias": lambda y, a: (y, a),
        "label-majority": lambda y, a: (y, a == usual[y]),
        "majority": lambda y, a: a == usual[y],
        "bias": lambda y, a: a,
        "label": lambda y, a: y,
    }
    return [names[by](y, a) for y, a in pairs]


def cross_entropies(logits, label):
    return [-row[y] + math.log(sum(map(math.exp, row))) for row, y in zip(logits.tolist(), label.tolist())]


def by_group(values, names):
    sums = defaultdict(list)
    for value, name in zip(values, names):
        sums[name].append(value)
    return {name: sum(found) / len(found) for name, found in sums.items()}


def tensors(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def trained(method, benchmark, **how):
    yield from fit(method, benchmark, TRAINING, **how)


# Groups


@pytest.mark.parametrize("by", ["label-bias", "label-majority", "majority", "bias", "label"])
def test_groups_are_those_of_plain_counting(tiny, by):
    train = tiny.split("train")
    setup = setup_of(train.label.tolist(), train.bias.tolist())
    groups, names = Groups(setup, by), kinds(train, by)
    number = groups.of(train.label, train.bias)
    assert len(groups) == len(set(names)) == len(set(zip(number.tolist(), names)))
    counts = Counter(names)
    assert [groups.count[g].item() for g in number.tolist()] == [counts[name] for name in names]
    values = torch.rand(len(names))
    means = by_group(values.tolist(), names)
    expected = sum(means.values()) / len(means)
    assert (groups.weights(number) * values).mean().item() == pytest.approx(expected, rel=1e-5)
    drawn = groups.sampling_weights / groups.sampling_weights.sum()
    shares = torch.zeros(len(groups)).index_add(0, number, drawn)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / len(groups)))


def test_pairs_that_training_never_saw_have_no_weight():
    groups = Groups(setup_of([0, 0, 1, 1], [0, 1, 1, 1], classes=2), "label-bias")
    number = groups.of(torch.tensor([1, 0, 0]), torch.tensor([0, 7, 1]))
    assert number.tolist() == [-1, -1, 1]
    assert (groups.weights(number) > 0).tolist() == [False, False, True]


def test_an_unseen_bias_is_a_minority():
    groups = Groups(setup_of([0, 0, 0, 1], [0, 0, 1, 1], classes=2), "majority")
    assert groups.of(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 9])).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "settings"), [("irm", {}), ("irm", {"environments": "bias"}), ("pgi", {}), ("group-dro", {})]
)
def test_data_whose_classes_have_one_bias_each_are_refused(name, settings, build, tiny):
    method = build(name, **settings)
    label = method._setup.label
    with pytest.raises(NotGivenError, match="each class of the training data has one bias only") as caught:
        METHODS[name](replace(method._setup, bias=label + 1), **settings)
    assert caught.value.reason == "needs a bias that varies within a class"
    one_varies = label.clone()
    one_varies[label == 0] = torch.arange(int((label == 0).sum())) % 2
    METHODS[name](replace(method._setup, bias=one_varies), **settings)


def test_a_missing_bias_is_named(build, batch):
    with pytest.raises(UserError, match="bias"):
        build("reweighting").loss(replace(batch, bias=None))
    unknown = METHODS["resampling"](replace(build("resampling")._setup, bias=None))
    with pytest.raises(UserError, match="bias of each training sample"):
        unknown.next_stage()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("group-dro", {"step_size": 0.0}),
        ("group-dro", {"size_adjustment": -1.0}),
        ("group-dro", {"groups": "labels"}),
        ("irm", {"penalty_weight": 0.0}),
        ("irm", {"anneal_steps": -1}),
        ("pgi", {"weight": 0.0}),
        ("pgi", {"ramp": -1.0}),
        ("jtt", {"first_epochs": 0}),
        ("jtt", {"upweight": 1.0}),
        ("dfr", {"subsets": 0}),
        ("dfr", {"inverse_strength": 0.0}),
    ],
)
def test_settings_without_a_meaning_are_refused(build, name, settings):
    with pytest.raises(UserError):
        build(name, **settings)


# Balancing


@pytest.mark.parametrize(
    ("name", "settings", "by"),
    [
        ("reweighting", {}, "label-bias"),
        ("reweighting", {"groups": "label-majority"}, "label-majority"),
        ("class-reweighting", {}, "label"),
        ("resampling", {}, "label-bias"),
        ("class-resampling", {}, "label"),
    ],
)
def test_reweighting_is_the_mean_of_group_means(build, tiny, name, settings, by):
    method, train = build(name, **settings).eval(), tiny.split("train")
    whole = train.batch(torch.arange(len(train)))
    means = by_group(cross_entropies(method.student(whole.images), whole.label), kinds(train, by))
    assert method.loss(whole)["label"].item() == pytest.approx(sum(means.values()) / len(means), rel=1e-5)


def test_resampling_trains_on_plain_losses_of_balanced_draws(build, tiny, batch):
    method = build("resampling").train()
    expected = F.cross_entropy(method.student(batch.images), batch.label)
    torch.testing.assert_close(method.loss(batch)["label"], expected)
    stage, names = method.next_stage(), kinds(tiny.split("train"), "label-bias")
    counts = Counter(names)
    inverse = torch.tensor([1 / counts[name] for name in names])
    torch.testing.assert_close(stage.weights / stage.weights.sum(), inverse / inverse.sum())
    method.finish_stage()
    assert method.next_stage() is None


# Group DRO


def test_group_dro_is_algorithm_1(build, tiny, batch):
    method = build("group-dro", step_size=0.3, size_adjustment=2.0, norm="none").train()
    train = tiny.split("train")
    names = kinds(train, "label-bias")
    counts = Counter(names)
    weights = dict.fromkeys(counts, 1 / len(counts))
    for index in (torch.arange(20), torch.arange(3), torch.arange(30, 42)):
        part, names_here = train.batch(index), [names[i] for i in index.tolist()]
        means = by_group(cross_entropies(method.student(part.images), part.label), names_here)
        robust = sum(weights[g] * mean for g, mean in means.items())
        terms = method.loss(part)
        assert terms["label"].item() == pytest.approx(robust, rel=1e-5)
        method.observe(part, terms)
        for g, mean in means.items():
            weights[g] *= math.exp(0.3 * (mean + 2.0 / math.sqrt(counts[g])))
        total = sum(weights.values())
        weights = {g: weight / total for g, weight in weights.items()}
    number = method.groups.of(train.label, train.bias).tolist()
    for i, g in enumerate(names):
        assert method.group_weights[number[i]].item() == pytest.approx(weights[g], rel=1e-5)
    whole = train.batch(torch.arange(len(train)))
    means = by_group(cross_entropies(method.eval().student(whole.images), whole.label), names)
    expected = sum(weights[g] * mean for g, mean in means.items())
    assert method.loss(whole)["label"].item() == pytest.approx(expected, rel=1e-5)


def test_observing_leaves_no_trace_in_the_student(build, batch):
    for name in ("group-dro", "jtt"):
        method = build(name).train()
        method.student.get_submodule("network").eval()  # a part that someone froze
        modes, before = [m.training for m in method.modules()], tensors(method.student)
        method.observe(batch, {})
        assert modes == [m.training for m in method.modules()]
        assert all(torch.equal(before[key], value) for key, value in method.student.state_dict().items())


def test_group_dro_moves_towards_the_worst_group(build, tiny):
    method = build("group-dro", step_size=1.0, groups="label-majority")
    for _ in trained(method, tiny):
        pass
    train = tiny.split("train")
    whole = train.batch(torch.arange(len(train)))
    losses = F.cross_entropy(method.eval().student(whole.images), whole.label, reduction="none")
    before = method.group_weights
    method.observe(whole, {})
    number = method.groups.of_batch(whole)
    worst = max(range(len(method.groups)), key=lambda g: losses[number == g].mean().item())
    assert method.group_weights[worst] / before[worst] == (method.group_weights / before).max()


# IRM


@pytest.mark.parametrize("environments", ["majority", "bias"])
@pytest.mark.parametrize("steps", [0, 100])
def test_irm_is_the_squared_derivative_by_a_scale(build, tiny, batch, environments, steps):
    method = build("irm", environments=environments, penalty_weight=50.0, norm="none").train()
    method.steps_done = method.steps_done + steps
    names = kinds(tiny.split("train"), environments)[: len(batch)]
    logits, risks, penalties = method.student(batch.images), [], []
    for name in set(names):
        rows = torch.tensor([other == name for other in names])
        scale = torch.ones((), requires_grad=True)
        risk = F.cross_entropy(scale * logits[rows], batch.label[rows])
        (slope,) = torch.autograd.grad(risk, scale, retain_graph=True)
        risks.append(risk.item())
        penalties.append(slope.item() ** 2)
    weight = 50.0 if steps == 100 else 1.0
    terms = method.loss(batch)
    assert terms["label"].item() == pytest.approx(sum(risks) / len(risks) / weight, rel=1e-5)
    assert terms["invariance"].item() == pytest.approx(sum(penalties) / len(penalties), rel=1e-4)


def test_irm_leaves_out_an_absent_environment(build, tiny):
    method, train = build("irm", norm="none").train(), tiny.split("train")
    usual = torch.tensor(kinds(train, "majority")).nonzero()[:5, 0]
    one = train.batch(usual)
    assert method.loss(one)["label"].item() == pytest.approx(
        sum(cross_entropies(method.student(one.images), one.label)) / 5, rel=1e-5
    )


def test_irm_counts_its_steps(build, tiny):
    method = build("irm", anneal_steps=3)
    steps = list(trained(method, tiny))
    assert int(method.steps_done) == len(steps)
    assert steps[2].terms["label"] > 100 * steps[3].terms["label"]  # divided by the weight from now on
    assert set(method.eval().loss(tiny.split("valid").batch(torch.arange(4)))) == {"label"}


# PGI


def test_pgi_is_the_divergence_of_mean_predictions(build, tiny, batch):
    method = build("pgi", weight=7.0, start=0.0, ramp=0.0, norm="none").train()
    with torch.no_grad():
        method.student.network.fc.weight.mul_(20)  # or all predictions are almost alike
    usual = kinds(tiny.split("train"), "majority")[: len(batch)]
    logits = method.student(batch.images)
    predicted, labels = logits.softmax(1).tolist(), batch.label.tolist()
    slow, compared = 0.0, 0
    for c in range(3):
        parts = [[p for p, y, u in zip(predicted, labels, usual) if y == c and u == kind] for kind in (True, False)]
        if not all(parts):
            continue
        compared += 1
        p0, p1 = ([sum(column) / len(part) for column in zip(*part)] for part in parts)
        slow += sum(b * math.log(b / a) for a, b in zip(p0, p1)) / 3
    means = by_group(cross_entropies(logits, batch.label), usual)
    terms = method.loss(batch)
    assert compared > 1
    assert terms["invariance"].item() == pytest.approx(7 * slow, rel=1e-4)
    assert terms["label"].item() == pytest.approx(sum(means.values()) / 2, rel=1e-5)
    terms["invariance"].backward()
    last = {id(p) for p in method.student.get_classifier().parameters()}
    assert all((p.grad is None) == (id(p) in last) for p in method.student.parameters())


def test_pgi_ramps_up_by_epochs(build, tiny):
    method = build("pgi", weight=8.0, start=0.5, ramp=1.0)
    weights = []
    for _ in trained(method, tiny):
        weights.append(method._weight())
    assert weights == pytest.approx([8 * min(1, max(0, 8 * n / 48 - 0.5)) for n in range(1, 13)])


# JTT


def test_jtt_weighs_what_the_first_student_got_wrong(build, tiny):
    method, train = build("jtt", upweight=10.0), tiny.split("train")
    wrong = torch.zeros(48, dtype=torch.bool)
    order, original = [], train.batch
    tiny.split = lambda name: train
    train.batch = lambda index, generator=None: order.append(index) or original(index, generator)
    for step in trained(method, tiny):
        index = order[-1]
        if step.stage == "first":
            said = method.student.eval()(train.images[index]).argmax(1)
            wrong[index] = said != train.label[index]
    assert 0 < wrong.sum() < 48
    assert torch.equal(method.wrong, wrong)
    assert torch.equal(method.weights() / method.weights().min(), torch.where(wrong, 10.0, 1.0))
    assert method.weights().mean().item() == pytest.approx(1)
    assert len(order) == 6 + 12
    drawn = wrong[torch.cat(order[6:])]
    share = 10 * wrong.sum().item() / (10 * wrong.sum().item() + (~wrong).sum().item())
    assert drawn.float().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(drawn)))
    assert share > 1.2 * wrong.float().mean()


def test_jtt_starts_the_second_training_from_a_fresh_student(build, tiny):
    states = []
    for _ in range(2):
        method = build("jtt")
        for step in trained(method, tiny, seed=4):
            if step.stage == "first" and step.step == step.steps:
                end = tensors(method.student)
                break
        method.finish_stage()
        states.append(tensors(method.student))
        assert not torch.equal(end["network.fc.weight"], states[-1]["network.fc.weight"])
        assert all(value == 0 for key, value in states[-1].items() if "num_batches_tracked" in key)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_jtt_by_loss_weights(build, batch):
    method = build("jtt", how="weights", upweight=5.0, norm="none").train()
    assert method.loss(batch)["label"].item() == pytest.approx(
        sum(cross_entropies(method.student(batch.images), batch.label)) / len(batch), rel=1e-5
    )
    method.wrong = torch.arange(48) % 4 == 0
    method.finish_stage()
    assert method.next_stage().weights is None
    raised = [5.0 if i % 4 == 0 else 1.0 for i in range(48)]
    losses = cross_entropies(method.student(batch.images), batch.label)
    slow = sum(w * value for w, value in zip(raised, losses)) / len(batch) / (sum(raised) / 48)
    assert method.loss(batch)["label"].item() == pytest.approx(slow, rel=1e-5)


# DFR


@pytest.fixture
def retrained(build, tiny):
    """DFR after all of its stages, and the student after the first one."""
    method, erm = build("dfr", subsets=3, last_layer_epochs=40), None
    for step in trained(method, tiny):
        if step.stage == "train":
            erm = tensors(method.student)
    return method, erm


def test_dfr_changes_the_last_layer_only(retrained):
    method, erm = retrained
    changed = {key for key, value in method.student.state_dict().items() if not torch.equal(value, erm[key])}
    assert changed == {"network.fc.weight", "network.fc.bias"}


def test_dfr_subsets_are_balanced_and_of_the_half_that_trains(retrained, tiny):
    method, _ = retrained
    valid = tiny.split("valid")
    seen = method.seen[method.seen[:, 0].argsort()]
    assert len(seen) == 16  # one batch; the rest did not fill another
    assert torch.equal(seen[:, 1], valid.label[seen[:, 0]])
    assert torch.equal(seen[:, 2], valid.bias[seen[:, 0]])
    there = Counter((y, a) for i, y, a in seen.tolist() if half_of(torch.tensor([i])) == TRAINS)
    for subset in method.member:
        index = subset.nonzero()[:, 0]
        assert (half_of(index) == TRAINS).all()
        counts = Counter(zip(valid.label[index].tolist(), valid.bias[index].tolist()))
        assert counts.keys() == there.keys()
        assert set(counts.values()) == {min(there.values())}


def test_dfr_gives_the_student_the_mean_of_its_regressions(retrained, tiny):
    method, _ = retrained
    batch = tiny.split("iid").batch(torch.arange(8))
    features = method.features(batch)
    looked = method.features(tiny.split("valid").batch(method.seen[:, 0]))
    torch.testing.assert_close(method.mean, looked.mean(0))
    torch.testing.assert_close(method.deviation(), looked.std(0, correction=0), rtol=1e-3, atol=1e-5)
    standardised = (features - looked.mean(0)) / method.deviation()
    slow = sum(standardised @ w.T + b for w, b in zip(method.weight, method.bias)) / 3
    torch.testing.assert_close(method.predict(batch.images), slow, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_dfr_minimises_the_penalised_regression(build, tiny, penalty):
    method = build("dfr", subsets=1, penalty=penalty, last_layer_epochs=1, inverse_strength=0.5)
    for _ in trained(method, tiny):
        pass
    method.stages_done = method.stages_done - 1
    optimiser = torch.optim.Adam([method.weight, method.bias], 0.01)  # as the stage does, without its loader
    whole = tiny.split("valid").batch(method.member[0].nonzero()[:, 0])
    for _ in range(500):
        optimiser.zero_grad()
        sum(method.train().loss(whole).values()).backward()
        optimiser.step()
    index = method.member[0].nonzero()[:, 0]
    valid = tiny.split("valid").batch(index)
    x = ((method.features(valid) - method.mean) / method.deviation()).double()
    size = method.weight[0].numel()

    def objective(flat):
        weight, bias = flat[:size].view(3, -1), flat[size:]
        norm = weight.abs().sum() if penalty == "l1" else (weight**2).sum() / 2
        return F.cross_entropy(x @ weight.T + bias, valid.label) + norm / (0.5 * len(index))

    def with_gradient(flat):
        flat = torch.tensor(flat, requires_grad=True)
        value = objective(flat)
        return value.item(), torch.autograd.grad(value, flat)[0].numpy()

    start = torch.cat([method.weight.flatten(), method.bias.flatten()]).double().detach()
    found = objective(start).item()
    best = minimize(with_gradient, start.numpy(), jac=True, method="L-BFGS-B").fun
    assert best <= found < best + 0.01 * objective(torch.zeros_like(start)).item()


def test_dfr_s_training_loss_is_a_mean_over_subsets(retrained, tiny):
    method, _ = retrained
    method.stages_done = method.stages_done - 1
    union = method.member.any(0).nonzero()[:, 0]
    batch = tiny.split("valid").batch(union)
    x = (method.features(batch) - method.mean) / method.deviation()
    slow = 0.0
    for subset, weight, bias in zip(method.member, method.weight, method.bias):
        rows = subset[union]
        losses = cross_entropies(x[rows] @ weight.T + bias, batch.label[rows])
        slow += sum(losses) / len(losses) / 3
    norm = sum(abs(w) for w in method.weight.flatten().tolist()) / 3
    terms = method.train().loss(batch)
    assert terms["label"].item() == pytest.approx(slow, rel=1e-4)
    assert terms["penalty"].item() == pytest.approx(norm / int(method.member[0].sum()), rel=1e-5)


def test_dfr_selects_by_the_other_half(retrained, tiny):
    method, _ = retrained
    batch = tiny.split("valid").batch(torch.arange(24))
    losses = cross_entropies(method.eval().student(batch.images), batch.label)
    kept = [value for value, half in zip(losses, half_of(batch.index).tolist()) if half == SELECTS]
    assert 4 < len(kept) < 20
    assert method.loss(batch)["label"].item() == pytest.approx(2 * sum(kept) / 24, rel=1e-5)
    assert not method.member[:, half_of(torch.arange(method.member.shape[1])) == SELECTS].any()


def test_dfr_keeps_no_last_layer_of_its_look(build, tiny):
    method = build("dfr")
    for step in trained(method, tiny):
        if step.stage == "look":
            assert method.weight.abs().sum() > 0
        if step.stage == "last-layer":
            break
    assert method.weight.abs().max() < 1.5 * method.last_layer_lr  # one step of Adam from zero
    assert method.bias.abs().max() < 1.5 * method.last_layer_lr


def test_dfr_says_what_is_missing(build, tiny):
    with pytest.raises(UserError, match="linear with a bias"):
        last_layer(torch.nn.Linear(2, 2))
    method = build("dfr")
    method.stages_done = method.stages_done + 1
    batch = tiny.split("valid").batch(torch.arange(8))
    with pytest.raises(UserError, match="validation split"):
        method.observe(replace(batch, bias=None), {})
    method.observe(tiny.split("valid").batch(torch.tensor([0, 3, 6, 9])), {})  # one class
    method.finish_stage()
    with pytest.raises(UserError, match="enlarge"):
        method.next_stage()
    batch = tiny.split("valid").batch(torch.arange(len(tiny.split("valid"))))
    method = build("dfr")
    method.stages_done = method.stages_done + 1
    method.observe(replace(batch, bias=batch.label), {})
    method.finish_stage()
    with pytest.raises(UserError, match="one bias only"):
        method.next_stage()


# Stages


@pytest.mark.parametrize(
    ("name", "settings"), [("jtt", {}), ("jtt", {"how": "weights"}), ("dfr", {"last_layer_epochs": 3})]
)
def test_resuming_inside_any_stage_gives_the_same_to_the_bit(build, tiny, name, settings):
    whole, saved = build(name, **settings), []
    for step in trained(whole, tiny, seed=3):
        if step.step in (1, 3, step.steps):  # the first ones, the middle, and between two stages
            file = io.BytesIO()
            torch.save(step.snapshot(), file)
            saved.append((step.stage, file))
    assert len({stage for stage, _ in saved}) == int(whole.stages_done)
    for _, file in saved:
        file.seek(0)
        torch.rand(17)
        resumed = build(name, seed=9, **settings)
        for _ in trained(resumed, tiny, seed=3, resume=torch.load(file, weights_only=True)):
            pass
        state = resumed.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())


def test_one_process_gathers_its_own():
    values = torch.arange(3)
    assert gathered(values) is values


PROCESSES = """
import json
import torch
from hansfree.benchmarks import ColouredDigits
from hansfree.core import Setup
from hansfree.methods import DFR, JTT
from hansfree.models import load_model
from hansfree.training import Training, fit, make_accelerator

digits = ColouredDigits(limit=300, valid=96, test=40, bias_ratio=0.5)
train, here, found = digits.split("train"), make_accelerator(device="cpu"), {}
options = {"widths": [4, 8], "norm": "none"}
setup = Setup(lambda: load_model("small-cnn", num_classes=10, options=options), None, len(train), 10, digits.input)
for make, settings in ((JTT, {}), (DFR, {"groups": "label-majority", "last_layer_epochs": 3})):
    torch.manual_seed(0)
    method = make(setup, **settings)
    for _ in fit(method, digits, Training(epochs=2, batch_size=32, lr=0.1), accelerator=here):
        pass
    found[make.__name__] = [p.flatten().tolist() for p in method.student.parameters()]
found["seen"] = method.seen[method.seen[:, 0].argsort()].tolist()
if here.is_main_process:
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_go_through_the_stages_of_one(tmp_path):
    script = tmp_path / "stages.py"
    script.write_text(PROCESSES)
    results = []
    for processes in (1, 2):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([*start, str(script)], capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(done.stdout))
    one, two = results
    assert one["seen"] == two["seen"]
    for name in ("JTT", "DFR"):
        for first, second in zip(one[name], two[name]):
            assert first == pytest.approx(second, rel=1e-3, abs=1e-5)


def test_numbers_count_only_what_occurs():
    number, count = numbered(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 0]), 3, "label-bias")
    assert count.tolist() == [2, 1]
    assert number.tolist() == [[-1, 0, -1], [-1, -1, -1], [1, -1, -1]]
