"""Attention and feature maps against their formulas, on CNNs, at named layers, and on tokens."""

import pytest
import torch
from torch import Tensor, nn

from hansfree.core import Classifier
from hansfree.errors import UserError
from hansfree.explainers import Attention, FeatureMap
from hansfree.models import attach_adapter
from hansfree.models.small import SmallCNN
from hansfree.torchvision_guard import import_torchvision

models = import_torchvision("torchvision.models")  # before timm, which imports it too

TARGET = torch.tensor([1, 0, 3])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(height: int = 12, width: int = 12) -> Tensor:
    return torch.rand(3, 3, height, width, dtype=torch.double)


def small() -> SmallCNN:
    return SmallCNN(4, widths=(5, 6, 7)).double().eval()


@pytest.mark.parametrize("power", [1, 2, 3.5])
def test_attention_is_the_sum_of_powers(power):
    network, x = small(), images()
    with torch.no_grad():  # a batch norm without a ReLU gives negative values too
        features = network.norms[0](network.convs[0](x))
    slow = torch.zeros(3, 1, 12, 12, dtype=torch.double)
    for c in range(5):
        for i in range(12):
            for j in range(12):
                slow[:, 0, i, j] += features[:, c, i, j].abs() ** power
    assert (features < 0).any()
    logits, map = Attention(power, layer="norms.0")(network, x, TARGET)
    torch.testing.assert_close(map.detach(), slow)
    torch.testing.assert_close(logits, network(x))


@pytest.mark.parametrize("power", [0, -1])
def test_a_power_must_be_positive(power):
    with pytest.raises(UserError, match="power"):
        Attention(power)


def test_the_default_is_what_forward_features_gives_after_the_adapter():
    model, x = Classifier(small().float(), {}, mean=(0.1, 0.2, 0.3)), images()
    attach_adapter(model, 11)
    model.double()
    logits, map = FeatureMap()(model, x, TARGET)
    assert torch.equal(map, model.forward_features(x)) and torch.equal(logits, model(x)) and map.shape == (3, 11, 3, 3)
    assert torch.equal(Attention()(model, x, TARGET).map, map.square().sum(1, keepdim=True))


def test_a_network_without_forward_features_shows_its_last_feature_map():
    network, x = models.resnet18(num_classes=4).double().eval(), images(64, 64)
    named = FeatureMap("layer4")(network, x, TARGET)
    found = FeatureMap()(network, x, TARGET)
    trunk = nn.Sequential(*list(network.children())[:-2])
    assert torch.equal(found.map, trunk(x)) and torch.equal(named.map, found.map)
    assert torch.equal(found.logits, network(x)) and torch.equal(named.logits, found.logits)


def test_tokens_are_folded_to_the_grid_of_their_patches():
    import timm

    network = timm.models.VisionTransformer(
        img_size=(16, 24), patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=4, reg_tokens=2
    ).double()
    x = images(16, 24)
    tokens = network.forward_features(x)
    map = FeatureMap()(network, x, TARGET).map
    assert map.shape == (3, 24, 2, 3)
    for patch in range(6):  # behind one class token and two registers
        assert torch.equal(map[:, :, patch // 3, patch % 3], tokens[:, 3 + patch])
    inner = network.blocks[0](network.norm_pre(network._pos_embed(network.patch_embed(x))))
    found = FeatureMap("blocks.0")(network, x, TARGET).map
    assert torch.equal(found[:, :, 1, 2], inner[:, 3 + 5])


def test_channels_last_becomes_channels_first():
    network = models.swin_transformer.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=4).double().eval()
    x = images(32, 32)
    inner = network.features(x)
    assert inner.shape == (3, 4, 4, 24)
    for layer in ("features", "features.3.0"):
        assert torch.equal(FeatureMap(layer)(network, x, TARGET).map, inner.permute(0, 3, 1, 2))
    assert torch.equal(FeatureMap()(network, x, TARGET).map, network.permute(network.norm(inner)))


@pytest.mark.parametrize("explainer", [Attention(), FeatureMap(), FeatureMap("convs.0"), Attention(3, "norms.1")])
def test_k_targets_are_the_same_map_k_times(explainer):
    network, x = small(), images()
    map = explainer(network, x, torch.stack([TARGET, TARGET], 1)).map
    assert map.shape[1] == 2
    assert all(torch.equal(map[:, k], explainer(network, x, TARGET).map) for k in range(2))


@pytest.mark.parametrize("explainer", [Attention(1.5, "norms.0"), Attention(), FeatureMap("norms.1")])
def test_a_loss_on_the_map_is_plain_autograd(explainer):
    network, x = small().train(), images()
    with torch.no_grad():
        network.norms[0].bias.normal_()

    def by_hand() -> Tensor:
        first = network.norms[0](network.convs[0](x))
        if explainer == Attention(1.5, "norms.0"):
            return first.abs().pow(1.5).sum(1, keepdim=True)
        second = network.norms[1](network.convs[1](nn.functional.avg_pool2d(first.relu(), 2)))
        third = network.norms[2](network.convs[2](nn.functional.avg_pool2d(second.relu(), 2))).relu()
        return second if explainer == FeatureMap("norms.1") else third.square().sum(1, keepdim=True)

    weights = list(network.parameters())
    expected = torch.autograd.grad(by_hand().sin().sum(), weights, allow_unused=True, materialize_grads=True)
    found = explainer(network, x, TARGET).map.sin().sum()
    claimed = torch.autograd.grad(found, weights, allow_unused=True, materialize_grads=True)
    for a, b in zip(claimed, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert any(g.any() for g in claimed)
