"""Confidence intervals by bootstrap over samples.

The samples of a split are drawn anew with replacement, as many as there are, and the measure is taken of each draw.
The interval is the bias-corrected and accelerated one (BCa: B. Efron, "Better bootstrap confidence intervals", 1987,
https://doi.org/10.1080/01621459.1987.10478410, eq. 6.8 and 7.3, with the jackknife's acceleration): with G the share
of draws below a value and z the normal quantile,

    z0 = z(G(value))        a = sum_i d_i^3 / (6 (sum_i d_i^2)^1.5),   d_i = mean_j value_(j) - value_(i)
    end(z_q) = G^-1(normal(z0 + (z0 + z_q) / (1 - a (z0 + z_q))))

where value_(i) leaves sample i out. A calibration error and a worst group are different: noise moves them to one side,
and the draws twice as far, so that the draws around the value are not the value around the truth. There the basic
interval turns the draws about the value (A. Davison and D. Hinkley, "Bootstrap methods and their application", 1997,
section 2.2), and stays in [0, 1]:

    [2 value - G^-1(0.975), 2 value - G^-1(0.025)]

An interval here says what other samples would have changed, the model being given; what another seed would have
changed, only the interval over seeds can tell. Where all samples agree (an accuracy of 1), every draw does too, and
the interval has no length: that is a limit of the bootstrap and no certainty.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from hansfree.metrics.measure import Sums

Key = TypeVar("Key", bound=Hashable)

LEVEL = 0.95
DRAWS = 1000
_CHUNK = 4_000_000
"""Numbers drawn at a time."""


@final
@dataclass(frozen=True)
class Interval:
    """Both ends of a 95 % interval, how many samples count in it, and how it was made."""

    low: float
    high: float
    samples: int
    method: Literal["bca", "basic"] = "bca"


def intervals(
    measured: Mapping[Key, Sums], *, draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> dict[Key, Interval]:
    """The interval of each of the ``measured``, all of the same samples and from the same draws.

    Draws depend on ``seed`` and the number of samples alone, so measures of two models on one split can be compared
    draw by draw. A measure whose interval is undefined (of one sample, say) is left out.
    """
    if not measured:
        return {}
    parts = torch.cat([sums.parts.double() for sums in measured.values()], 1)
    widths = [sums.parts.shape[1] for sums in measured.values()]
    drawn = resampled(parts, draws, seed).split(widths, 1)
    found = {}
    for (key, sums), sums_drawn in zip(measured.items(), drawn):
        counted = int((sums.parts != 0).any(1).sum())
        values, value = sums.combine(sums_drawn), sums.combine(sums.parts.double().sum(0))
        ends = bca(values, value, left_out(sums), level) if sums.interval == "bca" else basic(values, value, level)
        if ends is not None and counted > 1:
            found[key] = Interval(*ends, counted, sums.interval)
    return found


def resampled(parts: Float[Tensor, "n k"], draws: int, seed: int) -> Float[Tensor, "draws k"]:
    """Sums of ``parts`` over ``draws`` sets of n samples, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    n, found = len(parts), []
    for some in torch.arange(draws).split(max(1, _CHUNK // max(n, 1))):
        drawn = torch.randint(n, (len(some), n), generator=generator)
        counts = torch.zeros(len(some), n, dtype=parts.dtype)
        counts.scatter_add_(1, drawn, parts.new_ones(()).expand_as(drawn))
        found.append(counts @ parts)
    return torch.cat(found)


def left_out(sums: Sums) -> Float[Tensor, " n"]:
    """The value without each sample in turn: the jackknife."""
    parts = sums.parts.double()
    return sums.combine(parts.sum(0) - parts)


def bca(
    drawn: Float[Tensor, " draws"], value: Float[Tensor, ""], jackknife: Float[Tensor, " n"], level: float = LEVEL
) -> tuple[float, float] | None:
    """Both ends of the interval, from the values of the draws; None where there are not two of either."""
    drawn, jackknife = drawn[drawn.isfinite()].double(), jackknife[jackknife.isfinite()]
    if not value.isfinite() or len(drawn) < 2 or len(jackknife) < 2:
        return None
    below = ((drawn < value).sum() + (drawn <= value).sum()) / (2 * len(drawn))
    # A value beyond all draws would push both ends to infinity.
    bias = torch.special.ndtri(below.double().clamp(1 / (2 * len(drawn)), 1 - 1 / (2 * len(drawn))))
    apart = jackknife.mean() - jackknife
    spread = apart.square().sum()
    acceleration = apart.pow(3).sum() / (6 * spread.pow(1.5)) if spread > 0 else torch.zeros_like(spread)
    moved = bias + torch.special.ndtri(_tails(level))
    low, high = drawn.quantile(torch.special.ndtr(bias + moved / (1 - acceleration * moved))).tolist()
    return low, high


def basic(drawn: Float[Tensor, " draws"], value: Float[Tensor, ""], level: float = LEVEL) -> tuple[float, float] | None:
    """Both ends of the interval in [0, 1], from the values of the draws; None where there are not two."""
    drawn = drawn[drawn.isfinite()].double()
    if not value.isfinite() or len(drawn) < 2:
        return None
    high, low = (2 * value - drawn.quantile(_tails(level))).clamp(0, 1).tolist()
    return low, high


def _tails(level: float) -> Tensor:
    return torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double)
