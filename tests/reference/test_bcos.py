"""B-cos explanations against the package of its authors, a layer written out, and finite differences."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Classifier, held_affine
from hansfree.errors import UserError
from hansfree.explainers import BCos, InputGradient
from hansfree.torchvision_guard import import_torchvision

import_torchvision()  # before bcos, which imports it too

from bcos.common import explanation_mode  # noqa: E402
from bcos.models import convnext, densenet, resnet  # noqa: E402
from bcos.modules import BcosConv2d, BcosLinear, LogitLayer, norms  # noqa: E402

TARGET = torch.tensor([1, 0])
NORMS = [
    *("BatchNormUncentered2d", "GroupNormUncentered2d", "GNInstanceNormUncentered2d", "GNLayerNormUncentered2d"),
    *("PositionNormUncentered2d", "AllNormUncentered2d", "AllNorm2d", "BatchNorm2d", "DetachableGNLayerNorm2d"),
    "DetachablePositionNorm2d",
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def encoded(size: int) -> Tensor:
    x = torch.rand(2, 3, size, size, dtype=torch.double)
    return torch.cat([x, 1 - x], 1)


def unsettled(network: nn.Module) -> nn.Module:
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return network.double().eval()


def small(norm: str = "BatchNormUncentered2d", **settings) -> nn.Module:
    normed = partial(getattr(norms, norm), 2) if norm == "GroupNormUncentered2d" else getattr(norms, norm)
    conv = partial(BcosConv2d, **settings)
    layers = [conv(6, 8, 3, padding=1), norms.NoBias(normed)(8), conv(8, 6, 3, stride=2)]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), BcosLinear(6, 3, **settings), LogitLayer(2.0, -0.7)]
    return unsettled(nn.Sequential(*layers, *pooled))


class Aligned(nn.Module):
    """A layer of one's own: y = |cos(x, w)| w x, with ``held_affine`` from the core."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True))
        return held_affine(y, y.abs() / x.norm(dim=1, keepdim=True))


def own() -> nn.Module:
    layers = [nn.Flatten(), Aligned(96, 10), Aligned(10, 8), Aligned(8, 3)]
    return nn.Sequential(*layers).double()


NETWORKS = {
    "resnet": (lambda: unsettled(resnet.cifar10_resnet20(num_classes=3)), 12),
    "densenet": (
        lambda: unsettled(densenet.BcosDenseNet(4, (2, 2), 8, num_classes=3, in_chans=6, small_inputs=True)),
        12,
    ),
    "convnext": (
        lambda: unsettled(
            convnext.BcosConvNeXt(
                [convnext.CNBlockConfig(6, 8, 1), convnext.CNBlockConfig(8, None, 1)], layer_scale=0.5, num_classes=3
            )
        ),
        16,
    ),
    "maxout": (partial(small, max_out=2), 8),
    "b = 1": (partial(small, b=1), 8),
    "b = 1.5": (partial(small, b=1.5), 8),
    "b = 3": (partial(small, b=3), 8),
    **{norm: (partial(small, norm), 8) for norm in NORMS},
}


@pytest.fixture(params=NETWORKS)
def case(request) -> tuple[nn.Module, Tensor]:
    build, size = NETWORKS[request.param]
    return build(), encoded(size)


def in_explanation_mode(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and W(x) as the package computes them."""
    leaf = x.clone().requires_grad_()
    with explanation_mode(network):
        logits = network(leaf)
        (weights,) = torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), leaf)
    return logits, weights


def test_weights_are_those_of_the_package(case):
    network, x = case
    logits, theirs = in_explanation_mode(network, x)
    found = BCos()(network, x, TARGET)
    torch.testing.assert_close(found.logits, logits, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.map, theirs, rtol=1e-10, atol=1e-14 * float(theirs.abs().max()))
    assert not any(module.is_in_explanation_mode for module in network.modules() if hasattr(module, "detach"))
    with torch.no_grad():
        assert torch.equal(BCos()(network, x, TARGET).map, found.map.detach())


def test_contributions_sum_to_the_logit_without_its_bias(case):
    network, x = case
    logits, map = BCos("contributions")(network, x, TARGET)
    assert map.shape == (2, 1, *x.shape[2:])
    bias = next((module.logit_bias for module in network.modules() if isinstance(module, LogitLayer)), None)
    fixed = logits.gather(1, TARGET[:, None])[:, 0] - (bias or 0.0)
    scale = float(map.detach().abs().sum((1, 2, 3)).max())
    torch.testing.assert_close(map.sum((1, 2, 3)), fixed, rtol=1e-10, atol=1e-13 * scale)
    torch.testing.assert_close(map, (BCos()(network, x, TARGET).map * x).sum(1, keepdim=True))


def test_a_layer_of_ones_own_is_a_product_of_matrices():
    network, x = own(), encoded(4)
    for n in range(2):
        values, linear = x[n].flatten(), torch.eye(96, dtype=torch.double)
        for layer in network[1:]:
            unit = torch.stack([row / row.norm() for row in layer.weight.detach()])
            cosines = torch.stack([(row @ values / values.norm()).abs() for row in unit])
            linear = cosines[:, None] * unit @ linear
            values = cosines * (unit @ values)
        found = BCos()(network, x[n : n + 1], TARGET[n : n + 1])
        torch.testing.assert_close(found.logits[0].detach(), values)
        torch.testing.assert_close(found.map[0].detach(), linear[TARGET[n]].view_as(x[n]))


# The gradient of a loss on the map, against finite differences.


def slopes(network: nn.Module, loss) -> list[tuple[float, float]]:
    """For each parameter: the claimed directional derivative along the claimed gradient, and the measured one."""
    buffers = {name: value.clone() for name, value in network.named_buffers()}

    def value() -> Tensor:
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(buffers[name])
        return loss()

    parameters = list(network.parameters())
    claimed = torch.autograd.grad(value(), parameters, materialize_grads=True)
    pairs, step = [], 1e-6
    for parameter, g in zip(parameters, claimed, strict=True):
        direction = torch.randn_like(g) * g.norm() / g.numel() ** 0.5 + g
        direction = (direction if direction.any() else torch.randn_like(g)) / max(float(direction.norm()), 1e-30)
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
            values.append(float(value().detach()))
        pairs.append((float((g * direction).sum()), (values[0] - values[1]) / (2 * step)))
    return pairs


def map_loss(network: nn.Module, x: Tensor, explain) -> Tensor:
    map = explain(network, x)
    wanted = torch.rand(map.shape, dtype=map.dtype, generator=torch.Generator().manual_seed(1))
    return 1 - F.cosine_similarity(map.flatten(1), wanted.flatten(1)).mean()  # e2KD's


# Where a cosine is nearly 0, |cos|^0.5 is too steep for finite differences of this step.
SMOOTH = [name for name in NETWORKS if name not in ("resnet", "densenet", "b = 1.5")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(pytest.param(name, "weights", marks=pytest.mark.slow) for name in ("resnet", "densenet")),
        *((name, "weights") for name in [*SMOOTH, "own"]),
        *((name, "contributions") for name in ("maxout", "BatchNormUncentered2d", "own")),
    ],
)
def test_gradient_of_a_loss_on_the_map(name, form, training):
    build, size = {**NETWORKS, "own": (own, 4)}[name]
    network, x = build().train(training), encoded(size)
    explainer = BCos(form)
    pairs = slopes(network, lambda: map_loss(network, x, lambda network, x: explainer(network, x, TARGET).map))
    largest = max(abs(measured) for _, measured in pairs)
    assert largest > 0
    for claimed, measured in pairs:
        assert claimed == pytest.approx(measured, rel=1e-6, abs=1e-7 * largest)


def test_the_packages_own_mode_has_another_gradient():
    """Its weights are right as values, but as a loss they miss the way through the dynamic weights."""

    def explained(network: nn.Module, x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        with explanation_mode(network):
            y = network(leaf).gather(1, TARGET[:, None]).sum()
        return torch.autograd.grad(y, leaf, create_graph=True)[0]

    network, x = small(), encoded(8)
    pairs = slopes(network, lambda: map_loss(network, x, explained))
    largest = max(abs(measured) for _, measured in pairs)
    assert max(abs(claimed - measured) for claimed, measured in pairs) > 0.1 * largest


def test_b_cos_transformers_agree_with_the_package():
    pytest.importorskip("einops", reason="bcos.models.vit imports einops without declaring it")
    from bcos.models.vit import SimpleViT

    settings = {"linear_layer": BcosLinear, "act_layer": nn.Identity}
    with pytest.warns(UserWarning, match="entrypoints"):
        network = SimpleViT(
            **{"image_size": 16, "patch_size": 8, "num_classes": 3, "dim": 8, "depth": 2, "heads": 2, "mlp_dim": 12},
            **settings,
            norm_layer=norms.NoBias(norms.DetachableLayerNorm),
        ).double()
    x = encoded(16)
    _, theirs = in_explanation_mode(network, x)
    torch.testing.assert_close(BCos()(network, x, TARGET).map, theirs)
    pairs = slopes(network, lambda: map_loss(network, x, lambda network, x: BCos()(network, x, TARGET).map))
    largest = max(abs(measured) for _, measured in pairs)
    assert all(claimed == pytest.approx(measured, rel=1e-6, abs=1e-7 * largest) for claimed, measured in pairs)


# What goes in, and what is refused.


def test_a_classifier_makes_the_six_channels():
    network, x = small(), encoded(8)
    pixels = x[:, :3].clone().requires_grad_()
    for form in ("weights", "contributions"):
        bare = BCos(form)(network, x, TARGET).map
        found = BCos(form)(Classifier(network, {}, encoding="six-channels"), pixels, TARGET).map
        assert torch.equal(found, bare)
    found.sum().backward()
    assert pixels.grad is not None and pixels.grad.any()


def test_it_is_not_the_input_gradient():
    network, x = small(), encoded(8)
    plain = InputGradient()(network, x, TARGET).map
    assert (BCos()(network, x, TARGET).map - plain).norm() > 0.1 * plain.norm()


def test_running_statistics_move_as_in_an_ordinary_forward_pass():
    network, x = small().train(), encoded(8)
    other = copy.deepcopy(network)
    for _ in range(2):
        network(x)
        BCos()(other, x, TARGET).map.sum().backward()
    for name, buffer in other.named_buffers():
        assert torch.equal(buffer, network.get_buffer(name)) and not buffer.requires_grad


def test_a_detach_that_is_not_of_a_b_cos_layer_stays_one():
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.network = nn.Conv2d(6, 6, 1).double(), small()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x * self.gate(x).sigmoid().detach())

    model = Stopped()
    BCos()(model, encoded(8), TARGET).map.square().sum().backward()
    assert model.gate.weight.grad is None and model.network[0].linear.weight.grad.any()


@pytest.mark.parametrize(
    ("model", "channels", "match"),
    [
        (nn.Sequential(nn.Conv2d(6, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 6, "no B-cos layer"),
        (small(), 3, "six channels"),
    ],
)
def test_what_is_no_b_cos_network_is_refused(model, channels, match):
    with pytest.raises(UserError, match=match):
        BCos()(model.double(), encoded(8)[:, :channels], TARGET)
    with pytest.raises(UserError, match="weights"):
        BCos("weight")  # type: ignore
