"""Each loss of the methods that learn from a biased network again, slowly, from its paper."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hansfree.core import InputSpec
from hansfree.errors import UserError
from hansfree.methods.end import disentangling_term, entangling_term
from hansfree.methods.gce import generalised_cross_entropy
from hansfree.methods.rebias import NarrowCNN, hsic, rbf_kernel, receptive_field
from hansfree.training import parameter_groups


@pytest.fixture
def batch(tiny):
    return tiny.split("train").batch(torch.arange(20))


def probabilities(logits, label):
    """Of each sample's label, in plain Python."""
    rows = [[math.exp(z) for z in row] for row in logits.tolist()]
    return [row[y] / sum(row) for row, y in zip(rows, label.tolist())]


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_gce_is_the_papers(build, batch, q):
    method = build("gce", q=q).eval()
    with torch.no_grad():
        p = probabilities(method.student(batch.images), batch.label)
        assert method.loss(batch)["label"].item() == pytest.approx(sum((1 - v**q) / q for v in p) / len(p), rel=1e-5)


def test_gce_runs_from_cross_entropy_to_absolute_error():
    logits = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label = torch.arange(9) % 4
    near = generalised_cross_entropy(logits, label, 1e-9)
    torch.testing.assert_close(near, F.cross_entropy(logits, label, reduction="none"))
    absolute = (F.one_hot(label, 4) - logits.softmax(1)).abs().sum(1) / 2
    torch.testing.assert_close(generalised_cross_entropy(logits, label, 1.0), absolute)


def test_gce_weighs_the_gradient_of_cross_entropy_by_p_to_the_q():
    logits = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = torch.arange(9) % 4
    ours = torch.autograd.grad(generalised_cross_entropy(logits, label, 0.7).sum(), logits)[0]
    plain = torch.autograd.grad(F.cross_entropy(logits, label, reduction="sum"), logits)[0]
    weight = torch.tensor(probabilities(logits, label), dtype=torch.float64) ** 0.7
    torch.testing.assert_close(ours, weight[:, None] * plain)


@pytest.mark.parametrize("q", [0.0, -0.5, 1.1])
def test_a_q_without_meaning_is_refused(build, q):
    with pytest.raises(UserError, match=r"method\.q must lie above 0"):
        build("gce", q=q)


# Relative difficulty: lff and dfa


class Difficulty:
    """The running averages of lff's published code, one sample at a time."""

    def __init__(self, decay):
        self.decay, self.biased, self.debiased, self.label = decay, {}, {}, {}

    def weights(self, batch, biased, debiased):
        for averages, losses in ((self.biased, biased), (self.debiased, debiased)):
            for i, loss in zip(batch.index.tolist(), losses):
                averages[i] = self.decay * averages[i] + (1 - self.decay) * loss if i in averages else loss
        self.label.update(zip(batch.index.tolist(), batch.label.tolist()))
        weights = []
        for i, y in zip(batch.index.tolist(), batch.label.tolist()):
            b, d = (a[i] / max(a[j] for j in a if self.label[j] == y) for a in (self.biased, self.debiased))
            weights.append(b / (b + d + 1e-8))
        return weights


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def close(value):
    return pytest.approx(value, rel=1e-4, abs=1e-6)


def gradients(term, network):
    """Of each parameter, None where the term does not reach it."""
    return torch.autograd.grad(term, [*network.parameters()], retain_graph=True, allow_unused=True)


def batches(tiny, *starts):
    """Batches of 12, the later ones overlapping the earlier."""
    return [tiny.split("train").batch(torch.arange(start, start + 12)) for start in starts]


def cross_entropies(logits, label):
    return [-math.log(p) for p in probabilities(logits, label)]


def test_lff_weighs_by_averaged_losses_over_the_largest_of_the_class(build, tiny):
    method, slow = build("lff", loss_decay=0.6, q=0.5).train(), Difficulty(0.6)
    for batch in batches(tiny, 0, 6, 0, 24):
        with torch.no_grad():
            logits, biased = method.student(batch.images), method.biased(batch.images)
        losses = cross_entropies(logits, batch.label)
        weights = slow.weights(batch, cross_entropies(biased, batch.label), losses)
        terms = method.loss(batch)
        assert terms["label"].item() == close(mean(w * loss for w, loss in zip(weights, losses)))
        gce = mean((1 - p**0.5) / 0.5 for p in probabilities(biased, batch.label))
        assert terms["biased"].item() == close(gce)
        method.observe(batch, terms)


def test_lff_in_validation_weighs_by_a_samples_own_losses(build, batch):
    method = build("lff").eval()
    with torch.no_grad():
        own = cross_entropies(method.student(batch.images), batch.label)
        biased = cross_entropies(method.biased(batch.images), batch.label)
        assert method.loss(batch)["label"].item() == close(mean(d * b / (b + d) for b, d in zip(biased, own)))


@pytest.mark.parametrize("name", ["lff", "dfa", "rebias"])
def test_the_two_networks_are_clipped_apart_and_all_is_trained(name, build):
    method = build(name)
    groups = parameter_groups(method, method.next_stage())
    assert {id(p) for p in method.biased.parameters()} <= {id(p) for p in groups["biased"]}
    assert {id(p) for p in method.student.parameters()} <= {id(p) for p in groups["student"]}
    both = [id(p) for group in groups.values() for p in group]
    assert sorted(both) == sorted(id(p) for p in method.parameters())


def joined(method, batch, partner):
    """The logits of both heads of dfa, each as one matrix on the features of both encoders."""
    intrinsic = method.student.forward_features(batch.images).mean((2, 3))
    biased = method.biased.forward_features(batch.images).mean((2, 3))[partner]
    features = torch.cat([intrinsic, biased], 1)
    heads = method.student.get_classifier(), method.biased.get_classifier()
    ours = torch.cat([heads[0].weight, method.student_of_biased.weight], 1)
    theirs = torch.cat([method.biased_of_student.weight, heads[1].weight], 1)
    return F.linear(features, ours, heads[0].bias), F.linear(features, theirs, heads[1].bias)


def test_dfa_is_the_papers(build, tiny):
    method, slow = build("dfa", biased_weight=3, swap_weight=0.5, swapped_biased_weight=2).train(), Difficulty(0.7)
    for seed, batch in enumerate(batches(tiny, 0, 6)):
        torch.manual_seed(seed)
        partner = torch.randperm(12)
        with torch.no_grad():
            logits, biased = joined(method, batch, torch.arange(12))
            swapped, swapped_biased = joined(method, batch, partner)
        losses = cross_entropies(logits, batch.label)
        weights = slow.weights(batch, cross_entropies(biased, batch.label), losses)
        gce = mean((1 - p**0.7) / 0.7 for p in probabilities(biased, batch.label))
        swapped_gce = mean((1 - p**0.7) / 0.7 for p in probabilities(swapped_biased, batch.label[partner]))
        torch.manual_seed(seed)
        terms = method.loss(batch)
        assert {name: term.item() for name, term in terms.items()} == {
            "label": close(mean(w * loss for w, loss in zip(weights, losses))),
            "biased": close(3 * gce),
            "swapped": close(0.5 * mean(w * x for w, x in zip(weights, cross_entropies(swapped, batch.label)))),
            "swapped biased": close(0.5 * 2 * swapped_gce),
        }
        method.observe(batch, terms)


def test_dfas_heads_never_train_the_other_encoder(build, batch):
    method = build("dfa").train()
    terms = method.loss(batch)
    for name, term in terms.items():
        other = method.student if "biased" in name else method.biased
        own = method.biased if "biased" in name else method.student
        assert gradients(term, other) == (None,) * len([*other.parameters()])
        assert all(g is not None and g.abs().sum() > 0 for g in gradients(term, own))


def test_dfa_swaps_after_the_given_steps_and_judges_the_intrinsic_head(build, batch):
    method = build("dfa", swap_after=2).train()
    for expected in (2, 2, 4, 4):
        terms = method.loss(batch)
        assert len(terms) == expected
        method.observe(batch, terms)
    method.eval()
    torch.testing.assert_close(method.predict(batch.images), joined(method, batch, torch.arange(20))[0])


# EnD


def test_end_is_the_papers(build, batch):
    method = build("end", disentangling=0.3, entangling=0.7).train()
    with torch.no_grad():
        logits = method.student(batch.images)
        features = method.student.forward_features(batch.images).mean((2, 3)).tolist()
    label, bias = batch.label.tolist(), batch.bias.tolist()

    def cosine(i, j):
        dot = sum(a * b for a, b in zip(features[i], features[j]))
        return dot / math.prod(math.sqrt(sum(a * a for a in features[k])) for k in (i, j))

    pairs = list(itertools.combinations(range(20), 2))
    same_bias = [[cosine(i, j) for i, j in pairs if bias[i] == bias[j] == b] for b in set(bias)]
    crossing = [cosine(i, j) for i, j in pairs if label[i] == label[j] and bias[i] != bias[j]]
    terms = method.loss(batch)
    assert terms["label"].item() == close(mean(cross_entropies(logits, batch.label)))
    count = sum(map(len, same_bias))
    assert terms["disentangling"].item() == close(0.3 * sum(abs(sum(group)) for group in same_bias) / count)
    assert terms["entangling"].item() == close(0.7 * (1 - mean((1 + g) / 2 for g in crossing)))


def test_end_has_a_term_of_zero_where_there_are_no_pairs(build, batch):
    alike = replace(batch, bias=batch.label.clone())
    assert build("end").train().loss(alike)["entangling"].item() == 0
    apart = replace(batch, bias=torch.arange(20))
    assert build("end").train().loss(apart)["disentangling"].item() == 0


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1))
def test_ends_terms_lie_in_the_unit_interval_and_ignore_the_order(seed):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(9, 3, dtype=torch.float64, generator=generator))
    label, bias = torch.randint(3, (2, 9), generator=generator)
    order = torch.randperm(9, generator=generator)
    for first, second in (
        (disentangling_term(x @ x.T, bias), disentangling_term(x[order] @ x[order].T, bias[order])),
        (entangling_term(x @ x.T, label, bias), entangling_term(x[order] @ x[order].T, label[order], bias[order])),
    ):
        assert 0 <= first <= 1
        torch.testing.assert_close(first, second)


def test_end_without_bias_labels_is_refused(build, batch):
    with pytest.raises(UserError, match="end needs bias labels"):
        build("end").train().loss(replace(batch, bias=None))


# ReBias


def kernels(seed=0, m=6):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, m, 3, dtype=torch.float64, generator=generator)
    return rbf_kernel(x, 0.8), rbf_kernel(y, 1.3), x, y


def test_hsic_is_the_mean_over_all_quadruples():
    k, l, x, y = kernels()  # noqa: E741

    def kernel(points, sigma):
        return [[math.exp(-(math.dist(u, v) ** 2) / (2 * sigma**2)) for u in points] for v in points]

    slow_k, slow_l = kernel(x.tolist(), 0.8), kernel(y.tolist(), 1.3)
    quadruples = itertools.permutations(range(6), 4)
    slow = mean(slow_k[i][j] * (slow_l[i][j] + slow_l[q][r] - 2 * slow_l[i][q]) for i, j, q, r in quadruples)
    assert hsic(k, l).item() == pytest.approx(slow, rel=1e-9)


def test_hsic_is_the_published_codes_which_subtracts_one_everywhere():
    k, l, _, _ = kernels(seed=1, m=9)  # noqa: E741
    a, b, m = k - 1, l - 1, 9
    published = (a @ b).trace() + a.sum() * b.sum() / (m - 1) / (m - 2) - 2 * a.sum(0).dot(b.sum(0)) / (m - 2)
    torch.testing.assert_close(hsic(k, l), published / (m * (m - 3)))


def test_hsic_of_independent_samples_is_nothing_on_average_and_of_equal_ones_is_more():
    values = [hsic(*kernels(seed, m=8)[:2]).item() for seed in range(200)]
    deviation = torch.tensor(values).std().item() / math.sqrt(200)
    assert abs(mean(values)) < 3 * deviation
    assert mean(hsic(*[kernels(seed, m=8)[0]] * 2).item() for seed in range(20)) > 10 * deviation


def test_rebias_is_the_papers_and_each_network_has_its_own_terms(build, batch):
    method = build("rebias", weight=2, sigma=0.5).train()
    with torch.no_grad():
        f = rbf_kernel(method.student.forward_features(batch.images).mean((2, 3)), 0.5)
        narrow = method.biased.forward_features(batch.images).mean((2, 3))
        dependence = hsic(f, rbf_kernel(narrow, 0.5)).item()
        biased = F.cross_entropy(method.biased.fc(narrow), batch.label).item()
        label = F.cross_entropy(method.student(batch.images), batch.label).item()
    terms = method.loss(batch)
    expected = {"label": label, "independence": 2 * dependence, "biased": biased, "dependence": -2 * dependence}
    assert {name: term.item() for name, term in terms.items()} == {n: close(value) for n, value in expected.items()}
    assert abs(dependence) > 1e-4
    for name, term in terms.items():
        own, other = (method.student, method.biased)[:: 1 if name in ("label", "independence") else -1]
        assert gradients(term, other) == (None,) * len([*other.parameters()])
        assert sum(g.abs().sum() for g in gradients(term, own) if g is not None) > 0


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 1), (3, 3, 1), (5, 1, 3)])
def test_a_narrow_networks_receptive_field_is_what_its_kernels_say(sizes):
    torch.manual_seed(0)
    network = NarrowCNN(3, 3, sizes, (8, 8, 8)).eval()
    assert receptive_field(network.forward_features, InputSpec(3, 15, 15)) == 1 + sum(size - 1 for size in sizes)


def test_the_default_bias_network_sees_one_pixel(build):
    network = build("rebias").biased.eval()
    assert receptive_field(network.forward_features, InputSpec(3, 12, 12)) == 1
    images = torch.rand(2, 3, 12, 12)
    changed = images.clone()
    changed[:, :, 4, 7] = 0
    moved = (network.forward_features(images) != network.forward_features(changed)).any(1)
    assert moved.any(0).nonzero().tolist() == [[4, 7]]


def test_a_bias_network_that_sees_as_much_as_the_student_is_refused(build):
    with pytest.raises(UserError, match=r"The bias network sees 9 pixels across and the student [1-8],"):
        build("rebias", bias_kernels=(3, 3, 3, 3))
    with pytest.raises(UserError, match="must be odd numbers"):
        build("rebias", bias_kernels=(1, 2, 1, 1))


def test_three_images_have_no_dependence(build, tiny):
    terms = build("rebias").train().loss(tiny.split("train").batch(torch.arange(3)))
    assert terms["independence"] == terms["dependence"] == 0
    assert terms["label"].isfinite() and terms["biased"].isfinite()


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("lff", {"loss_decay": 1.0}),
        ("lff", {"q": 0.0}),
        ("dfa", {"swap_weight": 0.0}),
        ("dfa", {"swap_after": -1}),
        ("end", {"disentangling": 0.0, "entangling": 0.0}),
        ("end", {"entangling": -0.1}),
        ("rebias", {"sigma": 0.0}),
    ],
)
def test_settings_without_meaning_are_refused(name, chosen, build):
    with pytest.raises(UserError, match=f"method.*{next(iter(chosen))}"):
        build(name, **chosen)
