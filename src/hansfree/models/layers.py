"""Normalisation layers by name, and the one that leaves a network without any bias."""

from typing import Literal

import torch
from torch import Tensor, nn

from hansfree.core import held_affine

Norm = Literal["batch", "scale", "none"]


class ScaleNorm(nn.Module):
    """Batch norm without mean and shift: ``y = w * x / sqrt(mean(x^2) + eps)`` per channel.

    Nothing is subtracted and nothing is added, so in eval mode the network has no bias here, and relevance
    that LRP propagates is not absorbed. In training mode the mean square is the batch's, as in batch norm,
    and a running one is kept for eval mode; where ``running`` is None the batch's is used in eval mode too.
    """

    running: Tensor | None

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [b, channels, ...]."""
        dims = [0, *range(2, x.dim())]
        if self.training or self.running is None:
            square = x.to(self.weight.dtype).square().mean(dims)  # autocast may have halved x's precision
            if self.training and self.running is not None:
                self.running = self.running.lerp(square.detach(), self.momentum)
        else:
            square = self.running
        scale = self.weight * (square + self.eps).rsqrt()
        return held_affine(x, scale.view(1, -1, *[1] * (x.dim() - 2)))


def normalisation(kind: Norm, channels: int) -> nn.Module:
    """The layer that ``kind`` names: ordinary batch norm, :class:`ScaleNorm`, or nothing."""
    return {"batch": nn.BatchNorm2d, "scale": ScaleNorm, "none": lambda _: nn.Identity()}[kind](channels)


def start_like_he(network: nn.Module) -> None:
    """Draw convolution weights as He et al. (2015) do: normal with variance 2 / fan-in."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
