"""The loss of labels: of one class per image, or of several."""

from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hansfree.errors import unknown

LabelLoss = Literal["cross-entropy", "binary"]
"""For one class per image: softmax cross-entropy; or binary cross-entropy of each class against all others."""


def check_label_loss(loss: LabelLoss) -> None:
    """Raise ``UserError`` for a loss that there is not."""
    if loss not in get_args(LabelLoss):
        raise unknown("loss", loss, get_args(LabelLoss))


def label_loss(
    logits: Float[Tensor, "b classes"],
    label: Int[Tensor, "b"] | Float[Tensor, "b classes"],
    class_weights: Float[Tensor, "classes"] | None = None,
    loss: LabelLoss = "cross-entropy",
) -> Float[Tensor, ""]:
    """Cross-entropy with the labels, mean over samples; of labels [b, classes], binary and summed over classes.

    ``class_weights`` multiply each sample's term by the weight of its class.
    """
    if label.ndim == 2:
        return _binary(logits, label).mean()
    if loss == "cross-entropy":
        return F.cross_entropy(logits, label, class_weights, reduction="none").mean()
    losses = _binary(logits, F.one_hot(label, logits.shape[1]))
    return (losses if class_weights is None else class_weights[label] * losses).mean()


def _binary(logits: Float[Tensor, "b classes"], truth: Tensor) -> Float[Tensor, "b"]:
    return F.binary_cross_entropy_with_logits(logits, truth.to(logits), reduction="none").sum(1)
