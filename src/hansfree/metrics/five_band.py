"""Does a map show the feature, and only the object? Measures of a map against a truth of three bands, one a sample.

A truth says of every pixel 0 (nothing), 1 (where the object is) or 2 (the feature that tells its class). A map is
summed over channels and divided by its largest size; thresholds s < t cut it into five bands:

    -2: h <= -t    -1: -t < h <= -s    0: -s < h <= s    1: s < h <= t    2: t < h

Published scores (Tjoa & Guan). With TP = both not 0 and equal, FP = (map not 0, truth 0) + (both not 0 and unequal),
FN = (map 0, truth not 0), TN = both 0, and 1e-6 in each denominator:

    accuracy = equal / all    recall = TP / (TP + FN)    precision = TP / (TP + FP)    fpr = FP / (FP + TN)

``hard`` takes (s, t) = (0.3, 0.7) alone. ``mean`` and ``best`` lower both by 0.005 in each of 56 steps, to (0.025,
0.425), and take the mean of each score over the steps, and the best of each on its own (of fpr the lowest).

Corrected scores. The published fpr counts pixels of the object in the wrong band, and so is no rate of false positives
among what is not there; the published recall leaves those pixels out, and rises when wrong bands replace zeros. Here

    recall = TP / (truth not 0)    precision = TP / (map not 0)    fpr = (map not 0, truth 0) / (truth 0)

without 1e-6, over images that show an object: where there is none, there is nothing to recall, and the published scores
are 0 whatever the map. ``objects`` are the published ones over those images alone.

Binary views, over images that show an object: ``object`` tells 1 and 2 from 0, ``feature`` tells 2 from 0 and 1. AUROC
and AUPRC (average precision) rank the pixels of the map; precision, recall and F1 are of the pixels above a threshold,
at 0.01, 0.02, ..., 0.99 of the map's largest size: mean and best. The source does not say which thresholds it takes.

Source. Tjoa & Guan, Quantifying explainability of saliency methods in deep neural networks, 2020,
https://arxiv.org/abs/2009.02899, and its code; binary views: Han et al., On the impact of knowledge distillation for
model interpretability, 2023, https://arxiv.org/abs/2305.15734, figure 6. That paper does not say which of hard and
soft, mean and best its table 3 shows; its maps are sizes of gradients (``{name: gradient, absolute: true}``).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hansfree.metrics.explanation_agreement import Maps, Scores, pixels

Truth = Int[Tensor, "b h w"]

HARD = ((0.3, 0.7),)
SOFT = tuple((0.3 - 0.005 * step, 0.7 - 0.005 * step) for step in range(56))
LEVELS = tuple(level / 100 for level in range(1, 100))
"""Thresholds of the binary views."""
EPSILON = 1e-6
SCORES = ("accuracy", "recall", "precision", "fpr")
VIEWS = {"object": (0, 1, 1), "feature": (0, 0, 1)}
"""Which bands of the truth each view takes for there."""


def ternary_truth(object: Float[Tensor, "b h w"], feature: Float[Tensor, "b h w"]) -> Truth:
    """The truth that two masks give: 2 where the feature fills more than half of a pixel, 1 where the object does."""
    return torch.where(feature > 0.5, 2, (object > 0.5).long())


def five_band_scores(map: Maps, truth: Truth) -> dict[str, Scores]:
    """Every five-band score of each map, [b], by name: ``five_band_recall``, ``five_band_hard_recall_corrected`` ...

    What is not named hard or best is the mean over the 56 pairs of thresholds.
    """
    found: dict[str, Tensor] = {}
    there = (truth > 0).flatten(1).any(1)
    counts = {"hard_": Counts.of(map, truth, HARD), "": Counts.of(map, truth, SOFT)}
    for way, counted in counts.items():
        for kind, by_threshold in (("", counted.published()), ("_corrected", counted.corrected())):
            for score, values in by_threshold.items():
                best = values.amin(1) if score == "fpr" else values.amax(1)
                for own, value in ((way, values.mean(1)), *((("best_", best),) if way == "" else ())):
                    name = f"five_band_{own}{score}{kind}"
                    found[name] = value
                    if kind == "":
                        found[f"{name}_objects"] = value.where(there, torch.nan)
    return found


class Counts(NamedTuple):
    """Pixels by what the truth and the map's bands say, at each of the pairs of thresholds, [b, pairs]."""

    right: Float[Tensor, "b pairs"]
    """Both not 0, and equal."""
    wrong: Float[Tensor, "b pairs"]
    """Both not 0, and unequal."""
    invented: Float[Tensor, "b pairs"]
    """Map not 0, truth 0."""
    missed: Float[Tensor, "b pairs"]
    """Map 0, truth not 0."""
    nothing: Float[Tensor, "b pairs"]
    """Both 0."""

    @staticmethod
    def of(map: Maps, truth: Truth, thresholds: Sequence[tuple[float, float]]) -> "Counts":
        """Counted at every pair at once."""
        low, high = zip(*thresholds)
        edges = sorted({*(-s for s in low), *low, *high})
        above = dict(zip(edges, pixels_above(map, truth, edges).unbind(2)))
        size = torch.stack([(truth == band).flatten(1).sum(1) for band in range(3)], 1).double()
        first, second = (torch.stack([above[t] for t in side], 2) for side in (low, high))
        shown = first + size[:, :, None] - torch.stack([above[-s] for s in low], 2)
        right = first[:, 1] - second[:, 1] + second[:, 2]
        hidden = size[:, :, None] - shown
        wrong = shown[:, 1] + shown[:, 2] - right
        return Counts(right, wrong, shown[:, 0], hidden[:, 1] + hidden[:, 2], hidden[:, 0])

    def published(self) -> dict[str, Float[Tensor, "b pairs"]]:
        """The four scores as published."""
        false = self.invented + self.wrong
        return {
            "accuracy": (self.right + self.nothing) / sum(self),
            "recall": self.right / (self.right + self.missed + EPSILON),
            "precision": self.right / (self.right + false + EPSILON),
            "fpr": false / (false + self.nothing + EPSILON),
        }

    def corrected(self) -> dict[str, Float[Tensor, "b pairs"]]:
        """Recall, precision and false positive rate by their names' meaning; undefined where there is no object."""
        there = self.right + self.wrong + self.missed
        shown = self.right + self.wrong + self.invented
        found = {
            "recall": self.right / there,
            "precision": torch.where(shown > 0, self.right / shown, 0.0),
            "fpr": self.invented / (self.invented + self.nothing),
        }
        return {name: value.where(there > 0, torch.nan) for name, value in found.items()}


def binary_views(map: Maps, truth: Truth) -> dict[str, Scores]:
    """``object_auroc``, ``feature_f1_best`` and the like, [b]; not a number where one of both kinds is missing."""
    found: dict[str, Tensor] = {}
    above = pixels_above(map, truth, LEVELS)
    for view, bands in VIEWS.items():
        positive = torch.tensor(bands, device=truth.device)[truth].flatten(1)
        both = (positive.amax(1) > positive.amin(1)) & (truth > 0).flatten(1).any(1)
        hits = above[:, [band for band, there in enumerate(bands) if there]].sum(1)
        shown, there = above.sum(1), positive.sum(1, keepdim=True)
        scores = {
            "precision": hits / shown.clamp_min(1),
            "recall": hits / there.clamp_min(1),
            "f1": 2 * hits / (shown + there).clamp_min(1),
        }
        values = dict(zip(("auroc", "auprc"), areas(normalised(map).flatten(1), positive)))
        values |= {name: score.mean(1) for name, score in scores.items()}
        values |= {f"{name}_best": score.amax(1) for name, score in scores.items()}
        found |= {f"{view}_{name}": value.where(both, torch.nan) for name, value in values.items()}
    return found


def normalised(map: Maps) -> Float[Tensor, "b h w"]:
    """The sum over channels, divided by its largest size; a map of zeros stays one."""
    picture = pixels(map).double()
    size = picture.abs().amax((-2, -1), keepdim=True)
    return torch.where(size > 0, picture / size, 0.0)


def pixels_above(map: Maps, truth: Truth, edges: Sequence[float]) -> Float[Tensor, "b 3 edges"]:
    """How many pixels of each band of the truth exceed each of the ascending ``edges``, by one histogram."""
    picture, bins = normalised(map).flatten(1), len(edges) + 1
    place = torch.bucketize(picture, picture.new_tensor(edges))
    cell = (torch.arange(len(picture), device=picture.device)[:, None] * 3 + truth.flatten(1)) * bins + place
    histogram = cell.flatten().bincount(minlength=len(picture) * 3 * bins).view(-1, 3, bins)
    return histogram.flip(2).cumsum(2).flip(2)[:, :, 1:].double()


def areas(score: Float[Tensor, "b n"], positive: Int[Tensor, "b n"]) -> tuple[Scores, Scores]:
    """AUROC and average precision of each row's ranking; equal scores share their place."""
    falling, order = (-score).sort(1)
    hit = positive.gather(1, order).double()
    hits, seen = hit.cumsum(1), torch.arange(1, score.shape[1] + 1, device=score.device)
    first, last = (torch.searchsorted(falling, falling, right=right) for right in (False, True))
    last = last - 1
    total = hits[:, -1:]
    average_precision = (hit * (hits / seen).gather(1, last)).sum(1) / total[:, 0]
    misses = seen - hits
    before = torch.where(first > 0, misses.gather(1, (first - 1).clamp_min(0)), 0.0)
    beaten = misses[:, -1:] - (before + misses.gather(1, last)) / 2
    return (hit * beaten).sum(1) / (total * misses[:, -1:])[:, 0], average_precision


TERNARY: tuple[Callable[[Maps, Truth], dict[str, Scores]], ...] = (five_band_scores, binary_views)
