"""What every registered explainer keeps: shapes, grad mode, and hands off the model."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hansfree.core import Classifier, Explainer, held_affine
from hansfree.errors import UserError
from hansfree.explainers import EXPLAINERS, BCos
from hansfree.models.layers import Norm, normalisation
from hansfree.models.small import SmallCNN, SmallResNet

BATCH, CLASSES = 4, 5


@pytest.fixture(params=EXPLAINERS)
def explainer(request) -> Explainer:
    return EXPLAINERS[request.param]()


class Aligned(nn.Module):
    """A B-cos convolution: |cos(patch, weight)| times the convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        patch = F.avg_pool2d(x.square().sum(1, keepdim=True), 3, 1, 1, divisor_override=1).add(1e-6).sqrt()
        return held_affine(y, y.abs() / patch)


def bcos_network(channels: int, norm: Norm) -> nn.Sequential:
    layers = [Aligned(channels, 6), normalisation(norm, 6), nn.AvgPool2d(2), Aligned(6, 8)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES, bias=False))


@pytest.fixture(params=["cnn", "resnet"])
def model(request, explainer) -> Classifier:
    torch.manual_seed(0)
    build = {"cnn": SmallCNN, "resnet": SmallResNet}[request.param]
    norm: Norm = {"cnn": "batch", "resnet": "scale"}[request.param]
    network = build(CLASSES, widths=(4, 6, 8), norm=norm)
    bcos = isinstance(explainer, BCos)
    if bcos:
        network = bcos_network(6, norm)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    if bcos:
        return Classifier(network, {}, encoding="six-channels").eval()
    return Classifier(network, {}, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(BATCH, 3, 20, 20, generator=torch.Generator().manual_seed(1))


TARGET = torch.tensor([0, 3, 1, 4])


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.detach().abs().max()))


def test_shapes_and_logits(explainer, model, images):
    logits, map = explainer(model, images, TARGET)
    same(logits, model(images))
    assert map.ndim == 4 and len(map) == BATCH and map.isfinite().all() and map.any()
    if type(explainer).__name__ not in ("Attention", "FeatureMap", "GradCAM"):
        assert map.shape == model.prepare(images).shape


@pytest.mark.parametrize("training", [True, False])
def test_grad_mode_is_the_flag(explainer, model, images, training):
    model.train(training)
    logits, map = explainer(model, images, TARGET)
    assert logits.requires_grad and map.requires_grad
    map.square().sum().backward()
    assert model.network.get_parameter(next(name for name, _ in model.network.named_parameters())).grad is not None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logits, constant = explainer(model.eval(), images, TARGET)
        assert not logits.requires_grad and not constant.requires_grad
    same(constant, explainer(model, images, TARGET).map)


def test_a_batch_is_one_at_a_time(explainer, model, images):
    draws = explainer.draw(BATCH, torch.Generator().manual_seed(2))
    together = explainer(model, images, TARGET, draws=draws or None).map
    for n in range(BATCH):
        one = {name: values[n : n + 1] for name, values in draws.items()}
        same(explainer(model, images[n : n + 1], TARGET[n : n + 1], draws=one or None).map, together[n : n + 1])


def test_k_targets_are_k_calls(explainer, model, images):
    targets = torch.tensor([[0, 1, 2], [3, 3, 0], [1, 4, 2], [2, 0, 4]])
    draws = explainer.draw(BATCH, torch.Generator().manual_seed(2)) or None
    map = explainer(model, images, targets, draws=draws).map
    assert map.shape[:2] == (BATCH, 3)
    for k in range(3):
        same(explainer(model, images, targets[:, k], draws=draws).map, map[:, k])
    with torch.no_grad():
        same(explainer(model, images, targets, draws=draws).map, map)


def test_a_rule_is_asked_once_with_constant_logits(explainer, model, images):
    asked = []

    def rule(logits: Tensor) -> Tensor:
        asked.append(logits)
        return logits.argmax(1)

    logits, map = explainer(model, images, rule)
    assert len(asked) == 1 and not asked[0].requires_grad
    same(map, explainer(model, images, logits.argmax(1)).map)


def test_the_model_and_the_input_are_left_alone(explainer, model, images):
    for training in (True, False):
        model.train(training)
        before, pixels = copy.deepcopy(model.state_dict()), images.clone()
        modes = [m.training for m in model.modules()]
        with torch.no_grad():
            explainer(model, images, TARGET)
        explainer(model, images, TARGET)
        assert torch.equal(images, pixels) and not images.requires_grad and images.grad is None
        assert modes == [m.training for m in model.modules()]
        assert all(p.grad is None for p in model.parameters())
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
            assert not any("forward" in name for name in vars(module) if not name.startswith("_"))
        if not training:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_graph_of_the_input_is_kept(explainer, model, images):
    pixels = images.clone().requires_grad_()
    logits, map = explainer(model, pixels * 1, TARGET)
    same(map, explainer(model, images, TARGET).map)
    (logits.square().sum() + map.square().sum()).backward()
    assert pixels.grad is not None and pixels.grad.any()


def test_precision_around_it_changes_nothing(explainer, model, images):
    expected = explainer(model, images, TARGET)
    with torch.autocast("cpu", torch.bfloat16):
        found = explainer(model, images, TARGET)
    assert torch.equal(found.map, expected.map) and torch.equal(found.logits, expected.logits)
    half = images.bfloat16()
    found, expected = explainer(model, half, TARGET), explainer(model, half.float(), TARGET)
    assert found.map.dtype == torch.float32 and torch.equal(found.map, expected.map)


def test_threads_share_a_model(explainer, model, images):
    def explain(n: int) -> list[Tensor]:
        pixels = images.roll(n, 0)
        model_map = explainer(model, pixels, TARGET).map
        loss = (model_map - 1).square().sum()
        return [model_map.detach(), *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]

    serial = [explain(n % 4) for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(explain, [n % 4 for n in range(12)]))
    assert all(torch.equal(a, b) for one, other in zip(serial, parallel) for a, b in zip(one, other))


def test_two_losses_on_one_explanation(explainer, model, images):
    """A loss on the logits and one on the map, together, are each what they are apart."""
    weights = list(model.parameters())
    logits, map = explainer(model, images, TARGET)
    both = torch.autograd.grad(logits.square().sum() + map.square().sum(), weights, materialize_grads=True)
    plain = torch.autograd.grad(model(images).square().sum(), weights)
    alone = torch.autograd.grad(explainer(model, images, TARGET).map.square().sum(), weights, materialize_grads=True)
    for found, a, b in zip(both, plain, alone):
        same(found, a + b)


@pytest.mark.parametrize(
    "target", [[0, 1, 2, 5], [0, -1, 2, 3], [0, 1], [0.0, 1.0, 2.0, 3.0], [[[0]], [[1]], [[2]], [[3]]]]
)
def test_a_wrong_target_is_a_user_error(explainer, model, images, target):
    with pytest.raises(UserError, match="target"):
        explainer(model, images, torch.tensor(target))


def test_integer_images_are_a_user_error(explainer, model, images):
    with pytest.raises(UserError, match="floating-point"):
        explainer(model, (255 * images).byte(), TARGET)


def test_draws_fit_their_sample(explainer):
    fixed = explainer.fixed_draws(torch.tensor([7, 3]))
    swapped = explainer.fixed_draws(torch.tensor([3, 7]))
    assert all(torch.equal(values.flip(0), swapped[name]) for name, values in fixed.items())
