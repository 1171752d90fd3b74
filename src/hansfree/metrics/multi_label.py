"""Where an image has several labels: decisions of each class on its own, at logit 0."""

import torch

from hansfree.core import Predictions
from hansfree.metrics.measure import Measure, Sums


@Measure
def f1(predictions: Predictions) -> Sums | None:
    """Micro-averaged F1 over all decisions (image, class), yes where the logit is above 0; 0 where nothing is found.

    Formula. 2 TP / (2 TP + FP + FN)
    Source. Model guidance (Rao et al., 2023, https://arxiv.org/abs/2303.11932), which e2KD's measures follow.
    """
    if predictions.label.ndim == 1 or (predictions.label < 0).any():
        return None
    says, label = predictions.logits > 0, predictions.label > 0.5
    true, said, there = ((decision.sum(1)).double() for decision in (says & label, says, label))
    # 2 TP + FP + FN is what is said and what is there. With neither, the score counts as 0.
    return Sums(torch.stack([2 * true, said + there], 1), lambda sums: sums[..., 0] / sums[..., 1].clamp_min(1))
