"""Masks over a network's weights: which of them a sub-model keeps, and how that is learnt.

Every weight of a convolution or linear layer has a logit z, or every output channel one; biases and normalisation are
never masked. While masks are learnt, they are drawn by the Gumbel-sigmoid; a weight is kept for good where z >= 0.
Mappings from names to masks have the names of the network's parameters; a channel's mask, [out, 1, ...], broadcasts.
"""

from collections.abc import Mapping
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from hansfree.errors import UserError, unknown

Granularity = Literal["weights", "channels"]
"""What one logit is about: one weight; or one output channel (a linear layer's unit), the last layer left whole."""
Over = Literal["network", "layers"]
"""Whether a ratio is of sums over the whole network, or the mean of the layers' own ratios."""
Named = Mapping[str, Tensor]
_Masked = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


# Sampling -----------------------------------------------------------------------------------------------------


def gumbel_sigmoid(
    logits: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], temperature: float = 1.0, *, hard: bool = True
) -> Float[Tensor, "*shape"]:
    """``s = sigmoid((z + noise) / temperature)``; hard: 1 where s > 1/2, else 0, with the gradient of s.

    With noise by :func:`logistic_noise`, P(1) is sigmoid(z) at every temperature. Maddison et al., 2017,
    https://arxiv.org/abs/1611.00712 (the binary concrete distribution); the gradient is the straight-through one.
    """
    soft = ((logits + noise) / temperature).sigmoid()
    return (soft > 0.5).to(soft.dtype) + soft - soft.detach() if hard else soft


def logistic_noise(like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Draws from the logistic distribution, ``log u - log(1 - u)``, from torch's own generator."""
    return torch.rand_like(like, requires_grad=False).logit(eps=1e-6)


# Measures of masks --------------------------------------------------------------------------------------------


def reserved(masks: Named) -> dict[str, Tensor]:
    """The share of its entries that each layer's mask keeps."""
    return {name: mask.float().mean() for name, mask in masks.items()}


def shares(measured: Named) -> dict[str, float]:
    """Layer by layer as plain numbers, each layer called by its own name and not its weight's."""
    return {name.removesuffix(".weight"): value.item() for name, value in measured.items()}


def iou_by_layer(first: Named, second: Named) -> dict[str, Tensor]:
    """Each layer's ``sum m m' / sum (m + m' - m m')``; 0 where both masks are empty."""
    return {name: common / either.clamp(min=1e-12) for name, (common, either) in _overlaps(first, second).items()}


def iou(first: Named, second: Named, over: Over = "network") -> Float[Tensor, ""]:
    """Intersection over union of two masks, differentiable for masks in [0, 1]: see :func:`iou_by_layer`."""
    if over == "layers":
        return torch.stack(list(iou_by_layer(first, second).values())).mean()
    common, either = (torch.stack(sums).sum() for sums in zip(*_overlaps(first, second).values()))
    return common / either.clamp(min=1e-12)


def _overlaps(first: Named, second: Named) -> dict[str, tuple[Tensor, Tensor]]:
    common = {name: (first[name] * second[name]).sum() for name in first}
    return {name: (both, first[name].sum() + second[name].sum() - both) for name, both in common.items()}


def shuffled(masks: Named) -> dict[str, Tensor]:
    """Each layer's mask with its entries in an order drawn from torch's own generator: as dense, at other places."""
    return {name: mask.flatten()[torch.randperm(mask.numel())].view_as(mask) for name, mask in masks.items()}


# Networks under masks -----------------------------------------------------------------------------------------


def masked(parameters: Named, masks: Named) -> dict[str, Tensor]:
    """``parameters``, each one that has a mask times its mask."""
    return {name: value * masks[name] if name in masks else value for name, value in parameters.items()}


def masked_call(network: nn.Module, weights: nn.Module, masks: Named, input: Tensor) -> Tensor:
    """What ``network`` says with the parameters of ``weights``, its twin, under ``masks``.

    Buffers are ``network``'s own: in training mode its running statistics move, and nobody else's.
    """
    return functional_call(network, masked(dict(weights.named_parameters()), masks), (input,))


@torch.no_grad()
def cut(network: nn.Module, weights: nn.Module, masks: Named) -> None:
    """Give ``network`` the parameters of ``weights``, its twin, times ``masks``: then it is an ordinary network."""
    own = dict(network.named_parameters())
    for name, value in masked(dict(weights.named_parameters()), masks).items():
        own[name].copy_(value)


def masked_shapes(network: nn.Module, granularity: Granularity) -> dict[str, tuple[int, ...]]:
    """The shape of each mask of ``network``. Raises ``UserError`` where there is nothing to mask."""
    if granularity not in get_args(Granularity):
        raise unknown("granularity", granularity, get_args(Granularity))
    names = {module: name for name, module in network.named_modules() if isinstance(module, _Masked)}
    weights = {f"{name}.weight".lstrip("."): module.weight for module, name in names.items()}
    if granularity == "channels":
        last = _last_layer(network, list(names))
        outputs = {key: weight for key, weight in weights.items() if last is None or weight is not last.weight}
        shapes = {key: (len(weight), *[1] * (weight.ndim - 1)) for key, weight in outputs.items()}
    else:
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
    if not shapes:
        raise UserError(f"{type(network).__name__} has no weights that granularity: {granularity} could mask.")
    return shapes


def _last_layer(network: nn.Module, layers: list[nn.Module]) -> nn.Module | None:
    """The layer whose outputs are classes, which no mask should delete."""
    named = getattr(network, "get_classifier", None)
    return named() if named is not None else next(reversed(layers), None)


@final
class Masks(nn.Module):
    """The masks of one sub-model: logits, and what is kept for good.

    ``start`` is every logit's first value. At first everything is kept.
    """

    def __init__(self, network: nn.Module, granularity: Granularity = "weights", start: float = 0.0) -> None:
        super().__init__()
        shapes = masked_shapes(network, granularity)
        self.names = tuple(shapes)
        self.z = nn.ParameterList(torch.full(shape, float(start)) for shape in shapes.values())
        for number, shape in enumerate(shapes.values()):
            self.register_buffer(f"kept_{number}", torch.ones(shape, dtype=torch.bool))

    @property
    def logits(self) -> dict[str, Tensor]:
        """z by parameter."""
        return dict(zip(self.names, self.z))

    @property
    def probabilities(self) -> dict[str, Tensor]:
        """sigmoid(z) by parameter."""
        return {name: logits.sigmoid() for name, logits in self.logits.items()}

    def sample(self, temperature: float = 1.0, *, hard: bool = True) -> dict[str, Tensor]:
        """Masks drawn anew by :func:`gumbel_sigmoid`."""
        return {
            name: gumbel_sigmoid(logits, logistic_noise(logits), temperature, hard=hard)
            for name, logits in self.logits.items()
        }

    @property
    def kept(self) -> dict[str, Tensor]:
        """Masks of 0 and 1 (bool): what the sub-model is evaluated and exported with."""
        return {name: self.get_buffer(f"kept_{number}") for number, name in enumerate(self.names)}

    @property
    def hard(self) -> dict[str, Tensor]:
        """What :meth:`harden` would keep."""
        return {name: logits.detach() >= 0 for name, logits in self.logits.items()}

    def keep(self, masks: Named) -> None:
        """Keep ``masks`` from now on."""
        for number, name in enumerate(self.names):
            setattr(self, f"kept_{number}", masks[name])

    def harden(self) -> None:
        """Keep the weights whose logit is not negative."""
        self.keep(self.hard)
