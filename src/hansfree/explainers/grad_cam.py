"""Grad-CAM: where channels of the last feature map that speak for a class are active.

Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, eq. 1 and 2. With A the feature map of a layer,

    alpha_c = mean over pixels of dy_k / dA_c        map = ReLU(sum over c of alpha_c A_c)

The layer is found by itself (:mod:`hansfree.explainers.layers`) or named. On vision transformers A are the
tokens of the patches, folded to their grid, as common practice has it; the paper knows CNNs only.

Deviation: none in the values. As a loss, the weights alpha keep their graph, as explanation-enhanced knowledge
distillation (e2KD, https://arxiv.org/abs/2402.03119) has it, so the gradient reaches the layers above A through
them too; libraries that treat alpha as constants give the last layer no gradient. e2KD enlarges both maps to the
input before comparing them (``resize``).
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hansfree.core import Draws, Explainer, Explanation, Target
from hansfree.explainers.layers import Looking
from hansfree.explainers.propagation import Statistics, check_statistics, propagate


@final
@dataclass(frozen=True)
class GradCAM(Explainer):
    """map[b, 1, h, w] = ReLU(sum_c alpha_c A_c) at the size of the feature map, or of the input with ``resize``.

    ``layer``: the path of the layer whose output is A (``layer4``, ``features.denseblock3``, ``blocks.11.norm1``);
    None: found by itself. Without ``relu``, what speaks against the class is kept, negative.
    """

    layer: str | None = None
    relu: bool = True
    resize: bool = False
    statistics: Statistics = "constant"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)

    def __call__(self, model: nn.Module, input: Tensor, target: Target, *, draws: Draws | None = None) -> Explanation:
        """Explain ``model`` at ``input``. Raises ``UserError`` for an unknown layer or one without a feature map."""
        looking = Looking(model, self.layer, constant=not torch.is_grad_enabled())
        found = propagate(looking, input, target, statistics=self.statistics, at=lambda: looking.located.activation)
        looking.located.check_read(found.signal)
        map = class_activation(looking.located.as_map(found.input), looking.located.as_map(found.signal))
        map = F.relu(map) if self.relu else map
        return Explanation(found.logits, _resized(map, input) if self.resize else map)


def class_activation(features: Tensor, gradient: Tensor) -> Tensor:
    """sum_c mean_hw(gradient_c) features_c: [b, 1, h, w], or [b, k, 1, h, w] from gradients [b, k, c, h, w]."""
    features = features if gradient.ndim == features.ndim else features.unsqueeze(1)
    return (gradient.mean((-2, -1), keepdim=True) * features).sum(-3, keepdim=True)


def _resized(map: Tensor, input: Tensor) -> Tensor:
    flat = F.interpolate(map.flatten(0, -4), input.shape[-2:], mode="bilinear")
    return flat.unflatten(0, map.shape[:-3])
