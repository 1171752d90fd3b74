"""Predictive group invariance: within each class, the minority is predicted like the majority on average.

Formula. ``(R_0 + R_1) / 2 + w sum_c mean_k p1_ck log(p1_ck / p0_ck)`` with the cross-entropies R_0 of the majority and
R_1 of the minority, and p0_c and p1_c the mean predicted distributions of the samples of class c in either. A sample
belongs to the majority if it has the most frequent bias of its class. The second term trains the features only, not
the last layer. Its weight w is 0 for ``start`` epochs and then rises to ``weight`` over ``ramp`` epochs.

Source. Ahmed, Bengio, van Seijen & Courville, Systematic generalisation with group invariant predictions, ICLR 2021,
https://openreview.net/forum?id=b9PoimzZFJ; direction, mean over classes k, ramp and defaults from the published code
for coloured digits. Its numbers are the starred rows in Bassi, Cavalli & Decherchi, 2024.

Deviations. Groups come from the known bias; the paper infers them, after one epoch, from what a partition predictor
finds hardest for an invariant classifier. Epochs are counted by samples seen. In validation the term is the first one
alone, each sample weighted by its group's training share: the second is no mean over samples. The published code adds
an L2 penalty of 1e-4: ``training.weight_decay``.

Supervision. Bias labels of the training data. Where no class has a minority the method refuses.

Cost. As ERM; the last layer runs twice.
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Classifier, Method, Setup
from hansfree.errors import UserError
from hansfree.methods.groups import Groups, gathered, group_means


@final
class PGI(Method):
    """Equal mean predictions of the majority and the minority of each class."""

    needs = frozenset({"bias"})

    samples_seen: Tensor

    def __init__(self, setup: Setup, *, weight: float = 50.0, start: float = 1.0, ramp: float = 5.0) -> None:
        super().__init__(setup)
        if weight <= 0:
            raise UserError(f"method.weight must be above 0, not {weight}; without the second term use reweighting.")
        if min(start, ramp) < 0:
            raise UserError(f"method.start and method.ramp must not be negative, but are {start} and {ramp}.")
        if not isinstance(self.student, Classifier):
            raise UserError("pgi needs a student made by load_model, whose last layer it can tell from the features.")
        self.weight, self.start, self.ramp = weight, start, ramp
        self.groups = Groups(setup, "majority", compares=True)
        self.register_buffer("samples_seen", torch.zeros((), dtype=torch.long))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": balanced cross-entropy, "invariance": weighted divergence}``."""
        student, group = self.student, self.groups.of_batch(batch)
        assert isinstance(student, Classifier)
        features = student.forward_features(batch.images)
        losses = F.cross_entropy(student.forward_head(features), batch.label, reduction="none")
        if not self.training:
            return {"label": (self.groups.weights(group) * losses).mean()}
        means, _ = group_means(losses, group, len(self.groups))
        predicted = logits_of_fixed_last_layer(student, features).softmax(1)
        invariance = divergence(predicted, batch.label, group)
        return {"label": means.mean(), "invariance": self._weight() * invariance}

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Count the samples of all processes."""
        self.samples_seen = self.samples_seen + len(gathered(batch.index))

    def _weight(self) -> float:
        after_start = int(self.samples_seen) / self._setup.samples - self.start
        if after_start < 0:
            return 0.0
        return self.weight * (min(1.0, after_start / self.ramp) if self.ramp > 0 else 1.0)


def divergence(predicted: Tensor, label: Tensor, group: Tensor) -> Tensor:
    """``sum_c mean_k p1 log(p1 / p0)`` over the classes of which the batch holds both groups."""
    classes = predicted.shape[1]
    cell = torch.where(group < 0, -1, 2 * label + group)
    member = (cell == torch.arange(2 * classes, device=cell.device)[:, None]).to(predicted.dtype)
    size = member.sum(1)
    mean = (member @ predicted / size.clamp(min=1)[:, None]).view(classes, 2, classes).clamp(1e-12, 1)
    both = (size.view(classes, 2) > 0).all(1)
    majority, minority = mean.unbind(1)
    return torch.where(both, (minority * (minority / majority).log()).mean(1), 0.0).sum()


class _Head(nn.Module):
    """What turns features into logits, as a module of its own."""

    def __init__(self, student: Classifier) -> None:
        super().__init__()
        self.student = student

    def forward(self, features: Tensor) -> Tensor:
        return self.student.forward_head(features)


def logits_of_fixed_last_layer(student: Classifier, features: Tensor) -> Tensor:
    """Logits whose gradient reaches the features and passes by the last layer's own weights."""
    head, last = _Head(student), {id(p) for p in student.get_classifier().parameters()}
    fixed = {name: p.detach() for name, p in head.named_parameters() if id(p) in last}
    return torch.func.functional_call(head, fixed, (features,))
