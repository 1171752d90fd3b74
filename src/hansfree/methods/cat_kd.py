"""Class attention transfer: the student's class activation maps match the teacher's, for all classes.

Formula. ``L = weight * mse(n(A_S), n(A_T)) + label_weight * CE(s, y)`` with the class activation maps
``A_k = sum_c W_kc f_c`` of the last feature map f, average-pooled to ``resolution`` x ``resolution``; n divides the
map of each class by its L2 norm over space. The mean of squares is over samples, classes and pixels.
``output_weight`` adds kd's term, at ``output_temperature``.

Source. Guo, Yan, Li & Lin, Class attention transfer based knowledge distillation, CVPR 2023,
https://arxiv.org/abs/2304.12777; the defaults are those of its published code for CIFAR-100 (2 x 2, weight 400). Its
ImageNet setting is ``weight: 0.5, resolution: 4, normalised: false``. As a rival of e2KD: Parchami-Araghi et al., 2024,
https://arxiv.org/abs/2402.03119.

Deviations. The published networks are rebuilt so that a 1x1 convolution without bias stands before the pooling; here
any network that averages its last feature map and ends in one linear layer does as it is, and its bias is left out of
the maps, as there. Networks that classify at each position and then average, as B-cos networks do, show their class
activation maps themselves: what the convolution gives (the same in e2KD's published code). Others are refused.

Supervision. A teacher; labels unless label_weight is 0.

Cost. The teacher's forward pass on top of an ERM step, and a 1x1 convolution for each: 1.7 ERM steps where kd takes
1.6.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, InputSpec, Setup
from hansfree.errors import UserError
from hansfree.explainers.propagation import at_least_float32
from hansfree.methods.distiller import Distiller, check_weight, last_layer
from hansfree.methods.matched_layers import FeatureLayer, Seen, Watched, find_layers


def class_attention_transfer(
    student: Float[Tensor, "b classes h w"],
    teacher: Float[Tensor, "b classes h2 w2"],
    resolution: int = 2,
    normalised: bool = True,
) -> Float[Tensor, ""]:
    """Mean squared difference of class activation maps, pooled to one size and each normalised over space."""
    ours, theirs = (F.adaptive_avg_pool2d(at_least_float32(map), resolution).flatten(2) for map in (student, teacher))
    return F.mse_loss(F.normalize(ours, dim=2), F.normalize(theirs, dim=2)) if normalised else F.mse_loss(ours, theirs)


@final
class CATKD(Distiller):
    """Match the teacher's class activation maps."""

    def __init__(
        self,
        setup: Setup,
        *,
        weight: float = 400.0,
        label_weight: float = 1.0,
        output_weight: float = 0.0,
        output_temperature: float = 4.0,
        resolution: int = 2,
        normalised: bool = True,
    ) -> None:
        super().__init__(
            setup, label_weight=label_weight, output_weight=output_weight, output_temperature=output_temperature
        )
        check_weight(weight)
        if resolution < 1 or (normalised and resolution < 2):
            raise UserError(
                f"method.resolution must be 2 or above, not {resolution}: one pixel, normalised, is always 1 or -1."
            )
        self.weight, self.resolution, self.normalised = weight, resolution, normalised
        self.layers = _pooled_layer(self.student, setup.input, "student")
        self.teacher_layers = _pooled_layer(self.teacher.model, setup.input, "teacher")

    def terms(self, batch: Batch, ours: Seen, theirs: Seen) -> dict[str, Tensor]:
        """``{"class-attention": weight * mse}`` and, where they have a weight, ``"output"`` and ``"label"``."""
        maps = (
            activation_maps(model, seen.maps[0]) for model, seen in ((self.student, ours), (self.teacher.model, theirs))
        )
        distance = class_attention_transfer(*maps, resolution=self.resolution, normalised=self.normalised)
        return {"class-attention": self.weight * distance, **self.logit_terms(batch, ours.logits, theirs.logits)}


def activation_maps(model: nn.Module, watched: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes h w"]:
    """``sum_c W_kc f_c`` with the weights of the model's last layer, or what that gives where it is a convolution."""
    layer = last_layer(model, "model")
    return F.conv2d(watched, layer.weight[:, :, None, None]) if isinstance(layer, nn.Linear) else watched


def _pooled_layer(model: nn.Module, input: InputSpec, role: str) -> tuple[FeatureLayer]:
    """The layer whose output, or class activation maps of it, the model averages.

    Raises ``UserError`` where its logits are not made that way.
    """
    layer, found = last_layer(model, role), find_layers(model, input)[-1]
    refused = UserError(
        f"cat-kd needs a {role} that averages its last feature map, of more than one pixel, and ends in one linear "
        "layer, or classifies at each position of that map; choose another network or another method."
    )
    if isinstance(layer, nn.Linear):
        if found.channels != layer.in_features:
            raise refused
    else:
        path = next(path for path, part in model.named_modules() if part is layer)
        try:
            (found,) = find_layers(model, input, [path])
        except UserError as error:
            raise refused from error
    watched = Watched(model, [found])
    modes = {module: module.training for module in watched.model.modules()}
    watched.model.eval()
    images = torch.linspace(0, 1, input.channels * input.height * input.width).to(next(model.parameters()))
    with torch.no_grad():
        logits, maps, _ = watched.seen(watched.model(images.view(1, input.channels, input.height, input.width)))
        pooled = activation_maps(model, maps[0]).mean((2, 3))
        if isinstance(layer, nn.Linear):
            pooled = pooled if layer.bias is None else pooled + layer.bias
        elif pooled.shape == logits.shape:  # B-cos networks divide by a temperature and add one bias to all classes
            pooled = _on_the_line(pooled, logits)
    for module, mode in modes.items():
        module.training = mode
    if pooled.shape != logits.shape or not torch.allclose(
        pooled, logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max())
    ):
        raise refused
    return (found,)


def _on_the_line(pooled: Float[Tensor, "1 classes"], logits: Float[Tensor, "1 classes"]) -> Float[Tensor, "1 classes"]:
    """The multiple of ``pooled``, shifted by one number for all classes, that is nearest to ``logits``."""
    x, y = pooled - pooled.mean(), logits - logits.mean()
    return logits.mean() + x * (x * y).sum() / x.square().sum().clamp_min(1e-30)
