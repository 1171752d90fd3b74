"""EnD: features of one bias are pushed apart, features of one class and different biases pulled together.

Formula. ``CE + alpha R_perp + beta R_par``. With g_ij the cosine of what goes into the last layer for images i and j,

    R_perp = sum_b |sum_{i<j in b} g_ij| / number of these pairs,    R_par = 1 - mean (1 + g_ij) / 2

where b are the biases of a batch, and R_par's mean is over the pairs i < j of one class and two biases. A term whose
pairs a batch lacks is 0. alpha is ``disentangling``, beta ``entangling``.

Source. Tartaglione, Barbano & Grangetto, EnD: entangling and disentangling deep representations for bias correction,
CVPR 2021, https://arxiv.org/abs/2103.02023; formulas and weights (0.1 each, on coloured digits) from the published
code.

Deviations. In the published code the network goes on with features of length 1, and the digits' network ends in tanh;
here the student stays as it is, and the terms alone see directions. Behind a ReLU these have no negative cosine, so
that R_perp can be 0 only where features of one bias share no channel. The code's R_par leaves out the half of the pairs
in which the later image has the larger bias label: an accident of their order. In validation the loss is the
cross-entropy: the terms are no means over samples.

Supervision. Bias labels of the training data. Where each class has one bias only, R_par has no pairs.

Cost. An ERM step, and a product of the batch's features with themselves.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup
from hansfree.errors import UserError
from hansfree.explainers.propagation import at_least_float32
from hansfree.methods.distiller import last_layer
from hansfree.methods.matched_layers import Watched


def disentangling_term(cosine: Float[Tensor, "b b"], bias: Int[Tensor, "b"]) -> Float[Tensor, ""]:
    """``sum_b |sum g_ij| / pairs`` over the pairs i < j that share the bias b; 0 where there are none."""
    same = (bias[:, None] == bias).triu(1)
    kind, number = bias.unique(return_inverse=True)
    sums = cosine.new_zeros(len(kind)).index_add(0, number, (cosine * same).sum(1))
    return sums.abs().sum() / same.sum().clamp(min=1)


def entangling_term(cosine: Float[Tensor, "b b"], label: Int[Tensor, "b"], bias: Int[Tensor, "b"]) -> Float[Tensor, ""]:
    """``mean (1 - g_ij) / 2`` over the pairs of one class and two biases; 0 where there are none."""
    pairs = ((label[:, None] == label) & (bias[:, None] != bias)).triu(1)
    return ((1 - cosine) / 2 * pairs).sum() / pairs.sum().clamp(min=1)


@final
class EnD(Method):
    """Disentangle features of one bias and entangle those of one class."""

    needs = frozenset({"bias"})

    def __init__(self, setup: Setup, *, disentangling: float = 0.1, entangling: float = 0.1) -> None:
        super().__init__(setup)
        if min(disentangling, entangling) < 0 or max(disentangling, entangling) == 0:
            raise UserError(
                "method.disentangling and entangling must not be negative, and not both 0, but they are "
                f"{disentangling} and {entangling}; without both the method is erm."
            )
        self.disentangling, self.entangling = disentangling, entangling

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy, "disentangling": alpha R_perp, "entangling": beta R_par}``."""
        if not self.training:
            return {"label": F.cross_entropy(self.student(batch.images), batch.label)}
        if batch.bias is None:
            raise UserError("end needs bias labels, which this benchmark does not give; choose another method.")
        watched = Watched(self.student, last=last_layer(self.student, "student"))
        seen = watched.seen(watched.model(batch.images))
        assert seen.embedding is not None
        with torch.autocast(batch.index.device.type, enabled=False):
            direction = F.normalize(at_least_float32(seen.embedding), eps=1e-12)
            cosine = direction @ direction.T
        return {
            "label": F.cross_entropy(seen.logits, batch.label),
            "disentangling": self.disentangling * disentangling_term(cosine, batch.bias),
            "entangling": self.entangling * entangling_term(cosine, batch.label, batch.bias),
        }
