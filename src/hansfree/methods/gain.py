"""Guided attention inference (GAIN_ext): Grad-CAM covers the object, all of it, and nothing else.

Formula. ``L = L_cl + mining_weight * L_am + mask_weight * L_e``, each a mean over samples, with A the Grad-CAM map of
the label, enlarged to the image:

- L_cl is the cross-entropy.
- L_am = p_y(x - T * x) with ``T = sigmoid(omega * (A - sigma))``: what is left of the image where attention is taken
  out should not show the class any more (eq. 3 to 5; p_y is the softmax probability).
- L_e = mean over pixels of (A - mask)^2 (eq. 6 and 7).

Source. Li, Wu, Peng, Ernst & Fu, Tell me where to look: guided attention inference network, CVPR 2018,
https://arxiv.org/abs/1802.10171.

Deviations. The softmax probability stands for the paper's prediction score. omega 10, sigma 0.5 and the weights 1 and
10 are the defaults of published implementations, the one of Bassi, Cavalli & Decherchi, 2024, among them. As there,
A is neither divided by its peak nor cut off: L_e teaches it the scale of the mask. Unlike there, the weights of
Grad-CAM keep their graph. Pixels that are taken out are black (0), not the mean colour. In training mode the image
without its attention is normalised by the batch statistics of whole images, as it would be in evaluation; the published
code gives it statistics of its own, with which its score falls in training mode alone, and lets it refresh the
running ones, after which the attention of evaluation mode is another. Inside Grad-CAM batch norm is held constant
(``statistics: differentiated`` is plain autograd).

Supervision. Labels and masks of the object, the first mask where there are several. Bassi et al.,
https://arxiv.org/abs/2407.09788, chose the weights on unbiased validation images (``selection: ood_val``), with a
``mask_weight`` of 1e4 in the end.

Cost. Two more forward passes with their backward passes, and that of Grad-CAM: four to five ERM steps.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hansfree.core import Batch, Method, Setup
from hansfree.errors import UserError
from hansfree.explainers import GradCAM
from hansfree.explainers.nodes import Statistics
from hansfree.explainers.repetition import Passes
from hansfree.methods.rrr import object_mask


def without_attention(
    images: Float[Tensor, "b c h w"], attention: Float[Tensor, "b 1 h w"], omega: float, sigma: float
) -> Float[Tensor, "b c h w"]:
    """The images with what is attended to taken out: ``x - sigmoid(omega (A - sigma)) x`` (eq. 3 and 4)."""
    return images - torch.sigmoid(omega * (attention - sigma)) * images


@final
class GAIN(Method):
    """Grad-CAM covers the object, all of it, and nothing else."""

    needs = frozenset({"mask"})

    def __init__(
        self,
        setup: Setup,
        *,
        mining_weight: float = 1.0,
        mask_weight: float = 10.0,
        omega: float = 10.0,
        sigma: float = 0.5,
        layer: str | None = None,
        statistics: Statistics = "constant",
    ) -> None:
        super().__init__(setup)
        for name, weight in (("mining_weight", mining_weight), ("mask_weight", mask_weight)):
            if weight < 0:
                raise UserError(f"method.{name} must be 0 or above, not {weight}.")
        if omega <= 0:
            raise UserError(f"method.omega must be above 0, not {omega}: it is the slope of the soft mask.")
        self.mining_weight, self.mask_weight, self.omega, self.sigma = mining_weight, mask_weight, omega, sigma
        self.explainer = GradCAM(layer=layer, resize=True, statistics=statistics)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": L_cl, "mining": mining_weight * L_am, "attention": mask_weight * L_e}``."""
        mask = object_mask(batch, "gain")
        passes = Passes(self.student, "constant")
        logits = passes.first(batch.images)
        attention = self.explainer(passes.copy, batch.images, batch.label).map
        rest = without_attention(batch.images, attention, self.omega, self.sigma)
        left = passes(rest).softmax(1).gather(1, batch.label[:, None]).mean()
        return {
            "label": F.cross_entropy(logits, batch.label),
            "mining": self.mining_weight * left,
            "attention": self.mask_weight * F.mse_loss(attention, mask),
        }
