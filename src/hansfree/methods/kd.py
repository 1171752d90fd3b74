"""Knowledge distillation: the student matches the teacher's softened predictions, with or without labels.

Formula. ``L = T^2 KL(softmax(t / T) || softmax(s / T)) + label_weight * CE(s, y)``, each a mean over samples, with the
logits t of the teacher and s of the student; the weights do not sum to 1. For labels of several classes per image,
``L = T^2 sum_c KL(B(t_c / T) || B(s_c / T)) + label_weight * sum_c BCE(s_c, y_c)``, where B(z) is the Bernoulli
distribution of sigmoid(z): each class is a decision of its own. Which of the two it is, the shape of the labels says.

Source. Hinton, Vinyals & Dean, Distilling the knowledge in a neural network, 2015, https://arxiv.org/abs/1503.02531;
without labels (the default), with the teacher seeing exactly what the student sees, Beyer et al., 2022,
https://arxiv.org/abs/2106.05237, and Parchami-Araghi et al., Good teachers explain, 2024,
https://arxiv.org/abs/2402.03119, eq. 1. Several labels: Yang et al., Multi-label knowledge distillation, 2023,
https://arxiv.org/abs/2308.06453, its loss of logits.

Deviations. Papers and codes that write ``alpha CE + (1 - alpha) T^2 KL`` disagree on which term alpha stands by; here
the divergence has weight 1. The divergence differs from eq. 1, a cross-entropy, by the teacher's entropy, a constant.
The multi-label loss has no temperature in its paper: T = 1 is that. output-distillation is this method at its paper's
temperature of 3, with what that paper says of the last layer.

Supervision. A teacher; labels where label_weight is above 0.

Cost. The teacher's forward pass on top of an ERM step: 1.6 ERM steps for a small ResNet whose teacher has four times
its weights (``bench/step_cost.py configs/fashion-few-shots-grids.yaml``, as the other cards' ERM steps beside kd's).
"""

from typing import final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Setup
from hansfree.methods.distiller import Distiller
from hansfree.methods.matched_layers import Seen
from hansfree.methods.output_distillation import check_temperature, softened_kl


def multi_label_kl(
    student: Float[Tensor, "b classes"], teacher: Float[Tensor, "b classes"], temperature: float
) -> Float[Tensor, ""]:
    """``T^2 sum_c KL(B(teacher_c / T) || B(student_c / T))``, mean over the batch; B(z) = Bernoulli(sigmoid(z))."""
    student, teacher = student / temperature, teacher / temperature
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (yes + no).sum(1).mean()


@final
class KD(Distiller):
    """Match the teacher's softened predictions, with or without labels."""

    def __init__(self, setup: Setup, *, temperature: float = 1.0, label_weight: float = 0.0) -> None:
        super().__init__(setup, label_weight=label_weight)
        check_temperature(temperature)
        self.temperature = temperature

    def terms(self, batch: Batch, ours: Seen, theirs: Seen) -> dict[str, Tensor]:
        """``{"output": T^2 KL}`` and, where it has a weight, ``"label"``."""
        divergence = softened_kl if batch.label.ndim == 1 else multi_label_kl
        output = divergence(ours.logits, theirs.logits, self.temperature)
        return {"output": output, **self.label_term(batch, ours.logits)}
