"""One augmentation for all that belongs to an image: the image itself, its clean twin, masks, boxes, stored maps.

    view = rotation . translation . crop . flip                [b, 2, 3], places in the result -> places in the image
    result(p) = image(view p)                                  bilinear; 0 outside of the image

The view is what ``torch.nn.functional.affine_grid`` takes: x and y run from -1 to 1 over the whole image, edge to
edge (``align_corners=False``), whatever its resolution. So the same view cuts a 7 x 7 map as it cuts a 224 x 224
image, and :func:`apply_view` is all that a map needs to go where its image went. Read from the image, it is first
rotated about its middle, then moved, then cropped, then flipped.

Photometric changes and mixup leave places alone. The draws come from the generator that a batch is read with, so
that a run resumes to the bit; teacher and student see the same result (consistent teaching: Beyer et al., "Knowledge
distillation: A good teacher is patient and consistent", 2022, https://arxiv.org/abs/2106.05237).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Self, final

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from hansfree.config import Schema
from hansfree.core import UNKNOWN, Batch, Boxes, Split

View = Float[Tensor, "b 2 3"]
Matrices = Float[Tensor, "b 3 3"]

CANDIDATES = 10
"""How many crops are drawn for one that lies inside of the image; the last resort is cut to fit."""


# Maps under a view


def apply_view(
    map: Float[Tensor, "b *rest h w"], view: View, size: tuple[int, int] | None = None
) -> Float[Tensor, "b *rest height width"]:
    """``map``, of any resolution, as its image looks through ``view``: ``result(p) = map(view p)``.

    Bilinear. Half a pixel at the border has the outermost pixel's value, so that a map through the view that changes
    nothing stays as it is; what lies outside of the image is 0. ``size`` (height, width; default: the map's own) is
    that of the result. Where it is smaller than the map's, k x k places per pixel are averaged, k the ratio of the
    sizes rounded up: no pixel is skipped. Values are read as densities: a sum over the map is not kept.
    Differentiable in ``map``. ``rest`` may be any number of channels, targets and channels, or none.
    """
    height, width = map.shape[-2:]
    out_height, out_width = size or (height, width)
    rows, columns = math.ceil(height / out_height), math.ceil(width / out_width)
    flat = map.reshape(len(map), -1, height, width)
    shape = [len(map), 1, rows * out_height, columns * out_width]
    grid = F.affine_grid(view.to(flat), shape, align_corners=False)
    inside = (grid.abs().amax(-1) <= 1 + EDGE).to(flat.dtype).unsqueeze(1)
    result = inside * F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if rows > 1 or columns > 1:
        result = F.avg_pool2d(result, (rows, columns))
    return result.view(*map.shape[:-2], out_height, out_width)


EDGE = 1e-4
"""Rounding must not push a place on the border outside; far less than a pixel."""


def move_boxes(boxes: Boxes, view: View, before: tuple[int, int], after: tuple[int, int]) -> Boxes:
    """``boxes`` of images of size ``before`` (height, width) in what ``view`` makes of them, of size ``after``.

    Each becomes the upright hull of its four moved corners, cut at the border. Those that are left without an area
    are dropped with their classes.
    """
    forth = torch.linalg.inv(_homogeneous(view.double()))
    moved = [_moved_boxes(corners, matrix, before, after) for corners, matrix in zip(boxes.corners, forth)]
    kept = [((c[:, 2:] - c[:, :2]) > 0).all(1) for c in moved]
    return Boxes(
        tuple(corners[keep] for corners, keep in zip(moved, kept)),
        tuple(classes[keep] for classes, keep in zip(boxes.classes, kept)),
    )


def _moved_boxes(
    corners: Float[Tensor, "boxes 4"], forth: Float[Tensor, "3 3"], before: tuple[int, int], after: tuple[int, int]
) -> Float[Tensor, "boxes 4"]:
    (height, width), (out_height, out_width) = before, after
    x, y = corners[:, [0, 2, 2, 0]].double(), corners[:, [1, 1, 3, 3]].double()
    places = torch.stack([2 * x / width - 1, 2 * y / height - 1, torch.ones_like(x)], -1)  # [boxes, 4, 3]
    there = (places @ forth.T)[..., :2]
    pixels = (there + 1) / 2 * there.new_tensor([out_width, out_height])
    pixels = torch.minimum(pixels.clamp(min=0), pixels.new_tensor([out_width, out_height]))
    return torch.cat([pixels.amin(1), pixels.amax(1)], 1).to(corners.dtype)


def composed(first: View, second: View) -> View:
    """The view of an image that went through ``first`` and what came out through ``second``."""
    return (_homogeneous(first) @ _homogeneous(second))[:, :2]


def _homogeneous(view: View) -> Matrices:
    last = view.new_tensor([0.0, 0.0, 1.0]).expand(len(view), 1, 3)
    return torch.cat([view, last], 1)


# Views, one kind each


def flips(mirrored: Float[Tensor, "b"]) -> Matrices:
    """Left and right exchanged where ``mirrored`` is 1, as it was where it is 0."""
    return _affine(1 - 2 * mirrored, torch.ones_like(mirrored))


def crops(
    width: Float[Tensor, "b"], height: Float[Tensor, "b"], right: Float[Tensor, "b"], down: Float[Tensor, "b"]
) -> Matrices:
    """A window of so much of the image's ``width`` and ``height`` (1: all) that lies inside of it.

    ``right`` and ``down``, in [0, 1], say where: 0 at the left or upper border, 1 at the other one.
    """
    return _affine(width, height, (2 * right - 1) * (1 - width), (2 * down - 1) * (1 - height))


def shifts(right: Float[Tensor, "b"], down: Float[Tensor, "b"]) -> Matrices:
    """The image moved by shares of its width and height."""
    ones = torch.ones_like(right)
    return _affine(ones, ones, -2 * right, -2 * down)


def rotations(degrees: Float[Tensor, "b"], height: int, width: int) -> Matrices:
    """The image, of ``height`` x ``width`` pixels, turned anticlockwise about its middle."""
    angle = torch.deg2rad(degrees)
    matrix = _affine(angle.cos(), angle.cos())
    matrix[:, 0, 1] = -angle.sin() * height / width  # a step of 1 in y is height / 2 pixels, one in x width / 2
    matrix[:, 1, 0] = angle.sin() * width / height
    return matrix


def _affine(x_scale: Tensor, y_scale: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Matrices:
    matrix = torch.eye(3, dtype=x_scale.dtype).repeat(len(x_scale), 1, 1)
    matrix[:, 0, 0], matrix[:, 1, 1] = x_scale, y_scale
    if x is not None and y is not None:
        matrix[:, 0, 2], matrix[:, 1, 2] = x, y
    return matrix


def window(
    share: tuple[float, float],
    ratio: tuple[float, float],
    height: int,
    width: int,
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Width and height, as shares of the image's, of ``count`` windows that fit into it.

    Their area is uniform in ``share`` of the image's, the ratio of their sides log-uniform in ``ratio``; a pair that
    sticks out is drawn again, up to ``CANDIDATES`` times, then cut to fit.
    """
    area, side = torch.rand(2, count, CANDIDATES, generator=generator)
    area = share[0] + (share[1] - share[0]) * area
    low, high = math.log(ratio[0]), math.log(ratio[1])
    squeeze = torch.exp((low + (high - low) * side) / 2)
    shares = torch.stack(
        [area.sqrt() * squeeze * (height / width) ** 0.5, area.sqrt() / squeeze * (width / height) ** 0.5]
    )
    fits = (shares <= 1).all(0)
    first = fits.int().argmax(1)  # 0, as good as any other, where none fits
    across, down = shares[:, torch.arange(count), first].clamp(max=1)
    return across, down


def mixing_ratio(alpha: float, count: int, generator: torch.Generator | None) -> Float[Tensor, "count"]:
    """``count`` draws from Beta(alpha, alpha)."""
    seed = int(torch.randint(2**62, (), generator=generator))  # torch's own Beta takes no generator
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count)).float()


# What a run is told


@final
class Augmentation(Schema):
    """Random changes of training images, drawn anew at each access. All are off unless asked for.

    Geometric ones move the image, its clean twin, masks and boxes alike, and the batch's ``view`` says how.
    Photometric ones and ``mixup`` change the image and its clean twin, both in the same way.
    """

    crop: tuple[float, float] | None = None
    """Cut out a window with a share of the area between these two, and scale it to the image's size."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width to height of that window."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability that left and right are exchanged."""
    rotation: float = Field(default=0.0, ge=0, le=180)
    """Largest angle, in degrees, to either side."""
    translation: float = Field(default=0.0, ge=0, lt=1)
    """Largest move, as a share of width and of height, in either direction."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Pixels are multiplied by a factor of 1 - brightness to 1 + brightness."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    """Their distance from the image's mean is multiplied by a factor of 1 - contrast to 1 + contrast."""
    size: int | None = Field(default=None, ge=1)
    """Height and width of what comes out; null: the image's own. Validation and tests keep their size."""
    mixup: float = Field(default=0.0, ge=0)
    """Alpha of mixup for distillers: each image is averaged with another one of its batch, its own share drawn from
    Beta(alpha, alpha); 1 is uniform. Labels, masks and boxes are gone then: the teacher is asked instead."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError("crop takes two shares of the area with 0 < first <= second <= 1, such as [0.3, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError("ratio takes two ratios of width to height with 0 < first <= second, such as [0.75, 1.33]")
        return self

    @property
    def moves(self) -> bool:
        """Whether anything changes place."""
        return self.crop is not None or self.size is not None or max(self.flip, self.rotation, self.translation) > 0

    @property
    def not_replayable(self) -> str | None:
        """Why stored answers about the images cannot be replayed under this augmentation; None: they can."""
        return "mixup makes images that no stored answer is about; set augmentation.mixup: 0" if self.mixup else None

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """``batch`` of images, changed by draws from ``generator``."""
        if self.moves:
            height, width = batch.images.shape[-2:]
            batch = moved(batch, self.draw_view(len(batch), height, width, generator), self._size)
        if self.brightness or self.contrast:
            batch = self._relit(batch, generator)
        return mixed(batch, self.mixup, generator) if self.mixup else batch

    @property
    def _size(self) -> tuple[int, int] | None:
        return None if self.size is None else (self.size, self.size)

    def draw_view(self, count: int, height: int, width: int, generator: torch.Generator) -> View:
        """Views of ``count`` images of ``height`` x ``width`` pixels."""
        view = torch.eye(3).repeat(count, 1, 1)
        if self.rotation:
            angle = self.rotation * (2 * torch.rand(count, generator=generator) - 1)
            view = view @ rotations(angle, height, width)
        if self.translation:
            right, down = self.translation * (2 * torch.rand(2, count, generator=generator) - 1)
            view = view @ shifts(right, down)
        if self.crop is not None:
            across, down = window(self.crop, self.ratio, height, width, count, generator)
            view = view @ crops(across, down, *torch.rand(2, count, generator=generator))
        if self.flip:
            view = view @ flips((torch.rand(count, generator=generator) < self.flip).float())
        return view[:, :2]

    def _relit(self, batch: Batch, generator: torch.Generator) -> Batch:
        draws = 2 * torch.rand(2, len(batch), 1, 1, 1, generator=generator) - 1
        bright, strong = 1 + self.brightness * draws[0], 1 + self.contrast * draws[1]
        middle = (bright * batch.images).mean((1, 2, 3), keepdim=True)

        def relit(images: Tensor) -> Tensor:
            # One function of a pixel's value for both: where the twin agrees with the image, it still does.
            return (middle + strong * (bright * images - middle)).clamp(0, 1)

        clean = None if batch.clean is None else relit(batch.clean)
        return dataclasses.replace(batch, input=relit(batch.images), clean=clean)


def moved(batch: Batch, view: View, size: tuple[int, int] | None = None) -> Batch:
    """``batch`` as it looks through ``view``: image, clean twin, masks and boxes; ``Batch.view`` says so."""
    images = batch.images
    before = (images.shape[-2], images.shape[-1])
    layers = [layer for layer in (images, batch.clean, batch.mask) if layer is not None]
    result = apply_view(torch.cat(layers, 1), view, size).clamp(0, 1)  # rounding leaves it by a hair
    parts = iter(result.split([layer.shape[1] for layer in layers], 1))
    return dataclasses.replace(
        batch,
        input=next(parts),
        clean=None if batch.clean is None else next(parts),
        mask=None if batch.mask is None else next(parts),
        boxes=None if batch.boxes is None else move_boxes(batch.boxes, view, before, size or before),
        view=view if batch.view is None else composed(batch.view, view),
    )


def mixed(batch: Batch, alpha: float, generator: torch.Generator) -> Batch:
    """Each image and its clean twin averaged with another's: ``r x_i + (1 - r) x_j``, r from Beta(alpha, alpha).

    j is the place of i in a random permutation. ``Batch.mixed`` holds r; the label is ``UNKNOWN``, and what says
    something about a single sample (bias, mask, boxes) is gone.
    """
    own = mixing_ratio(alpha, len(batch), generator)
    other = torch.randperm(len(batch), generator=generator)

    def mix(images: Tensor) -> Tensor:
        return torch.lerp(images[other], images, own.to(images).view(-1, 1, 1, 1))

    return dataclasses.replace(
        batch,
        input=mix(batch.images),
        clean=None if batch.clean is None else mix(batch.clean),
        label=torch.full_like(batch.label, UNKNOWN),
        bias=None,
        mask=None,
        boxes=None,
        mixed=own,
    )


@final
@dataclass(frozen=True, eq=False)
class AugmentedSplit(Split):
    """A split whose images are augmented wherever a generator comes with the indices; without one, they are as is."""

    whole: Split
    augmentation: Augmentation

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.whole.label)
        object.__setattr__(self, "bias", self.whole.bias)

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``; their own draws come first, the augmentation's after them."""
        batch = self.whole.batch(index, generator)
        return batch if generator is None else self.augmentation(batch, generator)
