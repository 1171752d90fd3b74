"""The loss gradient against autograd, one sample at a time, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hansfree.explainers import LossGradient

TARGET = torch.tensor([0, 3, 1])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Softplus(), nn.Flatten(), nn.Linear(180, 4)]
    return nn.Sequential(*layers).double().eval()


def images(count: int = 3):
    return torch.rand(count, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grad", [True, False])
def test_it_is_the_gradient_of_each_samples_cross_entropy(grad):
    model, x = network(), images()
    with torch.set_grad_enabled(grad):
        logits, map = LossGradient()(model, x, TARGET)
    torch.testing.assert_close(logits, model(x), rtol=0, atol=0)
    assert logits.requires_grad == grad
    for n in range(3):
        one = x[n : n + 1].clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.cross_entropy(model(one), TARGET[n : n + 1]), one)
        torch.testing.assert_close(map[n : n + 1], expected)


def test_a_rule_chooses_from_the_logits_and_not_from_the_losses():
    model, x = network(), images()
    logits = model(x)
    seen = []
    found = LossGradient()(model, x, lambda given: (seen.append(given), given.argmax(1))[1])
    torch.testing.assert_close(seen[0], logits.detach())
    torch.testing.assert_close(found.map, LossGradient()(model, x, logits.argmax(1)).map)
    assert not torch.allclose(found.map, LossGradient()(model, x, logits.argmin(1)).map)


def test_a_certain_model_has_no_loss_gradient():
    model, x = network(), images()
    nn.init.zeros_(model[-1].weight)
    with torch.no_grad():
        model[-1].bias.copy_(torch.tensor([50.0, 0, 0, 0]))
    assert LossGradient()(model, x, torch.zeros(3, dtype=torch.long)).map.abs().max() < 1e-15


@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_a_loss_on_the_map(training):
    model, x = network().train(training), images()
    parameters = list(model.parameters())

    def loss():
        return (LossGradient()(model, x, TARGET).map - 0.01).square().sum()

    claimed = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    norm = max(float(g.norm()) for g in claimed)
    for parameter, gradient in zip(parameters, claimed):
        direction = gradient / norm + torch.randn_like(gradient)
        direction = direction / direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(loss().item())
                parameter.sub_(direction, alpha=sign * 1e-6)
        measured = (values[0] - values[1]) / 2e-6
        assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=norm * 1e-7)
