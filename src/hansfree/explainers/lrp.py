"""LRP-epsilon: layer-wise relevance propagation with the epsilon rule at every layer.

Bach et al. 2015, https://doi.org/10.1371/journal.pone.0130140. As a distilled explanation: explanation
distillation, eq. 4 (https://arxiv.org/abs/2407.09788). With a_j the inputs of a layer, z_i its outputs before
the ReLU, and R the relevance, starting from R_k = y_k:

    R_j = sum_i w_ji a_j / (z_i + sign(z_i) epsilon) R_i

Writing R_j = a_j G_j turns this into a modified gradient: every ReLU with output a passes back
g * a / (a + epsilon), the last layer |y_k| / (|y_k| + epsilon), and the map is x * G, channel by channel.

What counts as one layer is said by ``semantics``. ``fused`` (the published code's): everything affine between two
activations (convolution, batch norm, residual sum, average pooling). ``branchwise`` (what zennit's composites
compute): each convolution or linear layer with its batch norm, so each branch of a residual sum by itself.
``layerwise``: each affine operation by itself. A max-pool passes relevance to its winner; biases absorb their share.
docs/lrp-semantics.md shows what that means for maps.

Deviations. The authors' code leaves out the last layer's factor (``output_factor=False``), reads one ReLU module
per use, and in training mode differentiates through batch statistics (``statistics="differentiated"``). The text
writes the epsilon of a sample as 10^U(0.001, 0.01); its appendix and code make it log-uniform, and so do we.

Extensions. Activations other than ReLU (LeakyReLU, ReLU6, Hardtanh, ELU, SiLU, Mish, GELU, Hardswish, tanh) pass
relevance on unchanged, the identity rule: G of z is act(z) / (z + epsilon sgn z) times G of act(z), which for ReLU
is the rule above. Transformers follow AttnLRP (Achtibat et al. 2024, https://arxiv.org/abs/2402.05602): softmax by
its gradient, a product of two activations half and half, normalisation within a sample with its size held. What a
sigmoid multiplies (squeeze and excitation) keeps all relevance, the sigmoid being a constant, as Arras et al. 2017
(https://doi.org/10.18653/v1/W17-5221) treat gates. Whatever has no rule raises ``UserError`` naming the module.

``factors="constant"`` makes the gradient of a loss on the map take the factors for constants: an approximation of
about two thirds of the cost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hansfree.core import Draws, Explainer, Explanation, Target, Tokens
from hansfree.errors import UserError
from hansfree.explainers.nodes import Factors, Semantics, Statistics
from hansfree.explainers.propagation import check_choice, check_statistics, propagate
from hansfree.explainers.text import place_of


@final
@dataclass(frozen=True)
class LRP(Explainer):
    """The LRP-epsilon map, of the input's shape, with an exact gradient in every weight.

    A pair ``epsilon`` is a log-uniform range, drawn per sample (its geometric mean where nothing was drawn).
    """

    epsilon: float | tuple[float, float] = (0.001, 0.01)
    output_factor: bool = True
    statistics: Statistics = "constant"
    semantics: Semantics = "fused"
    factors: Factors = "exact"

    def __post_init__(self) -> None:
        check_statistics(self.statistics)
        check_choice("semantics", self.semantics, Semantics)
        check_choice("factors", self.factors, Factors)
        if isinstance(self.epsilon, Sequence):
            object.__setattr__(self, "epsilon", tuple(self.epsilon))
        low, high = self._range() if not isinstance(self.epsilon, tuple) or len(self.epsilon) == 2 else (0.0, 0.0)
        if not 0 < low <= high < math.inf:
            raise UserError(
                f"LRP's epsilon must be a positive number or a pair of them, low then high, but it is {self.epsilon}; "
                "write for example epsilon: [0.001, 0.01] (gradient-x-input is LRP with an epsilon of 0)."
            )

    def _range(self) -> tuple[float, float]:
        return self.epsilon if isinstance(self.epsilon, tuple) else (self.epsilon, self.epsilon)

    def draw(self, count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``epsilon`` [count], log-uniform; nothing where epsilon is fixed."""
        if not isinstance(self.epsilon, tuple):
            return {}
        low, high = self.epsilon
        return {"epsilon": low * (high / low) ** torch.rand(count, generator=generator)}

    def _epsilon(self, draws: Draws | None, samples: int) -> float | Float[Tensor, "b"]:
        if draws is None or not isinstance(self.epsilon, tuple):
            low, high = self._range()
            return math.sqrt(low * high)
        if "epsilon" not in draws or draws["epsilon"].shape != (samples,):
            raise UserError(
                f"LRP with a range of epsilons needs draws['epsilon'] of shape [{samples}]; "
                "make the draws with this explainer's draw(), or pass none."
            )
        return draws["epsilon"]

    def __call__(
        self, model: nn.Module, input: Tensor | Tokens, target: Target, *, draws: Draws | None = None
    ) -> Explanation:
        """Explain ``model`` at ``input``. Raises ``UserError`` for activations without a rule and bad targets."""
        place = place_of(model, input)
        epsilon = self._epsilon(draws, len(place.input))
        found = propagate(
            place.network,
            place.input,
            target,
            statistics=self.statistics,
            epsilon=epsilon,
            output_factor=self.output_factor,
            semantics=self.semantics,
            factors=self.factors,
        )
        return Explanation(found.logits, place.collect(found.times_input()))
