"""Factor transfer: the student's last features, translated, match the teacher's, paraphrased.

Formula. First the paraphraser, an auto-encoder D(E(x)) of the teacher's last feature map f_T, learns by
``mean (D(E(f_T)) - f_T)^2``. Then the student learns with a translator R by

    L = weight * mean |E(f_T) / |E(f_T)|_2 - R(f_S) / |R(f_S)|_2| + label_weight * CE(s, y)

with the norms over all of a sample's factor and the means over samples, channels and places. E and R are three 3 x 3
convolutions, D three transposed ones, each followed by a leaky ReLU of slope 0.1; factors have ``rate`` times the
teacher's channels. ``output_weight`` adds kd's term, at ``output_temperature``.

Source. Kim, Park & Kwak, Paraphrasing complex network: network compression via factor transfer, NeurIPS 2018,
https://arxiv.org/abs/1802.04977, with p = 1; rate, weight and one epoch for the paraphraser as on ImageNet in Han et
al., On the impact of knowledge distillation for model interpretability, 2023, https://arxiv.org/abs/2305.15734,
appendix B.4.2 (the method's own code, for CIFAR-10, has a weight of 500).

Deviations. The text sums the differences of the factors; the weight of 500 or 1000 belongs to the mean of both
published codes, which is what is done here. The text reconstructs by squares, its code by absolute differences. The
first stage has the run's schedule over its own length; ``paraphraser_lr`` gives it another learning rate. Where student
and teacher have maps of different size, factors are average-pooled to the smaller one. Nothing here has batch norm, as
in the published code.

Supervision. A teacher; labels unless label_weight is 0.

Cost. The teacher's forward pass and six convolutions on top of an ERM step: 2.3 ERM steps for a small ResNet where kd
takes 1.6 (``bench/step_cost.py configs/objects-feature-distillers.yaml``); before, ``paraphraser_epochs`` epochs of the
teacher's forward pass and the paraphraser. The auto-encoder's weights are in each checkpoint and not exported.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Setup
from hansfree.errors import UserError
from hansfree.explainers.propagation import at_least_float32
from hansfree.methods.distiller import check_weight
from hansfree.methods.matched_layers import Seen
from hansfree.methods.prepared_distiller import PreparedDistiller


def factor_distance(student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, ""]:
    """Mean absolute difference of the two normalised factors, at the smaller size of the two."""
    size = min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1])
    return F.l1_loss(_normalised(student, size), _normalised(teacher, size))


def _normalised(factor: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b n"]:
    if factor.shape[-2:] != size:
        factor = F.adaptive_avg_pool2d(factor, size)
    return F.normalize(at_least_float32(factor).flatten(1))


def convolutions(kind: Callable[..., nn.Module], widths: tuple[int, int, int, int]) -> nn.Sequential:
    """Three 3 x 3 layers of ``kind`` from the first width to the last, each with a leaky ReLU."""
    layers = [nn.Sequential(kind(c, d, 3, padding=1), nn.LeakyReLU(0.1)) for c, d in pairwise(widths)]
    return nn.Sequential(*layers)


@final
class Paraphraser(nn.Module):
    """An auto-encoder of feature maps whose code, a factor, has fewer channels."""

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        self.encoder = convolutions(nn.Conv2d, (channels, channels, factors, factors))
        self.decoder = convolutions(nn.ConvTranspose2d, (factors, factors, channels, channels))

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features again."""
        return self.decoder(self.encoder(features))


@final
class FT(PreparedDistiller):
    """Match the teacher's paraphrased features with translated ones."""

    def __init__(
        self,
        setup: Setup,
        *,
        weight: float = 1000.0,
        label_weight: float = 1.0,
        output_weight: float = 0.0,
        output_temperature: float = 4.0,
        rate: float = 0.5,
        paraphraser_epochs: int = 1,
        paraphraser_lr: float | None = None,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
    ) -> None:
        super().__init__(
            setup, label_weight=label_weight, output_weight=output_weight, output_temperature=output_temperature
        )
        check_weight(weight)
        if not 0 < rate <= 1:
            raise UserError(f"method.rate must be above 0 and at most 1, not {rate}; 0.5 is the paper's.")
        self.weight = weight
        named = [None if layer is None else (layer,) for layer in (student_layer, teacher_layer)]
        self.match(*named)
        self.layers, self.teacher_layers = self.layers[-1:], self.teacher_layers[-1:]
        ours, theirs = self.layers[0].channels, self.teacher_layers[0].channels
        factors = max(1, round(rate * theirs))
        self.paraphraser = Paraphraser(theirs, factors)
        self.translator = convolutions(nn.Conv2d, (ours, ours, factors, factors))
        self.prepare("paraphraser", [self.paraphraser], paraphraser_epochs, paraphraser_lr)

    def preparation(self, theirs: Seen) -> dict[str, Tensor]:
        """``{"reconstruction": mean squared error of the paraphraser}``."""
        (features,) = theirs.maps
        return {"reconstruction": F.mse_loss(at_least_float32(self.paraphraser(features)), at_least_float32(features))}

    def terms(self, batch: Batch, ours: Seen, theirs: Seen) -> dict[str, Tensor]:
        """``{"factor": weight * distance}`` and, where they have a weight, ``"output"`` and ``"label"``."""
        with torch.no_grad():
            target = self.paraphraser.encoder(theirs.maps[0])
        factor = self.weight * factor_distance(self.translator(ours.maps[0]), target)
        return {"factor": factor, **self.logit_terms(batch, ours.logits, theirs.logits)}
