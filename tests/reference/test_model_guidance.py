"""Localisation losses against their formulas, pixel by pixel, and what guidance does with them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hansfree.core import Batch, Boxes, InputSpec, Setup
from hansfree.errors import UserError
from hansfree.explainers import BCos, GradCAM, GradientXInput
from hansfree.methods.model_guidance import LOSSES, ModelGuidance
from hansfree.metrics.localisation import energy_pointing_game
from hansfree.models import load_model
from hansfree.torchvision_guard import import_torchvision


def slowly(name, map, mask):
    """The loss of one image, from its definition, with loops."""
    h, w = len(map), len(map[0])
    pixels = [(y, x) for y in range(h) for x in range(w)]
    positive = {p: max(map[p[0]][p[1]], 0.0) for p in pixels}
    m = {p: mask[p[0]][p[1]] for p in pixels}
    top, size = max(positive.values()), max(abs(map[y][x]) for y, x in pixels)
    if name == "energy":
        total = sum(positive.values())
        inside = sum(positive[p] * m[p] for p in pixels)
        return 1 - (inside if total < 1e-7 else inside / total)
    shown = {p: positive[p] / top if top > 0 else 0.0 for p in pixels}
    if name == "l1":
        return sum(abs(shown[p] - m[p]) for p in pixels) / (h * w)
    if name == "ppce":
        logs = {p: max(math.log(shown[p]), -100.0) if shown[p] > 0 else -100.0 for p in pixels}
        return -sum(m[p] * logs[p] for p in pixels) / sum(m.values())
    return sum((1 - m[p]) * (map[p[0]][p[1]] / size if size > 0 else 0.0) ** 2 for p in pixels)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-9, 1.0, 1e3]), soft=st.booleans())
def test_losses_are_their_formulas(name, seed, scale, soft):
    generator = torch.Generator().manual_seed(seed)
    map = scale * torch.randn(3, 4, 5, generator=generator, dtype=torch.double)
    map[2] = -map[2].abs()
    mask = torch.rand(3, 4, 5, generator=generator, dtype=torch.double)
    mask = mask if soft else (mask > 0.5).double()
    mask[:, 0, 0] = 1
    expected = [slowly(name, a, m) for a, m in zip(map.tolist(), mask.tolist())]
    torch.testing.assert_close(LOSSES[name](map, mask), torch.tensor(expected, dtype=torch.double))


def test_energy_is_what_the_pointing_game_leaves_and_ppce_is_a_cross_entropy():
    map, mask = torch.randn(6, 5, 5, dtype=torch.double), (torch.rand(6, 5, 5) > 0.6).double()
    torch.testing.assert_close(LOSSES["energy"](map, mask), 1 - energy_pointing_game(map, mask))
    for a, m, found in zip(map, mask, LOSSES["ppce"](map, mask)):
        inside = (a.clamp_min(0) / a.max())[m == 1]
        torch.testing.assert_close(found, F.binary_cross_entropy(inside, torch.ones_like(inside)))


@pytest.mark.parametrize("name", ["energy", "l1", "rrr"])
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    map = torch.randn(2, 4, 4, dtype=torch.double, requires_grad=True)
    mask = (torch.rand(2, 4, 4) > 0.5).double()
    assert torch.autograd.gradcheck(lambda a: LOSSES[name](a, mask), map)


@pytest.mark.parametrize("name", LOSSES)
def test_a_map_of_zeros_has_a_finite_loss_and_gradient_and_an_object_alone_is_best(name):
    mask = torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    nothing = torch.zeros(1, 4, 4, requires_grad=True)
    loss = LOSSES[name](nothing, mask)
    loss.sum().backward()
    assert loss.isfinite().all() and nothing.grad.isfinite().all()
    right, wrong = LOSSES[name](mask, mask), LOSSES[name](1 - mask, mask)
    assert right.item() == pytest.approx(0, abs=1e-6) and wrong.item() > 0.4


def test_coarse_maps_are_divided_and_then_enlarged():
    map, mask = torch.rand(2, 3, 3) + 0.1, (torch.rand(2, 12, 12) > 0.5).float()
    fine = F.interpolate((map / map.amax((1, 2), keepdim=True))[:, None], (12, 12), mode="bilinear")[:, 0]
    torch.testing.assert_close(LOSSES["l1"](map, mask), (fine - mask).abs().mean((1, 2)))


# The method


def network():
    torch.manual_seed(0)
    return load_model("small-cnn", num_classes=3, options={"widths": [4, 6]})


def guided(explainer=None, **settings):
    setup = Setup(network, None, 6, 3, InputSpec(3, 12, 12))
    return ModelGuidance(setup, explainer=explainer or GradientXInput(), **settings).eval()


def batch(label):
    torch.manual_seed(1)
    corners = torch.tensor([[0.0, 0, 6, 6], [6.0, 6, 12, 12], [0.0, 6, 6, 12]])
    boxes = Boxes((corners,) * len(label), (torch.arange(3),) * len(label))
    return Batch(torch.rand(len(label), 3, 12, 12), label, torch.arange(len(label)), boxes=boxes)


@pytest.mark.parametrize("name", LOSSES)
def test_it_adds_the_mean_to_the_label_loss(name):
    method, samples = guided(localisation=name, weight=2.5), batch(torch.tensor([0, 1, 2, 1]))
    terms = method.loss(samples)
    map = GradientXInput()(method.student, samples.images, samples.label).map.sum(1)
    mask = torch.zeros(4, 12, 12)
    for n, k in enumerate(samples.label.tolist()):
        x0, y0, x1, y1 = samples.boxes.corners[n][k].int().tolist()
        mask[n, y0:y1, x0:x1] = 1
    expected = [slowly(name, a, m) for a, m in zip(map.tolist(), mask.tolist())]
    assert terms["localisation"].item() == pytest.approx(2.5 * sum(expected) / 4, rel=1e-4)
    torch.testing.assert_close(terms["label"], F.cross_entropy(method.student(samples.images), samples.label))


def test_the_label_loss_may_be_binary():
    method, samples = guided(loss="binary"), batch(torch.tensor([0, 1, 2, 1]))
    expected = 0.0
    for row, y in zip(method.student(samples.images).tolist(), samples.label.tolist()):
        expected += sum(math.log1p(math.exp(-s if k == y else s)) for k, s in enumerate(row)) / 4
    assert method.loss(samples)["label"].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="did you mean 'binary'"):
        guided(loss="binery")


def test_of_several_labels_one_that_is_there_is_explained():
    method, label = guided(), torch.tensor([[1.0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0]])
    samples = batch(label)
    asked = []

    class Recording(type(method.explainer)):
        def __call__(self, model, input, target, *, draws=None):
            asked.append(target)
            return super().__call__(model, input, target, draws=draws)

    method.explainer = Recording()
    terms = method.loss(samples)
    logits = method.student(samples.images)
    torch.testing.assert_close(terms["label"], F.binary_cross_entropy_with_logits(logits, label, reduction="sum") / 4)
    torch.manual_seed(0)
    method.train()
    for _ in range(20):
        method.loss(samples)
    assert all(label[torch.arange(4), target].all() for target in asked)
    assert {int(target[2]) for target in asked} == {0, 1, 2}


def test_an_image_whose_object_has_no_place_has_no_loss():
    method, samples = guided(), batch(torch.tensor([0, 1]))
    alone = method.loss(batch(torch.tensor([0, 1])))["localisation"]
    lost = Boxes((samples.boxes.corners[0], torch.zeros(0, 4)), (samples.boxes.classes[0], torch.zeros(0).long()))
    half = method.loss(Batch(samples.input, samples.label, samples.index, boxes=lost))["localisation"]
    first = method.loss(Batch(samples.input[:1], samples.label[:1], samples.index[:1], boxes=Boxes(
        samples.boxes.corners[:1], samples.boxes.classes[:1])))["localisation"]  # fmt: skip
    torch.testing.assert_close(half, first / 2)
    assert half != alone


@pytest.mark.parametrize("explainer", [GradientXInput(), GradCAM()])
def test_guidance_moves_explanations_into_the_boxes(explainer):
    method, samples = guided(explainer, weight=10.0).train(), batch(torch.tensor([0, 1, 2, 1]))
    optimiser = torch.optim.Adam(method.parameters(), lr=0.02)
    losses = []
    for _ in range(15):  # after more, at this weight, Grad-CAM shows nothing any more
        optimiser.zero_grad()
        terms = method.loss(samples)
        sum(terms.values()).backward()
        optimiser.step()
        losses.append(terms["localisation"].item())
    assert min(losses[-5:]) < 0.6 * losses[0]


def test_b_cos_contributions_can_be_guided():
    import_torchvision()  # before bcos, which imports it too
    pytest.importorskip("bcos")
    torch.manual_seed(0)
    student = load_model("bcos/resnet18", num_classes=3, options={"inplanes": 4})
    setup = Setup(lambda: student, None, 2, 3, InputSpec(3, 32, 32))
    method = ModelGuidance(setup, explainer=BCos("contributions")).train()
    boxes = Boxes((torch.tensor([[4.0, 4, 20, 20]]),) * 2, (torch.tensor([0]), torch.tensor([1])))
    terms = method.loss(Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2), boxes=boxes))
    terms["localisation"].backward()
    assert 0 <= terms["localisation"] <= 1
    assert student.network.layer1[0].conv1.linear.weight.grad.any()


def test_mistakes_are_named_in_one_sentence():
    with pytest.raises(UserError, match="energy"):
        guided(localisation="energi")
    with pytest.raises(UserError, match="above 0"):
        guided(weight=0)
    bare = batch(torch.tensor([0, 1]))
    with pytest.raises(UserError, match="masks or boxes"):
        guided().loss(Batch(bare.input, bare.label, bare.index))
