"""What stands behind an object, and what to put there instead. Given masks: 1 on the object, 0 elsewhere.

``replace`` keeps ``mask * image`` and fills the rest, ``(1 - mask) * background``; the others make backgrounds.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LOW_BITS = 0xFFFFFFFF


def replace(
    images: Float[Tensor, "b c h w"], mask: Float[Tensor, "b 1 h w"], background: Tensor
) -> Float[Tensor, "b c h w"]:
    """``mask * images + (1 - mask) * background``, exact where the mask is 0 or 1."""
    return torch.lerp(background.expand_as(images), images, mask.to(images.dtype).expand_as(images))


def noise(seed: Int[Tensor, "b"], channels: int, height: int, width: int) -> Float[Tensor, "b c h w"]:
    """Numbers in [0, 1), uniform and independent per pixel and channel; sample i depends on ``seed[i]`` alone.

    A hash of seed and position, so that the same seed gives the same noise on every device, whatever the batch.
    """
    position = torch.arange(channels * height * width, device=seed.device).view(1, channels, height, width)
    start = _scrambled(seed.long() & _LOW_BITS).view(-1, 1, 1, 1)
    bits = _scrambled(_scrambled(position) ^ start)
    return (bits >> 8).float() / 2**24


def _scrambled(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, a bijection of 32-bit numbers; int64 overflow leaves the low bits right."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW_BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW_BITS
    return x ^ (x >> 16)


def mean_colour(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
    """Each image's own mean per channel, object and background together."""
    return images.mean((2, 3), keepdim=True)


def filled(images: Float[Tensor, "b c h w"], mask: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c h w"]:
    """Each image without its object: where the object is, the mean colour of what is around it.

    Where an object leaves no background, its image's mean colour.
    """
    around = 1 - mask.to(images.dtype)
    area = around.sum((2, 3), keepdim=True)
    mean = (images * around).sum((2, 3), keepdim=True) / area.clamp(min=1e-6)
    return replace(torch.where(area > 0, mean, mean_colour(images)).expand_as(images), mask, images)


def partner(draw: Int[Tensor, "b"]) -> Int[Tensor, "b"]:
    """For each sample of a batch of two or more, another one of the batch, as ``draw`` says: never itself."""
    count = len(draw)
    return (torch.arange(count, device=draw.device) + 1 + draw % (count - 1)) % count
