"""Output distillation: the student matches the teacher's softened predictions.

Formula. ``T^2 * mean_i KL(softmax(t_i / T) || softmax(s_i / T))`` with the logits t of the teacher and s of
the student. The factor T^2 keeps the gradient's size when T changes.

Source. Hinton, Vinyals & Dean, Distilling the knowledge in a neural network, 2015,
https://arxiv.org/abs/1503.02531; as a rival of explanation distillation in Bassi, Cavalli & Decherchi, 2024,
https://arxiv.org/abs/2407.09788. With ``last_layer: copied`` the student gets the teacher's last layer, frozen:
Lee & Lee, Debiased distillation by transplanting the last layer, 2023, without its weights for samples.

Deviations. The 2024 paper gives no temperature; 3 is what its published code uses. No label term and a last layer
of the student's own, as there.

Supervision. A teacher; no labels.

Cost. The teacher's forward pass on top of an ERM step.
"""

from typing import final

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup
from hansfree.errors import UserError
from hansfree.methods.preparation import LastLayer, Start, prepare_student


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, summed over classes, mean over the batch."""
    divergence = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence


def multi_label_kl(
    student: Float[Tensor, "b classes"], teacher: Float[Tensor, "b classes"], temperature: float
) -> Float[Tensor, ""]:
    """``T^2 sum_c KL(B(teacher_c / T) || B(student_c / T))``, mean over the batch; B(z) = Bernoulli(sigmoid(z))."""
    student, teacher = student / temperature, teacher / temperature
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (yes + no).sum(1).mean()


def check_temperature(temperature: float, key: str = "temperature") -> None:
    """Raise ``UserError`` for a temperature that is not positive."""
    if not temperature > 0:
        raise UserError(f"method.{key} must be above 0, not {temperature}.")


@final
class OutputDistillation(Method):
    """Match the teacher's softened predictions."""

    needs = frozenset({"teacher"})
    reads_labels = False

    def __init__(
        self, setup: Setup, *, temperature: float = 3.0, last_layer: LastLayer = "free", start: Start = "random"
    ) -> None:
        super().__init__(setup)
        check_temperature(temperature)
        self.temperature = temperature
        prepare_student(self.student, self.teacher, last_layer=last_layer, start=start)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"output": T^2 KL}``."""
        return {"output": softened_kl(self.student(batch.input), self.teacher.logits(batch), self.temperature)}
