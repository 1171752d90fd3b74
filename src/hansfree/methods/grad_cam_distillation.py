"""Grad-CAM distillation: the student matches the teacher's Grad-CAM heatmaps.

Formula. ``d(e_T, e_S)`` (eq. 6 of explanation distillation) with ``e = ReLU(sum_c mean_hw(dy_k / df_c) f_c)``,
f the last feature map, at its own size; k is the teacher's highest logit half of the time, else a uniformly drawn
other class. The teacher's last layer is copied into the student and frozen.

Source. Selvaraju et al., Grad-CAM, 2017, https://arxiv.org/abs/1610.02391 (the map); Bassi, Cavalli & Decherchi,
2024, https://arxiv.org/abs/2407.09788, sections 3.1 and 3.3 (the distillation).

Deviations. One scale, as in the published code; the text refers to the pyramid (eq. 7), for which the last map has
no room. Where sizes differ, maps meet at the smaller one; the code needs equal sizes. Where the last feature map is
1 x 1 there is no heatmap, the paper's N/A: what is compared then is the last map of more than one pixel, and a
``layer`` (a path that exists in both networks) whose map is 1 x 1 is refused. For enlarged maps, other distances or
no ReLU use explanation-distillation with ``explainer: {name: grad-cam}``.

Supervision. A teacher; no labels.

Cost. A teacher's forward pass, and backward passes from the logits to the feature maps, on top of an ERM step.
"""

from typing import final

from torch import Tensor

from hansfree.core import Batch, Method, Setup
from hansfree.errors import NotGivenError
from hansfree.explainers import GradCAM
from hansfree.methods.attention_distillation import ONE_PIXEL
from hansfree.methods.class_choice import TopOrOther
from hansfree.methods.explanation_distillation import Comparison
from hansfree.methods.preparation import LastLayer, Start, prepare_student


@final
class GradCAMDistillation(Method):
    """Match the teacher's Grad-CAM heatmaps."""

    needs = frozenset({"teacher"})
    reads_labels = False

    def __init__(
        self,
        setup: Setup,
        *,
        layer: str | None = None,
        top_probability: float = 0.5,
        last_layer: LastLayer = "copied",
        start: Start = "random",
    ) -> None:
        super().__init__(setup)
        self.rule = TopOrOther(top_probability)
        self.compare = Comparison(GradCAM(layer), self.rule, levels=1)
        prepare_student(self.student, self.teacher, last_layer=last_layer, start=start)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"grad-cam": eq. 6 on the heatmaps}``."""
        found = self.compare(self, self.student, batch)
        if 1 in (found.student.map.shape[-2:].numel(), found.teacher.map.shape[-2:].numel()):
            raise NotGivenError(
                "grad-cam-distillation needs heatmaps larger than 1 x 1, which this layer does not give at this image "
                "size; name another layer, or leave `layer` out.",
                ONE_PIXEL,
            )
        return {"grad-cam": found.loss}
