"""Group DRO: the loss of the worst group, by weights that follow the groups' losses.

Formula. ``sum_g q_g mean_{i in g} l_i`` with the cross-entropy l and groups g = (label, bias); after each step
``q_g <- q_g exp(eta (l_g + C / sqrt(n_g)))`` for the groups of the batch, and q is normalised to the sum 1. Eta is
``step_size``, C is ``size_adjustment``, n_g the training samples of the group. Batches are drawn balanced over groups.

Source. Sagawa, Koh, Hashimoto & Liang, Distributionally robust neural networks for group shifts, 2020,
https://arxiv.org/abs/1911.08731, algorithm 1 and section 3.3; defaults from the published code.

Deviations. The weights move by the losses that the model has in evaluation mode after the step, the paper's by those
before it. A group that is absent from a batch keeps its weight up to the normalisation, as in algorithm 1; in the
published code it counts with the loss 0. ``groups: label-majority`` tells within a class only the samples with its
most frequent bias from the others, which helps where most pairs are rare. In validation each sample has the weight
q_g / share_g, the same sum without a need to hold the groups in every batch. The paper adds a strong weight decay:
``training.weight_decay``.

Supervision. Bias labels of the training data. Where each class has one bias only, groups are classes and the method
refuses. The paper selects by the worst group (``selection: worst_group_val``).

Cost. One more forward pass than ERM, for the group weights.
"""

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup, Stage
from hansfree.errors import UserError
from hansfree.methods.groups import Groups, balanced_stage, gathered, group_means, judged_logits


@final
class GroupDRO(Method):
    """The worst group's loss, by exponentiated group weights."""

    needs = frozenset({"bias"})

    group_weights: Tensor

    def __init__(
        self,
        setup: Setup,
        *,
        step_size: float = 0.01,
        size_adjustment: float = 0.0,
        groups: Literal["label-bias", "label-majority"] = "label-bias",
        balanced_batches: bool = True,
    ) -> None:
        super().__init__(setup)
        if step_size <= 0:
            raise UserError(f"method.step_size must be above 0, not {step_size}.")
        if size_adjustment < 0:
            raise UserError(f"method.size_adjustment must not be negative, as {size_adjustment} is.")
        self.step_size, self.size_adjustment, self.balanced_batches = step_size, size_adjustment, balanced_batches
        self.groups = Groups(setup, groups, compares=True)
        count = self.groups.count
        self.register_buffer("group_weights", torch.full_like(count, 1 / max(1, len(count))))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": sum over groups of q_g times its mean cross-entropy}``."""
        losses = F.cross_entropy(self.student(batch.input), batch.label, reduction="none")
        group = self.groups.of_batch(batch)
        if not self.training:
            return {"label": (self.groups.weights(group, self.group_weights) * losses).mean()}
        means, _ = group_means(losses, group, len(self.groups))
        return {"label": (self.group_weights * means).sum()}

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Move the weights towards the groups with the largest losses."""
        losses = F.cross_entropy(judged_logits(self.student, batch).float(), batch.label, reduction="none")
        means, present = group_means(gathered(losses), gathered(self.groups.of_batch(batch)), len(self.groups))
        gain = means + self.size_adjustment / self.groups.count.sqrt()
        grown = self.group_weights * torch.where(present, self.step_size * gain, 0.0).exp()
        self.group_weights = grown / grown.sum()

    def next_stage(self) -> Stage | None:
        """One stage, its batches drawn balanced over groups."""
        return balanced_stage(self, self.groups) if self.balanced_batches else super().next_stage()
