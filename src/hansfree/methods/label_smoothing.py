"""Label smoothing: cross-entropy with labels that leave a little to every class.

Formula. ``mean_i -sum_c q_ic log softmax(student(x_i))[c]`` with ``q_i = (1 - epsilon) onehot(y_i) + epsilon / K``
and K classes.

Source. Szegedy et al., Rethinking the Inception architecture for computer vision, 2016,
https://arxiv.org/abs/1512.00567, section 7.

Supervision. Labels.

Cost. An ERM step.
"""

from typing import final

from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup
from hansfree.errors import UserError


@final
class LabelSmoothing(Method):
    """Cross-entropy with softened labels."""

    def __init__(self, setup: Setup, *, epsilon: float = 0.1) -> None:
        super().__init__(setup)
        if not 0 < epsilon < 1:
            raise UserError(
                f"method.epsilon must lie between 0 and 1, not {epsilon}; erm is label smoothing without it."
            )
        self.epsilon = epsilon

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy with softened labels}``."""
        return {"label": F.cross_entropy(self.student(batch.input), batch.label, label_smoothing=self.epsilon)}
