"""Corruptions of small photographs: noise, blur, weather and encoding, in two sets of ten.

Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019,
https://arxiv.org/abs/1903.12261, at the five severities of CIFAR-10-C; ``type-0`` and ``type-1`` are the sets that Nam
et al., "Learning from failure", NeurIPS 2020, https://arxiv.org/abs/2007.02561, tie to the ten classes of CIFAR-10, in
their order. Their severities 1 to 4 are 2 to 5 here.

A corruption takes images [b, 3, h, w] in [0, 1], a severity and a generator, and gives images as large, which may leave
[0, 1]: :func:`corrupt` clips them. Lengths are in pixels as published for 32 x 32, whatever the size; the plasma of fog
and the warp of elastic grow with the image.

Deviations. ``frost``: the published one lays six photographs of frost over the image, which are not here; ridges of the
same plasma stand for them. ``spatter`` at severities 1 to 3 (water): the edge finder is a Sobel filter with one
threshold, not Canny's, and distances are exact. ``motion_blur`` and ``snow`` compute ImageMagick's one-sided Gaussian
along a line, ``elastic`` interpolates exactly. ``glass_blur``: the published swap of two neighbours copies one of them,
and so does this. Nothing is rounded to bytes between two steps, and the result is rounded rather than cut off.
"""

import io
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from hansfree.errors import UserError, unknown

Images = Float[Tensor, "b 3 h w"]
Layer = Float[Tensor, "b 1 h w"]
Corruption = Callable[[Images, int, torch.Generator], Images]
SEVERITIES = (1, 2, 3, 4, 5)

GREY = (0.299, 0.587, 0.114)
TURQUOISE, MUD, ICE = (175, 238, 238), (63, 42, 20), (205, 230, 255)


def corrupt(images: Num[Tensor, "b 3 h w"], name: str, severity: int, generator: torch.Generator) -> Tensor:
    """``images``, bytes or floats in [0, 1], under the corruption ``name``; of the same kind, clipped.

    Raises ``UserError`` for an unknown corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise unknown("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UserError(f"The severity of a corruption is {severity!r}; give a whole number from 1 to 5.")
    are_bytes = images.dtype == torch.uint8
    corrupted = CORRUPTIONS[name](images.float() / 255 if are_bytes else images, severity, generator).clamp(0, 1)
    return (255 * corrupted).round().to(torch.uint8) if are_bytes else corrupted.to(images.dtype)


# Noise


def gaussian_noise(x: Images, severity: int, generator: torch.Generator) -> Images:
    """``x + c z``, z standard normal per pixel and channel."""
    c = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return x + c * _normal(x, generator)


def shot_noise(x: Images, severity: int, generator: torch.Generator) -> Images:
    """``Poisson(c x) / c``."""
    c = (500, 250, 100, 75, 50)[severity - 1]
    return torch.poisson(c * x.clamp(0, 1), generator) / c


def impulse_noise(x: Images, severity: int, generator: torch.Generator) -> Images:
    """A share c of all values of all channels becomes 0 or 1, either as often."""
    c = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    draw = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    return torch.where(draw < c, (draw < c / 2).to(x.dtype), x)


def speckle_noise(x: Images, severity: int, generator: torch.Generator) -> Images:
    """``x + c x z``, z standard normal per pixel and channel."""
    c = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    return x + c * x * _normal(x, generator)


# Blur


def gaussian_blur(x: Images, severity: int, generator: torch.Generator) -> Images:
    """A Gaussian of c pixels; the border goes on."""
    return _smooth(x, (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1])


def defocus_blur(x: Images, severity: int, generator: torch.Generator) -> Images:
    """The mean over a disc of ``radius`` pixels whose edge is softened by a Gaussian of three taps."""
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    kernel = disc(radius, alias)[None, None]
    return _tensor(ndimage.correlate(x.numpy(), kernel.numpy().astype(x.numpy().dtype), mode="mirror"))


def disc(radius: float, alias: float) -> Float[Tensor, "k k"]:
    """A disc that sums to 1, smoothed by three taps of a Gaussian of ``alias`` pixels; k reaches one pixel further."""
    reach = math.floor(radius) + 1
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    inside = (at[:, None].square() + at.square() <= radius**2).double()
    taps = (-torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) / (2 * alias**2)).exp()
    taps = taps / taps.sum()
    return F.conv2d((inside / inside.sum())[None, None], taps[None, None, None] * taps[:, None], padding=1)[0, 0]


def glass_blur(x: Images, severity: int, generator: torch.Generator) -> Images:
    """Blurred, each pixel replaced by itself or a neighbour above or to the left, ``rounds`` times, blurred again."""
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    count, _, height, width = x.shape
    moved = torch.zeros(count, height, width, dtype=torch.bool)
    moved[:, 2:, 2:] = True
    x = _smooth(x, sigma)
    for _ in range(rounds):
        up, left = (torch.randint(2, moved.shape, generator=generator) * moved for _ in range(2))
        x = _shifted(x, -up, -left)
    return _smooth(x, sigma)


def motion_blur(x: Images, severity: int, generator: torch.Generator) -> Images:
    """Blurred along a line between 45 degrees up and down, one per image."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    return dragged(x, radius, sigma, _uniform(len(x), -45, 45, generator))


def dragged(
    x: Float[Tensor, "b c h w"], radius: float, sigma: float, degrees: Float[Tensor, "b"]
) -> Float[Tensor, "b c h w"]:
    """``sum_i g_i x(p + i (cos, sin))``, i = 0 ... 2 radius in whole pixels, g a Gaussian of ``sigma`` that sums to 1.

    As ImageMagick blurs motion: to one side, the nearest pixel taken for each i; the border goes on.
    """
    steps = torch.arange(2 * math.ceil(radius) + 1)
    weight = (-steps.double().square() / (2 * sigma**2)).exp()
    weight = (weight / weight.sum()).to(x.dtype)
    angle = degrees.double().deg2rad()
    blurred = torch.zeros_like(x)
    for step, share in zip(steps.tolist(), weight.tolist()):
        down, right = (
            torch.ceil(step * direction - 0.5).long()[:, None, None] for direction in (angle.sin(), angle.cos())
        )
        blurred += share * _shifted(x, down, right)
    return blurred


def zoom_blur(x: Images, severity: int, generator: torch.Generator) -> Images:
    """The mean of the image and of itself enlarged by 1, 1.01, 1.02 ... up to 1.05 to 1.25."""
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    return sum((enlarged(x, factor) for factor in factors), x) / (len(factors) + 1)


def enlarged(x: Float[Tensor, "b c h w"], factor: float) -> Float[Tensor, "b c h w"]:
    """The middle of the image, enlarged bilinearly to at least the size of the whole and cut to it."""
    sides = x.shape[-2:]
    kept = [math.ceil(side / factor) for side in sides]
    top, left = ((side - keep) // 2 for side, keep in zip(sides, kept))
    middle = x[..., top : top + kept[0], left : left + kept[1]]
    larger = F.interpolate(middle, [round(keep * factor) for keep in kept], mode="bilinear", align_corners=True)
    top, left = ((large - side) // 2 for large, side in zip(larger.shape[-2:], sides))
    return larger[..., top : top + sides[0], left : left + sides[1]]


# Weather


def plasma(count: int, side: int, decay: float, generator: torch.Generator) -> Float[Tensor, "count side side"]:
    """Clouds from 0 to 1 on a torus, by midpoints of squares and then of edges, whose noise shrinks by ``decay``.

    ``side`` is a power of two. At each scale a midpoint is the mean of its four neighbours and uniform noise.
    """
    heights = torch.zeros(count, side, side)
    noise, step = 100.0, side
    while step >= 2:
        half = step // 2

        def midpoints(neighbours: Tensor, size: float = noise) -> Tensor:
            draw = 2 * torch.rand(neighbours.shape, generator=generator) - 1
            return neighbours / 4 + size**2 * draw

        corner = heights[:, ::step, ::step]
        pairs = corner + corner.roll(-1, 1)
        heights[:, half::step, half::step] = midpoints(pairs + pairs.roll(-1, 2))
        centre = heights[:, half::step, half::step]
        heights[:, ::step, half::step] = midpoints(centre + centre.roll(1, 1) + corner + corner.roll(-1, 2))
        heights[:, half::step, ::step] = midpoints(centre + centre.roll(1, 2) + corner + corner.roll(-1, 1))
        step, noise = half, noise / decay
    heights -= heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)


def fog(x: Images, severity: int, generator: torch.Generator) -> Images:
    """``(x + c plasma) m / (m + c)``, m being the image's largest value."""
    c, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + c * _plasma_over(x, decay, generator)) * most / (most + c)


def frost(x: Images, severity: int, generator: torch.Generator) -> Images:
    """``a x + b ice``; the ice is made of pale blue ridges of a plasma, see the deviations."""
    a, b = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    ridges = 1 - (2 * _plasma_over(x, 1.75, generator) - 1).abs()
    return a * x + b * ridges * _colour(ICE, x)


def snow(x: Images, severity: int, generator: torch.Generator) -> Images:
    """Paled, and flakes added that fall, and the same flakes turned by half a turn."""
    mean, deviation, zoom, threshold, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    flakes = enlarged(mean + deviation * _normal(x[:, :1], generator), zoom)
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    flakes = dragged(flakes, radius, sigma, _uniform(len(x), -135, -45, generator))
    grey = (x * x.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
    paled = kept * x + (1 - kept) * torch.maximum(x, 1.5 * grey + 0.5)
    return paled + flakes + flakes.rot90(2, (2, 3))


def spatter(x: Images, severity: int, generator: torch.Generator) -> Images:
    """Drops: of pale water that is added (severities 1 to 3), or of mud that covers (4 and 5)."""
    mean, deviation, smoothing, threshold, strength = (
        (0.62, 0.1, 0.7, 0.7, 0.5),
        (0.65, 0.1, 0.8, 0.7, 0.5),
        (0.65, 0.3, 1.0, 0.69, 0.5),
        (0.65, 0.1, 0.7, 0.69, 0.6),
        (0.65, 0.1, 0.5, 0.68, 0.6),
    )[severity - 1]
    liquid = _smooth(mean + deviation * _normal(x[:, :1], generator), smoothing)
    if severity <= 3:
        return x + strength * _drops(torch.where(liquid < threshold, 0, liquid)) * _colour(TURQUOISE, x)
    covered = _smooth((liquid > threshold).to(x.dtype), strength)
    covered = torch.where(covered < 0.8, 0, covered)
    return (1 - covered) * x + covered * _colour(MUD, x)


def _drops(liquid: Layer) -> Layer:
    """How bright each pixel of water is, from 0 to 1: by its distance from the edge, lit from one side."""
    drops = torch.zeros_like(liquid)
    light = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float64)
    for number, layer in enumerate((255 * liquid[:, 0]).double().numpy()):
        edge = np.hypot(ndimage.sobel(layer, 0), ndimage.sobel(layer, 1)) > 100
        distance = np.asarray(ndimage.distance_transform_edt(~edge))
        distance = ndimage.uniform_filter(np.minimum(distance, 20), 3, mode="mirror")
        ranks = np.searchsorted(np.sort(distance, axis=None), distance, side="right") / distance.size
        lit = ndimage.correlate(255 * ranks, light, mode="mirror").clip(0, 255)
        bright = layer * ndimage.uniform_filter(lit, 3, mode="mirror")
        drops[number, 0] = torch.from_numpy(bright / max(bright.max(), 1e-12))
    return drops


# Light and encoding


def brightness(x: Images, severity: int, generator: torch.Generator) -> Images:
    """The value of HSV, a pixel's largest channel, c higher, at most 1; hue and saturation stay."""
    c = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    value = x.amax(1, keepdim=True)
    brighter = (value + c).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-12), brighter)


def contrast(x: Images, severity: int, generator: torch.Generator) -> Images:
    """``m + c (x - m)``, m being the image's mean per channel."""
    c = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    mean = x.mean((2, 3), keepdim=True)
    return mean + c * (x - mean)


def saturate(x: Images, severity: int, generator: torch.Generator) -> Images:
    """The saturation S of HSV becomes ``a S + b``, at most 1; hue and value stay, and grey counts as red."""
    a, b = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    value = x.amax(1, keepdim=True)
    saturation = (value - x.amin(1, keepdim=True)) / value.clamp(min=1e-12)
    hue = torch.where(
        saturation > 0, (1 - x / value.clamp(min=1e-12)) / saturation.clamp(min=1e-12), _colour((0, 255, 255), x)
    )
    return value * (1 - (a * saturation + b).clamp(max=1) * hue)


def jpeg_compression(x: Images, severity: int, generator: torch.Generator) -> Images:
    """Written as JPEG of a quality from 80 to 40, and read again."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def written(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each(x, written)


def pixelate(x: Images, severity: int, generator: torch.Generator) -> Images:
    """Made smaller by c, and as large as before again, by means over boxes."""
    c = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]

    def coarse(image: Image.Image) -> Image.Image:
        small = image.resize((int(c * image.width), int(c * image.height)), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.BOX)

    return _each(x, coarse)


def elastic(x: Images, severity: int, generator: torch.Generator) -> Images:
    """Three points and with them the image moved by up to ``c`` sides, and then every pixel along a smooth field."""
    strength, smoothing, c = (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    count, _, height, width = x.shape
    side = min(height, width)
    reach, middle = side // 3, torch.tensor([width // 2, height // 2], dtype=torch.float64)
    points = middle + reach * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    moved = points + c * side * (2 * torch.rand(count, 3, 2, generator=generator, dtype=torch.float64) - 1)
    places = _pixels(height, width) @ _affine(moved, points.expand_as(moved)).mT
    warped = _sampled(x, places.reshape(count, height, width, 2), corners=True)
    field = torch.rand(count, 2, height, width, generator=generator) * 2 - 1
    field = strength * side * _smooth(field, smoothing * side, mode="reflect", reach=3.0)
    at = _pixels(height, width)[:, :2].reshape(height, width, 2) + field.permute(0, 2, 3, 1)
    return _sampled(warped, at, corners=False)


def original(x: Images, severity: int, generator: torch.Generator) -> Images:
    """The image as it is."""
    return x


# What they are made of


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Float[Tensor, "count"]:
    return low + (high - low) * torch.rand(count, generator=generator)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _colour(rgb: tuple[int, int, int], like: Tensor) -> Float[Tensor, "3 1 1"]:
    return like.new_tensor(rgb)[:, None, None] / 255


def _smooth(
    x: Float[Tensor, "b c h w"], sigma: float, *, mode: Literal["nearest", "reflect"] = "nearest", reach: float = 4.0
) -> Float[Tensor, "b c h w"]:
    """Under a Gaussian of ``sigma`` pixels that is cut off at ``reach`` of them."""
    return _tensor(ndimage.gaussian_filter(x.numpy(), sigma, mode=mode, truncate=reach, axes=(2, 3)))


def _plasma_over(x: Images, decay: float, generator: torch.Generator) -> Layer:
    count, _, height, width = x.shape
    side = 2 ** math.ceil(math.log2(max(height, width)))
    return plasma(count, side, decay, generator)[:, None, :height, :width].to(x.dtype)


def _shifted(
    x: Float[Tensor, "b c h w"], down: Int[Tensor, "b ?h ?w"], right: Int[Tensor, "b ?h ?w"]
) -> Float[Tensor, "b c h w"]:
    """``x`` at each pixel's own place moved by ``down`` and ``right``; the border goes on."""
    _, channels, height, width = x.shape
    row = (torch.arange(height)[:, None] + down).clamp(0, height - 1)
    column = (torch.arange(width) + right).clamp(0, width - 1)
    place = (row * width + column).flatten(1)[:, None].expand(-1, channels, -1)
    return x.flatten(2).gather(2, place).view_as(x)


def _each(x: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    """``change`` of each image as bytes."""
    arrays = (255 * x.clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(array))) for array in arrays])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).to(x.dtype) / 255


def _pixels(height: int, width: int) -> Float[Tensor, "n 3"]:
    """(column, row, 1) of each pixel, row by row."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([column, row, torch.ones_like(row)], -1).double().reshape(-1, 3)


def _affine(source: Float[Tensor, "b 3 2"], target: Float[Tensor, "b 3 2"]) -> Float[Tensor, "b 2 3"]:
    """The affine maps of the three points of ``source`` to those of ``target``."""
    return torch.linalg.solve(F.pad(source, (0, 1), value=1.0), target).mT


def _sampled(x: Images, place: Float[Tensor, "b h w 2"], *, corners: bool) -> Images:
    """``x`` at (column, row), bilinearly; outside, mirrored at its outermost pixels or, not ``corners``, its edge."""
    size = torch.tensor([x.shape[3], x.shape[2]], dtype=torch.float64)
    grid = 2 * place / (size - 1) - 1 if corners else (2 * place + 1) / size - 1
    return F.grid_sample(x, grid.to(x.dtype), padding_mode="reflection", align_corners=corners)


CORRUPTIONS: dict[str, Corruption] = {
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "spatter": spatter,
    "elastic": elastic,
    "jpeg": jpeg_compression,
    "pixelate": pixelate,
    "saturate": saturate,
    "gaussian-noise": gaussian_noise,
    "shot-noise": shot_noise,
    "impulse-noise": impulse_noise,
    "speckle-noise": speckle_noise,
    "gaussian-blur": gaussian_blur,
    "defocus-blur": defocus_blur,
    "glass-blur": glass_blur,
    "motion-blur": motion_blur,
    "zoom-blur": zoom_blur,
    "original": original,
}
SETS = {"type-0": tuple(CORRUPTIONS)[:10], "type-1": tuple(CORRUPTIONS)[10:]}
"""The two sets of Nam et al.; the i-th corruption belongs to the i-th class."""
