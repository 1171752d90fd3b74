"""The user's own images, with an accessory painted on each that gives the class away while training.

For any folder that the benchmark ``folder`` reads (of its places nothing is used), one accessory per class (pictures on
transparent ground) and marks that say where on each image one belongs: ``marks.csv`` with a row per image,

    img_filename    below the folder, as in its own table
    x, y            where the accessory goes, in pixels of the image from its upper left corner
    scale           how wide the neck (or whatever wears it) is there, in pixels
    angle           (optional) degrees by which the accessory is turned clockwise, 0 by default

An accessory is ``lengths`` times the scale long, along its longer side. One that is wider than high has its middle at
the mark, like a bow; one that is higher than wide hangs from it, like a necktie, and is turned about the mark.

Splits. Test images are those of ``test`` (or ``iid``) in the folder:

    train, valid   the class's own accessory in a share ``bias_ratio`` of the images, another class's in the others
    iid            as train
    shift          the same images with the next class's accessory
    ood            the same images without any
    valid_ood      the validation images without any, for methods that are granted it

``clean`` is the same image without the accessory. The masks are the folder's own, where it has any, and then the
accessory; without masks of the folder's own there is none, because the first one must show the object.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hansfree.benchmarks.coloured_digits import between, generator_for, known, stratified_order
from hansfree.benchmarks.composites import Picture, Views, compose, cut_out, parted
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.folder import FolderSplit, Row, fingerprint, read_table, table_lines
from hansfree.benchmarks.image_files import image_size
from hansfree.core import Batch, InputSpec, Split
from hansfree.errors import UserError, nearest

MARKS = "marks.csv"
COLUMNS = ("img_filename", "x", "y", "scale")
ANGLE = "angle"
Worn = Literal["biased", "random", "none"]
WORN = ("biased", "random", "none")


@final
@dataclass(frozen=True)
class Mark:
    """Where an accessory belongs: a point and a width in pixels of the image, and a turn clockwise in degrees."""

    x: float
    y: float
    scale: float
    angle: float = 0.0


def read_marks(path: Path) -> dict[str, Mark]:
    """The marks in a table, by image. Raises ``UserError`` for the first thing that is wrong with it."""
    if not path.is_file():
        raise UserError(f"{path} is missing; mark where the accessories go, or set benchmark.marks to the table.")
    (_, columns), *lines = table_lines(path) or [(0, list[str]())]
    for name in columns:
        if name not in (*COLUMNS, ANGLE):
            raise UserError(f"{path} has an unknown column {name!r}; {nearest(name, (*COLUMNS, ANGLE))}")
    for name in COLUMNS:
        if columns.count(name) != 1:
            raise UserError(f"{path} needs one column {name!r}; its first line must name {', '.join(COLUMNS)}.")
    marks: dict[str, Mark] = {}
    for number, cells in lines:
        where = f"{path}, line {number}"
        if len(cells) != len(columns):
            raise UserError(f"{where} has {len(cells)} values for {len(columns)} columns; mend it.")
        told = dict(zip(columns, (cell.strip() for cell in cells)))
        if (image := told.pop("img_filename")) in marks:
            raise UserError(f"{where} marks {image} again; leave one out.")
        marks[image] = Mark(**{name: _number(where, name, value) for name, value in told.items()})
        if marks[image].scale <= 0:
            raise UserError(f"{where} has the scale {told['scale']}; give the width in pixels, above 0.")
    return marks


def _number(where: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where} has the {name} {text!r}; write a number.")
    return value


# Who wears what, where


@final
@dataclass(frozen=True)
class Wardrobe:
    """Accessories, one per class, how long each is in units of a mark's scale, and the marks."""

    files: tuple[Path, ...]
    lengths: tuple[float, ...]
    marks: Mapping[str, Mark]
    folder: Path
    """What the images of the marks are named from."""

    def views(self, rows: Sequence[Row], which: Int[Tensor, "n"], size: int) -> Views:
        """In each image, which is brought to a square of ``size``, the accessory that ``which`` names."""
        worn, sides = which.tolist(), [image_size(row.image) for row in rows]
        marks = [self._mark(row, *side) for row, side in zip(rows, sides)]
        lengths = [self.lengths[number] * mark.scale for number, mark in zip(worn, marks)]
        largest = max(size * length / min(side) for length, side in zip(lengths, sides))
        pictures = tuple(cut_out(file, min(size, max(8, math.ceil(largest)))) for file in self.files)
        places = [
            place_of(mark, length, pictures[number], *side)
            for mark, length, number, side in zip(marks, lengths, worn, sides)
        ]
        return Views(pictures, which, torch.stack(places), torch.ones(len(worn), 3), size)

    def _mark(self, row: Row, width: int, height: int) -> Mark:
        name = row.image.relative_to(self.folder).as_posix()
        if name not in self.marks:
            raise UserError(f"{MARKS} has no line for {name}; mark where its accessory goes.")
        mark = self.marks[name]
        if not (0 <= mark.x <= width and 0 <= mark.y <= height):
            raise UserError(
                f"{MARKS} has x {mark.x:g} and y {mark.y:g} for {name}, which has {width} x {height} pixels; "
                "count pixels from its upper left corner."
            )
        return mark


def place_of(mark: Mark, length: float, picture: Picture, width: int, height: int) -> Float[Tensor, "2 3"]:
    """The map from an image of ``width`` x ``height``, brought to a square, to an accessory that is worn at ``mark``.

    The accessory's longer side has ``length`` pixels of the image. Both have corners at -1 and 1, as ``Place`` has.
    """
    _, high, wide = picture.shape
    half = torch.tensor([wide, high], dtype=torch.float64) * length / (2 * max(high, wide))
    turn = math.radians(mark.angle)
    axes = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    middle = torch.tensor([mark.x, mark.y], dtype=torch.float64)
    if high > wide:
        middle = middle + half[1] * axes[1]  # hangs: the mark is in the middle of its upper edge
    side = torch.tensor([width, height], dtype=torch.float64) / 2
    linear = axes / half[:, None]
    return torch.cat([linear * side, (linear @ (side - middle))[:, None]], 1).float()


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class WearingSplit(Split):
    """Images of a folder and what is worn in them, composed when a batch is asked for."""

    images: FolderSplit
    bias: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    worn: Views | None
    """None: nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.images.label)

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, composed; nothing is left to ``generator``. A bad image raises ``UserError``."""
        bare = self.images.batch(index)
        image = clean = bare.images
        covers = torch.zeros_like(clean[:, :1])
        if self.worn is not None:
            paint, covers = parted(self.worn.pixels[index])
            image = compose(paint, covers, clean)
        mask = None if bare.mask is None else torch.cat([bare.mask, covers], 1)
        return Batch(image, bare.label, index, bias=self.bias[index], mask=mask, clean=clean)

    def described(self, root: Path) -> dict[str, Any]:
        """Its size, how many samples wear their class's own accessory, and fingerprints, for a benchmark's record."""
        aligned = int((self.bias == self.label).sum())
        told = {} if self.worn is None else {"aligned": aligned, "conflicting": len(self) - aligned}
        prints = [fingerprint(self.images.rows, root), *([] if self.worn is None else [self.worn.fingerprint()])]
        return {"size": len(self), **told, "sha256": prints}


def read_images(rows: tuple[Row, ...], size: int) -> FolderSplit:
    """Rows whose classes have numbers as a split of squares, kept in memory once they are decoded."""
    label = torch.tensor([int(row.y) for row in rows])
    return FolderSplit(rows=rows, label=label, bias=None, size=(size, size), resized=True, kept={})


def dressed(
    parts: Mapping[str, FolderSplit], wardrobe: Wardrobe, ratio: float, seed: int, worn: Worn
) -> dict[str, WearingSplit]:
    """The splits, from the images of train, valid and test."""
    classes = len(wardrobe.files)
    train, valid, test = (parts[name] for name in ("train", "valid", "test"))

    def biased(name: str, images: FolderSplit) -> Int[Tensor, "n"]:
        return _mostly_own(images.label, classes, ratio, generator_for(seed, f"{name} worn"))

    def training(name: str, images: FolderSplit) -> Int[Tensor, "n"] | None:
        if worn == "random":
            return torch.randint(classes, images.label.shape, generator=generator_for(seed, f"{name} worn at random"))
        return None if worn == "none" else biased(name, images)

    wears = {
        "train": (train, training("train", train)),
        "valid": (valid, training("valid", valid)),
        "valid_ood": (valid, None),
        "iid": (test, biased("iid", test)),
        "ood": (test, None),
        "shift": (test, (test.label + 1) % classes),
    }
    return {name: _wearing(images, which, wardrobe) for name, (images, which) in wears.items()}


def _wearing(images: FolderSplit, which: Int[Tensor, "n"] | None, wardrobe: Wardrobe) -> WearingSplit:
    if which is None:
        return WearingSplit(images=images, bias=torch.full_like(images.label, len(wardrobe.files)), worn=None)
    return WearingSplit(images=images, bias=which, worn=wardrobe.views(images.rows, which, images.size[0]))


def _mostly_own(label: Tensor, classes: int, ratio: float, generator: torch.Generator) -> Int[Tensor, "n"]:
    """Each sample's own accessory in a share ``ratio`` of each class, any of the others in the rest."""
    rest = stratified_order(label, generator)[round(ratio * len(label)) :]
    other = torch.randint(1, classes, rest.shape, generator=generator)
    return label.index_copy(0, rest, (label[rest] + other) % classes)


def read_wardrobe(
    root: Path, folder: Path, classes: Sequence[str], one_each: Mapping[str, Sequence[Any]], marks: str
) -> Wardrobe:
    """Accessories and marks below ``root`` for images below ``folder``.

    ``one_each`` are the accessories' files and their lengths, by the names of their settings. Raises ``UserError``
    where they do not fit.
    """
    for key, values in one_each.items():
        if len(values) != len(classes):
            raise UserError(f"benchmark.{key} has {len(values)} entries for {len(classes)} classes; give one for each.")
    names, lengths = one_each.values()
    if min(lengths) <= 0:
        raise UserError(f"benchmark.lengths holds {min(lengths)}; give lengths above 0.")
    files = tuple(root / name for name in names)
    for file in files:
        image_size(file)  # a missing one is told now
    return Wardrobe(files, tuple(lengths), read_marks(root / marks), folder)


def check_settings(size: int, ratio: float, worn: str) -> None:
    """Raises ``UserError`` for images too small to show anything, and for what is no share or no choice."""
    if size < 16:
        raise UserError(f"benchmark.size is {size}; give 16 pixels or more.")
    between("bias_ratio", ratio, 0, 1)
    known("worn", worn, WORN)


@final
class FolderWithAccessories(Divided[WearingSplit]):
    """A folder of images on which an accessory is painted that gives the class away while training.

    ``bias`` is the accessory, an index into ``biases``: first the classes' own, so that ``bias == label`` means
    aligned, and last "none".

    ``root`` is a folder as of the benchmark ``folder``; ``accessories`` are pictures below it, in the order of the
    classes, and ``marks`` is the table that says where they go; ``lengths`` are the accessories' longer sides in units
    of a mark's scale (default: 1). ``size`` is the side of the images in pixels, to which they are brought without
    regard to their shape; ``bias_ratio`` the share of training images with their class's own accessory; ``split_seed``
    every random choice. ``worn`` is for teachers: train and valid wear their class's own (biased), any without regard
    to the class (random) or none; the test splits stay.
    """

    name: ClassVar[str] = "folder-with-accessories"
    shortcut = "the accessory"
    asks = MappingProxyType(
        {
            "iid": "Each class with its own accessory as often as in training.",
            "ood": "Without accessories.",
            "shift": "Each class with another one's accessory.",
        }
    )

    def __init__(
        self,
        *,
        root: str | Path,
        accessories: Sequence[str],
        marks: str = MARKS,
        lengths: Sequence[float] | None = None,
        size: int = 224,
        bias_ratio: int | float = 1.0,
        split_seed: int = 0,
        worn: Worn = "biased",
    ) -> None:
        check_settings(size, bias_ratio, worn)
        self._root = Path(root).expanduser()
        table = read_table(self._root)
        if table.problems:
            raise UserError(table.problems[0])
        rows = {"train": table.of("train"), "valid": table.of("valid"), "test": table.of("iid")}
        if not rows["test"]:
            raise UserError(f"{self._root} has no test images; choose some.")
        self.classes, self.input = table.classes, InputSpec(3, size, size)
        self.biases = (*(Path(file).stem for file in accessories), "none")
        self.mask_names = (*table.mask_names, "accessory") if table.mask_names else ()
        self.gives = frozenset({"bias", "clean", "mask"} if table.mask_names else {"bias", "clean"})
        one_each = {"accessories": accessories, "lengths": [1.0] * len(accessories) if lengths is None else lengths}
        wardrobe = read_wardrobe(self._root, self._root, self.classes, one_each, marks)
        parts = {part: read_images(own, size) for part, own in rows.items()}
        self._splits = dressed(parts, wardrobe, bias_ratio, split_seed, worn)
        self._options = {
            "root": str(root), "accessories": list(accessories), "marks": marks, "lengths": list(wardrobe.lengths),
            "size": size, "bias_ratio": bias_ratio, "split_seed": split_seed, "worn": worn,
        }  # fmt: skip

    def _described(self, split: WearingSplit) -> dict[str, Any]:
        return split.described(self._root)
