"""Does the student say what the teacher says? Measures of the pair's predictions; no label is read.

Agreement is the first desideratum of e2KD, explanation-enhanced knowledge distillation (https://arxiv.org/abs/2402.03119,
section 3.2). Each applies where there is a teacher.
"""

import math

import torch
from torch import Tensor

from hansfree.core import Predictions
from hansfree.metrics.measure import Measure, Sums, mean_of


@Measure
def agreement(predictions: Predictions) -> Sums | None:
    """The share of samples for which student and teacher have the same highest logit.

    Formula. (1/n) sum_i [argmax s_i = argmax t_i]
    Source. e2KD, eq. 4, https://arxiv.org/abs/2402.03119
    """
    return _top(predictions, 1)


@Measure
def agreement_top5(predictions: Predictions) -> Sums | None:
    """The share of samples whose teacher's class is among the student's five highest logits; needs more than five.

    Formula. (1/n) sum_i [argmax t_i in top5(s_i)]
    Source. Top-5 accuracy with the teacher's classes as labels, as e2KD's code has agreement.
    """
    return None if predictions.logits.shape[1] <= 5 else _top(predictions, 5)


@Measure
def jensen_shannon(predictions: Predictions) -> Sums | None:
    """Mean Jensen-Shannon divergence of the student's and the teacher's class probabilities, in bits: in [0, 1].

    Formula. JS(p, q) = (KL(p, m) + KL(q, m)) / 2, m = (p + q) / 2, logarithms to base 2, p = softmax(s), q = softmax(t)
    Source. Lin, 1991, https://doi.org/10.1109/18.61115
    """
    if predictions.teacher_logits is None or predictions.label.ndim > 1:
        return None
    return mean_of(jensen_shannon_divergence(predictions.logits, predictions.teacher_logits))


def jensen_shannon_divergence(logits: Tensor, other: Tensor, *, base: float = 2.0) -> Tensor:
    """JS of the softmax of two logits [n, classes], [n], in units of log ``base``: at most log 2 / log base."""
    p, q = logits.double().log_softmax(1), other.double().log_softmax(1)
    middle = torch.logaddexp(p, q) - math.log(2)
    # xlogy-like: where a probability is nil, its logarithm is finite or minus infinity, and the term is nil.
    terms = p.exp() * (p - middle).nan_to_num(0.0) + q.exp() * (q - middle).nan_to_num(0.0)
    return (terms.sum(1) / 2).clamp_min(0) / math.log(base)


def _top(predictions: Predictions, k: int) -> Sums | None:
    if predictions.teacher_logits is None or predictions.label.ndim > 1:
        return None
    chosen = predictions.teacher_logits.argmax(1, keepdim=True)
    # argmax breaks ties by place and topk need not.
    highest = predictions.logits.argmax(1, keepdim=True) if k == 1 else predictions.logits.topk(k, 1).indices
    return mean_of((highest == chosen).any(1))
