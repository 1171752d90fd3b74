"""What an explanation step may cost, in counted floating-point operations; times are for bench/explanations.py.

With f the first layer's share of the forward pass, a cross-entropy step costs 3 - f (nobody asks for the image's
gradient). A map costs 2 without a graph. A loss on a map that the forward pass enters by masks alone costs 4: the
signal, then its gradients in weights and signal. Where activations or batch statistics enter, 6 - f: the forward
graph's own backward pass as well.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hansfree.explainers import LRP, GradientXInput, InputGradient
from hansfree.models import load_model

GOALS = {"lrp": 2.05, "gradient": 1.40, "teacher": 0.70}


@pytest.fixture(autouse=True)
def _bench(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "bench")


def flops(step):
    from counting import flops

    return flops(step)


class Case:
    def __init__(self, name, size, training):
        torch.manual_seed(0)
        self.network = load_model(name, num_classes=10).train(training)
        self.x, self.target = torch.rand(2, 3, size, size), torch.tensor([1, 2])

    def cross_entropy(self):
        return flops(lambda: F.cross_entropy(self.network(self.x), self.target).backward())

    def trained(self, explainer):
        """The ratio to a cross-entropy step."""
        step = flops(lambda: explainer(self.network, self.x, self.target).map.square().sum().backward())
        return step / self.cross_entropy()

    def constant(self, explainer):
        with torch.no_grad():
            alone = flops(lambda: explainer(self.network, self.x, self.target))
        return alone / self.cross_entropy()

    def first_share(self):
        def forward():
            return self.network(self.x)

        with torch.no_grad():
            first = next(module for module in self.network.modules() if isinstance(module, nn.Conv2d))
            return flops(lambda: first(self.x)) / flops(forward)


def test_the_counter_counts_both_passes_of_a_convolution_and_masks():
    """By hand: 2 * 3 * 5 * 9 multiplications and additions for each of 2 * 36 output pixels, three times."""
    conv, x = nn.Conv2d(3, 5, 3), torch.rand(2, 3, 8, 8, requires_grad=True)
    forward = 2 * (3 * 5 * 9) * (2 * 36)
    assert flops(lambda: conv(x)) == forward
    assert flops(lambda: conv(x).sum().backward()) == 3 * forward
    assert flops(lambda: conv(x.detach()).sum().backward()) == 2 * forward
    assert flops(lambda: torch.autograd.grad(conv(x).sum(), x)) == 2 * forward


def test_the_counter_sees_convolutions_inside_our_own_nodes():
    network, x = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)), torch.rand(2, 3, 8, 8)
    forward = 2 * (3 * 5 * 9) * (2 * 36) + 2 * (180 * 4) * 2
    with torch.no_grad():
        assert flops(lambda: InputGradient()(network, x, torch.tensor([0, 1]))) == 2 * forward


RESNET, CNN = ("torchvision/resnet18", 64), ("small-cnn", 28)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "constant"])
@pytest.mark.parametrize(("name", "size"), [RESNET, CNN])
def test_a_step_on_lrp(name, size, training):
    case = Case(name, size, training)
    share = case.first_share()
    ratio = case.trained(LRP(0.01))
    floor = (6 - share) / (3 - share)
    assert ratio <= max(GOALS["lrp"], 1.002 * floor)


@pytest.mark.parametrize(("name", "size"), [RESNET, CNN])
@pytest.mark.parametrize("explainer", [InputGradient(), GradientXInput()], ids=["gradient", "gxi"])
def test_a_step_on_the_input_gradient(name, size, explainer):
    """Nothing but weights is differentiated through: no pool, no mask sends zeros through the forward graph."""
    case = Case(name, size, False)
    assert case.trained(explainer) <= max(GOALS["gradient"], 1.002 * 4 / (3 - case.first_share()))


@pytest.mark.parametrize(("name", "size"), [RESNET, CNN])
def test_a_step_on_the_input_gradient_with_batch_statistics(name, size):
    """They depend on every activation, so the floor is that of LRP."""
    case = Case(name, size, True)
    share = case.first_share()
    assert case.trained(InputGradient()) <= max(GOALS["lrp"], 1.002 * (6 - share) / (3 - share))


@pytest.mark.parametrize("explainer", [LRP(0.01), InputGradient()], ids=["lrp", "gradient"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "constant"])
@pytest.mark.parametrize(("name", "size"), [RESNET, CNN])
def test_a_teachers_map(name, size, training, explainer):
    case = Case(name, size, training)
    assert case.constant(explainer) <= max(GOALS["teacher"], 1.002 * 2 / (3 - case.first_share()))
