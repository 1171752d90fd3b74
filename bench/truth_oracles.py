"""What a cell of the table of truth is compared with: other libraries, a formula written out, and completeness."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from relu_hooks import hooked_lrp, relu_hooks, with_one_relu_per_use
from torch import Tensor, nn
from truth_networks import Network, without_biases

from hansfree.core import Explainer
from hansfree.explainers import LRP
from hansfree.torchvision_guard import import_torchvision

QUADRATURE = "y(x) - y(x')"
"""The one promise that holds only as far as a quadrature goes."""

Finding = tuple[str, float]
"""A name and a relative error."""

Oracle = Callable[[Network, nn.Module, Any, Tensor, Any], Tensor | None]
"""(network, model, x, target, explainer) -> the map as somebody else computes it; None: not for this network."""


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    scale = float(theirs.detach().abs().max())
    return float((ours.detach() - theirs.detach()).abs().max()) / scale if scale else float("inf")


def _captum(name: str, **options: Any) -> Oracle:
    def oracle(network: Network, model: nn.Module, x: Any, target: Tensor, explainer: Any) -> Tensor | None:
        import captum.attr

        if network.text:
            return None
        leaf = x.clone().requires_grad_()
        return getattr(captum.attr, name)(model).attribute(leaf, target=target, **options)

    return oracle


def _captum_path(network: Network, model: nn.Module, x: Any, target: Tensor, explainer: Any) -> Tensor | None:
    return _captum("IntegratedGradients", n_steps=explainer.steps, method="gausslegendre")(
        network, model, x, target, explainer
    )


def _captum_loss(network: Network, model: nn.Module, x: Any, target: Tensor, explainer: Any) -> Tensor | None:
    def losses(pixels: Tensor) -> Tensor:
        return -model(pixels).log_softmax(1)

    return _captum("Saliency", abs=False)(network, losses, x, target, explainer)  # pyright: ignore


class _Split(nn.Module):
    """A classifier with a module where its last feature map passes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.mark = model, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.mark(self.model.forward_features(x)))


def _captum_cam(network: Network, model: Any, x: Any, target: Tensor, explainer: Any) -> Tensor | None:
    import captum.attr

    if network.text or not _shows_a_map(model, x):
        return None
    split = _Split(model)
    return captum.attr.LayerGradCam(split, split.mark).attribute(x, target=target, relu_attributions=True)


@torch.no_grad()
def _shows_a_map(model: Any, x: Tensor) -> bool:
    try:
        return model.forward_features(x).ndim == 4
    except Exception:  # whatever a network without a feature map raises
        return False


def _formula(of: Callable[[Tensor], Tensor]) -> Oracle:
    def oracle(network: Network, model: Any, x: Any, target: Tensor, explainer: Any) -> Tensor | None:
        return of(model.forward_features(x)) if not network.text and _shows_a_map(model, x) else None

    return oracle


def _epsilon(explainer: LRP) -> float:
    low, high = explainer.epsilon if isinstance(explainer.epsilon, tuple) else (explainer.epsilon, explainer.epsilon)
    return (low * high) ** 0.5


def _hooks(network: Network, model: Any, x: Any, target: Tensor, explainer: Any) -> Tensor | None:
    """Fused LRP by hooks, where each use of a ReLU is a module or can be made one."""
    if getattr(explainer, "semantics", "fused") != "fused" or network.title not in _HOOKABLE:
        return None
    epsilon, twin = _epsilon(explainer), copy.deepcopy(model)
    twin.network = with_one_relu_per_use(twin.network)
    with relu_hooks(twin, epsilon) as flag:
        map = hooked_lrp(twin, flag, x, target)
    y = model(x).gather(1, target[:, None]).abs().view(-1, 1, 1, 1)
    return map * y / (y + epsilon)


_HOOKABLE = ("ResNet-18", "ResNet-50", "VGG-11-bn", "timm ResNet-18")


def _zennit(network: Network, model: Any, x: Any, target: Tensor, explainer: Any) -> Tensor | None:
    """Branchwise LRP: zennit merges batch norms but leaves their own eps in, so that is zero in the twin compared."""
    assert network.zennit is not None
    import_torchvision("torchvision.models")
    import zennit.torchvision
    from zennit.attribution import Gradient
    from zennit.composites import LayerMapComposite
    from zennit.layer import Sum
    from zennit.rules import Epsilon, Norm, Pass
    from zennit.types import Activation, AvgPool, BatchNorm, Convolution, Linear

    epsilon = _epsilon(explainer)
    rules = [(Activation, Pass()), (AvgPool, Norm(1e-14)), (Sum, Norm(1e-14)), (BatchNorm, Pass())]
    rules += [(Convolution, Epsilon(epsilon)), (Linear, Epsilon(epsilon))]
    canonizers = [getattr(zennit.torchvision, network.zennit)()]
    composite = LayerMapComposite(rules, canonizers=canonizers)
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(x, lambda y: y * torch.nn.functional.one_hot(target, y.shape[1]).to(y))[1]


@torch.no_grad()
def without_eps(model: nn.Module) -> nn.Module:
    """A copy whose batch norms add nothing to the variance: the same function, the eps inside the variance."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.add_(module.eps)
            module.eps = 0.0
    return twin


def _bcos(network: Network, model: Any, x: Any, target: Tensor, explainer: Any) -> Tensor | None:
    """W(x) in the package's own explanation mode, with respect to its six channels."""
    if not network.title.startswith("B-cos"):
        return None
    z = model.prepare(x).detach().requires_grad_()
    inner = next(m for m in model.modules() if hasattr(m, "explanation_mode"))
    with inner.explanation_mode():
        y = model.forward_prepared(z).gather(1, target[:, None]).sum()
        return torch.autograd.grad(y, z)[0]


ORACLES: dict[str, tuple[str, Oracle]] = {
    "gradient": ("Captum", _captum("Saliency", abs=False)),
    "gradient-x-input": ("Captum", _captum("InputXGradient")),
    "integrated-gradients": ("Captum", _captum_path),
    "loss-gradient": ("Captum", _captum_loss),
    "grad-cam": ("Captum at forward_features", _captum_cam),
    "attention": ("formula", _formula(lambda a: a.square().sum(1, keepdim=True))),
    "features": ("formula", _formula(lambda a: a)),
    "lrp, fused": ("hooks", _hooks),
    "lrp, branchwise": ("zennit", _zennit),
    "bcos": ("bcos", _bcos),
}


def compared(row: str, explainer: Explainer, network: Network, model: Any, x: Any, target: Tensor) -> Finding | None:
    """The oracle's name and how far our map is from its."""
    if row not in ORACLES:
        return None
    name, oracle = ORACLES[row]
    if name == "zennit" and network.zennit is None:
        return None
    if name == "zennit":  # it gives relevance at the first layer, hence past mean and std
        x, model = model.prepare(x), without_eps(model.network)
    ours, theirs = explainer(model, x, target).map, oracle(network, model, x, target, explainer)
    if theirs is None or ours.shape != theirs.shape:  # a map of another layer is no judge
        return None
    return name, relative(ours, theirs)


def completeness(row: str, explainer: Any, network: Network, model: Any, x: Any, target: Tensor) -> Finding | None:
    """Where theory promises a sum: what the map should add up to, and the relative error of its sum."""
    if row == "integrated-gradients":
        with torch.no_grad():
            explanation, gap = dataclasses.replace(explainer, steps=64).with_gap(model, x, target)
        return QUADRATURE, _gap(explanation.map.flatten(1).sum(1), explanation.map.flatten(1).sum(1) - gap)
    if network.text:
        return None
    if row == "bcos" and network.title.startswith("B-cos"):
        whole = dataclasses.replace(explainer, form="contributions")
        fixed = model.network.logit_layer.logit_bias or 0.0
        return "y less its fixed bias", _sum_is_the_logit(whole, model, x, target, fixed)
    if row == "gradient-x-input" and network.homogeneous:
        return "y, no biases", _sum_is_the_logit(explainer, without_biases(model), x, target)
    if row.startswith("lrp") and network.conserving:
        limit = dataclasses.replace(explainer, epsilon=1e-12)
        return "y, no biases, ε → 0", _sum_is_the_logit(limit, without_biases(model), x, target)
    return None


def _sum_is_the_logit(explainer: Explainer, model: nn.Module, x: Tensor, target: Tensor, fixed: float = 0.0) -> float:
    with torch.no_grad():
        logits, map = explainer(model, x, target)
    return _gap(map.flatten(1).sum(1), logits.gather(1, target[:, None]).squeeze(1) - fixed)


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())
