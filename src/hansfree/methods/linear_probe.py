"""Linear probe: the last layer alone is trained, on the features that the network has already.

Formula. ``mean_i -log softmax(W f(x_i) + b)[y_i]`` over W and b, with the features f fixed. Where an image
has labels of several classes, the sum of binary cross-entropies, as in erm.

Source. Alain & Bengio, Understanding intermediate layers using linear classifier probes, 2016,
https://arxiv.org/abs/1610.01644. On features of a pretrained network, the plain way to ask what they know of the task.

Deviations. Only the last layer is probed, the network's own, from where it starts; there is no penalty but
``training.weight_decay``. Everything else stays in evaluation mode while it trains: batch norm keeps its running
statistics, and dropout is off.

Supervision. Labels, and whatever the features were trained with: with ``model.pretrained`` other data and their labels.

Cost. One forward pass; the backward pass ends at the last layer.
"""

from typing import final

from torch import Tensor

from hansfree.core import Batch, Method, Setup
from hansfree.methods.distiller import last_layer
from hansfree.methods.label_loss import label_loss


@final
class LinearProbe(Method):
    """Cross-entropy with the labels, for the last layer alone."""

    multi_label = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.student.requires_grad_(False)
        last_layer(self.student, "student").requires_grad_(True)

    def train(self, mode: bool = True) -> "LinearProbe":
        """The student stays in evaluation mode: its features are fixed."""
        super().train(mode)
        self.student.eval()
        return self

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy}``."""
        return {"label": label_loss(self.student(batch.images), batch.label)}
