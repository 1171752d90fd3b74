"""Network dissection: which units of a layer are detectors of concepts that people have names for.

A unit's map is cut off at a threshold that only a share q of all its values, over all images, lies above; what is left,
enlarged to the size of the masks, is compared with each concept's masks by one IoU over all images together:

    T_u: P(a_u > T_u) <= q       active_u = enlarge(a_u) > T_u
    IoU_uc = sum |active_u and mask_c| / sum |active_u or mask_c|

Enlarging is bilinear between the centres of cells (corners not aligned), as the published code's. A unit is named after
the concept with its highest IoU, and is a detector of it where that IoU reaches a threshold (published: 0.05, q 0.005).
Bau et al., 2017, https://arxiv.org/abs/1704.05796; as a measure of interpretability: https://arxiv.org/abs/2305.15734

Everything streams: thresholds are exact and found in a few passes over the images, by counting digits of the values
from the highest on, so that memory does not grow with their number; all sums are kept for each quantile, so that
thresholds of the IoU need no further pass at all.

Three IoUs, as what counts as active beside a concept is a choice:

    published  active pixels of images where they touch a label of the concept's category: so the published code has it
    defined    active pixels of all images annotated for that category: so the paper defines it
    adjusted   defined, on a scale from 0, what independent masks of these sizes give, to 1, the most that they can give

The published ones say little about concepts much larger or smaller than a unit's active pixels: of a scene that a third
of all images show, no unit with q = 0.005 can pass an IoU of 0.015. The adjusted one is ours, and equals IoU where both
are of one size and rare. It is noisy where few pixels are active; what an untrained network gives is the yardstick.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hansfree.errors import UserError, unknown

Rule = Literal["published", "defined", "adjusted"]
RULES: tuple[Rule, ...] = get_args(Rule)

_BITS = 32
_MOST = 1 << 22
"""Values of enlarged maps that are held at a time."""


# Thresholds


def widths(rows: int, memory: int) -> tuple[int, ...]:
    """Binary digits of a value that each pass counts: the fewest passes whose ``rows`` of counts fit ``memory`` bytes.

    Raises ``UserError`` where not even one digit at a time does.
    """
    for passes in range(2, _BITS + 1):
        width = -(-_BITS // passes)
        if rows * 2**width * 8 <= memory:
            shares = [width] * (_BITS // width)
            return tuple(shares + [_BITS - sum(shares)] * (sum(shares) < _BITS))
    raise UserError(f"{memory} bytes do not hold the counts of {rows} thresholds; give more memory or fewer layers.")


def ordered(values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Whole numbers from 0 to 2^32 - 1 in the order of ``values`` in single precision. Raises ``UserError`` for NaN."""
    single = values.float() + 0.0  # which turns minus zero into zero
    if single.isnan().any():
        raise UserError("The layer gives values that are not numbers (NaN); check the model's weights and its input.")
    bits = single.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + 2**31)


def restored(order: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The values whose places :func:`ordered` gives."""
    bits = torch.where(order < 2**31, -1 - order, order - 2**31)
    return bits.to(torch.int32).view(torch.float32)


def count_digits(
    counts: Int[Tensor, "quantiles units digits"],
    order: Int[Tensor, "units n"],
    prefix: Int[Tensor, "quantiles units"],
    below: int,
) -> None:
    """Count the digit, which ``below`` bits follow, with which values that begin with ``prefix`` go on."""
    units, digits = counts.shape[1:]
    width = digits.bit_length() - 1
    place = torch.arange(units, device=order.device)[:, None] * digits + ((order >> below) & (digits - 1))
    begins = order >> (below + width)
    for own, of in zip(counts, prefix):
        found = place[begins == of[:, None]]
        own.view(-1).scatter_add_(0, found, torch.ones_like(found))  # a bincount would take the whole table's memory


@final
class Thresholds:
    """Exact thresholds of each unit for several quantiles, in as many passes over the same values as ``widths`` has.

    T is the smallest value that at most a share q of all n values lies above, that of rank floor(q n) + 1 from above.
    ``add`` values, ``finish`` the pass, and so on until ``done``. The state is three tensors, whatever n.
    """

    def __init__(self, units: int, quantiles: Sequence[float], widths: Sequence[int], device: str = "cpu") -> None:
        for quantile in quantiles:
            if not 0 < quantile < 1:
                raise UserError(f"The quantile {quantile} is not between 0 and 1; the published one is 0.005.")
        self.quantiles, self.widths = tuple(quantiles), tuple(widths)
        self.passes = 0
        self.prefix = torch.zeros(len(self.quantiles), units, dtype=torch.long, device=device)
        self.rank = torch.zeros_like(self.prefix)
        self.counts = self._empty()

    @property
    def done(self) -> bool:
        """Whether all passes are finished."""
        return self.passes == len(self.widths)

    def add(self, values: Float[Tensor, "units n"]) -> None:
        """Count more values of every unit."""
        rows = self.prefix if self.passes else self.prefix[:1]  # all quantiles begin alike
        count_digits(self.counts, ordered(values), rows, _BITS - sum(self.widths[: self.passes + 1]))

    def finish(self) -> None:
        """End a pass: one more digit of each threshold is known."""
        from_above = self.counts.flip(-1).cumsum(-1).flip(-1)
        if not self.passes:
            total = int(from_above[0, 0, 0])
            ranks = torch.tensor([int(q * total * (1 + 1e-12)) for q in self.quantiles], device=self.rank.device)
            self.rank = ranks[:, None].expand_as(self.prefix)
        digit = (from_above > self.rank[..., None]).sum(-1) - 1
        above = F.pad(from_above, (0, 1))[..., 1:].expand(*self.prefix.shape, -1)
        self.rank = self.rank - above.gather(-1, digit[..., None])[..., 0]
        self.prefix = (self.prefix << self.widths[self.passes]) + digit
        self.passes += 1
        self.counts = self._empty()

    @property
    def values(self) -> Float[Tensor, "quantiles units"]:
        """The thresholds, in single precision."""
        return restored(self.prefix)

    def _empty(self) -> Tensor:
        if self.done:
            return self.prefix.new_zeros(0)
        rows = len(self.quantiles) if self.passes else 1
        return self.prefix.new_zeros(rows, self.prefix.shape[1], 2 ** self.widths[self.passes])


# Sums over images


@final
@dataclass(frozen=True)
class Counts:
    """Pixels, summed over images: whole numbers from which every IoU follows. Counts of parts of the images add up."""

    both: Int[Tensor, "quantiles units concepts"]
    """Active and in the concept's mask."""
    touching: Int[Tensor, "quantiles units categories"]
    """Active, in images whose labels of the category the active pixels touch."""
    active: Int[Tensor, "quantiles units categories"]
    """Active, in images annotated for the category."""
    concept: Int[Tensor, "concepts"]
    """In the concept's mask."""
    pixels: Int[Tensor, "categories"]
    """Of images annotated for the category."""

    @classmethod
    def none(cls, quantiles: int, units: int, concepts: int, categories: int) -> "Counts":
        """Of no image."""
        shapes = ((quantiles, units, concepts), *[(quantiles, units, categories)] * 2, (concepts,), (categories,))
        return cls(*(torch.zeros(shape, dtype=torch.long) for shape in shapes))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def tally(
    maps: Float[Tensor, "b units h w"],
    thresholds: Float[Tensor, "quantiles units"],
    number: Int[Tensor, "k"],
    mask: Bool[Tensor, "b k height width"],
    annotated: Bool[Tensor, "b categories"],
    category: Int[Tensor, "concepts"],
) -> Counts:
    """The counts of one batch: ``mask`` shows the concepts ``number``, ``category`` is that of every concept.

    ``annotated`` says for which categories an image has labels at all. No more than a few million values of enlarged
    maps are held at a time.
    """
    units, size = maps.shape[1], (mask.shape[-2], mask.shape[-1])
    counts = Counts.none(len(thresholds), units, len(category), annotated.shape[1])
    for map, masks, known in zip(maps.float(), mask, annotated.double()):
        there = masks.flatten(1).any(1)
        own, shown = number[there], masks[there].flatten(1).T.float()
        belongs = F.one_hot(category[own], len(known)).float()
        awake = (map.amax((1, 2)) > thresholds.amin(0)).nonzero()[:, 0]  # enlarging gives nothing above the maximum
        for some in awake.split(max(1, _MOST // (size[0] * size[1]))) if len(awake) else ():
            enlarged = F.interpolate(map[None, some], size, mode="bilinear", align_corners=False)[0].flatten(1)
            for row, threshold in enumerate(thresholds):
                active = (enlarged > threshold[some, None]).float()
                both, area = active @ shown, active.sum(1, keepdim=True)  # sums of a picture's pixels are exact
                touches = both @ belongs > 0
                place = some.cpu()
                counts.both[row, place[:, None], own.cpu()] += both.long().cpu()
                counts.touching[row, place] += (area * touches).long().cpu()
                counts.active[row, place] += (area * known).long().cpu()
    counts.concept[number.cpu()] += mask.sum((0, 2, 3)).cpu()
    counts.pixels.add_(annotated.sum(0).cpu() * size[0] * size[1])
    return counts


def keep_top(
    kept: tuple[Float[Tensor, "rows most"], Int[Tensor, "rows most"]],
    values: Float[Tensor, "rows b"],
    index: Int[Tensor, "b"],
) -> tuple[Float[Tensor, "rows most"], Int[Tensor, "rows most"]]:
    """The highest values of each row so far and the samples that they are of; of equal ones the first that came."""
    scores = torch.cat([kept[0], values.to(kept[0])], 1)
    samples = torch.cat([kept[1], index.to(kept[1]).expand(len(values), -1)], 1)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : kept[0].shape[1]]
    return scores.gather(1, order), samples.gather(1, order)


# Scores


def iou(
    counts: Counts, category: Int[Tensor, "concepts"], rule: Rule = "published"
) -> Float[Tensor, "quantiles units concepts"]:
    """The IoU of each unit and concept by ``rule``, 0 where it is undefined (no pixel, or a mask that is everywhere).

    Formula. I / (A + P - I); adjusted: (IoU - C) / (M - C), C = E / (A + P - E), E = A P / N, M = min / max of A, P;
    I: both, A: active, P: of the concept, N: of images annotated for its category.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    both, of_concept = counts.both.double(), counts.concept.double()
    active = (counts.touching if rule == "published" else counts.active).double()[..., category]
    plain = _ratio(both, active + of_concept - both)
    if rule != "adjusted":
        return plain
    expected = _ratio(active * of_concept, counts.pixels.double()[category])
    chance = _ratio(expected, active + of_concept - expected)
    most = _ratio(torch.minimum(active, of_concept), torch.maximum(active, of_concept))
    room = most - chance
    return torch.where(room > 1e-12, _ratio(plain - chance, room), 0.0)


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under > 0, over / under.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def labels(iou: Float[Tensor, "units concepts"]) -> tuple[Float[Tensor, "units"], Int[Tensor, "units"]]:
    """Each unit's highest IoU and the concept that has it, the first of equal ones."""
    best = iou.amax(1)
    return best, (iou == best[:, None]).int().argmax(1)


def detectors(
    iou: Float[Tensor, "units concepts"], category: Int[Tensor, "concepts"], categories: int, threshold: float
) -> Int[Tensor, "categories"]:
    """How many units are detectors of a concept of each category: units whose highest IoU is at least ``threshold``."""
    best, label = labels(iou)
    return category[label[best >= threshold]].bincount(minlength=categories)


def unique_detectors(
    iou: Float[Tensor, "units concepts"], category: Int[Tensor, "concepts"], categories: int, threshold: float
) -> Int[Tensor, "categories"]:
    """How many concepts of each category have a detector: the published number of unique detectors."""
    best, label = labels(iou)
    return category[label[best >= threshold].unique()].bincount(minlength=categories)


def exclusive_detectors(
    iou: Float[Tensor, "units concepts"], category: Int[Tensor, "concepts"], categories: int, threshold: float
) -> Int[Tensor, "categories"]:
    """How many units reach ``threshold`` with one concept and no other: unique detectors as the paper words them."""
    single = (iou >= threshold).sum(1) == 1
    return category[labels(iou)[1][single]].bincount(minlength=categories)
