"""Does an explanation move with its image? Similarity of maps under diagonal shifts, and the period of its curve.

The image is shifted by t pixels down and to the right, its border repeated where nothing came from, and explained
again for the same class. The maps of both are compared on the area that both show: e_t(x + t, y + t) with e_0(x, y).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hansfree.errors import UserError
from hansfree.metrics.explanation_agreement import Maps, Scores, cosine_defined


def shifted(images: Float[Tensor, "b c h w"], shift: int) -> Float[Tensor, "b c h w"]:
    """``images`` moved by ``shift`` pixels down and to the right; rows and columns at the border are repeated."""
    rows, columns = ((torch.arange(size) - shift).clamp_min(0) for size in images.shape[-2:])
    return images[..., rows, :][..., columns]


def shift_similarity(map: Maps, moved: Maps, shift: int) -> Scores:
    """Cosine of a map and of the map of the image moved by t pixels, where they show the same; 1 at shift 0.

    Undefined where either map is zero there. Raises ``UserError`` for shifts that leave nothing.

    Formula. cos(e_0[: h - t, : w - t], e_t[t :, t :])
    Source. e2KD, figure 5 and footnote 2, https://arxiv.org/abs/2402.03119: "similarity of the intersecting area"
    """
    height, width = map.shape[-2:]
    if not 0 <= shift < min(height, width):
        raise UserError(
            f"A shift by {shift} pixels leaves nothing of maps of {height} x {width}; choose a shift from 0 to "
            f"{min(height, width) - 1}."
        )
    return cosine_defined(map[..., : height - shift, : width - shift], moved[..., shift:, shift:])


def shift_equivariance(curves: Float[Tensor, "n shifts"]) -> Float[Tensor, " n"]:
    """Each sample's similarity over the shifts 1, 2, ..., averaged: 1 where explanations move with their images.

    Formula. (1/T) sum_t=1..T cos_t, the mean height of the curve
    Source. Ours, from the curve of e2KD, figure 5, https://arxiv.org/abs/2402.03119
    """
    return curves[:, 1:].nanmean(1)


def period(curves: Float[Tensor, "n shifts"]) -> int | None:
    """The shift after whose multiples explanations return, from each sample's similarity at the shifts 0, 1, ..., T.

    Among 2, ..., T, the period with the largest contrast, which is the mean similarity at its multiples less that at
    all other shifts, provided that (a) the mean curve is at each multiple no lower than one shift away, which a mere
    decline is not, and (b) the contrast is above three standard errors over samples. 1 where there is none: no shift
    is better than others. None for fewer than two samples whose whole curve is defined, or three shifts.

    Formula. argmax_p (mean_k s(k p) - mean of all other s(t)), p from 2 to T with s(k p) >= s(k p +- 1); else 1
    Source. Ours: e2KD reads the period of figure 5 by eye.
    """
    curves = curves[curves.isfinite().all(1)]
    samples, most = curves.shape[0], curves.shape[1] - 1
    if samples < 2 or most < 3:
        return None
    mean, found = curves.double().mean(0), {1: 0.0}
    for p in range(2, most + 1):
        at = torch.arange(p, most + 1, p)
        others = torch.tensor([t for t in range(1, most + 1) if t % p])
        contrast = curves[:, at].double().mean(1) - curves[:, others].double().mean(1)
        peaks = (mean[at] >= mean[at - 1]).all() and (mean[at[at < most]] >= mean[at[at < most] + 1]).all()
        if peaks and contrast.mean() > 3 * contrast.std() / samples**0.5:
            found[p] = contrast.mean().item()
    return max(found, key=lambda p: found[p])
