"""Model guidance: explanations of the classes that are there lie in their boxes or masks.

Formula. ``L = label loss + weight * mean_i l(A_i, m_i)`` with A_i the map that the explainer draws of class k_i (the
label's; of several labels one of those that are there, drawn anew in each step), summed over channels, and m_i the
mask of that class or the union of its boxes. With A+ = max(A, 0), B = A / max |A| and B+ = A+ / max A+:

    energy    1 - sum(m A+) / sum(A+)              the share of positive relevance outside, 1 - EPG
    l1        mean_p |B+_p - m_p|                  all of the object, and nothing else
    ppce      -sum(m log B+) / sum(m)              the object as positive as it gets; the rest is free
    rrr       sum_p (1 - m_p) B_p^2                nothing outside; the object is free

The label loss is cross-entropy; of several labels, or with ``loss: binary``, binary cross-entropy summed over classes.

Source. Rao, Böhle, Parchami-Araghi & Schiele, Studying how to efficiently and effectively guide models with
explanations, ICCV 2023, https://arxiv.org/abs/2303.11932. Its teachers are those of Waterbirds and VOC in e2KD
(https://arxiv.org/abs/2402.03119): energy makes one with a high EPG, l1 one with a high IoU. l1, ppce and rrr are its
forms of the losses of GRADIA, HAICS and RRR. The paper chooses among the Pareto front of F1, EPG and IoU in validation:
``selection: epg_val`` or ``iou_val``.

Deviations. The published code adds the sum of l over the batch to a binary cross-entropy that is averaged over classes:
its weight of 0.001, with 64 images of 20 classes, is 0.001 * 64 * 20 = 1.28 here. As there, maxima keep their gradient,
a map whose positive relevance is below 1e-7 has the energy loss 1 - sum(m A+), and a logarithm is at least -100. A
coarse map is enlarged to the image after it is divided by its maximum. A pixel is in a box where its centre is; an
image without the object's place (a crop may lose it) has l = 0. Masks may be soft. A map without positive relevance
has no gradient in energy, l1 and ppce, as there: a large weight or learning rate can drive Grad-CAM's maps, which a
ReLU cuts off, to zero for good. Look for a localisation term that returns to ``weight`` with energy. A softmax is
content with a highest logit that is negative, and the map of one need have no positive relevance: for explainers whose
maps add up to the logit (W(x), LRP) use ``loss: binary``, by which the published B-cos networks are trained.

Supervision. Labels, and masks or boxes. The weight decides how much accuracy is given up for the place; it has to be
tried, and each loss and explainer needs another one.

Cost. One pass and an explanation with its gradient: with grad-cam somewhat more than an ERM step, with explainers down
to the pixels about three.
"""

from collections.abc import Callable
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from hansfree.core import Batch, Explainer, Method, Setup
from hansfree.errors import UserError, unknown
from hansfree.methods.class_choice import AnyPositive
from hansfree.methods.label_loss import LabelLoss, check_label_loss, label_loss
from hansfree.metrics.explanation_agreement import at_size
from hansfree.metrics.localisation import NOTHING, class_mask

Picture = Float[Tensor, "b h w"]
Losses = Float[Tensor, "b"]
Localisation = Literal["energy", "l1", "ppce", "rrr"]


def energy(map: Picture, mask: Picture) -> Losses:
    """The share of positive relevance outside of the mask."""
    positive = at_size(map.clamp_min(0), _size(mask))
    inside, total = (positive * mask).sum((1, 2)), positive.sum((1, 2))
    return 1 - inside / torch.where(total < NOTHING, 1.0, total)


def l1(map: Picture, mask: Picture) -> Losses:
    """Mean distance of the positive map, divided by its maximum, from the mask."""
    return (_positive(map, mask) - mask).abs().mean((1, 2))


def ppce(map: Picture, mask: Picture) -> Losses:
    """Cross-entropy of the positive map, divided by its maximum, with 1 in the mask; 0 where the mask is empty."""
    shown = _positive(map, mask)
    surprise = torch.where(shown > 0, -shown.where(shown > 0, 1.0).log(), 100.0).clamp_max(100)  # log 0 has no gradient
    return (mask * surprise).sum((1, 2)) / mask.sum((1, 2)).clamp_min(NOTHING)


def rrr(map: Picture, mask: Picture) -> Losses:
    """Sum of squares of the map, divided by its largest size, outside of the mask."""
    return ((1 - mask) * at_size(_divided(map, map.abs()), _size(mask)).square()).sum((1, 2))


LOSSES: dict[str, Callable[[Picture, Picture], Losses]] = {"energy": energy, "l1": l1, "ppce": ppce, "rrr": rrr}


def _positive(map: Picture, mask: Picture) -> Picture:
    map = map.clamp_min(0)
    return at_size(_divided(map, map), _size(mask))


def _divided(map: Picture, sizes: Picture) -> Picture:
    """The map over its largest size; a map of zeros as it is."""
    largest = sizes.amax((1, 2), keepdim=True)
    return map / torch.where(largest > 0, largest, 1.0)


def _size(mask: Picture) -> tuple[int, int]:
    return mask.shape[-2], mask.shape[-1]


@final
class ModelGuidance(Method):
    """Learn from labels, with explanations that lie in boxes or masks."""

    needs = frozenset({"mask-or-boxes"})
    multi_label = True

    def __init__(
        self,
        setup: Setup,
        *,
        explainer: Explainer,
        localisation: Localisation = "energy",
        weight: float = 1.0,
        loss: LabelLoss = "cross-entropy",
    ) -> None:
        super().__init__(setup)
        check_label_loss(loss)
        if localisation not in LOSSES:
            raise unknown("localisation loss", localisation, LOSSES)
        if not weight > 0:
            raise UserError(f"method.weight must be above 0, not {weight}; without guidance the method is erm.")
        self.explainer, self.weight, self.localise = explainer, weight, LOSSES[localisation]
        self.label_loss: LabelLoss = loss

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": label loss, "localisation": weight times the mean localisation loss}``."""
        target = batch.label
        if target.ndim > 1:
            rule = AnyPositive()
            target = rule.choose(target, self.draws(rule, batch))
        mask = class_mask(batch, target)
        draws = self.draws(self.explainer, batch)
        logits, map = self.explainer(self.student, batch.images, target, draws=draws)
        mask = mask.to(map)
        losses = self.localise(map.flatten(1, -3).sum(1), mask)
        there = mask.flatten(1).any(1)
        localisation = torch.where(there, losses, 0.0).mean()
        label = label_loss(logits, batch.label, loss=self.label_loss)
        return {"label": label, "localisation": self.weight * localisation}
