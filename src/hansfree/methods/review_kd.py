"""Knowledge review: each stage of the student, fused with all later ones, matches a stage of the teacher.

Formula. ``L = weight * min(e / warmup_epochs, 1) * sum_i HCL(r_i, f_T,i) + label_weight * CE(s, y)`` in epoch e = 1,
2 ... From the last stage to the first, attention based fusion (ABF) turns the student's map f_S,i and the fused map
u_(i+1) of the stage after it into

    x = BN(conv1x1(f_S,i)),  (p, q) = sigmoid(conv1x1([x, u_(i+1)])),  u_i = p x + q u_(i+1),  r_i = BN(conv3x3(u_i))

with u_(i+1) enlarged to f_S,i and u_i resized to the teacher's map before the last convolution; what goes into the
last layers is the last stage, and has nothing to be fused with. The hierarchical context loss of two maps is the
weighted mean of their mean squared differences at full size (weight 1) and pooled to 4 x 4, 2 x 2 and 1 x 1 (weights
1/2, 1/4, 1/8; only sizes below the map's own).
``output_weight`` adds kd's term, at ``output_temperature``.

Source. Chen, Liu, Zhao & Jia, Distilling knowledge via knowledge review, CVPR 2021, https://arxiv.org/abs/2104.09044;
weight 1 and one epoch of warm-up (that is, none) as on ImageNet; on CIFAR-100 the published code warms up for 20
epochs. As a rival of e2KD: Parchami-Araghi et al., 2024, https://arxiv.org/abs/2402.03119.

Deviations. The published code takes maps before their ReLU where it can; here they are the stages' outputs, found (the
last feature map of each of the four smallest resolutions) or named. Those of B-cos networks, which have no ReLU, are
taken as they are, and so does e2KD's published code; fusions are ordinary layers there too, and no part of what is
explained. Epochs are counted in samples seen. Validation has no warm-up.

Supervision. A teacher; labels unless label_weight is 0.

Cost. The teacher's forward pass and the fusions, which are as wide as the student's last stage: 3.6 ERM steps for a
small ResNet where kd takes 1.6. Their weights are trained and not exported.
"""

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Setup
from hansfree.errors import UserError
from hansfree.explainers.propagation import at_least_float32
from hansfree.methods.distiller import Distiller, Paths, check_weight, last_layer
from hansfree.methods.groups import gathered
from hansfree.methods.matched_layers import Seen

WIDEST = 512
"""Channels of the fused maps, at most."""


def hierarchical_context_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    """Weighted mean of the mean squared differences at full size and pooled to 4 x 4, 2 x 2 and 1 x 1."""
    loss, total, weight = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[-2]:
            weight /= 2
            ours, theirs = (F.adaptive_avg_pool2d(map, side) for map in (student, teacher))
            loss, total = loss + weight * F.mse_loss(ours, theirs), total + weight
    return loss / total


@final
class Fusion(nn.Module):
    """Attention based fusion of a stage of the student with the fused map of the stage after it."""

    def __init__(self, channels: int, width: int, out_channels: int, *, fuses: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.out = nn.Sequential(nn.Conv2d(width, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None
        for convolution in (self.narrow[0], self.out[0]):
            assert isinstance(convolution, nn.Conv2d)
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, features: Tensor, later: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """The map that should match the teacher's, of ``size``, and the fused map for the stage before."""
        x = self.narrow(features)
        if self.attention is not None and later is not None:
            later = F.interpolate(later, x.shape[-2:], mode="nearest")
            p, q = self.attention(torch.cat([x, later], 1)).split(1, 1)
            x = p * x + q * later
        x = x if x.shape[-2:] == size else F.interpolate(x, tuple(size), mode="nearest")
        return self.out(x), x


@final
class ReviewKD(Distiller):
    """Match the teacher's stages with the student's, each reviewed together with all later ones."""

    embeds = True
    samples_seen: Tensor

    def __init__(
        self,
        setup: Setup,
        *,
        weight: float = 1.0,
        label_weight: float = 1.0,
        output_weight: float = 0.0,
        output_temperature: float = 4.0,
        warmup_epochs: int = 1,
        student_layers: Paths = None,
        teacher_layers: Paths = None,
    ) -> None:
        super().__init__(
            setup, label_weight=label_weight, output_weight=output_weight, output_temperature=output_temperature
        )
        check_weight(weight)
        if warmup_epochs < 1:
            raise UserError(f"method.warmup_epochs must be 1 (no warm-up) or above, not {warmup_epochs}.")
        self.weight, self.warmup_epochs = weight, warmup_epochs
        self.match(student_layers, teacher_layers)
        ours = [layer.channels for layer in self.layers] + [width_of(last_layer(self.student, "student"))]
        theirs = [layer.channels for layer in self.teacher_layers] + [
            width_of(last_layer(self.teacher.model, "teacher"))
        ]
        width, last = min(WIDEST, ours[-1]), len(ours) - 1
        fusions = [Fusion(s, width, t, fuses=i < last) for i, (s, t) in enumerate(zip(ours, theirs, strict=True))]
        self.fusions = nn.ModuleList(fusions)
        self.register_buffer("samples_seen", torch.zeros((), dtype=torch.long))

    def terms(self, batch: Batch, ours: Seen, theirs: Seen) -> dict[str, Tensor]:
        """``{"review": weight * sum over stages}`` and, where they have a weight, ``"output"`` and ``"label"``."""
        losses, later = list[Tensor](), None
        for fusion, features, target in zip(reversed(self.fusions), _stages(ours), _stages(theirs), strict=True):
            result, later = fusion(features, later, target.shape[-2:])
            losses.append(hierarchical_context_loss(at_least_float32(result), at_least_float32(target)))
        review = self.weight * self._warmth() * torch.stack(losses).sum()
        return {"review": review, **self.logit_terms(batch, ours.logits, theirs.logits)}

    def _warmth(self) -> Tensor | float:
        epoch = 1 + self.samples_seen // self._setup.samples
        return (epoch / self.warmup_epochs).clamp(max=1) if self.training else 1.0

    def observe(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Count samples."""
        self.samples_seen = self.samples_seen + len(gathered(batch.index))


def _stages(seen: Seen) -> list[Tensor]:
    """From the last to the first."""
    assert seen.embedding is not None
    return [seen.embedding[:, :, None, None], *reversed(seen.maps)]


def width_of(layer: nn.Module) -> int:
    """How many numbers go into a last layer. Raises ``UserError`` for one that is neither linear nor a convolution."""
    width = getattr(layer, "in_features", getattr(layer, "in_channels", None))
    if not isinstance(width, int):
        raise UserError(
            f"The last layer is a {type(layer).__name__}, neither linear nor a convolution; choose kd or at."
        )
    return width
