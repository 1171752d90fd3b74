"""Attention distillation: the student matches where the teacher's last feature map is active.

Formula. ``d(a_T, a_S)`` with ``a = sum_c f_c^2`` (eq. 1), f the output of the last block, and d the distance of
explanation distillation (eq. 6); the teacher's last layer is copied into the student and frozen.

Source. Zagoruyko & Komodakis, Paying more attention to attention, 2016, https://arxiv.org/abs/1612.03928 (the
map); Bassi, Cavalli & Decherchi, 2024, https://arxiv.org/abs/2407.09788, section 3.3 (the distance and the
copied layer). Where a CLIP teaches, that paper distils attention by DL-DL: dl-dl with ``explainer: {name: attention}``.

Deviations. As in feature distillation. One class plays no part: a map says where a network is active, not for
what. Where the last map is 1 x 1 there is nothing to match, and the method refuses.

Supervision. A teacher; no labels.

Cost. The teacher's forward pass on top of an ERM step.
"""

from typing import final

from torch import Tensor

from hansfree.core import Batch, Method, Setup
from hansfree.distances import pyramid
from hansfree.errors import NotGivenError
from hansfree.explainers import Attention
from hansfree.methods.class_choice import Top
from hansfree.methods.preparation import LastLayer, Start, prepare_student

ONE_PIXEL = "needs a feature map larger than 1 x 1"
"""Why tables say N/A."""


@final
class AttentionDistillation(Method):
    """Match where the teacher's last feature map is active."""

    needs = frozenset({"teacher"})
    reads_labels = False
    multi_label = True

    def __init__(self, setup: Setup, *, last_layer: LastLayer = "copied", start: Start = "random") -> None:
        super().__init__(setup)
        prepare_student(self.student, self.teacher, last_layer=last_layer, start=start)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"attention": eq. 6 on the attention maps}``."""
        answer = self.teacher.answer(batch, Attention(), Top(), {})
        attention = Attention()(self.student, batch.images, answer.target).map
        if attention.shape[-2:].numel() == 1 or answer.map.shape[-2:].numel() == 1:
            raise NotGivenError(
                "attention-distillation needs a last feature map larger than 1 x 1, which this network does not have "
                "at this image size; use `stem: small` or another method.",
                ONE_PIXEL,
            )
        return {"attention": pyramid(attention, answer.map, stop=1)}
