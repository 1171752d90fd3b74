"""Empirical risk minimisation: cross-entropy with the labels, and nothing else.

Formula. ``mean_i -w[y_i] log softmax(student(x_i))[y_i]`` with w = 1, or with ``class_weights: balanced``
``w[c] = n / (K n_c)``: n training samples, n_c of them of class c, K classes. Where an image has labels of several
classes, or with ``loss: binary``, ``mean_i w[y_i] sum_c BCE(sigmoid(student(x_i)_c), y_ic)``: B-cos networks are
trained so, since a softmax is content with a highest logit that is negative, whose contributions are too.

Source. Vapnik, Principles of risk minimization for learning theory, NeurIPS 1991. The baseline of every
shortcut paper: whatever separates the training classes is learnt, the shortcut first. The weights are those that
scikit-learn calls balanced.

Supervision. Labels.

Cost. One forward and one backward pass: the unit in which other methods' costs are given.
"""

from typing import Literal, final

import torch
from torch import Tensor

from hansfree.core import Batch, Method, Setup
from hansfree.errors import UserError
from hansfree.methods.label_loss import LabelLoss, check_label_loss, label_loss


@final
class ERM(Method):
    """Cross-entropy with the labels."""

    multi_label = True

    class_weights: Tensor | None

    def __init__(
        self,
        setup: Setup,
        *,
        class_weights: Literal["none", "balanced"] = "none",
        loss: LabelLoss = "cross-entropy",
    ) -> None:
        super().__init__(setup)
        check_label_loss(loss)
        self.label_loss: LabelLoss = loss
        weights = balanced_weights(setup) if class_weights == "balanced" else None
        self.register_buffer("class_weights", weights, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy}``."""
        return {"label": label_loss(self.student(batch.input), batch.label, self.class_weights, self.label_loss)}


def balanced_weights(setup: Setup) -> Tensor:
    """``n / (K n_c)``, [K]; 0 for a class without samples."""
    if setup.label is None:
        raise UserError("class_weights: balanced needs the labels of the training samples, which this setup lacks.")
    if setup.label.ndim != 1:
        raise UserError(
            "class_weights: balanced needs one class per image, but the labels of this benchmark name several; "
            "use class_weights: none."
        )
    counts = torch.bincount(setup.label.cpu(), minlength=setup.classes).float()
    return torch.where(counts > 0, counts.sum() / (setup.classes * counts.clamp(min=1)), 0.0)
