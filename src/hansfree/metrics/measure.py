"""What a measure is: a number about samples that depends on them through sums alone.

    value = combine(sum_i parts_i)

A mean, a ratio of counts, a worst group, a calibration error over bins: each is such a function of sums. A set of
samples drawn with replacement then changes nothing but how often each part counts, so that thousands of such draws
are one matrix product (:mod:`hansfree.metrics.intervals`). The one exception, a mean of precisions along a ranking of
samples, has a value and no interval.
"""

import math
from collections.abc import Callable
from functools import update_wrapper
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hansfree.core import Predictions


def ratio(sums: Float[Tensor, "*draws 2"]) -> Float[Tensor, "*draws"]:
    """The first sum over the second."""
    return sums[..., 0] / sums[..., 1]


class Sums(NamedTuple):
    """The parts of each sample, [n, k], and the value that sums [..., k] of them give, not a number where undefined."""

    parts: Float[Tensor, "n k"]
    combine: Callable[[Tensor], Tensor] = ratio
    interval: Literal["bca", "basic"] = "bca"
    """Which bootstrap interval it takes; basic: an extreme or a sum of sizes in [0, 1], which drawing anew shifts."""

    @property
    def value(self) -> float | None:
        """The value over all samples, each counted once; None where it is undefined."""
        value = self.combine(self.parts.sum(0)).item()
        return None if math.isnan(value) else value


class Whole(NamedTuple):
    """A value that no sums over samples give, such as one of their ranking: it has no interval."""

    value: float | None


def mean_of(values: Float[Tensor, "n *several"] | Bool[Tensor, "n *several"]) -> Sums:
    """The mean of ``values``, one or several a sample, without those that are not a number; of truths the share."""
    values = values.double().view(len(values), -1)
    counted = ~values.isnan()
    return Sums(torch.stack([values.nan_to_num(0.0).sum(1), counted.double().sum(1)], 1))


@final
class Measure:
    """A measure of predictions, made from the function that gives its sums (None where it does not apply).

    Called with predictions it is the number, or None where that is undefined.
    """

    def __init__(self, sums: Callable[[Predictions], Sums | Whole | None]) -> None:
        self.sums = sums
        update_wrapper(self, sums)

    def __call__(self, predictions: Predictions) -> float | None:
        """The number over all samples."""
        sums = self.sums(predictions)
        return None if sums is None else sums.value
