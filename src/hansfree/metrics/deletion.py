"""Does a map name the pixels that count? The class's probability while they are deleted, or shown one after another.

Deletion replaces the most relevant pixels of an image first, all channels at once; insertion begins with the
replacement and puts the image's pixels back in the same order. With p(f) the class's probability when a share f of all
pixels has been exchanged, at the steps f = 0, 1/T, ..., 1:

    area = (1/T) sum_t (p(f_t) + p(f_t+1)) / 2        the trapezoid rule; in [0, 1]

A map that names the right pixels has a small area under deletion and a large one under insertion. Both depend on what
replaces a pixel, so the fill belongs to every number, and on the network, so that areas of two networks cannot be
compared without those of pixels in random order, :func:`random_map`, beside them.

Source. Petsiuk et al., RISE, 2018, https://arxiv.org/abs/1806.07421, section 4.2 and code. There the fill is constant
for deletion and a blurred image for insertion, and a step is one row of pixels. Pixels of equal relevance go in reading
order, as no published definition says.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hansfree import backgrounds
from hansfree.errors import UserError
from hansfree.metrics.explanation_agreement import Maps, Scores, pixels

Images = Float[Tensor, "b c h w"]
Curve = Float[Tensor, "b points"]
Fill = Literal["mean", "black", "blur"]

BLUR, SPREAD = 11, 5.0
"""Width and standard deviation, in pixels, of the published blur."""


def blurred(images: Images) -> Images:
    """The images under a Gaussian window of 11 x 11 pixels with standard deviation 5; borders are mirrored."""
    x = torch.arange(BLUR, dtype=images.dtype, device=images.device) - BLUR // 2
    bell = (-(x**2) / (2 * SPREAD**2)).exp()
    bell = (bell / bell.sum()).expand(images.shape[1], 1, 1, BLUR)
    mode = "reflect" if min(images.shape[-2:]) > BLUR // 2 else "replicate"
    padded = F.pad(images, [BLUR // 2] * 4, mode=mode)
    rows = F.conv2d(padded, bell, groups=images.shape[1])
    return F.conv2d(rows, bell.transpose(2, 3), groups=images.shape[1])


FILLS: Mapping[Fill, Callable[[Images], Images]] = {
    "mean": lambda images: backgrounds.mean_colour(images).expand_as(images),
    "black": torch.zeros_like,
    "blur": blurred,
}
"""What stands in the place of a pixel: the image's mean colour, black, or the blurred image."""


def deletion_curve(
    probability: Callable[[Images], Scores], images: Images, map: Maps, *, fill: Fill = "mean", steps: int = 16
) -> Curve:
    """The class's probability while the most relevant pixels are replaced, from none to all, [b, steps + 1].

    ``probability`` gives that of each image's own class. Raises ``UserError`` for no step.
    """
    return _exchanged(probability, images, FILLS[fill](images), map, steps)


def insertion_curve(
    probability: Callable[[Images], Scores], images: Images, map: Maps, *, fill: Fill = "blur", steps: int = 16
) -> Curve:
    """The class's probability while the most relevant pixels are put back, from none to all, [b, steps + 1].

    Raises ``UserError`` for no step.
    """
    return _exchanged(probability, FILLS[fill](images), images, map, steps)


def area(curve: Curve) -> Scores:
    """The area under each curve, whose points are evenly spaced from 0 to 1: the trapezoid rule."""
    return torch.trapezoid(curve.double(), dim=1) / (curve.shape[1] - 1)


def random_map(images: Images, seed: int = 0) -> Float[Tensor, "b h w"]:
    """A map that puts pixels in random order: what an explanation has to be better than."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images.shape[0], *images.shape[-2:], generator=generator).to(images.device)


def _exchanged(probability: Callable[[Images], Scores], start: Images, end: Images, map: Maps, steps: int) -> Curve:
    """Probabilities while pixels of ``start`` become those of ``end``, the most relevant ones first."""
    if steps < 1:
        raise UserError(f"Deletion and insertion need at least one step, but {steps} were asked for.")
    relevance = pixels(map).flatten(1)
    place = relevance.argsort(dim=1, descending=True, stable=True).argsort(dim=1).view(len(map), 1, *map.shape[-2:])
    count = relevance.shape[1]
    shares = (probability(torch.where(place < round(count * t / steps), end, start)) for t in range(steps + 1))
    return torch.stack(list(shares), 1)
