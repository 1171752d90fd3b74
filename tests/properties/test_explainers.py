"""Completeness, equivalent ways to write a ReLU, and everything that must be refused."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hansfree.errors import UserError
from hansfree.explainers import LRP, Attention, FeatureMap, GradCAM, GradientXInput, InputGradient
from hansfree.explainers.propagation import resolve
from hansfree.models.layers import ScaleNorm


class Bend(nn.Module):
    """A function as a layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def network(*middle: nn.Module, bias: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, bias=bias)]
    return nn.Sequential(*layers, *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=bias)).double()


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 12, 12, dtype=torch.double, generator=torch.Generator().manual_seed(1))


TARGET = torch.tensor([0, 3, 1])


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), target=st.integers(0, 3))
def test_gradient_x_input_is_complete_without_biases(seed, target):
    chosen = torch.full((3,), target)
    logits, map = GradientXInput()(network(nn.ReLU(), seed=seed), images(), chosen)
    torch.testing.assert_close(map.sum((1, 2, 3)), logits[:, target])


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), bias=st.booleans())
def test_lrp_nears_gradient_x_input_as_epsilon_vanishes(seed, bias):
    model = network(nn.ReLU(), seed=seed, bias=bias)
    expected = GradientXInput()(model, images(), TARGET).map
    torch.testing.assert_close(LRP(1e-13)(model, images(), TARGET).map, expected, rtol=1e-3, atol=1e-7)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), epsilon=st.floats(1e-4, 1))
def test_the_output_factor_is_a_factor_per_sample(seed, epsilon):
    model = network(nn.ReLU(), seed=seed)
    logits, whole = LRP(epsilon)(model, images(), TARGET)
    code = LRP(epsilon, output_factor=False)(model, images(), TARGET).map
    size = logits.gather(1, TARGET[:, None]).abs()
    torch.testing.assert_close(whole, code * (size / (size + epsilon)).view(-1, 1, 1, 1))


@pytest.mark.parametrize("explainer", [LRP(0.02), GradientXInput(), InputGradient()])
@pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(inplace=True),
        Bend(F.relu),
        Bend(lambda x: F.relu(x, inplace=True)),
        Bend(lambda x: F.relu(x, True)),
        Bend(torch.relu),
        Bend(torch.relu_),
        Bend(lambda x: x.relu()),
        Bend(lambda x: x.relu_()),
        Bend(lambda x: (F.relu_(x), x)[1]),
        Bend(lambda x: F.relu(input=x)),
    ],
)
def test_a_relu_is_a_relu_however_it_is_written(explainer, relu):
    model, other = network(nn.ReLU(), bias=True), network(relu, bias=True)
    for found, expected in zip(explainer(other, images(), TARGET), explainer(model, images(), TARGET)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    losses = [explainer(m, images(), TARGET).map.square().sum() for m in (model, other)]
    grads = [
        torch.autograd.grad(loss, list(m.parameters()), materialize_grads=True)
        for loss, m in zip(losses, (model, other))
    ]
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d((2, 3), stride=1), nn.AdaptiveMaxPool2d(2)],
)
def test_max_pools_are_those_of_autograd(pool):
    model, x = network(nn.ReLU(), pool), images().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).gather(1, TARGET[:, None]).sum(), x)
    torch.testing.assert_close(InputGradient()(model, images(), TARGET).map, expected)
    assert LRP(0.01)(model, images(), TARGET).map.any()


AFFINE = {
    "dropout": nn.Dropout(0.5),
    "dropout2d": nn.Dropout2d(0.5),
    "average pool": nn.AvgPool2d(2),
    "grouped convolution": nn.Conv2d(8, 8, 3, groups=4, padding="same"),
    "transposed convolution": nn.ConvTranspose2d(8, 8, 2),
    "padding": nn.ReflectionPad2d(1),
    "upsampling": nn.Upsample(scale_factor=2, mode="bilinear"),
    "weight norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
    "concatenation": Bend(lambda x: torch.cat([x[:, :4], -x[:, 4:] / 2], 1)),
    "mixing": Bend(lambda x: torch.einsum("bchw,cd->bdhw", x, torch.eye(8, dtype=x.dtype))),
    "batch norm": nn.BatchNorm2d(8),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_layers_belong_to_the_layer_before_the_relu(name):
    model = network(AFFINE[name], nn.ReLU()).eval()
    assert LRP(0.01)(model, images(), TARGET).map.any()
    LRP(0.01)(model.train(), images(), TARGET)


REFUSED = {
    "prelu": nn.PReLU(),
    "softplus": nn.Softplus(),
    "celu": nn.CELU(),
    "clamping": nn.Hardtanh(1.0, 2.0),
    "a sigmoid that multiplies nothing": nn.Sigmoid(),
    "sigmoid that multiplies": Bend(lambda x: x + torch.sigmoid(x)),
    "log_softmax": nn.LogSoftmax(1),
    "clamp_min": Bend(lambda x: x.clamp_min(0)),
    "amax": Bend(lambda x: x - x.amax(1, keepdim=True)),
    "division by an activation": Bend(lambda x: torch.ones_like(x) / (2 + x)),
    "addcmul": Bend(lambda x: torch.addcmul(torch.zeros_like(x), x, x)),
    "in place of a part": Bend(lambda x: (x[:, :4].relu_(), x)[1]),
    "relu": torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lrp_refuses_what_it_has_no_rule_for(name):
    model = nn.Sequential(nn.Identity(), network(nn.Identity(), REFUSED[name], nn.ReLU()))
    module = type(REFUSED[name]).__name__
    with pytest.raises(UserError, match=rf"{name}.*1\.5 \({module}\)"):
        LRP(0.01)(model, images(), TARGET)
    x = images().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).gather(1, TARGET[:, None]).sum(), x)
    torch.testing.assert_close(InputGradient()(model, images(), TARGET).map, expected)


def test_a_refusal_leaves_running_statistics_alone():
    model = nn.Sequential(network(nn.BatchNorm2d(8), ScaleNorm(8), nn.Softplus())).train().double()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    with pytest.raises(UserError, match=r"0\.6 \(Softplus\)"):
        LRP(0.01)(model, images(), TARGET)
    assert torch.equal(model.state_dict()["0.4.running_mean"], before["0.4.running_mean"])


@pytest.mark.parametrize("epsilon", [0, -0.1, (0.1, 0.01), (0.0, 0.1), (0.1, 0.2, 0.3), float("nan"), float("inf")])
def test_an_impossible_epsilon_is_refused(epsilon):
    with pytest.raises(UserError, match="epsilon"):
        LRP(epsilon)


def test_a_list_of_two_epsilons_is_a_range():
    assert LRP([0.1, 0.2]) == LRP((0.1, 0.2))  # pyright: ignore[reportArgumentType]
    assert hash(LRP([0.1, 0.2])) == hash(LRP((0.1, 0.2)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("explainer", [LRP, GradientXInput, InputGradient])
def test_unknown_statistics_are_refused(explainer):
    with pytest.raises(UserError, match="constant"):
        explainer(statistics="constnt")


@pytest.mark.parametrize("draws", [{}, {"epsilon": torch.ones(2)}])
def test_draws_must_fit(draws):
    with pytest.raises(UserError, match="epsilon"):
        LRP((0.01, 0.1))(network(nn.ReLU()), images(), TARGET, draws=draws)


def test_an_epsilon_per_sample_needs_samples_first():
    model = nn.Sequential(
        nn.Flatten(0, 1), nn.ReLU(), nn.Unflatten(0, (-1, 3)), nn.Flatten(), nn.Linear(432, 4)
    ).double()
    with pytest.raises(UserError, match="first dimension"):
        LRP()(model, images(), TARGET, draws=LRP().draw(3))
    assert LRP(0.01)(model, images(), TARGET).map.any()


@pytest.mark.parametrize("explainer", [LRP(0.01), GradientXInput()])
@pytest.mark.parametrize("frozen", [False, True])
def test_logits_must_depend_on_the_input(explainer, frozen):
    model = network(nn.ReLU(), Bend(torch.zeros_like)).requires_grad_(not frozen)
    with pytest.raises(UserError, match="do not depend"):
        explainer(model, images(), TARGET)
    with pytest.raises(UserError, match="do not depend"):
        explainer(network(nn.ReLU(), Bend(Tensor.detach)), images(), TARGET)


def test_logits_must_be_logits():
    for model in (Bend(lambda x: x), Bend(lambda x: (x,)), Bend(lambda x: x.mean())):
        with pytest.raises(UserError, match="logits of shape"):
            GradientXInput()(model, images(), TARGET)


@pytest.mark.parametrize("explainer", [Attention(), FeatureMap(), GradCAM()])
def test_there_must_be_a_feature_map(explainer):
    with pytest.raises(UserError, match="feature map"):
        explainer(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).double(), images(), TARGET)


def test_a_network_may_change_its_input_in_place():
    x = images()
    model = nn.Sequential(Bend(lambda x: x.sub_(0.5)), network(nn.ReLU()))
    expected = InputGradient()(model[1], x - 0.5, TARGET).map
    torch.testing.assert_close(InputGradient()(model, x, TARGET).map, expected)
    assert torch.equal(x, images())


def test_batch_norm_of_one_value_is_a_user_error():
    with pytest.raises(UserError, match="more than one value"):
        GradientXInput()(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(432)).double(), images(1), TARGET[:1])


def test_running_statistics_must_exist():
    model = network(nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())
    with pytest.raises(UserError, match="running statistics"):
        LRP(0.01, statistics="running")(model, images(), TARGET)


def test_targets_may_have_any_integer_type():
    chosen = resolve(torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2, 4))
    assert chosen.dtype == torch.long


AVERAGES = {
    "average": nn.AvgPool2d(2),
    "overlapping": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "divided": nn.AvgPool2d((2, 1), divisor_override=3),
    "adaptive": nn.AdaptiveAvgPool2d((2, 3)),
    "global": nn.AdaptiveAvgPool2d(1),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_average_pools_are_those_of_autograd(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), AVERAGES[name], nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).double()
    x = images().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).gather(1, TARGET[:, None]).sum(), x, create_graph=True)
    logits, map = InputGradient()(model, images(), TARGET)
    torch.testing.assert_close(map, expected)
    for loss in (lambda map, logits: map.square().sum(), lambda map, logits: map.square().sum() + logits.cos().sum()):
        found, wanted = (
            torch.autograd.grad(loss(m, y), list(model.parameters()), retain_graph=True, materialize_grads=True)
            for m, y in ((map, logits), (expected, model(x)))
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
