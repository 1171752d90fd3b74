"""Explanation distillation (TEA): the student matches the teacher's explanations, and nothing else.

Formula. ``L = 1/M sum_m d(AvgPool(g_T, 2^m), AvgPool(g_S, 2^m))`` (eq. 7) with
``d(a, b) = |a - b|_1 / sqrt(|a|_1 |b|_1)`` (eq. 6), where g are the explanations of one class k for the same
image: the teacher's highest logit half of the time, else a uniformly drawn other class. LRP's epsilon is drawn
per sample and shared by teacher and student. The teacher's last layer is copied into the student and frozen.
With an ``output_weight`` w the loss is ``L + w T^2 KL(softmax(t / T) || softmax(s / T))``, the sum of losses that
section 3.3.2 warns of (dl-dl gives each a layer of its own): an ablation.

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

Supervision. A teacher; no labels. The teacher sees the student's images unless ``teacher_input`` says otherwise.

Cost. With LRP two to three ERM steps for the student's map and its gradient, and about one for the teacher's map;
`make bench` measures it for the demo's networks.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, final

from torch import Tensor, nn

from hansfree.core import Answer, Batch, Explainer, Explanation, Method, Setup, TargetRule
from hansfree.distances import DISTANCES, pyramid
from hansfree.errors import UserError, unknown
from hansfree.methods.class_choice import TopOrOther
from hansfree.methods.output_distillation import check_temperature, softened_kl
from hansfree.methods.preparation import LastLayer, Start, prepare_student

Levels = Literal["code", "paper"] | int


class Compared(NamedTuple):
    """How far two explanations are apart, a scalar, and both of them with their logits."""

    loss: Tensor
    teacher: Answer
    student: Explanation


@final
@dataclass(frozen=True)
class Comparison:
    """Eq. 7: explains teacher and student for one class per sample and compares the maps at several scales."""

    explainer: Explainer
    rule: TargetRule
    distance: str = "normalised-l1"
    levels: Levels = "code"
    match_absorbed: bool = False

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise unknown("distance", self.distance, DISTANCES)

    def __call__(self, method: Method, student: nn.Module, batch: Batch) -> Compared:
        """Compare ``student`` with the method's teacher; both share the method's draws."""
        draws = {**method.draws(self.explainer, batch), **method.draws(self.rule, batch)}
        answer = method.teacher.answer(batch, self.explainer, self.rule, draws)
        found = self.explainer(student, batch.input, answer.target, draws=draws)
        extra = None
        if self.match_absorbed:
            extra = absorbed(*found, answer.target), absorbed(answer.logits, answer.map, answer.target)
        loss = pyramid(
            _picture(found.map), _picture(answer.map), DISTANCES[self.distance], stop=self.levels, extra=extra
        )
        return Compared(loss, answer, found)


@final
class ExplanationDistillation(Method):
    """Match the teacher's explanations, at several scales."""

    needs = frozenset({"teacher"})
    reads_labels = False

    def __init__(
        self,
        setup: Setup,
        *,
        explainer: Explainer,
        distance: str = "normalised-l1",
        levels: Levels = "code",
        top_probability: float = 0.5,
        last_layer: LastLayer = "copied",
        start: Start = "random",
        match_absorbed: bool = False,
        output_weight: float = 0.0,
        temperature: float = 3.0,
    ) -> None:
        super().__init__(setup)
        if output_weight < 0:
            raise UserError(f"method.output_weight must not be negative, but it is {output_weight}; 0 switches it off.")
        check_temperature(temperature)
        self.rule = TopOrOther(top_probability)
        self.compare = Comparison(explainer, self.rule, distance, levels, match_absorbed)
        self.output_weight, self.temperature = output_weight, temperature
        prepare_student(self.student, self.teacher, last_layer=last_layer, start=start)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"explanation": eq. 7}``, and ``"output": w T^2 KL`` where it has a weight."""
        found = self.compare(self, self.student, batch)
        terms = {"explanation": found.loss}
        if self.output_weight:
            output = softened_kl(found.student.logits, found.teacher.logits, self.temperature)
            terms["output"] = self.output_weight * output
        return terms


def _picture(map: Tensor) -> Tensor:
    """The map of a text, one value per token, as a picture of one row, which has one level."""
    return map[:, None, None] if map.ndim == 2 else map


def absorbed(logits: Tensor, map: Tensor, target: Tensor) -> Tensor:
    """Relevance that biases and epsilon took: ``y_k - sum(map)``, [b]."""
    return logits.gather(1, target[:, None]).squeeze(1) - map.flatten(1).sum(1)
