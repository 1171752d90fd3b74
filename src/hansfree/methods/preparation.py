"""What the student takes over from the teacher before training: weights, the last layer."""

from typing import Literal

from torch import nn

from hansfree.core import Classifier, Teacher
from hansfree.errors import UserError
from hansfree.models import transplant_head, transplant_last_layer
from hansfree.models.text import TextClassifier, start_from

LastLayer = Literal["copied", "head", "free"]
Start = Literal["random", "teacher"]


def prepare_student(student: nn.Module, teacher: Teacher, *, last_layer: LastLayer, start: Start) -> None:
    """Give the student the teacher's weights (``start: teacher``; a text model of some layers those of these layers)
    and its frozen last layer (``copied``), or all that stands behind the last feature map of a CLIP ResNet (``head``).

    Raises ``UserError`` where the two networks do not allow it.
    """
    if start == "teacher" and isinstance(student, TextClassifier) and isinstance(teacher.model, TextClassifier):
        start_from(student, teacher.model)
    elif start == "teacher":
        try:
            student.load_state_dict(teacher.model.state_dict())
        except RuntimeError as error:
            raise UserError(
                "method.start: teacher needs a student of the teacher's architecture; "
                "choose the same model for both, or start: random."
            ) from error
    if last_layer == "free":
        return
    if not isinstance(student, Classifier):
        raise UserError(f"method.last_layer: {last_layer} needs a student made by load_model; set last_layer: free.")
    if last_layer == "head":
        transplant_head(student, teacher.model)
    else:
        transplant_last_layer(student, teacher.head)
