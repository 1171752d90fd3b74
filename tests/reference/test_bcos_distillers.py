"""Distillers between B-cos networks: which maps count, and that e2KD's base methods take them."""

import pytest
import torch
from torch.nn import functional as F

from hansfree.core import Batch, InputSpec, Setup, Teacher
from hansfree.explainers import BCos
from hansfree.methods import METHODS
from hansfree.methods.review_kd import hierarchical_context_loss
from hansfree.models import load_model
from hansfree.torchvision_guard import import_torchvision

import_torchvision()  # before bcos, which imports it too
pytest.importorskip("bcos")

INPUT = InputSpec(3, 64, 64)


def network(seed, inplanes=4):
    torch.manual_seed(seed)
    return load_model("bcos/resnet18", num_classes=3, options={"inplanes": inplanes})


@pytest.fixture(scope="module")
def teacher():
    model = network(0, 6)
    for _ in range(2):
        model.train()(torch.rand(4, 3, 64, 64))
    return model.eval()


def build(name, teacher, **settings):
    return METHODS[name](Setup(lambda: network(1), Teacher.live(teacher), 2, 3, INPUT), **settings).eval()


@pytest.fixture
def batch():
    return Batch(torch.rand(2, 3, 64, 64), torch.tensor([0, 2]), torch.arange(2))


def stages(model, images):
    """The output of each of the four stages of a B-cos ResNet, by hand."""
    body = model.network
    x = body.pool(body.bn1(body.conv1(torch.cat([images, 1 - images], 1))))
    found = []
    for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
        x = stage(x)
        found.append(x)
    return found


def test_attention_transfer_leaves_out_what_is_negative(teacher, batch):
    method = build("at", teacher, label_weight=0.0)
    expected = 0.0
    for s, t in zip(stages(method.student, batch.images), stages(teacher, batch.images)):
        assert (s < 0).any() and (t < 0).any()
        maps = [F.normalize(m.clamp_min(0).pow(2).mean(1).flatten(1)) for m in (s, t)]
        expected = expected + 1000 * (maps[0] - maps[1]).pow(2).mean()
    torch.testing.assert_close(method.loss(batch)["attention"], expected)


def test_class_attention_transfer_takes_what_the_last_convolution_gives(teacher, batch):
    method = build("cat-kd", teacher, label_weight=0.0)
    maps = [m.network.fc(stages(m, batch.images)[-1]) for m in (method.student, teacher)]
    for model, map in zip((method.student, teacher), maps):
        logits = (
            map.mean((2, 3)) / (model.network.logit_layer.logit_temperature or 1) + model.network.logit_layer.logit_bias
        )
        torch.testing.assert_close(logits, model(batch.images))
    pooled = [F.adaptive_avg_pool2d(map, 2).flatten(2) for map in maps]
    expected = 400 * (F.normalize(pooled[0], dim=2) - F.normalize(pooled[1], dim=2)).pow(2).mean()
    torch.testing.assert_close(method.loss(batch)["class-attention"], expected)


def test_review_takes_the_maps_of_stages_as_they_are(teacher, batch):
    """Before a ReLU, as e2KD's published code does; and, last, the mean of what the last convolution is given."""
    method = build("review-kd", teacher, label_weight=0.0)
    ours, theirs = ([*stages(m, batch.images)] for m in (method.student, teacher))
    assert any((map < 0).any() for map in (*ours, *theirs))
    for maps in (ours, theirs):
        maps.append(maps[-1].mean((2, 3), keepdim=True))
    expected, later = 0.0, None
    for fusion, s, t in zip(reversed(method.fusions), reversed(ours[-len(method.fusions) :]), reversed(theirs)):
        x = fusion.narrow(s)
        if later is not None and fusion.attention is not None:
            later = F.interpolate(later, x.shape[-2:], mode="nearest")
            share = fusion.attention(torch.cat([x, later], 1))
            x = share[:, :1] * x + share[:, 1:] * later
        later = F.interpolate(x, t.shape[-2:], mode="nearest")
        expected = expected + hierarchical_context_loss(fusion.out(later), t)
    torch.testing.assert_close(method.loss(batch)["review"], expected)


@pytest.mark.parametrize(
    "name", ["cat-kd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kd", "at", "review-kd", "crd"))]
)
def test_each_base_trains_with_the_dynamic_weights(name, teacher, batch):
    method = build("e2kd", teacher, explainer=BCos(), base=name, weight=1.0).train()
    terms = method.loss(batch)
    assert all(term.isfinite() for term in terms.values()) and terms["explanation"] > 0
    sum(terms.values()).backward()
    missed = [key for key, p in method.student.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missed
