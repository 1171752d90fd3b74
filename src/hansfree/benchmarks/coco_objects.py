"""Objects of COCO: what its annotations say about them, and their masks.

Lin et al., "Microsoft COCO: common objects in context", ECCV 2014, https://cocodataset.org. An annotation tells a mask
as polygons, or as lengths of runs of 0 and 1 by turns, down the columns from the left one: a list of numbers, or a text
in which each character holds five bits of a number, the lowest first, and whether more follow; from the third number on
those are differences to the last but one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from hansfree.errors import UserError, unknown

Mask = UInt8[np.ndarray, "h w"]
Largest = Mapping[int, "CocoObject"]
"""By image, the largest object of one class."""
FINER = 5
"""Polygons are drawn on pixels so much smaller, of which the middle one decides."""


@final
@dataclass(frozen=True)
class CocoObject:
    """One annotation, and the image that it is about."""

    annotations: Path
    """The file that tells it."""
    number: int
    image: int
    """The image's number."""
    file: str
    """The image, below the folder of images."""
    width: int
    height: int
    area: float
    segmentation: Any = field(repr=False, compare=False)

    @property
    def source(self) -> str:
        """What a message names."""
        return f"annotation {self.number} of {self.annotations}"

    def mask(self) -> Mask:
        """255 on the object, 0 elsewhere. Raises ``UserError`` for a segmentation that does not fit the image."""
        told = self.segmentation
        try:
            mask = self._runs(told) if isinstance(told, Mapping) else self._polygons(told)
            if not mask.any():
                raise ValueError("it covers no pixel")
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"The mask in {self.source} cannot be read ({error}); mend it.") from error
        return (255 * mask).astype(np.uint8)

    def _polygons(self, polygons: Sequence[Sequence[float]]) -> Mask:
        fine = Image.new("L", (FINER * self.width, FINER * self.height))
        draw = ImageDraw.Draw(fine)
        for polygon in polygons:
            # Pixel i reaches from i to i + 1, and Pillow draws from the middles of pixels, ends included.
            points = [FINER * number - 0.5 for number in polygon]
            draw.polygon(list(zip(points[::2], points[1::2], strict=True)), fill=1)
        return np.asarray(fine)[FINER // 2 :: FINER, FINER // 2 :: FINER]

    def _runs(self, told: Mapping[str, Any]) -> Mask:
        height, width = told["size"]
        if (width, height) != (self.width, self.height):
            raise ValueError(f"it has {height} x {width} pixels, its image {self.height} x {self.width}")
        counts = told["counts"] if isinstance(told["counts"], list) else _unpacked(told["counts"])
        return np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T


def _unpacked(text: str) -> list[int]:
    """The lengths of runs that ``text`` holds."""
    lengths: list[int] = []
    number, bits = 0, 0
    for character in text:
        code = ord(character) - 48
        number |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        if code & 16:
            number -= 1 << bits
        lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
        number, bits = 0, 0
    return lengths


def largest_objects(annotations: Path, classes: Sequence[str], *, crowds: bool) -> tuple[Largest, ...]:
    """For each of ``classes`` its largest object in every image that shows one; of equals the first that is told.

    ``crowds`` says whether a region of many objects counts as one. Raises ``UserError`` where the file is missing, is
    no annotation of COCO, lacks a class, or names an image outside of the images' folder.
    """
    if not annotations.is_file():
        raise UserError(f"{annotations} is missing; unpack COCO's annotations_trainval2017.zip into benchmark.coco.")
    stamp = annotations.stat()
    return _read(annotations, stamp.st_mtime_ns, stamp.st_size, tuple(classes), crowds)


@lru_cache(maxsize=4)
def _read(
    annotations: Path, mtime: int, size: int, classes: tuple[str, ...], crowds: bool
) -> tuple[dict[int, CocoObject], ...]:
    """Kept while the file stays as it is: COCO's own takes a quarter of a minute."""
    try:
        told = json.loads(annotations.read_bytes())
        number = {category["name"]: category["id"] for category in told["categories"]}
        images = {image["id"]: image for image in told["images"]}
        absent = [name for name in classes if name not in number]
        if absent:
            raise unknown(f"category in {annotations}", absent[0], number)
        place = {number[name]: position for position, name in enumerate(classes)}
        found: tuple[dict[int, CocoObject], ...] = tuple({} for _ in classes)
        for one in told["annotations"]:
            if one["category_id"] not in place or (one.get("iscrowd") and not crowds):
                continue
            largest = found[place[one["category_id"]]]
            if one["image_id"] not in largest or one["area"] > largest[one["image_id"]].area:
                largest[one["image_id"]] = _object(annotations, one, images[one["image_id"]])
        return found
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{annotations} is not an annotation file of COCO ({type(error).__name__}: {error}); unpack "
            "annotations_trainval2017.zip again."
        ) from error


def _object(annotations: Path, told: Mapping[str, Any], image: Mapping[str, Any]) -> CocoObject:
    file = image["file_name"]
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise UserError(f"{annotations} names {file}, which is outside of the images' folder; mend it.")
    size = image["width"], image["height"]
    return CocoObject(annotations, told["id"], image["id"], file, *size, told["area"], told.get("segmentation"))
