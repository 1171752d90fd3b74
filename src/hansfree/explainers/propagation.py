"""The backward signal of a network, as an ordinary differentiable tensor.

One forward pass runs under a torch function mode, which is local to the thread and touches no module: it
puts our own nodes where the network calls a ReLU, a max-pool, a batch norm or ``held_affine``. While the
signal is computed these nodes follow the explanation's rule; in every other backward pass, above all that
of a loss on the map, they are the functions they stand for. So the map is right for reused, functional and
in-place ReLUs, its gradient reaches every weight, and two threads may explain one model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from hansfree.core import Target
from hansfree.errors import UserError, unknown
from hansfree.explainers.nodes import Call, Factors, Semantics, Statistics
from hansfree.explainers.refusals import (
    Locating,
    Path,
    is_compiled,
    mask_of_activations,
    no_rule,
    refuse_compiled,
    refuse_unseen_statistics,
)
from hansfree.explainers.rules import Rules


def check_statistics(name: str) -> None:
    """Raise ``UserError`` unless ``name`` is one of :data:`Statistics`."""
    check_choice("statistics", name, Statistics)


def check_choice(field: str, value: str, choices: Any) -> None:
    """Raise ``UserError`` unless ``value`` is one of the literals ``choices``."""
    if value not in get_args(choices):
        raise unknown(field, value, get_args(choices))


class Signal(NamedTuple):
    """What :func:`propagate` gives: logits [b, classes], the input in float32 or better, and the signal of its shape.

    For k targets the signal has shape [b, k, ...].
    """

    logits: Tensor
    input: Tensor
    signal: Tensor

    def times_input(self) -> Tensor:
        """Input times signal, target by target."""
        input = self.input if self.signal.ndim == self.input.ndim else self.input.unsqueeze(1)
        return input * self.signal


def propagate(
    model: nn.Module,
    input: Float[Tensor, "b *shape"],
    target: Target,
    *,
    statistics: Statistics = "constant",
    epsilon: float | Float[Tensor, "b"] | None = None,
    output_factor: bool = False,
    semantics: Semantics = "fused",
    factors: Factors = "exact",
    at: Callable[[], Tensor] | None = None,
) -> Signal:
    """The gradient of the target logits with respect to the input, modified as LRP asks where ``epsilon`` is given.

    With an epsilon, a ReLU with output a passes back g * a / (a + epsilon), which is the epsilon rule for
    everything affine between two ReLUs taken as one layer; ``output_factor`` starts from |y| / (|y| + epsilon)
    instead of 1, which is the same rule for the last layer. Functions that have no such rule raise ``UserError``.
    Without an epsilon it is the plain gradient, whatever the network.

    ``at`` is asked after the forward pass for the tensor to differentiate by, an activation of the network in
    place of its input; the Signal's ``input`` is then that tensor.
    """
    differentiable = torch.is_grad_enabled()
    check_images(input)
    _refuse_functorch()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(input.device.type, enabled=False):
        x = _followed(input) if differentiable else _followed(input.detach())
        epsilon = epsilon.to(x) if isinstance(epsilon, Tensor) else epsilon
        call = Call(statistics, epsilon, semantics, factors)
        seen = x.clone()  # a network may change its input in place
        source = seen.grad_fn
        with Rules(call) as rules:
            logits = _forward(model, seen)
        check_logits(logits, len(input))
        if not logits.requires_grad:
            raise _independent()
        if call.ruled:
            _refuse_what_has_no_rule(model, x, rules, logits.grad_fn, source)
        elif call.held and any(module.training for module in model.modules()):
            refuse_unseen_statistics(logits.grad_fn)
        rules.finish()
        call.private = differentiable and not input.requires_grad
        chosen = resolve(target, logits)
        last = rules.raw(logits)
        y = last.gather(1, chosen.view(len(chosen), -1))
        ended = semantics != "fused" and last is logits  # the last layer's factor is further down
        start = call.factor(y) if output_factor and not ended else torch.ones_like(y)
        by = x if at is None else at()
        signal = torch.stack(_backward(call, by, y, start, differentiable), 1)
    return Signal(
        logits if differentiable else logits.detach(),
        by if differentiable and (at is not None or input.requires_grad) else by.detach(),
        signal if chosen.ndim == 2 else signal.squeeze(1),
    )


def resolve(target: Target, logits: Float[Tensor, "b classes"]) -> Int[Tensor, "b"] | Int[Tensor, "b k"]:
    """The classes to explain; a rule is asked once, with constant logits. Raises ``UserError`` if out of range."""
    chosen = target if isinstance(target, Tensor) else target(logits.detach())
    if chosen.ndim not in (1, 2) or len(chosen) != len(logits) or chosen.is_floating_point():
        raise UserError(
            f"The target must be integers of shape [b] or [b, k] for {len(logits)} samples, "
            f"but it is {chosen.dtype} of shape {list(chosen.shape)}; give one class (or k classes) per sample."
        )
    chosen = chosen.to(logits.device, torch.long)
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < logits.shape[1]:
        raise UserError(
            f"The target asks for classes {int(chosen.min())} to {int(chosen.max())}, but the model has "
            f"{logits.shape[1]} logits; choose classes from 0 to {logits.shape[1] - 1}."
        )
    return chosen


def check_logits(logits: object, samples: int) -> None:
    """Raise ``UserError`` unless ``logits`` is a tensor [b, classes]."""
    if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == samples:
        return
    got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    raise UserError(
        f"The model must return logits of shape [{samples}, classes], but it returned {got}; wrap it so that it does."
    )


def check_images(input: object) -> None:
    """Raise ``UserError`` unless ``input`` is a tensor: texts have no pixels and no feature map."""
    if not isinstance(input, Tensor):
        raise UserError(
            f"This explainer takes images, but the input is of type {type(input).__name__}; "
            "texts are explained by gradient, gradient-x-input, lrp, integrated-gradients and loss-gradient."
        )


def at_least_float32(input: Tensor) -> Tensor:
    """The same values in float32 or better. Raises ``UserError`` for integers."""
    if not input.is_floating_point():
        raise UserError(
            f"Images must be floating-point pixels in [0, 1], but they are {input.dtype}; convert them first."
        )
    return input.to(torch.promote_types(input.dtype, torch.float32))


def _followed(input: Tensor) -> Tensor:
    """The tensor that the explanation differentiates by: the caller's own graph where there is one, else a leaf."""
    x = at_least_float32(input)
    return x if x.requires_grad else x.detach().clone().requires_grad_()


def _forward(model: nn.Module, x: Tensor) -> Any:
    if is_compiled(model):
        model = model._orig_mod  # pyright: ignore[reportAssignmentType]
    refuse_compiled(model)
    try:
        return model(x)
    except RuntimeError as error:
        if "setup_context" not in str(error):
            raise
        raise _transformed("inside the model") from error


def _refuse_functorch() -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        raise _transformed("around an explanation")


def _transformed(where: str) -> UserError:
    return UserError(
        f"Transforms of torch.func (grad, vmap) {where} cannot be explained through; "
        "use torch.autograd.grad, or a batch instead of vmap."
    )


def _backward(call: Call, x: Tensor, y: Tensor, start: Tensor, differentiable: bool) -> list[Tensor]:
    signals: list[Tensor] = []
    call.explaining = True
    try:
        for k in range(y.shape[1]):
            (signal,) = torch.autograd.grad(
                y[:, k],
                x,
                start[:, k],
                create_graph=differentiable,
                retain_graph=differentiable or k + 1 < y.shape[1],
                allow_unused=True,
            )
            if signal is None:
                raise _independent()
            signals.append(signal)
    except CheckpointError as error:
        raise UserError(
            "The model computes activations again in the backward pass (gradient checkpointing), where explanations "
            "have no rules; switch checkpointing off for the layers that are explained."
        ) from error
    finally:
        call.explaining = False
    return signals


def _refuse_what_has_no_rule(model: nn.Module, x: Tensor, rules: Rules, output: Any, source: Any) -> None:
    """Raise ``UserError``, naming the module, unless LRP knows everything between the input and the logits."""
    path = Path(output, source)
    refused = next(path.without_rule(), None)
    if refused is None and rules.compared is None:
        if output not in path.nodes:
            raise _independent()
        return
    kept = [(module._buffers, dict(module._buffers)) for module in model.modules() if type(module._buffers) is dict]
    values = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    with Rules(rules.call), Locating(model) as located:  # once more, to see which module calls what
        seen = x.clone()
        source = seen.grad_fn
        again = Path(_forward(model, seen).grad_fn, source)
    for buffers, before in kept:
        buffers.update(before)
    with torch.no_grad():
        for buffer, version, value in values:
            if buffer._version != version:
                buffer.copy_(value)
    if refused is None:
        assert rules.compared is not None
        raise mask_of_activations(located.calling(rules.compared))
    refused = next(again.without_rule(), refused)
    raise no_rule(refused, located.where(refused))


def _independent() -> UserError:
    return UserError(
        "The model's logits do not depend on its input, so there is nothing to explain; "
        "look for a detach, a no_grad or a rounding in its forward."
    )
