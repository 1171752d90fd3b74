"""Images with masks of named concepts, for network dissection: from a folder, or from a benchmark with exact masks.

A concept has a name and belongs to a category (object, part, scene, colour ...). An image is annotated for some of the
categories; of these it has a mask for each concept that it shows. For Broden see :mod:`hansfree.benchmarks.broden`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from hansfree.benchmarks.colour_names import COLOURS, colour_of
from hansfree.benchmarks.image_files import image_size, read_image
from hansfree.benchmarks.objects_on_scenes import ObjectsOnScenes
from hansfree.core import Benchmark
from hansfree.errors import UserError


@dataclass(frozen=True)
class Concept:
    """What a mask shows."""

    name: str
    category: str


@dataclass(frozen=True)
class Masks:
    """The masks of a batch, for the concepts that any of its images shows."""

    number: Int[Tensor, "k"]
    """Which concepts, each once."""
    mask: Bool[Tensor, "b k h w"]
    annotated: Bool[Tensor, "b categories"]
    """For which categories each image has labels at all."""


class Concepts(ABC):
    """Images whose concepts are known to the pixel."""

    name: str
    concepts: tuple[Concept, ...]

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def images(self, index: Int[Tensor, "b"]) -> Float[Tensor, "b c h w"]:
        """The images at ``index``, pixels in [0, 1]."""

    @abstractmethod
    def masks(self, index: Int[Tensor, "b"]) -> Masks:
        """Their masks, which may be of another size than the images."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What tells these data from others, as JSON."""

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories, in the order in which the concepts name them."""
        return tuple(dict.fromkeys(concept.category for concept in self.concepts))

    @property
    def category(self) -> Int[Tensor, "concepts"]:
        """The number in ``categories`` of each concept."""
        places = {name: number for number, name in enumerate(self.categories)}
        return torch.tensor([places[concept.category] for concept in self.concepts])


def stacked(
    shown: Sequence[Mapping[int, np.ndarray]], annotated: Sequence[set[int]], categories: int, size: tuple[int, int]
) -> Masks:
    """The masks of a batch from those of each image, by the concept's number: boolean arrays [h, w]."""
    numbers = sorted({number for own in shown for number in own})
    mask = torch.zeros(len(shown), len(numbers), *size, dtype=torch.bool)
    for row, own in enumerate(shown):
        for number, there in own.items():
            mask[row, numbers.index(number)] = torch.from_numpy(there)
    known = torch.tensor([[number in own for number in range(categories)] for own in annotated])
    return Masks(torch.tensor(numbers, dtype=torch.long), mask, known)


def pixels(image: Image.Image) -> Float[Tensor, "c h w"]:
    """An image's pixels, in [0, 1]."""
    values = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(values).view(image.height, image.width, -1).permute(2, 0, 1)


# A folder


@final
class ConceptFolder(Concepts):
    """Concepts from a folder ``root``:

        images/NAME.jpg                        any format, any names, sub-folders too
        masks/CATEGORY/CONCEPT/NAME.png        as large as the image; the concept is where it is lighter than half

    An image is annotated for the categories in which it has a mask; a concept without a mask of an annotated image is
    not in it. Images and masks are resized to ``size`` x ``size`` pixels, masks to the nearest pixel.

    Raises ``UserError`` for no image, no concept, a concept without a mask, and a mask without an image or of another
    size than its image.
    """

    name = "concept-folder"

    def __init__(self, root: str | Path, *, size: int = 224) -> None:
        self._root, self._size = Path(root), size
        files = _pictures(self._root / "images", "an image")
        by_name = {path.relative_to(self._root / "images").with_suffix("").as_posix(): path for path in files}
        self._images = list(by_name.values())
        rows = {name: row for row, name in enumerate(by_name)}
        folders = sorted(path for path in self._root.glob("masks/*/*") if path.is_dir())
        if not folders:
            raise UserError(f"{self._root} holds no concept; put masks in folders masks/CATEGORY/CONCEPT.")
        self.concepts = tuple(Concept(path.name, path.parent.name) for path in folders)
        self._masks: dict[int, dict[int, Path]] = defaultdict(dict)
        for number, folder in enumerate(folders):
            for path in _pictures(folder, "a mask"):
                name = path.relative_to(folder).with_suffix("").as_posix()
                if name not in rows:
                    raise UserError(f"{path} is the mask of no image; add images/{name} or remove the mask.")
                _check_size(path, by_name[name])
                self._masks[rows[name]][number] = path

    def __len__(self) -> int:
        return len(self._images)

    def images(self, index: Int[Tensor, "b"]) -> Float[Tensor, "b c h w"]:
        """The images at ``index``, as colours."""
        size = self._size, self._size
        return torch.stack(
            [pixels(read_image(self._images[row]).resize(size, Image.Resampling.BILINEAR)) for row in index.tolist()]
        )

    def masks(self, index: Int[Tensor, "b"]) -> Masks:
        """Their masks."""
        size, category = (self._size, self._size), self.category.tolist()
        own = [self._masks[row] for row in index.tolist()]
        shown = [
            {
                number: np.asarray(read_image(path, "L").resize(size, Image.Resampling.NEAREST)) > 127
                for number, path in paths.items()
            }
            for paths in own
        ]
        return stacked(shown, [{category[number] for number in paths} for paths in own], len(self.categories), size)

    def record(self) -> dict[str, Any]:
        """The concepts, the size, and a digest of the names and sizes of all files."""
        files = [*self._images, *(path for own in self._masks.values() for path in own.values())]
        told = [f"{path.relative_to(self._root).as_posix()} {path.stat().st_size}" for path in files]
        return {
            "name": self.name,
            "size": self._size,
            "images": len(self),
            "concepts": [f"{concept.category}/{concept.name}" for concept in self.concepts],
            "files_sha256": hashlib.sha256("\n".join(told).encode()).hexdigest(),
        }


def _pictures(folder: Path, what: str) -> list[Path]:
    Image.init()
    known = Image.registered_extensions()
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and not path.name.startswith("."))
    if not found:
        raise UserError(f"{folder} does not hold {what}; put some there, or remove the folder.")
    return found


def _check_size(mask: Path, image: Path) -> None:
    own, wanted = image_size(mask), image_size(image)
    if own != wanted:
        raise UserError(
            f"{mask} has {own[0]} x {own[1]} pixels, but its image {image.name} has {wanted[0]} x {wanted[1]}; "
            "make the mask as large as the image."
        )


# A benchmark


@final
class BenchmarkConcepts(Concepts):
    """Concepts of one split of a benchmark with exact masks, at the benchmark's own size.

    object: the class, where its mask is at least half (of several labels, each class's own mask). scene: on
    objects-on-scenes, the kind of scene, where the animal is less than half. colour: of images with three channels,
    the nearest of eleven basic colour terms at each pixel. Every image is annotated for every category.

    Raises ``UserError`` for a benchmark that gives no masks.
    """

    def __init__(self, benchmark: Benchmark, split: str = "iid") -> None:
        if "mask" not in benchmark.gives:
            raise UserError(f"{benchmark.name} gives no masks, so its concepts are unknown; choose another benchmark.")
        self.name = f"{benchmark.name}/{split}"
        self._benchmark, self._split = benchmark, benchmark.split(split)
        scenes = benchmark.biases[:-1] if benchmark.name == ObjectsOnScenes.name else ()
        colours = COLOURS if benchmark.input.channels == 3 else ()
        self._scenes, self._colours = len(scenes), len(colours)
        self.concepts = (
            *(Concept(name, "object") for name in benchmark.classes),
            *(Concept(name, "scene") for name in scenes),
            *(Concept(name, "colour") for name in colours),
        )

    def __len__(self) -> int:
        return len(self._split)

    def images(self, index: Int[Tensor, "b"]) -> Float[Tensor, "b c h w"]:
        """The images at ``index``."""
        return self._split.batch(index).images

    def masks(self, index: Int[Tensor, "b"]) -> Masks:
        """Their masks, without the concepts that none of them shows."""
        batch = self._split.batch(index)
        assert batch.mask is not None
        classes = len(self._benchmark.classes)
        if batch.label.ndim == 1:
            parts = [_at(batch.mask[:, 0] >= 0.5, batch.label, classes)]
        else:
            parts = [batch.mask[:, 1:] >= 0.5]
        if self._scenes:
            assert batch.bias is not None
            parts.append(_at(batch.mask[:, 0] < 0.5, batch.bias, self._scenes))
        if self._colours:
            colours = torch.arange(self._colours)[:, None, None]
            parts.append(colour_of(batch.images)[:, None] == colours)
        mask = torch.cat(parts, 1)
        shown = mask.any(0).any(-1).any(-1).nonzero()[:, 0]
        annotated = torch.ones(len(index), len(self.categories), dtype=torch.bool)
        return Masks(shown, mask[:, shown], annotated)

    def record(self) -> dict[str, Any]:
        """The benchmark's own record, and the split."""
        return {"name": self.name, "benchmark": self._benchmark.record()}


def _at(where: Bool[Tensor, "b h w"], number: Int[Tensor, "b"], count: int) -> Bool[Tensor, "b count h w"]:
    """``where`` at each sample's own number, and nothing at the others."""
    return where[:, None] & (number[:, None] == torch.arange(count))[..., None, None]
