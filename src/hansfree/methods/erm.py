"""Empirical risk minimisation: cross-entropy with the labels, and nothing else.

Formula. ``mean_i -log softmax(student(x_i))[y_i]``.

Source. Vapnik, Principles of risk minimization for learning theory, NeurIPS 1991. The baseline of every
shortcut paper: whatever separates the training classes is learnt, the shortcut first.

Supervision. Labels.

Cost. One forward and one backward pass: the unit in which other methods' costs are given.
"""

from typing import final

from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method


@final
class ERM(Method):
    """Cross-entropy with the labels."""

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy}``."""
        return {"label": F.cross_entropy(self.student(batch.images), batch.label)}
