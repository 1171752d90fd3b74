"""Image files on their way to a model: found, checked by their headers, turned, resized."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from hansfree.benchmarks.image_files import eight_bits
from hansfree.core import Classifier
from hansfree.errors import UserError

Fit = Literal["resize", "crop"]

LONGEST_SIDE = 512
"""Images for a model without a size of its own are shrunk to this, unless --size says otherwise."""


class Source(NamedTuple):
    """An image file: where it is, and its path as people read it."""

    path: Path
    title: str

    @property
    def state(self) -> tuple[str, int, int]:
        """The path as text, the size and the time of the last change."""
        there = self.path.stat()
        return readable(self.path), there.st_size, there.st_mtime_ns


def find_images(paths: Sequence[Path], out: Path) -> list[Source]:
    """The image files of ``paths``, folders searched recursively (``out`` left out), each once.

    Raises ``UserError`` for a path that is not there, a folder without images, and a file that has no image's
    header; files in folders are known as images by their suffix.
    """
    Image.init()
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if _is_picture(file, out)]
            if not inside:
                raise UserError(f"There are no images in {path}; name image files or a folder that holds some.")
        elif path.is_file():
            inside = [path]
        else:
            raise UserError(f"There is no {path}; check the path.")
        found.update(dict.fromkeys(file.resolve() for file in inside))
    bad = [(path, reason) for path in found if (reason := _flaw(path))]
    if bad:
        others = f", nor can {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{bad[0][0]} cannot be read as an image ({bad[0][1]}){others}; check the path and the format.")
    base = os.path.commonpath([path.parent for path in found])
    return [Source(path, readable(path.relative_to(base))) for path in found]


def _is_picture(file: Path, out: Path) -> bool:
    known = file.suffix.lower() in Image.registered_extensions() and not file.name.startswith(".")
    return known and file.is_file() and out.resolve() not in file.resolve().parents


def _flaw(path: Path) -> str:
    try:
        with Image.open(path):  # reads the header alone
            return ""
    except Image.UnidentifiedImageError:
        return "no known format"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)


def readable(path: Path) -> str:
    """``path`` as text that UTF-8 can hold, whatever bytes its name is made of."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


class Picture(NamedTuple):
    """What came of reading an image: pixels, uint8 [h, w, c], or the reason why there are none."""

    source: Source
    pixels: np.ndarray | None
    error: str = ""


@dataclass(frozen=True)
class Fitting:
    """How an image comes to the size that the model wants."""

    size: tuple[int, int] | None
    """Height and width; None: as they are, with the longer side limited to ``longest``."""
    longest: int
    channels: int
    fit: Fit
    crop_share: float
    """With ``crop``, the share of the shorter side that is kept."""
    resampling: Image.Resampling

    @classmethod
    def of(cls, model: Classifier, fit: Fit, longest: int | None) -> "Fitting":
        """What ``model`` carries, and what was asked. Raises ``UserError`` where they contradict."""
        published = model.config.get("pretrained_cfg") or {}
        size = getattr(model, "size", None) or (published.get("input_size") or [0])[1:]
        if longest is not None and size:
            raise UserError(f"The model takes images of {size[0]} × {size[1]} pixels; leave out --size.")
        if fit == "crop" and not size:
            raise UserError("The model takes images of any size, so there is nothing to crop them to; use --size.")
        smooth = published.get("interpolation") == "bicubic"
        return cls(
            (int(size[0]), int(size[1])) if size else None,
            longest or LONGEST_SIDE,
            model.config.get("channels", 3),
            fit,
            float(published.get("crop_pct") or 0.875),
            Image.Resampling.BICUBIC if smooth else Image.Resampling.BILINEAR,
        )

    @property
    def told(self) -> str:
        """The sizes, for people."""
        if self.size is None:
            return f"as they are, the longer side at most {self.longest} pixels"
        how = "resized to" if self.fit == "resize" else "the middle, cut out, of"
        return f"{how} {self.size[0]} × {self.size[1]} pixels"

    def read(self, source: Source) -> Picture:
        """Read an image file: turned as its camera says, in the model's channels and size. Never raises."""
        try:
            with Image.open(source.path) as file:
                upright = eight_bits(ImageOps.exif_transpose(file))
                image = self._fitted(upright.convert("L" if self.channels == 1 else "RGB"))
        except Exception as error:  # decoders raise whatever they like on damaged files
            reason = " ".join(str(error).split())
            return Picture(source, None, f"{source.title} cannot be read ({reason}); restore it and run this again.")
        pixels = np.asarray(image)
        return Picture(source, pixels[..., None] if pixels.ndim == 2 else pixels)

    def _fitted(self, image: Image.Image) -> Image.Image:
        if self.size is None:
            scale = min(1.0, self.longest / max(image.size))
            return self._resized(image, round(image.height * scale), round(image.width * scale))
        height, width = self.size
        if self.fit == "resize":
            return self._resized(image, height, width)
        scale = max(height / image.height, width / image.width) / self.crop_share
        image = self._resized(image, round(image.height * scale), round(image.width * scale))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def _resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        size = max(1, width), max(1, height)
        return image if image.size == size else image.resize(size, self.resampling)
