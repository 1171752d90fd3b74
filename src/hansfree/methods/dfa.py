"""Disentangled feature augmentation: two encoders, one of them biased, whose features are swapped between images.

Formula. Encoders E_i (intrinsic) and E_b (biased) give features z_i and z_b; heads C_i and C_b are linear in both,
``C([z_i, z_b])``, but C_i's loss never reaches E_b, nor C_b's E_i. With W the relative difficulty of lff,

    mean W CE(C_i(z), y) + a mean GCE(C_b(z), y) + s [mean W CE(C_i(z~), y) + a~ mean GCE(C_b(z~), y~)]

where z~ is z_i with the z_b of another image of the batch, whose label is y~; the bracket begins after
``swap_after`` steps. a is ``biased_weight``, a~ ``swapped_biased_weight``, s ``swap_weight``. C_i(z) is judged.

Source. Lee, Kim, Lee, Lee & Choo, Learning debiased representation via disentangled feature augmentation, NeurIPS
2021, https://arxiv.org/abs/2107.01372, equations 1 to 4 and algorithm 1; weights as for coloured digits (1 to 5 for
corrupted CIFAR-10, 2 and a swap weight of 0.1 for BFFHQ), ``loss_decay`` and q from the published code.

Deviations. A head on both features is written as the student's own last layer on z_i plus a matrix on z_b (``C_i``; the
other way round ``C_b``): the same function, started a little differently. So an exported student, its explanations
and heatmaps show the intrinsic half alone, without what z_b adds to the logits that are judged. Any network can be
the encoder; the paper's for digits has 16 features. ``swap_after`` is 0 as in the code; the paper's commands set
10,000 of 50,000 steps, and with that a run of fewer steps would never swap: set a fifth of a run's. The published code
halves the learning rate from then on (``training.schedule``). In validation the term is lff's, without swaps.

Supervision. Labels.

Cost. Two networks: twice an ERM step. Two numbers and a label per training sample in each checkpoint.
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup, Stage
from hansfree.errors import UserError
from hansfree.methods.distiller import last_layer
from hansfree.methods.gce import check_q, generalised_cross_entropy
from hansfree.methods.matched_layers import Seen, Watched
from hansfree.methods.relative_difficulty import RelativeDifficulty, relative_difficulty
from hansfree.methods.review_kd import width_of
from hansfree.methods.second_network import side_by_side


@final
class DFA(Method):
    """Swap the features of a biased encoder between images."""

    steps_done: Tensor

    def __init__(
        self,
        setup: Setup,
        *,
        q: float = 0.7,
        loss_decay: float = 0.7,
        biased_weight: float = 10.0,
        swap_weight: float = 1.0,
        swapped_biased_weight: float = 10.0,
        swap_after: int = 0,
    ) -> None:
        super().__init__(setup)
        check_q(q)
        if min(biased_weight, swap_weight, swapped_biased_weight) <= 0 or swap_after < 0:
            raise UserError(
                "method.biased_weight, swap_weight and swapped_biased_weight must be above 0 and swap_after not "
                f"negative, but they are {biased_weight}, {swap_weight}, {swapped_biased_weight} and {swap_after}; "
                "lff is the method without swapped features."
            )
        self.q, self.swap_after = q, swap_after
        self.biased_weight, self.swap_weight = biased_weight, swap_weight
        self.swapped_biased_weight = swapped_biased_weight
        self.biased = setup.student()
        width = width_of(last_layer(self.student, "student"))
        self.student_of_biased = nn.Linear(width, setup.classes, bias=False)
        self.biased_of_student = nn.Linear(width, setup.classes, bias=False)
        self.difficulty = RelativeDifficulty(setup, loss_decay)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        self._fresh: Tensor | None = None

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label", "biased"}``, and ``{"swapped", "swapped biased"}`` from ``swap_after`` steps on."""
        ours, theirs = _seen(self.student, batch.images), _seen(self.biased, batch.images)
        logits, biased = self._heads(ours, theirs, torch.arange(len(batch)))
        losses = F.cross_entropy(logits, batch.label, reduction="none")
        both = torch.stack([F.cross_entropy(biased, batch.label, reduction="none"), losses]).detach()
        if not self.training:
            return {"label": (relative_difficulty(both[0], both[1]) * losses).mean()}
        self._fresh = both
        weight = self.difficulty.weights(batch, both)
        gce = generalised_cross_entropy(biased, batch.label, self.q)
        terms = {"label": (weight * losses).mean(), "biased": self.biased_weight * gce.mean()}
        return terms if self.steps_done < self.swap_after else terms | self._swapped(batch, ours, theirs, weight)

    def _heads(self, ours: Seen, theirs: Seen, partner: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of C_i and C_b for the features of each image and the biased features of its ``partner``."""
        assert ours.embedding is not None and theirs.embedding is not None
        intrinsic = ours.logits + self.student_of_biased(theirs.embedding[partner].detach())
        biased = theirs.logits[partner] + self.biased_of_student(ours.embedding.detach())
        return intrinsic.float(), biased.float()

    def _swapped(self, batch: Batch, ours: Seen, theirs: Seen, weight: Tensor) -> dict[str, Tensor]:
        partner = torch.randperm(len(batch))
        logits, biased = self._heads(ours, theirs, partner)
        losses = F.cross_entropy(logits, batch.label, reduction="none")
        gce = generalised_cross_entropy(biased, batch.label[partner], self.q)
        return {
            "swapped": self.swap_weight * (weight * losses).mean(),
            "swapped biased": self.swap_weight * self.swapped_biased_weight * gce.mean(),
        }

    def predict(self, input: Tensor) -> Tensor:
        """C_i's logits, [b, classes], of both features."""
        ours, theirs = _seen(self.student, input), _seen(self.biased, input)
        return self._heads(ours, theirs, torch.arange(len(input)))[0]

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Average the step's losses, and count the step."""
        if self._fresh is not None:
            self.difficulty.remember(batch, self._fresh)
        self._fresh = None
        self.steps_done = self.steps_done + 1

    def next_stage(self) -> Stage | None:
        """One stage, the two networks with their heads clipped apart."""
        return side_by_side(self, self.biased, self.biased_of_student)


def _seen(model: nn.Module, images: Tensor) -> Seen:
    watched = Watched(model, last=last_layer(model, "student"))
    return watched.seen(watched.model(images))
