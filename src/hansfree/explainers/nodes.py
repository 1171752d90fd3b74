"""The autograd nodes of an explanation: one function each, and what it passes back while one is computed.

Every node is the function it stands for, in the forward pass and in every ordinary backward pass. Only while
``Call.explaining`` is set does its backward follow the explanation's rule, in operations that autograd
records, so that a loss on the explanation is differentiated exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hansfree.errors import UserError

Statistics = Literal["constant", "running", "differentiated"]
"""What an explanation makes of batch norm in training mode.

``constant``: the batch's own statistics, constants inside the explanation, so that samples do not mix; a loss
on the map still differentiates through them exactly. ``running``: the running statistics as they stood before
this batch, which refreshes them as usual. ``differentiated``: plain autograd through the batch statistics,
which is what a backward hook on an ordinary network computes. ``held_affine`` layers are held in the first two.
In evaluation mode all three are the same.
"""

Semantics = Literal["fused", "branchwise", "layerwise"]
"""What counts as one layer where LRP's epsilon acts.

``fused``: everything affine up to the next activation, residual sums and pooling included; the factor
|z| / (|z| + epsilon) sits at activations (and at the logits). ``branchwise``: every convolution or linear layer
with the batch norm behind it, so on each branch before a residual sum and not on the sum. ``layerwise``: every
affine operation by itself: convolution, batch norm, linear layer, average pool, residual sum.
"""


Factors = Literal["exact", "constant"]
"""What a loss on an LRP map makes of the epsilon factors, which depend on the activations.

``exact``: their derivative is part of the gradient. ``constant``: they are constants to it, and so are batch
statistics: an approximation that saves the backward pass through the forward graph (four passes of convolutions
instead of six), since nothing else in a map depends on the activations.
"""


@dataclass
class Call:
    """The state that the nodes of one forward pass share."""

    statistics: Statistics
    epsilon: float | Tensor | None
    semantics: Semantics = "fused"
    factors: Factors = "exact"
    private: bool = False
    """Whether nobody will ask for the gradient of the explained input any more; set after the forward pass."""
    explaining: bool = False

    @property
    def held(self) -> bool:
        return self.statistics != "differentiated"

    @property
    def ruled(self) -> bool:
        """Whether this is LRP rather than a plain gradient."""
        return self.epsilon is not None

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

    def seen(self, z: Tensor) -> Tensor:
        """The activation that a factor is computed from, as a loss on the map is to see it."""
        return z if self.factors == "exact" else z.detach()

    def factor(self, z: Tensor) -> Tensor:
        """|z| / (|z| + epsilon)."""
        size = self.seen(z).abs()
        return size / (size + self.epsilon_like(z))


class Attenuate(Function):
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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore
        (q,), (g, r) = grads, ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return q * r, None, None
        rest = 1 - r
        return q * r, (q * g).mul_(rest).mul_(rest).div_(ctx.epsilon), None


class RuledReLU(Function):
    """A ReLU that passes back g * a / (a + epsilon) where it is the end of a layer (``attenuated``), else g masked."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, inplace: bool, attenuated: bool) -> Tensor:
        if attenuated:
            call.epsilon_like(x)  # complains here rather than inside the engine
        if inplace:
            ctx.mark_dirty(x)
        a = x.relu_() if inplace else x.relu()
        ctx.call, ctx.attenuated = call, attenuated
        ctx.save_for_backward(a)
        ctx.set_materialize_grads(False)
        return a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,), (a,) = grads, ctx.saved_tensors
        if g is None:
            return (None,) * 4
        if ctx.call.explaining and ctx.attenuated:
            return None, Attenuate.apply(g, ctx.call.seen(a), ctx.call.epsilon_like(a)), None, None
        # The mask is a constant: autograd's own second derivative would send zeros through the whole forward graph.
        return None, torch.ops.aten.threshold_backward(g, a.detach(), 0), None, None


class RuledMaxPool2d(Function):
    """``F.max_pool2d``, whose winners are constants."""

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


class LinearPool(Function):
    """An average pool. It is linear, but torch's second derivative sends zeros through the whole forward graph."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pool: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backward = backward
        ctx.set_materialize_grads(False)
        return pool(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (g,), (x,) = grads, ctx.saved_tensors
        return None if g is None else ctx.backward(g, x.detach()), None, None


class RuledConv2d(Function):
    """``F.conv2d`` that skips the weight gradient while explaining, and an input gradient that nobody asks for."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: "Geometry", first: bool
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
            return None, ConvSignal.apply(g, x.detach(), weight, ctx.geometry), None, None, None, None
        _, to_x, to_weight, to_bias, *_ = ctx.needs_input_grad
        wanted = [to_x and not (ctx.first and ctx.call.private), to_weight, to_bias]
        by_x, by_weight, by_bias = _conv2d_backward(g, x, weight, ctx.geometry, wanted)
        return None, by_x, by_weight, by_bias, None, None


class ConvSignal(Function):
    """The input gradient of a convolution, linear in g and in the weight.

    Autograd's own derivative of it computes the weight's share as a convolution with samples for channels; the
    kernel that ordinary training uses takes half the time.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: "Geometry") -> Tensor:
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


Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation and groups of a convolution."""


def _conv2d_backward(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]) -> tuple[Any, ...]:
    stride, padding, dilation, groups = geometry
    biases = [weight.shape[0]]
    return torch.ops.aten.convolution_backward(
        g, x, weight, biases, stride, padding, dilation, False, [0, 0], groups, wanted
    )


class HeldAffine(Function):
    """x * scale + shift. While explaining, scale and shift are constants whose own graph is kept (if ``hold``).

    ``passed`` has the same values as scale and another graph: it is what the explanation multiplies by.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        hold: bool,
        x: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        passed: Tensor | None,
    ) -> Tensor:
        ctx.call, ctx.hold = call, hold
        ctx.shift_shape = None if shift is None else shift.shape
        ctx.save_for_backward(x, scale, scale if passed is None else passed)
        ctx.set_materialize_grads(False)
        return x * scale if shift is None else torch.addcmul(shift, x, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,), (x, scale, passed) = grads, ctx.saved_tensors
        if g is None:
            return (None,) * 6
        _, _, to_x, to_scale, to_shift, _ = ctx.needs_input_grad
        if ctx.call.explaining and ctx.hold:
            return None, None, (g * passed).sum_to_size(x.shape), None, None, None
        by_x = (g * scale).sum_to_size(x.shape) if to_x else None
        by_scale = (g * x).sum_to_size(scale.shape) if to_scale else None
        by_shift = g.sum_to_size(ctx.shift_shape) if to_shift else None
        return None, None, by_x, by_scale, by_shift, None


class Bend(NamedTuple):
    """An activation with act(0) = 0, and its derivative as torch computes it."""

    name: str
    act: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """(g, z) to g * act'(z)."""


class IdentityRule(Function):
    """g * r with r = act(z) / (z + epsilon sgn z); its derivative in z is g * (act'(z) - r) / (z + epsilon sgn z)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, z: Tensor, epsilon: float | Tensor, bend: Bend) -> Tensor:
        stabilised = _stabilised(z, epsilon)
        r = bend.act(z).div_(stabilised)
        ctx.save_for_backward(g, z, r, stabilised)
        ctx.bend = bend
        return g * r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # pyright: ignore
        (q,), (g, z, r, stabilised) = grads, ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return q * r, None, None, None
        qg = q * g
        return q * r, ctx.bend.backward(qg, z).sub_(qg.mul_(r)).div_(stabilised), None, None


def _stabilised(z: Tensor, epsilon: float | Tensor) -> Tensor:
    return torch.copysign(torch.as_tensor(epsilon, dtype=z.dtype, device=z.device), z).add_(z)


class RuledActivation(Function):
    """A smooth or clipped activation that passes relevance on unchanged: the identity rule."""

    @staticmethod
    def forward(ctx: Any, call: Call, z: Tensor, bend: Bend, attenuated: bool) -> Tensor:
        ctx.call, ctx.bend, ctx.attenuated = call, bend, attenuated
        call.epsilon_like(z)  # complains here rather than inside the engine
        ctx.save_for_backward(z)
        ctx.set_materialize_grads(False)
        return bend.act(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (g,), (z,) = grads, ctx.saved_tensors
        if g is None:
            return (None,) * 4
        if ctx.call.explaining:
            epsilon = ctx.call.epsilon_like(z) if ctx.attenuated else _ALMOST_ZERO
            return None, IdentityRule.apply(g, ctx.call.seen(z), epsilon, ctx.bend), None, None
        return None, ctx.bend.backward(g, z), None, None


_ALMOST_ZERO = 1e-9
"""Stabilises act(z) / z where the semantics put no epsilon."""


@dataclass(eq=False)
class Pair:
    """The two operands of a product or sum; ``both`` says that both depend on the explained input."""

    both: bool = False


class Factor(Function):
    """The end of an affine layer: passes back g * |z| / (|z| + epsilon), the epsilon rule.

    With a ``pair`` z is a sum of two tensors, a layer only where both depend on the explained input.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, z: Tensor, pair: Pair | None) -> Tensor:
        call.epsilon_like(z)
        ctx.call, ctx.pair = call, pair
        ctx.save_for_backward(z)
        ctx.set_materialize_grads(False)
        return z.clone()  # not a view: what follows may work in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None, None]:
        (g,), (z,) = grads, ctx.saved_tensors
        if g is not None and ctx.call.explaining and (ctx.pair is None or ctx.pair.both):
            g = g * ctx.call.factor(z)
        return None, g, None


class Half(Function):
    """An operand of a product. Where both operands carry relevance, each gets half: the gradient of x * y halved."""

    @staticmethod
    def forward(ctx: Any, call: Call, pair: Pair, x: Tensor) -> Tensor:
        ctx.call, ctx.pair = call, pair
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, Tensor | None]:
        (g,) = grads
        if g is not None and ctx.call.explaining and ctx.pair.both:
            g = g / 2
        return None, None, g


class Overwrite(Function):
    """``x.copy_(value)``, which sends nothing back to what x was: torch's own sends zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        return x.copy_(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None]:
        return None, grads[0]


class Gate(Function):
    """A sigmoid that gates: while explaining it is a constant, so that the gated signal carries all relevance."""

    @staticmethod
    def forward(ctx: Any, call: Call, opening: Tensor) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return opening.view_as(opening)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None]:
        (g,) = grads
        return None, None if ctx.call.explaining else g
