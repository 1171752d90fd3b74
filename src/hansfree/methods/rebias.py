"""ReBias: features that are independent of those of a network too narrow-sighted to learn anything but the bias.

Formula. The student f and the bias network g play ``min_f max_g``: f minimises ``CE(f) + w HSIC(f, g)``, g minimises
``CE(g) - w HSIC(f, g)``, of what goes into their last layers. With RBF kernels
``exp(-|a - b|^2 / (2 sigma^2))``, their matrices K and L with zeroed diagonals, and m images,

    HSIC = [tr(K L) + (1'K 1)(1'L 1) / ((m - 1)(m - 2)) - 2 (1'K L 1) / (m - 2)] / (m (m - 3))

Source. Bahng, Chun, Yun, Choo & Oh, Learning de-biased representations with biased representations, ICML 2020,
https://arxiv.org/abs/1910.02806, section 3 (HSIC after Song et al., 2012); weight 1, sigma 1 and the bias network from
the published code for coloured digits: four convolutions of 1 x 1 with 16, 32, 64 and 128 channels, batch norm and
ReLU, and global average pooling. Each of its features so sees one pixel.

Deviations. f and g are updated in one step, g's term with f's features held constant and the other way round; the
published code updates g first. The two are parameter groups of one optimiser and are clipped apart. The code's other
bandwidths (the median distance, the width) are not there; its HSIC subtracts 1 from all of K and L where the diagonals
should be zeroed, which comes to the same. Batches of fewer than four images have no estimate, and no such terms. In
validation the loss is the student's cross-entropy.

Supervision. Knowledge of the bias, in the form of an architecture: ``bias_kernels`` must be so small that the network
can see the bias and not the object. That it sees less than the student is measured when the method is built, and else
refused. ``[1, 1, 1, 1]`` stands for colour; 3 in some of the places lets it see textures.

Cost. An ERM step of each network, at full resolution in the bias network; and two products of the batch with itself.
"""

import copy
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hansfree.core import Batch, Classifier, InputSpec, Method, Setup, Stage
from hansfree.errors import UserError
from hansfree.explainers.propagation import at_least_float32
from hansfree.methods.distiller import last_layer
from hansfree.methods.matched_layers import Watched
from hansfree.methods.second_network import side_by_side
from hansfree.metrics.cka import hsic


def rbf_kernel(x: Float[Tensor, "m d"], sigma: float) -> Float[Tensor, "m m"]:
    """``exp(-|x_i - x_j|^2 / (2 sigma^2))``."""
    square = x.square().sum(1)
    distance = (square[:, None] + square - 2 * x @ x.T).clamp(min=0)
    return (-distance / (2 * sigma**2)).exp()


@final
class NarrowCNN(nn.Module):
    """The bias network: conv - batch norm - ReLU of the given kernels, all at full resolution, pooled globally.

    One of its features sees ``1 + sum (kernel - 1)`` pixels across.
    """

    def __init__(self, num_classes: int, channels: int, kernels: tuple[int, ...], widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in zip((channels, *widths[:-1]), widths, kernels, strict=True):
            conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b widths h w"]:
        """The last feature map."""
        return self.layers(x)

    def pooled(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b widths"]:
        """What goes into the last layer."""
        return self.forward_features(x).mean((2, 3))


def receptive_field(features: Callable[[Tensor], Tensor], input: InputSpec) -> int:
    """How many pixels across the middle of a feature map depends on, measured by gradients at random images.

    Where features are no map, [b, c, h, w], the longer side of the image.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, input.channels, input.height, input.width, generator=generator).requires_grad_()
    found = features(images)
    if found.ndim != 4:
        return max(input.height, input.width)
    middle = found[:, :, found.shape[2] // 2, found.shape[3] // 2]
    touched = torch.autograd.grad(middle.sum(), images)[0].abs().sum((0, 1)) > 0
    return max(_extent(touched.any(1)), _extent(touched.any(0)))


def _extent(touched: Tensor) -> int:
    places = touched.nonzero()
    return int(places.max() - places.min()) + 1 if len(places) else 0


@final
class ReBias(Method):
    """Be independent of what a narrow-sighted network can know."""

    needs = frozenset({"bias-model"})

    def __init__(
        self,
        setup: Setup,
        *,
        weight: float = 1.0,
        sigma: float = 1.0,
        bias_kernels: tuple[int, ...] = (1, 1, 1, 1),
        bias_widths: tuple[int, ...] = (16, 32, 64, 128),
    ) -> None:
        super().__init__(setup)
        if min(weight, sigma) <= 0:
            raise UserError(f"method.weight and sigma must be above 0, not {weight} and {sigma}.")
        if len(bias_kernels) != len(bias_widths) or not all(k > 0 and k % 2 for k in bias_kernels):
            raise UserError(
                "method.bias_kernels must be odd numbers, as many as method.bias_widths, not "
                f"{list(bias_kernels)} for {list(bias_widths)}."
            )
        self.weight, self.sigma = weight, sigma
        self.biased = NarrowCNN(setup.classes, setup.input.channels, bias_kernels, bias_widths)
        self._check_receptive_fields(setup)

    def _check_receptive_fields(self, setup: Setup) -> None:
        if not isinstance(self.student, Classifier):
            raise UserError("rebias needs a student that shows its features; load it with load_model, or wrap it.")
        networks = copy.deepcopy(self.biased).eval(), copy.deepcopy(self.student).eval()
        theirs, ours = (receptive_field(network.forward_features, setup.input) for network in networks)
        if theirs >= ours:
            raise UserError(
                f"The bias network sees {theirs} pixels across and the student {ours}, so that it could learn what the "
                "student should; give method.bias_kernels smaller numbers."
            )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"label": CE(f), "independence": w HSIC, "biased": CE(g), "dependence": -w HSIC}``."""
        if not self.training:
            return {"label": F.cross_entropy(self.student(batch.images), batch.label)}
        watched = Watched(self.student, last=last_layer(self.student, "student"))
        seen = watched.seen(watched.model(batch.images))
        assert seen.embedding is not None
        narrow = self.biased.pooled(batch.images)
        with torch.autocast(batch.index.device.type, enabled=False):
            kernel, narrow_kernel = (rbf_kernel(at_least_float32(x), self.sigma) for x in (seen.embedding, narrow))
            return {
                "label": F.cross_entropy(at_least_float32(seen.logits), batch.label),
                "independence": self.weight * hsic(kernel, narrow_kernel.detach()),
                "biased": F.cross_entropy(self.biased.fc(at_least_float32(narrow)), batch.label),
                "dependence": -self.weight * hsic(kernel.detach(), narrow_kernel),
            }

    def next_stage(self) -> Stage | None:
        """One stage, the two networks clipped apart."""
        return side_by_side(self, self.biased)
