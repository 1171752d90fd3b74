"""The user's own images: a tree of folders, or a table beside the images.

A tree names its splits and classes by folders: ``train/CLASS/*.png``, ``valid/CLASS/...`` (or ``val``, ``validation``),
and ``test/CLASS/...`` (the same as ``iid``) or ``iid``, ``ood``, ``shift`` and ``valid_ood``. ImageNet, whose published
validation images are what everybody tests on, is such a tree: ``valid: 50`` makes them ``iid`` and takes 50 training
images of each class as ``valid``.

A table is ``metadata.csv`` in the layout of WILDS (Koh et al., "WILDS: a benchmark of in-the-wild distribution
shifts", ICML 2021) and of Waterbirds, one row per image:

    img_filename    below the folder
    y               the class: a number from 0, or a name
    split           0 train, 1 valid, 2 test
    place           (optional) the spurious attribute: a number from 0, or a name
    mask_filename   (optional) grey, white on the object, as large as the image; several masks are parted by ";"
    clean_filename  (optional) the image as an unbiased teacher sees it, as large as the image
    split_name      (optional) train, valid, valid_ood, iid, ood or shift; decides instead of ``split``
    tier            (optional) a name for the part of its split that a row belongs to

``img_id`` and ``place_filename``, which Waterbirds' own table has, may be there too. A row of ``test`` falls into
``iid`` where its class was seen at its place in training, into ``shift`` where its place is known, but not with its
class, and into ``ood`` where its place was never seen; without places all are ``iid``. Names of classes, places and
masks are read from ``benchmark.json`` where there is one: ``{"classes": [...], "places": [...], "mask_names": [...]}``.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from hansfree.benchmarks.choosing import check_each_class, drawn, listed
from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.image_files import read_image
from hansfree.core import TEST_SPLITS, Batch, InputSpec, Split
from hansfree.errors import UserError, nearest

TABLE, NAMES = "metadata.csv", "benchmark.json"
REQUIRED = ("img_filename", "y", "split")
OPTIONAL = ("place", "mask_filename", "clean_filename", "split_name", "tier")
UNUSED = ("img_id", "place_filename")
SPLITS = ("train", "valid", "valid_ood", "iid", "ood", "shift")
NUMBERED = {"0": "train", "1": "valid", "2": "test"}
FOLDERS = {**{name: name for name in SPLITS}, "val": "valid", "validation": "valid", "test": "iid"}

MOST_NAMES = 100_000
"""Classes or places: a larger number is something else, an image's number say."""


@final
@dataclass(frozen=True)
class Row:
    """One image: where it is said, its files, and what is told about it."""

    source: str
    """The table's line, or the file: what a message names."""
    image: Path
    y: str
    split: str
    place: str = ""
    masks: tuple[Path, ...] = ()
    clean: Path | None = None
    tier: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """All its files, the image first."""
        return (self.image, *self.masks, *(() if self.clean is None else (self.clean,)))


@final
@dataclass(frozen=True)
class Table:
    """What a folder says about its images, and what is wrong with that, in sentences."""

    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    classes: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    mask_names: tuple[str, ...] = ()

    def of(self, split: str) -> tuple[Row, ...]:
        """The rows of one split, in order."""
        return tuple(row for row in self.rows if row.split == split)


# Reading what is said


def read_table(
    root: Path,
    classes: Sequence[str] | None = None,
    mask_names: Sequence[str] | None = None,
    *,
    splits: Sequence[str] = ("train", "valid"),
) -> Table:
    """What ``root`` says about its images, without opening any. Problems, absent ``splits`` too, are told in the table.

    Raises ``UserError`` where there is no folder, or neither a table nor a tree in it.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; set benchmark.root to the folder of the images.")
    names = _names(root)
    problems: list[str] = []
    rows = list(_table_rows(root, problems) if (root / TABLE).exists() else _tree_rows(root))
    if not rows and not problems:
        problems.append(f"{root} holds no images; put some there.")
    told_classes, number = _numbered([row.y for row in rows], classes or names.get("classes"), "class", rows, problems)
    told_places, place = (), []
    if any(row.place for row in rows):
        told_places, place = _numbered([row.place for row in rows], names.get("places"), "place", rows, problems)
    rows = [replace(row, y=str(y)) for row, y in zip(rows, number)] if number else rows
    rows = [replace(row, place=str(at)) for row, at in zip(rows, place)] if place else rows
    rows = _fallen(rows)
    masks = max((len(row.masks) for row in rows), default=0)
    told_masks = tuple(mask_names or names.get("mask_names") or ())[:masks]
    problems += _gaps(root, rows, told_classes, masks, splits)
    told_masks += tuple("object" if masks == 1 else f"mask {i + 1}" for i in range(len(told_masks), masks))
    return Table(tuple(rows), tuple(problems), told_classes, told_places, told_masks)


def _names(root: Path) -> dict[str, list[str]]:
    if not (root / NAMES).exists():
        return {}
    try:
        found = json.loads((root / NAMES).read_text(encoding="utf-8"))
        return {key: [str(name) for name in found[key]] for key in ("classes", "places", "mask_names") if key in found}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{root / NAMES} is not as hansfree data make writes it ({error}); mend or remove it."
        ) from error


def _table_rows(root: Path, problems: list[str]) -> Iterator[Row]:
    path = root / TABLE
    lines = table_lines(path)
    columns = lines[0][1] if lines else []
    bad = _bad_columns(path, columns)
    problems += bad
    seen: dict[str, int] = {}
    for number, cells in [] if bad else lines[1:]:
        where = f"{path}, line {number}"
        if len(cells) != len(columns):
            problems.append(f"{where} has {len(cells)} values for {len(columns)} columns; mend it.")
            continue
        told = dict(zip(columns, (cell.strip() for cell in cells)))
        row = _row(root, where, told, problems)
        if row is None:
            continue
        if (first := seen.setdefault(str(row.image), number)) != number:  # a path: ./a.png is a.png
            problems.append(f"{where} names {told['img_filename']} again, as line {first} does; leave one out.")
        yield row


def table_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Numbers and values of the lines that are not empty."""
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        return [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path} is not a table of comma-separated values in UTF-8 ({error}); save it as one."
        ) from error


def _bad_columns(path: Path, columns: list[str]) -> list[str]:
    known = (*REQUIRED, *OPTIONAL, *UNUSED)
    told = [
        f"{path} lacks the column {name!r}; its first line must name {', '.join(REQUIRED)}."
        for name in REQUIRED
        if name not in columns
    ]
    told += [f"{path} has an unknown column {name!r}; {nearest(name, known)}" for name in columns if name not in known]
    twice = [name for name, count in Counter(columns).items() if count > 1]
    return told + [f"{path} has the column {name!r} twice; leave one out." for name in twice]


def _row(root: Path, where: str, told: dict[str, str], problems: list[str]) -> Row | None:
    empty = [name for name in REQUIRED if not told[name]]
    if empty:
        problems.append(f"{where} has no {empty[0]}; fill it in.")
        return None
    named = told.get("split_name") or NUMBERED.get(told["split"])
    if named not in (*SPLITS, "test"):
        split = told.get("split_name") or told["split"]
        problems.append(f"{where} has the split {split!r}; write 0 (train), 1 (valid) or 2 (test).")
        return None
    masks = [name.strip() for name in told.get("mask_filename", "").split(";") if name.strip()]
    clean = told.get("clean_filename", "")
    files = [told["img_filename"], *masks, *([clean] if clean else [])]
    for file in files:
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts:
            problems.append(f"{where} names {file}, which is outside of the folder; name files below {root}.")
            return None
        if not _is_file(root / file):
            problems.append(f"{where} names {file}, which is missing; put it there or leave the line out.")
            return None
    return Row(
        where,
        root / files[0],
        told["y"],
        named,
        told.get("place", ""),
        tuple(root / mask for mask in masks),
        root / clean if clean else None,
        told.get("tier", ""),
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, say
        return False


def _tree_rows(root: Path) -> Iterator[Row]:
    found = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name in FOLDERS]
    if not found:
        raise UserError(
            f"{root} holds neither {TABLE} nor folders train and valid; sort the images into train/CLASS and "
            f"valid/CLASS, or list them in {TABLE}."
        )
    endings = Image.registered_extensions()
    for folder in found:
        for image in sorted(folder.glob("*/**/*")):
            if image.suffix.lower() in endings and image.is_file() and not image.name.startswith("."):
                yield Row(str(image), image, image.relative_to(folder).parts[0], FOLDERS[folder.name])


def _numbered(
    values: list[str], names: Sequence[str] | None, what: str, rows: list[Row], problems: list[str]
) -> tuple[tuple[str, ...], list[int]]:
    """Names, and the number of each value: its place among the names, or the number that it is itself."""
    are_numbers = bool(values) and all(value.removeprefix("-").isdecimal() for value in values)
    known = f"numbers from 0 to {MOST_NAMES - 1}, or names"
    if names is not None or not are_numbers:
        names = sorted(set(values) - {""}) if names is None else names
        known = ", ".join(map(str, names))
    else:
        names = [str(number) for number in range(max(map(_whole, values)) + 1)]
    by_name = {str(name): number for number, name in enumerate(names)}
    numbers: list[int] = []
    for row, value in zip(rows, values):
        number = _whole(value) if are_numbers else by_name.get(value, -1)
        if not 0 <= number < len(names):
            told = f"the {what} {value!r}" if value else f"no {what}"
            problems.append(f"{row.source} has {told}; known: {known}.")
            return tuple(map(str, names)), []
        numbers.append(number)
    return tuple(map(str, names)), numbers


def _whole(value: str) -> int:
    """The number that ``value`` writes, or -1 for one so large that it was never meant to count anything."""
    digits = value.lstrip("0")
    return int(digits or 0) if len(digits) < len(str(MOST_NAMES)) else -1


def _fallen(rows: list[Row]) -> list[Row]:
    """Rows of ``test`` as rows of iid, shift and ood."""
    pairs = {(row.y, row.place) for row in rows if row.split == "train"}
    places = {place for _, place in pairs}

    def split(row: Row) -> str:
        if row.split != "test":
            return row.split
        if not row.place or (row.y, row.place) in pairs:
            return "iid"
        return "shift" if row.place in places else "ood"

    return [replace(row, split=split(row)) for row in rows]


def _gaps(root: Path, rows: list[Row], classes: tuple[str, ...], masks: int, splits: Sequence[str]) -> Iterator[str]:
    """What is missing from a table whose lines are right."""
    if not rows:
        return
    if len(classes) < 2:
        yield f"{root} holds one class only ({', '.join(classes)}); a classifier needs two or more."
    for split in splits:
        if not any(row.split == split for row in rows):
            yield f"{root} has no {split} images; choose some."
    learned = {row.y for row in rows if row.split == "train"}
    for number, name in enumerate(classes):
        if learned and str(number) not in learned and name not in learned:
            yield f"{root} has no training image of the class {name!r}; add some, or leave the class out."
    for row in rows:
        if len(row.masks) != masks:
            yield f"{row.source} has {len(row.masks)} masks, others have {masks}; a missing mask cannot be made up."
            break
    yield from _half_filled("clean_filename", [(row, row.clean) for row in rows])
    for split in SPLITS:
        yield from _half_filled("tier", [(row, row.tier) for row in rows if row.split == split])


def _half_filled(column: str, told: list[tuple[Row, object]]) -> Iterator[str]:
    empty = [row for row, value in told if not value]
    if 0 < len(empty) < len(told):
        yield f"{empty[0].source} has no {column}, which others have; fill it in."


# Holding out


def held_out(
    rows: Iterable[Row], classes: Sequence[str], valid: int | str | Path, seed: int
) -> tuple[list[Row], list[Row]]:
    """Training images without, and those for, validation: ``valid`` of each class, or those that a file lists.

    Raises ``UserError`` where no training image of a class would remain, and for a list that does not fit.
    """
    rows = list(rows)
    label = torch.tensor([int(row.y) for row in rows])
    if isinstance(valid, int):
        chosen = drawn(label, valid, seed, classes, key="benchmark.valid", left=1)
    else:
        chosen = listed(valid, [row.image for row in rows], key="benchmark.valid")
    stays = torch.ones(len(rows), dtype=torch.bool)
    stays[chosen] = False
    check_each_class(label[stays], classes, f"benchmark.valid: {valid} leaves train with")
    train = [rows[at] for at in stays.nonzero()[:, 0].tolist()]
    return train, [replace(rows[at], split="valid") for at in chosen.tolist()]


def _with_held_out(root: Path, table: Table, valid: int | str | Path, seed: int) -> Table:
    """``table`` with validation images out of train, and what it calls valid as iid."""
    there = {row.split for row in table.rows}
    if "valid" in there and there & set(TEST_SPLITS):
        raise UserError(f"{root} has images to validate and to test on; take benchmark.valid out.")
    train, ours = held_out(table.of("train"), table.classes, valid, seed)
    others = [replace(row, split="iid") if row.split == "valid" else row for row in table.rows if row.split != "train"]
    return replace(table, rows=(*train, *ours, *others))


# Reading the images


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class FolderSplit(Split):
    """Images of one split, read when a batch is asked for."""

    rows: tuple[Row, ...]
    label: Int[Tensor, "n"]  # pyright: ignore[reportIncompatibleVariableOverride]
    bias: Int[Tensor, "n"] | None
    tiers: Mapping[str, Int[Tensor, "_"]] = field(default_factory=dict[str, Tensor])  # pyright: ignore[reportIncompatibleVariableOverride]
    """Samples of each tier."""
    size: tuple[int, int]
    """Height and width that every image comes to."""
    resized: bool
    """Whether images of another size are resized; else they are refused."""
    kept: dict[int, Tensor] | None = field(default=None, repr=False)
    """Decoded images, where they are kept."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The image of each row."""
        return tuple(row.image for row in self.rows)

    def batch(self, index: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Batch:
        """The samples at ``index``, read; nothing is left to ``generator``. Raises ``UserError`` for a bad image."""
        planes = torch.stack([self._planes(number) for number in index.tolist()]).float() / 255
        masks = len(self.rows[0].masks)
        return Batch(
            input=planes[:, :3],
            label=self.label[index],
            index=index,
            bias=None if self.bias is None else self.bias[index],
            mask=planes[:, 3 : 3 + masks] if masks else None,
            clean=planes[:, 3 + masks :] if self.rows[0].clean is not None else None,
        )

    def _planes(self, number: int) -> Tensor:
        """Image, masks and clean twin of one sample on top of each other, as bytes."""
        if self.kept is not None and number in self.kept:
            return self.kept[number]
        images = read_row(self.rows[number])
        height, width = self.size
        if not self.resized and images[0].size != (width, height):
            raise UserError(
                f"{self.rows[number].image} has {images[0].height} x {images[0].width} pixels, the first training "
                f"image {height} x {width}; set benchmark.size to the side that all shall have."
            )
        arrays = [np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) for image in images]
        planes = torch.cat([torch.from_numpy(a.reshape(*a.shape[:2], -1).copy()).permute(2, 0, 1) for a in arrays])
        if self.kept is not None:
            self.kept[number] = planes
        return planes


def split_of(rows: Sequence[Row], *, size: tuple[int, int], resized: bool, cache: bool) -> FolderSplit:
    """The split of these rows, whose classes and places are numbers already."""
    names = dict.fromkeys(row.tier for row in rows if row.tier)
    return FolderSplit(
        rows=tuple(rows),
        label=torch.tensor([int(row.y) for row in rows]),
        bias=torch.tensor([int(row.place) for row in rows]) if rows[0].place else None,
        tiers={name: torch.tensor([i for i, row in enumerate(rows) if row.tier == name]) for name in names},
        size=size,
        resized=resized,
        kept={} if cache else None,
    )


def read_row(row: Row) -> list[Image.Image]:
    """Image, masks (grey) and clean twin of ``row``.

    Raises ``UserError`` for a bad image, and for a mask or a clean twin that is not as large as the image.
    """
    image = read_image(row.image)
    others = [*(read_image(mask, "L") for mask in row.masks), *(() if row.clean is None else (read_image(row.clean),))]
    for path, other in zip(row.files[1:], others):
        if other.size != image.size:
            raise UserError(
                f"{path} has {other.height} x {other.width} pixels but {row.image} has {image.height} x {image.width}; "
                "both must be aligned pixel by pixel."
            )
    return [image, *others]


@final
class Folder(Divided[FolderSplit]):
    """The user's own images, from a tree of folders or a table; see docs/benchmarks/folder.md.

    ``root`` is the folder; ``size`` the side in pixels to which images are resized (default: they stay as they are
    and must be equal); ``classes`` and ``mask_names`` are names in the order of their numbers (default: those in
    benchmark.json, else those in the table or the tree); ``cache`` keeps decoded images in memory, 3 bytes per pixel
    and one per pixel of each mask. Images are read as colours, 16 bits as 8.

    ``valid`` takes so many training images of each class, drawn by ``split_seed``, or those that a text file lists, one
    a line, as valid; what the folder calls valid is iid then. Without it the folder has validation images of its own.

    ``hansfree data check FOLDER`` tells everything that is wrong with a folder, this benchmark the first thing.
    """

    name: ClassVar[str] = "folder"

    def __init__(
        self,
        *,
        root: str | Path,
        size: int | None = None,
        classes: Sequence[str] | None = None,
        mask_names: Sequence[str] | None = None,
        valid: int | str | Path | None = None,
        split_seed: int = 0,
        cache: bool = False,
    ) -> None:
        self._root = Path(root).expanduser()
        table = read_table(self._root, classes, mask_names, splits=("train", "valid") if valid is None else ("train",))
        if table.problems:
            raise UserError(table.problems[0])
        if valid is not None:
            table = _with_held_out(self._root, table, valid, split_seed)
        if size is not None and size < 1:
            raise UserError(f"benchmark.size is {size}; give a number of pixels.")
        first = read_image(table.of("train")[0].image)
        height, width = (size, size) if size else (first.height, first.width)
        self.input = InputSpec(3, height, width)
        self.classes, self.biases, self.mask_names = table.classes, table.places, table.mask_names
        given = {"bias": bool(table.places), "mask": bool(table.mask_names), "clean": table.rows[0].clean is not None}
        self.gives = frozenset(name for name, there in given.items() if there)
        self.shortcut = "a shortcut" if table.places or table.of("ood") or table.of("shift") else None
        how = {"size": (height, width), "resized": size is not None, "cache": cache}
        self._splits = {name: split_of(table.of(name), **how) for name in SPLITS if table.of(name)}
        self._options = {
            "root": str(root), "size": size, "valid": Path(valid).name if isinstance(valid, str | Path) else valid,
            "split_seed": split_seed, "cache": cache,
        }  # fmt: skip

    def _described(self, split: FolderSplit) -> dict[str, Any]:
        return described(split, self._root)


def described(split: FolderSplit, root: Path) -> dict[str, Any]:
    """Of a split its size, how many images have their class's place and how many another, groups and a fingerprint."""
    groups = Counter((row.y, row.place) for row in split.rows)
    counts = {f"y:{y},a:{place}" if place else f"y:{y}": count for (y, place), count in sorted(groups.items())}
    aligned = sum(row.y == row.place for row in split.rows)
    told = {} if split.bias is None else {"aligned": aligned, "conflicting": len(split) - aligned}
    return {"size": len(split), **told, "groups": counts, "sha256": fingerprint(split.rows, root)}


def fingerprint(rows: Iterable[Row], root: Path) -> str:
    """SHA-256 of the rows' labels, and of the names, below ``root`` or alone, and sizes in bytes of their files."""
    sha = hashlib.sha256()
    for row in rows:
        names = [file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name for file in row.files]
        files = [(name, file.stat().st_size) for name, file in zip(names, row.files)]
        sha.update(json.dumps([files, row.y, row.place, row.tier]).encode())
    return sha.hexdigest()
