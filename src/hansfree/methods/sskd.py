"""Self-supervised distillation: the student also sees turned images as the teacher does, and how alike they are.

Formula. Of b images x_j, 3b more x~_i are turned by 90, 180 and 270 degrees. A projection of what goes into each
network's last layer (linear, ReLU, linear, as wide as it) gives vectors z, and ``A_ij = cos(z~_i, z_j)`` says how alike
a turned image i and an image j are. First the teacher's projection learns to find each turned image's own by
``mean_i -log softmax(A_i)[own]``. Then the student and its projection learn by

    L = label_weight * CE(s, y) + output_weight * T^2 KL(softmax(t / T) || softmax(s / T))
        + transformed_weight * T^2 KL(softmax(t~ / T) || softmax(s~ / T))
        + similarity_weight * U^2 KL(softmax(A_T / U) || softmax(A_S / U))

means over samples or rows, with T ``output_temperature`` and U ``similarity_temperature``. Of the turned images that
the teacher gets wrong (by t~, by A_T) only a share, ``transformed_kept`` and ``similarity_kept``, is learned from:
those in whose row the right one ranks highest.

Source. Xu, Liu, Li & Loy, Knowledge distillation meets self-supervision, ECCV 2020, https://arxiv.org/abs/2006.07114.
Weights, temperatures, shares and 30 epochs for the projection as on ImageNet in Han et al., On the impact of knowledge
distillation for model interpretability, 2023, https://arxiv.org/abs/2305.15734, appendix B.4.4 (whose published setting
has an output_weight of 0; on CIFAR-100 the method's own code has a label_weight of 0.1 and 60 epochs).

Deviations. Images are turned, as in the published code, whose first stage also has no temperature. The share that is
kept is of a batch, rounded down, as there, and at least one row is. Validation must not depend on who shares a batch:
there every turned image counts, the similarities are left out, and the first stage tells ``mean_i 1 - A_i,own``. The
first stage has the run's schedule over its own length, or with ``projection_lr`` and ``projection_milestones`` its own.

Supervision. A teacher; labels unless label_weight is 0 and transformed_kept is 1. Square images.

Cost. Four times the images of kd: 6.0 ERM steps for a small ResNet where kd takes 1.6 (``bench/step_cost.py
configs/objects-feature-distillers.yaml``); before, ``projection_epochs`` epochs of the teacher's forward pass, again of
four times the images.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Setup
from hansfree.errors import NotGivenError, UserError
from hansfree.explainers.propagation import at_least_float32
from hansfree.methods.distiller import last_layer
from hansfree.methods.matched_layers import Seen
from hansfree.methods.output_distillation import check_temperature, softened_kl
from hansfree.methods.prepared_distiller import PreparedDistiller
from hansfree.methods.review_kd import width_of

TURNS = 3
"""By 90, 180 and 270 degrees."""


def with_turned(images: Float[Tensor, "b k h w"]) -> Float[Tensor, "b4 k h w"]:
    """The images, then all of them turned by 90 degrees, by 180 and by 270."""
    return torch.cat([images.rot90(turns, (-2, -1)) for turns in range(TURNS + 1)])


def similarities(projected: Float[Tensor, "b4 d"]) -> Float[Tensor, "b3 b"]:
    """The cosine of each turned image with each image, from vectors in the order of :func:`with_turned`."""
    unit = F.normalize(at_least_float32(projected))
    images = len(unit) // (TURNS + 1)
    return unit[images:] @ unit[:images].T


def least_wrong(scores: Float[Tensor, "n k"], right: Int[Tensor, "n"], share: float) -> Int[Tensor, "kept"]:
    """The rows whose right column scores highest, and a share of the others: those in which it ranks highest."""
    rank = (scores > scores.gather(1, right[:, None])).sum(1)
    found = int((rank == 0).sum())
    return rank.argsort(stable=True)[: max(1, found + int(share * (len(rank) - found)))]


@final
class SSKD(PreparedDistiller):
    """Match the teacher's logits of images and of turned images, and which of them it finds alike."""

    embeds = True
    multi_label = False

    def __init__(
        self,
        setup: Setup,
        *,
        label_weight: float = 1.0,
        output_weight: float = 0.9,
        output_temperature: float = 4.0,
        transformed_weight: float = 2.7,
        transformed_kept: float = 1.0,
        similarity_weight: float = 10.0,
        similarity_temperature: float = 0.5,
        similarity_kept: float = 0.75,
        projection_epochs: int = 30,
        projection_lr: float | None = None,
        projection_milestones: tuple[int, ...] = (),
    ) -> None:
        super().__init__(
            setup, label_weight=label_weight, output_weight=output_weight, output_temperature=output_temperature
        )
        check_temperature(similarity_temperature, "similarity_temperature")
        if not transformed_weight > 0 or not similarity_weight >= 0:
            raise UserError(
                "method.transformed_weight must be above 0 and similarity_weight 0 or above, not "
                f"{transformed_weight} and {similarity_weight}; without both the method is kd."
            )
        if not (0 <= transformed_kept <= 1 and 0 <= similarity_kept <= 1):
            raise UserError(
                "method.transformed_kept and similarity_kept are shares from 0 to 1, not "
                f"{transformed_kept} and {similarity_kept}."
            )
        if setup.input.height != setup.input.width:
            raise NotGivenError(
                f"sskd turns images, which must be square, but these have {setup.input.height} x {setup.input.width} "
                "pixels; set the benchmark's or the augmentation's size.",
                "needs square images",
            )
        self.transformed_weight, self.transformed_kept = transformed_weight, transformed_kept
        self.similarity_weight, self.similarity_kept = similarity_weight, similarity_kept
        self.similarity_temperature = similarity_temperature
        self.reads_labels = label_weight > 0 or transformed_kept < 1
        self.project_ours = _projection(last_layer(self.student, "student"))
        self.project_theirs = _projection(last_layer(self.teacher.model, "teacher"))
        steps = {"schedule": "step", "milestones": projection_milestones} if projection_milestones else {}
        self.prepare("projection", [self.project_theirs], projection_epochs, projection_lr, **steps)

    def shown(self, batch: Batch) -> Batch:
        """The batch, and all of it turned three times."""
        label, index = batch.label.repeat(TURNS + 1), batch.index.repeat(TURNS + 1)
        mask, clean = (None if images is None else with_turned(images) for images in (batch.mask, batch.clean))
        return Batch(with_turned(batch.images), label, index, mask=mask, clean=clean)

    def preparation(self, theirs: Seen) -> dict[str, Tensor]:
        """``{"contrast": cross-entropy of the similarities}``; in evaluation the distance of turned images alone."""
        found = similarities(self._projected(self.project_theirs, theirs))
        own = _own(found)
        if self.training:
            return {"contrast": F.cross_entropy(found, own)}
        return {"contrast": 1 - found.gather(1, own[:, None]).mean()}

    def terms(self, batch: Batch, ours: Seen, theirs: Seen) -> dict[str, Tensor]:
        """``{"transformed", "similarity"}`` and, where they have a weight, ``"output"`` and ``"label"``."""
        count = len(batch)
        turned = theirs.logits[count:]
        kept = self._kept(turned, batch.label.repeat(TURNS), self.transformed_kept)
        divergence = softened_kl(ours.logits[count:][kept], turned[kept], self.output_temperature)
        terms = {"transformed": self.transformed_weight * divergence}
        if self.training and self.similarity_weight:
            terms["similarity"] = self.similarity_weight * self._similarity(ours, theirs)
        return {**terms, **self.logit_terms(batch, ours.logits[:count], theirs.logits[:count])}

    def _similarity(self, ours: Seen, theirs: Seen) -> Tensor:
        found = similarities(self._projected(self.project_ours, ours))
        with torch.no_grad():
            target = similarities(self._projected(self.project_theirs, theirs))
        kept = self._kept(target, _own(target), self.similarity_kept)
        return softened_kl(found[kept], target[kept], self.similarity_temperature)

    def _kept(self, scores: Tensor, right: Tensor, share: float) -> Tensor:
        """The rows to learn from; all of them in evaluation."""
        everything = share == 1 or not self.training
        return torch.arange(len(scores), device=scores.device) if everything else least_wrong(scores, right, share)

    def _projected(self, projection: nn.Module, seen: Seen) -> Tensor:
        assert seen.embedding is not None
        with torch.autocast(seen.embedding.device.type, enabled=False):
            return projection(at_least_float32(seen.embedding))


def _projection(layer: nn.Module) -> nn.Sequential:
    width = width_of(layer)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def _own(found: Float[Tensor, "b3 b"]) -> Int[Tensor, "b3"]:
    """The column of each turned image's own."""
    return torch.arange(found.shape[1], device=found.device).repeat(TURNS)
