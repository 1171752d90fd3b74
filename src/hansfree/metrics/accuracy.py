"""Accuracies: plain and over groups. All are fractions in [0, 1].

Each is over the samples whose label is known, and does not apply where an image has several labels.
"""

import torch
from torch import Tensor

from hansfree.core import Predictions
from hansfree.metrics.measure import Measure, Sums, mean_of

Group = tuple[int, int]
"""A class and a value of the bias."""


@Measure
def accuracy(predictions: Predictions) -> Sums | None:
    """The share of samples whose highest logit is the label's.

    Formula. (1/n) sum_i [argmax s_i = y_i]
    Source. The usual definition.
    """
    right = right_of(predictions)
    return None if right is None else mean_of(right)


@Measure
def worst_group_accuracy(predictions: Predictions) -> Sums | None:
    """The lowest accuracy of a group (label, bias) that occurs in the split.

    Formula. min_g acc_g
    Source. Sagawa et al., 2020, https://arxiv.org/abs/1911.08731
    """
    found = _hits_by_group(predictions)
    return found and Sums(found[1], lambda sums: _shares(sums).nan_to_num(torch.inf).amin(-1), "basic")


@Measure
def group_mean_accuracy(predictions: Predictions) -> Sums | None:
    """The mean of the accuracies of the groups (label, bias) that occur, each counting the same.

    Formula. (1/G) sum_g acc_g
    Source. The usual definition of a macro average.
    """
    found = _hits_by_group(predictions)
    return found and Sums(found[1], lambda sums: _shares(sums).nanmean(-1))


@Measure
def average_accuracy(predictions: Predictions) -> Sums | None:
    """Group accuracies weighted by the groups' sizes in training, as WILDS reports Waterbirds.

    Groups that training never saw weigh nothing; None where no group of the split was seen.

    Formula. sum_g n_g acc_g / sum_g n_g, n_g: samples of group g in training
    Source. Sagawa et al., 2020, https://arxiv.org/abs/1911.08731; Koh et al., 2021, https://arxiv.org/abs/2012.07421
    """
    found = _hits_by_group(predictions)
    if found is None:
        return None
    groups, parts = found
    weights = parts.new_tensor([predictions.training_groups.get(group, 0) for group in groups])

    def combine(sums: Tensor) -> Tensor:
        shares = _shares(sums)
        return (weights * shares).nansum(-1) / (weights * ~shares.isnan()).sum(-1)

    return Sums(parts, combine)


@Measure
def aligned_accuracy(predictions: Predictions) -> Sums | None:
    """Accuracy where the bias agrees with the label (attribute i belongs to class i); None if that is all or none.

    Formula. acc over the samples with a_i = y_i
    Source. Nam et al., 2020, https://arxiv.org/abs/2007.02561
    """
    return _partial(predictions, aligned=True)


@Measure
def conflicting_accuracy(predictions: Predictions) -> Sums | None:
    """Accuracy where the bias disagrees with the label; None if that is all or none.

    Formula. acc over the samples with a_i != y_i
    Source. Nam et al., 2020, https://arxiv.org/abs/2007.02561
    """
    return _partial(predictions, aligned=False)


def group_accuracies(predictions: Predictions) -> dict[Group, float]:
    """Accuracy of each group (label, bias) that occurs. Empty where the bias is not known."""
    found = _hits_by_group(predictions)
    return {} if found is None else dict(zip(found[0], _shares(found[1].sum(0)).tolist()))


def right_of(predictions: Predictions) -> Tensor | None:
    """1 or 0 a sample, not a number where its label is not known; None where samples have several labels."""
    if predictions.label.ndim > 1:
        return None
    right = (predictions.logits.argmax(1) == predictions.label).double()
    return right.where(predictions.label >= 0, torch.nan)


def members(predictions: Predictions) -> tuple[list[Group], Tensor] | None:
    """The groups that occur, and the number of each sample's, [n]; None where bias or labels are not known."""
    if predictions.bias is None or predictions.label.ndim > 1 or len(predictions.label) == 0:
        return None
    if (predictions.label < 0).any():
        return None
    pairs = torch.stack([predictions.label, predictions.bias], 1)
    groups, member = pairs.unique(dim=0, return_inverse=True)
    return [(int(label), int(bias)) for label, bias in groups.tolist()], member


def _hits_by_group(predictions: Predictions) -> tuple[list[Group], Tensor] | None:
    """The groups that occur, and each sample's parts: a hit in its group, and its presence there, [n, 2 groups]."""
    found, right = members(predictions), right_of(predictions)
    if found is None or right is None:
        return None
    groups, member = found
    present = torch.nn.functional.one_hot(member, len(groups)).double()
    return groups, torch.cat([present * right[:, None], present], 1)


def _shares(sums: Tensor) -> Tensor:
    """Accuracy by group, not a number where a group does not occur."""
    hits, present = sums.chunk(2, -1)
    return hits / present


def _partial(predictions: Predictions, *, aligned: bool) -> Sums | None:
    right = right_of(predictions)
    if predictions.bias is None or right is None:
        return None
    agrees = predictions.bias == predictions.label
    return None if agrees.all() or not agrees.any() else mean_of(right.where(agrees == aligned, torch.nan))
