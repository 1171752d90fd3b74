"""Factor transfer, self-supervised distillation, logits beside features: each formula again; who learns when."""

import copy
import dataclasses
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d
from scipy.special import log_softmax, rel_entr, softmax

from hansfree.core import InputSpec, Setup, Teacher
from hansfree.errors import NotGivenError, UserError
from hansfree.methods import METHODS
from hansfree.methods.ft import convolutions, factor_distance
from hansfree.methods.sskd import least_wrong, similarities, with_turned
from hansfree.models import load_model
from hansfree.training import Training, fit

FEATURE_DISTILLERS = ("at", "cat-kd", "review-kd", "crd", "ft", "sskd")
TRAINING = Training(epochs=2, batch_size=12, optimiser="adam", lr=0.01)


def network(name):
    return load_model(name, num_classes=3, options={"widths": [4, 6]})


@pytest.fixture
def exact(tiny):
    """Builds a method in float64, teacher and student included, in its second stage unless told."""

    def made(name, *, stage=1, sees="input", **more):
        torch.manual_seed(0)
        teacher = network("small-resnet").double()
        for _ in range(3):
            teacher.train()(torch.rand(16, 3, 12, 12).double())
        torch.manual_seed(1)
        setup = Setup(lambda: network("small-cnn").double(), Teacher.live(teacher, sees), 48, 3, tiny.input)
        method = METHODS[name](setup, **more).double().train()
        if name in ("ft", "sskd"):
            for _ in range(stage):
                method.finish_stage()
            method.next_stage()
        return method

    return made


@pytest.fixture
def batch(tiny):
    batch = tiny.split("train").batch(torch.arange(8))
    return dataclasses.replace(batch, input=batch.images.double(), clean=batch.clean.double())


def number(value):
    return float(value.detach())


def array(values):
    return values.detach().numpy()


def slow_kl(teacher, student, temperature):
    """T^2 KL(teacher || student), mean over rows."""
    rows = [rel_entr(softmax(t / temperature), softmax(s / temperature)).sum() for t, s in zip(teacher, student)]
    return temperature**2 * np.mean(rows)


# Logits


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_paper_s_alpha_weighs_the_teacher(exact, batch, alpha):
    method = exact("kd", temperature=4.0, output_weight=alpha, label_weight=1 - alpha).eval()
    s, t = (array(model(batch.images)) for model in (method.student, method.teacher.model))
    cross_entropy = -np.mean([log_softmax(row)[y] for row, y in zip(s, batch.label)])
    slow = (1 - alpha) * cross_entropy + alpha * slow_kl(t, s, 4.0)
    assert number(sum(method.loss(batch).values())) == pytest.approx(slow)


@pytest.mark.parametrize("name", FEATURE_DISTILLERS)
def test_logits_are_added_to_features_with_a_weight_of_their_own(exact, batch, name):
    alone = exact(name, output_weight=0.0, output_temperature=3.0).eval().loss(batch)
    method = exact(name, output_weight=0.5, output_temperature=3.0, label_weight=0.5).eval()
    both = method.loss(batch)
    s, t = (array(model(batch.images)) for model in (method.student, method.teacher.model))
    assert "output" not in alone and both.keys() == alone.keys() | {"output"}
    assert number(both["output"]) == pytest.approx(0.5 * slow_kl(t, s, 3.0))
    torch.testing.assert_close(both["label"], 0.5 * alone["label"])
    for term in alone.keys() - {"label"}:
        torch.testing.assert_close(both[term], alone[term])


# Factor transfer


def slow_convolutions(layers, images):
    """3 x 3 cross-correlations with zeros around, and leaky ReLUs."""
    for layer in layers:
        weight, bias = array(layer[0].weight), array(layer[0].bias)
        if isinstance(layer[0], torch.nn.ConvTranspose2d):  # what leads back from a convolution's output to its input
            weight = weight.swapaxes(0, 1)[:, :, ::-1, ::-1]
        sums = [
            [sum(correlate2d(x, w, "same") for x, w in zip(image, kernels)) + b for kernels, b in zip(weight, bias)]
            for image in images
        ]
        images = np.where(np.array(sums) > 0, sums, 0.1 * np.array(sums))
    return images


def slow_distance(student, teacher):
    unit = [[x / np.sqrt((x**2).sum()) for x in factors] for factors in (student, teacher)]
    return np.mean([np.abs(s - t) for s, t in zip(*unit)])


def last_maps(method, batch):
    seen = method.watch()
    theirs = seen.theirs(seen.teacher.logits(batch)).maps[0]
    return seen.ours(seen.student(batch.images)).maps[0], theirs


def test_the_paraphraser_reconstructs_the_teacher_s_last_features(exact, batch):
    method = exact("ft", stage=0)
    features = array(method.teacher.model.forward_features(batch.images))
    again = slow_convolutions(method.paraphraser.decoder, slow_convolutions(method.paraphraser.encoder, features))
    terms = method.loss(batch)
    assert terms.keys() == {"reconstruction"}
    assert number(terms["reconstruction"]) == pytest.approx(((again - features) ** 2).mean())


def test_factors_are_compared_by_their_directions(exact, batch):
    method = exact("ft", weight=20.0, rate=0.5, label_weight=0.0)
    ours, theirs = last_maps(method, batch)
    torch.testing.assert_close(theirs, method.teacher.model.forward_features(batch.images))
    student = slow_convolutions(method.translator, array(ours))
    teacher = slow_convolutions(method.paraphraser.encoder, array(theirs))
    assert student.shape[1] == teacher.shape[1] == 3, "half of the teacher's channels"
    assert student.shape[2] > teacher.shape[2]
    side = teacher.shape[2]
    pooled = student.reshape(*student.shape[:2], side, student.shape[2] // side, side, -1).mean((3, 5))
    terms = method.loss(batch)
    assert terms.keys() == {"factor"}
    assert number(terms["factor"]) == pytest.approx(20 * slow_distance(pooled, teacher))


@settings(max_examples=15)
@given(st.integers(0, 2**31 - 1), st.floats(0.1, 10))
def test_the_distance_of_factors_ignores_their_size_alone(seed, scale):
    draw = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    assert number(factor_distance(first, scale * first)) == pytest.approx(0, abs=1e-12)
    assert 0 < number(factor_distance(first, second)) <= 2 / np.sqrt(3 * 4 * 4)
    torch.testing.assert_close(factor_distance(scale * first, second), factor_distance(first, second))


def test_one_layer_of_each_may_be_named(exact, batch):
    method = exact("ft", student_layer="relus.0", teacher_layer="blocks.0")
    assert [layer.path for layer in (*method.layers, *method.teacher_layers)] == ["relus.0", "blocks.0"]
    assert method.paraphraser.encoder[0][0].in_channels == 4
    assert isinstance(convolutions(torch.nn.Conv2d, (2, 3, 4, 5))[2][0], torch.nn.Conv2d)
    sum(method.loss(batch).values()).backward()


# Self-supervised distillation


def slow_similarities(z):
    images = len(z) // 4
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    return np.array([[unit[i] @ unit[j] for j in range(images)] for i in range(images, len(z))])


def slow_kept(scores, right, share):
    """Rows in the order of their own: right ones, and of the wrong ones those with the lowest rank."""
    rank = [sorted(row, reverse=True).index(row[y]) for row, y in zip(scores.tolist(), right)]
    wrong = sorted((r, i) for i, r in enumerate(rank) if r > 0)
    return sorted([i for i, r in enumerate(rank) if r == 0] + [i for _, i in wrong[: int(share * len(wrong))]])


def turned(images):
    return np.concatenate([np.rot90(array(images), k, axes=(2, 3)) for k in range(4)])


def projected(projection, embedding):
    first, second = projection[0], projection[2]
    hidden = np.maximum(embedding @ array(first.weight).T + array(first.bias), 0)
    return hidden @ array(second.weight).T + array(second.bias)


def test_images_are_turned_three_times(batch):
    np.testing.assert_array_equal(array(with_turned(batch.images)), turned(batch.images))


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.3, 0.75, 1.0]))
def test_the_least_wrong_rows_are_kept(seed, share):
    draw = np.random.default_rng(seed)
    scores, right = draw.normal(size=(12, 4)), draw.integers(0, 4, 12)
    right[0] = scores[0].argmax()  # or there may be none to keep
    kept = least_wrong(torch.from_numpy(scores), torch.from_numpy(right), share)
    assert sorted(kept.tolist()) == slow_kept(scores, right, share)


def test_one_row_is_kept_where_all_are_wrong():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert least_wrong(scores, torch.tensor([2, 1]), 0.0).tolist() == [1]


def test_similarities_are_cosines():
    z = torch.randn(12, 5, dtype=torch.float64)
    np.testing.assert_allclose(array(similarities(z)), slow_similarities(array(z)))


def test_the_projection_learns_to_find_each_turned_image_s_own(exact, batch):
    method = exact("sskd", stage=0)
    images = torch.from_numpy(turned(batch.images).copy())
    pooled = array(method.teacher.model.forward_features(images).mean((2, 3)))
    found = slow_similarities(projected(method.project_theirs, pooled))
    own = [i % 8 for i in range(24)]
    slow = -np.mean([log_softmax(row)[j] for row, j in zip(found, own)])
    assert number(method.loss(batch)["contrast"]) == pytest.approx(slow)
    distance = np.mean([1 - row[j] for row, j in zip(found, own)])
    assert number(method.eval().loss(batch)["contrast"]) == pytest.approx(distance)


@pytest.mark.parametrize("sees", ["input", "clean"])
def test_the_four_terms_are_those_of_the_paper(exact, batch, sees):
    weights = {"label_weight": 0.1, "output_weight": 0.9, "transformed_weight": 2.7, "similarity_weight": 10.0}
    method = exact("sskd", sees=sees, transformed_kept=0.5, similarity_kept=0.75, **weights)
    terms = method.loss(batch)
    images = torch.from_numpy(turned(batch.images).copy())
    shown = torch.from_numpy(turned(batch.images if sees == "input" else batch.clean).copy())
    twin = copy.deepcopy(method.student)
    s, t = array(twin(images)), array(method.teacher.model(shown))
    own = [i % 8 for i in range(24)]
    kept = slow_kept(t[8:], [int(batch.label[i]) for i in own], 0.5)
    assert len(kept) < 24
    assert number(terms["transformed"]) == pytest.approx(2.7 * slow_kl(t[8:][kept], s[8:][kept], 4.0))
    assert number(terms["output"]) == pytest.approx(0.9 * slow_kl(t[:8], s[:8], 4.0))
    cross_entropy = -np.mean([log_softmax(row)[y] for row, y in zip(s[:8], batch.label)])
    assert number(terms["label"]) == pytest.approx(0.1 * cross_entropy)
    alike = []
    for model, projection, pixels in (
        (twin, method.project_ours, images),
        (method.teacher.model, method.project_theirs, shown),
    ):
        pooled = array(model.forward_features(pixels).mean((2, 3)))
        alike.append(slow_similarities(projected(projection, pooled)))
    kept = slow_kept(alike[1], own, 0.75)
    assert len(kept) < 24
    assert number(terms["similarity"]) == pytest.approx(10 * slow_kl(alike[1][kept], alike[0][kept], 0.5))


def test_validation_takes_every_turned_image_and_no_other_images(exact, batch):
    method = exact("sskd", transformed_kept=0.0).eval()
    terms = method.loss(batch)
    assert terms.keys() == {"transformed", "output", "label"}
    images = torch.from_numpy(turned(batch.images).copy())
    s, t = (array(model(images))[8:] for model in (method.student, method.teacher.model))
    assert number(terms["transformed"]) == pytest.approx(2.7 * slow_kl(t, s, 4.0))


def test_labels_are_read_where_wrong_images_are_left_out(exact):
    assert not exact("sskd", label_weight=0.0).reads_labels
    assert exact("sskd", label_weight=0.0, transformed_kept=0.5).reads_labels
    assert not exact("ft", label_weight=0.0).reads_labels


def test_images_that_are_not_square_are_refused(exact, tiny):
    teacher = Teacher.live(network("small-resnet"))
    setup = Setup(lambda: network("small-cnn"), teacher, 48, 3, InputSpec(3, 12, 16))
    with pytest.raises(NotGivenError, match="must be square, but these have 12 x 16"):
        METHODS["sskd"](setup)


# Two stages

SHORT = {"ft": {"paraphraser_epochs": 2}, "sskd": {"projection_epochs": 2}}
PREPARED = {"ft": "paraphraser.", "sskd": "project_theirs."}


@pytest.mark.parametrize("name", SHORT)
def test_what_is_the_teacher_s_learns_first_and_then_rests(build, tiny, name):
    method, steps, moved = build(name, **SHORT[name]), list[str](), dict[str, set[str]]()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    for step in fit(method, tiny, TRAINING):
        steps.append(step.stage)
        if step.step == step.steps:
            now = {key: value.clone() for key, value in method.state_dict().items() if key != "stages_done"}
            moved[step.stage] = {key for key in now if not torch.equal(now[key], before[key])}
            before = now
    first = steps[0]
    assert steps == [first] * 8 + ["student"] * 8
    assert moved[first] and all(key.startswith(PREPARED[name]) for key in moved[first])
    assert not any(key.startswith(PREPARED[name]) for key in moved["student"])
    assert any(key.startswith("student.") for key in moved["student"])


def test_what_is_frozen_in_the_student_stays_frozen(tiny):
    def student():
        made = network("small-cnn")
        made.network.requires_grad_(False)
        made.get_classifier().requires_grad_(True)
        return made

    method = METHODS["ft"](Setup(student, Teacher.live(network("small-resnet")), 48, 3, tiny.input))
    for _ in fit(method, tiny, Training(steps=1, batch_size=12)):
        pass
    assert {name for name, p in method.student.named_parameters() if p.requires_grad} == {
        name for name, p in student().named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("name", SHORT)
def test_a_first_stage_that_stopped_goes_on_to_the_bit(build, tiny, name):
    whole, file = build(name, **SHORT[name]), io.BytesIO()
    for step in fit(whole, tiny, TRAINING, seed=3):
        if step.stage != "student" and step.step == 3:
            torch.save(step.snapshot(), file)
    file.seek(0)
    resumed = build(name, seed=9, **SHORT[name])
    for _ in fit(resumed, tiny, TRAINING, seed=3, resume=torch.load(file, weights_only=True)):
        pass
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_the_first_stage_has_a_rate_and_milestones_of_its_own(build, tiny):
    more = {"projection_lr": 0.1, "projection_milestones": (1,), "projection_epochs": 2}
    rates = {(step.stage, step.epoch): set(step.lr.values()) for step in fit(build("sskd", **more), tiny, TRAINING)}
    assert {key: [round(rate, 6) for rate in found] for key, found in rates.items()} == {
        ("projection", 0): [0.1],
        ("projection", 1): [0.01],
        ("student", 0): [0.01],
        ("student", 1): [0.01],
    }


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("kd", {"output_weight": 0.0}, "method.output_weight must be above 0, not 0.0"),
        ("at", {"output_weight": -1.0}, "method.output_weight must be 0 or above, not -1.0"),
        ("crd", {"output_temperature": 0.0}, "method.output_temperature must be above 0, not 0.0"),
        ("ft", {"weight": 0.0}, "method.weight must be above 0"),
        ("ft", {"rate": 0.0}, "method.rate must be above 0"),
        ("ft", {"paraphraser_epochs": 0}, "method.paraphraser_epochs must be 1 or above, not 0"),
        ("ft", {"paraphraser_lr": 0.0}, "method.paraphraser_lr must be above 0, not 0.0"),
        ("ft", {"student_layer": "relu.0"}, "relus.0"),
        ("sskd", {"transformed_weight": 0.0}, "method.transformed_weight must be above 0"),
        ("sskd", {"similarity_kept": 1.5}, "method.transformed_kept and similarity_kept are shares"),
        ("sskd", {"similarity_temperature": 0.0}, "method.similarity_temperature must be above 0"),
        ("sskd", {"projection_epochs": 0}, "method.projection_epochs must be 1 or above"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(exact, name, settings, reason):
    with pytest.raises(UserError) as refused:
        exact(name, **settings)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
