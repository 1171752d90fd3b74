"""Masks over weights: their sampling and their measures again, slowly, and networks under them."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hansfree.errors import UserError
from hansfree.masks import (
    Masks,
    cut,
    gumbel_sigmoid,
    iou,
    iou_by_layer,
    logistic_noise,
    masked_call,
    masked_shapes,
    reserved,
    shuffled,
)
from hansfree.models import load_model


def network(name, **options):
    return load_model(name, num_classes=3, options={"widths": [4, 6], **options})


def named(*masks):
    return {f"layer {number}": torch.as_tensor(mask) for number, mask in enumerate(masks)}


# Sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("hard", [True, False])
def test_a_draw_is_the_formula(temperature, hard):
    z = torch.randn(7, dtype=torch.float64, requires_grad=True)
    noise = logistic_noise(z)
    drawn = gumbel_sigmoid(z, noise, temperature, hard=hard)
    drawn.sum().backward()
    for i in range(7):
        s = 1 / (1 + math.exp(-(z[i].item() + noise[i].item()) / temperature))
        assert drawn[i].item() == pytest.approx(float(s > 0.5) if hard else s, abs=1e-12)
        assert z.grad[i].item() == pytest.approx(s * (1 - s) / temperature)


def test_a_weight_is_drawn_as_often_as_its_logit_says():
    z = torch.tensor([-2.0, 0.0, 1.5]).expand(40_000, 3)
    shares = gumbel_sigmoid(z, logistic_noise(z), 0.3).mean(0)
    assert shares.tolist() == pytest.approx([1 / (1 + math.exp(-v)) for v in (-2.0, 0.0, 1.5)], abs=0.012)


# Measures

shares = st.lists(st.floats(0, 1), min_size=6, max_size=6)


def slow_iou(first, second):
    return sum(a * b for a, b in zip(first, second)) / sum(a + b - a * b for a, b in zip(first, second))


@given(shares, shares)
@settings(max_examples=50)
def test_iou_is_that_of_plain_sums(first, second):
    first, second = [v + 0.01 for v in first], [v + 0.01 for v in second]
    parts = [slice(0, 4), slice(4, 6)]
    masks = [named(*(torch.tensor(m, dtype=torch.float64)[part] for part in parts)) for m in (first, second)]
    by_layer = [slow_iou(first[part], second[part]) for part in parts]
    assert [v.item() for v in iou_by_layer(*masks).values()] == pytest.approx(by_layer)
    assert iou(*masks).item() == pytest.approx(slow_iou(first, second))
    assert iou(*masks, over="layers").item() == pytest.approx(sum(by_layer) / 2)


@given(st.lists(st.booleans(), min_size=5, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5))
@settings(max_examples=50)
def test_hard_masks_have_the_iou_and_the_share_of_sets(first, second):
    a, b = ({i for i, kept in enumerate(m) if kept} for m in (first, second))
    expected = len(a & b) / len(a | b) if a | b else 0
    assert iou(named(first), named(second)).item() == pytest.approx(expected)
    assert iou(named(first), named(second), over="layers").item() == pytest.approx(expected)
    assert reserved(named(first))["layer 0"].item() == pytest.approx(len(a) / 5)


def test_iou_can_be_trained_through():
    z = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: iou(named(a.sigmoid()), named(b.sigmoid())), z)


def test_a_shuffled_mask_is_as_dense_layer_by_layer():
    masks = named(torch.rand(20, 5) < 0.3, torch.rand(40, 1, 1) < 0.8)
    moved = shuffled(masks)
    assert all(torch.equal(moved[name].sum(), masks[name].sum()) for name in masks)
    assert not any(torch.equal(moved[name], masks[name]) for name in masks)


# Networks


def test_every_weight_of_convolutions_and_linear_layers_has_a_logit_and_nothing_else():
    model = network("small-cnn", norm="batch")
    own = dict(model.named_parameters())
    shapes = masked_shapes(model, "weights")
    assert set(shapes) == {name for name in own if own[name].ndim > 1}
    assert all(shape == own[name].shape for name, shape in shapes.items())


def test_channels_are_those_of_all_layers_but_the_last():
    assert set(masked_shapes(network("small-cnn"), "channels").values()) == {(4, 1, 1, 1), (6, 1, 1, 1)}
    plain = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    assert masked_shapes(plain, "channels") == {"0.weight": (5, 1)}
    assert masked_shapes(nn.Linear(3, 2), "weights") == {"weight": (2, 3)}


def test_what_cannot_be_masked_is_named():
    with pytest.raises(UserError, match="BatchNorm2d has no weights"):
        masked_shapes(nn.BatchNorm2d(3), "weights")
    with pytest.raises(UserError, match="granularity: channels"):
        masked_shapes(nn.Linear(3, 2), "channels")
    with pytest.raises(UserError, match="granularity"):
        masked_shapes(nn.Linear(3, 2), "neurons")


@pytest.mark.parametrize("granularity", ["weights", "channels"])
@pytest.mark.parametrize("training", [False, True])
def test_a_network_under_masks_is_the_network_with_its_weights_cut(granularity, training):
    theta, images = network("small-resnet"), torch.rand(5, 3, 12, 12)
    runs = copy.deepcopy(theta)
    masks = Masks(theta, granularity)
    drawn = masks.sample()
    assert 0 < sum(mask.sum() for mask in drawn.values()) < sum(mask.numel() for mask in drawn.values())
    expected = copy.deepcopy(theta).train(training)
    with torch.no_grad():
        for name, value in expected.named_parameters():
            if name in drawn:
                value.mul_(drawn[name])
    logits = masked_call(runs.train(training), theta, drawn, images)
    torch.testing.assert_close(logits, expected(images))
    for name, value in expected.named_buffers():
        torch.testing.assert_close(dict(runs.named_buffers())[name], value)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in masks.parameters())
    cut(runs, theta, drawn)
    torch.testing.assert_close(runs.eval()(images), expected.eval()(images))


def test_masks_keep_everything_at_first_and_then_the_logits_that_are_not_negative():
    masks = Masks(nn.Linear(2, 3), start=0.5)
    assert masks.kept["weight"].all() and (masks.logits["weight"] == 0.5).all()
    with torch.no_grad():
        masks.logits["weight"].copy_(torch.tensor([[0.0, -0.1], [3.0, -2.0], [-1e-9, 1e-9]]))
    masks.harden()
    assert masks.kept["weight"].tolist() == [[True, False], [True, False], [False, True]]
    again = Masks(nn.Linear(2, 3))
    again.load_state_dict(masks.state_dict())
    assert torch.equal(again.kept["weight"], masks.kept["weight"])
