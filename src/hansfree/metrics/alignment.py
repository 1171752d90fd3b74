"""Does a map lie where something is to be seen? Correlations of a map's size with edges, and with a mask.

Loss gradients of networks that were distilled are said to follow edges and objects more closely than those of networks
trained from scratch (Han et al., 2023, https://arxiv.org/abs/2305.15734, section 5.3, by eye; so Tsipras et al., 2019,
https://arxiv.org/abs/1805.12152, of robust ones). Here that is a number. A map's size is sum_c |e|, one number a pixel:
signs of gradients differ from pixel to pixel and say nothing about where they are.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hansfree.metrics.explanation_agreement import Maps, Scores


def sobel_magnitude(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """How strong edges are: the length of Sobel's gradient of the mean over channels; border pixels are repeated."""
    grey = F.pad(images.double().mean(1, keepdim=True), [1] * 4, mode="replicate")
    across = grey.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    gradient = F.conv2d(grey, across.new_tensor([across.tolist(), across.T.tolist()])[:, None])
    return gradient.square().sum(1).sqrt()


def edge_alignment(map: Maps, images: Float[Tensor, "b c h w"]) -> Scores:
    """Pearson's correlation over pixels of a map's size and the strength of edges, in [-1, 1].

    Undefined for a map without any difference, and for an image without edges.

    Formula. corr(sum_c |e|, |Sobel(mean_c x)|)
    Source. Ours, for what is shown in https://arxiv.org/abs/2305.15734, section 5.3
    """
    return _correlation(_size(map), sobel_magnitude(images))


def mask_alignment(map: Maps, mask: Float[Tensor, "b h w"]) -> Scores:
    """Pearson's correlation over pixels of a map's size and a mask, in [-1, 1]; undefined where either is constant.

    Formula. corr(sum_c |e|, m)
    Source. Ours, for what is shown in https://arxiv.org/abs/2305.15734, section 5.3
    """
    return _correlation(_size(map), mask.double())


def _size(map: Maps) -> Float[Tensor, "b h w"]:
    return map.double().abs() if map.ndim == 3 else map.double().abs().flatten(1, -3).sum(1)


def _correlation(first: Float[Tensor, "b h w"], second: Float[Tensor, "b h w"]) -> Scores:
    one, other = (values.flatten(1) - values.flatten(1).mean(1, keepdim=True) for values in (first, second))
    # Divided by the largest first, or squares of small relevances would vanish.
    one, other = (values / values.abs().amax(1, keepdim=True) for values in (one, other))
    return ((one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))).clamp(-1, 1)
