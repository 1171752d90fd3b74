"""Do two models look at the same place? Similarities of two maps of the same image, one number a sample.

Maps are [b, c, h, w] (or [b, h, w]), of the same height and width, signed. The cosine compares all their entries, as
e2KD's loss does; the others compare the pictures that one looks at, which are sums over channels. What is not defined
(of a map of zeros, a rank correlation) is not a number, and left out of means.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hansfree.errors import UserError

Maps = Float[Tensor, "b *c h w"]
Scores = Float[Tensor, " b"]

WINDOW, SIGMA = 11, 1.5
TOP_SHARE = 0.02


def cosine(map: Maps, other: Maps) -> Scores:
    """Cosine similarity of two maps, all entries of all channels, in [-1, 1]; 0 where either is zero throughout.

    Formula. <e_s, e_t> / (|e_s| |e_t|)
    Source. e2KD, eq. 3, https://arxiv.org/abs/2402.03119, and its code, in which maps of zeros count 0.
    """
    return cosine_defined(map, other).nan_to_num(0.0)


def cosine_defined(map: Maps, other: Maps) -> Scores:
    """The cosine of the pairs of maps that have one: a map of zeros has no direction, and is left out.

    Formula. <e_s, e_t> / (|e_s| |e_t|), over the samples with |e_s| |e_t| > 0
    Source. Ours: corrects e2KD's, which cannot tell a dead map from one at right angles.
    """
    ours, theirs = _unit(map.flatten(1)), _unit(other.flatten(1))
    _check_same(ours, theirs)
    return (ours * theirs).sum(1).clamp(-1, 1)


def rank_correlation(map: Maps, other: Maps) -> Scores:
    """Spearman's rank correlation of the pixels of two maps, in [-1, 1]; ties share their mean rank.

    Undefined where a map is constant.

    Formula. Pearson's correlation of the ranks of sum_c e_s and sum_c e_t
    Source. Spearman, 1904; between explanations: Ghorbani et al., 2019, https://arxiv.org/abs/1710.10547
    """
    ours, theirs = (_ranks(pixels(one).flatten(1)) for one in (map, other))
    _check_same(ours, theirs)
    return (_unit(ours - ours.mean(1, keepdim=True)) * _unit(theirs - theirs.mean(1, keepdim=True))).sum(1).clamp(-1, 1)


def ssim(map: Maps, other: Maps) -> Scores:
    """Structural similarity of the pixels of two maps, each divided by its largest size, in [-1, 1].

    Gaussian window of 11 x 11 with standard deviation 1.5, where it fits whole; range 2, K1 = 0.01, K2 = 0.03.
    Two maps of zeros are the same picture. Raises ``UserError`` for maps below 11 x 11.

    Formula. mean of (2 mu_s mu_t + C1)(2 cov_st + C2) / ((mu_s^2 + mu_t^2 + C1)(var_s + var_t + C2)), C = (2 K)^2
    Source. Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861; of maps: Adebayo et al., 2018,
        https://arxiv.org/abs/1810.03292
    """
    ours, theirs = (_peak_one(pixels(one)) for one in (map, other))
    _check_same(ours, theirs)
    if min(ours.shape[-2:]) < WINDOW:
        raise UserError(
            f"SSIM needs maps of at least {WINDOW} x {WINDOW} pixels, but these have {ours.shape[-2]} x "
            f"{ours.shape[-1]}; enlarge them first."
        )
    mean_s, mean_t = _smooth(ours), _smooth(theirs)
    var_s, var_t = _smooth(ours * ours) - mean_s**2, _smooth(theirs * theirs) - mean_t**2
    covariance = _smooth(ours * theirs) - mean_s * mean_t
    c1, c2 = (2 * 0.01) ** 2, (2 * 0.03) ** 2
    luminance = (2 * mean_s * mean_t + c1) / (mean_s**2 + mean_t**2 + c1)
    structure = (2 * covariance + c2) / (var_s + var_t + c2)
    return (luminance * structure).mean((-2, -1))


def top_intersection(map: Maps, other: Maps, *, share: float = TOP_SHARE) -> Scores:
    """The share of the k largest pixels, by size, that two maps have in common, in [0, 1]; k is 2 % of the pixels.

    Of pixels tied for the last places, each belongs in the share in which lots would give it one, so that no order of
    pixels matters: a constant map has k/n in common with any other.

    Formula. |top_k |sum_c e_s| and top_k |sum_c e_t|| / k, k = max(1, round(0.02 n))
    Source. Ghorbani et al., 2019, https://arxiv.org/abs/1710.10547: 1000 of 224 x 224 pixels.
    """
    ours, theirs = (pixels(one).flatten(1).abs() for one in (map, other))
    _check_same(ours, theirs)
    k = max(1, round(share * ours.shape[1]))
    return (_membership(ours, k) * _membership(theirs, k)).sum(1) / k


EXPLANATION_AGREEMENT: dict[str, Callable[[Maps, Maps], Scores]] = {
    "explanation_cosine": cosine,
    "explanation_cosine_defined": cosine_defined,
    "explanation_rank_correlation": rank_correlation,
    "explanation_ssim": ssim,
    "explanation_top_intersection": top_intersection,
}


def pixels(map: Maps) -> Float[Tensor, "b h w"]:
    """The picture that one looks at: the sum over channels."""
    return map.double() if map.ndim == 3 else map.double().flatten(1, -3).sum(1)


def at_size(map: Maps, size: tuple[int, int]) -> Maps:
    """``map`` enlarged or shrunk to ``size``, bilinear, so that it lies over its image."""
    if tuple(map.shape[-2:]) == tuple(size):
        return map
    flat = map.flatten(1, -3) if map.ndim > 3 else map[:, None]
    resized = F.interpolate(flat, tuple(size), mode="bilinear", align_corners=False)
    return resized.view(*map.shape[:-2], *size)


def _check_same(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise UserError(
            f"Maps of shapes {list(ours.shape)} and {list(theirs.shape)} cannot be compared; explain both models with "
            "the same explainer and bring the maps to one size."
        )


def _unit(values: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Rows of length 1; not a number where all are 0."""
    values = values.double()
    values = values / values.abs().amax(1, keepdim=True)  # or squares of small relevances would vanish
    return values / values.norm(dim=1, keepdim=True)


def _peak_one(map: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    return (map / map.abs().amax((-2, -1), keepdim=True)).nan_to_num(0.0)


def _ranks(values: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Mean ranks from 1 to n."""
    values = values.contiguous()
    ordered = values.sort(1).values
    first, last = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (first + last + 1).double() / 2


def _membership(values: Float[Tensor, "b n"], k: int) -> Float[Tensor, "b n"]:
    """1 above the k-th largest value, 0 below it, and at it what is left of k, shared out."""
    last = values.topk(k, 1).values[:, -1:]
    above, tied = values > last, values == last
    left = k - above.sum(1, keepdim=True)
    return above.double() + tied * (left / tied.sum(1, keepdim=True))


def _smooth(map: Float[Tensor, "b h w"]) -> Float[Tensor, "b h2 w2"]:
    x = torch.arange(WINDOW, dtype=map.dtype, device=map.device) - WINDOW // 2
    bell = (-(x**2) / (2 * SIGMA**2)).exp()
    bell = bell / bell.sum()
    return F.conv2d(F.conv2d(map[:, None], bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))[:, 0]
