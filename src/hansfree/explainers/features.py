"""What the last feature map shows by itself: spatial attention, and the feature map as its own explanation.

Attention: Zagoruyko and Komodakis 2017, https://arxiv.org/abs/1612.03928, with the sum of squares (eq. 1 of
explanation distillation, https://arxiv.org/abs/2407.09788). Neither depends on the explained class; k targets
give the same map k times.

The feature map is what ``forward_features`` gives where a model has it, else the one that
:mod:`hansfree.explainers.layers` finds, or the output of a named layer. Tokens of patches are folded to their grid.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from hansfree.core import Draws, Explainer, Explanation, Target
from hansfree.errors import UserError
from hansfree.explainers.layers import Looking
from hansfree.explainers.propagation import at_least_float32, check_images, check_logits, resolve


@final
@dataclass(frozen=True)
class Attention(Explainer):
    """map[b, 1, h, w] = sum_c |features[b, c, h, w]|^power, at the size of the feature map.

    ``layer``: the path of a layer; None: the last feature map.
    """

    power: float = 2
    layer: str | None = None

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise UserError(f"Attention's power must be positive, but it is {self.power}; the usual one is 2.")

    def __call__(self, model: nn.Module, input: Tensor, target: Target, *, draws: Draws | None = None) -> Explanation:
        """Attention of ``model`` at ``input``. Raises ``UserError`` where the model shows no feature map."""
        logits, features, chosen = _look(model, self.layer, input, target)
        powers = features.square() if self.power == 2 else features.abs().pow(self.power)
        return Explanation(logits, _per_target(powers.sum(1, keepdim=True), chosen))


@final
@dataclass(frozen=True)
class FeatureMap(Explainer):
    """map[b, c, h, w] = the last feature map (after the adapter, where the model has one), or that of ``layer``."""

    layer: str | None = None

    def __call__(self, model: nn.Module, input: Tensor, target: Target, *, draws: Draws | None = None) -> Explanation:
        """Features of ``model`` at ``input``. Raises ``UserError`` where the model shows no feature map."""
        logits, features, chosen = _look(model, self.layer, input, target)
        return Explanation(logits, _per_target(features, chosen))


def _look(model: nn.Module, layer: str | None, input: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    check_images(input)
    with torch.autocast(input.device.type, enabled=False):
        logits, features = Looking(model, layer).features(at_least_float32(input))
    check_logits(logits, len(input))
    return logits, features, resolve(target, logits)


def _per_target(map: Tensor, chosen: Tensor) -> Tensor:
    return map if chosen.ndim == 1 else map.unsqueeze(1).expand(-1, chosen.shape[1], *map.shape[1:])
