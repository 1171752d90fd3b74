"""Feature distillation: the student matches the teacher's last feature map.

Formula. ``|f_T - f_S|_1 / sqrt(|f_T|_1 |f_S|_1)`` per sample (the distance of explanation distillation, eq. 6),
on the output of the last block; the teacher's last layer is copied into the student and frozen.

Source. As a rival in Bassi, Cavalli & Decherchi, 2024, https://arxiv.org/abs/2407.09788, whose published code
uses this distance; the idea of hints goes back to Romero et al., FitNets, 2015, https://arxiv.org/abs/1412.6550,
the transplanted last layer to Lee & Lee, 2023.

Deviations. Where widths differ, a trainable 1x1 convolution without bias is put behind the student's map; where
sizes differ, maps meet at the smaller one. Where a CLIP ResNet teaches, ``last_layer: head`` takes over its attention
pooling with the last layer, behind such a convolution, as the published code does.

Supervision. A teacher; no labels.

Cost. The teacher's forward pass on top of an ERM step.
"""

from typing import final

from torch import Tensor

from hansfree.core import Batch, Method, Setup
from hansfree.distances import pyramid
from hansfree.explainers import FeatureMap
from hansfree.methods.class_choice import Top
from hansfree.methods.preparation import LastLayer, Start, prepare_student


@final
class FeatureDistillation(Method):
    """Match the teacher's last feature map."""

    needs = frozenset({"teacher"})
    reads_labels = False
    multi_label = True

    def __init__(self, setup: Setup, *, last_layer: LastLayer = "copied", start: Start = "random") -> None:
        super().__init__(setup)
        prepare_student(self.student, self.teacher, last_layer=last_layer, start=start)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"feature": eq. 6 on the last feature map}``."""
        answer = self.teacher.answer(batch, FeatureMap(), Top(), {})
        features = FeatureMap()(self.student, batch.images, answer.target).map
        return {"feature": pyramid(features, answer.map, stop=1)}
