"""Input gradient and gradient x input.

Simonyan et al. 2014, https://arxiv.org/abs/1312.6034 (gradient); Shrikumar et al. 2017,
https://arxiv.org/abs/1605.01713 (gradient x input). Texts: the gradient is taken at the word embeddings e, and a
token's value is its length |dy_k / de| (Li et al. 2016, https://arxiv.org/abs/1506.01066) or the inner product
e . dy_k / de.

Deviation: batch norm in training mode is held constant inside the explanation, so that the map of one sample
does not depend on the gradient of the others; ``statistics="differentiated"`` is plain autograd.
"""

from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from hansfree.core import Draws, Explainer, Explanation, Target, Tokens
from hansfree.explainers.nodes import Statistics
from hansfree.explainers.propagation import check_statistics, propagate
from hansfree.explainers.text import at_real_tokens, place_of


@final
@dataclass(frozen=True)
class InputGradient(Explainer):
    """map = dy_k / dx, of the input's shape. Works for any network that autograd differentiates twice."""

    statistics: Statistics = "constant"
    absolute: bool = False
    """|dy_k / dx|, channel by channel: the saliency of Simonyan et al., whose sign means nothing."""

    def __post_init__(self) -> None:
        check_statistics(self.statistics)

    def __call__(
        self, model: nn.Module, input: Tensor | Tokens, target: Target, *, draws: Draws | None = None
    ) -> Explanation:
        """Explain ``model`` at ``input``. Raises ``UserError`` for a target out of range or constant logits."""
        place = place_of(model, input)
        found = propagate(place.network, place.input, target, statistics=self.statistics)
        signal = found.signal
        signal = signal.abs() if self.absolute else signal
        map = at_real_tokens(signal.norm(dim=-1), input) if isinstance(input, Tokens) else signal
        return Explanation(found.logits, map)


@final
@dataclass(frozen=True)
class GradientXInput(Explainer):
    """map = x * dy_k / dx, channel by channel. On a network of ReLUs without biases it sums to the logit."""

    statistics: Statistics = "constant"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)

    def __call__(
        self, model: nn.Module, input: Tensor | Tokens, target: Target, *, draws: Draws | None = None
    ) -> Explanation:
        """Explain ``model`` at ``input``. Raises ``UserError`` for a target out of range or constant logits."""
        place = place_of(model, input)
        found = propagate(place.network, place.input, target, statistics=self.statistics)
        return Explanation(found.logits, place.collect(found.times_input()))
