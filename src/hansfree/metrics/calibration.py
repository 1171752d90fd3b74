"""Does a model's confidence tell how often it is right? p = softmax(logits); labels that are not known are left out.

Expected calibration error depends on its bins and cannot be negative, so that noise raises it: the fewer the samples,
the more. The proper scores beside it have neither flaw.
"""

import torch
import torch.nn.functional as F

from hansfree.core import Predictions
from hansfree.metrics.accuracy import right_of
from hansfree.metrics.measure import Measure, Sums, mean_of

BINS = 15


@Measure
def ece(predictions: Predictions) -> Sums | None:
    """Expected calibration error of the highest probability, in 15 bins of equal width, open below and closed above.

    Formula. sum_b (n_b / n) |acc_b - conf_b|, b: conf in ((b - 1)/15, b/15]
    Source. Naeini et al., 2015, https://doi.org/10.1609/aaai.v29i1.9602; Guo et al., 2017, https://arxiv.org/abs/1706.04599
    """
    return calibration_error(predictions, BINS)


def calibration_error(predictions: Predictions, bins: int) -> Sums | None:
    """:func:`ece` with any number of bins."""
    right = right_of(predictions)
    if right is None:
        return None
    confidence = predictions.logits.double().softmax(1).amax(1)
    known = ~right.isnan()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.where(known, right - confidence, 0.0)
    parts = torch.cat([F.one_hot(place, bins) * gap[:, None], known[:, None].double()], 1)
    return Sums(parts, lambda sums: sums[..., :-1].abs().sum(-1) / sums[..., -1], "basic")


@Measure
def brier(predictions: Predictions) -> Sums | None:
    """Brier score: the squared distance of the probabilities from the label's, over all classes, in [0, 2].

    Formula. (1/n) sum_i sum_k (p_ik - [y_i = k])^2
    Source. Brier, 1950, https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2
    """
    return _scored(predictions, lambda p, label: (p.exp() - F.one_hot(label, p.shape[1])).square().sum(1))


@Measure
def nll(predictions: Predictions) -> Sums | None:
    """Negative log-likelihood of the labels, in nats.

    Formula. -(1/n) sum_i ln p_i,y_i
    Source. The usual definition: the mean cross-entropy.
    """
    return _scored(predictions, lambda p, label: -p.gather(1, label[:, None])[:, 0])


def _scored(predictions: Predictions, score) -> Sums | None:
    if predictions.label.ndim > 1:
        return None
    scores = score(predictions.logits.double().log_softmax(1), predictions.label.clamp_min(0))
    return mean_of(scores.where(predictions.label >= 0, torch.nan))
