"""Confidence intervals by bootstrap over samples.

The samples of a split are drawn anew with replacement, as many as there are, and the measure is taken of each draw.
The interval is the bias-corrected and accelerated one (BCa: B. Efron, "Better bootstrap confidence intervals", 1987,
https://doi.org/10.1080/01621459.1987.10478410, eq. 6.8 and 7.3, with the jackknife's acceleration): with G the share
of draws below a value and z the normal quantile,

    z0 = z(G(value))        a = sum_i d_i^3 / (6 (sum_i d_i^2)^1.5),   d_i = mean_j value_(j) - value_(i)
    end(z_q) = G^-1(normal(z0 + (z0 + z_q) / (1 - a (z0 + z_q))))

where value_(i) leaves sample i out. It says what other samples would have changed, the model being given. What
another seed would have changed is told by the interval over seeds alone. Where all samples agree (an accuracy of 1),
every draw does too, and the interval has no length: that is a limit of the bootstrap and no certainty.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from hansfree.metrics.measure import Sums

Key = TypeVar("Key", bound=Hashable)

LEVEL = 0.95
DRAWS = 1000
_CHUNK = 50_000_000
"""Numbers drawn at a time."""


@final
@dataclass(frozen=True)
class Interval:
    """Both ends of a 95 % interval, and the samples it was made from."""

    low: float
    high: float
    samples: int


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
        ends = bca(sums.combine(sums_drawn), sums.combine(sums.parts.double().sum(0)), left_out(sums), level)
        if ends is not None:
            found[key] = Interval(*ends, samples=len(parts))
    return found


def resampled(parts: Float[Tensor, "n k"], draws: int, seed: int) -> Float[Tensor, "draws k"]:
    """Sums of ``parts`` over ``draws`` sets of n samples, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    n, found = len(parts), []
    for some in torch.arange(draws).split(max(1, _CHUNK // max(n, 1))):
        drawn = torch.randint(n, (len(some), n), generator=generator)
        counts = torch.zeros(len(some), n, dtype=parts.dtype)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=parts.dtype))
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
    drawn, jackknife = drawn[drawn.isfinite()].sort().values, jackknife[jackknife.isfinite()]
    if not value.isfinite() or len(drawn) < 2 or len(jackknife) < 2:
        return None
    below = ((drawn < value).sum() + (drawn <= value).sum()) / (2 * len(drawn))
    # A value beyond all draws (a calibration error, which noise can only raise) would push both ends to infinity.
    inside = below.double().clamp(1 / (2 * len(drawn)), 1 - 1 / (2 * len(drawn)))
    bias = torch.special.ndtri(inside)
    apart = jackknife.mean() - jackknife
    spread = apart.square().sum()
    acceleration = apart.pow(3).sum() / (6 * spread.pow(1.5)) if spread > 0 else torch.zeros_like(spread)
    tails = torch.special.ndtri(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.double))
    shares = torch.special.ndtr(bias + (bias + tails) / (1 - acceleration * (bias + tails)))
    low, high = drawn.double().quantile(shares).tolist()
    return low, high
