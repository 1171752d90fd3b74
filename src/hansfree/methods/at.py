"""Attention transfer: the student's stages are active where the teacher's are.

Formula. ``L = weight * sum_j mean_p (a_S,j(p) - a_T,j(p))^2 + label_weight * CE(s, y)``, means over samples and, in
the sum over pairs of layers j, over pixels p, with ``a = m / |m|_2`` and ``m(p) = mean_c f_c(p)^2``. Feature maps f of
different size are average-pooled to the smaller one first. ``output_weight`` adds kd's term, at ``output_temperature``.

Source. Zagoruyko & Komodakis, Paying more attention to attention, 2017, https://arxiv.org/abs/1612.03928, eq. 1 and 2.
As a rival of e2KD: Parchami-Araghi et al., 2024, https://arxiv.org/abs/2402.03119, with labels, as here by default
(``label_weight: 0`` is without).

Deviations. Eq. 2 has the norm of the difference, not squared; the weight of 1000 that everybody uses belongs to the
mean of squares of the published code, which is what is done here. Layers are found (the last feature map of each of
the four smallest resolutions; the last is paired with the last, the one before with the one before) or named. B-cos
networks have no ReLU: what is negative in their maps is cut off first, as in e2KD's published code.

Supervision. A teacher; labels unless label_weight is 0.

Cost. The teacher's forward pass on top of an ERM step; maps of the matched layers stay in memory. 1.7 ERM steps where
kd takes 1.6.
"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Classifier, Setup
from hansfree.explainers.propagation import at_least_float32
from hansfree.methods.distiller import Distiller, Paths, check_weight
from hansfree.methods.matched_layers import Seen


def attention_transfer(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b d h2 w2"]) -> Float[Tensor, ""]:
    """Mean squared difference of the two normalised attention maps, at the smaller size of the two."""
    size = min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1])
    return F.mse_loss(_attention(student, size), _attention(teacher, size))


def _attention(features: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b pixels"]:
    if features.shape[-2:] != size:  # torch pools, slowly, where there is nothing to pool too
        features = F.adaptive_avg_pool2d(features, size)
    return F.normalize(at_least_float32(features).square().mean(1).flatten(1))


def active(model: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """Feature maps as they count here: those of B-cos networks without what is negative."""
    is_bcos = isinstance(model, Classifier) and model.encoding == "six-channels"
    return [map.relu() if is_bcos else map for map in maps]


@final
class AT(Distiller):
    """Match where the teacher's stages are active."""

    def __init__(
        self,
        setup: Setup,
        *,
        weight: float = 1000.0,
        label_weight: float = 1.0,
        output_weight: float = 0.0,
        output_temperature: float = 4.0,
        student_layers: Paths = None,
        teacher_layers: Paths = None,
    ) -> None:
        super().__init__(
            setup, label_weight=label_weight, output_weight=output_weight, output_temperature=output_temperature
        )
        check_weight(weight)
        self.weight = weight
        self.match(student_layers, teacher_layers)

    def terms(self, batch: Batch, ours: Seen, theirs: Seen) -> dict[str, Tensor]:
        """``{"attention": weight * sum over layers}`` and, where they have a weight, ``"output"`` and ``"label"``."""
        pairs = zip(active(self.student, ours.maps), active(self.teacher.model, theirs.maps), strict=True)
        attention = torch.stack([attention_transfer(s, t) for s, t in pairs]).sum()
        return {"attention": self.weight * attention, **self.logit_terms(batch, ours.logits, theirs.logits)}
