"""kd, e2kd, at, cat-kd, review-kd and crd: each loss written again, slowly, from its paper."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from hansfree.core import Setup, Teacher
from hansfree.errors import UserError
from hansfree.explainers import (
    LRP,
    Attention,
    FeatureMap,
    GradCAM,
    GradientXInput,
    InputGradient,
    IntegratedGradients,
    SmoothGrad,
)
from hansfree.methods import METHODS
from hansfree.methods.at import attention_transfer
from hansfree.methods.cat_kd import activation_maps, class_attention_transfer
from hansfree.methods.crd import Bank, contrast
from hansfree.methods.e2kd import BASES, explanation_distance
from hansfree.methods.label_loss import label_loss
from hansfree.methods.output_distillation import multi_label_kl, softened_kl
from hansfree.methods.review_kd import Fusion, hierarchical_context_loss
from hansfree.models import load_model

seeds = st.integers(0, 2**31 - 1)


def network(name):
    return load_model(name, num_classes=3, options={"widths": [4, 6]})


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def exact(tiny):
    """Builds a method in float64, teacher and student included; and the batch it is tried on."""

    def made(name, *, several=False, **more):
        torch.manual_seed(0)
        teacher = network("small-resnet").double()
        for _ in range(3):
            teacher.train()(torch.rand(16, 3, 12, 12).double())
        torch.manual_seed(1)
        train = tiny.split("train")
        label = torch.eye(3)[train.label] if several else train.label
        setup = Setup(lambda: network("small-cnn").double(), Teacher.live(teacher), 48, 3, tiny.input, label=label)
        return METHODS[name](setup, **more).double().train()

    return made


@pytest.fixture
def batch(tiny):
    batch = tiny.split("train").batch(torch.arange(16))
    return dataclasses.replace(batch, input=batch.images.double())


def number(value):
    return float(value.detach())


# kd


@settings(max_examples=20)
@given(seeds, st.floats(0.5, 8))
def test_the_divergence_of_several_labels_is_that_of_each_class_s_yes_or_no(seed, temperature):
    student, teacher = 3 * random(4, 5, seed=seed), 3 * random(4, 5, seed=seed + 1)
    slow = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist()):
        p, q = special.expit(t / temperature), special.expit(s / temperature)
        slow += stats.entropy([p, 1 - p], [q, 1 - q])
    loss = multi_label_kl(student, teacher, temperature)
    assert number(loss) == pytest.approx(temperature**2 * slow / 4)
    assert number(multi_label_kl(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)


def test_sure_logits_of_several_labels_stay_finite():
    student = torch.tensor([[400.0, -400.0]], requires_grad=True)
    loss = multi_label_kl(student, -student.detach(), 1.0)
    loss.backward()
    assert number(loss) == pytest.approx(800)
    assert student.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("label_weight", [0.0, 0.3])
def test_kd_is_the_divergence_plus_so_much_of_the_cross_entropy(exact, batch, label_weight):
    method = exact("kd", temperature=4.0, label_weight=label_weight).eval()
    terms = method.loss(batch)
    student, teacher = method.student(batch.images).detach(), method.teacher.logits(batch)
    divergences, entropies = [], []
    for s, t, y in zip(student.tolist(), teacher.tolist(), batch.label.tolist()):
        divergences.append(16 * stats.entropy(special.softmax([v / 4 for v in t]), special.softmax([v / 4 for v in s])))
        entropies.append(-special.log_softmax(s)[y])
    assert number(terms["output"]) == pytest.approx(sum(divergences) / 16)
    assert terms.keys() == ({"output", "label"} if label_weight else {"output"})
    assert method.reads_labels == (label_weight > 0)
    if label_weight:
        assert number(terms["label"]) == pytest.approx(0.3 * sum(entropies) / 16)


def test_labels_of_several_classes_choose_the_multi_label_loss(exact, batch):
    method = exact("kd", several=True, label_weight=1.0)
    several = dataclasses.replace(batch, label=torch.eye(3)[batch.label].roll(1, 0))
    terms = method.loss(several)
    logits = method.student(several.images)
    torch.testing.assert_close(terms["output"], multi_label_kl(logits, method.teacher.logits(batch), 1.0))
    slow = 0.0
    for s, y in zip(logits.flatten().tolist(), several.label.flatten().tolist()):
        slow -= math.log(special.expit(s)) if y else math.log(special.expit(-s))
    assert number(terms["label"]) == pytest.approx(slow / 16)


def test_output_distillation_is_kd_with_its_paper_s_preset(exact, batch):
    preset = exact("output-distillation").eval().loss(batch)
    assert {name: number(term) for name, term in preset.items()} == {
        name: number(term) for name, term in exact("kd", temperature=3.0).eval().loss(batch).items()
    }


# at


def attention(features):
    """Eq. 1 with p = 2, normalised: one list of numbers per sample."""
    maps = []
    for sample in features.tolist():
        pixels = [sum(c[i][j] ** 2 for c in sample) for i in range(len(sample[0])) for j in range(len(sample[0][0]))]
        size = math.sqrt(sum(p**2 for p in pixels))
        maps.append([p / size for p in pixels])
    return maps


@settings(max_examples=15)
@given(seeds, st.floats(0.01, 100))
def test_attention_transfer_from_its_paper(seed, scale):
    student, teacher = random(3, 2, 4, 5, seed=seed), random(3, 7, 4, 5, seed=seed + 1)
    differences = [
        (s - t) ** 2 for a, b in zip(attention(student), attention(teacher)) for s, t in zip(a, b, strict=True)
    ]
    loss = attention_transfer(student, teacher)
    assert number(loss) == pytest.approx(sum(differences) / len(differences))
    torch.testing.assert_close(attention_transfer(scale * student, teacher), loss)
    assert number(attention_transfer(teacher, teacher[:, torch.randperm(7)])) == pytest.approx(0, abs=1e-20)


def test_attention_maps_meet_at_the_smaller_size():
    small, large = random(2, 3, 2, 2), random(2, 3, 4, 4, seed=1)
    pooled = torch.stack([large[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)], -1)
    expected = attention_transfer(small, pooled.view(2, 3, 2, 2))
    torch.testing.assert_close(attention_transfer(small, large), expected)
    torch.testing.assert_close(attention_transfer(large, small), expected)


def test_at_sums_over_pairs_from_the_last_back(exact, batch):
    method = exact("at", weight=1000.0, label_weight=0.5)
    terms = method.loss(batch)
    ours, theirs = inner_maps(method, batch)
    slow = sum(number(attention_transfer(s, t)) for s, t in zip(ours[::-1], theirs[::-1]))
    assert number(terms["attention"]) == pytest.approx(1000 * slow)
    torch.testing.assert_close(terms["label"], 0.5 * label_loss(method.student(batch.images), batch.label))
    assert exact("at", label_weight=0.0).loss(batch).keys() == {"attention"}


def inner_maps(method, batch):
    """What the levels of small-cnn and the stages of small-resnet give, by running their layers by hand."""
    cnn, resnet = method.student.network, method.teacher.model.network
    ours, x = [], batch.images
    for level in range(2):
        x = torch.nn.functional.avg_pool2d(x, 2) if level else x
        x = torch.relu(cnn.norms[level](cnn.convs[level](x)))
        ours.append(x)
    theirs, x = [], torch.relu(resnet.stem_norm(resnet.stem(batch.images)))
    for block in resnet.blocks:
        x = block(x)
        theirs.append(x)
    return ours, theirs


# cat-kd


@settings(max_examples=15)
@given(seeds)
def test_class_attention_transfer_from_its_paper(seed):
    student, teacher = random(2, 3, 4, 4, seed=seed), random(2, 3, 6, 6, seed=seed + 1)
    total = 0.0
    for i in range(2):
        for k in range(3):
            s = [number(student[i, k, a : a + 2, b : b + 2].mean()) for a in (0, 2) for b in (0, 2)]
            t = [number(teacher[i, k, a : a + 3, b : b + 3].mean()) for a in (0, 3) for b in (0, 3)]
            total += sum((p / math.hypot(*s) - q / math.hypot(*t)) ** 2 for p, q in zip(s, t))
    assert number(class_attention_transfer(student, teacher)) == pytest.approx(total / (2 * 3 * 4))
    raw = class_attention_transfer(student, student + 1, resolution=4, normalised=False)
    assert number(raw) == pytest.approx(1)


def test_the_mean_of_a_class_activation_map_is_the_logit_less_the_bias(exact, batch):
    method = exact("cat-kd").eval()
    ours, theirs = inner_maps(method, batch)
    for model, features in ((method.student, ours[-1]), (method.teacher.model, theirs[-1])):
        maps = activation_maps(model, features)
        bias = model.get_classifier().bias
        torch.testing.assert_close(maps.mean((2, 3)) + bias, model(batch.images))
    maps = [
        torch.einsum("kc,bchw->bkhw", m.get_classifier().weight, f[-1])
        for m, f in ((method.student, ours), (method.teacher.model, theirs))
    ]
    torch.testing.assert_close(method.loss(batch)["class-attention"], 400 * class_attention_transfer(*maps))


# review-kd


def pooled(map, side):
    """Adaptive average pooling of one [h, w] map, window by window."""
    height, width = map.shape
    rows = [(i * height // side, -(-(i + 1) * height // side)) for i in range(side)]
    columns = [(j * width // side, -(-(j + 1) * width // side)) for j in range(side)]
    return torch.stack([torch.stack([map[a:b, c:d].mean() for c, d in columns]) for a, b in rows])


@pytest.mark.parametrize(("side", "sides"), [(7, (4, 2, 1)), (4, (2, 1)), (2, (1,)), (1, ())])
def test_the_hierarchical_context_loss_from_its_paper(side, sides):
    student, teacher = random(2, 3, side, side), random(2, 3, side, side, seed=1)
    whole = number(((student - teacher) ** 2).mean())
    weights, losses = [1.0], [whole]
    for n, smaller in enumerate(sides, 1):
        maps = [torch.stack([pooled(m, smaller) for m in x.flatten(0, 1)]) for x in (student, teacher)]
        weights.append(0.5**n)
        losses.append(number(((maps[0] - maps[1]) ** 2).mean()))
    expected = sum(w * x for w, x in zip(weights, losses)) / sum(weights)
    assert number(hierarchical_context_loss(student, teacher)) == pytest.approx(expected)


def test_fusion_weighs_each_pixel_of_the_stage_and_of_what_came_after_it():
    torch.manual_seed(0)
    fusion = Fusion(3, 4, 5, fuses=True).double().eval()
    features, later = random(2, 3, 4, 4), random(2, 4, 2, 2, seed=1)
    out, fused = fusion(features, later, torch.Size([8, 8]))
    x = fusion.narrow(features)
    for b, i, j in [(0, 0, 0), (1, 3, 2), (0, 1, 3)]:
        y = later[b, :, i // 2, j // 2]
        both = torch.cat([x[b, :, i, j], y])
        convolution = fusion.attention[0]
        p, q = torch.sigmoid(convolution.weight[:, :, 0, 0] @ both + convolution.bias)
        for a, c in [(0, 0), (1, 1)]:
            torch.testing.assert_close(fused[b, :, 2 * i + a, 2 * j + c], p * x[b, :, i, j] + q * y)
    torch.testing.assert_close(out, fusion.out(fused))


def test_review_kd_reviews_from_the_last_stage_to_the_first(exact, batch):
    method = exact("review-kd", weight=2.0, label_weight=0.0).eval()
    ours, theirs = inner_maps(method, batch)
    targets = [theirs[-1].mean((2, 3))[:, :, None, None], theirs[-1], theirs[0]]
    features = [ours[-1].mean((2, 3))[:, :, None, None], ours[-1], ours[0]]
    later, total = None, 0.0
    for fusion, f, t in zip(list(method.fusions)[::-1], features, targets, strict=True):
        out, later = fusion(f, later, t.shape[-2:])
        total += number(hierarchical_context_loss(out, t))
    assert len(method.fusions) == 3
    assert number(method.loss(batch)["review"]) == pytest.approx(2 * total)


def test_review_kd_warms_up_epoch_by_epoch_in_training_alone(exact, batch):
    method = exact("review-kd", warmup_epochs=4)
    full = number(exact("review-kd").loss(batch)["review"])
    shares = []
    for _ in range(13):
        shares.append(number(method.loss(batch)["review"]) / full)
        method.observe(batch, {})
    assert shares == pytest.approx([min(1 + 16 * step // 48, 4) / 4 for step in range(13)])
    fresh, plain = exact("review-kd", warmup_epochs=4).eval(), exact("review-kd").eval()
    assert number(fresh.loss(batch)["review"]) == number(plain.loss(batch)["review"])


# crd


@settings(max_examples=15)
@given(seeds, st.floats(0.05, 1))
def test_contrast_is_noise_contrastive_estimation(seed, temperature):
    u, v, bank = (torch.nn.functional.normalize(random(n, 8, seed=seed + i)) for i, n in enumerate((3, 3, 6)))
    own = torch.zeros(3, 6, dtype=torch.bool)
    own[1, 4] = True
    noise = 6 * math.exp(1 / (2 * 8 * temperature**2))

    def h(a, b):
        return 1 / (1 + noise / math.exp(number(a @ b) / temperature))

    slow = 0.0
    for i in range(3):
        slow -= math.log(h(u[i], v[i]))
        slow -= sum(math.log1p(-h(u[i], bank[j])) for j in range(6) if not own[i, j])
    assert number(contrast(u, v, bank, own, temperature)) == pytest.approx(slow / 3)


def test_the_noise_is_what_a_random_bank_shows():
    """The published code measures it in its first step; both banks are random then."""
    torch.manual_seed(0)
    bank = Bank("queue", 20000, 128, 0.5)
    anchor = torch.nn.functional.normalize(torch.randn(8, 128))
    measured = (anchor @ bank.ours.T / 0.07).exp().mean()
    assert number(measured) == pytest.approx(math.exp(1 / (2 * 128 * 0.07**2)), rel=0.02)


def test_a_queue_keeps_the_newest_in_turn():
    bank = Bank("queue", 5, 2, 0.5)
    assert bank.index.tolist() == [-1] * 5
    for start in (0, 3):
        index = torch.arange(start, start + 3)
        bank.remember(index, index[:, None].expand(3, 2).float(), -index[:, None].expand(3, 2).float())
    assert bank.index.tolist() == [5, 1, 2, 3, 4]
    assert bank.ours[:, 0].tolist() == [5, 1, 2, 3, 4] and bank.theirs[:, 1].tolist() == [-5, -1, -2, -3, -4]
    index = torch.arange(10, 18)
    bank.remember(index, index[:, None].expand(8, 2).float(), index[:, None].expand(8, 2).float())
    assert sorted(bank.index.tolist()) == [13, 14, 15, 16, 17]


def test_a_full_bank_averages_what_it_remembers_of_each_image():
    bank = Bank("full", 4, 3, 0.75)
    before = bank.ours.clone()
    new = torch.nn.functional.normalize(torch.randn(2, 3))
    bank.remember(torch.tensor([3, 1]), new, new)
    for row, value in ((3, new[0]), (1, new[1])):
        mean = 0.75 * before[row] + 0.25 * value
        torch.testing.assert_close(bank.ours[row], mean / mean.norm())
    assert torch.equal(bank.ours[[0, 2]], before[[0, 2]])
    assert not bank.state_dict()


def test_crd_contrasts_both_ways_and_leaves_the_image_s_own_past_out(exact, batch):
    method = exact("crd", label_weight=0.0, temperature=0.5, dimensions=6)
    assert len(method.bank.index) == 48  # of the 16,384 asked for: there are no more images
    method.loss(batch)
    method.observe(batch, {})
    assert method.bank.index[:16].tolist() == batch.index.tolist()
    loss = method.loss(batch)["contrast"]
    ours, theirs = inner_maps(method, batch)
    u, v = (
        torch.nn.functional.normalize(embed.linear(maps[-1].mean((2, 3))))
        for embed, maps in ((method.embed_ours, ours), (method.embed_theirs, theirs))
    )
    own = torch.zeros(16, 48, dtype=torch.bool)
    own[range(16), range(16)] = True
    both = contrast(u, v, method.bank.theirs, own, 0.5) + contrast(v, u, method.bank.ours, own, 0.5)
    torch.testing.assert_close(loss, 0.8 * both)


def test_crd_remembers_nothing_of_validation(exact, batch):
    method = exact("crd")
    method.eval().loss(batch)
    before = method.bank.index.clone()
    method.train().observe(batch, {})
    assert torch.equal(before, method.bank.index)


# e2kd


def class_activation(model, features, chosen):
    """Grad-CAM of a network that averages its map: the gradient of logit k is W_k / pixels, everywhere."""
    weight = model.get_classifier().weight
    return torch.relu(torch.einsum("bc,bchw->bhw", weight[chosen], features))


def halved(map):
    """Rows of half the number: around each centre a triangle of two pixels to either side, cut off at the border."""
    rows = []
    for i in range(len(map) // 2):
        weights = [max(0.0, 1 - abs(j + 0.5 - 2 * (i + 0.5)) / 2) for j in range(len(map))]
        rows.append(sum(w * row for w, row in zip(weights, map)) / sum(weights))
    return torch.stack(rows)


def test_e2kd_with_grad_cam_from_its_paper(exact, batch):
    method = exact("e2kd", explainer=GradCAM(), base={"temperature": 5.0})
    terms = method.loss(batch)
    our_maps, their_maps = inner_maps(method, batch)
    chosen = method.teacher.logits(batch).argmax(1)
    student = class_activation(method.student, our_maps[-1], chosen)
    teacher = class_activation(method.teacher.model, their_maps[-1], chosen)
    slow = []
    for s, t in zip(student, teacher):
        ours, theirs = halved(halved(s).T).T.flatten().tolist(), t.flatten().tolist()
        product = sum(a * b for a, b in zip(ours, theirs, strict=True))
        slow.append(1 - product / (math.hypot(*ours) * math.hypot(*theirs)))
    logits = method.student(batch.images)
    torch.testing.assert_close(terms["output"], softened_kl(logits, method.teacher.logits(batch), 5.0))
    assert number(terms["explanation"]) == pytest.approx(10 * sum(slow) / 16)


def test_maps_of_one_size_are_compared_as_they_are():
    student, teacher = random(4, 1, 7, 7), random(4, 1, 7, 7, seed=1)
    cosines = torch.nn.functional.cosine_similarity(student.flatten(1), teacher.flatten(1))
    torch.testing.assert_close(explanation_distance(student, teacher), (1 - cosines).mean())
    texts = random(4, 9), random(4, 9, seed=1)
    torch.testing.assert_close(explanation_distance(*texts), (1 - torch.cosine_similarity(*texts)).mean())


def test_a_zero_map_is_at_distance_1_and_has_no_gradient():
    student = torch.zeros(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    loss = explanation_distance(student, random(1, 1, 3, 3).abs())
    loss.backward()
    assert number(loss) == 1
    assert student.grad.isfinite().all()
    assert number(explanation_distance(student.detach(), student.detach())) == 0


def test_grad_cam_s_weights_keep_their_gradient(exact, batch):
    method = exact("e2kd", explainer=GradCAM())
    method.loss(batch)["explanation"].backward()
    assert method.student.get_classifier().weight.grad.abs().sum() > 0


EXPLAINERS = [
    GradCAM(),
    LRP(epsilon=0.05),
    InputGradient(),
    IntegratedGradients(steps=2),
    SmoothGrad(GradientXInput(), samples=2),
    Attention(),
    FeatureMap(),
]


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("base", BASES)
def test_one_pass_serves_the_base_and_the_explanation_alike(exact, batch, base, explainer):
    """Terms, their gradients and what batch norm remembers are those of the base alone."""
    both, alone = exact("e2kd", explainer=explainer, base=base), exact(base)
    terms, expected = both.loss(batch), alone.loss(batch)
    assert terms.keys() - expected.keys() == {"explanation"}
    for name, term in expected.items():
        torch.testing.assert_close(terms[name], term)
    torch.stack([terms[name] for name in expected]).sum().backward(retain_graph=True)
    torch.stack(list(expected.values())).sum().backward()
    for ours, theirs in zip(both.base.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(both.student.buffers(), alone.student.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    both.zero_grad()
    terms["explanation"].backward()
    assert sum(p.grad.abs().sum() for p in both.student.parameters() if p.grad is not None) > 0


def test_every_kth_batch_has_the_explanation_and_validation_always(exact, batch):
    method = exact("e2kd", explainer=GradCAM(), every=3)
    has = []
    for _ in range(7):
        terms = method.train().loss(batch)
        has.append("explanation" in terms)
        method.observe(batch, terms)
        assert "explanation" in method.eval().loss(batch)
    assert has == [True, False, False, True, False, False, True]
    assert method.weight == 10  # not raised in return


def test_e2kd_lets_its_base_observe(exact, batch):
    method = exact("e2kd", explainer=GradCAM(), base="crd", every=2)
    for _ in range(2):
        method.observe(batch, method.loss(batch))
    assert method.base.bank.index[:32].tolist() == 2 * batch.index.tolist()
    assert method.reads_labels and not exact("e2kd", explainer=GradCAM()).reads_labels


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("kd", {"temperature": 0.0}, "method.temperature must be above 0, not 0.0"),
        ("kd", {"label_weight": -1.0}, "method.label_weight must be 0 or above"),
        ("at", {"weight": 0.0}, "method.weight must be above 0"),
        ("at", {"student_layers": ("relus.0",), "teacher_layers": ("blocks.0", "blocks.1")}, "names 1 layers and"),
        ("at", {"student_layers": ()}, "at least one layer"),
        ("at", {"student_layers": ("relu.0",)}, "relus.0"),
        ("cat-kd", {"resolution": 1}, "method.resolution must be 2 or above, not 1"),
        ("review-kd", {"warmup_epochs": 0}, "method.warmup_epochs must be 1"),
        ("crd", {"bank": "half"}, "queue"),
        ("crd", {"negatives": 0}, "method.negatives and dimensions"),
        ("e2kd", {"explainer": GradCAM(), "every": 0}, "method.every must be 1"),
        ("e2kd", {"explainer": GradCAM(), "base": "erm"}, "There is no base method 'erm'"),
        ("e2kd", {"explainer": GradCAM(), "base": {"temprature": 2}}, "has no setting 'temprature'"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(exact, name, settings, reason):
    with pytest.raises(UserError) as refused:
        exact(name, **settings)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
