"""Each loss again, slowly, from its paper."""

import math

import pytest
import torch

from hansfree.explainers import LRP, GradientXInput
from hansfree.methods.class_choice import Top, TopOrOther
from hansfree.methods.explanation_distillation import absorbed


@pytest.fixture
def batch(tiny):
    return tiny.split("valid").batch(torch.arange(6))


def eq6(a, b):
    """The distance of explanation distillation for one sample, element by element."""
    difference = sum(abs(x - y) for x, y in zip(a.flatten().tolist(), b.flatten().tolist()))
    sizes = (sum(abs(x) for x in m.flatten().tolist()) for m in (a, b))
    return difference / math.sqrt(math.prod(sizes))


def test_cross_entropy(build, batch):
    method = build("erm").eval()
    logits = method.student(batch.images).tolist()
    slow = [-row[y] + math.log(sum(map(math.exp, row))) for row, y in zip(logits, batch.label.tolist())]
    assert method.loss(batch)["label"].item() == pytest.approx(sum(slow) / len(slow), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_output_distillation_is_the_softened_kl_times_t_squared(build, batch, temperature):
    method = build("output-distillation", temperature=temperature).eval()

    def softened(row):
        values = [math.exp(x / temperature) for x in row]
        return [value / sum(values) for value in values]

    slow = 0.0
    rows = zip(method.teacher.model(batch.images).tolist(), method.student(batch.images).tolist())
    for t, s in rows:
        slow += sum(p * math.log(p / q) for p, q in zip(softened(t), softened(s)))
    slow *= temperature**2 / len(batch)
    assert method.loss(batch)["output"].item() == pytest.approx(slow, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "term"), [("feature-distillation", "feature"), ("attention-distillation", "attention")]
)
def test_feature_and_attention_distillation_are_eq_6_on_the_last_map(build, batch, name, term):
    method = build(name).eval()
    f_t = method.teacher.model.forward_features(batch.images)
    f_s = method.student.forward_features(batch.images)
    if term == "attention":
        f_t, f_s = ((f**2).sum(1, keepdim=True) for f in (f_t, f_s))
    f_s, f_t = (torch.nn.functional.adaptive_avg_pool2d(f, min(f_s.shape[-1], f_t.shape[-1])) for f in (f_s, f_t))
    slow = sum(eq6(a, b) for a, b in zip(f_s, f_t)) / len(batch)
    assert method.loss(batch)[term].item() == pytest.approx(slow, rel=1e-4)


@pytest.mark.parametrize("match_absorbed", [False, True])
def test_explanation_distillation_is_eq_7_sample_by_sample(build, batch, match_absorbed):
    explainer = LRP(epsilon=(0.01, 0.1))
    method = build("explanation-distillation", explainer=explainer, levels=2, match_absorbed=match_absorbed).eval()
    epsilons = explainer.fixed_draws(batch.index)["epsilon"]
    coins = method.rule.fixed_draws(batch.index)
    slow = 0.0
    for i in range(len(batch)):
        image = batch.images[i : i + 1]
        top = method.teacher.model(image).argmax(1)
        k = method.rule.choose(method.teacher.model(image), {key: value[i : i + 1] for key, value in coins.items()})
        if coins["coin"][i] < 0.5:
            assert k == top
        one = LRP(epsilon=epsilons[i].item())
        maps, extras = [], []
        for model in (method.student, method.teacher.model):
            logits, map = one(model, image, k)
            maps.append(map[0])
            extras.append((logits[0, k] - map.sum()).reshape(1))
        for level in (0, 1):
            pooled = [torch.nn.functional.avg_pool2d(map, 2**level).flatten() for map in maps]
            if match_absorbed:
                pooled = [torch.cat([map, extra / 4**level]) for map, extra in zip(pooled, extras)]
            slow += eq6(*pooled) / 2 / len(batch)
    assert method.loss(batch)["explanation"].item() == pytest.approx(slow, rel=1e-4)


def test_what_is_absorbed_and_what_arrives_make_the_logit(build, batch):
    model = build("erm").student.eval()
    logits, map = GradientXInput()(model, batch.images, batch.label)
    missing = absorbed(logits, map, batch.label)
    torch.testing.assert_close(map.flatten(1).sum(1) + missing, logits.gather(1, batch.label[:, None])[:, 0])


def test_class_choice_is_half_top_half_uniform_other():
    count, classes = 20000, 5
    logits = torch.randn(1, classes).expand(count, -1)
    rule = TopOrOther(0.5)
    chosen = rule.choose(logits, rule.draw(count, torch.Generator().manual_seed(0)))
    shares = chosen.bincount(minlength=classes) / count
    top = int(logits[0].argmax())
    expected = torch.full((classes,), 0.5 / (classes - 1))
    expected[top] = 0.5
    assert (shares - expected).abs().max() < 4 * math.sqrt(0.25 / count)
    assert (Top().choose(logits, {}) == top).all()
    assert (TopOrOther(1.0).choose(logits, rule.draw(count)) == top).all()
    assert (TopOrOther(0.0).choose(logits, rule.draw(count)) != top).all()


def test_validation_draws_epsilon_coin_and_other_apart():
    index = torch.arange(4000)
    epsilon = LRP(epsilon=(0.001, 0.01)).fixed_draws(index)["epsilon"].log()
    coins = TopOrOther().fixed_draws(index)
    together = torch.corrcoef(torch.stack([epsilon, coins["coin"], coins["other"]]))
    assert (together - torch.eye(3)).abs().max() < 0.06  # 4 standard deviations


def test_two_classes_leave_one_other():
    logits = torch.tensor([[0.0, 1.0]]).expand(100, -1)
    assert (TopOrOther(0.0).choose(logits, TopOrOther().draw(100)) == 0).all()


def test_the_last_layer_is_the_teacher_s_and_stays_so(build, tiny):
    method = build("explanation-distillation")
    ours, theirs = method.student.get_classifier(), method.teacher.model.get_classifier()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    assert not any(p.requires_grad for p in ours.parameters())
    assert ours.weight is not theirs.weight
