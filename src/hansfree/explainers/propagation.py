"""The backward signal of a network, as an ordinary differentiable tensor.

One forward pass runs under a torch function mode, which is local to the thread and touches no module: it
puts our own nodes where the network calls a ReLU, a max-pool, a batch norm or ``held_affine``. While the
signal is computed these nodes follow the explanation's rule; in every other backward pass, above all that
of a loss on the map, they are the functions they stand for. So the map is right for reused, functional and
in-place ReLUs, its gradient reaches every weight, and two threads may explain one model.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from hansfree.core import Target, held_affine
from hansfree.errors import UserError, unknown

Statistics = Literal["constant", "running", "differentiated"]
"""What an explanation makes of batch norm in training mode.

``constant``: the batch's own statistics, constants inside the explanation, so that samples do not mix; a loss
on the map still differentiates through them exactly. ``running``: the running statistics as they stood before
this batch, which refreshes them as usual. ``differentiated``: plain autograd through the batch statistics,
which is what a backward hook on an ordinary network computes. ``held_affine`` layers are held in the first two.
In evaluation mode all three are the same.
"""


def check_statistics(name: str) -> None:
    """Raise ``UserError`` unless ``name`` is one of :data:`Statistics`."""
    if name not in get_args(Statistics):
        raise unknown("statistics", name, get_args(Statistics))


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
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(input.device.type, enabled=False):
        x = _followed(input) if differentiable else _followed(input.detach())
        epsilon = epsilon.to(x) if isinstance(epsilon, Tensor) else epsilon
        call = _Call(statistics, epsilon, private=differentiable and not input.requires_grad)
        seen = x.clone()  # a network may change its input in place
        source = seen.grad_fn
        with _Rules(call):
            logits = model(seen)
        check_logits(logits, len(input))
        if not logits.requires_grad:
            raise _independent()
        if epsilon is not None:
            _refuse_what_has_no_rule(logits.grad_fn, source)
        chosen = resolve(target, logits)
        y = logits.gather(1, chosen.view(len(chosen), -1))
        start = call.factor(y.abs()) if output_factor else torch.ones_like(y)
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


def _backward(call: "_Call", x: Tensor, y: Tensor, start: Tensor, differentiable: bool) -> list[Tensor]:
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
    finally:
        call.explaining = False
    return signals


def _independent() -> UserError:
    return UserError(
        "The model's logits do not depend on its input, so there is nothing to explain; "
        "look for a detach, a no_grad or a rounding in its forward."
    )


@dataclass
class _Call:
    """The state that the nodes of one forward pass share."""

    statistics: Statistics
    epsilon: float | Tensor | None
    private: bool = False
    """Whether a loss on the map may come, and will not ask for the input's gradient."""
    explaining: bool = False

    @property
    def held(self) -> bool:
        return self.statistics != "differentiated"

    def epsilon_like(self, a: Tensor) -> float | Tensor:
        """Epsilon in a shape that broadcasts with ``a``."""
        if not isinstance(self.epsilon, Tensor):
            assert self.epsilon is not None
            return self.epsilon
        if a.ndim == 0 or len(a) != len(self.epsilon):
            raise UserError(
                f"Epsilon is given for {len(self.epsilon)} samples, but an activation inside the model has shape "
                f"{list(a.shape)}; keep samples in the first dimension, or give LRP one fixed epsilon."
            )
        return self.epsilon.view(-1, *[1] * (a.ndim - 1))

    def factor(self, a: Tensor) -> Tensor:
        return a / (a + self.epsilon_like(a))


class _Attenuate(Function):
    """g * r with r = a / (a + epsilon), for a >= 0 and epsilon > 0; its derivative in a is g * (1 - r)^2 / epsilon."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, a: Tensor, epsilon: float | Tensor) -> Tensor:
        r = a + epsilon
        torch.div(a, r, out=r)  # in place, here and below: on a CPU, fresh memory costs more than the arithmetic
        ctx.save_for_backward(g, r)
        ctx.epsilon = epsilon
        return g * r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        (q,), (g, r) = grads, ctx.saved_tensors
        rest = 1 - r
        return q * r, (q * g).mul_(rest).mul_(rest).div_(ctx.epsilon), None


class _RuledReLU(Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, inplace: bool) -> Tensor:
        if call.epsilon is not None:
            call.epsilon_like(x)  # complains here rather than inside the engine
        if inplace:
            ctx.mark_dirty(x)
        a = x.relu_() if inplace else x.relu()
        ctx.call = call
        ctx.save_for_backward(a)
        ctx.set_materialize_grads(False)
        return a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None, None]:
        (g,), (a,) = grads, ctx.saved_tensors
        if g is None:
            return None, None, None
        if ctx.call.explaining and ctx.call.epsilon is not None:
            return None, _Attenuate.apply(g, a, ctx.call.epsilon_like(a)), None
        # The mask is a constant: autograd's own second derivative would send zeros through the whole forward graph.
        return None, torch.ops.aten.threshold_backward(g, a.detach(), 0), None


class _RuledMaxPool2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *geometry: Any) -> Tensor:
        pooled, indices = F.max_pool2d(x, *geometry, return_indices=True)
        ctx.save_for_backward(x, indices)
        ctx.mark_non_differentiable(indices)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return pooled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,), (x, indices) = grads, ctx.saved_tensors
        rest = (None,) * len(ctx.geometry)
        if g is None:
            return None, *rest
        # Which pixel won is a constant, for the same reason as the mask of a ReLU.
        unpooled = torch.ops.aten.max_pool2d_with_indices_backward(g, x.detach(), *ctx.geometry, indices)
        return unpooled, *rest


class _RuledConv2d(Function):
    """``F.conv2d`` that skips the weight gradient while explaining, and an input gradient that nobody asks for."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: "_Geometry", first: bool
    ) -> Tensor:
        ctx.call, ctx.geometry, ctx.first = call, geometry, first
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,), (x, weight) = grads, ctx.saved_tensors
        if g is None:
            return (None,) * 6
        if ctx.call.explaining:
            return None, _ConvSignal.apply(g, x.detach(), weight, ctx.geometry), None, None, None, None
        _, to_x, to_weight, to_bias, *_ = ctx.needs_input_grad
        wanted = [to_x and not ctx.first, to_weight, to_bias]
        by_x, by_weight, by_bias = _conv2d_backward(g, x, weight, ctx.geometry, wanted)
        return None, by_x, by_weight, by_bias, None, None


class _ConvSignal(Function):
    """The input gradient of a convolution, linear in g and in the weight.

    Autograd's own derivative of it computes the weight's share as a convolution with samples for channels; the
    kernel that ordinary training uses takes half the time.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: "_Geometry") -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(g, weight)
        return _conv2d_backward(g, x, weight, geometry, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q,), (g, weight) = grads, ctx.saved_tensors
        to_g, _, to_weight, _ = ctx.needs_input_grad
        by_g = F.conv2d(q, weight, None, *ctx.geometry) if to_g else None
        by_weight = _conv2d_backward(g, q, weight, ctx.geometry, [False, True, False])[1] if to_weight else None
        return by_g, None, by_weight, None


_Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation and groups of a convolution."""


def _conv2d_backward(g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, wanted: list[bool]) -> tuple[Any, ...]:
    stride, padding, dilation, groups = geometry
    biases = [weight.shape[0]]
    return torch.ops.aten.convolution_backward(
        g, x, weight, biases, stride, padding, dilation, False, [0, 0], groups, wanted
    )


class _HeldAffine(Function):
    """x * scale + shift. While explaining, scale and shift are constants whose own graph is kept."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        ctx.call = call
        ctx.shift_shape = None if shift is None else shift.shape
        ctx.save_for_backward(x, scale)
        ctx.set_materialize_grads(False)
        return x * scale if shift is None else torch.addcmul(shift, x, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None, Tensor | None, Tensor | None]:
        (g,), (x, scale) = grads, ctx.saved_tensors
        if g is None:
            return None, None, None, None
        _, to_x, to_scale, to_shift = ctx.needs_input_grad
        by_x = (g * scale).sum_to_size(x.shape) if to_x else None
        if ctx.call.explaining and ctx.call.held:
            return None, by_x, None, None
        by_scale = (g * x).sum_to_size(scale.shape) if to_scale else None
        by_shift = g.sum_to_size(ctx.shift_shape) if to_shift else None
        return None, by_x, by_scale, by_shift


def _relu(call: _Call, input: Tensor, inplace: bool = False) -> Tensor:
    return _RuledReLU.apply(call, input, inplace)


def _relu_(call: _Call, input: Tensor) -> Tensor:
    return _RuledReLU.apply(call, input, True)


def _max_pool2d(
    call: _Call,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if return_indices:
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    pairs = (_pair(value) for value in (kernel_size, stride or kernel_size, padding, dilation))
    return _RuledMaxPool2d.apply(input, *pairs, ceil_mode)


def _conv2d(
    call: _Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.ndim != 4 or not weight.is_leaf:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    return _RuledConv2d.apply(call, input, weight, bias, geometry, call.private and _has_no_weights(input.grad_fn))


def _pair(value: int | Iterable[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _held_affine(call: _Call, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    return _HeldAffine.apply(call, x, scale, shift)


def _batch_norm(
    call: _Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``, as an affine map whose statistics are held; updates the running statistics as it does."""
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    if training and call.statistics != "running":
        mean, var = _batch_statistics(input)
        scale, shift = _scale_and_shift(mean, var, weight, bias, eps)
    elif running is not None:
        mean, var = _batch_statistics(input.detach()) if training else running
        # Copies, because the graph remembers them and the next batch in training mode changes the buffers in place.
        scale, shift = _scale_and_shift(running[0].clone(), running[1].clone(), weight, bias, eps)
    else:
        raise UserError(
            "A batch norm without running statistics cannot be explained with `statistics: running`; "
            "use `constant`, or build it with track_running_stats=True."
        )
    if training and running is not None:
        _refresh(running, mean, var, input, momentum)
    shape = [1, -1] + [1] * (input.ndim - 2)
    return _HeldAffine.apply(call, input, scale.view(shape), shift.view(shape))


def _batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == x.shape[1]:
        raise UserError(
            f"Batch norm in training mode needs more than one value per channel, but its input has shape "
            f"{list(x.shape)}; use larger batches or put the model in evaluation mode."
        )
    var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    return mean, var


def _scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else weight * scale
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


@torch.no_grad()
def _refresh(running: tuple[Tensor, Tensor], mean: Tensor, var: Tensor, x: Tensor, momentum: float) -> None:
    count = x.numel() // x.shape[1]
    for kept, new in zip(running, (mean, var * (count / (count - 1))), strict=True):
        kept.mul_(1 - momentum).add_(new, alpha=momentum)


def _torch_batch_norm(call: _Call, x: Tensor, *args: Any) -> Tensor:
    weight, bias, mean, var, training, momentum, eps, _ = args
    return _batch_norm(call, x, mean, var, weight, bias, training, momentum, eps)


_RULES: dict[Any, Callable[..., Any]] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu_,
    Tensor.relu_: _relu_,
    F.conv2d: _conv2d,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    held_affine: _held_affine,
}


class _Rules(TorchFunctionMode):
    """Replaces the functions that have a rule; everything else runs as written."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        return func(*args, **kwargs or {}) if rule is None else rule(self._call, *args, **kwargs or {})


_AFFINE = re.compile(
    "Add|Sub|Neg|Sum|Mean|Cat|Stack|Copy|ToCopy|Clone|Alias|View|UnsafeView|ReshapeAlias|AsStrided|T|Transpose|Permute"
    "|Expand|Repeat|Squeeze|Unsqueeze|Slice|Select|Split|SplitWithSizes|Unbind|Unfold|Index|IndexSelect|Gather|Flip|Roll"
    "|Pad|ConstantPadNd|ReflectionPad2D|ReplicationPad2D|PixelShuffle|PixelUnshuffle|Im2Col|NativeChannelShuffle|ChannelShuffle"
    "|AvgPool2D|AdaptiveAvgPool2D|MkldnnAdaptiveAvgPool2D|UpsampleNearest2D|UpsampleBilinear2D|UpsampleBicubic2D"
    "|NativeDropout|FusedDropout|MaxPool2DWithIndices|AdaptiveMaxPool2D|_RuledReLU|_RuledMaxPool2d|_HeldAffine"
)
_PRODUCT = re.compile(
    "Mul|Mm|Bmm|Mv|Dot|Addmm|Addbmm|Baddbmm|Addmv|Addcmul|Convolution|_RuledConv2d|Linear|MkldnnLinear"
)


def _refuse_what_has_no_rule(output: Any, source: Any) -> None:
    """Raise ``UserError`` unless every path from the input to the logits is ReLUs, max-pools and affine maps.

    It reads autograd's graph rather than the calls, so that what a scripted module or a fused kernel does
    is seen as well.
    """
    users: defaultdict[Any, list[Any]] = defaultdict(list)
    for node in _closure(output, _inputs):
        for used in _inputs(node):
            users[used].append(node)
    on_path = _closure(source, lambda node: users.get(node, []))
    if output not in on_path:
        raise _independent()
    for node in on_path:
        name = re.sub(r"Backward\d*$", "", node.name())
        dependent = [used in on_path for used in _inputs(node)]
        linear = sum(dependent) < 2 if _PRODUCT.fullmatch(name) else name == "Div" and not any(dependent[1:])
        if not linear and not _AFFINE.fullmatch(name):
            raise _no_rule(name)


def _closure(root: Any, following: Callable[[Any], Iterable[Any]]) -> dict[Any, None]:
    """Every node that can be reached from ``root``, in a fixed order (constants have no node: None)."""
    reached: dict[Any, None] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in reached:
            reached[node] = None
            waiting.extend(following(node))
    return reached


def _has_no_weights(node: Any) -> bool:
    """Whether everything that ``node`` was computed from leads back to one leaf, the explained input."""
    seen = _closure(node, _inputs)
    return sum(not used.next_functions for used in seen) == 1


def _inputs(node: Any) -> list[Any]:
    """What ``node`` was computed from; of a held affine map only x, for that is all an explanation follows."""
    inputs = [used for used, _ in node.next_functions]
    return inputs[:1] if node.name() == "_HeldAffineBackward" else inputs


_SPOKEN = {
    "mul": "a product of two activations",
    "div": "division by an activation",
    "hardtanh": "relu6 or hardtanh",
    "prelu_kernel": "prelu",
    "batch_norm": "instance_norm",
    "copy_slices": "a change in place of a part of a tensor",
}


def _no_rule(node: str) -> UserError:
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node.rpartition(":")[2]).lower().removeprefix("native_").strip("_")
    return UserError(
        f"LRP has no rule for {_SPOKEN.get(name, name)}; use gradient-x-input, or a network whose activations are "
        "all ReLUs (in plain Python: neither scripted nor compiled)."
    )
