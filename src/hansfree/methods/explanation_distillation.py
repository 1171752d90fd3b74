"""Explanation distillation (TEA): the student matches the teacher's explanations, and nothing else.

Formula. ``L = 1/M sum_m d(AvgPool(g_T, 2^m), AvgPool(g_S, 2^m))`` (eq. 7) with
``d(a, b) = |a - b|_1 / sqrt(|a|_1 |b|_1)`` (eq. 6), where g are the explanations of one class k for the same
image: the teacher's highest logit half of the time, else a uniformly drawn other class. LRP's epsilon is drawn
per sample and shared by teacher and student. The teacher's last layer is copied into the student and frozen.

Source. Bassi, Cavalli & Decherchi, Explanation is all you need in distillation: mitigating bias and shortcut
learning, 2024, https://arxiv.org/abs/2407.09788, sections 3.2, 3.3 and appendix A.

Deviations. Random numbers come from torch's seeded generator. The explanation starts from the logit times
|y| / (|y| + epsilon), as eq. 4 says for the output layer; the published code leaves that factor out
(``explainer.output_factor: false``). The paper states epsilon as 10^U(0.001, 0.01), its appendix as between
0.001 and 0.01, its code draws log-uniformly between the two: the latter is done here. The teacher stays in eval
mode; the published code seems to leave it in train mode (``teacher.statistics: batch``).
Where teacher and student differ in width, a trainable 1x1 convolution without bias stands before the copied
layer, as in the published code.

An extension of ours, off by default: ``match_absorbed`` counts what biases and epsilon absorb,
``A = y_k - sum(g)``, as one more entry of each map. In networks with ordinary batch norm a map does not fix its
logit, and students can match maps and be useless; with the extra entry one logit's value leaks into the loss.

Supervision. A teacher; no labels. The teacher sees the student's images unless ``teacher_input: clean``.

Cost. With LRP two to three ERM steps for the student's map and its gradient, and about one for the teacher's map;
`make bench` measures it for the demo's networks.
"""

from typing import Literal, final

from torch import Tensor

from hansfree.core import Batch, Explainer, Method, Setup
from hansfree.distances import DISTANCES, pyramid
from hansfree.errors import unknown
from hansfree.methods.class_choice import TopOrOther
from hansfree.methods.preparation import LastLayer, Start, prepare_student


@final
class ExplanationDistillation(Method):
    """Match the teacher's explanations, at several scales."""

    needs = frozenset({"teacher"})

    def __init__(
        self,
        setup: Setup,
        *,
        explainer: Explainer,
        distance: str = "normalised-l1",
        levels: Literal["code", "paper"] | int = "code",
        top_probability: float = 0.5,
        last_layer: LastLayer = "copied",
        start: Start = "random",
        match_absorbed: bool = False,
    ) -> None:
        super().__init__(setup)
        if distance not in DISTANCES:
            raise unknown("distance", distance, DISTANCES)
        self.explainer = explainer
        self.distance = DISTANCES[distance]
        self.levels: Literal["code", "paper"] | int = levels
        self.rule = TopOrOther(top_probability)
        self.match_absorbed = match_absorbed
        prepare_student(self.student, self.teacher.model, last_layer=last_layer, start=start)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"explanation": eq. 7}``."""
        draws = {**self.draws(self.explainer, batch), **self.draws(self.rule, batch)}
        answer = self.teacher.answer(batch, self.explainer, self.rule, draws)
        logits, map = self.explainer(self.student, batch.images, answer.target, draws=draws)
        extra = None
        if self.match_absorbed:
            extra = absorbed(logits, map, answer.target), absorbed(answer.logits, answer.map, answer.target)
        return {"explanation": pyramid(map, answer.map, self.distance, stop=self.levels, extra=extra)}


def absorbed(logits: Tensor, map: Tensor, target: Tensor) -> Tensor:
    """Relevance that biases and epsilon took: ``y_k - sum(map)``, [b]."""
    return logits.gather(1, target[:, None]).squeeze(1) - map.flatten(1).sum(1)
