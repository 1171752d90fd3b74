"""Grad-CAM against its formula written out, Captum, and finite differences; its layer against the layer by name."""

import captum.attr
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Classifier
from hansfree.errors import UserError
from hansfree.explainers import GradCAM
from hansfree.models import load_model
from hansfree.models.small import SmallCNN
from hansfree.torchvision_guard import import_torchvision

models = import_torchvision("torchvision.models")  # before timm and open_clip, which import it too

TARGET = torch.tensor([1, 0, 3])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def unsettle(network: nn.Module) -> nn.Module:
    """Batch norms with parameters and running statistics that matter, and no layer that starts at zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network.double().eval()


def cnn(**options) -> SmallCNN:
    return unsettle(SmallCNN(4, widths=(5, 6, 7), **options))


def own_layers() -> nn.Sequential:
    """A network without forward_features, whose head is not linear in the feature map."""
    layers = [nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Conv2d(6, 5, 3, stride=2), nn.GELU()]
    return unsettle(nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 6), nn.Tanh(), nn.Linear(6, 4)))


def images(size: int = 12, count: int = 3) -> Tensor:
    return torch.rand(count, 3, size, size, dtype=torch.double)


def slow_grad_cam(features: Tensor, head, target: Tensor) -> Tensor:
    """Equations 1 and 2, one sample, channel and pixel at a time; ``head`` gives logits of one feature map."""
    maps = torch.zeros(len(features), 1, *features.shape[2:], dtype=features.dtype)
    for n in range(len(features)):
        a = features[n].detach().requires_grad_()
        (slope,) = torch.autograd.grad(head(a[None])[0, target[n]], a)
        for c in range(a.shape[0]):
            alpha = sum(float(value) for value in slope[c].flatten()) / slope[c].numel()
            for i in range(a.shape[1]):
                for j in range(a.shape[2]):
                    maps[n, 0, i, j] += alpha * float(features[n, c, i, j].detach())
    return maps


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("build", [cnn, own_layers], ids=["small", "own"])
def test_grad_cam_is_equations_1_and_2(build):
    network, x = build(), images()
    features, head = (
        (network.forward_features, network.forward_head)
        if isinstance(network, SmallCNN)
        else (network[:4], network[4:])
    )
    slow = slow_grad_cam(features(x), head, TARGET)
    assert (slow < 0).any() and (slow > 0).any()
    logits, map = GradCAM(relu=False)(network, x, TARGET)
    close(logits, network(x))
    close(map.detach(), slow)
    close(GradCAM()(network, x, TARGET).map.detach(), slow.clamp(min=0))
    large = F.interpolate(slow.clamp(min=0), (12, 12), mode="bilinear", align_corners=False)
    close(GradCAM(resize=True)(network, x, TARGET).map.detach(), large)


@pytest.mark.parametrize("resize", [False, True])
def test_k_targets_are_k_maps(resize):
    network, x, explainer = cnn(), images(), GradCAM(resize=resize)
    targets = torch.stack([TARGET, TARGET.roll(1)], 1)
    together = explainer(network, x, targets).map
    assert together.shape == (3, 2, 1, 12, 12) if resize else (3, 2, 1, 3, 3)
    for k in range(2):
        close(together[:, k], explainer(network, x, targets[:, k]).map)


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (models.resnet18, lambda network: network.layer4),
        (models.squeezenet1_1, lambda network: network.classifier[2]),
        (models.mobilenet_v2, lambda network: network.features),
    ],
    ids=["resnet18", "squeezenet", "mobilenet_v2"],
)
def test_grad_cam_agrees_with_captum(build, layer):
    network, x = build(num_classes=4).double().eval(), images(64, 2)
    theirs = captum.attr.LayerGradCam(network, layer(network)).attribute(x, TARGET[:2], relu_attributions=True)
    close(GradCAM()(network, x, TARGET[:2]).map, theirs)


@pytest.mark.parametrize("layer", ["convs.1", "norms.0"])
def test_a_named_layer_agrees_with_captum(layer):
    """The output of a batch norm too, though the ReLU that follows may work in place."""
    network, x = cnn(), images()
    theirs = captum.attr.LayerGradCam(network, network.get_submodule(layer)).attribute(x, TARGET)
    for model in (network, Classifier(network, {})):
        close(GradCAM(layer, relu=False)(model, x, TARGET).map, theirs)


# The gradient of a loss on the map, against finite differences.


def check_gradient(explainer, network: nn.Module, x: Tensor, step: float = 1e-6) -> None:
    """Directional derivatives of a loss on the map for each parameter, along the claimed gradient plus noise."""
    target = TARGET[: len(x)]
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    map = explainer(network, x, target).map.detach()
    wanted = map + map.std() * torch.randn_like(map)

    def loss() -> Tensor:
        with torch.no_grad():
            for name, value in network.named_buffers():
                value.copy_(buffers[name])
        return (explainer(network, x, target).map - wanted).square().sum()

    parameters = dict(network.named_parameters())
    claimed = torch.autograd.grad(loss(), list(parameters.values()), materialize_grads=True)
    size = float(torch.stack([g.norm() for g in claimed]).norm())
    assert size > 0
    for (name, parameter), g in zip(parameters.items(), claimed, strict=True):
        direction = g / size + torch.randn_like(g)
        direction /= direction.norm()
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
            values.append(loss().item())
        measured = (values[0] - values[1]) / (2 * step)
        assert measured == pytest.approx(float((g * direction).sum()), rel=1e-6, abs=1e-7 * size), name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["batch", "scale"])
def test_gradient_of_a_loss_on_the_map(norm, training):
    check_gradient(GradCAM(relu=False), cnn(norm=norm).train(training), images())


@pytest.mark.parametrize("layer", ["0", "2", "6"])
def test_gradient_of_a_loss_on_the_map_of_a_layer(layer):
    network = own_layers()
    if layer == "6":
        with pytest.raises(UserError, match="no feature map"):
            GradCAM(layer)(network, images(), TARGET)
    else:
        check_gradient(GradCAM(layer, resize=True), network, images())


def test_the_last_layer_learns_through_the_weights_of_the_channels():
    """What libraries that treat alpha as constants miss."""
    network, x = cnn(), images()
    GradCAM()(network, x, TARGET).map.square().sum().backward()
    assert network.fc.weight.grad is not None and network.fc.weight.grad.any()
    theirs = captum.attr.LayerGradCam(network, network.norms[-1]).attribute(x, TARGET)
    assert torch.autograd.grad(theirs.square().sum(), network.fc.weight, allow_unused=True) == (None,)


# Transformers: the normed tokens that go into the last attention block, by hand.


def vit() -> nn.Module:
    import timm

    network = timm.models.VisionTransformer(
        img_size=(16, 24), patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=4, reg_tokens=2
    )
    return unsettle(network)


def vit_from_last_norm(network, before: Tensor, normed: Tensor) -> Tensor:
    block = network.blocks[-1]
    x = before + block.drop_path1(block.ls1(block.attn(normed)))
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return network.forward_head(network.norm(x))


def test_grad_cam_of_a_vision_transformer_is_that_of_its_patches():
    network, x = vit(), torch.rand(3, 3, 16, 24, dtype=torch.double)
    before = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))
    before = network.blocks[0](before).detach()
    normed = network.blocks[1].norm1(before).detach().requires_grad_()
    logits = vit_from_last_norm(network, before, normed)
    (slope,) = torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), normed)
    expected = torch.zeros(3, 1, 2, 3, dtype=torch.double)
    for patch in range(6):  # behind one class token and two registers
        weights = slope[:, 3:].sum(1) / 6
        expected[:, 0, patch // 3, patch % 3] = (weights * normed[:, 3 + patch]).sum(1).detach()
    found = GradCAM(relu=False)(network, x, TARGET)
    close(found.logits, logits)
    close(found.map.detach(), expected)
    close(GradCAM("blocks.1.norm1", relu=False)(network, x, TARGET).map.detach(), expected)
    check_gradient(GradCAM(relu=False), network, x)


def test_a_convolution_that_scores_is_no_feature_map():
    """SqueezeNet's last map holds a channel of scores per class; Grad-CAM weighs the features before it."""
    model = load_model("torchvision/squeezenet1_1", num_classes=5).eval()
    x, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 4])
    features = model.forward_features(x).detach().requires_grad_()
    y = model.forward_head(features).gather(1, target[:, None]).sum()
    (gradient,) = torch.autograd.grad(y, features)
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    torch.testing.assert_close(GradCAM()(model, x, target).map, expected)
    with torch.no_grad():
        torch.testing.assert_close(GradCAM()(model, x, target).map, expected)
