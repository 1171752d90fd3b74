"""What runs in place of a function that a network calls, while it is being explained.

A torch function mode is local to the thread and touches no module: reused, functional and in-place calls are
seen alike. Some rules hold for every explanation (batch norm, attention that can be differentiated twice),
the others for LRP alone.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hansfree.core import held_affine
from hansfree.errors import UserError
from hansfree.explainers.nodes import (
    Bend,
    Call,
    Factor,
    Gate,
    Half,
    HeldAffine,
    LinearPool,
    Overwrite,
    Pair,
    RuledActivation,
    RuledConv2d,
    RuledMaxPool2d,
    RuledReLU,
)
from hansfree.explainers.refusals import is_first


class Rules(TorchFunctionMode):
    """Replaces the functions that have a rule; everything else runs as written."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self._replaced: dict[Any, Callable[..., Any]] = {**_ALWAYS, **(_LRP if call.ruled else {})}
        if call.ruled and call.semantics == "layerwise":
            self._replaced |= _LAYERWISE
        self._before_factor: dict[int, tuple[Tensor, Tensor]] = {}
        self._refreshes: list[Callable[[], None]] = []
        self.compared: Callable[..., Any] | None = None
        """A comparison of activations, if there was one: its mask may be an activation function in disguise."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = self._replaced.get(func)
        if rule is not None:
            with torch._C.DisableTorchFunction():  # an explanation around this one must not see how a rule works
                return rule(self, *args, **kwargs or {})
        if func in _COMPARISONS and self.call.ruled and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self.compared = func
        return func(*args, **kwargs or {})

    @property
    def attenuates_activations(self) -> bool:
        """Whether epsilon acts at activations: only where a layer ends there, which is what fused means."""
        return self.call.ruled and self.call.semantics == "fused"

    def end_of_layer(self, z: Tensor) -> Tensor:
        """``z``, with the epsilon rule's factor behind it where the semantics end a layer at each affine operation."""
        if not self.call.ruled or self.call.semantics == "fused" or not z.requires_grad:
            return z
        ended = Factor.apply(self.call, z, None)
        self._before_factor[id(ended)] = (ended, z)
        return ended

    def raw(self, z: Tensor) -> Tensor:
        """``z`` without the factor that :meth:`end_of_layer` put behind it."""
        return self._before_factor.get(id(z), (z, z))[1]

    def later(self, refresh: Callable[[], None]) -> None:
        """Refresh running statistics once the explanation is known to be possible."""
        self._refreshes.append(refresh)

    def finish(self) -> None:
        """Refresh what has to be refreshed."""
        for refresh in self._refreshes:
            refresh()


# Activations.


def _relu(rules: Rules, input: Tensor, inplace: bool = False) -> Tensor:
    return RuledReLU.apply(rules.call, input, inplace, rules.attenuates_activations)


def _relu_(rules: Rules, input: Tensor) -> Tensor:
    return _relu(rules, input, True)


def _bent(rules: Rules, z: Tensor, bend: Bend, inplace: bool = False) -> Tensor:
    if not z.requires_grad:
        return z.copy_(bend.act(z)) if inplace else bend.act(z)
    if inplace:
        return Overwrite.apply(z, RuledActivation.apply(rules.call, z.clone(), bend, rules.attenuates_activations))
    return RuledActivation.apply(rules.call, z, bend, rules.attenuates_activations)


_SILU = Bend("silu", F.silu, torch.ops.aten.silu_backward)
_HARDSWISH = Bend("hardswish", F.hardswish, torch.ops.aten.hardswish_backward)
_MISH = Bend("mish", F.mish, torch.ops.aten.mish_backward)
_TANH = Bend("tanh", torch.tanh, lambda g, z: torch.ops.aten.tanh_backward(g, z.tanh()))


def _silu(rules: Rules, input: Tensor, inplace: bool = False) -> Tensor:
    return _bent(rules, input, _SILU, inplace)


def _hardswish(rules: Rules, input: Tensor, inplace: bool = False) -> Tensor:
    return _bent(rules, input, _HARDSWISH, inplace)


def _mish(rules: Rules, input: Tensor, inplace: bool = False) -> Tensor:
    return _bent(rules, input, _MISH, inplace)


def _tanh(rules: Rules, input: Tensor) -> Tensor:
    return _bent(rules, input, _TANH)


def _gelu(rules: Rules, input: Tensor, approximate: str = "none") -> Tensor:
    backward = torch.ops.aten.gelu_backward
    return _bent(
        rules,
        input,
        Bend(
            "gelu",
            lambda z: F.gelu(z, approximate=approximate),
            lambda g, z: backward(g, z, approximate=approximate),
        ),
    )


def _hardtanh(
    rules: Rules, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    if not min_val <= 0 <= max_val:
        return F.hardtanh(input, min_val, max_val, inplace)
    backward = torch.ops.aten.hardtanh_backward
    bend = Bend("hardtanh", lambda z: F.hardtanh(z, min_val, max_val), lambda g, z: backward(g, z, min_val, max_val))
    return _bent(rules, input, bend, inplace)


def _relu6(rules: Rules, input: Tensor, inplace: bool = False) -> Tensor:
    return _hardtanh(rules, input, 0.0, 6.0, inplace)


def _leaky_relu(rules: Rules, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    backward = torch.ops.aten.leaky_relu_backward
    bend = Bend(
        "leaky_relu", lambda z: F.leaky_relu(z, negative_slope), lambda g, z: backward(g, z, negative_slope, False)
    )
    return _bent(rules, input, bend, inplace)


def _elu(rules: Rules, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    backward = torch.ops.aten.elu_backward
    bend = Bend("elu", lambda z: F.elu(z, alpha), lambda g, z: backward(g, alpha, 1.0, 1.0, False, z))
    return _bent(rules, input, bend, inplace)


def _sigmoid(rules: Rules, input: Tensor) -> Tensor:
    return Gate.apply(rules.call, input.sigmoid())


def _hardsigmoid(rules: Rules, input: Tensor, inplace: bool = False) -> Tensor:
    opening = F.hardtanh(input + 3, 0.0, 6.0) / 6  # torch's own cannot be differentiated twice
    opening = Gate.apply(rules.call, opening) if rules.call.ruled else opening
    return Overwrite.apply(input, opening) if inplace else opening


# Affine layers.


def _max_pool2d(
    rules: Rules,
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
    return RuledMaxPool2d.apply(input, *pairs, ceil_mode)


def _avg_pool2d(
    rules: Rules,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    size, step, pad = (_pair(value) for value in (kernel_size, stride or kernel_size, padding))
    rest = (ceil_mode, count_include_pad, divisor_override)
    return LinearPool.apply(
        input,
        lambda x: F.avg_pool2d(x, size, step, pad, *rest),
        lambda g, x: torch.ops.aten.avg_pool2d_backward(g, x, size, step, pad, *rest),
    )


def _adaptive_avg_pool2d(rules: Rules, input: Tensor, output_size: Any) -> Tensor:
    if output_size in (1, (1, 1), [1, 1]):
        return F.adaptive_avg_pool2d(input, output_size)  # a mean, whose derivatives are well made
    return LinearPool.apply(
        input, lambda x: F.adaptive_avg_pool2d(x, output_size), torch.ops.aten._adaptive_avg_pool2d_backward
    )


def _conv2d(
    rules: Rules,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.ndim != 4 or not weight.is_leaf:
        return rules.end_of_layer(F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    first = is_first(input.grad_fn)
    return rules.end_of_layer(RuledConv2d.apply(rules.call, input, weight, bias, geometry, first))


def _pair(value: int | Iterable[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _ended(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``func``, as a layer of its own."""
    return _own_layer(lambda _, *args, **settings: func(*args, **settings))


def _own_layer(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``rule``, as a layer of its own."""
    return lambda rules, *args, **settings: rules.end_of_layer(rule(rules, *args, **settings))


def _held_affine(rules: Rules, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    return rules.end_of_layer(HeldAffine.apply(rules.call, rules.call.held, _normed(rules, x), scale, shift, None))


def _normed(rules: Rules, x: Tensor) -> Tensor:
    """What a normalisation follows: a convolution and its norm are one layer, unless every operation is one."""
    return x if rules.call.semantics == "layerwise" else rules.raw(x)


def _batch_norm(
    rules: Rules,
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
    call = rules.call
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    if training and call.statistics != "running":
        mean, var = batch_statistics(input)
        scale, shift = scale_and_shift(mean, var, weight, bias, eps)
    elif running is not None:
        mean, var = batch_statistics(input.detach()) if training else running
        # Copies, because the graph remembers them and the next batch in training mode changes the buffers in place.
        scale, shift = scale_and_shift(running[0].clone(), running[1].clone(), weight, bias, eps)
    else:
        raise no_running_statistics()
    if training and running is not None:
        count = input.numel() // input.shape[1]
        kept = mean.detach(), var.detach() * (count / (count - 1))
        rules.later(lambda: _refresh(running, kept, momentum))
    shape = [1, -1] + [1] * (input.ndim - 2)
    passed = None
    if training and call.factors == "constant" and call.statistics == "constant":
        passed = scale_and_shift(mean.detach(), var.detach(), weight, bias, eps)[0].view(shape)
    y = HeldAffine.apply(call, call.held, _normed(rules, input), scale.view(shape), shift.view(shape), passed)
    return rules.end_of_layer(y)


def no_running_statistics() -> UserError:
    """The refusal of a batch norm that has none where they were asked for."""
    return UserError(
        "A batch norm without running statistics cannot be explained with `statistics: running`; "
        "use `constant`, or build it with track_running_stats=True."
    )


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel. Raises ``UserError`` where a channel has one value."""
    if x.numel() == x.shape[1]:
        raise UserError(
            f"Batch norm in training mode needs more than one value per channel, but its input has shape "
            f"{list(x.shape)}; use larger batches or put the model in evaluation mode."
        )
    var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    return mean, var


def scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Batch norm as x * scale + shift, per channel."""
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else weight * scale
    return scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)


@torch.no_grad()
def _refresh(running: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor], momentum: float) -> None:
    for kept, new in zip(running, batch, strict=True):
        kept.mul_(1 - momentum).add_(new, alpha=momentum)


def _torch_batch_norm(rules: Rules, x: Tensor, *args: Any) -> Tensor:
    weight, bias, mean, var, training, momentum, eps, _ = args
    return _batch_norm(rules, x, mean, var, weight, bias, training, momentum, eps)


# Normalisation within a sample: the size it divides by is held.


def _standardised(rules: Rules, x: Tensor, dims: list[int], eps: float, centre: bool = True) -> Tensor:
    centred = x - x.mean(dims, keepdim=True) if centre else x
    scale = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return HeldAffine.apply(rules.call, True, centred, scale, None, None)


def _layer_norm(
    rules: Rules,
    input: Tensor,
    normalized_shape: Iterable[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    y = _standardised(rules, input, list(range(-len(list(normalized_shape)), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(
    rules: Rules,
    input: Tensor,
    normalized_shape: Iterable[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    y = _standardised(rules, input, list(range(-len(list(normalized_shape)), 0)), eps, centre=False)
    return y if weight is None else y * weight


def _group_norm(
    rules: Rules,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    grouped = input.unflatten(1, (num_groups, -1))
    y = _standardised(rules, grouped, list(range(2, grouped.ndim)), eps).view_as(input)
    shape = [-1] + [1] * (input.ndim - 2)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _instance_norm(
    rules: Rules,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None or not use_input_stats:
        raise UserError("LRP has no rule for instance_norm with running statistics; build it without them.")
    return _group_norm(rules, input, input.shape[1], weight, bias, eps)


def _normalize(
    rules: Rules, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None
) -> Tensor:
    size = torch.linalg.vector_norm(input, p, dim, keepdim=True).clamp_min(eps)
    return HeldAffine.apply(rules.call, True, input, 1 / size, None, None)


# Products of activations.


def _product(rules: Rules, func: Callable[..., Tensor], x: Any, y: Any, **settings: Any) -> Tensor:
    """A product; LRP gives each of two activations half of the relevance."""
    if not rules.call.ruled or not _both_followed(x, y):
        return func(x, y, **settings)
    pair = Pair()
    return func(Half.apply(rules.call, pair, x), Half.apply(rules.call, pair, y), **settings)


def _both_followed(x: Any, y: Any) -> bool:
    return all(isinstance(operand, Tensor) and operand.requires_grad for operand in (x, y))


def _bilinear(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(rules: Rules, *operands: Any, **settings: Any) -> Tensor:
        return _product(rules, func, *operands, **settings) if len(operands) == 2 else func(*operands, **settings)

    return rule


def _mul_(rules: Rules, input: Tensor, other: Any) -> Tensor:
    if not _both_followed(input, other):
        return input.mul_(other)
    return Overwrite.apply(input, _product(rules, torch.mul, input.clone(), other))


def _einsum(rules: Rules, equation: Any, *operands: Any) -> Tensor:
    if len(operands) == 2 and isinstance(equation, str):
        return _product(rules, lambda x, y: torch.einsum(equation, x, y), *operands)
    return torch.einsum(equation, *operands)


def _sum(rules: Rules, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    total = torch.add(input, other, alpha=alpha)
    return Factor.apply(rules.call, total, Pair()) if _both_followed(input, other) else total


def _sum_(rules: Rules, input: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    if not _both_followed(input, other):
        return input.add_(other, alpha=alpha)
    return Overwrite.apply(input, _sum(rules, input.clone(), other, alpha=alpha))


# Attention, by kernels that can be differentiated twice: the fused ones cannot.


def _attention(
    rules: Rules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    weights = _attention_weights(rules, query, key, attn_mask, is_causal, scale)
    return _product(rules, torch.matmul, F.dropout(weights, dropout_p, dropout_p > 0), value)


def _attention_weights(
    rules: Rules, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None = None
) -> Tensor:
    scaled = query * (query.size(-1) ** -0.5 if scale is None else scale)
    scores = _product(rules, torch.matmul, scaled, key.transpose(-2, -1))
    if causal and mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return F.softmax(scores, -1)


def _multi_head_attention(
    rules: Rules,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if add_zero_attn or any(extra is not None for extra in (bias_k, bias_v, static_k, static_v)):
        raise UserError(
            "Attention with added keys (bias_kv, add_zero_attn or static keys) cannot be explained; "
            "build nn.MultiheadAttention without them."
        )
    unbatched = query.ndim == 2
    inputs = [x.unsqueeze(1) if unbatched else x for x in (query, key, value)]
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
    else:
        assert in_proj_weight is not None
        weights = list(in_proj_weight.chunk(3))
    biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))
    heads = [
        rules.end_of_layer(F.linear(x, weight, bias)).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)  # pyright: ignore
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    ]
    samples, length = inputs[0].shape[1], inputs[0].shape[0]
    mask = _merged_mask(attn_mask, key_padding_mask, (samples, num_heads, length, inputs[1].shape[0]))
    attention = _attention_weights(rules, heads[0], heads[1], mask, is_causal)
    seen = _product(rules, torch.matmul, F.dropout(attention, dropout_p, training), heads[2])
    output = rules.end_of_layer(F.linear(seen.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias))
    shown = (attention.mean(1) if average_attn_weights else attention) if need_weights else None
    if unbatched:
        return output.squeeze(1), None if shown is None else shown.squeeze(0)
    return output, shown


def _merged_mask(mask: Tensor | None, padding: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """Both masks of ``nn.MultiheadAttention``, in which True hides, as one that is added; [b, heads, queries, keys]."""
    samples, heads, queries, keys = shape
    merged = None
    if mask is not None:
        merged = _additive(mask)
        merged = merged.view(samples, heads, queries, keys) if merged.ndim == 3 else merged
    if padding is not None:
        hidden = _additive(padding).view(-1, 1, 1, keys)
        merged = hidden if merged is None else merged + hidden
    return merged


def _additive(mask: Tensor) -> Tensor:
    return (
        torch.zeros_like(mask, dtype=torch.get_default_dtype()).masked_fill(mask, -torch.inf)
        if (mask.dtype == torch.bool)
        else mask
    )


_COMPARISONS = {torch.gt, torch.ge, torch.lt, torch.le, Tensor.gt, Tensor.ge, Tensor.lt, Tensor.le}

_ALWAYS: dict[Any, Callable[..., Any]] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu_,
    Tensor.relu_: _relu_,
    F.conv2d: _conv2d,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    held_affine: _held_affine,
    F.hardsigmoid: _hardsigmoid,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
}

_LRP: dict[Any, Callable[..., Any]] = {
    F.silu: _silu,
    F.gelu: _gelu,
    F.hardswish: _hardswish,
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
    F.leaky_relu: _leaky_relu,
    F.elu: _elu,
    F.mish: _mish,
    F.tanh: _tanh,
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
    F.sigmoid: _sigmoid,
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.normalize: _normalize,
    torch.einsum: _einsum,
    torch.mul: _bilinear(torch.mul),
    Tensor.mul: _bilinear(torch.mul),
    torch.multiply: _bilinear(torch.mul),
    Tensor.mul_: _mul_,
    torch.matmul: _bilinear(torch.matmul),
    Tensor.matmul: _bilinear(torch.matmul),
    torch.bmm: _bilinear(torch.bmm),
    Tensor.bmm: _bilinear(torch.bmm),
    F.linear: _ended(F.linear),
    F.conv1d: _ended(F.conv1d),
    F.conv3d: _ended(F.conv3d),
    F.conv_transpose1d: _ended(F.conv_transpose1d),
    F.conv_transpose2d: _ended(F.conv_transpose2d),
    F.conv_transpose3d: _ended(F.conv_transpose3d),
}

_LAYERWISE: dict[Any, Callable[..., Any]] = {
    F.avg_pool1d: _ended(F.avg_pool1d),
    F.avg_pool2d: _own_layer(_avg_pool2d),
    F.avg_pool3d: _ended(F.avg_pool3d),
    F.adaptive_avg_pool1d: _ended(F.adaptive_avg_pool1d),
    F.adaptive_avg_pool2d: _own_layer(_adaptive_avg_pool2d),
    F.adaptive_avg_pool3d: _ended(F.adaptive_avg_pool3d),
    torch.mean: _ended(torch.mean),
    Tensor.mean: _ended(torch.mean),
    torch.add: _sum,
    Tensor.add: _sum,
    Tensor.add_: _sum_,
}
