"""LRP, gradient x input and the input gradient against eq. 4 written out, other libraries, and finite differences."""

import copy
import warnings

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hansfree.core import Explainer, held_affine
from hansfree.explainers import LRP, GradientXInput, InputGradient
from hansfree.explainers.nodes import Attenuate, Call, ConvSignal, HeldAffine, RuledConv2d
from hansfree.torchvision_guard import import_torchvision

torchvision = import_torchvision()  # before zennit, which imports it too

EPSILON = 0.05


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def unsettle(network: nn.Module) -> nn.Module:
    """Batch norms with parameters and running statistics that matter."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.double()


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def small_cnn() -> nn.Sequential:
    """conv-BN-ReLU-max-pool-conv-BN-ReLU-GAP-fc in evaluation mode."""
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return unsettle(nn.Sequential(*layers, nn.Linear(5, 3))).eval()


# Eq. 4, slowly: every affine stretch of the network as one matrix, one sample at a time.


def as_matrix(affine, shape) -> tuple[Tensor, Tensor]:
    """The matrix W and the bias b of an affine function of one sample of ``shape``."""
    size = torch.Size(shape).numel()
    bias = affine(torch.zeros(1, *shape, dtype=torch.double)).flatten()
    columns = affine(torch.eye(size, dtype=torch.double).view(size, *shape)).view(size, -1)
    return (columns - bias).T, bias


def epsilon_rule(weight, bias, a, relevance, epsilon):
    passed = torch.zeros_like(a)
    z = weight @ a + bias
    for i in range(len(z)):
        sign = 1.0 if z[i] >= 0 else -1.0
        for j in range(len(a)):
            passed[j] += weight[i, j] * a[j] / (z[i] + sign * epsilon) * relevance[i]
    return passed


def winners_rule(x, relevance):
    """Relevance through a 2 x 2 max-pool: all of it to the largest pixel of each window."""
    passed = torch.zeros_like(x)
    for c in range(x.shape[0]):
        for i in range(x.shape[1] // 2):
            for j in range(x.shape[2] // 2):
                k = int(x[c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].argmax())
                passed[c, 2 * i + k // 2, 2 * j + k % 2] = relevance[c, i, j]
    return passed


def slow_lrp(stretches, x, target, epsilon, last_epsilon):
    """``stretches``: affine functions between ReLUs; a leading "pool" means that a max-pool comes before it."""
    inputs, a = [], x
    for index, (pools, affine) in enumerate(stretches):
        before = a
        a = F.max_pool2d(a[None], 2)[0] if pools else a
        inputs.append((before, a))
        a = affine(a[None])[0]
        a = a if index == len(stretches) - 1 else a.clamp(min=0)
    relevance = torch.zeros_like(a)
    relevance[target] = a[target]
    for index in reversed(range(len(stretches))):
        pools, affine = stretches[index]
        before, a = inputs[index]
        rule = last_epsilon if index == len(stretches) - 1 else epsilon
        weight, bias = as_matrix(affine, a.shape)
        relevance = epsilon_rule(weight, bias, a.flatten(), relevance.flatten(), rule).view(a.shape)
        relevance = winners_rule(before, relevance) if pools else relevance
    return relevance


def stretches_of(network):
    if isinstance(network[0], nn.Linear):
        return [(False, network[0]), (False, network[2]), (False, network[4])]
    return [(False, network[:2]), (True, network[4:6]), (False, network[7:])]


@pytest.mark.parametrize("output_factor", [True, False])
@pytest.mark.parametrize(("build", "shape"), [(perceptron, (6,)), (small_cnn, (2, 8, 8))])
@torch.no_grad()
def test_lrp_is_equation_4(build, shape, output_factor):
    network, x, target = build(), torch.randn(3, *shape, dtype=torch.double), torch.tensor([0, 2, 1])
    last = EPSILON if output_factor else 0.0
    slow = torch.stack([slow_lrp(stretches_of(network), x[n], target[n], EPSILON, last) for n in range(3)])
    logits, map = LRP(EPSILON, output_factor=output_factor)(network, x, target)
    torch.testing.assert_close(logits, network(x))
    torch.testing.assert_close(map, slow, rtol=1e-10, atol=1e-15)


@torch.no_grad()
def test_an_epsilon_per_sample_is_that_epsilon_for_each_sample():
    network, x, target = small_cnn(), torch.rand(3, 2, 8, 8, dtype=torch.double), torch.tensor([0, 2, 1])
    epsilons = torch.tensor([0.01, 0.03, 0.1], dtype=torch.double)
    together = LRP((0.01, 0.1))(network, x, target, draws={"epsilon": epsilons}).map
    apart = [LRP(float(e))(network, x[n : n + 1], target[n : n + 1]).map for n, e in enumerate(epsilons)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_draws_are_log_uniform_and_the_middle_is_the_geometric_mean():
    explainer = LRP((0.001, 0.1))
    drawn = explainer.draw(20_000, torch.Generator().manual_seed(0))["epsilon"]
    assert drawn.min() >= 0.001 and drawn.max() <= 0.1
    assert drawn.log10().mean().item() == pytest.approx(-2, abs=0.02)
    assert drawn.log10().std().item() == pytest.approx(2 / 12**0.5, abs=0.02)
    network, x, target = small_cnn(), torch.rand(2, 2, 8, 8, dtype=torch.double), torch.tensor([0, 2])
    torch.testing.assert_close(explainer(network, x, target).map, LRP(0.01)(network, x, target).map)


# Other libraries. What each gets right, as of the versions in the constraints file, is said at the test.


def test_lrp_agrees_with_captum_on_a_perceptron():
    network, x, target = perceptron(), torch.randn(4, 6, dtype=torch.double), torch.tensor([0, 1, 2, 0])
    map = LRP(EPSILON)(network, x, target).map
    other = copy.deepcopy(network)
    for layer in other:
        if isinstance(layer, nn.Linear):
            layer.rule = captum.attr._utils.lrp_rules.EpsilonRule(EPSILON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.attr.LRP(other).attribute(x.clone(), target=target)
    torch.testing.assert_close(map, theirs, rtol=1e-10, atol=1e-15)


def test_lrp_agrees_with_zennit_on_a_cnn():
    """zennit merges batch norm without its eps and gives the global pool an epsilon of its own: both are zero here."""
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import LayerMapComposite
    from zennit.rules import Epsilon, Norm, Pass
    from zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear

    network, x, target = small_cnn(), torch.rand(3, 2, 8, 8, dtype=torch.double), torch.tensor([0, 1, 2])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    map = LRP(EPSILON)(network, x, target).map
    rules = [(Activation, Pass()), (AvgPool, Norm(1e-14)), (BatchNorm, Pass())]
    rules += [(Convolution, Epsilon(EPSILON)), (Linear, Epsilon(EPSILON))]
    composite = LayerMapComposite(rules, canonizers=[SequentialMergeBatchNorm()])
    with Gradient(model=network, composite=composite) as attributor:
        logits, _ = attributor(x, torch.zeros(3, 3, dtype=torch.double))
        start = torch.zeros_like(logits).scatter_(1, target[:, None], logits.gather(1, target[:, None]).detach())
        _, theirs = attributor(x, start)
    torch.testing.assert_close(map, theirs, rtol=1e-9, atol=1e-14)


def test_gradients_agree_with_captum():
    network, x, target = small_cnn(), torch.rand(3, 2, 8, 8, dtype=torch.double), torch.tensor([0, 1, 2])
    saliency = captum.attr.Saliency(network).attribute(x.clone().requires_grad_(), target=target, abs=False)
    product = captum.attr.InputXGradient(network).attribute(x.clone().requires_grad_(), target=target)
    torch.testing.assert_close(InputGradient()(network, x, target).map, saliency)
    torch.testing.assert_close(GradientXInput()(network, x, target).map.detach(), product.detach())


# The gradient of a loss on the map, against finite differences.


class Reused(nn.Module):
    """One ReLU for every layer, a residual sum, a functional and an in-place ReLU, a held scale, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(6, 6, 3, stride=2, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.norm1(self.conv1(x))), 2)
        y = F.relu(self.norm2(self.conv2(x)))
        x = self.relu(self.conv2(y) + x)
        scale = self.scale.view(1, -1, 1, 1) * (x.square().mean((0, 2, 3), keepdim=True) + 1e-3).rsqrt()
        x = torch.relu_(self.conv3(held_affine(x, scale)))
        return self.fc(x.mean((2, 3)))


def check_gradient(explainer: Explainer, network: nn.Module, x: Tensor, *, per_parameter: bool) -> None:
    """Directional derivatives of a loss on the map, along the claimed gradient plus noise."""
    target = torch.arange(len(x)) % 4
    wanted = 0.01 * torch.randn_like(x)
    draws = explainer.draw(len(x)) or None
    buffers = {name: value.clone() for name, value in network.named_buffers()}

    def loss() -> Tensor:
        with torch.no_grad():
            for name, value in network.named_buffers():
                value.copy_(buffers[name])
        return (explainer(network, x, target, draws=draws).map - wanted).square().sum()

    parameters = list(network.parameters())
    claimed = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    norm = torch.stack([g.norm() for g in claimed]).norm()
    groups = [[n] for n in range(len(parameters))] if per_parameter else [list(range(len(parameters)))]
    step = 1e-7
    for group in groups:
        directions = [claimed[n] / norm + torch.randn_like(claimed[n]) for n in group]
        length = torch.stack([d.norm() for d in directions]).norm()
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                for n, d in zip(group, directions, strict=True):
                    parameters[n].add_(d, alpha=float(sign * step / length))
            values.append(loss().item())
        with torch.no_grad():
            for n, d in zip(group, directions, strict=True):
                parameters[n].add_(d, alpha=float(step / length))
        measured = (values[0] - values[1]) / (2 * step)
        expected = sum(float((claimed[n] * d).sum()) for n, d in zip(group, directions, strict=True)) / float(length)
        assert measured == pytest.approx(expected, rel=1e-4, abs=float(norm) * 1e-6), [
            name for n, (name, _) in enumerate(network.named_parameters()) if n in group
        ]


STATISTICS = ["constant", "running", "differentiated"]


@pytest.mark.parametrize("mode", ["eval", *STATISTICS])
@pytest.mark.parametrize(
    "explainer",
    [LRP(EPSILON), LRP((0.01, 0.1)), LRP(EPSILON, output_factor=False), GradientXInput(), InputGradient()],
    ids=["lrp", "lrp-per-sample", "lrp-no-output-factor", "gxi", "gradient"],
)
def test_gradient_of_a_loss_on_the_map(explainer, mode):
    network = unsettle(Reused()).train(mode != "eval")
    if mode != "eval":
        explainer = type(explainer)(**{**vars(explainer), "statistics": mode})
    check_gradient(explainer, network, torch.rand(3, 3, 8, 8, dtype=torch.double), per_parameter=True)


@pytest.mark.parametrize("explainer", [LRP((0.01, 0.1)), GradientXInput()], ids=["lrp", "gxi"])
@pytest.mark.parametrize("training", [False, True])
def test_gradient_of_a_loss_on_the_map_of_a_resnet(explainer, training):
    network = unsettle(torchvision.models.resnet18(num_classes=4)).train(training)
    check_gradient(explainer, network, torch.rand(2, 3, 32, 32, dtype=torch.double), per_parameter=False)


def test_the_last_bias_learns_from_lrp_only_with_the_output_factor():
    network, x, target = small_cnn(), torch.rand(2, 2, 8, 8, dtype=torch.double), torch.tensor([0, 1])
    for output_factor, learns in ((True, True), (False, False)):
        network.zero_grad()
        LRP(EPSILON, output_factor=output_factor)(network, x, target).map.square().sum().backward()
        assert (network[-1].bias.grad is not None and bool(network[-1].bias.grad.any())) == learns


# The nodes by themselves.


def test_attenuation_has_the_right_derivatives():
    g, a = torch.randn(3, 4, dtype=torch.double), torch.rand(3, 4, dtype=torch.double) + 0.1
    for epsilon in (0.1, torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.double)):
        torch.testing.assert_close(Attenuate.apply(g, a, epsilon), g * a / (a + epsilon))
        assert torch.autograd.gradcheck(
            lambda g, a, e=epsilon: Attenuate.apply(g, a, e), (g.requires_grad_(), a.requires_grad_())
        )
    zero = torch.zeros(2, dtype=torch.double, requires_grad=True)
    assert not Attenuate.apply(torch.ones(2, dtype=torch.double), zero, 0.1).any()


def test_a_held_affine_map_is_ordinary_unless_explaining():
    x, scale, shift = (
        torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 3, 2), (1, 3, 1), (1, 3, 1))
    )
    call = Call("constant", None)
    inputs = (x, scale, shift)
    assert torch.autograd.gradcheck(lambda *t: HeldAffine.apply(call, True, *t, None), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: HeldAffine.apply(call, True, *t, None), inputs)
    call.explaining = True
    grads = torch.autograd.grad(
        HeldAffine.apply(call, True, *inputs, None).sum(), inputs, create_graph=True, allow_unused=True
    )
    torch.testing.assert_close(grads[0], scale.expand_as(x))
    assert grads[0].requires_grad and grads[1] is None and grads[2] is None


@pytest.mark.parametrize("geometry", [([1, 1], [1, 1], [1, 1], 1), ([2, 2], [0, 1], [1, 2], 2)])
def test_convolutions_have_the_right_derivatives(geometry):
    x = torch.randn(2, 4, 6, 6, dtype=torch.double, requires_grad=True)
    weight = torch.randn(4, 4 // geometry[3], 3, 3, dtype=torch.double, requires_grad=True)
    bias = torch.randn(4, dtype=torch.double, requires_grad=True)
    call = Call("constant", None)

    def conv(*t):
        return RuledConv2d.apply(call, *t, geometry, False)

    assert torch.autograd.gradcheck(conv, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(conv, (x, weight, bias), fast_mode=True)
    g = torch.randn_like(conv(x, weight, bias)).requires_grad_()

    def signal(g, weight):
        return ConvSignal.apply(g, x.detach(), weight, geometry)

    torch.testing.assert_close(signal(g, weight), torch.autograd.grad(conv(x, weight, bias), x, g)[0])
    assert torch.autograd.gradcheck(signal, (g, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(signal, (g, weight), fast_mode=True)


# Batch norm in training mode.


def in_training(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).train()


@pytest.mark.parametrize("explainer", [LRP, GradientXInput])
def test_constant_statistics_are_an_eval_net_that_holds_them(explainer):
    network, x = unsettle(Reused()), torch.rand(4, 3, 8, 8, dtype=torch.double)
    target, counts = torch.arange(4), {}
    held = in_training(network)
    for module in held.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.register_forward_hook(lambda m, args, _: counts.__setitem__(m, args[0].numel() / m.num_features))
    held(x)
    for module, count in counts.items():
        module.running_var.mul_((count - 1) / count)
    torch.testing.assert_close(
        explainer()(in_training(network), x, target).map, explainer()(held.eval(), x, target).map, rtol=1e-9, atol=1e-12
    )


def test_running_statistics_are_those_before_the_batch():
    network, x, target = unsettle(Reused()), torch.rand(4, 3, 8, 8, dtype=torch.double), torch.arange(4)
    map = LRP(EPSILON, statistics="running")(in_training(network), x, target).map
    torch.testing.assert_close(map, LRP(EPSILON)(network.eval(), x, target).map)


def test_differentiated_statistics_are_plain_autograd():
    network, target = in_training(unsettle(Reused())), torch.arange(4)
    x = torch.rand(4, 3, 8, 8, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(network(leaf).gather(1, target[:, None]).sum(), leaf)
    torch.testing.assert_close(InputGradient(statistics="differentiated")(network, x, target).map, plain)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_running_statistics_move_as_in_an_ordinary_forward_pass(statistics, momentum):
    layers = (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4))
    network = nn.Sequential(*layers).train()
    other, x = copy.deepcopy(network), torch.rand(4, 3, 8, 8)
    for _ in range(2):
        network(x)
        LRP(EPSILON, statistics=statistics)(other, x, torch.arange(4))
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name])


def test_batch_norm_without_running_statistics_uses_the_batch():
    norm = nn.BatchNorm2d(5, affine=False, track_running_stats=False)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)).double()
    x, target = torch.rand(4, 3, 8, 8, dtype=torch.double), torch.arange(4)
    maps = [LRP(EPSILON)(network.train(mode), x, target).map for mode in (True, False)]
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=0)
