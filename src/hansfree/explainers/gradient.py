"""Input gradient and gradient x input.

Simonyan et al. 2014, https://arxiv.org/abs/1312.6034 (gradient); Shrikumar et al. 2017,
https://arxiv.org/abs/1605.01713 (gradient x input).

Deviation: batch norm in training mode is held constant inside the explanation, so that the map of one sample
does not depend on the gradient of the others; ``statistics="differentiated"`` is plain autograd.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from hansfree.core import Draws, Explainer, Explanation, Target
from hansfree.explainers.propagation import Statistics, check_statistics, propagate


@final
@dataclass(frozen=True)
class InputGradient(Explainer):
    """map = dy_k / dx, of the input's shape. Works for any network that autograd differentiates twice."""

    statistics: Statistics = "constant"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)

    def __call__(self, model: nn.Module, input: Tensor, target: Target, *, draws: Draws | None = None) -> Explanation:
        """Explain ``model`` at ``input``. Raises ``UserError`` for a target out of range or constant logits."""
        found = propagate(model, input, target, statistics=self.statistics)
        return Explanation(found.logits, found.signal)


@final
@dataclass(frozen=True)
class GradientXInput(Explainer):
    """map = x * dy_k / dx, channel by channel. On a network of ReLUs without biases it sums to the logit."""

    statistics: Statistics = "constant"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)

    def __call__(self, model: nn.Module, input: Tensor, target: Target, *, draws: Draws | None = None) -> Explanation:
        """Explain ``model`` at ``input``. Raises ``UserError`` for a target out of range or constant logits."""
        found = propagate(model, input, target, statistics=self.statistics)
        return Explanation(found.logits, found.times_input())
