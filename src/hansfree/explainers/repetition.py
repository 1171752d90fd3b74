"""Several forward passes of one model that leave what one leaves.

Explainers that look at many inputs per sample (a path, noise) would mix them up in a batch norm in training mode,
and would refresh its running statistics once for each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hansfree.core import held_affine
from hansfree.errors import UserError
from hansfree.explainers.propagation import Statistics
from hansfree.explainers.rules import batch_statistics, no_running_statistics, scale_and_shift

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def plain_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor inference mode; gradients are on or off as they were."""
    differentiable = torch.is_grad_enabled()
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(differentiable),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def without_traces(model: Module) -> Module:
    """The model with buffers of its own, so that passes in training mode refresh nothing; parameters are shared.

    The model itself where every part of it is in evaluation mode.
    """
    return _copied(model, {}) if any(module.training for module in model.modules()) else model


def _copied(module: Any, known: dict[nn.Module, Any]) -> Any:
    if module is None or isinstance(module, torch.jit.ScriptModule):  # a scripted module cannot be taken apart
        return module
    if module not in known:
        known[module] = copy = module.__class__.__new__(module.__class__)
        copy.__dict__.update(module.__dict__)
        buffers: dict[str, Tensor | None] = module._buffers
        copy.__dict__["_buffers"] = {name: None if b is None else b.detach().clone() for name, b in buffers.items()}
        copy.__dict__["_modules"] = {name: _copied(part, known) for name, part in module._modules.items()}
    return known[module]


class Passes(nn.Module):
    """``first(x)`` is an ordinary forward pass; every later one uses the statistics that it had.

    What is held is the mean and variance of every batch norm in training mode, and every ``held_affine`` scale that
    the samples of a batch share. They keep their graph to the first pass: a loss differentiates through them exactly.
    ``statistics: running`` holds the running statistics as they stood before the first pass instead;
    ``differentiated`` holds nothing, and each pass then has the statistics of its own batch.
    """

    def __init__(self, model: nn.Module, statistics: Statistics) -> None:
        super().__init__()
        self.model, self.copy = model, without_traces(model)
        self.statistics: Statistics = statistics
        self.held: list[_Affine] = []

    def first(self, x: Tensor) -> Tensor:
        """The model's output at ``x``, which refreshes what an ordinary forward pass refreshes."""
        with _Recording(self.held):
            return self.model(x.clone())  # a network may change its input in place

    def forward(self, x: Tensor) -> Tensor:
        """The model's output at other inputs, any number of them."""
        if self.statistics == "differentiated":
            return self.copy(x)
        if len(x) == 1 and self.held:  # of a single sample one cannot tell whether a scale is its own or the batch's
            return self(x.expand(2, *x.shape[1:]).clone())[:1]
        with _Replaying(self.held, self.statistics):
            return self.copy(x)


_Affine = tuple[Tensor, Tensor | None]
"""Scale and shift."""


class _Recording(TorchFunctionMode):
    def __init__(self, held: list[_Affine]) -> None:
        super().__init__()
        self._held = held

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is held_affine:
            self._held.append(_scale_and_shift(*args, **kwargs or {}))
        elif func in _NORMS:
            norm = _NORMS[func](*args, **kwargs or {})
            if norm.training:
                self._held.append(norm.affine())
        return func(*args, **kwargs or {})


class _Replaying(TorchFunctionMode):
    def __init__(self, held: list[_Affine], statistics: Statistics) -> None:
        super().__init__()
        self._held, self._statistics = iter(held), statistics

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is held_affine:
            own, held = _scale_and_shift(*args, **kwargs or {}), self._next()
            return held_affine(args[0], *(held if _is_shared(own[0], args[0]) else own))
        if func in _NORMS:
            norm = _NORMS[func](*args, **kwargs or {})
            if norm.training:
                held = self._next()
                return norm.in_evaluation() if self._statistics == "running" else held_affine(norm.input, *held)
        return func(*args, **kwargs or {})

    def _next(self) -> _Affine:
        held = next(self._held, None)
        if held is None:
            raise UserError(
                "The model normalises more often in one forward pass than in another, so that its batch statistics "
                "cannot be held along a path; put it in evaluation mode."
            )
        return held


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> _Affine:
    return scale, shift


def _is_shared(scale: Tensor, x: Tensor) -> bool:
    """Whether a scale is one for the whole batch, of more than one sample, rather than each sample's own."""
    return scale.ndim < x.ndim or len(scale) == 1


class _Norm:
    """One call of batch norm."""

    def __init__(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        self.input, self.training, self.eps = input, training, eps
        self.running, self.parameters = (running_mean, running_var), (weight, bias)

    def affine(self) -> _Affine:
        """Scale and shift by the batch's own statistics."""
        scale, shift = scale_and_shift(*batch_statistics(self.input), *self.parameters, self.eps)
        shape = [1, -1] + [1] * (self.input.ndim - 2)
        return scale.view(shape), shift.view(shape)

    def in_evaluation(self) -> Tensor:
        """The same call with the running statistics. Raises ``UserError`` where there are none."""
        if self.running[0] is None:
            raise no_running_statistics()
        return F.batch_norm(self.input, *self.running, *self.parameters, False, 0.0, self.eps)


def _torch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> _Norm:
    return _Norm(x, mean, var, weight, bias, training, *rest[:2])


_NORMS: dict[Any, Callable[..., _Norm]] = {F.batch_norm: _Norm, torch.batch_norm: _torch_norm}
