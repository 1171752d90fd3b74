"""Mixup: cross-entropy on weighted means of two images and their labels.

Formula. ``mean_i r_i CE(f(m_i), y_i) + (1 - r_i) CE(f(m_i), y_j)`` with ``m_i = r_i x_i + (1 - r_i) x_j``,
``r_i ~ Beta(alpha, alpha)`` and j the place of i in a random permutation of the batch.

Source. Zhang, Cissé, Dauphin & Lopez-Paz, mixup: Beyond empirical risk minimization, 2018,
https://arxiv.org/abs/1710.09412, eq. 1 and section 3.1 (alpha of 0.1 to 0.4 on ImageNet).

Deviations. Each sample has its own r, as eq. 1 says; the published code draws one per batch. Validation is plain
cross-entropy.

Supervision. Labels.

Cost. An ERM step.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from hansfree.augmentation import mixing_ratio
from hansfree.core import Batch, Drawer, Draws, Method, Setup
from hansfree.errors import UserError


@final
@dataclass(frozen=True)
class Mixing(Drawer):
    """How much of each image stays, from Beta(alpha, alpha), and the order that says what it is mixed with."""

    alpha: float

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise UserError(f"method.alpha must be above 0, not {self.alpha}; the usual range is 0.1 to 1.")

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draws:
        """``{"ratio", "order"}``: [count] in [0, 1], and [count] numbers whose ranks are a permutation."""
        ratio = mixing_ratio(self.alpha, count, generator)
        return {"ratio": ratio, "order": torch.rand(count, generator=generator)}


@final
class Mixup(Method):
    """Cross-entropy on mixed images and mixed labels."""

    def __init__(self, setup: Setup, *, alpha: float = 0.2) -> None:
        super().__init__(setup)
        self.mixing = Mixing(alpha)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy, of mixed images and labels while training}``."""
        if not self.training:
            return {"label": F.cross_entropy(self.student(batch.images), batch.label)}
        draws = self.draws(self.mixing, batch)
        ratio, other = draws["ratio"], draws["order"].argsort()
        logits = self.student(torch.lerp(batch.images[other], batch.images, ratio.view(-1, 1, 1, 1)))
        own, theirs = (F.cross_entropy(logits, y, reduction="none") for y in (batch.label, batch.label[other]))
        return {"label": torch.lerp(theirs, own, ratio).mean()}
