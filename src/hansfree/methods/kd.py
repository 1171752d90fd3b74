"""Knowledge distillation: the student matches the teacher's softened predictions, with or without labels.

Formula. ``L = output_weight * T^2 KL(softmax(t / T) || softmax(s / T)) + label_weight * CE(s, y)``, each a mean over
samples, with the logits t of the teacher and s of the student; the weights need not sum to 1. For labels of several
classes per image, the divergence is ``T^2 sum_c KL(B(t_c / T) || B(s_c / T))`` and the label's part
``sum_c BCE(s_c, y_c)``, where B(z) is the Bernoulli distribution of sigmoid(z): each class is a decision of its own.
Which of the two it is, the shape of the labels says.

Source. Hinton, Vinyals & Dean, Distilling the knowledge in a neural network, 2015, https://arxiv.org/abs/1503.02531;
without labels (the default), with the teacher seeing exactly what the student sees, Beyer et al., 2022,
https://arxiv.org/abs/2106.05237, and Parchami-Araghi et al., Good teachers explain, 2024,
https://arxiv.org/abs/2402.03119, eq. 1. Several labels: Yang et al., Multi-label knowledge distillation, 2023,
https://arxiv.org/abs/2308.06453, its loss of logits.

Deviations. Papers and codes that mix both terms by one alpha disagree on which of them it weighs: the teacher's in eq.
1 of Han, Kim, Choi & Yoon, On the impact of knowledge distillation for model interpretability, 2023,
https://arxiv.org/abs/2305.15734, the labels' in the library that they used. Here each weight has the name of its term:
their alpha of 0.9 is ``output_weight: 0.9, label_weight: 0.1``. A teacher of the student's own architecture makes it
self-kd, or born-again networks (Furlanello et al., 2018, https://arxiv.org/abs/1805.04770). The divergence differs from
e2KD's eq. 1, a cross-entropy, by the teacher's entropy, a constant.
The multi-label loss has no temperature in its paper: T = 1 is that. output-distillation is this method at its paper's
temperature of 3, with what that paper says of the last layer.

Supervision. A teacher; labels where label_weight is above 0.

Cost. The teacher's forward pass on top of an ERM step: 1.6 ERM steps for a small ResNet whose teacher has four times
its weights (``bench/step_cost.py configs/fashion-few-shots-grids.yaml``, as the other cards' ERM steps beside kd's).
"""

from typing import final

from torch import Tensor

from hansfree.core import Batch, Setup
from hansfree.errors import UserError
from hansfree.methods.distiller import Distiller
from hansfree.methods.matched_layers import Seen
from hansfree.methods.output_distillation import check_temperature


@final
class KD(Distiller):
    """Match the teacher's softened predictions, with or without labels."""

    def __init__(
        self, setup: Setup, *, temperature: float = 1.0, output_weight: float = 1.0, label_weight: float = 0.0
    ) -> None:
        check_temperature(temperature)
        if not output_weight > 0:
            raise UserError(f"method.output_weight must be above 0, not {output_weight}; without a teacher choose erm.")
        super().__init__(setup, label_weight=label_weight, output_weight=output_weight, output_temperature=temperature)

    def terms(self, batch: Batch, ours: Seen, theirs: Seen) -> dict[str, Tensor]:
        """``{"output": output_weight * T^2 KL}`` and, where it has a weight, ``"label"``."""
        return self.logit_terms(batch, ours.logits, theirs.logits)
