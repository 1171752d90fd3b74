"""How much harder a sample is for a biased network than for the other: what lff and dfa weigh samples by."""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hansfree.core import Batch, Setup
from hansfree.errors import UserError
from hansfree.methods.groups import gathered


def relative_difficulty(biased: Float[Tensor, "b"], debiased: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """``l_B / (l_B + l_D)`` of two losses of each sample: near 1 where only the biased network finds it hard."""
    return biased / (biased + debiased + 1e-8)


@final
class RelativeDifficulty(nn.Module):
    """The relative difficulty of training samples, from running averages of their losses.

    An average is ``decay`` times itself plus ``1 - decay`` times the new loss, and the first loss at first. It is
    divided by the largest of its class. Nam et al., 2020, section 3.2, as in their code.
    """

    averages: Tensor
    """Of each training sample's loss: row 0 the biased network's, row 1 the other's."""
    label: Tensor
    """-1 until a sample is seen."""

    def __init__(self, setup: Setup, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"method.loss_decay must be 0 or above and below 1, not {decay}.")
        self.decay, self.classes = decay, setup.classes
        self.register_buffer("averages", torch.zeros(2, setup.samples))
        self.register_buffer("label", torch.full((setup.samples,), -1))

    def weights(self, batch: Batch, losses: Float[Tensor, "2 b"]) -> Float[Tensor, "b"]:
        """The relative difficulty of a batch's samples, its losses counted in but not remembered."""
        averages, label = self._with(batch.index, batch.label, losses)
        largest = averages.new_zeros(2, self.classes)
        largest = largest.scatter_reduce(1, label.clamp(min=0).expand(2, -1), averages, "amax")  # unseen ones are 0
        # A class that no longer has any loss should weigh nothing rather than divide by zero.
        shares = averages[:, batch.index] / largest[:, batch.label].clamp(min=1e-8)
        return relative_difficulty(shares[0], shares[1])

    @torch.no_grad()
    def remember(self, batch: Batch, losses: Float[Tensor, "2 b"]) -> None:
        """Count in the losses of a step, those of all processes."""
        self.averages, self.label = self._with(gathered(batch.index), gathered(batch.label), gathered(losses.T).T)

    def _with(self, index: Int[Tensor, "b"], label: Int[Tensor, "b"], losses: Tensor) -> tuple[Tensor, Tensor]:
        averaged = self.decay * self.averages[:, index] + (1 - self.decay) * losses
        new = torch.where(self.label[index] < 0, losses, averaged)
        return self.averages.index_copy(1, index, new), self.label.index_copy(0, index, label)
