"""What the last feature map shows by itself: spatial attention, and the feature map as its own explanation.

Attention: Zagoruyko and Komodakis 2017, https://arxiv.org/abs/1612.03928, with the sum of squares (eq. 1 of
explanation distillation, https://arxiv.org/abs/2407.09788). Neither depends on the explained class; k targets
give the same map k times.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from hansfree.core import Draws, Explainer, Explanation, Target
from hansfree.errors import UserError
from hansfree.explainers.propagation import at_least_float32, check_logits, resolve


@final
@dataclass(frozen=True)
class Attention(Explainer):
    """map[b, 1, h, w] = sum_c features[b, c, h, w]^2, at the size of the last feature map."""

    def __call__(self, model: nn.Module, input: Tensor, target: Target, *, draws: Draws | None = None) -> Explanation:
        """Attention of ``model`` at ``input``. Raises ``UserError`` where the model shows no feature map."""
        logits, features, chosen = _look(model, input, target)
        return Explanation(logits, _per_target(features.square().sum(1, keepdim=True), chosen))


@final
@dataclass(frozen=True)
class FeatureMap(Explainer):
    """map[b, c, h, w] = the last feature map (after the adapter, where the model has one)."""

    def __call__(self, model: nn.Module, input: Tensor, target: Target, *, draws: Draws | None = None) -> Explanation:
        """Features of ``model`` at ``input``. Raises ``UserError`` where the model shows no feature map."""
        logits, features, chosen = _look(model, input, target)
        return Explanation(logits, _per_target(features, chosen))


def _look(model: Any, input: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise UserError(
            f"{type(model).__name__} shows no feature map; load it with hansfree.models.load_model, "
            "or give it forward_features and forward_head as timm's models have."
        )
    with torch.autocast(input.device.type, enabled=False):
        features = model.forward_features(at_least_float32(input))
        logits = model.forward_head(features)
    if features.ndim != 4:
        raise UserError(
            f"The model's last feature map has shape {list(features.shape)}, not [b, c, h, w]; "
            "use an explainer of the input, such as gradient-x-input."
        )
    check_logits(logits, len(input))
    return logits, features, resolve(target, logits)


def _per_target(map: Tensor, chosen: Tensor) -> Tensor:
    return map if chosen.ndim == 1 else map.unsqueeze(1).expand(-1, chosen.shape[1], *map.shape[1:])
