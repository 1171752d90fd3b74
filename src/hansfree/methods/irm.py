"""Invariant risk minimisation (IRMv1): one classifier that is optimal in every environment at once.

Formula. ``mean_e R_e + w mean_e (d R_e(s z) / d s at s = 1)^2`` with the cross-entropy R_e of environment e, logits z
and one scale s for all classes. The derivative is ``mean_i sum_k (p_ik - [k = y_i]) z_ik``. The weight w is 1 for
``anneal_steps`` steps and ``penalty_weight`` from then on; where it is above 1 the whole loss is divided by it.

Source. Arjovsky, Bottou, Gulrajani & Lopez-Paz, Invariant risk minimization, 2019,
https://arxiv.org/abs/1907.02893, section 3.1; weight, annealing and division from the published code for coloured
digits.

Deviations. Batches instead of whole environments: R_e and its derivative are means over the samples of a batch, and
only the environments in it count; small batches make the penalty too large, by the derivative's variance. The
published code adds an L2 penalty: ``training.weight_decay``. ``environments: majority`` are two, samples that have the
most frequent bias of their class and all others, as Ahmed et al., 2021, https://openreview.net/forum?id=b9PoimzZFJ,
split their digits (by prediction; here by the known bias); ``bias`` makes one of each value. In validation the term is
``mean_e R_e`` alone and undivided, each sample weighted by its environment's training share: the penalty is no mean
over samples.

Supervision. Bias labels of the training data. Where each class has one bias there is nothing to compare, and the
method refuses.

Cost. As ERM.
"""

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup
from hansfree.errors import UserError
from hansfree.methods.groups import Groups, group_means


@final
class IRM(Method):
    """Risks whose derivative by the logits' scale vanishes in each environment."""

    needs = frozenset({"bias"})

    steps_done: Tensor

    def __init__(
        self,
        setup: Setup,
        *,
        penalty_weight: float = 10_000.0,
        anneal_steps: int = 100,
        environments: Literal["majority", "bias"] = "majority",
    ) -> None:
        super().__init__(setup)
        if penalty_weight <= 0:
            raise UserError(f"method.penalty_weight must be above 0, not {penalty_weight}; without a penalty use erm.")
        if anneal_steps < 0:
            raise UserError(f"method.anneal_steps must not be negative, as {anneal_steps} is.")
        self.penalty_weight, self.anneal_steps = penalty_weight, anneal_steps
        self.environments = Groups(setup, environments, compares=True)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": mean risk, "invariance": weighted penalty}``, both divided by the weight where it is above 1."""
        logits = self.student(batch.images)
        losses = F.cross_entropy(logits, batch.label, reduction="none")
        environment = self.environments.of_batch(batch)
        if not self.training:
            return {"label": (self.environments.weights(environment) * losses).mean()}
        risk, present = group_means(losses, environment, len(self.environments))
        slope, _ = group_means(scale_derivative(logits, batch.label), environment, len(self.environments))
        weight = self.penalty_weight if self.steps_done >= self.anneal_steps else 1.0
        there = present.sum() * max(weight, 1.0)
        return {"label": risk.sum() / there, "invariance": weight * slope.square().sum() / there}

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Count the step."""
        self.steps_done = self.steps_done + 1


def scale_derivative(logits: Tensor, label: Tensor) -> Tensor:
    """Of each sample's cross-entropy by a scale of its logits, at 1: ``sum_k p_k z_k - z_y``, [b]."""
    return (logits.softmax(1) * logits).sum(1) - logits.gather(1, label[:, None]).squeeze(1)
