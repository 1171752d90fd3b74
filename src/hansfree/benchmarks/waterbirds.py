"""Waterbirds: birds of CUB on photographs of Places, waterbirds mostly on water and landbirds mostly on land.

Sagawa, Koh, Hashimoto & Liang, "Distributionally robust neural networks for group shifts", ICLR 2020,
https://arxiv.org/abs/1911.08731, as their code group_DRO writes it and as WILDS repeats it: ``metadata.csv`` with the
columns ``img_id,img_filename,y,split,place,place_filename``; y 0 landbird, 1 waterbird; place 0 land, 1 water; split
0 train, 1 valid, 2 test. In training 95 % of each class are at their own place; in valid and test half of each class.

Splits. Of a set whose valid and test are balanced, these are made, by aligned (y = place) and conflicting birds:

    train          the training images; with ``conflicting: false`` the aligned ones alone: Waterbirds-100
    valid          the validation images whose pair of class and place is in train
    valid_ood      all validation images: place tells nothing about class
    iid            aligned test images: "in-distribution" in Parchami-Araghi et al., 2024 (e2KD)
    shift          conflicting test images: "out-of-distribution" there
    ood            all test images: place tells nothing about class; what group_DRO and WILDS call test

So ood is iid and shift together. On it the accuracy of the worst group is theirs, and that weighted by training groups
their adjusted average.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, final

from hansfree.benchmarks.divided import Divided
from hansfree.benchmarks.folder import TABLE, FolderSplit, Row, described, read_table, split_of
from hansfree.core import InputSpec
from hansfree.errors import UserError

CLASSES, PLACES = ("landbird", "waterbird"), ("land", "water")
FOLDERS = ("waterbird_complete95_forest2water2", "waterbirds_v1.0", "waterbird_1.0_forest2water2")
"""Of group_DRO, of WILDS, and of GALS, whose training images are all aligned."""


@final
class Waterbirds(Divided[FolderSplit]):
    """Landbirds and waterbirds, whose background gives the class away while training and misleads afterwards.

    ``root`` is the folder with metadata.csv, or the one above it, where it has one of its usual names. ``size`` is the
    side to which images are brought, whatever their shape. ``conflicting`` says whether birds at the other place
    stay in train: without them it is Waterbirds-100. ``segmentations`` is CUB's folder of that name and gives masks.
    ``cache`` keeps decoded images in memory. ``bias`` is the place.
    """

    name: ClassVar[str] = "waterbirds"
    classes = CLASSES
    biases = PLACES
    shortcut = "the background"
    asks = MappingProxyType(
        {
            "iid": "Birds before their own class's background.",
            "ood": "All test birds, half of each class before its own background.",
            "shift": "Birds before the other class's background.",
        }
    )

    def __init__(
        self,
        *,
        root: str | Path,
        size: int = 224,
        conflicting: bool = True,
        segmentations: str | Path | None = None,
        cache: bool = False,
    ) -> None:
        if size < 1:
            raise UserError(f"benchmark.size is {size}; give a number of pixels.")
        self._root = _found(Path(root).expanduser())
        self.input = InputSpec(3, size, size)
        folder = None if segmentations is None else Path(segmentations).expanduser()
        rows = _rows(self._root, folder)
        self.mask_names = () if folder is None else ("bird",)
        self.gives = frozenset({"bias"} if folder is None else {"bias", "mask"})
        self._splits = {
            name: split_of(some, size=(size, size), resized=True, cache=cache)
            for name, some in divided(rows, conflicting=conflicting).items()
        }
        self._options = {
            "root": str(root), "size": size, "conflicting": conflicting,
            "segmentations": None if segmentations is None else str(segmentations), "cache": cache,
        }  # fmt: skip

    def _described(self, split: FolderSplit) -> dict[str, Any]:
        return described(split, self._root)


def divided(rows: Sequence[Row], *, conflicting: bool) -> dict[str, list[Row]]:
    """The splits of the module's list. Raises ``UserError`` for one that would be empty."""
    part = {
        name: [row for row in rows if (row.split if row.split in ("train", "valid") else "test") == name]
        for name in ("train", "valid", "test")
    }
    train = [row for row in part["train"] if conflicting or row.y == row.place]
    pairs = {(row.y, row.place) for row in train}
    splits = {
        "train": train,
        "valid": [row for row in part["valid"] if (row.y, row.place) in pairs],
        "valid_ood": part["valid"],
        "iid": [row for row in part["test"] if row.y == row.place],
        "ood": part["test"],
        "shift": [row for row in part["test"] if row.y != row.place],
    }
    for name, some in splits.items():
        if {row.y for row in some} != {"0", "1"}:
            raise UserError(
                f"Waterbirds' {name} lacks a class: benchmark.root has too few images of it; fetch the whole data set."
            )
    return splits


def _found(root: Path) -> Path:
    """The folder that holds the table."""
    if (root / TABLE).exists():
        return root
    there = [root / name for name in FOLDERS if (root / name / TABLE).exists()]
    if len(there) != 1:
        what = "holds several sets" if there else f"holds no {TABLE}"
        raise UserError(f"{root} {what}; set benchmark.root to the folder of one, such as {root / FOLDERS[0]}.")
    return there[0]


def _rows(root: Path, segmentations: Path | None) -> list[Row]:
    """The table's rows, with the masks that CUB has for them and no others."""
    table = read_table(root, classes=CLASSES)
    if table.problems:
        raise UserError(table.problems[0])
    if len(table.places) != len(PLACES):
        told = ", ".join(table.places) or "none"
        raise UserError(f"{root / TABLE} must have the places 0 (land) and 1 (water), not {told}; fetch it again.")
    return [
        replace(row, masks=() if segmentations is None else (_mask(row, root, segmentations),), clean=None, tier="")
        for row in table.rows
    ]


def _mask(row: Row, root: Path, segmentations: Path) -> Path:
    path = segmentations / row.image.relative_to(root).with_suffix(".png")
    if not path.is_file():
        raise UserError(
            f"{path} is missing, the mask of {row.image}; unpack segmentations.tgz of CUB and set "
            "benchmark.segmentations to its folder segmentations."
        )
    return path
