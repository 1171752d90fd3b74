"""What distillers of one forward pass have in common: teacher and student each run once, and both are watched.

A distiller says which layers it matches and makes its terms from what the two passes showed. Whoever runs the passes
(``loss``, or e2kd with an explainer) decides nothing else.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from hansfree.core import Batch, Classifier, LiveTeacher, Method, Setup, Teacher
from hansfree.errors import UserError
from hansfree.methods.label_loss import label_loss
from hansfree.methods.matched_layers import FeatureLayer, Seen, Watched, find_layers
from hansfree.methods.output_distillation import check_temperature, multi_label_kl, softened_kl

Paths = tuple[str, ...] | None
"""Layers named by their paths; None: found."""


class Pass(NamedTuple):
    """Whom to ask; afterwards, what was seen."""

    student: nn.Module
    teacher: Teacher
    ours: Callable[[Tensor], Seen]
    """What the student showed, given its logits."""
    theirs: Callable[[Tensor], Seen]
    """The same of the teacher, as constants."""


class Distiller(Method, ABC):
    """Terms from what one forward pass of the student and one of the teacher show."""

    needs = frozenset({"teacher"})
    multi_label = True
    embeds: ClassVar[bool] = False
    """Whether the terms are made from what goes into the last layers."""

    def __init__(
        self, setup: Setup, *, label_weight: float, output_weight: float = 0.0, output_temperature: float = 4.0
    ) -> None:
        super().__init__(setup)
        if not label_weight >= 0:
            raise UserError(f"method.label_weight must be 0 or above, not {label_weight}; 0 is without labels.")
        if not output_weight >= 0:
            raise UserError(f"method.output_weight must be 0 or above, not {output_weight}; 0 is without logits.")
        check_temperature(output_temperature, "output_temperature")
        self.label_weight = label_weight
        self.output_weight, self.output_temperature = output_weight, output_temperature
        self.reads_labels = label_weight > 0
        self.layers: tuple[FeatureLayer, ...] = ()
        self.teacher_layers: tuple[FeatureLayer, ...] = ()

    def match(self, student_layers: Paths, teacher_layers: Paths) -> None:
        """Pair layers of student and teacher, the last with the last; raises ``UserError`` for unequal lists."""
        if student_layers is not None and teacher_layers is not None and len(student_layers) != len(teacher_layers):
            raise UserError(
                f"method.student_layers names {len(student_layers)} layers and teacher_layers {len(teacher_layers)}; "
                "name as many of each, in the order in which they are paired."
            )
        ours = find_layers(self.student, self._setup.input, student_layers)
        theirs = find_layers(self.teacher.model, self._setup.input, teacher_layers)
        count = min(len(ours), len(theirs))
        if not count:
            raise UserError("method.student_layers and teacher_layers must name at least one layer each.")
        self.layers, self.teacher_layers = ours[-count:], theirs[-count:]

    def watch(self) -> Pass:
        """Twins of student and teacher that show what this distiller matches."""
        teacher = self.teacher
        if not (self.layers or self.embeds):  # a teacher that is read from a store has no network
            return Pass(self.student, teacher, _nothing, _nothing)
        student = _watched(self.student, self.layers, self.embeds)
        taught = _watched(teacher.model, self.teacher_layers, self.embeds)
        assert isinstance(teacher, LiveTeacher)
        theirs = dataclasses.replace(teacher, model=taught.model)
        return Pass(student.model, theirs, student.seen, lambda logits: taught.seen(logits).constant())

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of one ordinary pass of each."""
        looking = self.watch()
        theirs = looking.theirs(looking.teacher.logits(batch))
        return self.terms(batch, looking.ours(looking.student(batch.input)), theirs)

    @abstractmethod
    def terms(self, batch: Batch, ours: Seen, theirs: Seen) -> dict[str, Tensor]:
        """Named terms from what the student's pass and the teacher's showed."""

    def logit_terms(self, batch: Batch, ours: Tensor, theirs: Tensor) -> dict[str, Tensor]:
        """``{"output": output_weight * T^2 KL, "label": label_weight * cross-entropy}``, each where it has a weight."""
        terms = dict[str, Tensor]()
        if self.output_weight:
            divergence = softened_kl if batch.label.ndim == 1 else multi_label_kl
            terms["output"] = self.output_weight * divergence(ours, theirs, self.output_temperature)
        if self.label_weight:
            terms["label"] = self.label_weight * label_loss(ours, batch.label)
        return terms


def check_weight(weight: float) -> None:
    """Raise ``UserError`` for a weight that is not positive."""
    if not weight > 0:
        raise UserError(f"method.weight must be above 0, not {weight}; without its own term the method is another one.")


def last_layer(model: nn.Module, role: str) -> nn.Module:
    """The layer that makes the logits. Raises ``UserError`` for a model that does not say which it is."""
    if not isinstance(model, Classifier):
        raise UserError(f"The {role} does not say which layer is its last; load it with load_model, or wrap it.")
    return model.get_classifier()


def _nothing(logits: Tensor) -> Seen:
    return Seen(logits, (), None)


def _watched(model: nn.Module, layers: Sequence[FeatureLayer], embeds: bool) -> Watched:
    return Watched(model, layers, last_layer(model, "model") if embeds else None)
