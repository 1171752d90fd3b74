"""DL-DL, different losses for different layers: explanations train all layers but the last, outputs the last alone.

Formula. ``L(body)`` (eq. 7 of explanation distillation) for every parameter but those of the last layer, and
``w T^2 KL(softmax(t / T) || softmax(s / T))`` for the last layer alone. Neither loss reaches the other's
parameters: in the explanation the last layer's weights are constants, in the output its input is. One forward
pass, one backward pass.

Source. Bassi, Cavalli & Decherchi, Explanation is all you need in distillation, 2024,
https://arxiv.org/abs/2407.09788, section 3.3.2; the weight of 100 from appendix A (DogsWithTies), where attention
distillation is done in this way as well (``explainer: {name: attention}``).

Deviations. The paper writes the output loss as a cross-entropy between the two softmax predictions; the divergence
used here is that less the teacher's entropy, a constant, so gradients agree. The paper gives no temperature but
that of its CLIP teacher (``zero_shot: {temperature: 10}`` of the model), so T is 1. The published code runs two
backward passes and clips the gradient of all parameters together, by which the weight of the output loss changes
the steps of the other layers after all; here each group is clipped apart, and ``clipping: joint`` is the code's
way. The last layer starts as the student's own, at random; ``last_layer: copied`` starts it as the teacher's. It
is trained either way. Whoever selects by the validation loss should know that it contains w.

Supervision. A teacher; no labels.

Cost. That of explanation distillation, and one more pass through the last layer.
"""

from collections.abc import Callable
from typing import Literal, final

from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Classifier, Explainer, Method, Setup, Stage
from hansfree.errors import UserError
from hansfree.explainers.twin import twin
from hansfree.methods.class_choice import TopOrOther
from hansfree.methods.explanation_distillation import Comparison, Levels
from hansfree.methods.output_distillation import check_temperature, softened_kl
from hansfree.methods.preparation import LastLayer, Start, prepare_student

Clipping = Literal["apart", "joint"]


@final
class DLDL(Method):
    """Match explanations with all layers but the last, and outputs with the last one."""

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
        match_absorbed: bool = False,
        output_weight: float = 100.0,
        temperature: float = 1.0,
        clipping: Clipping = "apart",
        last_layer: LastLayer = "free",
        start: Start = "random",
    ) -> None:
        super().__init__(setup)
        if not output_weight > 0:
            raise UserError(
                f"method.output_weight must be above 0, not {output_weight}: the last layer would not move."
            )
        check_temperature(temperature)
        self.rule = TopOrOther(top_probability)
        self.compare = Comparison(explainer, self.rule, distance, levels, match_absorbed)
        self.output_weight, self.temperature, self.clipping = output_weight, temperature, clipping
        prepare_student(self.student, self.teacher, last_layer=last_layer, start=start)
        self._last_layer().requires_grad_(True)

    def _last_layer(self) -> nn.Linear:
        layer = self.student.get_classifier() if isinstance(self.student, Classifier) else None
        if not isinstance(layer, nn.Linear):
            raise UserError(
                "dl-dl trains the last layer apart and needs one that is linear, in a student made by load_model; "
                "choose another student, or explanation-distillation with last_layer: free."
            )
        return layer

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"explanation": eq. 7, "output": w T^2 KL}``, each with a gradient in its own layers only."""
        layer, seen = self._last_layer(), list[Tensor]()
        found = self.compare(self, twin(self.student, {layer: _held(layer, seen)}), batch)
        logits = layer(seen[0])  # the first pass is the plain batch's, whatever the explainer does afterwards
        output = softened_kl(logits, found.teacher.logits, self.temperature)
        return {"explanation": found.loss, "output": self.output_weight * output}

    def next_stage(self) -> Stage | None:
        """One stage, whose two groups are clipped apart or together."""
        if self.stages_done > 0:
            return None
        if self.clipping == "joint":
            return Stage()
        last = tuple(self._last_layer().parameters())
        body = (p for p in self.parameters() if p.requires_grad and all(p is not q for q in last))
        return Stage(groups={"body": tuple(body), "last-layer": last})


def _held(layer: nn.Linear, seen: list[Tensor]) -> Callable[[nn.Module], None]:
    """Makes a copy of ``layer`` whose weights are constants, and which puts its inputs, as constants, into ``seen``."""

    def forward(x: Tensor) -> Tensor:
        if not seen:
            seen.append(x.detach())
        return F.linear(x, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    return lambda copy: copy.__dict__.update(forward=forward)
