"""Cut-outs pasted on scenes: pictures seen through random affine maps, rendered once, composed by the batch.

A composite keeps its parts: ``paint`` (the cut-out times its alpha), ``alpha`` (the exact mask) and what is behind:

    image = paint + (1 - alpha) * behind

Each picture is read at a resolution a little above the working size, and rendered by bilinear sampling at twice the
working size and averaging over 2 x 2 pixels, so that nothing is sampled more coarsely than it is. Rendered views are
kept as bytes: 4 per pixel for a cut-out, 3 for a scene. After that a batch is a look-up and one interpolation.

Views. A cut-out is mirrored or not, turned by up to 12 degrees, its longer side 0.6 to 0.95 of the image, anywhere
where it fits, each channel up to 10 % stronger or weaker and all together up to 15 % lighter or darker. A scene is
mirrored or not, a square cut out of 0.56 to 1 of its shorter side, and up to 15 % lighter or darker.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from hansfree import backgrounds
from hansfree.benchmarks.image_files import read_image

TURN = math.radians(12)
LONGER_SIDE = (0.6, 0.95)
CROP = (0.5625, 1.0)
CHANNEL_GAIN = 0.10
BRIGHTNESS = 0.15

Picture = UInt8[Tensor, "c h w"]
Place = Float[Tensor, "n 2 3"]
"""Affine maps from the rendered image to the picture, both with corners at -1 and 1, as ``F.affine_grid`` takes."""


# Reading


@lru_cache(maxsize=4096)
def cut_out(path: Path, longer: int) -> Picture:
    """A picture with alpha, its colours multiplied by alpha, its longer side ``longer`` pixels: [4, h, w]."""
    image = read_image(path, "RGBA").convert("RGBa")  # premultiplied, so that resizing draws in no hidden colour
    return _resized(image, longer / max(image.size))


@lru_cache(maxsize=4096)
def scene(path: Path, shorter: int) -> Picture:
    """A picture whose shorter side has ``shorter`` pixels: [3, h, w]."""
    image = read_image(path)
    return _resized(image, shorter / min(image.size))


def _resized(image: Image.Image, scale: float) -> Picture:
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


# Views


@final
@dataclass(frozen=True, eq=False)
class Views:
    """Pictures seen through affine maps: rendered together at the first use."""

    pictures: tuple[Picture, ...]
    picture: Int[Tensor, "n"]
    """Which picture each view shows."""
    place: Place
    gain: Float[Tensor, "n 3"]
    """What each channel is multiplied by."""
    size: int

    @cached_property
    def pixels(self) -> UInt8[Tensor, "n c size size"]:
        """Every view, as bytes."""
        key = f"{self.size} {self.fingerprint()}"
        pixels = _RENDERED.pop(key, None)
        _RENDERED[key] = self._rendered() if pixels is None else pixels
        for oldest in list(_RENDERED)[:-_KEPT]:
            del _RENDERED[oldest]
        return _RENDERED[key]

    def _rendered(self) -> UInt8[Tensor, "n c size size"]:
        channels = self.pictures[0].shape[0]
        rendered = torch.empty(len(self.picture), channels, self.size, self.size, dtype=torch.uint8)
        for number in self.picture.unique().tolist():
            for some in (self.picture == number).nonzero()[:, 0].split(16):
                rendered[some] = render(self.pictures[number], self.place[some], self.gain[some], self.size)
        return rendered

    def fingerprint(self) -> str:
        """SHA-256 of pictures and maps: of what is rendered, without rendering it."""
        sha = hashlib.sha256()
        for values in (*self.pictures, self.picture, self.place, self.gain):
            sha.update(values.contiguous().numpy().tobytes())
        return sha.hexdigest()


_KEPT = 18
"""About twice as many views as a benchmark's splits have."""
_RENDERED: dict[str, UInt8[Tensor, "n c size size"]] = {}
"""The last views that were rendered in this process: the cells of a suite see the same, and so do their teachers."""


def render(picture: Picture, place: Place, gain: Float[Tensor, "n 3"], size: int) -> UInt8[Tensor, "n c size size"]:
    """``picture`` through each map; a cut-out is transparent outside, a scene goes on as its border."""
    count, channels = len(place), picture.shape[0]
    grid = F.affine_grid(place, [count, channels, 2 * size, 2 * size], align_corners=False)
    outside = "zeros" if channels == 4 else "border"
    fine = F.grid_sample(picture.float().expand(count, -1, -1, -1), grid, padding_mode=outside, align_corners=False)
    pixels = F.avg_pool2d(fine, 2)
    most = pixels[:, 3:] if channels == 4 else torch.full((), 255.0)
    paint = torch.minimum(pixels[:, :3] * gain[:, :, None, None], most)
    return torch.cat([paint, pixels[:, 3:]], 1).round().to(torch.uint8)


def object_places(
    side: Float[Tensor, "n 2"],
    generator: torch.Generator,
    *,
    longer: tuple[float, float] = LONGER_SIDE,
    corner: Float[Tensor, "n 2"] | None = None,
) -> Place:
    """Random places of cut-outs whose width and height, the longer one being 1, are ``side``.

    ``longer`` are the ends of the longer side, as a share of the image. ``corner`` (-1 or 1 to the right, the same
    down) keeps each at least half of the way from the middle to that corner.
    """
    count = len(side)
    turn = TURN * _either_way(count, generator)
    scale = _between(longer, count, generator)
    mirror = _mirror(count, generator)
    cos, sin = turn.cos(), turn.sin()
    turned = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    reach = scale[:, None] * (turned.abs() @ side[:, :, None])[..., 0]
    share = torch.rand(count, 2, generator=generator)
    centre = (1 - reach).clamp(min=0) * (2 * share - 1 if corner is None else corner * (1 + share) / 2)
    linear = turned / (scale[:, None] * side)[:, :, None]
    linear[:, 0] *= mirror[:, None]
    return torch.cat([linear, -linear @ centre[:, :, None]], 2)


def scene_places(side: Float[Tensor, "n 2"], generator: torch.Generator) -> Place:
    """Random squares out of scenes whose width and height, the shorter one being 1, are ``side``."""
    count = len(side)
    extent = _between(CROP, count, generator)[:, None] / side
    mirror = _mirror(count, generator)
    centre = (1 - extent) * (2 * torch.rand(count, 2, generator=generator) - 1)
    linear = torch.diag_embed(extent)
    linear[:, 0] *= mirror[:, None]
    return torch.cat([linear, centre[:, :, None]], 2)


def gains(count: int, channel: float, generator: torch.Generator) -> Float[Tensor, "n 3"]:
    """Random brightness, and up to ``channel`` more or less in each channel."""
    brightness = 1 + BRIGHTNESS * _either_way(count, generator)
    tint = 1 + channel * (2 * torch.rand(count, 3, generator=generator) - 1)
    return brightness[:, None] * tint


def _either_way(count: int, generator: torch.Generator) -> Float[Tensor, "n"]:
    return 2 * torch.rand(count, generator=generator) - 1


def _between(ends: tuple[float, float], count: int, generator: torch.Generator) -> Float[Tensor, "n"]:
    return ends[0] + (ends[1] - ends[0]) * torch.rand(count, generator=generator)


def _mirror(count: int, generator: torch.Generator) -> Float[Tensor, "n"]:
    return 2.0 * torch.randint(2, (count,), generator=generator) - 1


def sides(pictures: Sequence[Picture]) -> Float[Tensor, "pictures 2"]:
    """Width and height of each picture."""
    return torch.tensor([[float(picture.shape[2]), float(picture.shape[1])] for picture in pictures])


# Composing


def compose(
    paint: Float[Tensor, "b 3 h w"], alpha: Float[Tensor, "b 1 h w"], behind: Tensor
) -> Float[Tensor, "b 3 h w"]:
    """``paint + (1 - alpha) * behind``."""
    return torch.addcmul(paint, 1 - alpha, behind.expand_as(paint))


def parted(pixels: UInt8[Tensor, "b 4 h w"]) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 1 h w"]]:
    """Paint and alpha, in [0, 1]."""
    values = pixels.float() / 255
    return values[:, :3], values[:, 3:]


def grained_noise(seed: Int[Tensor, "b"], size: int) -> Float[Tensor, "b 3 size size"]:
    """Uniform noise in squares of 1, 2, 4, 8 or 16 pixels, as ``seed`` says."""
    grain = 2 ** (seed % 5)
    noise = torch.empty(len(seed), 3, size, size)
    for width in grain.unique().tolist():
        some = grain == width
        cells = backgrounds.noise(seed[some], 3, -(-size // width), -(-size // width))
        noise[some] = cells.repeat_interleave(width, 2).repeat_interleave(width, 3)[:, :, :size, :size]
    return noise
