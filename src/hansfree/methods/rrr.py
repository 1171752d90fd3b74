"""Right for the right reasons (RRR): no gradient of the log-probabilities outside of the object.

Formula. ``mean_i [ -log p_iy + weight * sum_d (A_id * d/dx_id sum_k log p_ik)^2 ]``, with p the softmax of the
logits, d over pixels and channels, and A = 1 - mask: one where the image must not matter. All classes count,
not the label alone: the gradient of a single log-probability vanishes where the network is certain.

Source. Ross, Hughes & Doshi-Velez, Right for the right reasons: training differentiable models by constraining
their explanations, IJCAI 2017, https://arxiv.org/abs/1703.03717, eq. 1 (``weight`` is its lambda_1, 1000 there).

Deviations. Both terms are means over samples where the paper has sums, which leaves their ratio as it is; its weight
decay is ``training.weight_decay``. Of two published implementations, one takes half of the squares. Bassi,
Cavalli & Decherchi, 2024, https://arxiv.org/abs/2407.09788, report a weight of 1e5, but their code differentiates
the mean over the batch, so that squares shrink by the squared batch size: with 128 samples it is 6.1 here. Batch norm
in training mode is held constant inside the gradient (``statistics: differentiated`` is plain autograd). The
gradient is that of pixels in [0, 1]: where the model divides by a standard deviation, its factor counts.

Supervision. Labels and masks; of several masks the first shows the object. The weight decides between the shortcut
and a useless network, and neither validation loss nor accuracy on biased data can choose it: Bassi et al. chose it on
unbiased validation images (``selection: ood_val``).

Cost. A backward pass to the pixels, and a second-order one through it: about three ERM steps.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup
from hansfree.errors import UserError
from hansfree.explainers import InputGradient
from hansfree.explainers.nodes import Statistics


def object_mask(batch: Batch, method: str) -> Float[Tensor, "b 1 h w"]:
    """The first mask, which shows the object. Raises ``UserError`` where the batch brings none."""
    if batch.mask is None:
        raise UserError(f"{method} needs masks of the object, which this benchmark does not give; choose another one.")
    return batch.mask[:, :1].float()


class _Evidence(nn.Module):
    """``sum_k log p_k`` in the place of logits, [b, 1]. Made for one call, whose logits it remembers."""

    logits: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        self.logits = self.network(x)
        return F.log_softmax(self.logits, 1).sum(1, keepdim=True)


@final
class RRR(Method):
    """No gradient of the log-probabilities outside of the object."""

    needs = frozenset({"mask"})

    def __init__(self, setup: Setup, *, weight: float = 1000.0, statistics: Statistics = "constant") -> None:
        super().__init__(setup)
        if weight <= 0:
            raise UserError(f"method.weight must be above 0, not {weight}; without the penalty the method is erm.")
        self.weight, self.explainer = weight, InputGradient(statistics)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy, "background": weight times the squared gradient outside of the object}``."""
        outside = 1 - object_mask(batch, "rrr")
        evidence = _Evidence(self.student)
        gradient = self.explainer(evidence, batch.images, torch.zeros_like(batch.index)).map
        penalty = (outside * gradient).square().flatten(1).sum(1).mean()
        return {"label": F.cross_entropy(evidence.logits, batch.label), "background": self.weight * penalty}
