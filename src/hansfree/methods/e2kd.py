"""Explanation-enhanced knowledge distillation (e2KD): a distiller whose student must also give the teacher's reasons.

Formula. ``L = L_base + weight * mean_i (1 - cos(E(T, x_i, k_i), E(S, x_i, k_i)))`` (eq. 2 and 3) with k_i the class of
the teacher's highest logit and E any explainer: its signed map, flattened over channels and space. Where an image has
labels of several classes, k_i is one of those that the teacher finds (logits above 0), drawn anew in each step; the
highest where it finds none. L_base is kd unless
``base`` names another distiller, with its settings: ``base: {name: crd}``, ``base: {temperature: 5}`` (of kd).

Source. Parchami-Araghi, Böhle, Rao & Schiele, Good teachers explain: explanation-enhanced knowledge distillation,
ECCV 2024, https://arxiv.org/abs/2402.03119. With Grad-CAM for standard networks (``explainer: {name: grad-cam}``) and
the dynamic weights W(x) for B-cos ones (``{name: bcos}``). The published code sweeps weights of 0.2 to 10, and each
explainer needs a sweep of its own; the default is the largest of these.

Deviations. Maps are compared at the explainer's own size, and where sizes differ at the smaller one, bilinearly with
antialiasing; the published code enlarges Grad-CAM to the image (``explainer: {name: grad-cam, resize: true}``), which
adds nothing where the sizes agree. As there, Grad-CAM's weights keep their gradient and its ReLU stays. A map that is
zero everywhere is at distance 1 and has no gradient, as there; two of them are at distance 0, not 1. ``every: k`` is
the published efficient setting: only each k-th batch, the first included, has the explanation term, and the weight is
not raised in return; batches are counted over the whole training, not anew in each epoch. Validation always has it.

Supervision. A teacher, and labels where the base wants them.

Cost. One pass of each network serves the base and the explanation. In ERM steps, for a small ResNet whose teacher has
four times its weights (batches of 32, one thread), where kd takes 1.6: 2.7 with Grad-CAM, 1.9 with
attention, 4.6 with LRP; ``every: 4`` leaves out three of four explanations.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hansfree.config import construct
from hansfree.core import Batch, Explainer, Method, Setup
from hansfree.distances import cosine
from hansfree.errors import UserError
from hansfree.methods.at import AT
from hansfree.methods.cat_kd import CATKD
from hansfree.methods.class_choice import AnyPositive, Top
from hansfree.methods.crd import CRD
from hansfree.methods.distiller import Distiller, check_weight
from hansfree.methods.kd import KD
from hansfree.methods.review_kd import ReviewKD

BASES: dict[str, type[Distiller]] = {"kd": KD, "at": AT, "cat-kd": CATKD, "review-kd": ReviewKD, "crd": CRD}
"""What the explanation term can be added to."""


def explanation_distance(student: Float[Tensor, "b *c h w"], teacher: Float[Tensor, "b *c h2 w2"]) -> Float[Tensor, ""]:
    """``1 - cosine`` of two explanations, mean over samples; maps of different size meet at the smaller one."""
    if student.ndim > 3 and student.shape[-2:] != teacher.shape[-2:]:
        size = min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1])
        student, teacher = _resized(student, size), _resized(teacher, size)
    return cosine(student, teacher).mean()


def _resized(map: Tensor, size: tuple[int, int]) -> Tensor:
    return map if map.shape[-2:] == size else F.interpolate(map, size, mode="bilinear", antialias=True)


@final
class E2KD(Method):
    """Match the teacher's predictions and its explanations of them."""

    needs = frozenset({"teacher"})
    multi_label = True
    steps_taken: Tensor

    def __init__(
        self,
        setup: Setup,
        *,
        explainer: Explainer,
        base: dict[str, Any] | str = "kd",
        weight: float = 10.0,
        every: int = 1,
    ) -> None:
        super().__init__(setup)
        check_weight(weight)
        if every < 1:
            raise UserError(f"method.every must be 1 (each batch) or above, not {every}.")
        self.explainer, self.weight, self.every = explainer, weight, every
        section = {"name": base} if isinstance(base, str) else {"name": "kd", **base}
        shared = dataclasses.replace(setup, student=lambda: self.student)
        self.base: Distiller = construct(BASES, section, "base method", given={"setup": shared})
        self.reads_labels = self.base.reads_labels
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.long))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The base's terms and, in the batches that have it, ``"explanation"``."""
        if self.training and self.steps_taken % self.every != 0:
            return self.base.loss(batch)
        looking = self.base.watch()
        rule = Top() if batch.label.ndim == 1 else AnyPositive()
        draws = {**self.draws(self.explainer, batch), **self.draws(rule, batch)}
        answer = looking.teacher.answer(batch, self.explainer, rule, draws)
        found = self.explainer(looking.student, batch.images, answer.target, draws=draws)
        terms = self.base.terms(batch, looking.ours(found.logits), looking.theirs(answer.logits))
        return {**terms, "explanation": self.weight * explanation_distance(found.map, answer.map)}

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Count the step, and let the base observe it."""
        self.steps_taken = self.steps_taken + 1
        self.base.observe(batch, terms)

    def apart(self) -> dict[str, Tensor]:
        """The base's."""
        return self.base.apart()
