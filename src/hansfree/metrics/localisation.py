"""Does a model look at the object? Measures of a map against a mask, one number a sample.

Maps are [b, c, h, w] (or [b, h, w]) and summed over channels; masks are [b, h, w] in [0, 1]. What speaks against the
class is left out: e+ = max(e, 0). Boxes become masks by :func:`box_mask`, the union of one class's boxes. What is not
defined is not a number, and left out of means.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hansfree.core import Batch, Boxes
from hansfree.errors import UserError
from hansfree.metrics.explanation_agreement import Maps, Scores, pixels

Mask = Float[Tensor, "b h w"]

NOTHING = 1e-7
"""Positive relevance of less than this in a whole map counts as none, as in model guidance's code."""


def energy_pointing_game(map: Maps, mask: Mask) -> Scores:
    """EPG: the share of positive relevance that lies in the mask, in [0, 1]; 0 for a map without positive relevance.

    Formula. sum(e+ m) / sum(e+), 0 where sum(e+) < 1e-7
    Source. Wang et al., 2020, https://arxiv.org/abs/1910.01279; the 0: code of model guidance, https://arxiv.org/abs/2303.11932
    """
    positive = _positive(map)
    total = positive.sum((-2, -1))
    return torch.where(total < NOTHING, 0.0, (positive * mask).sum((-2, -1)) / total)


def energy_pointing_game_defined(map: Maps, mask: Mask) -> Scores:
    """EPG over the samples that have one: maps without positive relevance and empty masks are left out.

    Formula. sum(e+ m) / sum(e+), over the samples with sum(e+) > 0 and a mask
    Source. Ours: corrects the published one, which takes a map that shows nothing for one that shows the wrong place,
        and maps of small scale for empty ones.
    """
    positive = _positive(map)
    share = (positive * mask).sum((-2, -1)) / positive.sum((-2, -1))
    return share.where(_defined(positive, mask), torch.nan)


def intersection_over_union(map: Maps, mask: Mask) -> Scores:
    """IoU of the mask and the pixels above half of the map's range, in [0, 1]; 0 for a map without positive relevance.

    A constant map has no range, and shows no pixel.

    Formula. |A and m| / |A or m|, A: (e+ - min e+) / (max e+ - min e+) > 0.5, m: mask > 0.5
    Source. Model guidance, https://arxiv.org/abs/2303.11932, and its code
    """
    positive = _positive(map)
    low, high = positive.amin((-2, -1), keepdim=True), positive.amax((-2, -1), keepdim=True)
    shown, there = (positive - low) > 0.5 * (high - low), mask > 0.5
    common, either = (shown & there).sum((-2, -1)), (shown | there).sum((-2, -1))
    return common.double() / either.clamp_min(1)


def intersection_over_union_defined(map: Maps, mask: Mask) -> Scores:
    """IoU over the samples that have one: maps without positive relevance and empty masks are left out.

    Formula. that of iou, over the samples with sum(e+) > 0 and a mask
    Source. Ours: corrects the published one, which gives maps that show nothing the score of a wrong place.
    """
    return intersection_over_union(map, mask).where(_defined(_positive(map), mask), torch.nan)


def pointing_game(map: Maps, mask: Mask) -> Scores:
    """Whether the largest pixel lies in the mask; of several, the share of them that do. Undefined for empty masks.

    Formula. [m(argmax e) > 0.5]
    Source. Zhang et al., 2016, https://arxiv.org/abs/1608.00507, without its tolerance of 15 pixels
    """
    picture, there = pixels(map), mask > 0.5
    highest = picture == picture.amax((-2, -1), keepdim=True)
    share = (highest & there).sum((-2, -1)).double() / highest.sum((-2, -1))
    return share.where(there.any(-1).any(-1), torch.nan)


LOCALISATION: dict[str, Callable[[Maps, Mask], Scores]] = {
    "epg": energy_pointing_game,
    "epg_defined": energy_pointing_game_defined,
    "iou": intersection_over_union,
    "iou_defined": intersection_over_union_defined,
    "pointing_game": pointing_game,
}


def box_mask(boxes: Boxes, target: Int[Tensor, " b"], size: tuple[int, int]) -> Mask:
    """1 in the union of the boxes of class ``target``, 0 elsewhere; a pixel is in where its centre is."""
    height, width = size
    mask = torch.zeros(len(target), height, width)
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    for n, (corners, classes) in enumerate(zip(boxes.corners, boxes.classes)):
        for x0, y0, x1, y1 in corners[classes == target[n]].tolist():
            inside = ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
            mask[n][inside] = 1
    return mask.to(target.device)


def class_mask(batch: Batch, target: Int[Tensor, " b"]) -> Mask:
    """Where the class ``target`` of each image is: its mask, or the union of its boxes where there are no masks.

    The mask is the batch's first one, and where images have labels of several classes that of the target's class.
    Raises ``UserError`` for a batch with neither, and for masks that are not one for all objects and one a class.
    """
    if batch.mask is None:
        if batch.boxes is None:
            raise UserError(
                "This needs masks or boxes of the objects, but the benchmark gives neither; choose another."
            )
        height, width = batch.images.shape[-2:]
        return box_mask(batch.boxes, target, (height, width))
    if batch.label.ndim == 1:
        return batch.mask[:, 0]
    if batch.mask.shape[1] != batch.label.shape[1] + 1:
        raise UserError(
            f"The benchmark gives {batch.mask.shape[1]} masks for {batch.label.shape[1]} classes; where images have "
            "several labels, give one mask of all objects and then one of each class."
        )
    return batch.mask[torch.arange(len(target), device=target.device), target + 1]


def _positive(map: Maps) -> Float[Tensor, "b h w"]:
    return pixels(map).clamp_min(0)


def _defined(positive: Float[Tensor, "b h w"], mask: Mask) -> Tensor:
    return (positive.sum((-2, -1)) > 0) & (mask > 0).any(-1).any(-1)
