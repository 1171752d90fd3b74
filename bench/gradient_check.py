"""How wrong is the gradient of a loss? Directional derivatives against central finite differences."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

STEPS = (1e-6, 1e-7, 1e-5, 1e-8, 1e-9, 1e-10)
GOOD = 1e-5
"""Other steps are not tried once an error is below this."""


def gradient_errors(
    loss: Callable[[], Tensor],
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    *,
    value: Callable[[], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Relative error of the directional derivative of ``loss`` for each of ``parameters``, in float64.

    The direction is half the claimed gradient, half noise, so that a missing part shows as well as a wrong one.
    Of several step sizes the best counts: large ones cross the kinks of ReLUs, small ones drown in rounding, and
    a wrong gradient is wrong at every size. An error is relative to the larger of claim and measurement, but to no
    less than a millionth of the whole gradient's norm: a weight that does not matter cannot be measured.
    ``value`` is the same loss without a graph, where that is cheaper. Buffers are restored before each evaluation.
    """
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    tensors = list(parameters.values())
    result = loss()
    if result.requires_grad:
        claimed = torch.autograd.grad(result, tensors, materialize_grads=True)
    else:
        claimed = tuple(torch.zeros_like(parameter) for parameter in tensors)
    floor = 1e-6 * float(torch.stack([gradient.norm() for gradient in claimed]).norm())
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    for name, parameter, gradient in zip(parameters, tensors, claimed, strict=True):
        noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        direction = noise / noise.norm() + (gradient / gradient.norm() if gradient.any() else 0)
        direction = direction / direction.norm()
        expected = float((gradient * direction).sum())
        errors[name] = float("inf")
        for step in STEPS:
            slope = _slope(value or loss, network, buffers, parameter, direction, step)
            errors[name] = min(errors[name], _relative(expected, slope, floor))
            if errors[name] < GOOD:
                break
    _restore(network, buffers)
    return errors


def _relative(expected: float, found: float, floor: float) -> float:
    scale = max(abs(expected), abs(found), floor)
    return abs(expected - found) / scale if scale else 0.0


def _slope(
    loss: Callable[[], Tensor],
    network: nn.Module,
    buffers: Mapping[str, Tensor],
    parameter: nn.Parameter,
    direction: Tensor,
    step: float,
) -> float:
    original, values = parameter.detach().clone(), []
    step = step * max(1.0, float(original.norm()))
    for sign in (1, -1):
        with torch.no_grad():
            parameter.copy_(original + sign * step * direction)
        _restore(network, buffers)
        values.append(float(loss().detach()))
    with torch.no_grad():
        parameter.copy_(original)
    return (values[0] - values[1]) / (2 * step)


@torch.no_grad()
def _restore(network: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, value in network.named_buffers():
        value.copy_(buffers[name])


def some_parameters(network: nn.Module, count: int, largest: int = 3_000_000) -> dict[str, nn.Parameter]:
    """At most ``count`` trainable weights: matrices and kernels from the first to the last, and a scale and a bias.

    Tensors with more numbers than ``largest`` are left out: drawing directions there takes longer than explaining.
    """
    named = {name: p for name, p in network.named_parameters() if p.requires_grad and p.numel() <= largest}
    matrices = [name for name, p in named.items() if p.ndim > 1]
    biases = [name for name, p in named.items() if p.ndim == 1 and name.rpartition(".")[2] == "bias"]
    scales = [name for name, p in named.items() if p.ndim == 1 and name not in biases]
    chosen = [*_spread(matrices, count - 2), *_spread(scales, 3)[1:2], *_spread(biases, 3)[1:2]]
    return {name: named[name] for name in named if name in chosen}


def _spread(items: list[str], count: int) -> list[str]:
    places = sorted({round(n * (len(items) - 1) / max(count - 1, 1)) for n in range(count)}) if items else []
    return [items[n] for n in places]
