"""Integrated gradients against the sum written out, Captum, completeness, and finite differences."""

import copy
import math

import captum.attr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hansfree.config import construct
from hansfree.core import held_affine
from hansfree.errors import UserError
from hansfree.explainers import EXPLAINERS, InputGradient, IntegratedGradients
from hansfree.explainers.integrated_gradients import blurred, quadrature_rule

TARGET = torch.tensor([0, 3, 1])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    """Smooth, so that finite differences meet no kink; with batch norm, so that statistics matter."""
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Softplus(), nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5)]
    made = nn.Sequential(*layers, nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).double()
    for norm in (made[1], made[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
    return made.eval()


class SharedScale(nn.Module):
    """Divides by the batch's root mean square, held as a ScaleNorm does."""

    def forward(self, x: Tensor) -> Tensor:
        return held_affine(x, (x.square().mean((0, 2, 3), keepdim=True) + 0.1).rsqrt())


class OwnScale(nn.Module):
    """A scale of each sample's own, held as a B-cos layer's is."""

    def forward(self, x: Tensor) -> Tensor:
        return held_affine(x, (x.square().mean((1, 2, 3), keepdim=True) + 0.1).rsqrt())


def slow(model, x, target, baseline, points, weights):
    map = torch.zeros_like(x)
    for n in range(len(x)):
        for a, w in zip(points, weights):
            at = (baseline[n : n + 1] + a * (x[n : n + 1] - baseline[n : n + 1])).requires_grad_()
            (gradient,) = torch.autograd.grad(model(at)[0, target[n]], at)
            map[n] += w * (x[n] - baseline[n]) * gradient[0]
    return map


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("name", ["gauss-legendre", "midpoint", "trapezoid"])
def test_it_is_the_sum_along_the_path(name, chunk):
    model, x = network(), images()
    expected = slow(model, x, TARGET, torch.full_like(x, 0.3), *quadrature_rule(name, 5))
    explainer = IntegratedGradients(0.3, steps=5, quadrature=name, chunk=chunk)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            logits, map = explainer(model, x, TARGET)
        torch.testing.assert_close(logits, model(x), check_device=False)
        torch.testing.assert_close(map, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("steps", [2, 3, 20])
def test_quadrature_rules_are_exact_where_theory_says(steps):
    degrees = {"gauss-legendre": 2 * steps - 1, "midpoint": 1, "trapezoid": 1}
    for name, degree in degrees.items():
        points, weights = quadrature_rule(name, steps)
        assert len(points) == len(weights) == steps
        found = [sum(w * p**d for p, w in zip(points, weights)) for d in range(degree + 2)]
        assert found[: degree + 1] == pytest.approx([1 / (d + 1) for d in range(degree + 1)], abs=1e-12)
        if steps < 10:
            assert abs(found[degree + 1] - 1 / (degree + 2)) > 1e-6


@pytest.mark.parametrize("ours", ["gauss-legendre", "midpoint", "trapezoid"])
def test_it_agrees_with_captum(ours):
    """Captum's trapezoids are 1 / n wide and n - 1 many, so that its map is (n - 1) / n of the integral."""
    theirs = {"gauss-legendre": "gausslegendre", "midpoint": "riemann_middle", "trapezoid": "riemann_trapezoid"}[ours]
    model, x, steps = network(), images(), 6
    map = IntegratedGradients(steps=steps, quadrature=ours)(model, x, TARGET).map.detach()
    captums = captum.attr.IntegratedGradients(model).attribute(x, target=TARGET, n_steps=steps, method=theirs).detach()
    factor = steps / (steps - 1) if ours == "trapezoid" else 1
    torch.testing.assert_close(map, captums * factor, rtol=1e-6, atol=1e-9)  # its points are float32


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("grad", [True, False])
def test_the_gap_is_what_completeness_lacks(k, grad):
    model, x = network(), images()
    target = TARGET if k is None else torch.stack([TARGET, (TARGET + 1) % 4], 1)
    expected = (model(x) - model(torch.ones_like(x))).gather(1, target.view(3, -1)).view(target.shape)
    for steps, bound in ((1, math.inf), (30, 1e-8)):
        with torch.set_grad_enabled(grad):
            explanation, gap = IntegratedGradients("white", steps=steps).with_gap(model, x, target)
        assert gap.shape == target.shape and gap.requires_grad == grad
        torch.testing.assert_close(explanation.map.sum((-3, -2, -1)) - expected, gap)
        assert gap.abs().max() < bound
        if steps == 1:
            assert gap.abs().min() > 1e-6


# Baselines.


def test_baselines_are_what_their_names_say():
    model, x = network(), images()
    mean = torch.stack([torch.stack([c.mean().expand(8, 8) for c in image]) for image in x])
    named = {"black": torch.zeros_like(x), "white": torch.ones_like(x), "mean": mean, "blurred": blurred(x)}
    named[(0.1, 0.2, 0.3)] = torch.tensor([0.1, 0.2, 0.3], dtype=torch.double)[:, None, None].expand_as(x)
    for name, baseline in named.items():
        expected = slow(model, x, TARGET, baseline, *quadrature_rule("midpoint", 3))
        for given in (name, baseline, lambda _, b=baseline: b):
            map = IntegratedGradients(given, steps=3, quadrature="midpoint")(model, x, TARGET).map
            torch.testing.assert_close(map, expected, rtol=1e-9, atol=1e-13)


def test_a_blur_keeps_flat_images_and_weighs_as_a_gaussian():
    torch.testing.assert_close(blurred(torch.full((1, 2, 6, 9), 0.4)), torch.full((1, 2, 6, 9), 0.4))
    dot = torch.zeros(1, 1, 41, 41, dtype=torch.double)
    dot[..., 20, 20] = 1
    seen = blurred(dot, sigma=2)[0, 0]
    for i, j in ((0, 0), (1, 0), (0, 3), (2, -2)):
        ratio = float(seen[20 + i, 20 + j] / seen[20, 20])
        assert ratio == pytest.approx(math.exp(-(i * i + j * j) / 8), rel=1e-9)


def test_settings_come_from_a_config():
    section = {"name": "integrated-gradients", "baseline": [0.1, 0.2, 0.3], "steps": 3, "quadrature": "midpoint"}
    made = construct(EXPLAINERS, section, "explainer")
    assert made == IntegratedGradients((0.1, 0.2, 0.3), steps=3, quadrature="midpoint")
    assert construct(EXPLAINERS, {**section, "baseline": "white"}, "explainer").baseline == "white"
    assert construct(EXPLAINERS, {**section, "baseline": 1}, "explainer").baseline == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"baseline": "blakc"}, "black"),
        ({"quadrature": "simpson"}, "quadrature"),
        ({"steps": 0}, "steps"),
        ({"steps": 1, "quadrature": "trapezoid"}, "at least 2"),
        ({"chunk": 0}, "chunk"),
        ({"statistics": "frozen"}, "statistics"),
    ],
)
def test_wrong_settings_are_user_errors(settings, words):
    with pytest.raises(UserError, match=words):
        IntegratedGradients(**settings)


@pytest.mark.parametrize("baseline", [(0.1, 0.2), torch.zeros(2, 8, 8), lambda x: x[:, :, :4], "pad"])
def test_a_baseline_that_does_not_fit_is_a_user_error(baseline):
    with pytest.raises(UserError, match="baseline"):
        IntegratedGradients(baseline)(network(), images(), TARGET)


def test_features_in_a_row_are_explained_too():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 4)).double(), torch.randn(3, 6).double()
    map = IntegratedGradients((0.0,) * 6, steps=4)(model, x, TARGET).map.detach()
    torch.testing.assert_close(map, captum.attr.IntegratedGradients(model).attribute(x, target=TARGET, n_steps=4))
    with pytest.raises(UserError, match="images"):
        IntegratedGradients("mean")(model, x, TARGET)


# The gradient of a loss on the map.


def gradients_hold(explainer, model, x):
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def loss():
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
        return (explainer(model, x, TARGET).map - 0.01).square().sum()

    parameters = dict(model.named_parameters())
    claimed = torch.autograd.grad(loss(), list(parameters.values()), materialize_grads=True)
    norm = max(float(g.norm()) for g in claimed)
    for (name, parameter), gradient in zip(parameters.items(), claimed):
        direction = gradient / norm + torch.randn_like(gradient)
        direction = direction / direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(loss().item())
                parameter.sub_(direction, alpha=sign * 1e-6)
        measured = (values[0] - values[1]) / 2e-6
        assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=norm * 1e-7), name


@pytest.mark.parametrize("mode", ["eval", "constant", "running", "differentiated"])
def test_gradient_of_a_loss_on_the_map(mode):
    model = network().train(mode != "eval")
    statistics = "constant" if mode == "eval" else mode
    gradients_hold(IntegratedGradients(0.2, steps=3, chunk=6, statistics=statistics), model, images())


def test_gradient_of_a_loss_through_a_shared_scale():
    layers = [nn.Conv2d(3, 4, 3), SharedScale(), nn.Softplus(), nn.Flatten(), nn.Linear(144, 4)]
    gradients_hold(IntegratedGradients(0.2, steps=3), nn.Sequential(*layers).double(), images())


def test_gradient_of_a_loss_reaches_the_input():
    model, x = network(), images()

    def loss(x):
        return IntegratedGradients("mean", steps=3)(model, x, TARGET).map.square().sum()

    assert torch.autograd.gradcheck(loss, x.requires_grad_(), fast_mode=True)


# Statistics of the batch.


def test_points_of_a_path_use_the_statistics_of_the_plain_batch():
    model, x = network(), images()
    held = copy.deepcopy(model).train()
    for norm in (held[1], held[4]):
        norm.momentum = 1.0
    held(x)
    for norm, count in ((held[1], 36), (held[4], 16)):
        norm.running_var.mul_((3 * count - 1) / (3 * count))
    for chunk in (1, 9, 100):
        explainer = IntegratedGradients(steps=4, chunk=chunk)
        map = explainer(copy.deepcopy(model).train(), x, TARGET).map
        torch.testing.assert_close(map, explainer(held.eval(), x, TARGET).map, rtol=1e-9, atol=1e-12)


def test_running_statistics_are_those_before_the_batch():
    model, x = network(), images()
    map = IntegratedGradients(steps=4, statistics="running")(copy.deepcopy(model).train(), x, TARGET).map
    torch.testing.assert_close(map, IntegratedGradients(steps=4)(model, x, TARGET).map)


def test_differentiated_statistics_are_plain_autograd():
    model, x = network().train(), images()
    points, weights = quadrature_rule("midpoint", 3)
    expected = torch.zeros_like(x)
    for a, w in zip(points, weights):
        at = (a * x).requires_grad_()
        expected += w * x * torch.autograd.grad(model(at).gather(1, TARGET[:, None]).sum(), at)[0]
    explainer = IntegratedGradients(steps=3, quadrature="midpoint", statistics="differentiated")
    torch.testing.assert_close(explainer(model, x, TARGET).map, expected)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("statistics", ["constant", "running", "differentiated"])
def test_running_statistics_move_as_in_one_forward_pass(statistics, momentum):
    layers = (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4))
    model = nn.Sequential(*layers).train()
    other, x = copy.deepcopy(model), torch.rand(4, 3, 8, 8)
    for _ in range(2):
        model(x)
        IntegratedGradients(steps=3, chunk=4, statistics=statistics)(other, x, torch.arange(4))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name], rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("count", [1, 3])
def test_a_scale_that_samples_share_is_that_of_the_plain_batch(count, chunk):
    layers = [nn.Conv2d(3, 4, 3), SharedScale(), nn.Softplus(), nn.Flatten(), nn.Linear(144, 4)]
    model, x = nn.Sequential(*layers).double(), images(count)
    with torch.no_grad():
        scale = (model[0](x).square().mean((0, 2, 3), keepdim=True) + 0.1).rsqrt()
    held = copy.deepcopy(model)
    held[1] = nn.BatchNorm2d(4, affine=False, eps=0.0).double().eval()
    held[1].running_var.copy_(scale.flatten().pow(-2))
    for steps in (1, 3):
        explainer = IntegratedGradients(0.2, steps=steps, chunk=chunk)
        torch.testing.assert_close(explainer(model, x, TARGET[:count]).map, explainer(held, x, TARGET[:count]).map)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_scale_of_each_sample_follows_the_path(chunk):
    layers = [nn.Conv2d(3, 4, 3), OwnScale(), nn.Softplus(), nn.Flatten(), nn.Linear(144, 4)]
    model, x = nn.Sequential(*layers).double(), images()
    expected = torch.zeros_like(x)
    for a, w in zip(*quadrature_rule("gauss-legendre", 3)):
        expected += w * x * InputGradient()(model, a * x, TARGET).map.detach()
    torch.testing.assert_close(IntegratedGradients(steps=3, chunk=chunk)(model, x, TARGET).map, expected)
    for steps in (1, 2, 3):
        explainer = IntegratedGradients(steps=steps, chunk=chunk)
        together = explainer(model, x, TARGET).map
        torch.testing.assert_close(explainer(model, x[:1], TARGET[:1]).map, together[:1])


def test_a_model_whose_normalisation_varies_is_a_user_error():
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(192, 4), []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(0)
            for _ in self.calls:
                x = F.batch_norm(x, None, None, training=True)
            return self.fc(x.flatten(1))

    with pytest.raises(UserError, match="evaluation mode"):
        IntegratedGradients()(Moody(), torch.rand(3, 3, 8, 8), TARGET)


def test_memory_is_bounded_by_the_chunk():
    """No pass sees more than ``chunk`` images (or one step of the batch)."""
    sizes = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return self.inner(x)

    for chunk, expected in ((1, [3] * 6), (7, [3, 6, 6, 3]), (100, [3, 15])):
        sizes.clear()
        IntegratedGradients(steps=5, chunk=chunk)(Watched(), images(), TARGET)
        assert sizes == expected


def test_quadrature_weights_are_numpys_not_ours_alone():
    points, weights = quadrature_rule("gauss-legendre", 7)
    assert np.dot(weights, np.exp(points)) == pytest.approx(math.e - 1, rel=1e-12)
