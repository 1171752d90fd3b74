"""GALS: a vision-language model's attention says where the classifier's gradients may be.

Formula. ``mean_i [ -log p_iy + weight * mean_d |(1 - A_id) * d(-log p_iy)/dx_id| ]``, d over pixels and channels, with
A in [0, 1] the attention of a vision-language model: its Grad-CAM for prompts that name what matters, stretched to
[0, 1] per image and prompt, averaged over prompts, stretched again and enlarged to the image. A soft mask: where it is
1 gradients are free, where it is 0 they are punished in full.

Source. Petryk, Dunlap, Nasseri, Gonzalez, Darrell & Rohrbach, On guiding visual attention with language
specification, CVPR 2022, https://arxiv.org/abs/2202.08926 (there with CLIP's ResNet-50, whose Grad-CAM is taken at
the last block).

Where attention comes from. Without ``attention`` it is the teacher's Grad-CAM for the label's class, made with each
batch: prompts per class, the teacher being a zero-shot CLIP of the classes (``model: {name: open_clip/RN50,
pretrained: openai, zero_shot: {classes: [...]}}``). With ``attention``, a file of numpy's, it is made once
beforehand and looked up by sample: :func:`language_attention` makes it for any prompts, such as the ones that name no
class ("a photo of a bird" for Waterbirds). The file belongs to the training split, so that in validation
the loss is the label's alone.

Deviations. The published weight, 10,000 for Waterbirds, multiplies gradients of the mean loss over a batch of 96;
here each sample's own loss is differentiated, whatever the batch, and the same strength is 10,000 / 96 = 104. (Bassi,
Cavalli & Decherchi, 2024, https://arxiv.org/abs/2407.09788, re-tuned it to 100 with batches of 16: 6.25 here.)
A prompt without any attention in an image is left out of its average, as published; an image without any is not
punished at all, as published, but counts in the mean over the batch. Stretching goes from minimum to maximum; the code
divides by the maximum from before the minimum is taken off. Batch norm in training mode is held constant
inside the gradient (``statistics: differentiated`` is plain autograd). Grad-CAM alone; attention of CLIP's
transformer blocks is not offered.

Supervision. Labels and a teacher that saw image-text pairs; no masks. The authors choose the weight by validation
accuracy; Bassi et al. did on unbiased validation images (``selection: ood_val``).

Cost. A backward pass to the pixels, and a second-order one through it: about three ERM steps; besides, without
``attention``, the teacher's forward pass.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Draws, Method, Setup, Split, TargetRule
from hansfree.errors import UserError
from hansfree.explainers import GradCAM, LossGradient
from hansfree.explainers.nodes import Statistics


def stretched(map: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n h w"]:
    """Each map from its minimum, 0, to its maximum, 1; a flat map to zeros."""
    low, high = map.amin((-2, -1), keepdim=True), map.amax((-2, -1), keepdim=True)
    return (map - low) / (high - low).where(high > low, torch.ones_like(high))


def combined(maps: Float[Tensor, "b k h w"]) -> Float[Tensor, "b h w"]:
    """Attention in [0, 1] of k prompts: stretched, averaged over the prompts that have any, stretched again."""
    maps = stretched(maps)
    there = maps.flatten(2).any(2)
    return stretched(maps.sum(1) / there.sum(1).clamp_min(1)[:, None, None])


@torch.no_grad()
def language_attention(
    model: nn.Module, split: Split, *, layer: str | None = None, batch_size: int = 64
) -> Float[Tensor, "n h w"]:
    """Where a zero-shot CLIP finds its prompts in each image of ``split``, in [0, 1], in order, on the CPU.

    Maps have the size of the layer's feature map.

    ``model`` is a classifier whose classes are the prompts, such as ``load_model("open_clip/RN50",
    pretrained="openai", options={"zero_shot": {"classes": ["an image of a bird", "a photo of a bird"], "templates":
    ["{}"]}})``; all of them count. ``layer`` as in :class:`hansfree.explainers.GradCAM`. Keep the result with
    ``numpy.save("maps.npy", attention.numpy())``, and give ``attention: maps.npy`` to the method.
    """
    device, model = next(model.parameters()).device, model.eval()

    def every_prompt(logits: Tensor) -> Tensor:
        return torch.arange(logits.shape[1]).expand(len(logits), -1)

    made: list[Tensor] = []
    for index in torch.arange(len(split)).split(batch_size):
        images = split.batch(index).to(device).images
        made.append(combined(GradCAM(layer)(model, images, every_prompt).map.squeeze(2)).cpu())
    return torch.cat(made)


@final
@dataclass(frozen=True, eq=False)
class _Given(TargetRule):
    """The classes it was made with."""

    label: Int[Tensor, "b"]

    def choose(self, logits: Float[Tensor, "b classes"], draws: Draws) -> Int[Tensor, "b"]:
        return self.label


@final
class GALS(Method):
    """No gradient of the loss where a vision-language model sees nothing of the prompts."""

    needs = frozenset({"teacher"})

    attention: Tensor | None

    def __init__(
        self,
        setup: Setup,
        *,
        attention: str | None = None,
        weight: float = 104.0,
        layer: str | None = None,
        statistics: Statistics = "constant",
    ) -> None:
        super().__init__(setup)
        if weight <= 0:
            raise UserError(f"method.weight must be above 0, not {weight}; without the penalty the method is erm.")
        self.weight, self.explainer, self.looks = weight, LossGradient(statistics), GradCAM(layer)
        stored = None if attention is None else read_attention(attention, setup)
        self.register_buffer("attention", stored, persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": cross-entropy, "background": weight times the mean size of its gradient outside of A}``.

        In validation, with attention from a file, the label's term alone.
        """
        if self.attention is not None and not self.training:
            return {"label": F.cross_entropy(self.student(batch.images), batch.label)}
        logits, gradient = self.explainer(self.student, batch.images, batch.label)
        attention = self._attention(batch)
        seen = attention.flatten(1).any(1)
        punished = ((1 - attention) * gradient).abs().flatten(1).mean(1)
        penalty = torch.where(seen, punished, 0.0).mean()
        return {"label": F.cross_entropy(logits, batch.label), "background": self.weight * penalty}

    def _attention(self, batch: Batch) -> Float[Tensor, "b 1 h w"]:
        if self.attention is None:
            small = combined(self.teacher.answer(batch, self.looks, _Given(batch.label), {}).map)
        else:
            small = self.attention[batch.index]
        return F.interpolate(small.unsqueeze(1), batch.images.shape[-2:], mode="bilinear")


def read_attention(path: str, setup: Setup) -> Float[Tensor, "n h w"]:
    """Attention from a file. Raises ``UserError`` unless it is one map in [0, 1] for each training sample."""
    try:
        values = torch.from_numpy(np.load(Path(path), allow_pickle=False)).float()
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise UserError(
            f"method.attention: {path} cannot be read as maps ({error}); make it with "
            "hansfree.methods.gals.language_attention and numpy.save."
        ) from error
    if values.ndim != 3 or len(values) != setup.samples:
        raise UserError(
            f"method.attention: {path} holds an array of shape {list(values.shape)}, but the {setup.samples} training "
            f"samples need [{setup.samples}, height, width]; make it on the training split."
        )
    if not 0 <= float(values.min()) <= float(values.max()) <= 1:
        raise UserError(
            f"method.attention: {path} must hold values in [0, 1], but they go from {values.min():.3g} to "
            f"{values.max():.3g}; stretch each map first."
        )
    return values
