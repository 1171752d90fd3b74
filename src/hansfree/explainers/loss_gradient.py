"""Loss gradient: how each pixel changes the cross-entropy of a class.

    map = d(-log softmax(y)_k) / dx

with k the label: the target. Loss gradients are read as maps by Tsipras et al. 2019,
https://arxiv.org/abs/1805.12152, and by Han et al. 2023, https://arxiv.org/abs/2305.15734 (section 5.3); their norm
is a penalty in Ross and Doshi-Velez 2018, https://arxiv.org/abs/1711.09404. Unlike the gradient of a logit it
looks at all classes at once, and vanishes where the model is certain.

Each sample's own loss is differentiated: not the mean over the batch, which would shrink maps with its size.
Texts: the length of the gradient at each word embedding. Batch norm in training mode is held constant as for the
input gradient.
"""

from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from hansfree.core import Draws, Explainer, Explanation, Target, Tokens
from hansfree.explainers.propagation import Statistics, check_logits, check_statistics, propagate
from hansfree.explainers.text import at_real_tokens, place_of


@final
@dataclass(frozen=True)
class LossGradient(Explainer):
    """map = d cross-entropy(y, k) / dx, of the input's shape; the target is the label."""

    statistics: Statistics = "constant"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)

    def __call__(
        self, model: nn.Module, input: Tensor | Tokens, target: Target, *, draws: Draws | None = None
    ) -> Explanation:
        """Explain ``model`` at ``input``. Raises ``UserError`` for a target out of range or constant logits."""
        place = place_of(model, input)
        losses = _Losses(place.network)

        def label(_: Tensor) -> Tensor:
            return target if isinstance(target, Tensor) else target(losses.logits.detach())

        found = propagate(losses, place.input, label, statistics=self.statistics)
        logits = losses.logits if found.logits.requires_grad else losses.logits.detach()
        signal = found.signal
        map = at_real_tokens(signal.norm(dim=-1), input) if isinstance(input, Tokens) else signal
        return Explanation(logits, map)


class _Losses(nn.Module):
    """The cross-entropy of every class in the place of its logit. Made for one call, whose logits it remembers."""

    logits: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        self.logits = self.network(x)
        check_logits(self.logits, len(x))
        return -F.log_softmax(self.logits, 1)
