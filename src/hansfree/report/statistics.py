"""Numbers over seeds: means with intervals, and comparisons paired by seed.

The interval is Student's t over seeds: mean +- t(0.975, n - 1) sd / sqrt(n). A comparison is paired by seed, so
it is the same interval for the differences, and p is that of the paired t-test. With one seed there is no interval.
"""

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtr, stdtrit

Row = Mapping[str, Any]
Values = Mapping[Hashable, float]
"""One number a seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds, its standard deviation and the half-width of its 95 % interval (None with one seed)."""

    n: int
    mean: float
    sd: float | None
    half: float | None


@dataclass(frozen=True)
class Comparison:
    """The mean difference from a reference over common seeds, and the p of a paired t-test.

    ``p`` is None where the test is undefined: fewer than two common seeds, or differences that do not vary.
    """

    reference: str
    difference: Estimate
    p: float | None


@dataclass(frozen=True)
class Summary:
    """One measured thing of one variant over its seeds."""

    benchmark: str | None
    variant: str | None
    model: str | None
    split: str | None
    tier: str | None
    group: str | None
    metric: str
    measured_with: str | None
    values: Values
    estimate: Estimate
    comparison: Comparison | None


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean and 95 % Student-t interval of at least one number; None for none."""
    numbers = list(values)
    n = len(numbers)
    if n == 0:
        return None
    mean = statistics.fmean(numbers)
    if n == 1:
        return Estimate(1, mean, None, None)
    sd = statistics.stdev(numbers)
    return Estimate(n, mean, sd, float(stdtrit(n - 1, 0.975)) * sd / math.sqrt(n))


def compare(values: Values, reference: Values, name: str) -> Comparison | None:
    """``values`` minus ``reference``, paired by seed; None without a common seed."""
    seeds = [seed for seed in values if seed in reference]
    difference = estimate(values[seed] - reference[seed] for seed in seeds)
    if difference is None:
        return None
    scale = max(abs(number) for seed in seeds for number in (values[seed], reference[seed]))
    if difference.sd is None or difference.sd <= 1e-12 * scale:
        return Comparison(name, difference, None)
    t = difference.mean / (difference.sd / math.sqrt(difference.n))
    return Comparison(name, difference, 2 * float(stdtr(difference.n - 1, -abs(t))))


def summarise(rows: Iterable[Row], reference: str | None = None) -> list[Summary]:
    """One :class:`Summary` per measured thing and variant, in the order of ``rows``; null values are left out.

    ``reference`` is the variant that the others are compared with, each measured thing with its own like.
    """
    collected: dict[tuple[Any, ...], dict[Hashable, float]] = {}
    for row in rows:
        if row["value"] is not None:
            key = (row["variant"], *(row.get(field) for field in _THING))
            collected.setdefault(key, {})[row.get("seed")] = row["value"]
    summaries = []
    for (variant, *thing), values in collected.items():
        found = estimate(values.values())
        assert found is not None
        against = collected.get((reference, *thing)) if reference is not None and variant != reference else None
        comparison = None if against is None or reference is None else compare(values, against, reference)
        named = dict(zip(_THING, thing))
        summaries.append(Summary(variant=variant, values=values, estimate=found, comparison=comparison, **named))
    return summaries


_THING = ("benchmark", "model", "split", "tier", "group", "metric", "measured_with")
