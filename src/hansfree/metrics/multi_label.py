"""Where an image has several labels: decisions of each class on its own, at logit 0, and their ranking."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hansfree.core import Predictions
from hansfree.metrics.measure import Measure, Sums, Whole


@Measure
def f1(predictions: Predictions) -> Sums | None:
    """Micro-averaged F1 over all decisions (image, class), yes where the logit is above 0; 0 where nothing is found.

    Formula. 2 TP / (2 TP + FP + FN)
    Source. Model guidance (Rao et al., 2023, https://arxiv.org/abs/2303.11932), which e2KD's measures follow.
    """
    if _one_label(predictions):
        return None
    says, label = predictions.logits > 0, predictions.label > 0.5
    true, said, there = ((decision.sum(1)).double() for decision in (says & label, says, label))
    # 2 TP + FP + FN is what is said and what is there. With neither, the score counts as 0.
    return Sums(torch.stack([2 * true, said + there], 1), lambda sums: sums[..., 0] / sums[..., 1].clamp_min(1))


@Measure
def mean_average_precision(predictions: Predictions) -> Whole | None:
    """mAP: average precision of the ranking of images by a class's logit, mean over classes that occur in the split.

    Images with equal logits enter the ranking together. It has no interval.

    Formula. (1/K) sum_k sum_t (R_t - R_t-1) P_t, precision P_t and recall R_t of class k at its logits t, falling
    Source. Everingham et al., 2010, https://doi.org/10.1007/s11263-009-0275-4, section 4.2, without interpolation.
    """
    if _one_label(predictions):
        return None
    label = predictions.label > 0.5
    there = label.any(0).nonzero()[:, 0].tolist()
    found = [_average_precision(predictions.logits[:, k].double(), label[:, k]) for k in there]
    return Whole(torch.stack(found).mean().item() if found else None)


def _average_precision(logit: Float[Tensor, " n"], label: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    order = logit.argsort(descending=True)
    logit, found = logit[order], label[order].double().cumsum(0)
    last = torch.cat([logit[1:] < logit[:-1], torch.ones(1, dtype=torch.bool)])  # of those with equal logits
    precision = (found / torch.arange(1, len(found) + 1))[last]
    recall = found[last] / found[-1]
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum()


def _one_label(predictions: Predictions) -> bool:
    """Whether images have one label each, or labels that are not known."""
    return predictions.label.ndim == 1 or bool((predictions.label < 0).any())
