"""Accuracies: plain, over groups, and of a student against its teacher. All are fractions in [0, 1]."""

import torch
from torch import Tensor

from hansfree.core import Predictions


def accuracy(predictions: Predictions) -> float | None:
    """The share of samples whose highest logit is the label's."""
    return _mean(_right(predictions))


def group_accuracies(predictions: Predictions) -> dict[tuple[int, int], float]:
    """Accuracy of each group (label, bias) that occurs. Empty where the bias is not known."""
    if predictions.bias is None:
        return {}
    right = _right(predictions)
    pairs = torch.stack([predictions.label, predictions.bias], 1)
    groups, member = pairs.unique(dim=0, return_inverse=True)
    hits = torch.zeros(len(groups), dtype=torch.double).index_add_(0, member, right.double())
    shares = hits / member.bincount(minlength=len(groups))
    return {(int(label), int(bias)): share.item() for (label, bias), share in zip(groups.tolist(), shares)}


def worst_group_accuracy(predictions: Predictions) -> float | None:
    """The lowest accuracy of a group (label, bias) that occurs in the split."""
    return min(group_accuracies(predictions).values(), default=None)


def group_mean_accuracy(predictions: Predictions) -> float | None:
    """The mean of the accuracies of the groups (label, bias) that occur, each counting the same."""
    shares = group_accuracies(predictions)
    return sum(shares.values()) / len(shares) if shares else None


def average_accuracy(predictions: Predictions) -> float | None:
    """Group accuracies weighted by the groups' sizes in training, as WILDS reports Waterbirds.

    Groups that training never saw weigh nothing; None where no group of the split was seen.
    """
    shares = group_accuracies(predictions)
    weights = {group: predictions.training_groups.get(group, 0) for group in shares}
    total = sum(weights.values())
    return sum(shares[group] * weight for group, weight in weights.items()) / total if total else None


def aligned_accuracy(predictions: Predictions) -> float | None:
    """Accuracy where the bias agrees with the label (attribute i belongs to class i); None if that is all or none."""
    return _partial(predictions, aligned=True)


def conflicting_accuracy(predictions: Predictions) -> float | None:
    """Accuracy where the bias disagrees with the label; None if that is all or none."""
    return _partial(predictions, aligned=False)


def agreement(predictions: Predictions) -> float | None:
    """The share of samples for which student and teacher have the same highest logit."""
    if predictions.teacher_logits is None:
        return None
    return _mean(predictions.logits.argmax(1) == predictions.teacher_logits.argmax(1))


def _right(predictions: Predictions) -> Tensor:
    return predictions.logits.argmax(1) == predictions.label


def _mean(right: Tensor) -> float | None:
    return right.double().mean().item() if len(right) else None


def _partial(predictions: Predictions, *, aligned: bool) -> float | None:
    if predictions.bias is None:
        return None
    agrees = predictions.bias == predictions.label
    return None if agrees.all() or not agrees.any() else _mean(_right(predictions)[agrees == aligned])
