"""PASCAL VOC: photographs with objects of twenty classes, often several at a time, and a box around each.

Everingham, Van Gool, Williams, Winn & Zisserman, "The PASCAL visual object classes (VOC) challenge", IJCV 2010,
https://doi.org/10.1007/s11263-009-0275-4, in its own layout:

    VOCdevkit/VOC2007/JPEGImages/000005.jpg
    VOCdevkit/VOC2007/Annotations/000005.xml        objects with their classes and boxes
    VOCdevkit/VOC2007/ImageSets/Main/train.txt      names of images, one a line; val.txt and test.txt too

Splits. Of 2007, which model guidance (https://arxiv.org/abs/2303.11932) and, after it, e2KD use:

    train   its train        valid   its val        iid   its test

Of 2012, whose test annotations are not public, iid is its val; valid is every tenth image of its train, in the list's
order, and train the others.

There is no known shortcut and so no ood or shift. All objects count, those that are marked as difficult or truncated
too (so in model guidance's code). Every image is brought to a square, whatever its shape, and boxes with it. VOC counts
pixels from 1 and both ends of a box belong to it: here (xmin - 1, ymin - 1, xmax, ymax), scaled and not rounded.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, final
from xml.etree import ElementTree

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.image_files import read_image
from hansfree.core import Batch, Boxes, InputSpec, Split
from hansfree.errors import UserError

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
HELD_OUT = 10
"""Of 2012, one image of so many is for validation."""


@final
@dataclass(frozen=True, eq=False)
class Scene:
    """One image: its file, and the classes and boxes of its objects as shares of its width and height."""

    image: Path
    classes: Int[Tensor, "objects"]
    corners: Float[Tensor, "objects 4"]


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class VOCSplit(Split):
    """Images of one split, read when a batch is asked for."""

    scenes: tuple[Scene, ...]
    label: Float[Tensor, "n classes"]  # pyright: ignore[reportIncompatibleVariableOverride]
    size: int
    kept: dict[int, Tensor] | None = field(default=None, repr=False)
    """Decoded images, where they are kept."""

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, read; nothing is left to ``generator``. Raises ``UserError`` for a bad image."""
        chosen = [self.scenes[number] for number in index.tolist()]
        return Batch(
            input=torch.stack([self._pixels(number) for number in index.tolist()]).float() / 255,
            label=self.label[index],
            index=index,
            boxes=Boxes(tuple(self.size * one.corners for one in chosen), tuple(one.classes for one in chosen)),
        )

    def _pixels(self, number: int) -> Tensor:
        if self.kept is not None and number in self.kept:
            return self.kept[number]
        image = read_image(self.scenes[number].image).resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        if self.kept is not None:
            self.kept[number] = pixels
        return pixels


@final
class PascalVOC(Divided[VOCSplit]):
    """Photographs with labels of several classes and a box around each object.

    ``root`` is the folder VOCdevkit or the one that holds it; ``year`` 2007 or 2012; ``size`` the side of the square
    that every image comes to; ``cache`` keeps decoded images in memory, 3 bytes per pixel.
    """

    name: ClassVar[str] = "pascal-voc"
    classes = CLASSES
    biases = ()
    gives = frozenset({"boxes"})
    shortcut = None

    def __init__(
        self, *, root: str | Path, year: Literal[2007, 2012] = 2007, size: int = 224, cache: bool = False
    ) -> None:
        if size < 1:
            raise UserError(f"benchmark.size is {size}; give a number of pixels.")
        if year not in (2007, 2012):
            raise UserError(f"benchmark.year is {year}; give 2007 or 2012.")
        self._root = _found(Path(root).expanduser(), year)
        self.input = InputSpec(3, size, size)
        self._splits = {
            name: _split([_scene(self._root, image) for image in images], size, cache)
            for name, images in _lists(self._root, year).items()
        }
        self._options = {"root": str(root), "year": year, "size": size, "cache": cache}

    def _described(self, split: VOCSplit) -> dict[str, Any]:
        sha = hashlib.sha256()
        for one in split.scenes:
            sha.update(json.dumps([one.image.name, one.classes.tolist(), one.corners.tolist()]).encode())
        objects = torch.cat([one.classes for one in split.scenes]).bincount(minlength=len(CLASSES))
        return {
            "size": len(split),
            "images": dict(zip(CLASSES, split.label.sum(0).int().tolist())),
            "objects": dict(zip(CLASSES, objects.tolist())),
            "sha256": sha.hexdigest(),
        }


def _found(root: Path, year: int) -> Path:
    """The folder of one year."""
    for folder in (root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"):
        if (folder / "ImageSets" / "Main").is_dir():
            return folder
    raise UserError(f"{root} holds no VOC{year}/ImageSets/Main; set benchmark.root to the unpacked folder VOCdevkit.")


def _lists(root: Path, year: int) -> dict[str, list[str]]:
    """Names of the images of each split."""
    train = _names(root, "train")
    if year == 2007:
        return {"train": train, "valid": _names(root, "val"), "iid": _names(root, "test")}
    if len(train) < HELD_OUT:
        raise UserError(f"{root} has {len(train)} training images, too few to validate on; fetch the whole data set.")
    kept = [name for number, name in enumerate(train) if number % HELD_OUT]
    return {"train": kept, "valid": train[::HELD_OUT], "iid": _names(root, "val")}


def _names(root: Path, part: str) -> list[str]:
    path = root / "ImageSets" / "Main" / f"{part}.txt"
    try:
        names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); unpack the whole data set, test images too.") from error
    if not names:
        raise UserError(f"{path} names no image; fetch it again.")
    return names


def _scene(root: Path, name: str) -> Scene:
    path, image = root / "Annotations" / f"{name}.xml", root / "JPEGImages" / f"{name}.jpg"
    if not image.is_file():
        raise UserError(f"{image} is missing; unpack the whole data set.")
    try:
        told = ElementTree.parse(path).getroot()
        width, height = (float(_text(told, f"size/{side}")) for side in ("width", "height"))
        objects = [(_text(one, "name"), [float(_text(one, f"bndbox/{end}")) for end in _ENDS])
                   for one in told.iter("object")]  # fmt: skip
        classes = torch.tensor([CLASSES.index(kind) for kind, _ in objects], dtype=torch.long)
        ends = torch.tensor([box for _, box in objects], dtype=torch.float).view(-1, 4)
        corners = (ends - torch.tensor([1.0, 1.0, 0.0, 0.0])) / torch.tensor([width, height, width, height])
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} is no annotation of VOC ({error}); fetch it again.") from error
    return Scene(image, classes, corners.clamp(0, 1))


_ENDS = ("xmin", "ymin", "xmax", "ymax")


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"it has no {path}")
    return text.strip()


def _split(scenes: Sequence[Scene], size: int, cache: bool) -> VOCSplit:
    label = torch.zeros(len(scenes), len(CLASSES))
    for row, one in zip(label, scenes):
        row[one.classes] = 1
    return VOCSplit(scenes=tuple(scenes), label=label, size=size, kept={} if cache else None)
