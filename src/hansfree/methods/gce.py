"""Generalised cross-entropy: samples that are easy weigh more, and so the shortcut is learnt with no correction.

Formula. ``mean_i (1 - p_i^q) / q`` where p_i is the probability that the student gives to the label. For q near 0 it
is the cross-entropy, for q = 1 the mean absolute error; its gradient is ``p_i^q`` times that of the cross-entropy.

Source. Zhang & Sabuncu, Generalized cross entropy loss for training deep neural networks with noisy labels, NeurIPS
2018, https://arxiv.org/abs/1805.07836, equation 6; q = 0.7 is the paper's. Made against wrong labels, it became the
way to train a model that is biased on purpose: Nam et al., 2020, https://arxiv.org/abs/2007.02561, and those after it.

Deviations. The paper's truncated loss, which leaves out samples below a probability, is not there. The published code
of lff multiplies the cross-entropy by ``q p^q``, a constant to the gradient, which is q times the gradient here.

Supervision. Labels. As a row of a table it is a control, the biased model by itself: where the shortcut is easy, its
accuracy on conflicting samples should be near 0.

Cost. An ERM step.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hansfree.core import Batch, Method, Setup
from hansfree.errors import UserError


def generalised_cross_entropy(
    logits: Float[Tensor, "b classes"], label: Int[Tensor, "b"], q: float
) -> Float[Tensor, "b"]:
    """``(1 - p^q) / q`` of each sample, p being the probability of its label; q in (0, 1]."""
    log_p = logits.log_softmax(1).gather(1, label[:, None]).squeeze(1)
    return -torch.expm1(q * log_p) / q  # exact where p^q is near 1, as for a small q


def check_q(q: float) -> None:
    """Raises ``UserError`` for a q outside of (0, 1]."""
    if not 0 < q <= 1:
        raise UserError(f"method.q must lie above 0 and be at most 1, not {q}; erm is the limit at 0.")


@final
class GCE(Method):
    """Generalised cross-entropy with the labels."""

    def __init__(self, setup: Setup, *, q: float = 0.7) -> None:
        super().__init__(setup)
        check_q(q)
        self.q = q

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": generalised cross-entropy}``."""
        return {"label": generalised_cross_entropy(self.student(batch.input), batch.label, self.q).mean()}
