"""The loss of labels: of one class per image, or of several."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def label_loss(
    logits: Float[Tensor, "b classes"],
    label: Int[Tensor, "b"] | Float[Tensor, "b classes"],
    class_weights: Float[Tensor, "classes"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy with the labels, mean over samples; of labels [b, classes], binary and summed over classes.

    ``class_weights`` multiply each sample's term by the weight of its class.
    """
    if label.ndim == 1:
        return F.cross_entropy(logits, label, class_weights, reduction="none").mean()
    return F.binary_cross_entropy_with_logits(logits, label.to(logits), reduction="sum") / len(logits)
