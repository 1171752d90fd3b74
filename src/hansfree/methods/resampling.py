"""Balancing: every group, or every class, counts the same.

Formula. ``mean_g mean_{i in g} l_i`` with the cross-entropy l. ``resampling`` draws training samples, with
replacement, in proportion to ``1 / n_g`` with the n_g samples of their group; ``reweighting`` takes every sample once
an epoch and multiplies its loss by ``n / (groups n_g)``. Groups are pairs (label, bias); ``class-resampling`` and
``class-reweighting`` take the label alone.

Source. The oldest remedies there are; as baselines of group robustness in Sagawa et al., 2020,
https://arxiv.org/abs/1911.08731, and Idrissi et al., Simple data balancing achieves competitive worst-group-accuracy,
2022, https://arxiv.org/abs/2110.14503 (SUBG, RWG, SUBY, RWY are the same four, with subsets in place of resampling).

Deviations. Weights are not normalised over a batch, so that their mean is 1 over the training data rather than in each
batch. ``groups: label-majority`` tells within a class only the samples with its most frequent bias from the others,
which helps where most pairs are rare. Validation weights each sample as ``reweighting`` does, for all four; pairs that
training never saw count 0 there.

Supervision. Bias labels of the training data; none for the two that balance classes.

Cost. As ERM.
"""

from typing import Literal, final

from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup, Stage
from hansfree.methods.groups import Groups, balanced_stage

Pairs = Literal["label-bias", "label-majority"]


def weighted(method: Method, groups: Groups, batch: Batch) -> dict[str, Tensor]:
    """``{"label": cross-entropy, weighted so that groups count the same}``."""
    losses = F.cross_entropy(method.student(batch.input), batch.label, reduction="none")
    return {"label": (groups.weights(groups.of_batch(batch)) * losses).mean()}


def resampled(method: Method, groups: Groups, batch: Batch) -> dict[str, Tensor]:
    """``{"label": cross-entropy}`` of batches that are balanced already; weighted in validation, where they are not."""
    if not method.training:
        return weighted(method, groups, batch)
    return {"label": F.cross_entropy(method.student(batch.input), batch.label)}


@final
class Resampling(Method):
    """Batches in which each pair of label and bias is equally frequent."""

    needs = frozenset({"bias"})

    def __init__(self, setup: Setup, *, groups: Pairs = "label-bias") -> None:
        super().__init__(setup)
        self.groups = Groups(setup, groups)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy}``."""
        return resampled(self, self.groups, batch)

    def next_stage(self) -> Stage | None:
        """One stage, its batches drawn balanced over groups."""
        return balanced_stage(self, self.groups)


@final
class Reweighting(Method):
    """Losses weighted so that each pair of label and bias counts the same."""

    needs = frozenset({"bias"})

    def __init__(self, setup: Setup, *, groups: Pairs = "label-bias") -> None:
        super().__init__(setup)
        self.groups = Groups(setup, groups)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": weighted cross-entropy}``."""
        return weighted(self, self.groups, batch)


@final
class ClassResampling(Method):
    """Batches in which each class is equally frequent."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.groups = Groups(setup, "label")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy}``."""
        return resampled(self, self.groups, batch)

    def next_stage(self) -> Stage | None:
        """One stage, its batches drawn balanced over classes."""
        return balanced_stage(self, self.groups)


@final
class ClassReweighting(Method):
    """Losses weighted so that each class counts the same."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.groups = Groups(setup, "label")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": weighted cross-entropy}``."""
        return weighted(self, self.groups, batch)
