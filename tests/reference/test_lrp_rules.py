"""LRP beyond ReLU networks: each rule written out in relevances, slowly, and gradients by finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hansfree.explainers import LRP, GradientXInput, InputGradient
from hansfree.torchvision_guard import import_torchvision

torchvision = import_torchvision()  # before zennit, which imports it too

EPSILON = 0.05
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(),
    "silu": nn.SiLU(),
    "silu in place": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU("tanh"),
    "hardswish": nn.Hardswish(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "leaky_relu in place": nn.LeakyReLU(0.2, inplace=True),
    "elu": nn.ELU(),
    "mish": nn.Mish(),
    "tanh": nn.Tanh(),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gradient_error(explainer, network: nn.Module, x: Tensor, classes: int = 3, step: float = 1e-6) -> float:
    """Relative error of the directional derivative of a loss on the map against central differences."""
    target = torch.arange(len(x)) % classes
    wanted = 0.1 * torch.randn_like(explainer(network, x, target).map)

    def loss() -> Tensor:
        return (explainer(network, x, target).map - wanted).square().sum()

    parameters = list(network.parameters())
    claimed = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    directions = [torch.randn_like(p) for p in parameters]
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
        values.append(loss().item())
    with torch.no_grad():
        for p, d in zip(parameters, directions, strict=True):
            p.add_(d, alpha=step)
    measured = (values[0] - values[1]) / (2 * step)
    expected = sum(float((g * d).sum()) for g, d in zip(claimed, directions, strict=True))
    return abs(measured - expected) / abs(expected)


# The identity rule.


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_passes_relevance_on_unchanged(name):
    """R_j = sum_i w_ij a_j / (z_i + epsilon sgn z_i) R_i, and R of an activation is R of its input."""
    act = ACTIVATIONS[name]
    layers = [nn.Linear(6, 8).double(), nn.Linear(8, 7).double(), nn.Linear(7, 3).double()]
    network = nn.Sequential(layers[0], act, layers[1], act, layers[2])
    x = torch.randn(4, 6, dtype=torch.double)
    map = LRP(EPSILON)(network, x, torch.full((4,), 1)).map
    for sample, found in zip(x, map, strict=True):
        a, seen = sample, []
        for layer in layers:
            z = layer.weight @ a + layer.bias
            seen.append((a, layer.weight, z))
            a = act(z.clone())
        relevance = torch.zeros(3, dtype=torch.double)
        relevance[1] = seen[-1][2][1]
        for a, weight, z in reversed(seen):
            relevance = a * (weight.T @ (relevance / (z + EPSILON * z.sign())))
        torch.testing.assert_close(found, relevance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("semantics", ["fused", "branchwise", "layerwise"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_through_activations(name, semantics):
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), ACTIVATIONS[name], nn.Conv2d(4, 4, 3), ACTIVATIONS[name]]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double().eval()
    x = torch.rand(3, 2, 8, 8, dtype=torch.double)
    assert gradient_error(LRP(EPSILON, semantics=semantics), network, x) < 1e-6


def test_an_activation_in_place_changes_its_input():
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            F.silu(x, inplace=True)
            return self.second(x)

    network, x = Careless().double(), torch.randn(2, 4, dtype=torch.double)
    explained = LRP(EPSILON)(network, x, torch.tensor([0, 1]))
    torch.testing.assert_close(explained.logits, network(x))
    assert gradient_error(LRP(EPSILON), network, x) < 1e-6


# Products, gates, normalisation, attention.


class Block(nn.Module):
    """A transformer block of one head on tokens, with a class token's head; bias-free if asked."""

    def __init__(self, width: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width, bias=bias), nn.Linear(2 * width, width, bias=bias)
        self.head = nn.Linear(width, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def stabilised(z: Tensor) -> Tensor:
    return z + 1e-300


def slow_block(block: Block, x: Tensor, k: int, epsilon: float) -> Tensor:
    """AttnLRP on one sample [tokens, width], rule by rule in relevances; epsilon at the GELU and at the logits."""

    def linear(layer: nn.Linear, a: Tensor, relevance: Tensor, epsilon: float = 0.0) -> Tensor:
        z = layer(a)
        return a * ((relevance / (z + epsilon * z.sign())) @ layer.weight)

    def norm(layer: nn.LayerNorm, a: Tensor, relevance: Tensor) -> Tensor:
        """y = w (a - mean a) / std + b with std constant: an affine map of a."""
        std = (a.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
        g = relevance / layer(a) * layer.weight / std
        return a * (g - g.mean(-1, keepdim=True))

    y = block.norm1(x)
    q, keys, v = block.q(y), block.k(y), block.v(y)
    scale = q.shape[-1] ** -0.5
    scores = q @ keys.T * scale
    weights = scores.softmax(-1)
    seen = weights @ v
    first = x + seen
    z2 = block.norm2(first)
    up = block.up(z2)
    bent = F.gelu(up)
    down = block.down(bent)
    second = first + down
    pooled = second.mean(0)
    logits = block.head(pooled)

    relevance = torch.zeros_like(logits)
    relevance[k] = logits[k]
    relevance = linear(block.head, pooled, relevance, epsilon)
    relevance = second * (relevance / pooled / len(x))  # the mean over tokens
    through_mlp, through_skip = relevance * down / second, relevance * first / second
    at_up = linear(block.down, bent, through_mlp)  # the GELU passes it on
    at_up = at_up * up / (up + epsilon * up.sign())  # and its layer ends there
    relevance = through_skip + norm(block.norm2, first, linear(block.up, z2, at_up))
    through_attention, through_skip = relevance * seen / first, relevance * x / first
    # R of a product A V: half to each factor.
    share = through_attention / seen / 2
    at_weights, at_v = weights * (share @ v.T), v * (weights.T @ share)
    at_scores = scores * (at_weights - weights * at_weights.sum(-1, keepdim=True))  # softmax by its gradient
    share = at_scores / scores * scale / 2
    at_q, at_k = q * (share @ keys), keys * (share.T @ q)
    at_y = linear(block.q, y, at_q) + linear(block.k, y, at_k) + linear(block.v, y, at_v)
    return through_skip + norm(block.norm1, x, at_y)


@pytest.mark.parametrize("bias", [True, False])
def test_a_transformer_block_is_attnlrp(bias):
    block = Block(bias=bias).double()
    x = torch.randn(3, 4, 6, dtype=torch.double)
    map = LRP(EPSILON)(block, x, torch.tensor([0, 2, 1])).map
    slow = torch.stack([slow_block(block, sample, k, EPSILON) for sample, k in zip(x, (0, 2, 1), strict=True)])
    torch.testing.assert_close(map, slow, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("semantics", ["fused", "branchwise", "layerwise"])
def test_gradients_through_a_transformer_block(semantics):
    x = torch.randn(3, 4, 6, dtype=torch.double)
    assert gradient_error(LRP(EPSILON, semantics=semantics), Block().double(), x) < 1e-6


@pytest.mark.parametrize("explainer", [InputGradient(), GradientXInput()])
def test_fused_attention_can_be_differentiated_twice(explainer):
    x = torch.randn(3, 4, 6, dtype=torch.double)
    assert gradient_error(explainer, Block().double(), x) < 1e-6


class Heads(nn.Module):
    """``nn.MultiheadAttention`` with whatever it is given."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **settings.pop("build", {}))
        self.settings = settings
        self.head = nn.Linear(6, 3)
        width = self.attention.kdim
        self.key = nn.Linear(6, width) if width != 6 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, self.key(x), self.key(x), **self.settings)[0].mean(1))


MASK = torch.ones(4, 4, dtype=torch.bool).triu(1)
MULTI_HEAD = {
    "plain": {},
    "without weights": {"need_weights": False},
    "causal": {"attn_mask": MASK, "is_causal": True, "need_weights": False},
    "mask": {"attn_mask": MASK},
    "float mask": {"attn_mask": torch.randn(4, 4, dtype=torch.double)},
    "mask per head": {"attn_mask": MASK.expand(6, 4, 4)},
    "padding": {"key_padding_mask": torch.tensor([[False, False, False, True]] * 3)},
    "both": {"key_padding_mask": torch.tensor([[False, False, False, True]] * 3), "attn_mask": MASK},
    "other keys": {"build": {"kdim": 5, "vdim": 5}},
    "no bias": {"build": {"bias": False}},
}


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention_computes_what_torch_does(name):
    network, x = Heads(**MULTI_HEAD[name]).double().eval(), torch.randn(3, 4, 6, dtype=torch.double)
    target = torch.tensor([0, 1, 2])
    for explainer in (InputGradient(), LRP(EPSILON)):
        torch.testing.assert_close(explainer(network, x, target).logits, network(x))
    twin = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(network(twin).gather(1, target[:, None]).sum(), twin)
    torch.testing.assert_close(InputGradient()(network, x, target).map, expected)
    assert gradient_error(LRP(EPSILON), network, x) < 1e-6


ATTENTION = {
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool mask": {"attn_mask": ~MASK},
    "float mask": {"attn_mask": torch.randn(4, 4, dtype=torch.double)},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_computes_what_torch_does(name):
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.head = nn.Linear(6, 18), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.scaled_dot_product_attention(*self.project(x).chunk(3, -1), **ATTENTION[name]).mean(1))

    network, x = Attends().double(), torch.randn(3, 4, 6, dtype=torch.double)
    torch.testing.assert_close(InputGradient()(network, x, torch.arange(3)).logits, network(x))
    assert gradient_error(InputGradient(), network, x) < 1e-6


class Excited(nn.Module):
    """Squeeze and excitation: a gate, written in the ways that libraries write it."""

    def __init__(self, gate, times) -> None:
        super().__init__()
        self.conv, self.squeeze, self.fc = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.gate, self.times = gate, times

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.fc(self.times(x, self.gate(self.squeeze(x.mean((2, 3), keepdim=True)))).mean((2, 3)))


@pytest.mark.parametrize("gate", [torch.sigmoid, F.sigmoid, F.hardsigmoid, lambda z: 1 - Tensor.sigmoid(z)])
@pytest.mark.parametrize("times", [lambda x, s: x * s, lambda x, s: s * x, lambda x, s: x.clone().mul_(s)])
def test_a_gate_is_a_constant(gate, times):
    network, x = Excited(gate, times).double(), torch.randn(3, 2, 6, 6, dtype=torch.double)
    target = torch.arange(3)
    map = LRP(EPSILON)(network, x, target).map
    a = F.relu(network.conv(x))
    opening = gate(network.squeeze(a.mean((2, 3), keepdim=True))).detach()
    held = Excited(None, lambda x, _: x * opening)
    held.conv, held.fc, held.gate, held.squeeze = network.conv, network.fc, nn.Identity(), nn.Identity()
    torch.testing.assert_close(map, LRP(EPSILON)(held, x, target).map)
    assert gradient_error(LRP(EPSILON), network, x) < 1e-6
    assert gradient_error(GradientXInput(), network, x) < 1e-6


PRODUCTS = {
    "mul": lambda x, y: x * y,
    "mul_": lambda x, y: x.clone().mul_(y),
    "matmul": lambda x, y: x @ y,
    "bmm": lambda x, y: x.flatten(0, 1).bmm(y.flatten(0, 1)).view_as(x),
    "einsum": lambda x, y: torch.einsum("bcij,bcjk->bcik", x, y),
    "broadcast": lambda x, y: x * y.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_shares_relevance_in_halves(name):
    """Gradient x input of a bilinear function counts its value twice; LRP counts it once."""

    class Multiplies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Conv2d(2, 3, 3, bias=False) for _ in range(2))
            self.scale = nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (PRODUCTS[name](self.a(x) * self.scale, self.b(x))).mean((2, 3))

    network, x, target = Multiplies().double(), torch.randn(3, 2, 6, 6, dtype=torch.double), torch.arange(3)
    logits, map = LRP(EPSILON, output_factor=False)(network, x, target)
    torch.testing.assert_close(map.sum((1, 2, 3)), logits.diagonal())
    torch.testing.assert_close(2 * map, GradientXInput()(network, x, target).map)
    assert gradient_error(LRP(EPSILON), network, x) < 1e-6


NORMS = {
    "layer": nn.LayerNorm([4, 6, 6]),
    "layer without weights": nn.LayerNorm([4, 6, 6], elementwise_affine=False),
    "group": nn.GroupNorm(2, 4),
    "instance": nn.InstanceNorm2d(4, affine=True),
    "rms": nn.RMSNorm([4, 6, 6]),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_within_a_sample_holds_its_scale(name):
    """With the standard deviation held it is affine, so LRP is the gradient of the network with that constant."""
    norm = NORMS[name].double()
    network = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Flatten(), nn.Linear(144, 3)).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, target = torch.randn(3, 2, 8, 8, dtype=torch.double), torch.arange(3)
    logits, map = LRP(EPSILON, output_factor=False)(network, x, target)
    torch.testing.assert_close(logits, network(x))
    held = torch.zeros(3, dtype=torch.double)
    # Completeness: what the biases of the affine network contribute is all that is missing.
    for n in range(3):

        def affine(image: Tensor, n: int = n) -> Tensor:
            z, mine = network[0](image[None]), network[0](x[n : n + 1])
            return network[2:](held_norm(name, norm, z, mine))[0, n]

        held[n] = affine(torch.zeros_like(x[n]))
    torch.testing.assert_close(map.sum((1, 2, 3)) + held, logits.diagonal())
    assert gradient_error(LRP(EPSILON), network, x) < 1e-6


def held_norm(name: str, norm: nn.Module, z: Tensor, mine: Tensor) -> Tensor:
    """``norm`` at z, dividing by the size of ``mine``."""
    groups = {"group": 2, "instance": 4}.get(name, 1)
    grouped, own = z.view(1, groups, -1), mine.view(1, groups, -1)
    centred = grouped if name == "rms" else grouped - grouped.mean(-1, keepdim=True)
    size = own.square().mean(-1, keepdim=True) if name == "rms" else own.var(-1, correction=0, keepdim=True)
    eps = torch.finfo(torch.double).eps if norm.eps is None else norm.eps
    y = (centred / (size + eps).sqrt()).view_as(z)
    shape = [1, -1, 1, 1] if name in ("group", "instance") else [1, 4, 6, 6]
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def test_a_normalised_embedding_holds_its_length():
    class Normalises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.normalize(self.first(x), dim=-1))

    network, x = Normalises().double(), torch.randn(3, 4, dtype=torch.double)
    logits, map = LRP(EPSILON, output_factor=False)(network, x, torch.arange(3))
    torch.testing.assert_close(map.sum(1), logits.diagonal())
    assert gradient_error(LRP(EPSILON), network, x) < 1e-6


# Semantics.


def residual_network(pool: nn.Module) -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.pool, self.fc = pool, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm1(self.conv1(x)))
            y = self.norm2(self.conv2(x))
            y += x
            return self.fc(self.pool(F.relu(y)).flatten(1))

    network = Residual()
    for norm in (network.norm1, network.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return network.double().eval()


ENDS = {
    "branchwise": {"norm", "fc"},
    "layerwise": {"conv", "norm", "sum", "pool", "fc"},
}


@pytest.mark.parametrize("semantics", ENDS)
@pytest.mark.parametrize("output_factor", [True, False])
def test_semantics_say_which_affine_maps_are_layers(semantics, output_factor):
    """Relevance through a residual network, operation by operation; epsilon only where a layer ends."""
    network, x, k = residual_network(nn.AdaptiveAvgPool2d(1)), torch.rand(1, 2, 6, 6, dtype=torch.double), 2
    ends = ENDS[semantics] - (set() if output_factor else {"fc"})

    def through(layer: str, function, a: Tensor, relevance: Tensor) -> Tensor:
        """The epsilon rule of an affine function of ``a``; epsilon 0 where no layer ends."""
        a = a.detach().requires_grad_()
        z = function(a)
        epsilon = EPSILON if layer in ends else 0.0
        (g,) = torch.autograd.grad(z, a, relevance / (z + epsilon * z.sign() + 1e-300))
        return (a * g).detach()

    conv1 = network.conv1(x)
    norm1 = network.norm1(conv1)
    first = F.relu(norm1)
    conv2 = network.conv2(first)
    norm2 = network.norm2(conv2)
    second = F.relu(norm2 + first)
    pooled = network.pool(second)
    relevance = torch.zeros(1, 3, dtype=torch.double)
    relevance[0, k] = network(x)[0, k]
    relevance = through("fc", lambda a: network.fc(a.flatten(1)), pooled, relevance)
    relevance = through("pool", network.pool, second, relevance)
    total = norm2 + first
    share = relevance / (total + (EPSILON if "sum" in ends else 0.0) * total.sign())
    branch, skip = norm2 * share, first * share
    branch = through("conv", network.conv2, first, through("norm", network.norm2, conv2, branch))
    slow = through("conv", network.conv1, x, through("norm", network.norm1, conv1, branch + skip))
    map = LRP(EPSILON, output_factor=output_factor, semantics=semantics)(network, x, torch.tensor([k])).map
    torch.testing.assert_close(map, slow, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("semantics", ["branchwise", "layerwise"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_under_other_semantics(semantics, training):
    network, x = residual_network(nn.AvgPool2d(6)).train(training), torch.rand(3, 2, 6, 6, dtype=torch.double)
    assert gradient_error(LRP(EPSILON, semantics=semantics), network, x, step=1e-7) < 1e-5


def test_branchwise_is_what_zennit_computes_on_a_resnet():
    from zennit.attribution import Gradient
    from zennit.composites import LayerMapComposite
    from zennit.layer import Sum
    from zennit.rules import Epsilon, Norm, Pass
    from zennit.torchvision import ResNetCanonizer
    from zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear

    network = torchvision.models.resnet18(num_classes=3).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # zennit merges batch norms without it
            nn.init.normal_(module.bias, std=0.1)
    x, target = torch.rand(2, 3, 32, 32, dtype=torch.double), torch.tensor([2, 0])
    map = LRP(EPSILON, semantics="branchwise")(network, x, target).map.detach()
    rules = [(Activation, Pass()), (Sum, Norm(1e-14)), (AvgPool, Norm(1e-14)), (BatchNorm, Pass())]
    rules += [(Convolution, Epsilon(EPSILON)), (Linear, Epsilon(EPSILON))]
    with Gradient(model=network, composite=LayerMapComposite(rules, canonizers=[ResNetCanonizer()])) as attributor:
        logits, _ = attributor(x, torch.zeros(2, 3, dtype=torch.double))
        start = torch.zeros_like(logits).scatter_(1, target[:, None], logits.gather(1, target[:, None]).detach())
        _, theirs = attributor(x, start)
    torch.testing.assert_close(map, theirs, rtol=1e-8, atol=1e-10 * float(theirs.abs().max()))


# Factors as constants of the outer gradient.


def test_constant_factors_are_constants_to_a_loss_on_the_map():
    first, second = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()
    network, x, k = nn.Sequential(first, nn.ReLU(), second), torch.randn(4, 6, dtype=torch.double), 1
    target = torch.full((4,), k)
    map = LRP(EPSILON, factors="constant")(network, x, target).map
    torch.testing.assert_close(map, LRP(EPSILON)(network, x, target).map)
    a = first(x).relu().detach()
    y = second(a)[:, k].detach()
    start = (y.abs() / (y.abs() + EPSILON))[:, None]
    slow = x * ((start * second.weight[k] * a / (a + EPSILON)) @ first.weight)
    torch.testing.assert_close(map, slow)
    weights = [first.weight, second.weight]
    wanted = torch.randn_like(map)
    found = torch.autograd.grad((map - wanted).square().sum(), weights)
    torch.testing.assert_close(found, torch.autograd.grad((slow - wanted).square().sum(), weights))


def test_constant_factors_need_no_backward_pass_through_the_forward_graph():
    """Batch statistics are constants too: in training mode the gradient is that of a net in evaluation mode."""
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=1.0), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    x, target = torch.rand(5, 2, 6, 6, dtype=torch.double), torch.tensor([0, 1, 2, 0, 1])
    explainer, parameters = LRP(EPSILON, factors="constant"), list(network.parameters())
    map = explainer(network.train(), x, target).map
    network[1].running_var *= (5 * 16 - 1) / (5 * 16)  # batch norm keeps the unbiased one
    held = explainer(network.eval(), x, target).map
    torch.testing.assert_close(map, held)
    for found, expected in zip(
        *(torch.autograd.grad(m.square().sum(), parameters, materialize_grads=True) for m in (map, held)), strict=True
    ):
        torch.testing.assert_close(found, expected)
    logits = LRP(EPSILON, factors="constant")(network.train(), x, target).logits
    ordinary = torch.autograd.grad(network(x).square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), parameters), ordinary)
