"""Learning from failure: what a network that is biased on purpose finds hard weighs more for the other.

Formula. A biased network B and the student D are trained side by side by
``mean_i GCE(B(x_i), y_i) + mean_i W_i CE(D(x_i), y_i)`` with ``W = l_B / (l_B + l_D)``: l_B and l_D are running
averages of the sample's cross-entropy under B and D, each divided by the largest of the sample's class. GCE is
``(1 - p^q) / q``, and W is a constant to the gradient.

Source. Nam, Cha, Ahn, Lee & Shin, Learning from failure: training debiased classifier from biased classifier, NeurIPS
2020, https://arxiv.org/abs/2007.02561, algorithm 1; the averages (``loss_decay`` 0.7) and the division by the class's
largest are its code's. q = 0.7 is the paper's.

Deviations. The published code's biased term is ``q p^q CE`` with a constant p, whose gradient is q times ours; Adam
divides this out. The two networks are parameter groups of one optimiser and are clipped apart. In validation W is made
from the sample's own two losses, and the biased term is left out. The paper trains with Adam at 0.001 for 100 epochs.

Supervision. Labels. The paper selects nothing by bias labels in training; which epoch is reported is up to
``selection``.

Cost. Two networks: twice an ERM step. Two numbers and a label per training sample in each checkpoint.
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup, Stage
from hansfree.methods.gce import check_q, generalised_cross_entropy
from hansfree.methods.relative_difficulty import RelativeDifficulty, relative_difficulty
from hansfree.methods.second_network import side_by_side


@final
class LfF(Method):
    """Weigh samples by how much harder they are for a biased network."""

    def __init__(self, setup: Setup, *, q: float = 0.7, loss_decay: float = 0.7) -> None:
        super().__init__(setup)
        check_q(q)
        self.q = q
        self.biased = setup.student()
        self.difficulty = RelativeDifficulty(setup, loss_decay)
        self._fresh: Tensor | None = None

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": weighted cross-entropy, "biased": GCE of the biased network}``."""
        logits, biased = self.student(batch.images).float(), self.biased(batch.images).float()
        losses = F.cross_entropy(logits, batch.label, reduction="none")
        both = torch.stack([F.cross_entropy(biased, batch.label, reduction="none"), losses]).detach()
        if not self.training:
            return {"label": (relative_difficulty(both[0], both[1]) * losses).mean()}
        self._fresh = both
        return {
            "label": (self.difficulty.weights(batch, both) * losses).mean(),
            "biased": generalised_cross_entropy(biased, batch.label, self.q).mean(),
        }

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Average the step's losses."""
        if self._fresh is not None:
            self.difficulty.remember(batch, self._fresh)
        self._fresh = None

    def next_stage(self) -> Stage | None:
        """One stage, the two networks clipped apart."""
        return side_by_side(self, self.biased)
