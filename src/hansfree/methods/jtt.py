"""Just train twice: what a first model gets wrong weighs more for the second.

Formula. A first student is trained for T epochs by cross-entropy l; E are the training samples that it gets wrong. A
fresh student is then trained by ``lambda sum_{i in E} l_i + sum_{i not in E} l_i``. T is ``first_epochs``, lambda is
``upweight``.

Source. Liu, Haghgoo, Chen, Raghunathan, Koh, Sagawa, Liang & Finn, Just train twice: improving group robustness
without training group information, 2021, https://arxiv.org/abs/2107.09044, algorithm 1; T and lambda as for CelebA
(60 and 100 for Waterbirds, 2 and 6 for MultiNLI).

Deviations. Whether a sample is in E is what the first student said, in evaluation mode, right after the last step that
the sample took part in; the paper means the student after all T epochs, its code takes the predictions made in the
course of epoch T. ``how: sampling`` draws samples with replacement in proportion to their weight, where the published
code repeats those of E, which makes its epochs longer; ``weights`` weighs their losses, divided by the mean weight.
Where E is empty the second training is ERM's. Of several stages only the last one's checkpoints are the method's.

Supervision. No bias labels in training. The paper selects T, lambda and the epoch by the worst group, with the bias
labels of the validation data: ``selection: worst_group_val``; by average accuracy the method mostly loses its gain.

Cost. T epochs of ERM, each with one more forward pass, and then ERM's again.
"""

from collections.abc import Mapping
from typing import Literal, final

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup, Stage
from hansfree.errors import UserError
from hansfree.methods.groups import gathered, judged_logits


@final
class JTT(Method):
    """Train, and train again with more weight on what went wrong."""

    wrong: Tensor

    def __init__(
        self,
        setup: Setup,
        *,
        first_epochs: int = 1,
        upweight: float = 50.0,
        how: Literal["sampling", "weights"] = "sampling",
    ) -> None:
        super().__init__(setup)
        if first_epochs < 1:
            raise UserError(f"method.first_epochs must be at least 1, not {first_epochs}.")
        if upweight <= 1:
            raise UserError(f"method.upweight must be above 1, not {upweight}; with 1 the method is erm.")
        self.first_epochs, self.upweight, self.how = first_epochs, upweight, how
        self.register_buffer("wrong", torch.zeros(setup.samples, dtype=torch.bool))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy}``, weighted in the second training where weights and not samples are changed."""
        losses = F.cross_entropy(self.student(batch.input), batch.label, reduction="none")
        if self.training and self.how == "weights" and self.stages_done == 1:
            losses = self.weights()[batch.index] * losses
        return {"label": losses.mean()}

    def weights(self) -> Tensor:
        """Of each training sample: ``upweight`` if it was wrong, else 1, divided by their mean."""
        weights = torch.where(self.wrong, self.upweight, 1.0)
        return weights / weights.mean()

    def mined(self) -> Bool[Tensor, "samples"]:
        """E, the samples that the first student got wrong."""
        return self.wrong

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """In the first training, note who is wrong."""
        if self.stages_done == 0:
            wrong = judged_logits(self.student, batch).argmax(1) != batch.label
            self.wrong = self.wrong.index_copy(0, gathered(batch.index), gathered(wrong))

    def next_stage(self) -> Stage | None:
        """The first training, then the second."""
        if self.stages_done == 0:
            return Stage("first", overrides={"epochs": self.first_epochs})
        if self.stages_done == 1:
            return Stage("second", weights=self.weights() if self.how == "sampling" else None)
        return None

    def finish_stage(self) -> None:
        """After the first training, a fresh student."""
        super().finish_stage()
        if self.stages_done == 1:
            # From the global generator, whose state every checkpoint of the first training restores.
            self.student.load_state_dict(self._setup.student().state_dict())
