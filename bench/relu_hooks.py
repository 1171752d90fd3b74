"""LRP by backward hooks on ReLU modules, the way research code does it: what hansfree's speed is compared with.

Every ReLU module remembers its output and a full backward hook gives g * a / (a + epsilon) back in place of its
gradient. It needs one module per use, none in place, so the networks here are rebuilt to have them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hansfree.models import SmallCNN
from hansfree.torchvision_guard import import_torchvision


def with_one_relu_per_use(network: nn.Module) -> nn.Module:
    """The same function and the same weights, with a ReLU module of its own wherever a ReLU is applied."""
    if isinstance(network, SmallCNN):
        return _chain(network)
    resnet = import_torchvision("torchvision.models.resnet")
    blocks = {resnet.BasicBlock: _BasicBlock, resnet.Bottleneck: _Bottleneck}
    for module in list(network.modules()):
        if type(module) in blocks:
            module.relus = nn.ModuleList(nn.ReLU() for _ in range(blocks[type(module)].convolutions))
            module.relu = nn.Identity()
            module.__class__ = blocks[type(module)].of(type(module))
        elif isinstance(module, nn.ReLU):
            module.inplace = False
    return network


class Chain(nn.Module):
    """Flattens by a function, for want of a rule for the module in other libraries."""

    def __init__(self, layers: nn.Sequential, fc: nn.Linear) -> None:
        super().__init__()
        self.layers, self.fc = layers, fc

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.fc(self.layers(x).flatten(1))


def _chain(network: SmallCNN) -> nn.Module:
    layers: list[nn.Module] = []
    for level, (conv, norm) in enumerate(zip(network.convs, network.norms, strict=True)):
        layers += [nn.AvgPool2d(2)] if level else []
        layers += [conv, norm, nn.ReLU()]
    return Chain(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), network.fc)


class _Block:
    convolutions: int

    @classmethod
    def of(cls, kind: type) -> type:
        return type(kind.__name__, (cls, kind), {})

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for n in range(1, self.convolutions + 1):
            y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
            if n < self.convolutions:
                y = self.relus[n - 1](y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relus[-1](y + shortcut)


class _BasicBlock(_Block):
    convolutions = 2


class _Bottleneck(_Block):
    convolutions = 3


class _Flag:
    explaining = False


@contextmanager
def relu_hooks(network: nn.Module, epsilon: float) -> Iterator[_Flag]:
    """Hooks on every ReLU of ``network``, active while the yielded flag says ``explaining``."""
    flag, outputs, handles = _Flag(), {}, []

    def remember(module: nn.Module, _: object, output: Tensor) -> None:
        outputs[module] = output

    def rule(module: nn.Module, _: object, grads: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        a = outputs[module]
        return (grads[0] * (a / (a + epsilon)),) if flag.explaining else None

    for module in list(network.modules()):
        if isinstance(module, nn.ReLU):
            handles.append(module.register_forward_hook(remember))
            handles.append(module.register_full_backward_hook(rule))
    try:
        yield flag
    finally:
        for handle in handles:
            handle.remove()


def hooked_lrp(network: nn.Module, flag: _Flag, x: Tensor, target: Tensor) -> Tensor:
    """x times the gradient that the hooks modify, starting from the raw logit."""
    x = x.detach().requires_grad_()
    y = network(x).gather(1, target[:, None]).sum()
    flag.explaining = True
    try:
        (signal,) = torch.autograd.grad(y, x, create_graph=torch.is_grad_enabled())
    finally:
        flag.explaining = False
    return x * signal
