"""Cells: drawn objects whose truth has three bands: nothing, where the object is, and what tells its class.

Ten classes in a hierarchy of three categories, and images of nothing:

    circular      ring (the border itself), bar (a bar across), cross (two bars across)
    rectangular   a red, a green or a blue border
    tailed        one tail, three or eight around a round body
    nothing       no object

before one of three backgrounds, drawn without regard to the class: dark; blotches of colour; sinusoidal rings. So there
is no shortcut, and the backgrounds are tiers of each split. Two masks say where the object is and where the feature
that tells its class; the object without the feature is what an explanation may show to say where, but not what.

Drawing. Lengths are in shares of the image's side. Of a point p let q = (q1, q2 / stretch), where (q1, q2) is p less
the centre, turned back; r = |q| for round objects, the larger of |q1| and |q2 / stretch| for rectangles, and a smooth
wobble added to it:

    object        r <= radius                          tails also
    border        radius - thickness < r <= radius
    bar, cross    inside of the border, |q2 / stretch| (or |q1|) <= thickness / 2
    tails         outside of the object, |q| <= 2 radius, within thickness / 2 of a ray from the centre

Feature: the border (ring, rectangles), the bars, the tails. Each pixel is the mean over 2 x 2 points, picture and masks
alike. What is seen depends on the seed alone: at another ``size`` the same objects are drawn in more or fewer pixels.

Source. Classes, backgrounds and ranges follow the synthetic cells of Tjoa & Guan, Quantifying explainability of
saliency methods in deep neural networks, 2020, https://arxiv.org/abs/2009.02899, as Han et al., On the impact of
knowledge distillation for model interpretability, 2023, https://arxiv.org/abs/2305.15734, use them (appendix D). The
drawing is ours and differs: exact masks of the shape instead of a threshold on colour after a rotation that blurs;
backgrounds do not shine through dark channels; every feature, not the single tail alone, covers at least 0.3 % of the
image, or the object is drawn anew.

Splits. ``train``, ``valid`` and ``iid``, alike; no two share an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import pi
from typing import Any, ClassVar, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hansfree import backgrounds
from hansfree.benchmarks.coloured_digits import generator_for
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.photograph_splits import check_sizes
from hansfree.core import Batch, InputSpec, Split

CLASSES = (
    "ring", "bar", "cross", "red border", "green border", "blue border", "one tail", "three tails", "eight tails",
    "nothing",
)  # fmt: skip
RECTANGULAR, TAILED, NOTHING = 3, 6, 9
"""The first class of each category but the circular one's, which is 0."""
TAILS = (1, 3, 8)
"""Of the tailed classes, evenly around the body."""
CATEGORIES: dict[str, str] = dict(zip(CLASSES, 3 * ["circular"] + 3 * ["rectangular"] + 3 * ["tailed"]))
"""Of all classes but the last, which is in none."""
GROUNDS = ("dark", "blotches", "rings")

_PIXEL = 1 / 512
"""The published ranges are in pixels of images of 512 x 512."""
RADIUS = (90 * _PIXEL, 110 * _PIXEL)
THICKNESS = (10 * _PIXEL, 30 * _PIXEL)
WOBBLE = (6 * _PIXEL, 12 * _PIXEL)
"""Standard deviation at the knots of a grid of ``KNOTS`` x ``KNOTS``, between which it is interpolated."""
KNOTS = 16
STRETCH = (0.5, 1.5)
TURN = pi / 3
"""Either way."""
AWAY = 1 / 3
"""The farthest of a centre from the middle, to each side."""
REACH = 2
"""Of tails, in radii."""
LEAST = 0.003
"""The share of an image that its feature covers at least."""
FINE = 2
"""Points to each side of a pixel."""


@final
@dataclass(frozen=True, eq=False)
class Cells:
    """What is drawn in each of n images."""

    kind: Int[Tensor, "n"]
    """The class."""
    centre: Float[Tensor, "n 2"]
    radius: Float[Tensor, "n"]
    thickness: Float[Tensor, "n"]
    stretch: Float[Tensor, "n"]
    turn: Float[Tensor, "n"]
    wobble: Float[Tensor, "n"]
    border: Float[Tensor, "n 3"]
    """Colour of borders and bars; tails have three quarters of it."""
    inside: Float[Tensor, "n 3"]
    """Colour of what is within the border."""
    seed: Int[Tensor, "n"]
    """Of the wobble and of the background."""

    def __getitem__(self, index: Tensor) -> "Cells":
        """Those at ``index``."""
        return Cells(*(getattr(self, one.name)[index] for one in fields(self)))

    def updated(self, index: Int[Tensor, "m"], others: Self) -> "Cells":
        """With ``others`` at ``index``."""
        names = [one.name for one in fields(self)]
        return Cells(*(getattr(self, name).index_copy(0, index, getattr(others, name)) for name in names))


@final
@dataclass(frozen=True)
class Shares:
    """The share of each pixel that each part of the object covers; they are apart from one another."""

    inside: Float[Tensor, "n h w"]
    border: Float[Tensor, "n h w"]
    bars: Float[Tensor, "n h w"]
    tails: Float[Tensor, "n h w"]

    def masks(self, kind: Int[Tensor, "n"]) -> Float[Tensor, "n 2 h w"]:
        """Where the object is, and where the feature that tells its class."""
        whole = self.inside + self.border + self.bars + self.tails
        by_border = (kind == 0) | (kind >= RECTANGULAR) & (kind < TAILED)
        feature = self.bars + self.tails + by_border[:, None, None] * self.border
        return torch.stack([whole, feature], 1)


# Drawing


def draw(kind: Int[Tensor, "n"], generator: torch.Generator) -> Cells:
    """Objects of the classes ``kind``, each drawn anew until its feature covers ``LEAST`` of the image."""
    cells = _drawn(kind, generator)
    poor = _poor(cells)
    while len(poor) > 0:
        cells = cells.updated(poor, _drawn(kind[poor], generator))
        poor = poor[_poor(cells[poor])]
    return cells


def _drawn(kind: Int[Tensor, "n"], generator: torch.Generator) -> Cells:
    count = len(kind)

    def between(ends: tuple[float, float], *several: int) -> Tensor:
        return ends[0] + (ends[1] - ends[0]) * torch.rand(count, *several, generator=generator)

    bright, faint = between((0.7, 1.0), 3), between((0.0, 0.2), 3)
    own = torch.arange(3) == (kind - RECTANGULAR)[:, None]
    rectangular = ((kind >= RECTANGULAR) & (kind < TAILED))[:, None]
    return Cells(
        kind=kind,
        centre=between((0.5 - AWAY, 0.5 + AWAY), 2),
        radius=between(RADIUS),
        thickness=between(THICKNESS),
        stretch=between(STRETCH),
        turn=between((-TURN, TURN)),
        wobble=between(WOBBLE),
        border=torch.where(rectangular & ~own, faint, bright),
        inside=between((0.2, 0.5), 3),
        seed=torch.randint(2**31, (count,), generator=generator),
    )


def _poor(cells: Cells) -> Int[Tensor, "m"]:
    """Those with an object whose feature is out of sight, or nearly; judged at one size, whatever the benchmark's."""
    feature = torch.cat([shares(some, 64, 1).masks(some.kind)[:, 1].mean((1, 2)) for some in _portions(cells)])
    return ((feature < LEAST) & (cells.kind != NOTHING)).nonzero()[:, 0]


def _portions(cells: Cells, size: int = 16) -> list[Cells]:
    return [cells[index] for index in torch.arange(len(cells.kind)).split(size)]


def shares(cells: Cells, size: int, fine: int = FINE) -> Shares:
    """What covers each of ``size`` x ``size`` pixels, from ``fine`` x ``fine`` points in each."""
    kind = cells.kind[:, None, None]
    radius, thickness = cells.radius[:, None, None], cells.thickness[:, None, None]
    across, down = _turned_back(cells, size * fine)
    shift = _wobble(cells, size * fine)
    distance = torch.hypot(across, down)
    rectangular = (kind >= RECTANGULAR) & (kind < TAILED)
    r = torch.where(rectangular, torch.maximum(across.abs(), down.abs()), distance) + shift
    there = kind != NOTHING
    whole, inner = there & (r <= radius), there & (r <= radius - thickness)
    half = thickness / 2
    bars = inner & ((kind == 1) | (kind == 2)) & ((down.abs() <= half) | (kind == 2) & (across.abs() <= half))
    near = _off_rays(cells.kind, across, down, distance) <= half
    tails = near & ~whole & (distance <= REACH * radius)
    return Shares(*(_pooled(part, fine) for part in (inner & ~bars, whole & ~inner, bars, tails)))


def _turned_back(cells: Cells, points: int) -> tuple[Float[Tensor, "n p p"], Float[Tensor, "n p p"]]:
    """Each point as the object itself sees it: from its centre, along its own axes, unstretched."""
    place = (torch.arange(points) + 0.5) / points
    x, y = place - cells.centre[:, :1], place - cells.centre[:, 1:]
    cos, sin = cells.turn.cos()[:, None, None], cells.turn.sin()[:, None, None]
    across = cos * x[:, None, :] + sin * y[:, :, None]
    down = cos * y[:, :, None] - sin * x[:, None, :]
    return across, down / cells.stretch[:, None, None]


def _wobble(cells: Cells, points: int) -> Float[Tensor, "n p p"]:
    """How far the outline is off at each point: uniform numbers at knots, and between them linear."""
    knots = (2 * backgrounds.noise(cells.seed, 1, KNOTS, KNOTS) - 1) * 3**0.5 * cells.wobble[:, None, None, None]
    return F.interpolate(knots, (points, points), mode="bilinear", align_corners=True)[:, 0]


def _off_rays(kind: Int[Tensor, "n"], across: Tensor, down: Tensor, distance: Tensor) -> Float[Tensor, "n p p"]:
    """The distance of each point from the nearest of its object's rays; where there are no tails, infinite."""
    tailed = (kind >= TAILED) & (kind < NOTHING)
    off = torch.full_like(distance, torch.inf)
    if tailed.any():
        step = 2 * pi / torch.tensor(TAILS)[kind[tailed] - TAILED][:, None, None]
        angle = torch.atan2(down[tailed], across[tailed])
        aside = angle - step * (angle / step).round()
        off[tailed] = torch.where(aside.abs() < pi / 2, distance[tailed] * aside.sin().abs(), torch.inf)
    return off


def _pooled(part: Bool[Tensor, "n p p"], fine: int) -> Float[Tensor, "n h w"]:
    return F.avg_pool2d(part.float(), fine)


def ground(number: Int[Tensor, "n"], seed: Int[Tensor, "n"], size: int) -> Float[Tensor, "n 3 size size"]:
    """The backgrounds: black, blotches from 0.2 to 0.7, or grey rings from 0 to 0.5."""
    behind = torch.zeros(len(number), 3, size, size)
    blotchy, ringed = number == 1, number == 2
    if blotchy.any():
        knots = 0.2 + 0.5 * backgrounds.noise(seed[blotchy] + 1, 3, 8, 8)
        behind[blotchy] = F.interpolate(knots, (size, size), mode="bilinear", align_corners=True)
    if ringed.any():
        drawn = backgrounds.noise(seed[ringed] + 1, 4, 1, 1)
        place = (torch.arange(size) + 0.5) / size
        far = torch.hypot(place - drawn[:, 0], (place[:, None] - drawn[:, 1]))
        waves = torch.sin(2 * pi * ((6 + 10 * drawn[:, 2]) * far + drawn[:, 3]))
        behind[ringed] = 0.25 * (1 + waves)[:, None]
    return behind


def painted(cells: Cells, parts: Shares, behind: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """The objects in their colours before ``behind``."""
    border, inside = cells.border[:, :, None, None], cells.inside[:, :, None, None]
    light = parts.border + parts.bars + 0.75 * parts.tails
    whole = parts.inside + parts.border + parts.bars + parts.tails
    paint = parts.inside[:, None] * inside + light[:, None] * border
    return (paint + (1 - whole[:, None]) * behind).clamp(0, 1)


# The benchmark


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class CellSplit(Split):
    """Objects and backgrounds, drawn when a batch is asked for."""

    cells: Cells
    ground: Int[Tensor, "n"]
    size: int
    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    tiers: Mapping[str, Int[Tensor, "_"]] = field(default_factory=dict[str, Tensor])  # pyright: ignore[reportIncompatibleVariableOverride]

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``; nothing is redrawn."""
        cells = self.cells[index]
        parts = shares(cells, self.size)
        behind = ground(self.ground[index], cells.seed, self.size)
        return Batch(
            input=painted(cells, parts, behind), label=self.label[index], index=index, mask=parts.masks(cells.kind)
        )


@final
class CellImages(Divided[CellSplit]):
    """Drawn cells of ten classes in a hierarchy, with masks of the object and of the feature that tells its class.

    ``size`` is the side of the images in pixels; ``train``, ``valid`` and ``test`` are numbers of samples, classes in
    turn; ``split_seed`` decides every random choice.
    """

    name: ClassVar[str] = "cells"
    classes = CLASSES
    biases = ()
    categories = CATEGORIES
    mask_names = ("object", "feature")
    gives = frozenset({"mask"})
    shortcut = None

    def __init__(
        self, *, size: int = 64, train: int = 6400, valid: int = 800, test: int = 1600, split_seed: int = 0
    ) -> None:
        counts = {"train": train, "valid": valid, "test": test}
        check_sizes(size, split_seed, counts)
        self.input = InputSpec(3, size, size)
        self._options = {"size": size, **counts, "split_seed": split_seed}
        self._splits = {
            name: _split(count, size, generator_for(split_seed, f"cells {name}"))
            for name, count in (("train", train), ("valid", valid), ("iid", test))
        }

    def _described(self, split: CellSplit) -> dict[str, Any]:
        return {"size": len(split), "backgrounds": {name: len(index) for name, index in split.tiers.items()}}


def _split(count: int, size: int, generator: torch.Generator) -> CellSplit:
    label = torch.arange(count) % len(CLASSES)
    behind = torch.randint(len(GROUNDS), (count,), generator=generator)
    tiers = {name: (behind == number).nonzero()[:, 0] for number, name in enumerate(GROUNDS)}
    return CellSplit(cells=draw(label, generator), ground=behind, size=size, label=label, tiers=tiers)
